# The environments and the commands over them; `pkgs` is nixpkgs or what stands in for it in the tests.
{
  pkgs,
  # What /status shows, as `git describe --always --dirty` writes it. Null: unknown.
  commit ? null,
  # nixpkgs packages a wheel of PyTorch's own index, so it knows where that is.
  torchIndex ? builtins.head (builtins.match "(.*/whl/).*" pkgs.python311.pkgs.torch-bin.src.url),
}:
let
  python = pkgs.python311;
  build = import ./python-env.nix {
    inherit (pkgs) runCommand fetchPypi fetchurl;
    inherit python torchIndex;
  };

  wheels = {
    serve-cuda = build.wheelsOf ./lock/serve-cuda.txt;
    serve-cpu = build.wheelsOf ./lock/serve-cpu.txt;
    test = build.wheelsOf ./lock/test.txt;
    # Talking with a service takes neither torch nor vLLM. Below, what the client imports and what builds the project.
    client = builtins.filter (wheel: builtins.elem wheel.name clientNames) wheels.serve-cpu;
  };
  clientNames = [
    "annotated-types"
    "pydantic"
    "pydantic-core"
    "pydantic-settings"
    "python-dotenv"
    "typing-extensions"
    "typing-inspection"
    "websockets"

    "hatchling"
    "packaging"
    "pathspec"
    "pluggy"
    "tomlkit"
    "trove-classifiers"
  ];

  layer =
    name: below:
    build.environment {
      name = "yap-text-${name}-wheels";
      wheels = wheels.${name};
      inherit below;
    };
  serve-cpu-wheels = layer "serve-cpu" null;
  environments = {
    serve-cuda = layer "serve-cuda" null;
    serve-cpu = serve-cpu-wheels;
    client = layer "client" null;
    test = layer "test" serve-cpu-wheels;
  };

  root = toString ../.;
  source = builtins.path {
    name = "yap-text-source";
    path = ../.;
    filter =
      path: _:
      path == root + "/pyproject.toml"
      || builtins.any (folder: path == folder || startsWith "${folder}/" path) [
        "${root}/systemd"
        "${root}/yaptext"
      ];
  };
  startsWith = beginning: text: builtins.substring 0 (builtins.stringLength beginning) text == beginning;

  project =
    name:
    build.project {
      name = "yap-text-${name}";
      inherit source commit;
      below = environments.${name};
    };
  projects = builtins.mapAttrs (name: _: project name) environments;

  # Wheels for any Linux expect these of the system; libnuma is vLLM's, in its build for CPUs.
  libraries = builtins.concatStringsSep ":" (
    map (package: "${package}/lib") [
      pkgs.stdenv.cc.cc.lib
      pkgs.zlib
      pkgs.numactl
    ]
  );

  # bin/yap-text over the environment `name`; `prepare` runs first. Its Python is `.environment`.
  command =
    {
      name,
      prepare ? "",
      runtimeInputs ? [ ],
    }:
    pkgs.writeShellApplication {
      name = "yap-text";
      inherit runtimeInputs;
      text = ''
        export LD_LIBRARY_PATH="${libraries}''${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        export PATH="${projects.${name}}/bin:${environments.${name}}/bin:$PATH"
        ${prepare}
        exec ${projects.${name}}/bin/yap-text "$@"
      '';
    }
    // {
      environment = projects.${name};
    };

  # `yap-text VERB`, for `nix run`, which takes no arguments of its own.
  verb =
    name: package:
    pkgs.writeShellApplication {
      name = "yap-text-${name}";
      text = ''exec ${package}/bin/yap-text ${name} "$@"'';
    };

  # Puts units on a host without NixOS that run this very package.
  install =
    package:
    pkgs.writeShellApplication {
      name = "yap-text-install";
      text = ''exec ${package}/bin/yap-text install --command ${package}/bin/yap-text "$@"'';
    };

  # What systemd/ holds, as nix/render.nix makes it of these arguments.
  units =
    arguments:
    let
      rendered = import ./render.nix arguments;
      copy = name: "cp ${pkgs.writeText name rendered.${name}} \"$out/${name}\"";
    in
    pkgs.runCommand "yap-text-units" { } ''
      mkdir "$out"
      cp ${../systemd/logrotate.conf} "$out/logrotate.conf"
      cp ${../systemd/yap-text.env} "$out/yap-text.env"
      ${builtins.concatStringsSep "\n" (map copy (builtins.attrNames rendered))}
    '';

  serve = command {
    name = "serve-cuda";
    # vLLM compiles at its start.
    runtimeInputs = [
      pkgs.stdenv.cc
      pkgs.coreutils
    ];
    prepare = builtins.readFile ./driver.sh;
  };
  serve-cpu = command {
    name = "serve-cpu";
    runtimeInputs = [ pkgs.stdenv.cc ];
    # A GPU would be of no use to this build.
    prepare = "export YAP_TEXT_DEVICE=cpu";
  };
  client = command { name = "client"; };
  quantize = verb "quantize" serve;
  quantize-cpu = verb "quantize" serve-cpu;
in
{
  inherit
    environments
    projects
    libraries
    units
    ;
  packages = {
    inherit
      serve
      serve-cpu
      quantize
      quantize-cpu
      ;
    units = units {
      yap-text = "${serve}/bin/yap-text";
      logrotate = "${pkgs.logrotate}/bin/logrotate";
    };
    default = serve;
  };
  apps = {
    serve = verb "serve" serve;
    serve-cpu = verb "serve" serve-cpu;
    inherit quantize quantize-cpu;
    chat = verb "chat" client;
    bench = verb "bench" client;
    install = install serve;
    install-cpu = install serve-cpu;
  };
}
