"""The units on real systemd, with the CPU build and the embedded model."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from yaptext.engine import demo

sys.path.insert(0, str(Path(__file__).parent))
from container import Container, make_root

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
KEY = "key-of-the-box"
LAUNCHER = """#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/yap-text/src:/opt/yap-text/site PYTHONDONTWRITEBYTECODE=1
exec /opt/python/bin/python3 -m yaptext "$@"
"""
SETTINGS = """YAP_TEXT_STATE_DIR=/opt/state
YAP_TEXT_DEVICE=cpu
MAX_CONCURRENT_CONNECTIONS=24
YAP_TEXT_LOG_FILE=/var/log/yap-text/yap-text.log
"""
RESTART_CLIENT = """
import asyncio, json, subprocess, sys, websockets
async def main():
    def connect():
        return websockets.connect("ws://127.0.0.1:8000/ws", additional_headers={"X-API-Key": sys.argv[1]},
                                  proxy=None, open_timeout=120)
    sockets = [await connect() for _ in range(20)]
    restart = await asyncio.create_subprocess_exec("systemctl", "restart", "yap-text.service")
    async def live_through(socket):
        frames = []
        try:
            async for frame in socket:
                frames.append(json.loads(frame)["error_code"])
        except websockets.ConnectionClosed:
            pass
        async with connect() as again:
            await again.send('{"type": "ping"}')
            pong = json.loads(await again.recv())["type"]
        return [frames, socket.close_code, pong]
    print(json.dumps(await asyncio.gather(*map(live_through, sockets))))
    await restart.wait()
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def box(state_folder: Path) -> Iterator[Container]:
    for file in demo.folder(state_folder).iterdir():
        file.chmod(0o644)  # the service runs as a user of its own
    root = make_root(REPOSITORY / ".venv" / "systemd-root")
    files = {
        f"/etc/systemd/system/{unit.name}": unit.read_text()
        for unit in (REPOSITORY / "systemd").glob("yap-text*")
        if unit.suffix != ".env"
    }
    files |= {
        "/usr/local/bin/yap-text": LAUNCHER,
        "/etc/yap-text/yap-text.env": SETTINGS,
        "/etc/yap-text/api-key": KEY,
        "/etc/yap-text/hf-token": "",
        "/etc/yap-text/logrotate.conf": (REPOSITORY / "systemd/logrotate.conf").read_text(),
        "/opt/restart_client.py": RESTART_CLIENT,
        # The shipped minute is right for a person; a test need not wait for it.
        "/etc/systemd/system/yap-text.service.d/test.conf": "[Service]\nWatchdogSec=8\n",
    }
    binds = {
        "/opt/python": Path(sys.base_prefix),
        "/opt/yap-text/site": Path(sysconfig.get_path("purelib")),
        "/opt/yap-text/src/yaptext": REPOSITORY / "yaptext",
        "/opt/state": state_folder,
    }
    with Container(root, files, binds) as box:
        yield box


def show(box: Container, *properties: str) -> dict[str, str]:
    text = box.run("systemctl", "show", "yap-text.service", *(f"--property={name}" for name in properties))
    return dict(line.split("=", 1) for line in text.splitlines())


def wait_active(box: Container, restarts: int = 0) -> None:
    script = (
        f"for i in $(seq 900); do test $(systemctl show -P NRestarts yap-text) -ge {restarts} && "
        "systemctl -q is-active yap-text && exit 0; sleep 0.2; done; journalctl -u yap-text -n 40; exit 1"
    )
    box.run("sh", "-c", script, timeout=200)


def journal(box: Container) -> list[dict[str, Any]]:
    lines = box.run("journalctl", "-u", "yap-text.service", "-o", "json", "--no-pager").splitlines()
    return [json.loads(line) for line in lines]


def engine_pid(box: Container) -> str:
    (pid,) = [line.split()[0] for line in box.run("ps", "-eo", "pid,comm,args").splitlines() if "EngineCore" in line]
    return pid


def warmup(box: Container) -> dict[str, Any]:
    command = f"YAP_TEXT_API_KEY={KEY} yap-text warmup 'What is the capital of France?'"
    return dict(json.loads(box.run("sh", "-c", command).splitlines()[-1]))


def test_start_is_ready_when_it_serves(box: Container) -> None:
    """`systemctl start` returns after the warm-up turn; the next turn is answered."""
    box.run("systemctl", "start", "yap-text.service", timeout=200)
    assert "Serving on" in show(box, "StatusText")["StatusText"]
    assert "Paris" in warmup(box)["text"]


