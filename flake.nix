{
  description = "Yap Text: a real-time text inference service, a conversation over one WebSocket on vLLM";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs, ... }:
    let
      system = "x86_64-linux"; # what the locks are for
      # The CUDA package is unfree by NVIDIA's wheels. Here its name is consent; in the overlay your own nixpkgs decides.
      pkgs = import nixpkgs {
        inherit system;
        config.allowUnfreePredicate = package: package.name or "" == "yap-text";
      };
      commit = self.rev or self.dirtyRev or null;
      ours = import ./nix/packages.nix {
        inherit pkgs commit;
        tests = {
          inherit (checks) serve serve-cpu;
        };
      };
      module = import ./nix/module.nix { inherit (ours) packages; };
      checks = import ./nix/checks.nix { inherit pkgs module ours; };
      exe = pkgs.lib.getExe or (package: "${package}/bin/${package.meta.mainProgram}");
      apps = builtins.mapAttrs (_: command: {
        type = "app";
        program = exe command;
      }) ours.apps;
    in
    {
      packages.${system} = ours.packages;
      apps.${system} = apps // {
        default = apps.serve;
      };
      # On any nixpkgs: `nixpkgs.overlays = [ yap-text.overlays.default ]`.
      overlays.default =
        final: _:
        let
          inherit (import ./nix/packages.nix {
            pkgs = final;
            inherit commit;
          }) packages;
        in
        {
          yap-text = packages.serve;
          yap-text-cpu = packages.serve-cpu;
        };
      nixosModules.default = module;
      checks.${system} = checks.serve-cpu;
      # The tests' environment; the code is the working tree's.
      devShells.${system}.default = pkgs.mkShell {
        packages = [
          ours.environments.test
          ours.environments.serve-cpu
          pkgs.gnumake
        ];
        shellHook = ''
          export PYTHONPATH="$PWD" LD_LIBRARY_PATH="${ours.libraries}"
        '';
      };
    }
    // (if pkgs ? nixfmt-tree then { formatter.${system} = pkgs.nixfmt-tree; } else { });
}
