# services.yap-text on NixOS: the units of nix/units.nix with this machine's settings.
{ packages }:
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (builtins)
    attrNames
    concatStringsSep
    elem
    filter
    hasAttr
    isBool
    isFloat
    mapAttrs
    removeAttrs
    replaceStrings
    stringLength
    substring
    ;
  inherit (lib) mkIf mkOption types;

  cfg = config.services.yap-text;
  address = import ./address.nix;
  listed = builtins.fromJSON (builtins.readFile ./settings.json);

  settings = removeAttrs cfg.settings (filter (name: cfg.settings.${name} == null) (attrNames cfg.settings));
  chosen = name: hasAttr name settings;
  chosenOf = filter chosen;
  deploys = role: elem (settings.DEPLOY_MODELS or "both") [ "both" role ];
  inStore = file: file != null && substring 0 (stringLength builtins.storeDir) file == builtins.storeDir;

  # NAME="value", as systemd reads an EnvironmentFile: inside the quotes these four are escaped.
  line =
    name:
    let
      value = settings.${name};
      text =
        if isBool value then
          (if value then "1" else "0")
        else if isFloat value then
          builtins.toJSON value # toString makes 0.000000 of a small one
        else
          toString value;
    in
    "${name}=\"${replaceStrings [ "\\" "\"" "$" "`" ] [ "\\\\" "\\\"" "\\$" "\\`" ] text}\"\n";
  environment = pkgs.writeText "yap-text.env" (concatStringsSep "" (map line (attrNames settings)));

  units = import ./nixos-units.nix {
    inherit lib;
    units = import ./units.nix {
      yap-text = lib.getExe cfg.package;
      path = "/run/current-system/sw/bin"; # the package brings its own compiler
      settings = environment;
      apiKey = cfg.apiKeyFile;
      hfToken = cfg.hfTokenFile;
      address = address.listen cfg.host cfg.port;
      quantize = cfg.quantize.enable;
      logrotate = if cfg.logFile == null then null else "${pkgs.logrotate}/bin/logrotate";
      # hardware.nvidia loads uvm and makes its node by a udev rule.
      nvidia-modprobe = null;
      mps =
        if cfg.mps.enable then
          "${config.hardware.nvidia.package.bin or config.hardware.nvidia.package}/bin/nvidia-cuda-mps-control"
        else
          null;
      service =
        if cfg.sessionKeyFile == null then [ ] else [ "LoadCredential=SESSION_STORE_KEY:${cfg.sessionKeyFile}" ];
    };
  };

  # What `nixos-rebuild switch` does with a unit that differs, as read in nixpkgs of 2026
  # (pkgs/by-name/sw/switch-to-configuration-ng/src/src/main.rs, handle_modified_unit, do_system_switch):
  #
  # - A `.socket` that differs: nothing. After the reload PID 1 has dropped the listening socket whose address is gone
  #   from the unit, and a restarted service would get none (systemd: "The socket unit is not functional until
  #   restarted").
  # - A `.service`, by default (X-StopIfChanged=): it and its socket are stopped before the activation, then the socket
  #   is started, the service not (with X-NotSocketActivated= the service, too). Any change of a setting would close
  #   the port for the length of a drain and more.
  # - With X-StopIfChanged=false: one restart job, for which the switch waits: until READY.
  # - With X-RestartIfChanged=false: nothing.
  # - In the end every active target is started, multi-user.target among them, and waited for. So it waits for what the
  #   target wants and comes after; a target comes after every unit it wants, except for one with
  #   DefaultDependencies=no (systemd.target(5)).
  #
  # So yap-text.service keeps its socket at a restart, and a unit of our own, yap-text-switch.service, does what is left:
  # it opens the socket at its new address, and without waitForReady restarts the service in the background. It
  # differs (X-Restart-Triggers=) if the text of yap-text.socket or yap-text.service does, with all that an
  # administrator set there. PartOf= would be no substitute: a restart does not reach a unit that failed or is about to
  # start again.
  waits = cfg.waitForReady;
  written = name: pkgs.writeText name config.systemd.units.${name}.text;
  socket = written "yap-text.socket";
  # One that runs has the old settings, and would be waited for.
  stopQuantizing = if cfg.quantize.enable then "systemctl stop yap-text-quantize.service" else "";
  switchScript = ''
    link=$RUNTIME_DIRECTORY/socket # leads to what the socket was opened by; at boot there is none
    opened=$(readlink "$link" || true)
    moves=
    if [ "$opened" != "" ] && [ "$opened" != ${socket} ]; then moves=yes; fi
    if [ "$moves" ]; then systemctl stop yap-text.socket yap-text.service; fi
    ln -sfn ${socket} "$link"
  ''
  + (
    if waits then
      ''
        if [ "$moves" ]; then systemctl start yap-text.service; fi
      ''
    else
      ''
        if [ "$opened" = "" ]; then exit 0; fi
        ${stopQuantizing}
        systemctl --no-block restart yap-text.service
      ''
  );
  switch = {
    description = "What a switch to another configuration changes for Yap Text";
    wantedBy = [ "multi-user.target" ];
    stopIfChanged = false;
    restartTriggers = [ socket ] ++ (if waits then [ ] else [ (written "yap-text.service") ]);
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      RuntimeDirectory = "yap-text-switch";
      RuntimeDirectoryPreserve = "restart";
    };
    script = switchScript;
  };
  # systemd.service(5), "Default Dependencies", except for the order that makes multi-user.target wait.
  unawaited = {
    restartIfChanged = lib.mkDefault false;
    requires = [ "sysinit.target" ];
    after = [
      "sysinit.target"
      "basic.target"
    ];
    conflicts = [ "shutdown.target" ];
    before = [ "shutdown.target" ];
    unitConfig.DefaultDependencies = false;
  };
