# The environments and the commands over them; `pkgs` is nixpkgs or what stands in for it in the tests.
{
  pkgs,
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
      || path == root + "/yaptext"
      || builtins.substring 0 (builtins.stringLength root + 9) path == root + "/yaptext/";
  };

  project =
    name:
    build.project {
      name = "yap-text-${name}";
      inherit source;
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
  chat = command { name = "client"; };
in
{
  inherit environments projects libraries;
  packages = {
    inherit serve serve-cpu;
    default = serve;
  };
  apps = {
    serve = verb "serve" serve;
    serve-cpu = verb "serve" serve-cpu;
    chat = verb "chat" chat;
  };
}
