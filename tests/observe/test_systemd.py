"""observe/systemd.py: what systemd is sent."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from yaptext.observe import systemd


def test_a_path_of_any_bytes_can_be_told(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The name of a file need not be UTF-8, and a reason may quote it."""
    request.addfinalizer(lambda: systemd.connect(None))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        systemd.connect(str(tmp_path / "notify"))
        systemd.notify("READY=1", "STATUS=/\udcff is not a folder")
        supervisor.settimeout(10)
        assert supervisor.recv(4096) == b"READY=1\nSTATUS=/\\udcff is not a folder"
