{
  description = "A stand-in for nixpkgs over the tools of the machine";

  outputs = _: { legacyPackages.x86_64-linux = import ./. { }; };
}
