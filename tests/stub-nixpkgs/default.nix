# Stands in for nixpkgs where neither it nor its binary cache can be reached: the attributes that flake.nix and nix/
# read, over the tools of a Debian-like machine. Wheels come from the folder that the sandbox shows as /wheelhouse, and
# Nix checks their hashes as ever. PYTHON311 and PYTHON312 name other Pythons than the system's (with --impure).
{
  system ? "x86_64-linux",
  config ? { },
}:
let
  host = {
    outPath = "/usr";
  };

  # Static: a build may go without the loader in /lib64 (tests/nix/sandbox.sh).
  shell = "/bin/bash-static";

  # A derivation as mkDerivation makes it: what is for readers of the package is no part of the build, and an unfree
  # licence needs consent.
  make =
    attributes:
    let
      meta = attributes.meta or { };
      isFree = builtins.all (license: license.free) (meta.license or [ ]);
      consent = config.allowUnfreePredicate or (_: false);
    in
    if !isFree && !consent attributes then
      throw "${attributes.name} has an unfree license"
    else
      derivation (
        removeAttrs attributes [
          "meta"
          "passthru"
        ]
      )
      // attributes.passthru or { }
      // {
        inherit meta;
      };

  # `exit 0`: where bash would exec its last command, the log pipe can close first, and Nix kills the build.
  runCommand =
    name: attributes: script:
    make (
      {
        inherit name system script;
        builder = shell;
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
      builder = shell;
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

  python =
    name: pythonVersion:
    let
      chosen = builtins.getEnv "PYTHON${name}";
    in
    {
      inherit pythonVersion;
      interpreter = if chosen == "" then "/usr/bin/python${pythonVersion}" else chosen;
    };

  writeShellApplication =
    {
      name,
      text,
      runtimeInputs ? [ ],
      meta ? { },
      passthru ? { },
    }:
    runCommand name
      {
        inherit meta passthru;
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

  python311 = python "311" "3.11";
  python312 = python "312" "3.12";
  # The one that nixpkgs prefers; nothing is built with it.
  python3.pkgs.torch-bin.src.url = "file:///wheelhouse/whl/cu000/torch";
  stdenv.cc = host // {
    cc.lib = host;
    # By the path that is no link in /lib64.
    bintools.dynamicLinker = "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
  };
  patchelf = host;
  zlib = host;
  numactl = host;
  coreutils = host;
  logrotate = host;
  gnumake = host;
  tini = host;
  bashInteractive = host;

  dockerTools = {
    binSh = host;
    caCertificates = host;
    # What the script would pack, instead of the layers.
    streamLayeredImage =
      {
        name,
        tag,
        contents,
        config,
        fakeRootCommands,
      }:
      runCommand "yap-text-${tag}-image"
        {
          image = builtins.toJSON {
            inherit name tag config;
            contents = map toString contents;
          };
        }
        ''
          printf '#!/bin/sh\ncat <<"EOF"\n%s\nEOF\n' "$image" > "$out"
          chmod +x "$out"
        '';
  };

  mkShell =
    { packages, shellHook }:
    runCommand "shell" { inherit packages shellHook; } ''
      mkdir "$out"
    '';
}
