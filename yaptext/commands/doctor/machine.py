"""The machine that is examined: files, environment, programs and packages. A test replaces each of them."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from yaptext.build import build

PROGRAM_WITHIN_S = 4.0
_MOST_BYTES = 2**20


class Ran(NamedTuple):
    """What a program did. `status` is None if it is not installed, and -1 if it did not end in time."""

    status: int | None
    out: str = ""
    err: str = ""

    @property
    def is_ok(self) -> bool:
        return self.status == 0

    @property
    def complaint(self) -> str:
        """Its first line of complaint."""
        if self.status is None:
            return "it is not installed"
        if self.status == -1:
            return f"it did not end within {PROGRAM_WITHIN_S:g} s"
        return next(
            (line.strip() for line in f"{self.err}\n{self.out}".splitlines() if line.strip()), "it said nothing"
        )


class Disk(NamedTuple):
    """Of the file system that a path is on."""

    free_bytes: int
    total_bytes: int
    read_only: bool


Programs = Callable[[Sequence[str]], Ran]


def run_program(command: Sequence[str]) -> Ran:
    """Runs a program of this machine, without a terminal."""
    program = shutil.which(command[0])
    if program is None:
        return Ran(None)
    # The wrapper of a Nix package names libraries that are not for the machine's own programs.
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"} | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            [program, *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROGRAM_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ran(-1)
    except OSError as error:
        return Ran(127, err=error.strerror or str(error))
    return Ran(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def canonical(package: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()


@cache
def installed_packages() -> dict[str, str]:
    """Version by canonical name, of what this Python can import."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if (name := distribution.metadata["Name"]) is not None:
            found.setdefault(canonical(name), distribution.version)
    return found


def installed_plugins() -> set[str]:
    """Names of the plugins of vLLM that this Python has."""
    return {point.name for point in metadata.entry_points(group="vllm.general_plugins")}


def disk_of(path: Path) -> Disk:
    """Raises `OSError`."""
    found = os.statvfs(path)
    return Disk(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, bool(found.f_flag & os.ST_RDONLY))


@dataclass(frozen=True)
class Machine:
    """Everything that a check reads. The defaults are those of this process."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    run: Programs = run_program
    packages: Callable[[], Mapping[str, str]] = installed_packages
    plugins: Callable[[], set[str]] = installed_plugins
    disk: Callable[[Path], Disk] = disk_of
    python: tuple[int, int] = sys.version_info[:2]
    prefix: Path = Path(sys.prefix)
    vllm: Path | None = None
    """The folder of the package; None finds it."""
    system: str = f"{platform.system()} {platform.machine()}"
    libc: tuple[str, str] = field(default_factory=platform.libc_ver)
    open_files: tuple[int, int] = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE))
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """That this process may use."""
    user_id: int = field(default_factory=os.geteuid)
    now: float = field(default_factory=time.time)
    version: str = field(default_factory=lambda: build().version)

    def path(self, path: str | Path) -> Path:
        """Where a path of the machine lies: below `root`. One that is there already stays."""
        path = Path(path)
        if self.root == Path("/") or path.is_relative_to(self.root):
            return path
        return self.root / str(path).lstrip("/")

    def text(self, path: str | Path) -> str | None:
        """The text of a file, or None if there is none. Raises `OSError` if it cannot be read."""
        try:
            with self.path(path).open("rb") as file:
                return file.read(_MOST_BYTES).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def word(self, path: str | Path) -> str | None:
        """The text of a file of /proc or /sys without white space around it; None if it cannot be read."""
        try:
            found = self.text(path)
        except OSError:
            return None
        return None if found is None else found.strip()

    def may_write(self, folder: Path) -> bool:
        """Whether this process may make files in a folder, or make the folder itself."""
        place = self.path(folder)
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)

    def existing(self, folder: Path) -> Path:
        """The folder, or the nearest above it that exists."""
        place = self.path(folder)
        while not os.path.exists(place) and place != place.parent:
            place = place.parent
        return place

    def library(self, name: str) -> Path | None:
        """Where the loader would find a shared library, by its usual folders, `LD_LIBRARY_PATH` and ld.so.conf."""
        folders = [folder for folder in self.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
        folders += _LIBRARY_FOLDERS
        for file in sorted(self.path("/etc/ld.so.conf.d").glob("*.conf")):
            folders += [line.strip() for line in (self.word(file) or "").splitlines() if line.startswith("/")]
        return next((path for folder in folders if (path := self.path(folder) / name).exists()), None)


_LIBRARY_FOLDERS = [
    "/run/opengl-driver/lib",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/lib64",
    "/lib",
    "/usr/lib",
    "/usr/lib/wsl/lib",
    "/usr/lib64/nvidia",
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
]
