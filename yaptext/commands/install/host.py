"""The host to install on, or a folder that stages one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from yaptext.commands.install.files import InstallError
from yaptext.commands.install.templates import COMMAND


class Host:
    """The root folder to write to: that of the machine, or a folder that stages one (`prefix`)."""

    def __init__(self, prefix: Path | None) -> None:
        self.is_staged = prefix is not None
        self.root = Path("/") if prefix is None else prefix.absolute()
        self.units = self.root / "etc/systemd/system"
        self.configs = self.root / "etc/yap-text"
        self.link = self.root / COMMAND.lstrip("/")
        """The link to the command of the current version."""
        self.nix_root = self.root / "nix/var/nix/gcroots/yap-text"
        """Protects a command in the Nix store from the garbage collector."""

    def check(self) -> None:
        """Raises if this machine cannot be written to or does not use units."""
        if self.is_staged:
            return
        if not has_systemd():
            raise InstallError("systemd does not run this machine; without it: yap-text serve")
        if Path("/etc/NIXOS").exists():
            raise InstallError("this is NixOS: use the flake's nixosModules.default instead (services.yap-text)")
        if os.geteuid() != 0:
            raise InstallError("units are installed by root: run it with sudo, or with --prefix to look at the files")

    def systemctl(self, *arguments: str) -> str:
        """Returns the output; in a staged root nothing is run."""
        if self.is_staged:
            return ""
        # The wrapper of a Nix package names libraries that are not for the machine's own programs.
        environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
        done = subprocess.run(["systemctl", *arguments], env=environment, capture_output=True, text=True, check=False)
        if done.returncode and arguments[0] != "is-active":
            raise InstallError(f"systemctl {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout.strip()


def has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None
