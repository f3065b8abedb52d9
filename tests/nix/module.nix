# nix/module.nix on a made-up machine: { name = { expected, found }; ... }, where both are to be the same, be they values
# or files.
# `lib` is nixpkgs' own, or tests/nix/lib.nix.
{
  lib,
  pkgs,
  module,
  packages,
}:
let
  inherit (builtins)
    attrNames
    concatLists
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    groupBy
    head
    isString
    listToAttrs
    mapAttrs
    match
    readDir
    readFile
    removeAttrs
    replaceStrings
    sort
    split
    tryEval
    ;

  machineWith =
    more: yap-text:
    (lib.evalModules {
      modules = [
        (import ./nixos.nix { inherit lib; })
        module
        { services.yap-text = yap-text; }
      ]
      ++ more;
      specialArgs = { inherit pkgs; };
    }).config;
  machine = machineWith [ ];

  models = {
    CHAT_MODEL = "a/chat";
    TOOL_MODEL = "a/tool";
  };
  cpu = {
    enable = true;
    package = packages.serve-cpu;
    settings = models;
  };
  enabled = more: machine (cpu // more);
  failingOf = config: map (one: one.message) (filter (one: !one.assertion) config.assertions);
  failing = more: failingOf (enabled more);
  evaluates = more: (tryEval (builtins.deepSeq (enabled more).services.yap-text.settings true)).success;

  # A unit's lines as { Section = { Key = [ value ... ]; ... }; ... }, values in their order, and words of keys that
  # have none.
  unordered = [
    "After"
    "Before"
    "Conflicts"
    "Environment"
    "Requires"
    "Wants"
  ];
  words = text: filter (word: isString word && word != "") (split "[[:space:]]+" text);
  sorted = sort (a: b: a < b);
  keys =
    lines:
    mapAttrs
      (
        key: pairs:
        let
          values = map (pair: elemAt pair 1) pairs;
        in
        if elem key unordered then sorted (concatMap (value: words (replaceStrings [ "\"" ] [ "" ] value)) values) else values
      )
      (
        groupBy head (
          map (match "([^=]+)=(.*)") (filter (line: line != "" && match "#.*" line == null) lines)
        )
      );
  parsed =
    text:
    listToAttrs (
      map (part: {
        name = head part;
        value = keys (filter isString (split "\n" (elemAt part 1)));
      }) (map (match "([A-Za-z]+)]\n(.*)") (filter (part: isString part && part != "") (split "(^|\n)\\[" text)))
    );
  unitsOf = config: mapAttrs (_: unit: mapAttrs (_: keys) unit.sections) config.systemd.units;

  # The units of systemd/ as NixOS is to have them.
  replace = pairs: replaceStrings (map head pairs) (map (pair: elemAt pair 1) pairs);
  committed = mapAttrs (_: parsed) (
    mapAttrs
      (
        name: _:
        replace [
          [
            "/usr/local/bin/yap-text "
            "${packages.serve-cpu}/bin/yap-text "
          ]
          [
            "PATH=/usr/local/bin:/usr/bin:/bin"
            "PATH=/run/current-system/sw/bin"
          ]
          [
            "-/etc/yap-text/yap-text.env"
            "${environment}"
          ]
          [
            "/etc/yap-text/api-key"
            "/run/secrets/key"
          ]
          [
            "HF_TOKEN:/etc/yap-text/hf-token"
            "HF_TOKEN:/run/secrets/token"
          ]
          [
            "127.0.0.1:8000"
            "0.0.0.0:9000"
          ]
          [
            "/usr/sbin/logrotate"
            "${pkgs.logrotate}/bin/logrotate"
          ]
          [
            "/usr/bin/nvidia-cuda-mps-control"
            "/nvidia/bin/nvidia-cuda-mps-control"
          ]
          # hardware.nvidia does what that unit does.
          [
            "Wants=yap-text-uvm.service\n"
            ""
          ]
          [
            "yap-text-uvm.service "
            ""
          ]
        ] (readFile (../../systemd + "/${name}"))
      )
      (
        removeAttrs (readDir ../../systemd) [
          "MIGRATING.md"
          "README.md"
          "logrotate.conf"
          "yap-text.env"
          "yap-text-uvm.service"
        ]
      )
  );
  # What a switch reads, and [Install] as NixOS has it.
  ofNixos = {
    "yap-text.service" = unit: {
      Service = unit.Service // {
        LoadCredential = unit.Service.LoadCredential ++ [ "SESSION_STORE_KEY:/run/secrets/session-key" ];
        X-StopIfChanged = [ "false" ];
      };
      Install = removeAttrs unit.Install [ "Also" ];
    };
    "yap-text-mps.service" = unit: { Service = unit.Service // { X-StopIfChanged = [ "false" ]; }; };
    "yap-text-logrotate.service" = unit: { Service = unit.Service // { X-StopIfChanged = [ "false" ]; }; };
  };

  environment = full.environment.etc."yap-text/yap-text.env".source;

  full =
    machineWith
      [
        {
          hardware.nvidia.package = {
            outPath = "/nvidia-lib";
            bin = "/nvidia";
          };
        }
      ]
      (
        cpu
        // {
          settings = models // {
            CONCURRENT_MODEL_CALL = true;
            SHARE_ENGINE = false;
            CHAT_MAX_OUT = 100;
            CHAT_TOP_P = 0.0000005;
            DEFAULT_PERSONA_STYLE = "say \"$5\" \\ `now`";
            TOOLS_FILE = null;
            NCCL_DEBUG = "WARN";
          };
          apiKeyFile = "/run/secrets/key";
          hfTokenFile = "/run/secrets/token";
          sessionKeyFile = "/run/secrets/session-key";
          host = "0.0.0.0";
          port = 9000;
          openFirewall = true;
          waitForReady = true;
          quantize.enable = true;
          mps.enable = true;
          logFile = "/var/log/yap-text/yap-text.log";
        }
      );
  small = enabled { };

  fires = yap-text: pattern: {
    expected = [ true ];
    found = map (message: match ".*${pattern}.*" message != null) (failing yap-text);
  };
  warns = settings: pattern: {
    expected = [ true ];
    found = map (message: match ".*${pattern}.*" message != null) (enabled { settings = models // settings; }).warnings;
  };
  refuses = wrong: {
    expected = {
      right = true;
      wrong = map (_: false) wrong;
    };
    found = {
      right = evaluates { };
      wrong = map (settings: evaluates { settings = models // settings; }) wrong;
    };
  };
in
{
  # Except for the paths of the machine, what a switch reads, and what the module says instead of [Install].
  units-are-those-of-systemd = {
    expected = mapAttrs (name: unit: unit // (ofNixos.${name} or (_: { })) unit) committed;
    found = removeAttrs (unitsOf full) [ "yap-text-switch.service" ];
  };
  a-machine-has-only-the-units-it-asked-for = {
    expected = [
      "yap-text-switch.service"
      "yap-text.service"
      "yap-text.socket"
    ];
    found = attrNames small.systemd.units;
  };
  its-service-names-no-other = {
    expected = null;
    found = match ".*(yap-text-quantize|yap-text-logrotate|yap-text-mps|yap-text-uvm|LoadCredential).*" small.systemd.units."yap-text.service".text;
  };
  the-build-for-gpus-is-the-default = {
    expected = "${packages.serve}/bin/yap-text serve";
    found = (machine { inherit (cpu) enable settings; }).systemd.services.yap-text.serviceConfig.ExecStart;
  };

  # Of ours the words of the administrator win, and lists grow.
  an-administrator-overrides = {
    expected = {
      MemoryMax = "40G";
      TimeoutStopSec = 90;
      CapabilityBoundingSet = "CAP_SYS_NICE";
      DeviceAllow = [
        "char-nvidiactl rw"
        "char-nvidia-caps rw"
        "char-nvidia-frontend rw"
        "char-nvidia-uvm rw"
        "char-drm rw"
        "char-infiniband rw"
      ];
      SystemCallFilter = [ "@system-service" ];
      HF_HOME = "/srv/hub";
      path = [
        "/run/current-system/sw"
        "/opt/tools"
      ];
      after = true;
      Backlog = 4096;
    };
    found =
      let
        inherit
          (machineWith [
            {
              systemd.services.yap-text = {
                serviceConfig = {
                  MemoryMax = "40G";
                  TimeoutStopSec = 90;
                  CapabilityBoundingSet = "CAP_SYS_NICE";
                  DeviceAllow = [ "char-infiniband rw" ];
                  SystemCallFilter = lib.mkForce [ "@system-service" ];
                };
                environment.HF_HOME = "/srv/hub";
                path = [ "/opt/tools" ];
                after = [ "srv.mount" ];
              };
              systemd.sockets.yap-text.socketConfig.Backlog = 4096;
            }
          ] cpu)
          systemd
          ;
        inherit (systemd.services) yap-text;
      in
      {
        inherit (yap-text.serviceConfig)
          MemoryMax
          TimeoutStopSec
          CapabilityBoundingSet
          DeviceAllow
          SystemCallFilter
          ;
        inherit (yap-text.environment) HF_HOME;
        inherit (yap-text) path;
        after = elem "srv.mount" yap-text.after && elem "yap-text.socket" yap-text.after;
        inherit (systemd.sockets.yap-text.socketConfig) Backlog;
      };
  };

  # multi-user.target does not come after it; what a change asks for is left to yap-text-switch.service.
  nobody-waits-for-ready-by-default = {
    expected = {
      waiting = {
        DefaultDependencies = true;
        restartIfChanged = true;
        quantize = true;
      };
      not = {
        DefaultDependencies = false;
        restartIfChanged = false;
        quantize = false;
      };
      wanted = [
        [ "multi-user.target" ]
        [ "multi-user.target" ]
      ];
      shutdown = [
        "After=sysinit.target"
        "After=basic.target"
        "Before=shutdown.target"
        "Conflicts=shutdown.target"
        "Requires=sysinit.target"
      ];
    };
    found =
      let
        of = config: {
          DefaultDependencies = config.systemd.services.yap-text.unitConfig.DefaultDependencies or true;
          inherit (config.systemd.services.yap-text) restartIfChanged;
          quantize = config.systemd.services.yap-text-quantize.restartIfChanged;
        };
        default = enabled { quantize.enable = true; };
        unit = (unitsOf default)."yap-text.service".Unit;
      in
      {
        waiting = of full;
        not = of default;
        wanted = map (config: config.systemd.services.yap-text.wantedBy) [
          full
          default
        ];
        shutdown = filter (line: elem (elemAt (match "([^=]*)=(.*)" line) 1) unit.${head (match "([^=]*)=(.*)" line)}) [
          "After=sysinit.target"
          "After=basic.target"
          "Before=shutdown.target"
          "Conflicts=shutdown.target"
          "Requires=sysinit.target"
        ];
      };
  };
  # By what it is triggered; the socket's text has the address and what an administrator set.
  a-switch-sees-what-has-changed =
    let
      triggers =
        more: yap-text:
        let
          inherit ((machineWith more (cpu // yap-text)).systemd.services) yap-text-switch;
        in
        toString yap-text-switch.restartTriggers;
      differs = yap-text: triggers [ ] yap-text != triggers [ ] { inherit (yap-text) waitForReady; };
      backlog = {
        systemd.sockets.yap-text.socketConfig.Backlog = 1;
      };
      limit = {
        systemd.services.yap-text.serviceConfig.MemoryMax = "1G";
      };
      louder = models // {
        LOG_LEVEL = "debug";
      };
      waits = { waitForReady = true; };
      does-not = { waitForReady = false; };
    in
    {
      expected = {
        port = [
          true
          true
        ];
        setting = [
          false
          true
        ];
        of-the-socket = [
          true
          true
        ];
        of-the-service = [
          false
          true
        ];
      };
      found = {
        port = map (mode: differs (mode // { port = 9000; })) [
          waits
          does-not
        ];
        setting = map (mode: differs (mode // { settings = louder; })) [
          waits
          does-not
        ];
        of-the-socket = map (mode: triggers [ backlog ] mode != triggers [ ] mode) [
          waits
          does-not
        ];
        of-the-service = map (mode: triggers [ limit ] mode != triggers [ ] mode) [
          waits
          does-not
        ];
      };
    };

  settings-become-an-environment-file = {
    expected = pkgs.writeText "expected.env" ''
      CHAT_MAX_OUT="100"
      CHAT_MODEL="a/chat"
      CHAT_TOP_P="5e-07"
      CONCURRENT_MODEL_CALL="1"
      DEFAULT_PERSONA_STYLE="say \"\$5\" \\ \`now\`"
      NCCL_DEBUG="WARN"
      QUANTIZATION="awq"
      SHARE_ENGINE="0"
      TOOL_MODEL="a/tool"
      YAP_TEXT_LOG_FILE="/var/log/yap-text/yap-text.log"
    '';
    found = environment;
  };
  the-log-is-rotated = {
    expected = [
      [
        "yap-text/logrotate.conf"
        "yap-text/yap-text.env"
      ]
      [ "yap-text/yap-text.env" ]
    ];
    found = map (config: attrNames config.environment.etc) [
      full
      small
    ];
  };
  the-firewall-opens-the-port = {
    expected = [ 9000 ];
    found = full.networking.firewall.allowedTCPPorts;
  };
  addresses-as-a-socket-takes-them = {
    expected = [
      "127.0.0.1:8000"
      "[::]:8000"
      "[2001:db8::5]:8000"
    ];
    found = map (host: (enabled { inherit host; }).systemd.sockets.yap-text.socketConfig.ListenStream) [
      "127.0.0.1"
      "::"
      "2001:db8::5"
    ];
  };
  nothing-is-set-where-it-is-off = {
    expected = [
      { }
      { }
      [ ]
      [ ]
      [ ]
    ];
    found =
      let
        off = machine { settings = models; };
      in
      [
        off.systemd.units
        off.environment.etc
        off.networking.firewall.allowedTCPPorts
        off.assertions
        off.warnings
      ];
  };
  imported-twice-it-counts-once = {
    expected = unitsOf small;
    found = unitsOf (machineWith [ module ] cpu);
  };

  a-machine-that-is-well-asserts-nothing = {
    expected = map (_: [ ]) [
      1
      2
      3
      4
      5
      6
    ];
    found = [
      (failing { })
      (failing {
        settings = {
          DEPLOY_MODELS = "tool";
          AWQ_TOOL_MODEL = "a/tool-awq";
        };
      })
      (failingOf full ++ full.warnings)
      (failing {
        demo = true;
        settings = { };
      })
      (failing {
        settings = models // {
          YAP_TEXT_KEY_FILE = "/etc/yap-text/keys";
        };
        host = "0.0.0.0";
      })
      (failingOf (
        machineWith [ { hardware.graphics.enable = true; } ] (cpu // { package = packages.serve-cpu // { cuda = true; }; })
      ))
    ];
  };
  a-chat-model-is-missing = fires { settings = { inherit (models) TOOL_MODEL; }; } "CHAT_MODEL";
  a-tool-model-is-missing = fires { settings = { inherit (models) CHAT_MODEL; }; } "TOOL_MODEL";
  the-demo-beside-a-model = fires { demo = true; } "demo.*CHAT_MODEL, TOOL_MODEL";
  a-key-in-settings = fires {
    settings = models // {
      YAP_TEXT_API_KEY = "plain";
    };
  } "YAP_TEXT_API_KEY.*apiKeyFile";
  a-token-in-settings = fires {
    settings = models // {
      HUGGING_FACE_HUB_TOKEN = "plain";
    };
  } "HUGGING_FACE_HUB_TOKEN.*hfTokenFile";
  a-session-key-in-settings = fires {
    settings = models // {
      SESSION_STORE_KEY = "plain";
    };
  } "SESSION_STORE_KEY.*sessionKeyFile";
  a-key-in-the-store = fires { apiKeyFile = "${builtins.storeDir}/key"; } "apiKeyFile.*store";
  a-key-file-in-the-store = fires {
    settings = models // {
      YAP_TEXT_KEY_FILE = "${builtins.storeDir}/keys";
    };
  } "YAP_TEXT_KEY_FILE.*store";
  a-port-in-settings = fires {
    settings = models // {
      PORT = 80;
    };
  } "PORT.*systemd holds the port";
  what-systemd-sets = fires {
    settings = models // {
      NOTIFY_SOCKET = "/run/x";
    };
  } "NOTIFY_SOCKET is set by systemd";
  the-default-key-on-every-address = fires { host = "0.0.0.0"; } "apiKeyFile";
  a-build-for-gpus-without-a-driver = fires {
    package = packages.serve-cpu // {
      cuda = true;
    };
  } "hardware.graphics.enable";
  a-log-where-the-service-may-not-write = fires { logFile = "/srv/yap-text.log"; } "/srv/yap-text.log";
  no-port = fires { port = 0; } "port is 0.*1 to 65535";
  hosts-that-a-socket-refuses =
    let
      hosts = [
        "localhost"
        "[::]"
        "0.0.0.0:80"
        "10.0.0.256"
        "10.0.0"
        "::1::"
        "1:2:3:4:5:6:7"
        "1:2:3:4:5:6:7::8"
        "yap.example.com"
        ""
      ];
      said = host: "services.yap-text.host is \"${host}\", which is no IP address: write ";
    in
    {
      expected = map (host: [ (said host) ]) hosts;
      found = map (
        host:
        map (message: builtins.substring 0 (builtins.stringLength (said host)) message) (failing {
          inherit host;
          apiKeyFile = "/run/secrets/key";
        })
      ) hosts;
    };
  hosts-that-a-socket-takes = {
    expected = [ ];
    found = concatLists (
      map
        (
          host:
          failing {
            inherit host;
            apiKeyFile = "/run/secrets/key";
          }
        )
        [
          "0.0.0.0"
          "192.168.1.20"
          "::"
          "::1"
          "fe80::1"
          "2001:DB8:0:0:8:800:200C:417A"
          "::ffff:10.0.0.1"
        ]
    );
  };

  a-slip-in-a-name = warns { CHAT_MAX_OTU = 100; } "CHAT_MAX_OTU is not known.*CHAT_MAX_OUT";
  an-old-name = warns { GEN_TIMEOUT_S = 60; } "GEN_TIMEOUT_S is now CHAT_TIMEOUT_S";

  a-setting-of-another-type = refuses [
    { CHAT_MAX_OUT = "many"; }
    { CHAT_MAX_OUT = 0; }
    { CHAT_TOP_P = 0; }
    { CHAT_TOP_P = 1.5; }
    { DEPLOY_MODELS = "all"; }
    { SHARE_ENGINE = "yes"; }
    { SESSION_STORE = "sqlite"; }
  ];
  a-path-literal = refuses [
    { TOOLS_FILE = ./module.nix; }
    { CHAT_MODEL = ./module.nix; }
    { NOT_OURS = ./module.nix; }
  ];
  a-relative-path = refuses [ { TOOLS_FILE = "tools.json"; } ];
}
