# A container image of the package `yap-text` over `environment` ("serve-cuda" or "serve-cpu"): a script that writes it to
# stdout, for `docker load` or `podman load`. What the image says of itself is nix/image/config.toml.
{
  pkgs,
  environment,
  yap-text,
  commit ? null,
  # Of the process; a volume that belongs to another user needs another one.
  user ? null,
}:
let
  said = builtins.fromTOML (builtins.readFile ./image/config.toml);
  project = (builtins.fromTOML (builtins.readFile ../pyproject.toml)).project;
  variables = said.env // said.env-of.${environment};
  label = name: value: { "org.opencontainers.image.${name}" = value; };

  healthy = pkgs.writeShellApplication {
    name = "healthy";
    text = "exec ${yap-text.environment}/bin/python3 -I ${./image/healthy.py}";
  };

  # The container toolkit puts the driver's libraries where the host has them, or where it takes the image to look.
  # nix/driver.sh then finds them; there is no ldconfig here.
  driver = pkgs.writeShellApplication {
    name = "yap-text";
    text = ''
      for folder in /run/opengl-driver/lib /usr/lib64 /usr/lib/x86_64-linux-gnu /usr/local/nvidia/lib64; do
        if [[ -z "''${YAP_TEXT_DRIVER_LIB-}" && -e "$folder/libcuda.so.1" ]]; then
          export YAP_TEXT_DRIVER_LIB="$folder"
        fi
      done
      exec ${yap-text}/bin/yap-text "$@"
    '';
  };
in
pkgs.dockerTools.streamLayeredImage {
  name = "localhost/yap-text";
  tag = environment;
  contents = [
    (if environment == "serve-cuda" then driver else yap-text)
    healthy
    pkgs.tini
    # To look around in: docker exec.
    pkgs.bashInteractive
    pkgs.coreutils
    pkgs.dockerTools.binSh
    pkgs.dockerTools.caCertificates
  ];
  # Folders of the image's root; what /etc/passwd lacks has no home and no name.
  fakeRootCommands = ''
    mkdir -p data etc tmp
    chown 10001:0 data
    chmod 775 data
    chmod 1777 tmp
    printf '%s\n' root:x:0:0::/:/bin/sh "yap-text:x:10001:0:Yap Text:/data/state:/bin/sh" > etc/passwd
    echo root:x:0: > etc/group
    echo "hosts: files dns" > etc/nsswitch.conf
  '';
  config =
    said.config
    // {
      Env = map (name: "${name}=${variables.${name}}") (builtins.attrNames variables);
      Labels =
        said.config.Labels
        // label "version" project.version
        // (if commit == null then { } else label "revision" commit);
    }
    // (if user == null then { } else { User = user; });
}
