{
  description = "Yap Text: a real-time text inference service, a conversation over one WebSocket on vLLM";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs, ... }:
    let
      system = "x86_64-linux"; # what the locks are for
      pkgs = nixpkgs.legacyPackages.${system};
      commit = self.rev or self.dirtyRev or null;
      ours = import ./nix/packages.nix { inherit pkgs commit; };
      module = import ./nix/module.nix { inherit (ours) packages; };
      apps = builtins.mapAttrs (_: command: {
        type = "app";
        program = "${command}/bin/${command.name}";
      }) ours.apps;
    in
    {
      packages.${system} = ours.packages;
      apps.${system} = apps // {
        default = apps.serve;
      };
      nixosModules.default = module;
      checks.${system} = import ./nix/checks.nix {
        inherit pkgs module;
        inherit (ours)
          packages
          projects
          libraries
          units
          ;
      };
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
