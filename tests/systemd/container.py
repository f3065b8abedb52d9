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


def make_root(folder: Path) -> Path:
    """A minimal Debian in `folder`, made once (half a minute)."""
    if not (folder / "etc/debian_version").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder)]
        subprocess.run(command, check=True)
    return folder


class Container:
    """`with Container(root, files, binds) as box: box.run("systemctl", "status")`.

    `files` are laid over the root, path inside to text; `binds` are host folders shown read-only, path inside to
    path outside.
    """

    def __init__(self, root: Path, files: Mapping[str, str], binds: Mapping[str, Path]) -> None:
        self._root, self._files, self._binds = root, files, binds
        self._work = Path(tempfile.mkdtemp(prefix="yap-text-box."))

    def __enter__(self) -> Container:
        work = self._work
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work], check=True)
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
        binds = [f"--bind-ro={outside}:{inside}" for inside, outside in self._binds.items()]
        boot = [
            "--quiet",
            "--boot",
            "--register=no",
            "--keep-unit",
            "--private-network",
            "--console=pipe",
            "--link-journal=no",
        ]
        self._console = (work / "console").open("wb")
        self._nspawn = subprocess.Popen(
            ["systemd-nspawn", *boot, "--kill-signal=SIGRTMIN+3", f"--directory={layers['root']}", *binds],
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
        )
        try:
            self._leader = self._wait(self._find_leader, "systemd inside the container")
            self._wait(self._booted, "the end of the boot")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if hasattr(self, "_leader"):
            self.run("systemctl", "poweroff", check=False)
        try:
            self._nspawn.wait(30)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        self._console.close()
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
        for _ in range(600):
            value = found()  # type: ignore[operator]
            if value:
                return int(value)
            if self._nspawn.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"no {what}: {(self._work / 'console').read_text(errors='replace')[-2000:]}")

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
