"""`yap-text install`: the units and their files on a host that has systemd and is not NixOS.

A unit is replaced whenever it differs: changes to one belong in `systemctl edit`. A config is replaced only while it is
as it was installed, which its last line tells; keys and tokens are written once.

`make install` builds each version into a folder of its own and runs this command from there. Then the units run
/usr/local/bin/yap-text, which leads to the version that the link `current` names.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from yaptext.errors import YapError
from yaptext.settings import HIDDEN

_RENDERED_COMMAND = "/usr/local/bin/yap-text"
_STARTED = (
    "yap-text.socket",
    "yap-text.service",
    "yap-text-quantize.service",
    "yap-text-mps.service",
    "yap-text-logrotate.timer",
)
_BUILT = "built.txt"
"""In the folder of a version that is complete; `make install` writes it last. Until then it ends in `.part`."""
_MARK = "# As installed, until this file is edited: "
_NO_KEYS = "# NAME sha256:HASH [LIMIT=N ...], as `yap-text key new NAME --file` adds them\n"
_KEPT_FOLDERS = (
    "var/lib/yap-text",
    "var/lib/private/yap-text",
    "var/cache/yap-text",
    "var/cache/private/yap-text",
    "var/log/yap-text",
    "var/log/private/yap-text",
    "var/log/yap-text-mps",
    "var/log/private/yap-text-mps",
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
        self.link = self.root / _RENDERED_COMMAND.lstrip("/")
        """To the command of the current version."""
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


class Versions:
    """The folder that `make install` calls PREFIX: an environment a version, and the links `current` and `previous`."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.command = folder / "current/bin/yap-text"
        self.folder = host.root / folder.relative_to("/")
        self.current, self.previous = self.folder / "current", self.folder / "previous"

    @classmethod
    def around(cls, host: Host, environment: Path) -> Versions | None:
        """With the environment as a version; None if it is not one."""
        return cls(host, environment.parent) if (environment / _BUILT).is_file() else None

    @classmethod
    def installed(cls, host: Host) -> Versions | None:
        """Those that the command leads to."""
        target = host.link.readlink() if host.link.is_symlink() else Path()
        return cls(host, target.parents[2]) if target.parts[-3:] == ("current", "bin", "yap-text") else None

    def switch(self, name: str) -> bool:
        """Makes this the current version, and the one that was current the previous. Returns whether it changed."""
        before = self.current.readlink() if self.current.is_symlink() else None
        if before is not None and before.name != name:
            _link(self.previous, before)
        return _link(self.current, Path(name))

    def prune(self) -> None:
        """Removes complete versions, but not the current, the previous, or one that a process runs."""
        linked = {link.readlink().name for link in (self.current, self.previous) if link.is_symlink()}
        for folder in self.made():
            if folder.name in linked or not (folder / _BUILT).exists():
                continue
            if _runs(folder):
                _tell("kept", folder, "a process runs it")
                continue
            try:
                self.remove(folder)
            except InstallError as error:  # the switch is made; the next one tries again
                _tell("kept", folder, str(error))

    def made(self) -> list[Path]:
        """The folders of versions, complete or not."""
        folders = {stamp.parent for name in (_BUILT, f"{_BUILT}.part") for stamp in self.folder.glob(f"*/{name}")}
        return sorted(folder for folder in folders if not folder.is_symlink())

    def remove(self, folder: Path) -> None:
        with _changing(folder):
            if (folder / _BUILT).exists():  # first: a removal that is interrupted leaves no complete version
                (folder / _BUILT).rename(folder / f"{_BUILT}.part")
            shutil.rmtree(folder)
        _tell("removed", folder)


