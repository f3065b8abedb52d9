# The units of nix/units.nix as the text of their files: { "yap-text.service" = "[Unit]\n..."; ... }.
arguments:
let
  section = { name, lines }: "[${name}]\n" + builtins.concatStringsSep "\n" lines + "\n";
  unit = sections: builtins.concatStringsSep "\n" (map section sections);
in
builtins.mapAttrs (_: unit) (import ./units.nix arguments)
