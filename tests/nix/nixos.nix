# What nix/module.nix sets of NixOS, as a module for lib.evalModules: the options with their types, and how NixOS writes
# its units (as read in nixos/lib/systemd-unit-options.nix and systemd-lib.nix of nixpkgs).
{ lib }:
let
  inherit (lib) mkOption types;
  inherit (builtins)
    attrNames
    concatMap
    concatStringsSep
    filter
    isBool
    isList
    listToAttrs
    mapAttrs
    toJSON
    ;

  option =
    type: default: description:
    mkOption { inherit type default description; };
  list = option (types.listOf types.str) [ ] "Units.";

  # Either lists, which are joined, or the same value everywhere.
  unitOption = lib.mkOptionType {
    name = "systemd option";
    description = "systemd option";
    merge =
      location: definitions:
      if builtins.any (definition: isList definition.value) definitions then
        concatMap (
          definition: if isList definition.value then definition.value else [ definition.value ]
        ) definitions
      else
        lib.mergeEqualOption location definitions;
  };
  section = option (types.attrsOf unitOption) { } "Lines of a section.";

  common = {
    description = option types.str "" "What the unit is.";
    wantedBy = list;
    after = list;
    before = list;
    bindsTo = list;
    conflicts = list;
    onFailure = list;
    partOf = list;
    requires = list;
    requisite = list;
    wants = list;
    restartTriggers = option (types.listOf types.anything) [ ] "What a switch restarts it for.";
    unitConfig = section;
  };
  kinds = {
    service = common // {
      environment = option (types.attrsOf (types.nullOr types.str)) { } "Variables.";
      path = option (types.listOf types.anything) [ ] "Packages for PATH=.";
      restartIfChanged = option types.bool true "Whether a switch restarts it.";
      stopIfChanged = option types.bool true "Whether a switch stops it first.";
      script = option types.str "" "Shell commands for ExecStart=.";
      serviceConfig = section;
    };
    socket = common // {
      socketConfig = section;
    };
    timer = common // {
      timerConfig = section;
    };
    path = common // {
      pathConfig = section;
    };
  };
  headings = {
    service = "Service";
    socket = "Socket";
    timer = "Timer";
    path = "Path";
  };

  value = item: if isBool item then (if item then "true" else "false") else toString item;
  lines =
    keys:
    concatMap (
      key: map (item: "${key}=${value item}") (if isList keys.${key} then keys.${key} else [ keys.${key} ])
    ) (attrNames keys);
  joined = key: units: if units == [ ] then { } else { ${key} = toString units; };

  # A unit's sections, each a list of lines.
  written =
    pkgs: kind: unit:
    {
      Unit = lines (
        joined "After" unit.after
        // joined "Before" unit.before
        // joined "BindsTo" unit.bindsTo
        // joined "Conflicts" unit.conflicts
        // joined "OnFailure" unit.onFailure
        // joined "PartOf" unit.partOf
        // joined "Requires" unit.requires
        // joined "Requisite" unit.requisite
        // joined "Wants" unit.wants
        // (if unit.description == "" then { } else { Description = unit.description; })
        // (if unit.restartTriggers == [ ] then { } else { X-Restart-Triggers = "${pkgs.writeText "triggers" (toString unit.restartTriggers)}"; })
        // unit.unitConfig
      );
      ${headings.${kind}} =
        (
          if kind != "service" then
            [ ]
          else
            map (name: "Environment=${toJSON "${name}=${unit.environment.${name}}"}") (attrNames unit.environment)
            ++ (
              if unit.path == [ ] then
                [ ]
              else
                [ "Environment=\"PATH=${concatStringsSep ":" (map (package: "${package}/bin") unit.path)}\"" ]
            )
            ++ filter (line: line != "") [
              (if unit.restartIfChanged then "" else "X-RestartIfChanged=false")
              (if unit.stopIfChanged then "" else "X-StopIfChanged=false")
            ]
        )
        ++ lines unit."${kind}Config";
    }
    // (if unit.wantedBy == [ ] then { } else { Install = [ "WantedBy=${toString unit.wantedBy}" ]; });
  text' =
    sections:
    concatStringsSep "\n" (
      concatMap (name: [ "[${name}]" ] ++ sections.${name} ++ [ "" ]) (
        [ "Unit" ] ++ filter (name: name != "Unit") (attrNames sections)
      )
    );
in
{ config, pkgs, ... }:
{
  options = {
    systemd = listToAttrs (
      map (kind: {
        name = "${kind}s";
        value = option (types.attrsOf (types.submodule { options = kinds.${kind}; })) { } "Units.";
      }) (attrNames kinds)
    )
    // {
      units = option (types.attrsOf types.anything) { } "Units as text.";
    };
    environment.etc = option (types.attrsOf types.anything) { } "Files below /etc.";
    environment.systemPackages = option (types.listOf types.anything) [ ] "Commands.";
    services.xserver.videoDrivers = option (types.listOf types.str) [ ] "Drivers.";
    specialisation = option (types.attrsOf types.anything) { } "Variants.";
    system.switch.enable = option types.bool true "Whether it can switch.";
    virtualisation = option (types.attrsOf types.anything) { } "Of a virtual machine.";
    networking.firewall.allowedTCPPorts = option (types.listOf types.port) [ ] "Open ports.";
    hardware.graphics.enable = option types.bool false "The driver's libraries.";
    hardware.nvidia.package = option types.anything null "The driver.";
    assertions = option (types.listOf types.anything) [ ] "What must hold.";
    warnings = option (types.listOf types.str) [ ] "What the administrator should know.";
  };

  config.systemd.units = listToAttrs (
    concatMap (
      kind:
      map (name: {
        name = "${name}.${kind}";
        value = rec {
          sections = written pkgs kind config.systemd."${kind}s".${name};
          text = text' sections;
          inherit (config.systemd."${kind}s".${name}) wantedBy;
        };
      }) (attrNames config.systemd."${kind}s")
    ) (attrNames kinds)
  );
}
