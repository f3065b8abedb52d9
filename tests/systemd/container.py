"""Debian with systemd as PID 1, in a container on top of a root folder that stays untouched. Needs root."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

PACKAGES = "systemd,systemd-sysv,dbus,logrotate,iproute2,libpam-systemd,procps,python3,libnuma1,libgomp1"
_DISK = "8g"
"""Of memory, and taken only as it is written."""


def make_root(folder: Path, suite: str) -> Path:
    """A minimal Debian in `folder`, made once (a minute)."""
    if not (folder / "etc/debian_version").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", suite, str(folder)]
        subprocess.run(command, check=True)
    return folder


class Container:
    """`with Container(root, files, binds) as box: box.run("systemctl", "status")`.

    `files` are laid over the root, path inside to text; `binds` are host folders shown read-only, path inside to
    path outside. It has a disk of its own, in memory, which outlives `power_off` and `boot`.
    """

    def __init__(self, root: Path, files: Mapping[str, str], binds: Mapping[str, Path]) -> None:
        self._root, self._files, self._binds = root, files, binds
        self._work = Path(tempfile.mkdtemp(prefix="yap-text-box."))
        self._leader: int | None = None

    def __enter__(self) -> Container:
        work = self._work
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", work], check=True)
        layers = {name: work / name for name in ("upper", "scratch", "root")}
        for folder in layers.values():
            folder.mkdir()
        for name, text in self._files.items():
            file = layers["upper"] / name.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755 if text.startswith("#!") else 0o644)
        options = f"lowerdir={self._root},upperdir={layers['upper']},workdir={layers['scratch']}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, layers["root"]], check=True)
        try:
            self.boot()
        except BaseException:
            self._unmount()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self.power_off()
        finally:
            self._unmount()

    def boot(self) -> None:
        """Returns when systemd is done with everything that is enabled."""
        binds = [f"--bind-ro={outside}:{inside}" for inside, outside in self._binds.items()]
        options = [
            "--quiet",
            "--boot",
            "--register=no",
            "--keep-unit",
            "--private-network",
            "--console=pipe",
            "--link-journal=no",
            "--kill-signal=SIGRTMIN+3",
        ]
        with tempfile.TemporaryFile() as console:  # not on the disk in there, which may be full
            self._nspawn = subprocess.Popen(
                ["systemd-nspawn", *options, f"--directory={self._work / 'root'}", *binds],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            try:
                self._leader = self._wait(self._find_leader, "systemd inside the container")
                self._wait(self._booted, "end of the boot")
            except BaseException as error:
                self.power_off()
                console.seek(0)
                error.add_note(console.read().decode(errors="replace")[-2000:])
                raise

    def power_off(self) -> None:
        """Returns when every process inside has ended."""
        if self._leader is not None:
            self.run("systemctl", "poweroff", check=False)
        try:
            self._nspawn.wait(90)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        self._leader = None

    def fill_disk(self) -> None:
        """Leaves no byte of the disk free, until `empty_disk`."""
        disk = shutil.disk_usage(self._work)
        self._resize(str(disk.used))

    def empty_disk(self) -> None:
        self._resize(_DISK)

    def _resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self._work], check=True)

    def _unmount(self) -> None:
        for mount in (self._work / "root", self._work):
            subprocess.run(["umount", "--lazy", mount], check=False)
        self._work.rmdir()

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> str:
        """Runs a command inside and returns what it prints; with `check` a failure raises with all of it."""
        entering = f"nsenter --target {self._leader} --mount --uts --ipc --net --pid --cgroup --".split()
        clean = ["env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"]
        ended = subprocess.run(
            [*entering, *clean, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and ended.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout}")
        return ended.stdout

    def _wait(self, found: object, what: str) -> int:
        for _ in range(3000):
            value = found()  # type: ignore[operator]
            if value:
                return int(value)
            if self._nspawn.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"no {what}")

    def _find_leader(self) -> int | None:
        for child in _children(self._nspawn.pid):
            for process in (child, *_children(child)):
                if Path(f"/proc/{process}/comm").read_text().strip() == "systemd":
                    return process
        return None

    def _booted(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
