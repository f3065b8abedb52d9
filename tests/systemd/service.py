"""The service in a container, installed as an operator would: with the CPU build and the embedded model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from systemd.container import Container, make_root

REPOSITORY = Path(__file__).parents[2]
VERSIONS = {"bookworm": 252, "trixie": 257}
"""Of systemd, by the Debian that brings it."""
SUITE = os.environ.get("YAP_TEXT_DEBIAN", "bookworm")
"""Where everything is tested; on the others a part."""
LAUNCHER = """#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/yap-text/src:/opt/yap-text/site PYTHONDONTWRITEBYTECODE=1
exec /opt/python/bin/python3 -m yaptext "$@"
"""
CLIENT = """#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/yap-text/site PYTHONDONTWRITEBYTECODE=1
exec /opt/python/bin/python3 "$@" "${KEY-$(cat /etc/yap-text/api-key)}"
"""
"""Runs a script with the key as its last argument."""
SETTINGS = """YAP_TEXT_DEVICE=cpu
MAX_CONCURRENT_CONNECTIONS=24
YAP_TEXT_LOG_FILE=/var/log/yap-text/yap-text.log
YAP_TEXT_KEY_FILE=/etc/yap-text/keys
"""


@contextmanager
def boxed(files: Mapping[str, str], suite: str = SUITE) -> Iterator[tuple[Container, Path]]:
    """A container that has the command, `files` besides, and nothing installed. Its code is a copy, which is yielded
    too: what changes there changes inside."""
    files = {
        "/usr/local/bin/yap-text": LAUNCHER,
        "/opt/client": CLIENT,
        # The shipped minute is right for a person; a test need not wait for it.
        "/etc/systemd/system/yap-text.service.d/test.conf": "[Service]\nWatchdogSec=20\n",
        **files,
    }
    with tempfile.TemporaryDirectory(prefix="yap-text-code.") as folder:
        code = Path(folder)
        code.chmod(0o755)
        for part in ("yaptext", "systemd"):
            shutil.copytree(REPOSITORY / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
        binds = {
            "/opt/python": Path(sys.base_prefix),
            "/opt/yap-text/site": Path(sysconfig.get_path("purelib")),
            "/opt/yap-text/src": code,
        }
        root = REPOSITORY / ".venv" / ("systemd-root" if suite == "bookworm" else f"systemd-root-{suite}")
        with Container(make_root(root, suite), files, binds) as box:
            yield box, code


def install(box: Container, *options: str) -> list[str]:
    return box.run("yap-text", "install", "--command", "/usr/local/bin/yap-text", *options).splitlines()


def show(box: Container, *properties: str, unit: str = "yap-text.service") -> dict[str, str]:
    text = box.run("systemctl", "show", unit, *(f"--property={name}" for name in properties))
    return dict(line.split("=", 1) for line in text.splitlines())


def wait_active(box: Container, other_than: str = "0") -> None:
    """Until it serves, as another process than that."""
    script = (
        f"for i in $(seq 900); do test $(systemctl show -P MainPID yap-text) != {other_than} && "
        "systemctl -q is-active yap-text && exit 0; sleep 0.2; done; journalctl -u yap-text -n 40; exit 1"
    )
    box.run("sh", "-c", script, timeout=200)


def journal(box: Container) -> list[dict[str, Any]]:
    lines = box.run("journalctl", "-u", "yap-text.service", "-o", "json", "--no-pager").splitlines()
    return [json.loads(line) for line in lines]


def engine_pid(box: Container) -> str:
    (pid,) = [line.split()[0] for line in box.run("ps", "-eo", "pid,comm,args").splitlines() if "EngineCore" in line]
    return pid


def key(box: Container) -> str:
    return box.run("cat", "/etc/yap-text/api-key").strip()


def warmup(box: Container, key: str = "$(cat /etc/yap-text/api-key)") -> dict[str, Any]:
    command = f"YAP_TEXT_API_KEY={key} yap-text warmup 'What is the capital of France?'"
    return dict(json.loads(box.run("sh", "-c", command).splitlines()[-1]))


def set_up(box: Container, *lines: str) -> None:
    """Edits yap-text.env, as a person would."""
    box.run("sh", "-c", f"printf '%s\\n' {shlex.join(lines)} >> /etc/yap-text/yap-text.env")
