# services.yap-text on NixOS: the units of nix/units.nix with this machine's settings.
{ packages }:
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.yap-text;
  inherit (lib) mkIf mkOption types;

  settings = builtins.removeAttrs cfg.settings (
    builtins.filter (name: cfg.settings.${name} == null) (builtins.attrNames cfg.settings)
  );
  chosen = name: builtins.hasAttr name settings;
  chosenOf = builtins.filter chosen;
  deploys = role: builtins.elem (settings.DEPLOY_MODELS or "both") [ "both" role ];
  inStore = file: file != null && builtins.substring 0 (builtins.stringLength builtins.storeDir) file == builtins.storeDir;

  # NAME="value", as systemd reads an EnvironmentFile: inside the quotes these four are escaped.
  line =
    name:
    let
      value = settings.${name};
      text =
        if builtins.isBool value then
          (if value then "1" else "0")
        else if builtins.isPath value then
          "${value}"
        else
          toString value;
    in
    "${name}=\"${builtins.replaceStrings [ "\\" "\"" "$" "`" ] [ "\\\\" "\\\"" "\\$" "\\`" ] text}\"\n";
  environment = pkgs.writeText "yap-text.env" (builtins.concatStringsSep "" (map line (builtins.attrNames settings)));

  units = import ./render.nix {
    yap-text = "${cfg.package}/bin/yap-text";
    path = "/run/current-system/sw/bin"; # the package brings its own compiler
    settings = environment;
    apiKey = cfg.apiKeyFile;
    hfToken = cfg.hfTokenFile;
    address = "${if builtins.match ".*:.*" cfg.host == null then cfg.host else "[${cfg.host}]"}:${toString cfg.port}";
    quantize = cfg.quantize.enable;
    logrotate = if cfg.logFile == null then null else "${pkgs.logrotate}/bin/logrotate";
    # A switch restarts it. By default it would stop it and leave the start to the socket's next client, who would
    # wait for the models.
    service = [
      "X-StopIfChanged=false"
    ]
    ++ (if cfg.sessionKeyFile == null then [ ] else [ "LoadCredential=SESSION_STORE_KEY:${cfg.sessionKeyFile}" ]);
  };
  # [Install] sections mean nothing to NixOS.
  wantedBy = {
    "yap-text.service" = [ "multi-user.target" ];
    "yap-text.socket" = [ "sockets.target" ];
  };
in
{
  options.services.yap-text = {
    enable = lib.mkEnableOption "Yap Text, real-time text inference for voice companions";

    package = mkOption {
      type = types.package;
      default = packages.serve;
      defaultText = lib.literalExpression "packages.serve";
      description = "The build that serves and quantizes: the flake's `serve` for NVIDIA GPUs, or its `serve-cpu`.";
    };

    settings = mkOption {
      type = types.attrsOf (
        types.nullOr (
          types.oneOf [
            types.bool
            types.int
            types.float
            types.str
            types.path
          ]
        )
      );
      default = { };
      example = {
        CHAT_MODEL = "SicariusSicariiStuff/Impish_Nemo_12B";
        TOOL_MODEL = "MadeAgents/Hammer2.1-1.5b";
        CONCURRENT_MODEL_CALL = true;
      };
      description = ''
        The variables of `yap-text serve --help` by name; `null` leaves one at its default. They are readable by every
        user of the machine, so keys and tokens come in files (`apiKeyFile`, `hfTokenFile`, `sessionKeyFile`).
      '';
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
      description = "Address to listen on. systemd holds it (`yap-text.socket`), also during a restart.";
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

    quantize.enable = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to make AWQ weights of float models before the service starts (`yap-text-quantize.service`); sets
        `QUANTIZATION` to `awq`.
      '';
    };

    logFile = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/var/log/yap-text/yap-text.log";
      description = ''
        Also write the log to this file, `*.log` in `/var/log/yap-text`, rotated at 100 MB. The journal has it in any
        case, and needs no rotation.
      '';
    };
  };

  config = mkIf cfg.enable {
    services.yap-text.settings = {
      QUANTIZATION = mkIf cfg.quantize.enable (lib.mkDefault "awq");
      YAP_TEXT_LOG_FILE = mkIf (cfg.logFile != null) cfg.logFile;
    };

    # As text, not through systemd.services: that would be a second place where the units are defined, and it adds
    # lines of its own, a PATH among them.
    systemd.units = builtins.mapAttrs (name: text: {
      inherit text;
      wantedBy = wantedBy.${name} or [ ];
    }) units;

    environment.etc = {
      # For people to read. The unit names the file in the store: so it changes with it, and a switch restarts it.
      "yap-text/yap-text.env".source = environment;
      "yap-text/logrotate.conf" = mkIf (cfg.logFile != null) { source = ../systemd/logrotate.conf; };
    };

    networking.firewall.allowedTCPPorts = mkIf cfg.openFirewall [ cfg.port ];

    assertions =
      let
        secrets = chosenOf [
          "YAP_TEXT_API_KEY"
          "HF_TOKEN"
          "HUGGING_FACE_HUB_TOKEN"
          "HUGGINGFACE_HUB_TOKEN"
          "SESSION_STORE_KEY"
        ];
        ofTheSocket = chosenOf [
          "HOST"
          "PORT"
        ];
        model = role: name: {
          assertion = deploys role -> (chosen "${name}_MODEL" || chosen "AWQ_${name}_MODEL");
          message =
            "services.yap-text deploys the ${role} model, but settings name none: set ${name}_MODEL or "
            + "AWQ_${name}_MODEL, or DEPLOY_MODELS without it.";
        };
      in
      [
        (model "chat" "CHAT")
        (model "tool" "TOOL")
        {
          assertion = secrets == [ ];
          message =
            "services.yap-text.settings.${builtins.concatStringsSep ", " secrets} would be readable by every user of "
            + "the machine: name a file in services.yap-text.apiKeyFile, hfTokenFile or sessionKeyFile.";
        }
        {
          assertion = !inStore cfg.apiKeyFile && !inStore cfg.hfTokenFile && !inStore cfg.sessionKeyFile;
          message = "services.yap-text: a key or token in the Nix store is readable by every user of the machine.";
        }
        {
          assertion = ofTheSocket == [ ];
          message =
            "services.yap-text.settings.${builtins.concatStringsSep ", " ofTheSocket} would change nothing, since "
            + "systemd holds the port: set services.yap-text.host and port.";
        }
        {
          assertion =
            cfg.apiKeyFile != null
            || chosen "YAP_TEXT_KEY_FILE"
            || builtins.elem cfg.host [
              "127.0.0.1"
              "::1"
            ];
          message = "services.yap-text.host ${cfg.host} is not loopback, where the default key is refused: set apiKeyFile.";
        }
        {
          assertion = cfg.logFile == null || builtins.match "/var/log/yap-text/[^/]+\\.log" cfg.logFile != null;
          message = "services.yap-text.logFile ${toString cfg.logFile} is not a *.log in /var/log/yap-text, all that the service may write to.";
        }
      ];
  };
}
