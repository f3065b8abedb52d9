"""Units of systemd as files: a unit, its drop-ins, and the values that count."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from yaptext.commands.doctor.machine import Machine

FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)
SERVICE, SOCKET, QUANTIZE = "yap-text.service", "yap-text.socket", "yap-text-quantize.service"
UNITS = (SERVICE, SOCKET, QUANTIZE)
_SPECIFIERS = {"%C": "/var/cache", "%S": "/var/lib", "%L": "/var/log", "%t": "/run", "%E": "/etc"}


@dataclass(frozen=True, slots=True)
class Unit:
    """`lines` are key and value in order, those of the drop-ins last. `closed` are drop-ins that this user may not
    read."""

    name: str
    path: Path
    text: str
    drop_ins: tuple[Path, ...]
    closed: tuple[Path, ...]
    lines: tuple[tuple[str, str], ...]

    def values(self, key: str) -> list[str]:
        """All of a key; an empty value clears those before."""
        found: list[str] = []
        for name, value in self.lines:
            if name == key:
                found = [*found, value] if value else []
        return found

    def value(self, key: str) -> str | None:
        return next(reversed(self.values(key)), None)

    def environment(self) -> dict[str, str]:
        """`Environment=` lines, with the specifiers of folders."""
        found: dict[str, str] = {}
        for line in self.values("Environment"):
            whole = re.sub("|".join(_SPECIFIERS), lambda mark: _SPECIFIERS[mark[0]], line)
            found |= dict(pair.split("=", 1) for pair in shlex.split(whole) if "=" in pair)
        return found

    def credentials(self) -> dict[str, str]:
        """Path by name of `LoadCredential=`."""
        return dict(value.split(":", 1) for value in self.values("LoadCredential") if ":" in value)

    def memory_limit(self) -> int | None:
        """Bytes of `MemoryMax=`, if it is a number of bytes."""
        value = (self.value("MemoryMax") or "").upper()
        factor = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(value[-1:], 1)
        digits = value.rstrip("KMGT")
        return int(digits) * factor if digits.isdigit() else None


def read(machine: Machine, name: str) -> Unit | None:
    """The unit of that name, or None. Raises `OSError` if it may not be read."""
    path = next((path for folder in FOLDERS if (path := machine.path(folder) / name).exists()), None)
    text = None if path is None else machine.text(path)
    if path is None or text is None:
        return None
    found: dict[str, Path] = {}
    for folder in reversed(FOLDERS):
        found |= {file.name: file for file in (machine.path(folder) / f"{name}.d").glob("*.conf")}
    drop_ins = tuple(found[file] for file in sorted(found))
    lines, closed = list(_lines(text)), []
    for drop_in in drop_ins:
        try:
            lines += _lines(machine.text(drop_in) or "")
        except OSError:
            closed.append(drop_in)
    return Unit(name, path, text, drop_ins, tuple(closed), tuple(lines))


def _lines(text: str) -> list[tuple[str, str]]:
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        content = line.strip()
        if content and content[0] not in "#;[" and "=" in content:
            key, value = content.split("=", 1)
            found.append((key.strip(), value.strip()))
    return found


def addresses(socket: Unit) -> list[tuple[str, int]]:
    """Host and port of each `ListenStream=` that is TCP."""
    found = []
    for value in socket.values("ListenStream"):
        host, _, port = value.rpartition(":")
        if port.isdigit():
            found.append((host.strip("[]") or "::", int(port)))
    return found
