"""`yap-text install`: the units and their files on a host that has systemd and is not NixOS.

A unit is replaced whenever it differs: changes to one belong in `systemctl edit`. A config is replaced only while it is
as it was installed, which its last line tells; keys and tokens are written once.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yaptext.errors import YapError
from yaptext.settings import HIDDEN

_RENDERED_COMMAND = "/usr/local/bin/yap-text"
_STARTED = ("yap-text.socket", "yap-text.service", "yap-text-quantize.service", "yap-text-logrotate.timer")
_MARK = "# As installed, until this file is edited: "
_NO_KEYS = "# NAME sha256:HASH [LIMIT=N ...], as `yap-text key new NAME --file` adds them\n"
_KEPT_FOLDERS = (
    "var/lib/yap-text",
    "var/lib/private/yap-text",
    "var/cache/yap-text",
    "var/cache/private/yap-text",
    "var/log/yap-text",
    "var/log/private/yap-text",
    "var/lib/yap-text-logrotate",
)


class InstallError(YapError):
    """Not everything could be put in place; the message says what to do."""


class Host:
    """The root folder that is written to: the machine's own, or a folder that stages one (`prefix`)."""

    def __init__(self, prefix: Path | None) -> None:
        self.is_staged = prefix is not None
        self.root = Path("/") if prefix is None else prefix.absolute()
        self.units = self.root / "etc/systemd/system"
        self.configs = self.root / "etc/yap-text"
        self.nix_root = self.root / "nix/var/nix/gcroots/yap-text"
        """Keeps the command from Nix's garbage collector, where it lies in the store."""

    def check(self) -> None:
        """Raises where this machine cannot be written to or has no use for units."""
        if self.is_staged:
            return
        if not _has_systemd():
            raise InstallError("systemd does not run this machine; without it: yap-text serve")
        if Path("/etc/NIXOS").exists():
            raise InstallError("this is NixOS: use the flake's nixosModules.default instead (services.yap-text)")
        if os.geteuid() != 0:
            raise InstallError("units are installed by root: run it with sudo, or with --prefix to look at the files")

    def systemctl(self, *arguments: str) -> str:
        """What it prints; in a staged root nothing is run."""
        if self.is_staged:
            return ""
        # The wrapper of a Nix package names libraries that are not for the machine's own programs.
        environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
        done = subprocess.run(["systemctl", *arguments], env=environment, capture_output=True, text=True, check=False)
        if done.returncode and arguments[0] != "is-active":
            raise InstallError(f"systemctl {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout.strip()


def install(prefix: Path | None = None, command: Path | None = None) -> int:
    """Puts everything in place that is not, and prints a line a file. `command` is what the units run."""
    host = Host(prefix)
    host.check()
    command = _command(host, command)
    changed = False
    for unit in _units():
        text = unit.read_text().replace(f"{_RENDERED_COMMAND} ", f"{command} ")
        changed |= _put(host.units / unit.name, text, 0o644)
    for template in (_folder() / "yap-text.env", _folder() / "logrotate.conf"):
        _put_config(host.configs / template.name, template.read_text(), 0o600 if template.suffix == ".env" else 0o644)
    _put_once(host.configs / "api-key", secrets.token_urlsafe(32) + "\n", "a new key")
    _put_once(host.configs / "hf-token", "", "empty")
    _put_once(host.configs / "keys", _NO_KEYS, "none yet", 0o644)  # hashes, which the service's user reads
    if command.is_relative_to("/nix/store"):
        _link(host.nix_root, Path(*command.parts[:4]))
    if changed:
        host.systemctl("daemon-reload")
        if host.systemctl("is-active", "yap-text.service") == "active":
            print("The service runs as it did before; the new units are for the next: systemctl restart yap-text")
    if not host.is_staged and not os.access("/usr/sbin/logrotate", os.X_OK):
        print("There is no /usr/sbin/logrotate: a YAP_TEXT_LOG_FILE would grow without end. The journal needs none.")
    print("Next:\n  systemctl enable --now yap-text\n  journalctl -u yap-text -f")
    return 0


def uninstall(prefix: Path | None = None) -> int:
    """Stops and removes what `install` put in place, and says what stays and how to remove it."""
    host = Host(prefix)
    host.check()
    installed = [name for name in _STARTED if (host.units / name).exists()]
    if installed:
        host.systemctl("stop", *installed)
        host.systemctl("disable", *installed)
    for unit in _units():
        _remove(host.units / unit.name)
    host.systemctl("daemon-reload")
    for name in ("yap-text.env", "yap-text.env.new", "logrotate.conf", "logrotate.conf.new"):
        config = host.configs / name
        if config.exists() and not _is_edited(config.read_text()):
            _remove(config)
    for name in ("hf-token", "keys"):
        secret = host.configs / name
        if secret.exists() and secret.read_text().strip() in ("", _NO_KEYS.strip()):
            _remove(secret)
    _remove(host.nix_root)
    if host.configs.is_dir() and not any(host.configs.iterdir()):
        host.configs.rmdir()
    kept = [host.configs, *(host.root / folder for folder in _KEPT_FOLDERS), *host.units.glob("yap-text*.d")]
    kept = [path for path in kept if path.exists() or path.is_symlink()]
    for path in kept:
        _tell("kept", path)
    if kept:
        print(f"These are yours: settings, keys, models and logs. They go with:\n  rm -r {' '.join(map(str, kept))}")
    return 0


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None


# What the units run


def _command(host: Host, chosen: Path | None) -> Path:
    """The command of the units. Raises where a unit could not run it."""
    command = Path(os.path.abspath(chosen or Path(sys.executable).with_name("yap-text")))
    if not re.fullmatch(r"[\w./+@-]+", str(command), re.ASCII):
        raise InstallError(f"{command} cannot stand in a unit: a path without spaces is needed (--command PATH)")
    places = [command, command.resolve()]
    if chosen is None:
        places += [Path(sys.prefix), Path(sys.base_prefix).resolve(), Path(__file__).resolve()]
    for place in places:
        for hidden in HIDDEN:
            if place.is_relative_to(hidden):
                raise InstallError(
                    f"{place} is below {hidden}, which units do not see (ProtectHome=yes): put the checkout and its "
                    "Python elsewhere, for example in /opt, and install from there; or name a command (--command PATH)"
                )
    if not host.is_staged:
        if not os.access(command, os.X_OK) or command.is_dir():
            raise InstallError(f"{command} is not a command: name one with --command PATH")
        for place in places:
            _check_open(place)
    return command


def _check_open(place: Path) -> None:
    """Raises where a user of its own, which the service runs as, could not come to `place`."""
    for path in (*reversed(place.parents), place):
        needed = stat.S_IXOTH if path.is_dir() else stat.S_IROTH
        if not path.stat().st_mode & needed:
            raise InstallError(
                f"{path} is closed to other users, and the service runs as one of its own: chmod o+rx {path}"
            )


def _folder() -> Path:
    """The rendered units and configs: in the package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "systemd"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "systemd"


def _units() -> Iterator[Path]:
    for file in sorted(_folder().iterdir()):
        if file.suffix in (".service", ".socket", ".timer"):
            yield file


# One file


def _put(path: Path, text: str, mode: int) -> bool:
    """Writes the file unless it is so already; tells, and returns whether it had to."""
    if not path.exists():
        word = "installed"
    elif path.read_text() != text:
        word = "updated"
    else:
        _tell("unchanged", path)
        return False
    _write(path, text, mode)
    _tell(word, path)
    return True


def _put_config(path: Path, template: str, mode: int) -> None:
    """Writes a config unless it was edited; then a template that is new since lies beside it."""
    text = _stamped(template)
    current = path.read_text() if path.exists() else None
    if current is None or not _is_edited(current):
        _put(path, text, mode)
    elif _mark_of(current) == _digest(template):
        _tell("kept", path, "edited")
    else:
        beside = path.with_name(f"{path.name}.new")
        _tell("kept", path, f"edited; today's template is {beside.name}")
        _put(beside, text, mode)


def _put_once(path: Path, text: str, what: str, mode: int = 0o600) -> None:
    """Writes a secret where there is none."""
    if path.exists():
        _tell("kept", path)
    else:
        _write(path, text, mode)
        _tell("installed", path, what)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _stamped(template: str) -> str:
    """With a last line that tells what the file began as."""
    return f"{template}{_MARK}{_digest(template)}\n"


def _mark_of(text: str) -> str | None:
    """The digest of the template that the file began as; lines may have come after it."""
    marks: list[str] = re.findall(f"^{re.escape(_MARK)}(.*)$", text, re.MULTILINE)
    return marks[-1] if marks else None


def _is_edited(text: str) -> bool:
    return text != _stamped(text.rpartition(_MARK)[0])


def _write(path: Path, text: str, mode: int) -> None:
    """All or nothing, and never readable by more than `mode` says."""
    part = path.with_name(f"{path.name}.part")
    with _changing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
        part.replace(path)


def _link(path: Path, target: Path) -> None:
    if path.is_symlink() and path.readlink() == target:
        _tell("unchanged", path)
        return
    with _changing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    _tell("installed", path, "so that Nix's garbage collector leaves the command")


def _remove(path: Path) -> None:
    if path.exists() or path.is_symlink():
        with _changing(path):
            path.unlink()
        _tell("removed", path)


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InstallError(f"{path} cannot be written: {error.strerror}") from None


def _tell(word: str, path: Path, why: str = "") -> None:
    print(f"{word:<10} {path}" + (f" ({why})" if why else ""))