def install(prefix: Path | None = None, command: Path | None = None) -> int:
    """Puts everything in place that is not, and prints a line a file. `command` is what the units run."""
    host = Host(prefix)
    host.check()
    versions = Versions.around(host, Path(sys.prefix)) if command is None else None
    command = _command(host, command)
    if versions is not None:
        command = Path(_RENDERED_COMMAND)
        if host.link.exists() and not host.link.is_symlink():
            raise InstallError(f"{host.link} is in the way: move it away, or name what the units run (--command PATH)")
    for template in (_folder() / "yap-text.env", _folder() / "logrotate.conf"):
        _put_config(host.configs / template.name, template.read_text(), 0o600 if template.suffix == ".env" else 0o644)
    _put_once(host.configs / "api-key", secrets.token_urlsafe(32) + "\n", "a new key")
    _put_once(host.configs / "hf-token", "", "empty")
    _put_once(host.configs / "keys", _NO_KEYS, "none yet", 0o644)  # hashes, which the service's user reads
    texts = {unit.name: unit.read_text().replace(f"{_RENDERED_COMMAND} ", f"{command} ") for unit in _units()}
    changed = _put_all({host.units / name: text for name, text in texts.items()}, 0o644)
    if command.is_relative_to("/nix/store"):
        _link(host.nix_root, Path(*command.parts[:4]), "so that Nix's garbage collector leaves the command")
    if versions is not None:
        changed |= versions.switch(Path(sys.prefix).name)
        changed |= _link(host.link, versions.command)
    if changed:
        host.systemctl("daemon-reload")
        if host.systemctl("is-active", "yap-text.service") == "active":
            print("The service runs as it did before; what is new is for the next start: systemctl restart yap-text")
    if versions is not None:
        versions.prune()
        told = f"Current version: {versions.current.readlink()}."
        if versions.previous.is_symlink():
            told += f" The version before: {versions.previous.readlink()} (yap-text install --rollback)."
        print(told)
    if not host.is_staged and not os.access("/usr/sbin/logrotate", os.X_OK):
        print("There is no /usr/sbin/logrotate: a YAP_TEXT_LOG_FILE would grow without end. The journal needs none.")
    print("Next:\n  systemctl enable --now yap-text\n  journalctl -u yap-text -f")
    return 0


def rollback(prefix: Path | None = None) -> int:
    """Runs `yap-text install` of the previous version, which puts its own units in place and makes itself the current
    one."""
    host = Host(prefix)
    host.check()
    versions = Versions.installed(host)
    if versions is None or not (versions.previous / _BUILT).is_file():
        raise InstallError("there is no version to go back to: the second `make install` keeps the first")
    sys.stdout.flush()
    command = versions.previous.resolve() / "bin/yap-text"
    options = ["--prefix", str(prefix)] if prefix else []
    return subprocess.run([command, "install", *options], check=False).returncode


def uninstall(prefix: Path | None = None) -> int:
    """Stops and removes what `install` put in place, and says what stays and how to remove it."""
    host = Host(prefix)
    host.check()
    versions = Versions.installed(host)
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
    if versions is not None:
        for link in (host.link, versions.current, versions.previous):
            _remove(link)
        for folder in versions.made():
            versions.remove(folder)
        if not any(versions.folder.iterdir()):
            versions.folder.rmdir()
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


def _runs(environment: Path) -> bool:
    """Whether a process of this machine runs the environment's Python."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if process.read_bytes().startswith(os.fsencode(f"{environment}/")):
                return True
    return False


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


def _put_all(texts: Mapping[Path, str], mode: int) -> bool:
    """Writes the files that differ, all or none; tells, and returns whether there were any. A disk fills up while the
    parts are written: a rename takes no room."""
    words = {path: _word(path, text) for path, text in texts.items()}
    new = [path for path, word in words.items() if word != "unchanged"]
    try:
        for path in new:
            _write_part(path, texts[path], mode)
    except InstallError:
        for path in new:
            with suppress(OSError):
                _part(path).unlink()
        raise
    for path, word in words.items():
        if path in new:
            _finish(path)
        _tell(word, path)
    return bool(new)


def _word(path: Path, text: str) -> str:
    """What writing the text is to be called."""
    if not path.exists():
        return "installed"
    return "unchanged" if path.read_text() == text else "updated"


def _put_config(path: Path, template: str, mode: int) -> None:
    """Writes a config unless it was edited; then a template that is new since lies beside it."""
    text = _stamped(template)
    current = path.read_text() if path.exists() else None
    if current is None or not _is_edited(current):
        _put_all({path: text}, mode)
    elif _mark_of(current) == _digest(template):
        _tell("kept", path, "edited")
    else:
        beside = path.with_name(f"{path.name}.new")
        _tell("kept", path, f"edited; today's template is {beside.name}")
        _put_all({beside: text}, mode)


def _put_once(path: Path, text: str, what: str, mode: int = 0o600) -> None:
    """Writes a secret where there is none."""
    if path.exists():
        _tell("kept", path)
    else:
        _write_part(path, text, mode)
        _finish(path)
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


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _write_part(path: Path, text: str, mode: int) -> None:
    """Beside the file, and never readable by more than `mode` says. `_finish` puts it in place."""
    with _changing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(_part(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)


def _finish(path: Path) -> None:
    with _changing(path):
        _part(path).replace(path)


def _link(path: Path, target: Path, why: str = "") -> bool:
    """Makes the link, or leads it elsewhere in one step; tells, and returns whether it had to."""
    before = path.readlink() if path.is_symlink() else None
    if before == target:
        _tell("unchanged", path)
        return False
    with _changing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _part(path).unlink(missing_ok=True)
        _part(path).symlink_to(target)
    _finish(path)
    _tell("updated" if before else "installed", path, why or f"to {target}")
    return True


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
