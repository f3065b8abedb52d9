"""The NixOS module's units on real systemd: what `nixos-rebuild switch` does with them, in its order."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from privileged import NET_ADMIN, SYS_ADMIN, require
from systemd.container import Container, make_root

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = [pytest.mark.systemd, pytest.mark.timeout(600)]

UNITS = "/etc/systemd/system"
START_S = 4
"""How long the service takes until READY."""
PROGRAM = f"""#!/usr/bin/python3
import os, signal, socket, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if sys.argv[1] == "quantize":
    time.sleep(600 if os.environ["CHAT_MODEL"] == "large" else 0)
    sys.exit()
if os.environ["CHAT_MODEL"] == "wrong":
    sys.exit(2)
time.sleep({START_S})
listener = socket.socket(fileno=3)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
    supervisor.connect(os.environ["NOTIFY_SOCKET"])
    supervisor.send(b"READY=1\\nWATCHDOG_USEC=3600000000")
while True:
    client = listener.accept()[0]
    client.sendall(os.environ["CHAT_MODEL"].encode())
    client.close()
"""
ASK = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60) as client:
    print(client.recv(100).decode())
"""


def machines(**settings: str) -> dict[str, Any]:
    """By name: `services.yap-text`, in Nix, on top of what all have in common."""
    common = 'enable = true; settings = { CHAT_MODEL = lib.mkDefault "first"; TOOL_MODEL = "t"; };'
    common += " package = packages.serve-cpu;"
    made = " ".join(
        f"{name} = with-module [ {{ services.yap-text = {{ {common} }}; }} {{ {more} }} ];"
        for name, more in settings.items()
    )
    expression = f"let lib = import ./lib.nix; in with import ./machine.nix {{ }}; {{ {made} }}"
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-E", expression]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    evaluated: dict[str, Any] = json.loads(done.stdout)
    for machine in evaluated.values():
        assert machine["failing"] == []
    return evaluated


@dataclass
class Machine:
    """A container that runs one of them."""

    box: Container
    runs: dict[str, Any] = field(default_factory=dict)

    def lay(self, machine: dict[str, Any]) -> None:
        files = dict(machine["files"]) | {"/opt/switch": "#!/bin/sh\nset -e\n" + machine["script"]}
        for name, text in machine["units"].items():
            files[f"{UNITS}/{name}"] = text.replace("/run/current-system/sw/bin", "/usr/bin")
        # NixOS makes it of `script`.
        files[f"{UNITS}/yap-text-switch.service.d/start.conf"] = "[Service]\nExecStart=/opt/switch\n"
        for path, text in files.items():
            self.box.run("sh", "-c", 'mkdir -p "$(dirname "$0")"; printf "%s" "$1" > "$0"; chmod 755 "$0"', path, text)
        for name, targets in machine["wanted"].items():
            for target in targets:
                self.box.run("mkdir", "-p", f"{UNITS}/{target}.wants")
                self.box.run("ln", "-sfn", f"../{name}", f"{UNITS}/{target}.wants/{name}")
        self.runs = machine

    def switch(self, machine: dict[str, Any]) -> float:
        """Seconds that `nixos-rebuild switch` would take: switch-to-configuration-ng of 2026. None of our services is
        stopped before, since each says X-StopIfChanged=false or X-RestartIfChanged=false."""
        changed = [
            name
            for name, text in machine["units"].items()
            if text != self.runs["units"].get(name) and self.state(name) in ("active", "activating")
        ]
        restarted = []
        for name in changed:
            if name.endswith(".socket") or "X-RestartIfChanged=false" in machine["units"][name]:
                continue
            assert "X-StopIfChanged=false" in machine["units"][name]
            restarted.append(name)
        self.lay(machine)
        began = time.monotonic()
        self.box.run("systemctl", "reset-failed")
        self.box.run("systemctl", "daemon-reload")
        if restarted:
            self.box.run("systemctl", "restart", *sorted(restarted), check=False)
        self.box.run(
            "systemctl", "start", "basic.target", "multi-user.target", "sockets.target", "timers.target", check=False
        )
        return time.monotonic() - began

    def state(self, unit: str = "yap-text.service") -> str:
        return self.box.run("systemctl", "show", "-P", "ActiveState", unit).strip()

    def ask(self, port: int = 8000) -> str:
        return self.box.run("python3", "-c", ASK, str(port)).strip()

    def refuses(self, port: int) -> bool:
        return "ConnectionRefusedError" in self.box.run("python3", "-c", ASK, str(port), check=False)

    @contextmanager
    def asked_all_the_while(self) -> Iterator[list[str]]:
        """Answers on port 8000, one after the other, until the body is through and a last one has come."""
        answers: list[str] = []
        through = threading.Event()

        def go_on() -> None:
            while not through.is_set():
                answers.append(self.ask())

        thread = threading.Thread(target=go_on)
        thread.start()
        yield answers
        through.set()
        thread.join()