def test_the_journal_holds_json_with_priorities(box: Container) -> None:
    """Every line of the service parses, and is filed under its own priority; no key is in any."""
    entries = [entry for entry in journal(box) if entry.get("_COMM", "").startswith("python")]
    events = [(json.loads(entry["MESSAGE"]), int(entry["PRIORITY"])) for entry in entries]
    assert {event["event"] for event, _ in events} >= {"server.ready", "turn.finished", "weights.chosen"}
    for event, priority in events:
        assert priority == {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}[event["level"]], event
    assert not any(KEY in json.dumps(entry) for entry in journal(box))


def test_the_key_is_in_no_environment_and_no_argument(box: Container) -> None:
    """It comes as a credential, which only the service can read."""
    script = f"grep -l {shlex.quote(KEY)} /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | grep -v self; true"
    assert box.run("sh", "-c", script + " | wc -l").strip().splitlines()[-1] in ("", "0")


def test_a_restart_refuses_nobody(box: Container) -> None:
    """Each open socket hears going_away and 1012, and its reconnect waits in the held port instead of failing."""
    python = "LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/yap-text/site /opt/python/bin/python3"
    client = f"{python} /opt/restart_client.py {KEY}"
    told = json.loads(box.run("sh", "-c", client, timeout=250).splitlines()[-1])
    assert told == [[["going_away"], 1012, "pong"]] * 20
    wait_active(box)


def test_a_killed_engine_ends_the_service_which_comes_back(box: Container) -> None:
    """The exit status is recorded as a failure, and systemd starts it again."""
    box.run("kill", "-KILL", engine_pid(box))
    wait_active(box, restarts=1)
    assert any("engine.died" in str(entry["MESSAGE"]) for entry in journal(box))
    assert "Paris" in warmup(box)["text"]


def test_a_hung_engine_trips_the_watchdog(box: Container) -> None:
    """Nothing is raised by a stopped process: the unfed watchdog restarts the service."""
    box.run("kill", "-STOP", engine_pid(box))
    wait_active(box, restarts=2)
    assert any("Watchdog timeout" in str(entry["MESSAGE"]) for entry in journal(box))
    assert "Paris" in warmup(box)["text"]


def test_the_log_file_is_rotated_under_the_service(box: Container) -> None:
    """Forced once: the old lines are kept, and new ones go to a new file."""
    before = box.run("sh", "-c", "cat /var/log/yap-text/yap-text.log").splitlines()
    box.run("sh", "-c", "sed -i 's/size 100M/size 1/' /etc/yap-text/logrotate.conf")
    box.run("systemctl", "start", "yap-text-logrotate.service")
    warmup(box)
    after = box.run("sh", "-c", "cat /var/log/yap-text/yap-text.log").splitlines()
    kept = box.run("sh", "-c", "zcat -f /var/log/yap-text/yap-text.log.1*").splitlines()
    assert kept == before and after and not set(after) & set(before)
    assert json.loads(after[-1])["event"] == "connection.closed"


def test_stop_is_clean_and_clean_removes_the_state(box: Container) -> None:
    """After a stop no process is left; `systemctl clean` takes the place of the deep clean."""
    box.run("systemctl", "stop", "yap-text.socket", "yap-text.service")
    assert show(box, "Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}
    assert "EngineCore" not in box.run("ps", "-eo", "args")
    box.run("systemctl", "clean", "--what=cache", "--what=state", "yap-text.service")
    assert box.run("sh", "-c", "ls -d /var/cache/yap-text /var/lib/yap-text 2>/dev/null; true") == ""


def test_a_missing_credential_is_a_clear_failure(box: Container) -> None:
    """Status 243, and the journal names the credential."""
    box.run("rm", "/etc/yap-text/api-key")
    box.run("systemctl", "start", "yap-text.service", check=False)
    assert show(box, "ExecMainStatus")["ExecMainStatus"] == "243"


def test_the_units_in_the_repository_are_the_rendered_ones() -> None:
    """nix/units.nix is where they are defined; `make units` renders them."""
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-E", f"import {REPOSITORY}/nix/render.nix {{}}"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    folder = REPOSITORY / "systemd"
    by_hand = {"logrotate.conf", "yap-text.env"}
    assert json.loads(rendered) == {
        file.name: file.read_text() for file in folder.iterdir() if file.name not in by_hand
    }


@pytest.mark.parametrize("unit", ["yap-text.service", "yap-text-quantize.service", "yap-text-logrotate.service"])
def test_the_units_are_hardened(unit: str) -> None:
    """`systemd-analyze security` rates them 2.0 or better."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(REPOSITORY / "systemd" / unit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-200:]
