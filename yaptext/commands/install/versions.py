"""The versions that `make install` has built."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from yaptext.commands.install import files
from yaptext.commands.install.files import InstallError
from yaptext.commands.install.host import Host

BUILT = "built.txt"
"""The file that marks a complete version; `make install` writes it last. Until then its name ends in `.part`."""


class Versions:
    """The folder that `make install` calls PREFIX: an environment per version, the links `current` and `previous`."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.command = folder / "current/bin/yap-text"
        self.folder = host.root / folder.relative_to("/")
        self.current, self.previous = self.folder / "current", self.folder / "previous"

    @classmethod
    def around(cls, host: Host, environment: Path) -> Versions | None:
        """The versions around an environment; None if it is not one of them."""
        return cls(host, environment.parent) if (environment / BUILT).is_file() else None

    @classmethod
    def installed(cls, host: Host) -> Versions | None:
        """The versions that the command belongs to."""
        target = host.link.readlink() if host.link.is_symlink() else Path()
        return cls(host, target.parents[2]) if target.parts[-3:] == ("current", "bin", "yap-text") else None

    def switch(self, name: str) -> bool:
        """Makes this the current version, and the former one the previous. Returns whether anything changed."""
        before = self.current.readlink() if self.current.is_symlink() else None
        if before is not None and before.name != name:
            files.link(self.previous, before)
        return files.link(self.current, Path(name))

    def prune(self) -> None:
        """Removes complete versions, but not the current, the previous, or one that a process runs."""
        linked = {link.readlink().name for link in (self.current, self.previous) if link.is_symlink()}
        for folder in self.made():
            if folder.name in linked or not (folder / BUILT).exists():
                continue
            if _runs(folder):
                files.tell("kept", folder, "a process runs it")
                continue
            try:
                self.remove(folder)
            except InstallError as error:  # the switch is done; the next one tries again
                files.tell("kept", folder, str(error))

    def made(self) -> list[Path]:
        """The folders of versions, complete or not."""
        folders = {stamp.parent for name in (BUILT, f"{BUILT}.part") for stamp in self.folder.glob(f"*/{name}")}
        return sorted(folder for folder in folders if not folder.is_symlink())

    def remove(self, folder: Path) -> None:
        with files.changing(folder):
            if (folder / BUILT).exists():  # first: a removal that is interrupted leaves no complete version
                (folder / BUILT).rename(folder / f"{BUILT}.part")
            shutil.rmtree(folder)
        files.tell("removed", folder)


def _runs(environment: Path) -> bool:
    """Whether a process of this machine runs the environment's Python."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if process.read_bytes().startswith(os.fsencode(f"{environment}/")):
                return True
    return False
