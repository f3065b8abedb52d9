"""The units on both versions of systemd, with a command that serves or fails as a test wants: starts that fail, what an
administrator changes, and what stands beside the service."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import time
from collections.abc import Iterator

import pytest
from systemd.container import Container
from systemd.service import SUITE, VERSIONS, boxed, install, set_up, show, wait_active, warmup

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

SERVE = """#!/usr/bin/python3
# Ends with the status of /run/does, serves, or is the real one.
import os, signal, socket, sys
print("started", flush=True)
does = open("/run/does").read().strip()
if does == "real":
    os.execv("/usr/local/bin/yap-text", ["yap-text", "serve"])
if pipes := os.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
    with open(f"{pipes}/control", "w") as control:
        control.write(f"client {os.getuid()}\\n")
if does != "serve":
    sys.exit(int(does))
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
    supervisor.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.sigwait({signal.SIGTERM})
"""
STAND_IN = """[Service]
ExecStart=
ExecStart=/opt/serve
WatchdogSec=0
"""
CLIENT = """
import socket, sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    try:
        socket.create_connection(("127.0.0.1", 8000), 0.1).close()
    except OSError:
        pass
    time.sleep(0.05)
"""
"""One that reconnects whatever happens."""
MPS = """#!/usr/bin/python3
# In the place of NVIDIA's: with -d it returns when its daemon listens, without arguments it hands on what it reads.
import os, sys
pipes, log = os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ["CUDA_MPS_LOG_DIRECTORY"] + "/control.log"
if sys.argv[1:] == []:
    with open(f"{pipes}/control", "w") as control:
        control.write(sys.stdin.read())
    sys.exit()
assert sys.argv[1:] == ["-d"]
os.mkfifo(f"{pipes}/control")
if os.fork():
    os._exit(0)
os.setsid()
while True:
    with open(f"{pipes}/control") as control, open(log, "a") as told:
        for line in control:
            print(os.getuid(), line.strip(), file=told, flush=True)
            if line == "quit\\n":
                sys.exit()
