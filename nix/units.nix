# The systemd units and configs, defined once: rendered into systemd/ (nix/render.nix) and packaged for NixOS.
# A unit is a list of sections; a section is its name and its lines, "# ..." lines included.
{
  # The command, and the PATH on which vLLM's compile step finds a C compiler.
  yap-text ? "/usr/local/bin/yap-text",
  path ? "/usr/local/bin:/usr/bin:/bin",
  # Settings and secrets, a file each; null: no such file.
  settings ? "-/etc/yap-text/yap-text.env",
  apiKey ? "/etc/yap-text/api-key",
  hfToken ? "/etc/yap-text/hf-token",
  address ? "127.0.0.1:8000",
  # Whether AWQ weights are made before a start if the settings ask for them.
  quantize ? true,
  # The command that rotates YAP_TEXT_LOG_FILE; null: no such units.
  logrotate ? "/usr/sbin/logrotate",
  # The program that loads NVIDIA's modules and makes their device nodes; null: the machine does that by itself.
  nvidia-modprobe ? "/usr/bin/nvidia-modprobe",
  # NVIDIA's Multi-Process Service, for a unit that is off until it is enabled; null: no such unit.
  mps ? "/usr/bin/nvidia-cuda-mps-control",
  # More lines for [Service] of the server.
  service ? [ ],
}:
let
  when = condition: items: if condition then items else [ ];
  rotate = logrotate != null;

  # DeviceAllow=char-nvidia-uvm matches nothing while the module is away, and no service of ours may load one.
  afterNvidia =
    when (nvidia-modprobe != null) [ "Wants=yap-text-uvm.service" ]
    ++ [
      "After=${if nvidia-modprobe != null then "yap-text-uvm.service " else ""}nvidia-persistenced.service nvidia-fabricmanager.service"
    ];

  # What every unit of ours goes without.
  hardening = [
    "NoNewPrivileges=yes"
    "PrivateTmp=yes"
    "PrivateMounts=yes"
    "ProtectSystem=strict"
    "ProtectHome=yes"
    "ProtectProc=invisible"
    "ProtectHostname=yes"
    "ProtectKernelLogs=yes"
    "ProtectKernelModules=yes"
    "ProtectKernelTunables=yes"
    "ProtectControlGroups=yes"
    "RestrictNamespaces=yes"
    "RestrictRealtime=yes"
    "RestrictSUIDSGID=yes"
    "LockPersonality=yes"
    "RemoveIPC=yes"
    "SystemCallArchitectures=native"
    "UMask=0077"
    # No prompt, reply or key in a core file. Not 0, which is no limit for one that is piped to a program (core(5)).
    "LimitCORE=1"
  ];

  user = [
    "DynamicUser=yes"
    "# One name for all units: two users could not own the same folders, and MPS serves only clients of its own user."
    "User=yap-text"
    "CapabilityBoundingSet="
    "AmbientCapabilities="
  ];

  gpu = [
    "DevicePolicy=closed"
    "# The GPU. ProtectClock= stays off: with it, DevicePolicy=closed closes these too."
    "DeviceAllow=char-nvidiactl rw"
    "DeviceAllow=char-nvidia-caps rw"
    "DeviceAllow=char-nvidia-frontend rw"
    "DeviceAllow=char-nvidia-uvm rw"
    "DeviceAllow=char-drm rw"
  ];

  # The program in a unit: its settings, its secrets, its folders and what it may do, the same for serving and for
  # quantizing.
  program = [
    "EnvironmentFile=${settings}"
    "Environment=PATH=${path}"
  ]
  ++ when (apiKey != null) [
    "# One file per secret, which must exist. If it is empty, the environment applies, then the default."
    "LoadCredential=YAP_TEXT_API_KEY:${apiKey}"
  ]
  ++ when (hfToken != null) [ "LoadCredential=HF_TOKEN:${hfToken}" ]
  ++ user
  ++ [
    "StateDirectory=yap-text"
    "CacheDirectory=yap-text"
    "LogsDirectory=yap-text"
    "# Weights and compiled graphs survive a restart."
    "Environment=HF_HOME=%C/yap-text/hf VLLM_CACHE_ROOT=%C/yap-text/vllm"
    "Environment=TRITON_CACHE_DIR=%C/yap-text/triton TORCHINDUCTOR_CACHE_DIR=%C/yap-text/inductor"
    "Environment=FLASHINFER_WORKSPACE_BASE=%C/yap-text XDG_CACHE_HOME=%C/yap-text HOME=%S/yap-text"
    "Environment=CUDA_CACHE_PATH=%C/yap-text/nv"
    "# Netlink and local sockets: torch and the engine processes use them."
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK"
    "SystemCallFilter=@system-service"
    "SystemCallFilter=~@privileged @resources"
    "# Allowed again from @resources: vLLM binds threads and memory to the CPU's node, tokenizing lowers its priority, and ZeroMQ ends"
    "# the process if it may not set its threads' scheduler, which is the default one (RestrictRealtime=)."
    "SystemCallFilter=sched_setaffinity sched_setscheduler setpriority set_mempolicy mbind migrate_pages"
    "SystemCallErrorNumber=EPERM"
  ]
  ++ gpu
  ++ [
    "# MemoryDenyWriteExecute= stays off: Triton and torch compile while they run."
    "# ProcSubset=pid stays off: vLLM reads /proc/cpuinfo and /proc/meminfo."
  ]
  ++ hardening;

  # Where systemd does not say how long it will wait, it does not grow: the rest of what 254 waits, in seconds, by the
  # starts in a row that failed. The first two are covered by RestartSec=. A stop ends the sleep at once.
  waiting = builtins.concatStringsSep "; " [
    "test -z \"$$(systemctl show -P RestartUSecNext yap-text)\" || exit 0"
    "n=$$(systemctl show -P NRestarts yap-text)"
    "test \"$$n\" -gt 1 || exit 0"
    "set -- 3 6 12 21 35 55"
    "if test $$n -lt 7; then shift $$((n - 2)); else shift 5; fi"
    "echo \"<4>$$n starts in a row have failed. The next try is in $$1 s; at once: systemctl restart yap-text\" >&2"
    "exec sleep $$1"
  ];

  units = {
    "yap-text.service" = [
      {
        name = "Unit";
        lines = [
          "Description=Yap Text, real-time text inference for voice companions"
          "Wants=network-online.target"
          "After=network-online.target yap-text.socket"
          "Requires=yap-text.socket"
        ]
        ++ afterNvidia
        ++ when quantize [
          "# Wants=, not Requires=: an upload to the hub may fail although the weights are there."
          "Wants=yap-text-quantize.service"
          "After=yap-text-quantize.service"
        ]
        ++ when rotate [ "Wants=yap-text-logrotate.timer" ]
        ++ [
          # It restarts for ever, with growing steps.
          "StartLimitIntervalSec=0"
        ];
      }
      {
        name = "Service";
        lines = [
          "Type=notify"
          "NotifyAccess=main"
          "ExecStart=${yap-text} serve"
          "# Reads YAP_TEXT_KEY_FILE and PERSONAS_DIR again."
          "ExecReload=/bin/sh -c 'kill -HUP $MAINPID'"
          "# A cold 24B model: download, load, compile."
          "TimeoutStartSec=3600"
          "# Longer than DRAIN_TIMEOUT_S and the close of every socket."
          "TimeoutStopSec=45"
          "WatchdogSec=60"
          "Restart=on-failure"
          "# 2: settings or models must be corrected first. The socket stops, too: otherwise its next client would start the service."
          "# 75 (the hub, the driver, the disk, the port) and 1 (a crash) may pass by themselves."
          "RestartPreventExitStatus=2"
          "ExecStopPost=-+/bin/sh -c 'test \"$$EXIT_STATUS\" != 2 || systemctl --job-mode=ignore-dependencies stop yap-text.socket'"
          "# systemd 252 logs a line for each killed thread. This line comes last and names the reason."
          "ExecStopPost=-/bin/sh -c 'test -z \"$$EXIT_CODE\" -o \"$$EXIT_CODE\" = exited || echo \"<4>The service was ended by $$EXIT_CODE $$EXIT_STATUS ($$SERVICE_RESULT).\" >&2'"
          "# A stop during the start."
          "SuccessExitStatus=143"
          "# The waits between starts that fail grow from 5 s to a minute. systemd before 254 does not know RestartSteps=; there"
          "# ExecStartPre= waits for the rest of the time. A start that succeeds resets the waits."
          "RestartSec=5"
          "RestartSteps=6"
          "RestartMaxDelaySec=60"
          "ExecStartPre=-+/bin/sh -c '${waiting}'"
          "ExecStartPost=-+systemctl reset-failed yap-text.service"
          "# Engine processes get no SIGTERM while the service drains."
          "KillMode=mixed"
          "# One descriptor per socket: MAX_CONCURRENT_CONNECTIONS (100,000 at most) and MAX_PENDING_HANDSHAKES, and about 100 for files."
          "# The service raises its soft limit to what its settings need. The soft limit of 1024 is for programs that use select(2)."
          "LimitNOFILE=1024:524288"
          "# If the kernel kills any process of the service for lack of memory, all of them end and the service starts again:"
          "# the journal then has `Failed with result 'oom-kill'`, and the kernel's log names the process."
          "OOMPolicy=stop"
          "# No MemoryHigh= and no MemoryMax=: how much a model needs is known only once it is loaded. MemoryHigh= would slow every"
          "# turn down until the watchdog ends the service. To protect other programs on this host, set MemoryMax= in"
          "# `systemctl edit yap-text`, well above the Memory: that `systemctl status yap-text` shows under load."
          "RuntimeDirectory=yap-text"
        ]
        ++ program
        ++ when (mps != null) [
          "# The address of MPS, while yap-text-mps.service runs."
          "EnvironmentFile=-/run/yap-text-mps/environment"
        ]
        ++ service;
      }
      {
        name = "Install";
        lines = [
          "WantedBy=multi-user.target"
          "Also=yap-text.socket"
        ];
      }
    ];

    "yap-text.socket" = [
      {
        name = "Unit";
        lines = [
          "Description=Listening socket of Yap Text, which stays open during a restart"
        ];
      }
      {
        name = "Socket";
        lines = [
          "# Loopback, since the default key allows no other. Another address: systemctl edit yap-text.socket, where an"
          "# empty ListenStream= first clears this one."
          "ListenStream=${address}"
          "Backlog=1024"
          "NoDelay=yes"
          "# Activations are few: at most one per restart of the service. If clients that reconnect activate a"
          "# service that cannot start, the socket fails after 20 activations. Restart= tries on, and opens the socket each time. Correct what"
          "# the journal names, then: systemctl reset-failed yap-text.socket; systemctl start yap-text.socket"
          "TriggerLimitIntervalSec=10min"
          "TriggerLimitBurst=20"
        ];
      }
      {
        name = "Install";
        lines = [ "WantedBy=sockets.target" ];
      }
    ];

    "yap-text-quantize.service" = [
      {
        name = "Unit";
        lines = [
          "Description=AWQ weights for Yap Text, made before it starts (QUANTIZATION=awq)"
          "Wants=network-online.target"
          "After=network-online.target"
          "# `systemctl stop yap-text` stops this unit, too."
          "PartOf=yap-text.service"
        ]
        ++ afterNvidia;
      }
      {
        name = "Service";
        lines = [
          "# No RemainAfterExit=: every start of the service checks again, which takes a second if nothing has to be done."
          "Type=oneshot"
          "ExecStart=${yap-text} quantize --when-wanted"
          "# A layer at a time, hours for a large model."
          "TimeoutStartSec=infinity"
          "# It stops between two steps, and deletes unfinished weights."
          "TimeoutStopSec=120"
          "SuccessExitStatus=143 SIGTERM"
        ]
        ++ program;
      }
    ];

    "yap-text-uvm.service" = [
      {
        name = "Unit";
        lines = [
          "Description=NVIDIA's uvm module and its device nodes, loaded before Yap Text starts"
          "ConditionFileIsExecutable=${toString nvidia-modprobe}"
        ];
      }
      {
        name = "Service";
        lines = [
          "# No RemainAfterExit=: every start of the service checks again, also after the driver was replaced."
          "Type=oneshot"
          "# -c 0: the first card's node, and so the driver's own; -u: uvm."
          "ExecStart=${toString nvidia-modprobe} -c 0 -u"
          "# It loads a module and makes nodes in /dev. So ProtectKernelModules=, PrivateDevices= and, since that closes"
          "# devices, ProtectClock= stay off."
          "CapabilityBoundingSet=CAP_SYS_MODULE CAP_MKNOD CAP_CHOWN CAP_FOWNER"
          "RestrictAddressFamilies=AF_UNIX"
          "PrivateNetwork=yes"
          "IPAddressDeny=any"
          "MemoryDenyWriteExecute=yes"
          "SystemCallFilter=@system-service @module"
          "SystemCallErrorNumber=EPERM"
        ]
        ++ builtins.filter (line: line != "ProtectKernelModules=yes") hardening;
      }
    ];

    "yap-text-mps.service" = [
      {
        name = "Unit";
        lines = [
          "Description=NVIDIA's Multi-Process Service for Yap Text: the kernels of both engines run side by side"
          "# Off until: systemctl enable --now yap-text-mps; systemctl restart yap-text"
          "# An illegal memory access in the kernels of one engine ends both engines; the service then ends and starts again. If"
          "# this unit stops while the service runs, the same happens, and the service then runs without MPS."
          "Before=yap-text.service"
        ]
        ++ afterNvidia;
      }
      {
        name = "Service";
        lines = [
          "# The command returns when the daemon listens. A client that starts earlier would run without MPS, without a message."
          "Type=forking"
          "ExecStart=${toString mps} -d"
          "ExecStartPost=/bin/sh -c 'echo CUDA_MPS_PIPE_DIRECTORY=/run/yap-text-mps > /run/yap-text-mps/environment'"
          "ExecStop=/bin/sh -c 'echo quit | ${toString mps}'"
          "# It waits for its clients. After this time they lose the GPU."
          "TimeoutStopSec=30"
          "Restart=on-failure"
          "RestartSec=5"
          "Environment=PATH=${path}"
          "Environment=CUDA_MPS_PIPE_DIRECTORY=/run/yap-text-mps CUDA_MPS_LOG_DIRECTORY=%L/yap-text-mps"
          "RuntimeDirectory=yap-text-mps"
          "RuntimeDirectoryMode=0700"
          "LogsDirectory=yap-text-mps"
          "# Pipes and local sockets. No PrivateNetwork=: it would separate an abstract socket from the clients."
          "RestrictAddressFamilies=AF_UNIX AF_NETLINK"
          "IPAddressDeny=any"
          "SystemCallFilter=@system-service"
          "SystemCallErrorNumber=EPERM"
        ]
        ++ user
        ++ gpu
        ++ hardening;
      }
      {
        name = "Install";
        lines = [ "WantedBy=yap-text.service" ];
      }
    ];

    "yap-text-logrotate.service" = [
      {
        name = "Unit";
        lines = [
          "Description=Rotates the log file of Yap Text (YAP_TEXT_LOG_FILE; the journal needs no rotation)"
        ];
      }
      {
        name = "Service";
        lines = [
          "Type=oneshot"
          "ExecStart=${logrotate} --state %S/yap-text-logrotate/status /etc/yap-text/logrotate.conf"
          "StateDirectory=yap-text-logrotate"
          "ReadWritePaths=-/var/log/private/yap-text"
          "# The log belongs to the service's dynamic user."
          "CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_FOWNER CAP_CHOWN"
          "RestrictAddressFamilies=none"
          "PrivateDevices=yes"
          "PrivateNetwork=yes"
          "IPAddressDeny=any"
          "MemoryDenyWriteExecute=yes"
          "ProtectClock=yes"
          "SystemCallFilter=@system-service"
          "SystemCallErrorNumber=EPERM"
        ]
        ++ hardening;
      }
    ];

    "yap-text-logrotate.timer" = [
      {
        name = "Unit";
        lines = [
          "Description=Checks every ten minutes whether the log file of Yap Text has to be rotated"
          "ConditionFileIsExecutable=${logrotate}"
        ];
      }
      {
        name = "Timer";
        lines = [
          "OnCalendar=*:0/10"
          "AccuracySec=1min"
        ];
      }
      {
        name = "Install";
        lines = [ "WantedBy=timers.target" ];
      }
    ];
  };
in
builtins.removeAttrs units (
  when (!quantize) [ "yap-text-quantize.service" ]
  ++ when (!rotate) [
    "yap-text-logrotate.service"
    "yap-text-logrotate.timer"
  ]
  ++ when (nvidia-modprobe == null) [ "yap-text-uvm.service" ]
  ++ when (mps == null) [ "yap-text-mps.service" ]
)
