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
  inherit (lib) mkOption types;

  # What the module sets of NixOS.
  nixos.options = {
    systemd.units = mkOption {
      type = types.attrsOf types.anything;
      default = { };
      description = "Units.";
    };
    environment.etc = mkOption {
      type = types.attrsOf types.anything;
      default = { };
      description = "Files below /etc.";
    };
    networking.firewall.allowedTCPPorts = mkOption {
      type = types.listOf types.port;
      default = [ ];
      description = "Open ports.";
    };
    assertions = mkOption {
      type = types.listOf types.anything;
      default = [ ];
      description = "What must hold.";
    };
  };

  machine =
    yap-text:
    (lib.evalModules {
      modules = [
        nixos
        module
        { services.yap-text = yap-text; }
      ];
      specialArgs = { inherit pkgs; };
    }).config;

  models = {
    CHAT_MODEL = "a/chat";
    TOOL_MODEL = "a/tool";
  };
  enabled = more: machine ({ enable = true; } // more);
  failing = more: map (one: one.message) (builtins.filter (one: !one.assertion) (enabled more).assertions);

  texts = config: builtins.mapAttrs (_: unit: unit.text) config.systemd.units;
  environment = full.environment.etc."yap-text/yap-text.env".source;

  # A unit of systemd/ as NixOS is to have it.
  committed = builtins.mapAttrs (name: _: builtins.readFile (../../systemd + "/${name}")) (
    removeAttrs (builtins.readDir ../../systemd) [
      "logrotate.conf"
      "yap-text.env"
    ]
  );
  replace =
    pairs:
    builtins.replaceStrings (map builtins.head pairs) (map (pair: builtins.elemAt pair 1) pairs);

  full = enabled {
    package = packages.serve-cpu;
    settings = models // {
      CONCURRENT_MODEL_CALL = true;
      SHARE_ENGINE = false;
      CHAT_MAX_OUT = 100;
      CHAT_TOP_P = 0.5;
      DEFAULT_PERSONA_STYLE = "say \"$5\" \\ `now`";
      TOOLS_FILE = null;
    };
    apiKeyFile = "/run/secrets/key";
    hfTokenFile = "/run/secrets/token";
    sessionKeyFile = "/run/secrets/session-key";
    host = "0.0.0.0";
    port = 9000;
    openFirewall = true;
    quantize.enable = true;
    logFile = "/var/log/yap-text/yap-text.log";
  };
  small = enabled { settings = models; };

  fires = yap-text: words: {
    expected = [ true ];
    found = map (message: builtins.match ".*${words}.*" message != null) (failing yap-text);
  };
in
{
  # The units of systemd/ but for the machine's own paths, and what the module says in the place of [Install].
  units-are-those-of-systemd = {
    expected = builtins.mapAttrs (
      _:
      replace [
        [
          "/usr/local/bin/yap-text "
          "${packages.serve-cpu}/bin/yap-text "
        ]
        [
          "/usr/local/bin:/usr/bin:/bin"
          "/run/current-system/sw/bin"
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
          "/etc/yap-text/hf-token"
          "/run/secrets/token"
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
          "LimitCORE=1\n\n[Install]\nWantedBy=multi-user.target\nAlso"
          "LimitCORE=1\nX-StopIfChanged=false\nLoadCredential=SESSION_STORE_KEY:/run/secrets/session-key\n\n[Install]\nWantedBy=multi-user.target\nAlso"
        ]
      ]
    ) committed;
    found = texts full;
  };
  units-start-with-the-machine = {
    expected = {
      "yap-text.service" = [ "multi-user.target" ];
      "yap-text.socket" = [ "sockets.target" ];
      "yap-text-quantize.service" = [ ];
      "yap-text-logrotate.service" = [ ];
      "yap-text-logrotate.timer" = [ ];
    };
    found = builtins.mapAttrs (_: unit: unit.wantedBy) full.systemd.units;
  };
  a-machine-has-only-the-units-it-asked-for = {
    expected = [
      "yap-text.service"
      "yap-text.socket"
    ];
    found = builtins.attrNames small.systemd.units;
  };
  its-service-names-no-other = {
    expected = null;
    found = builtins.match ".*(yap-text-quantize|yap-text-logrotate|LoadCredential).*" (texts small)."yap-text.service";
  };
  the-build-for-gpus-is-the-default = {
    expected = [ "ExecStart=${packages.serve}/bin/yap-text serve" ];
    found = builtins.filter (line: builtins.match "ExecStart=.*" line != null) (
      builtins.filter builtins.isString (builtins.split "\n" (texts small)."yap-text.service")
    );
  };
  settings-become-an-environment-file = {
    expected = pkgs.writeText "expected.env" ''
      CHAT_MAX_OUT="100"
      CHAT_MODEL="a/chat"
      CHAT_TOP_P="0.500000"
      CONCURRENT_MODEL_CALL="1"
      DEFAULT_PERSONA_STYLE="say \"\$5\" \\ \`now\`"
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
    found = map (config: builtins.attrNames config.environment.etc) [
      full
      small
    ];
  };
  the-firewall-opens-the-port = {
    expected = [ 9000 ];
    found = full.networking.firewall.allowedTCPPorts;
  };
  nothing-is-set-where-it-is-off = {
    expected = [
      { }
      { }
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
      ];
  };

  a-machine-that-is-well-asserts-nothing = {
    expected = [
      [ ]
      [ ]
      [ ]
      [ ]
    ];
    found = [
      (failing { settings = models; })
      (failing {
        settings = {
          DEPLOY_MODELS = "tool";
          AWQ_TOOL_MODEL = "a/tool-awq";
        };
      })
      (map (one: one.message) (builtins.filter (one: !one.assertion) full.assertions))
      (failing {
        settings = models // { YAP_TEXT_KEY_FILE = "/etc/yap-text/keys"; };
        host = "0.0.0.0";
      })
    ];
  };
  a-chat-model-is-missing = fires { settings = { inherit (models) TOOL_MODEL; }; } "CHAT_MODEL";
  a-tool-model-is-missing = fires { settings = { inherit (models) CHAT_MODEL; }; } "TOOL_MODEL";
  a-key-in-settings = fires { settings = models // { YAP_TEXT_API_KEY = "plain"; }; } "YAP_TEXT_API_KEY.*apiKeyFile";
  a-token-in-settings = fires { settings = models // { HF_TOKEN = "plain"; }; } "HF_TOKEN.*hfTokenFile";
  a-session-key-in-settings = fires {
    settings = models // {
      SESSION_STORE_KEY = "plain";
    };
  } "SESSION_STORE_KEY.*sessionKeyFile";
  a-key-in-the-store = fires {
    settings = models;
    apiKeyFile = "${builtins.storeDir}/key";
  } "store";
  a-port-in-settings = fires { settings = models // { PORT = 80; }; } "PORT.*systemd holds the port";
  the-default-key-on-every-address = fires {
    settings = models;
    host = "0.0.0.0";
  } "apiKeyFile";
  a-log-where-the-service-may-not-write = fires {
    settings = models;
    logFile = "/srv/yap-text.log";
  } "/srv/yap-text.log";
}