"""
MODPROBE = """#!/bin/sh
echo "as $(id -u): $*"
exit 1
"""


@pytest.fixture(scope="module", params=VERSIONS)
def suite(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def box(suite: str) -> Iterator[Container]:
    folder = "/etc/systemd/system"
    files = {
        "/opt/serve": SERVE,
        "/opt/reconnect.py": CLIENT,
        f"{folder}/yap-text.service.d/test.conf": STAND_IN,
        f"{folder}/yap-text-quantize.service.d/test.conf": "[Service]\nExecStart=\nExecStart=true\n",
    }
    with boxed(files, suite) as (box, _):
        install(box)
        set_up(box, "YAP_TEXT_DEVICE=cpu")
        yield box


@pytest.fixture(autouse=True)
def at_rest(box: Container) -> Iterator[None]:
    yield
    _sh(box, "systemctl stop yap-text.socket yap-text; systemctl reset-failed")
    _sh(box, "journalctl -q --rotate; journalctl -q --vacuum-time=1ms")


def _sh(box: Container, command: str) -> str:
    return box.run("sh", "-c", command, check=False)


def _does(box: Container, what: str) -> None:
    _sh(box, f"echo {what} > /run/does")


def _starts(box: Container) -> list[float]:
    """When the command began, in seconds of one clock."""
    lines = _sh(box, "journalctl -u yap-text -o json --no-pager").splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [int(entry["__MONOTONIC_TIMESTAMP"]) / 1e6 for entry in entries if entry["MESSAGE"] == "started"]


def _until_started(box: Container, times: int, within_s: float = 40) -> list[float]:
    end = time.monotonic() + within_s
    while len(starts := _starts(box)) < times:
        assert time.monotonic() < end, (
            f"{len(starts)} starts of {times} in {within_s} s:\n{_sh(box, 'journalctl -n 60')}"
        )
        time.sleep(0.2)
    return starts


def test_it_is_the_version_that_is_meant(box: Container, suite: str) -> None:
    assert box.run("systemctl", "--version").split()[1] == str(VERSIONS[suite])


def test_starts_that_fail_wait_longer_each_time(box: Container, suite: str) -> None:
    """5 and 8 s, though a client asks for it all the time. One line says so, and a restart by hand ends the wait."""
    _does(box, "75")
    _sh(box, "systemctl start yap-text.socket; python3 /opt/reconnect.py 40 > /dev/null 2>&1 &")
    starts = _until_started(box, 3)
    waits = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert waits[0] >= 5 and waits[1] >= 7.5 and max(waits) < 20, waits
    if VERSIONS[suite] < 254:
        line = "3 starts in a row have failed. The next try is in 6 s"
        box.run("sh", "-c", f"until journalctl -u yap-text | grep -q '{line}'; do sleep 0.1; done", timeout=20)
    else:
        box.run(
            "sh", "-c", "until systemctl show yap-text | grep -q SubState=auto-restart; do sleep 0.1; done", timeout=20
        )
        assert "in a row" not in _sh(box, "journalctl -u yap-text -o cat")
    _does(box, "serve")
    begun = time.monotonic()
    box.run("systemctl", "restart", "yap-text")
    assert time.monotonic() - begun < 3


def test_a_start_that_serves_begins_the_row_again(box: Container) -> None:
    """What crashes once a month is back after 5 s each time."""
    _does(box, "75")
    _sh(box, "systemctl start --no-block yap-text")
    _until_started(box, 1)
    _does(box, "serve")
    wait_active(box)
    (process,) = show(box, "MainPID").values()
    assert show(box, "NRestarts") == {"NRestarts": "0"}
    _sh(box, f"kill -KILL {process}")
    wait_active(box, process)
    counters = re.findall(r"restart counter is at (\d+)", _sh(box, "journalctl -u yap-text -o cat"))
    assert counters == ["1", "1"]


def test_wrong_settings_are_one_start_whatever_clients_do(box: Container) -> None:
    """The journal names the setting, and the port is closed until somebody mends it and restarts the service."""
    _does(box, "real")
    set_up(box, "CHAT_MAX_OUT=many")
    _sh(box, "systemctl start yap-text.socket; timeout 20 python3 /opt/reconnect.py 6")
    box.run("sed", "-i", "/^CHAT_MAX_OUT/d", "/etc/yap-text/yap-text.env")
    assert len(_starts(box)) == 1
    said = _sh(box, "journalctl -u yap-text -o cat")
    assert said.count('"start.failed"') == 1 and "CHAT_MAX_OUT='many'" in said
    assert show(box, "ActiveState", "ExecMainStatus") == {"ActiveState": "failed", "ExecMainStatus": "2"}
    assert show(box, "ActiveState", unit="yap-text.socket") == {"ActiveState": "inactive"}
    _does(box, "serve")
    box.run("systemctl", "restart", "yap-text")


def test_the_socket_gives_up_on_a_service_that_ends_at_once(box: Container) -> None:
    """If nothing else holds a client back: here the end of the service leaves the socket open."""
    _does(box, "2")
    _drop_in(box, "yap-text.service", "[Service]\nExecStopPost=\n")
    _sh(box, "systemctl start yap-text.socket; timeout 20 python3 /opt/reconnect.py 6")
    shown = show(box, "ActiveState", "Result", unit="yap-text.socket")
    assert shown == {"ActiveState": "failed", "Result": "trigger-limit-hit"}
    assert 10 < len(_starts(box)) <= 21
    _drop_in(box, "yap-text.service")
    _does(box, "serve")
    _sh(box, "systemctl reset-failed yap-text.socket; systemctl start yap-text.socket")
    box.run("systemctl", "start", "yap-text")


def _drop_in(box: Container, unit: str, text: str | None = None) -> None:
    """What `systemctl edit` writes, or none."""
    folder = f"/etc/systemd/system/{unit}.d"
    box.run("rm", "-rf", f"{folder}/override.conf")
    if text is not None:
        box.run("sh", "-c", f"mkdir -p {folder}; printf %s {shlex.quote(text)} > {folder}/override.conf")
    box.run("systemctl", "daemon-reload")


def test_a_drop_in_changes_the_address(box: Container) -> None:
    """With an empty line first; then the port before is closed."""
    _does(box, "serve")
    _drop_in(box, "yap-text.socket", "[Socket]\nListenStream=\nListenStream=127.0.0.1:9000\n")
    box.run("systemctl", "restart", "yap-text.socket", "yap-text.service")
    listening = box.run("ss", "-Hltn")
    assert ":9000 " in listening and ":8000 " not in listening
    _drop_in(box, "yap-text.socket")


def test_a_drop_in_adds_and_limits(box: Container) -> None:
    """To lists it adds; a value it replaces. An install of the next version leaves it."""
    _does(box, "serve")
    lines = (
        "[Unit]\nAfter=postgresql.service\n"
        "[Service]\nEnvironment=CHAT_MAX_OUT=77\nMemoryMax=3G\nLimitNOFILE=1024:4096\nReadWritePaths=/srv\n"
        "LoadCredential=SESSION_STORE_KEY:/etc/yap-text/api-key\nSystemCallFilter=ioprio_set\nDeviceAllow=/dev/kmsg r\n"
    )
    before = show(box, "SystemCallFilter", "Environment", "After")
    _drop_in(box, "yap-text.service", lines)
    assert {line.split()[0] for line in install(box)[:-3]} == {"unchanged", "kept"}
    box.run("systemctl", "restart", "yap-text")
    shown = show(box, *before, "MemoryMax", "LimitNOFILE", "ReadWritePaths")
    assert (shown["MemoryMax"], shown["LimitNOFILE"], shown["ReadWritePaths"]) == (str(3 << 30), "4096", "/srv")
    assert "ioprio_set" in shown["SystemCallFilter"].split() and "ioprio_set" not in before["SystemCallFilter"].split()
    assert {"mbind", "read"} < set(shown["SystemCallFilter"].split())
    assert "CHAT_MAX_OUT=77" in shown["Environment"] and before["Environment"] in shown["Environment"]
    devices = box.run("systemctl", "show", "-P", "DeviceAllow", "yap-text").splitlines()
    assert "/dev/kmsg r" in devices and "char-nvidia-uvm rw" in devices
    assert "postgresql.service" in shown["After"] and "yap-text.socket" in shown["After"]
    (process,) = show(box, "MainPID").values()
    environment = _sh(box, f"tr '\\0' '\\n' < /proc/{process}/environ").splitlines()
    assert "CHAT_MAX_OUT=77" in environment and "YAP_TEXT_DEVICE=cpu" in environment
    assert box.run("ls", "/run/credentials/yap-text.service").split() == [
        "HF_TOKEN",
        "SESSION_STORE_KEY",
        "YAP_TEXT_API_KEY",
    ]
    _drop_in(box, "yap-text.service")


def test_the_uvm_module_is_asked_for_before_the_service(box: Container) -> None:
    """At each start, as root. Without the program it is skipped; if it fails, the service starts all the same."""
    _does(box, "serve")
    box.run("systemctl", "restart", "yap-text")
    shown = show(box, "ConditionResult", "ActiveState", unit="yap-text-uvm.service")
    assert shown == {"ConditionResult": "no", "ActiveState": "inactive"}
    _sh(box, f"cat > /usr/bin/nvidia-modprobe <<'E'\n{MODPROBE}E\nchmod 755 /usr/bin/nvidia-modprobe")
    for _ in range(2):
        box.run("systemctl", "restart", "yap-text")
    _sh(box, "rm /usr/bin/nvidia-modprobe")
    said = _sh(box, "journalctl -u yap-text-uvm -o cat").splitlines()
    assert said.count("as 0: -c 0 -u") == 2
    clock = "ExecMainStartTimestampMonotonic"
    times = [int(show(box, clock, unit=f"yap-text{name}.service")[clock]) for name in ("-uvm", "-quantize", "")]
    assert 0 < times[0] < times[1] < times[2]


def test_mps_is_off_until_it_is_enabled(box: Container) -> None:
    """Then the service knows its pipes and is its client, by the same user; it stops by its own command. NVIDIA's
    program is a stand-in here."""
    _does(box, "serve")
    _sh(box, f"cat > /usr/bin/nvidia-cuda-mps-control <<'E'\n{MPS}E\nchmod 755 /usr/bin/nvidia-cuda-mps-control")
    box.run("systemctl", "restart", "yap-text")
    assert _pipes(box) is None
    assert show(box, "ActiveState", unit="yap-text-mps.service") == {"ActiveState": "inactive"}

    box.run("systemctl", "enable", "--now", "yap-text-mps")
    box.run("systemctl", "restart", "yap-text")
    assert _pipes(box) == "/run/yap-text-mps"
    log = "/var/log/private/yap-text-mps/control.log"
    (uid,) = _sh(box, f"stat -c %u {log}").split()
    assert uid != "0" and _sh(box, f"cat {log}") == f"{uid} client {uid}\n"
    assert _sh(box, "stat -c '%a %u' /run/yap-text-mps").split() == ["700", uid]

    (daemon,) = show(box, "MainPID", unit="yap-text-mps.service").values()
    _sh(box, f"kill -KILL {daemon}")
    back = "test $(systemctl show -P MainPID yap-text-mps) -gt 0 -a -p /run/yap-text-mps/control"
    box.run("sh", "-c", f"until {back}; do sleep 0.2; done", timeout=20)
    box.run("systemctl", "stop", "yap-text.socket", "yap-text")
    assert show(box, "ActiveState", unit="yap-text-mps.service") == {"ActiveState": "active"}
    box.run("systemctl", "start", "yap-text")  # which wants it, once it is enabled

    begun = time.monotonic()
    box.run("systemctl", "disable", "--now", "yap-text-mps")
    assert time.monotonic() - begun < 5
    assert show(box, "Result", unit="yap-text-mps.service") == {"Result": "success"}
    assert _sh(box, f"tail -n 1 {log}") == f"{uid} quit\n"
    assert _sh(box, "ls /run/yap-text-mps 2>&1").endswith("No such file or directory\n")
    box.run("systemctl", "restart", "yap-text")
    assert _pipes(box) is None


def _pipes(box: Container) -> str | None:
    """The folder of MPS in the environment of the service."""
    (process,) = show(box, "MainPID").values()
    pairs = dict(pair.split("=", 1) for pair in _sh(box, f"tr '\\0' '\\n' < /proc/{process}/environ").splitlines())
    return pairs.get("CUDA_MPS_PIPE_DIRECTORY")


def test_the_real_service_serves(box: Container, suite: str) -> None:
    """With vLLM on CPU. Where the whole suite runs this is seen anyway."""
    if suite == SUITE:
        pytest.skip(f"test_units.py runs on {suite}")
    _does(box, "real")
    box.run("systemctl", "start", "yap-text", timeout=300)
    assert "Paris" in warmup(box)["text"]
    box.run("systemctl", "stop", "yap-text.socket", "yap-text")
    assert show(box, "Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}
    said = box.run("journalctl", "-u", "yap-text", "-p", "warning", "-o", "cat", "--no-pager")
    assert "EPERM" not in said and (suite == "bookworm" or "Unknown" not in said), said  # 252 has no RestartSteps=