@pytest.fixture
def nixos() -> Iterator[Machine]:
    """On systemd 257; NixOS has had no older one since 25.05."""
    require(NET_ADMIN, SYS_ADMIN)
    if not shutil.which("nix-instantiate"):
        pytest.skip("needs nix-instantiate")
    root = make_root(ROOT / ".venv" / "systemd-root-trixie", "trixie")
    with Container(root, {"/opt/serve-cpu/bin/yap-text": PROGRAM}, {}) as box:
        box.run("ip", "link", "set", "lo", "up")
        yield Machine(box)


def test_switches(nixos: Machine) -> None:
    """In a row, as a machine would see them. Only a change of the socket closes the port; only `waitForReady` waits."""
    setting = "services.yap-text.settings.CHAT_MODEL"
    waits = "services.yap-text.waitForReady = true;"
    made = machines(
        first="",
        second=f'{setting} = "second";',
        limited=f'{setting} = "second"; systemd.services.yap-text.serviceConfig.TimeoutStopSec = 30;',
        moved=f'{setting} = "second"; services.yap-text.port = 9000;',
        back="",
        wrong=f'{setting} = "wrong";',
        mended=f'{setting} = "mended";',
        large=f'{setting} = "large"; services.yap-text.quantize.enable = true;',
        small=f'{setting} = "small"; services.yap-text.quantize.enable = true;',
        waiting=f'{setting} = "waiting"; {waits}',
        waiting_louder=f'{setting} = "louder"; {waits}',
        waiting_moved=f'{setting} = "louder"; {waits} services.yap-text.port = 9000;',
    )
    nixos.lay(made["first"])
    nixos.box.run("systemctl", "daemon-reload")

    began = time.monotonic()
    nixos.box.run("systemctl", "start", "sockets.target", "multi-user.target")
    assert time.monotonic() - began < START_S and nixos.state() == "activating"
    assert nixos.ask() == "first"

    with nixos.asked_all_the_while() as answers:
        assert nixos.switch(made["second"]) < START_S
    assert nixos.ask() == "second" and set(answers) <= {"first", "second"}

    with nixos.asked_all_the_while() as answers:
        assert nixos.switch(made["limited"]) < START_S
    assert set(answers) == {"second"}
    assert nixos.box.run("systemctl", "show", "-P", "TimeoutStopUSec", "yap-text").strip() == "30s"

    assert nixos.switch(made["moved"]) < START_S
    assert nixos.refuses(8000) and nixos.state() == "activating"
    assert nixos.switch(made["back"]) < START_S  # while it starts
    assert nixos.refuses(9000) and nixos.ask(8000) == "first"

    nixos.switch(made["wrong"])
    nixos.box.run(
        "sh", "-c", "for i in $(seq 100); do systemctl -q is-failed yap-text && exit; sleep 0.1; done; exit 1"
    )
    assert nixos.refuses(8000)
    assert nixos.switch(made["mended"]) < START_S
    assert nixos.ask() == "mended"

    assert nixos.switch(made["large"]) < START_S
    assert nixos.state("yap-text-quantize.service") == "activating" and nixos.state() != "active"
    assert nixos.switch(made["small"]) < START_S  # while it is quantized
    assert nixos.ask() == "small"

    nixos.switch(made["waiting"])
    assert nixos.ask() == "waiting"
    with nixos.asked_all_the_while() as answers:
        assert nixos.switch(made["waiting_louder"]) > START_S
    assert nixos.state() == "active" and nixos.ask() == "louder" and set(answers) <= {"waiting", "louder"}
    assert nixos.switch(made["waiting_moved"]) > START_S
    assert nixos.refuses(8000) and nixos.ask(9000) == "louder"
