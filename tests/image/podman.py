"""Podman with a store of its own, as root, on the network of this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY_WITHIN_S = 300


class Podman:
    """`with Podman.in_folder(folder) as podman: podman("load", "-i", archive)`."""

    def __init__(self, folder: Path, keeper: int) -> None:
        self._enter = ["nsenter", f"--target={keeper}", "--mount", f"--wd={folder}", "podman"]
        self._options = ["--root", folder / "store", "--runroot", folder / "run", "--cgroup-manager=cgroupfs"]

    @classmethod
    @contextmanager
    def in_folder(cls, folder: Path) -> Iterator[Podman]:
        """In mounts of its own: crun refuses machines that show it both versions of cgroups."""
        hide = (
            "if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi; echo; exec sleep infinity"
        )
        with subprocess.Popen(["unshare", "--mount", "sh", "-c", hide], stdout=subprocess.PIPE) as keeper:
            assert keeper.stdout is not None
            keeper.stdout.readline()
            podman = cls(folder, keeper.pid)
            try:
                yield podman
            finally:
                podman("rm", "--all", "--force", "--volumes", "--time=1", check=False)
                podman("rmi", "--all", "--force", check=False)
                keeper.kill()
                shutil.rmtree(folder, ignore_errors=True)

    def __call__(self, *arguments: str | Path, check: bool = True) -> str:
        done = self.run(*arguments)
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [*self._enter, *self._options, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def container(self, *arguments: str | Path, image: str, command: tuple[str, ...] = ()) -> Container:
        """Started in the background, with what a daemon of Docker gives by itself."""
        usual = ["--network=host", "--cgroups=disabled", "--ulimit=nofile=1024:4096", "--ulimit=nproc=4096:4096"]
        return Container(self, self("run", "--detach", *usual, *arguments, image, *command).strip())


class Container:
    def __init__(self, podman: Podman, identifier: str) -> None:
        self._podman, self._id = podman, identifier
        self._begun = time.monotonic()

    def ready(self, port: int) -> float:
        """Seconds from the start to the first 200 of /readyz."""
        while time.monotonic() < self._begun + READY_WITHIN_S:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                    return time.monotonic() - self._begun
            except (OSError, urllib.error.URLError):
                assert self.state["Running"], self.logs()[-4000:]
                time.sleep(0.1)
        raise AssertionError(f"not ready within {READY_WITHIN_S} s:\n{self.logs()[-4000:]}")

    def sh(self, script: str) -> str:
        return self._podman("exec", self._id, "sh", "-c", script)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self._podman("inspect", "--format={{json .State}}", self._id))
        return state

    def logs(self) -> str:
        done = self._podman.run("logs", self._id)
        return done.stdout + done.stderr

    def ended(self) -> int:
        """Waits for the end; the exit status."""
        return int(self._podman("wait", self._id))

    def stop(self, within_s: int) -> tuple[int, float]:
        """What `docker stop` does; the exit status, and the seconds that it took."""
        begun = time.monotonic()
        self._podman("stop", f"--time={within_s}", self._id)
        return int(self.state["ExitCode"]), time.monotonic() - begun

    def remove(self) -> None:
        self._podman("rm", "--force", "--volumes", "--time=1", self._id)