in
{
  _class = "nixos";
  _file = toString ./module.nix;
  key = toString ./module.nix; # imported twice, it counts once

  options.services.yap-text = {
    enable = lib.mkEnableOption "Yap Text, real-time text inference for voice companions";

    package = mkOption {
      type = types.package;
      default = packages.serve;
      defaultText = lib.literalExpression "yap-text.packages.x86_64-linux.serve";
      description = "The build that serves and quantizes: the flake's `serve` for NVIDIA GPUs, or its `serve-cpu`.";
    };

    settings = mkOption {
      type = types.submodule {
        freeformType = types.attrsOf (
          types.nullOr (
            types.oneOf [
              types.bool
              types.int
              types.float
              types.str
            ]
          )
        );
        options = import ./settings.nix {
          inherit lib;
          known = listed.settings;
        };
      };
      default = { };
      example = {
        CHAT_MODEL = "SicariusSicariiStuff/Impish_Nemo_12B";
        TOOL_MODEL = "MadeAgents/Hammer2.1-1.5b";
        CONCURRENT_MODEL_CALL = true;
      };
      description = ''
        The variables of `yap-text serve --help` by name; `null` keeps the default. Other environment variables are
        allowed: vLLM, NCCL and the hub client read their own.

        Every user of the machine can read them. So put keys and tokens into files (`apiKeyFile`, `hfTokenFile`,
        `sessionKeyFile`), and write paths in quotes: a path literal would copy the file into the store.
      '';
    };

    demo = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to serve the embedded demo model, which needs no download. Settings then name no model.";
    };

    apiKeyFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/secrets/yap-text-api-key";
      description = "File that holds the API key; root reads it. Without one the key is the default and `host` loopback.";
    };

    hfTokenFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/secrets/hf-token";
      description = "File that holds the hub token, for private or gated models and for uploads; root reads it.";
    };

    sessionKeyFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/run/secrets/yap-text-session-key";
      description = "File that holds the key of `SESSION_STORE`, at least 16 characters; root reads it.";
    };

    host = mkOption {
      type = types.str;
      default = "127.0.0.1";
      example = "0.0.0.0";
      description = ''
        IP address to listen on: `0.0.0.0` is every IPv4 address, `::` every address. systemd holds it
        (`yap-text.socket`), also during a restart. A switch that changes `host` or `port` stops the service first, and
        the port is closed meanwhile; any other change keeps it open.
      '';
    };

    port = mkOption {
      type = types.port;
      default = 8000;
      description = "Port to listen on.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Whether to open `port` in the firewall.";
    };

    waitForReady = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether `nixos-rebuild switch` and the boot's `multi-user.target` wait until the service is ready, and with
        `quantize.enable` until the weights are made. A cold start of a large model takes minutes to an hour, a
        quantization hours.

        If it is off, the service starts in the background, and the switch succeeds even if the start fails: see
        `systemctl status yap-text`. The switch prints that it does not restart `yap-text.service`, since
        `yap-text-switch.service` does that.
      '';
    };

    quantize.enable = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to make AWQ weights of float models before the service starts (`yap-text-quantize.service`); sets
        `QUANTIZATION` to `awq`.
      '';
    };

    mps.enable = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether both engines share the GPU through NVIDIA's Multi-Process Service (`yap-text-mps.service`). A fault in
        the kernels of one engine then ends both.
      '';
    };

    logFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/var/log/yap-text/yap-text.log";
      description = ''
        Also write the log to this file, `*.log` in `/var/log/yap-text`, rotated at 100 MB. The journal always
        has the log, and needs no rotation.
      '';
    };
  };

  config = mkIf cfg.enable {
    services.yap-text.settings = {
      QUANTIZATION = mkIf cfg.quantize.enable (lib.mkDefault "awq");
      YAP_TEXT_LOG_FILE = mkIf (cfg.logFile != null) cfg.logFile;
    };

    systemd = units // {
      services =
        mapAttrs (
          name: service:
          lib.mkMerge [
            service
            # Restarted in one job, so that a restart reaches what requires it.
            { stopIfChanged = lib.mkDefault (name == "yap-text-quantize"); }
            (mkIf (name == "yap-text-quantize" && !waits) { restartIfChanged = lib.mkDefault false; })
            (mkIf (name == "yap-text" && !waits) unawaited)
          ]
        ) units.services
        // {
          yap-text-switch = switch;
        };
    };

    environment.etc = {
      # For people to read. The unit names the file in the store: so it changes with it, and a switch restarts it.
      "yap-text/yap-text.env".source = environment;
      "yap-text/logrotate.conf" = mkIf (cfg.logFile != null) { source = ../systemd/logrotate.conf; };
    };

    networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall [ cfg.port ];

    warnings =
      let
        declared = attrNames listed.settings;
        others = filter (name: !(hasAttr name listed.settings || hasAttr name listed.renamed)) (attrNames settings);
        near = name: filter (lib.strings.levenshteinAtMost 2 name) declared;
      in
      map (
        name: "services.yap-text.settings.${name} is not known. Do you mean ${concatStringsSep " or " (near name)}?"
      ) (filter (name: stringLength name > 5 && near name != [ ]) others)
      ++ map (name: "services.yap-text.settings.${name} is now ${listed.renamed.${name}}.") (
        chosenOf (attrNames listed.renamed)
      );

    assertions =
      let
        refused =
          names: reason:
          let
            found = chosenOf names;
          in
          {
            assertion = found == [ ];
            message = "services.yap-text.settings.${concatStringsSep ", " found} ${reason}";
          };
        model = role: name: {
          assertion = deploys role && !cfg.demo -> (chosen "${name}_MODEL" || chosen "AWQ_${name}_MODEL");
          message =
            "services.yap-text deploys the ${role} model, but settings name none: set ${name}_MODEL or "
            + "AWQ_${name}_MODEL, or DEPLOY_MODELS without it; or services.yap-text.demo.";
        };
        named = chosenOf [
          "CHAT_MODEL"
          "TOOL_MODEL"
          "AWQ_CHAT_MODEL"
          "AWQ_TOOL_MODEL"
        ];
        secretFiles = {
          inherit (cfg) apiKeyFile hfTokenFile sessionKeyFile;
          "settings.YAP_TEXT_KEY_FILE" = settings.YAP_TEXT_KEY_FILE or null;
        };
        exposed = filter (name: inStore secretFiles.${name}) (attrNames secretFiles);
      in
      [
        (model "chat" "CHAT")
        (model "tool" "TOOL")
        {
          assertion = cfg.demo -> named == [ ];
          message =
            "services.yap-text.demo serves the embedded model, but settings name ${concatStringsSep ", " named}: leave "
            + "out one of them.";
        }
        (refused listed.secrets (
          "would be readable by every user of the machine: name a file in services.yap-text.apiKeyFile, hfTokenFile "
          + "or sessionKeyFile."
        ))
        (refused listed.systemd "is set by systemd: leave it out.")
        (refused listed.socket (
          "would change nothing, since systemd holds the port: set services.yap-text.host and port."
        ))
        {
          assertion = exposed == [ ];
          message =
            "services.yap-text.${concatStringsSep ", " exposed}: a key or token in the Nix store is readable by every "
            + "user of the machine. Name a file outside, as a string.";
        }
        {
          assertion = address.isAddress cfg.host;
          message = "services.yap-text.host is \"${cfg.host}\", which is no IP address: ${address.hint cfg.host}.";
        }
        {
          assertion = cfg.port != 0;
          message = "services.yap-text.port is 0; a socket unit takes 1 to 65535.";
        }
        {
          assertion =
            !address.isAddress cfg.host
            || cfg.apiKeyFile != null
            || chosen "YAP_TEXT_KEY_FILE"
            || elem cfg.host [
              "127.0.0.1"
              "::1"
            ];
          message =
            "services.yap-text.host ${cfg.host} is not loopback, and the default key is refused there: set apiKeyFile.";
        }
        {
          assertion =
            (cfg.package.cuda or false) && !chosen "YAP_TEXT_DRIVER_LIB" -> config.hardware.graphics.enable or false;
          message =
            "services.yap-text.package is the build for NVIDIA GPUs, which finds the driver's libraries in "
            + "/run/opengl-driver: set hardware.graphics.enable = true and services.xserver.videoDrivers = "
            + "[ \"nvidia\" ], or take the package serve-cpu.";
        }
        {
          assertion = cfg.logFile == null || builtins.match "/var/log/yap-text/[^/]+\\.log" cfg.logFile != null;
          message =
            "services.yap-text.logFile ${toString cfg.logFile} is not a *.log in /var/log/yap-text, all that the "
            + "service may write to.";
        }
      ];
  };
}
