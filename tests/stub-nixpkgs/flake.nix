# Stands in for nixpkgs where neither it nor its binary cache can be reached: the attributes that flake.nix and nix/
# read, over the tools of a Debian-like machine. Wheels come from the folder that the sandbox shows as /wheelhouse, and
# Nix checks their hashes as ever. PYTHON names another Python 3.11 than the system's (with --impure).
{
  description = "A stand-in for nixpkgs over the tools of the machine";

  outputs =
    _:
    let
      system = "x86_64-linux";
      host = {
        outPath = "/usr";
      };

      # `exit 0`: where bash would exec its last command, the log pipe can close first, and Nix kills the build.
      runCommand =
        name: attributes: script:
        derivation (
          {
            inherit name system script;
            builder = "/bin/bash";
            args = [
              "-c"
              ''
                set -euo pipefail
                . "$scriptPath"
                exit 0
              ''
            ];
            passAsFile = [ "script" ];
            PATH = "/usr/bin:/bin";
          }
          // attributes
        );

      writeText =
        name: text:
        runCommand name
          {
            inherit text;
            passAsFile = [
              "script"
              "text"
            ];
          }
          ''
            cp "$textPath" "$out"
          '';

      fetched =
        name: sha256:
        derivation {
          inherit name system;
          builder = "/bin/bash";
          args = [
            "-c"
            ''
              cp "/wheelhouse/$name" "$out" || exit 1
              exit 0
            ''
          ];
          PATH = "/usr/bin:/bin";
          outputHashMode = "flat";
          outputHashAlgo = "sha256";
          outputHash = sha256;
        };

      writeShellApplication =
        {
          name,
          text,
          runtimeInputs ? [ ],
        }:
        runCommand name
          {
            application = ''
              #!/bin/bash
              set -o errexit
              set -o nounset
              set -o pipefail
              export PATH="${builtins.concatStringsSep "" (map (input: "${input}/bin:") runtimeInputs)}$PATH"
              ${text}
            '';
          }
          ''
            mkdir -p "$out/bin"
            printf '%s' "$application" > "$out/bin/$name"
            bash -n "$out/bin/$name"
            chmod +x "$out/bin/$name"
          '';
    in
    {
      legacyPackages.${system} = {
        inherit runCommand writeText writeShellApplication;

        fetchPypi =
          {
            pname,
            version,
            sha256,
            format ? "setuptools",
            dist ? "source",
            python ? "source",
            abi ? "none",
            platform ? "any",
          }:
          assert dist == python;
          if format == "wheel" then
            fetched "${pname}-${version}-${python}-${abi}-${platform}.whl" sha256
          else
            assert format == "setuptools";
            fetched "${pname}-${version}.tar.gz" sha256;
        fetchurl =
          {
            url,
            name,
            sha256,
          }:
          assert url == "file:///wheelhouse/whl/cpu/" + builtins.replaceStrings [ "+" ] [ "%2B" ] name;
          fetched name sha256;

        python311 = {
          interpreter =
            let
              chosen = builtins.getEnv "PYTHON";
            in
            if chosen == "" then "/usr/bin/python3.11" else chosen;
          pythonVersion = "3.11";
          pkgs.torch-bin.src.url = "file:///wheelhouse/whl/cu000/torch";
        };
        stdenv.cc = host // {
          cc.lib = host;
        };
        zlib = host;
        numactl = host;
        coreutils = host;
        logrotate = host;
        gnumake = host;

        mkShell =
          { packages, shellHook }:
          runCommand "shell" { inherit packages shellHook; } ''
            mkdir "$out"
          '';
      };
    };
}
