# The tests of the packages. Those of serve-cpu are what `nix flake check` builds: the units are the rendered ones, the
# NixOS module makes them, the environments import what they are for, the programs of the wheels start, and the tests that
# need no engine pass. Those of serve cost the CUDA environment.
{
  pkgs,
  module,
  # nix/packages.nix
  ours,
}:
let
  inherit (ours)
    packages
    projects
    environments
    bases
    compressor
    toolkit
    libraries
    units
    ;

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

  # As NixOS and Nix's own sandbox are: nothing has the loader that a wheel asks for. Where /lib64 is in the sandbox,
  # tests/nix/sandbox.sh takes it from builds of this name, so that a script can run what is in the store, and no more.
  withoutLib64 =
    name: script:
    pkgs.runCommand "yap-text-${name}-without-lib64" { LD_LIBRARY_PATH = libraries; } ''
      [[ ! -e /lib64/ld-linux-x86-64.so.2 ]] || { echo "this build sees /lib64" >&2; exit 1; }
      ${script}
      : > "$out"
    '';

  # Without what a checkout gathers: `path:` copies all of it.
  checkout = builtins.path {
    name = "yap-text-checkout";
    path = ../.;
    filter =
      path: type:
      !(
        type == "directory"
        && builtins.elem (baseNameOf path) [
          ".git"
          ".hypothesis"
          ".venv"
          "__pycache__"
          "build"
          "dist"
        ]
      );
  };

  serve-cpu = {
    units = pkgs.runCommand "yap-text-units-are-rendered" { } ''
      diff --recursive --exclude='*.md' ${../systemd} ${units { }}
      touch "$out"
    '';

    module = pkgs.runCommand "yap-text-module" { } ''
      ${builtins.concatStringsSep "\n" (map compare (builtins.attrNames cases))}
      touch "$out"
    '';

    imports = pkgs.runCommand "yap-text-imports" { LD_LIBRARY_PATH = libraries; } ''
      ${projects.serve-cpu}/bin/python -c 'import yaptext.server.app, awq' > "$out"
      PYTHONPATH=${compressor "serve-cpu"} ${projects.serve-cpu}/bin/python -P \
        -c 'from llmcompressor.modifiers.transform.awq import AWQModifier' >> "$out"
      ${projects.client}/bin/python \
        -c 'import yaptext.commands.main, yaptext.commands.terminal, yaptext.commands.warmup, yaptext.bench.command' >> "$out"
    '';

    # One of each layer.
    programs = withoutLib64 "cpu-programs" ''
      ${environments.serve-cpu}/bin/ninja --version
      for program in ${bases.serve-cpu}/lib/python*/site-packages/torch/bin/protoc; do "$program" --version; done
    '';

    unit-tests = pkgs.runCommand "yap-text-unit-tests" { LD_LIBRARY_PATH = libraries; } ''
      export HOME="$TMPDIR"
      cp -r --no-preserve=mode ${checkout} "$TMPDIR/source"
      cd "$TMPDIR/source"
      ${projects.test}/bin/python -m pytest -p no:cacheprovider \
        -m 'not engine and not subprocess and not systemd and not nix and not clients and not browser'
      touch "$out"
    '';
  }
  # It boots a machine: with nixpkgs alone.
  // (
    if pkgs ? testers.runNixOSTest && builtins.pathExists ./vm-test.nix then
      { vm = import ./vm-test.nix { inherit pkgs module packages; }; }
    else
      { }
  );

  # nvcc calls the C compiler, which may want /lib64: here up to what that makes of a kernel, and nvcc's next command.
  kernel = pkgs.runCommand "yap-text-kernel" { } ''
    export PATH="${pkgs.stdenv.cc}/bin:$PATH"
    mkdir "$out"
    cd "$out"
    echo '__global__ void twice(float *x) { x[threadIdx.x] *= 2; }' > twice.cu
    ${toolkit}/bin/nvcc -arch=sm_90 -cubin --keep twice.cu
    ${toolkit}/bin/nvcc -arch=sm_90 -cubin --keep --dryrun twice.cu 2>&1 | sed -n 's/^#[$] \(.*cicc.*-o.*\)/\1/p' > cicc
  '';
in
{
  inherit serve-cpu;

  serve = {
    imports = pkgs.runCommand "yap-text-cuda-imports" { LD_LIBRARY_PATH = libraries; } ''
      export HOME="$TMPDIR"
      ${projects.serve-cuda}/bin/python -W ignore -c '
      import torch, vllm, yaptext.server.app
      print("vllm", vllm.__version__, "torch", torch.__version__)' > "$out"
    '';

    # From CUDA C++ to the code of a card by the wheels' own programs.
    programs = withoutLib64 "cuda-programs" ''
      ${environments.serve-cuda}/bin/ninja --version
      for program in ${toolkit}/bin/{nvcc,cudafe++,fatbinary,nvlink,ptxas} \
        ${bases.serve-cuda}/lib/python*/site-packages/{*triton/backends/nvidia/bin/*,vllm/vllm-rs}; do
        [[ ! -x $program ]] || "$program" --version
      done
      CICC_PATH=${toolkit}/nvvm/bin
      command=$(< ${kernel}/cicc)
      eval "''${command//twice.cpp1.ii/${kernel}/twice.cpp1.ii}"
      ${toolkit}/bin/ptxas -arch=sm_90 -o twice.cubin twice.ptx
      [[ -s twice.cubin ]]
    '';
  };
}
