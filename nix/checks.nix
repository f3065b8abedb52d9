# What `nix flake check` builds: the environment imports the service, and the tests that need no engine pass.
{
  pkgs,
  environments,
  projects,
}:
{
  imports = pkgs.runCommand "yap-text-imports" { } ''
    ${projects.serve-cpu}/bin/python -c 'import yaptext.server.app' > "$out"
    ${projects.client}/bin/python -c 'import yaptext.cli, yaptext.tools.chat, yaptext.tools.warmup' >> "$out"
  '';

  unit-tests = pkgs.runCommand "yap-text-unit-tests" { } ''
    export HOME="$TMPDIR"
    cp -r --no-preserve=mode ${../.} "$TMPDIR/source"
    cd "$TMPDIR/source"
    ${projects.test}/bin/python -m pytest -p no:cacheprovider --ignore tests/nix -m 'not engine and not subprocess'
    touch "$out"
  '';
}
