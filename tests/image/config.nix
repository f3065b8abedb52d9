# What nix/image.nix hands to nixpkgs' streamLayeredImage, for each environment, over the stub.
let
  stub = (import ../stub-nixpkgs/flake.nix).outputs { };
  pkgs = stub.legacyPackages.x86_64-linux // {
    tini = "/tini";
    bashInteractive = "/bash";
    dockerTools = {
      streamLayeredImage = arguments: arguments;
      binSh = "/sh";
      caCertificates = "/certificates";
    };
  };
  image =
    environment:
    let
      made = import ../../nix/image.nix {
        inherit pkgs environment;
        yap-text = {
          outPath = "/yap-text";
          environment = "/python";
        };
        commit = "0123456789";
      };
    in
    {
      inherit (made) name tag config;
      contents = map (item: item.name or "${item}") made.contents;
    };
in
{
  serve-cpu = image "serve-cpu";
  serve-cuda = image "serve-cuda";
}
