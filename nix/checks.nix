# What `nix flake check` builds: the environment imports the service, and the tests that need no engine pass.
{
  pkgs,
  projects,
  libraries,
}:
{
  imports = pkgs.runCommand "yap-text-imports" { LD_LIBRARY_PATH = libraries; } ''
    ${projects.serve-cpu}/bin/python -c 'import yaptext.server.app' > "$out"
    ${projects.client}/bin/python -c 'import yaptext.cli, yaptext.tools.chat, yaptext.tools.warmup' >> "$out"
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
