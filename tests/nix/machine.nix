# A machine out of NixOS modules, as plain data for tests and containers. No store: a path is made up, and the text of
# the settings is in `files`.
{
  lib ? import ./lib.nix,
}:
let
  inherit (builtins) filter hashString mapAttrs;

  pkgs = {
    writeText = name: text: {
      outPath = "/files/${hashString "sha256" text}-${name}";
      inherit text;
    };
    logrotate.outPath = "/usr";
    curl.outPath = "/usr";
    # pkgs.testers.runNixOSTest, before it becomes a derivation.
    testers.runNixOSTest = test: test;
  };
  build = name: cuda: {
    type = "derivation";
    inherit name cuda;
    outPath = "/opt/${name}";
    meta.mainProgram = "yap-text";
  };
  packages = {
    serve = build "serve" true;
    serve-cpu = build "serve-cpu" false;
  };
  module = import ../../nix/module.nix { inherit packages; };

  configOf =
    modules:
    (lib.evalModules {
      modules = [ (import ./nixos.nix { inherit lib; }) ] ++ modules;
      specialArgs = {
        inherit pkgs;
        yap-text.nixosModules.default = module;
      };
    }).config;

  dataOf =
    config:
    let
      inherit (config) systemd;
      settings = config.environment.etc."yap-text/yap-text.env".source;
    in
    {
      units = mapAttrs (_: unit: unit.text) systemd.units;
      wanted = mapAttrs (_: unit: unit.wantedBy) systemd.units;
      files.${settings.outPath} = settings.text;
      inherit (systemd.services.yap-text-switch) script;
      triggers = map toString systemd.services.yap-text-switch.restartTriggers;
      failing = map (one: one.message) (filter (one: !one.assertion) config.assertions);
      inherit (config) warnings;
    };
in
{
  inherit packages;
  machine = modules: dataOf (configOf modules);
  with-module = more: dataOf (configOf ([ module ] ++ more));
  cases = import ./module.nix {
    inherit
      lib
      module
      packages
      pkgs
      ;
  };

  # nix/vm-test.nix: its script, and the machine with each specialisation, which NixOS lays over it.
  vm-test =
    let
      test = import ../../nix/vm-test.nix { inherit pkgs module packages; };
      node = configOf [ test.nodes.machine ];
    in
    {
      script = test.testScript {
        nodes.machine.system.build.toplevel = "/run/booted-system";
      };
      machines = {
        base = dataOf node;
      }
      // mapAttrs (
        _: special:
        dataOf (configOf [
          test.nodes.machine
          special.configuration
        ])
      ) node.specialisation;
    };
}
