# What `nix flake check` builds: the units are the rendered ones, the NixOS module makes them, the environments import
# what they are for, and the tests that need no engine pass.
{
  pkgs,
  module,
  packages,
  projects,
  libraries,
  units,
}:
let
  cases = import ../tests/nix/module.nix {
    inherit pkgs module packages;
    lib = pkgs.lib or (import ../tests/nix/lib.nix);
  };
  isFile = value: value.type or null == "derivation";
  compare =
    name:
    let
      inherit (cases.${name}) expected found;
    in
    if isFile expected then
      "diff ${expected} ${found}"
    else if expected == found then
      ""
    else
      throw "module: ${name}\nexpected: ${builtins.toJSON expected}\nfound: ${builtins.toJSON found}";
in
{
  units = pkgs.runCommand "yap-text-units-are-rendered" { } ''
    diff --recursive ${../systemd} ${units { }}
    touch "$out"
  '';

  module = pkgs.runCommand "yap-text-module" { } ''
    ${builtins.concatStringsSep "\n" (map compare (builtins.attrNames cases))}
    touch "$out"
  '';

  imports = pkgs.runCommand "yap-text-imports" { LD_LIBRARY_PATH = libraries; } ''
    ${projects.serve-cpu}/bin/python -c 'import yaptext.server.app, awq' > "$out"
    ${projects.client}/bin/python \
      -c 'import yaptext.cli, yaptext.tools.chat, yaptext.tools.warmup, yaptext.tools.bench.command' >> "$out"
  '';

  unit-tests = pkgs.runCommand "yap-text-unit-tests" { LD_LIBRARY_PATH = libraries; } ''
    export HOME="$TMPDIR"
    cp -r --no-preserve=mode ${../.} "$TMPDIR/source"
    cd "$TMPDIR/source"
    ${projects.test}/bin/python -m pytest -p no:cacheprovider \
      -m 'not engine and not subprocess and not systemd and not nix'
    touch "$out"
  '';
}
