{
  description = "Yap Text: a real-time text inference service, a conversation over one WebSocket on vLLM";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { nixpkgs, ... }:
    let
      system = "x86_64-linux"; # what the locks are for
      pkgs = nixpkgs.legacyPackages.${system};
      ours = import ./nix/packages.nix { inherit pkgs; };
      app = program: {
        type = "app";
        inherit program;
      };
      apps = {
        serve = app "${ours.apps.serve}/bin/yap-text-serve";
        serve-cpu = app "${ours.apps.serve-cpu}/bin/yap-text-serve";
        chat = app "${ours.apps.chat}/bin/yap-text-chat";
      };
    in
    {
      packages.${system} = ours.packages;
      apps.${system} = apps // {
        default = apps.serve;
      };
      checks.${system} = import ./nix/checks.nix {
        inherit pkgs;
        inherit (ours) projects libraries;
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
