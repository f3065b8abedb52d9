"""The units on real systemd, with the CPU build and the embedded model."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator

import pytest
from systemd.container import Container
from systemd.service import (
    REPOSITORY,
    SETTINGS,
    boxed,
    engine_pid,
    install,
    journal,
    key,
    set_up,
    show,
    wait_active,
    warmup,
)

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

RESTART = """
import asyncio, json, sys, websockets
async def main():
    waits = []
    async def connect():
        while True:
            try:
                return await websockets.connect("ws://127.0.0.1:8000/ws", proxy=None, open_timeout=120,
                                                additional_headers={"X-API-Key": sys.argv[1]})
            except websockets.InvalidStatus as refused:
                assert refused.response.status_code == 503, refused
                waits.append(int(refused.response.headers["Retry-After"]))
                await asyncio.sleep(waits[-1])
    sockets = [await connect() for _ in range(20)]
    restart = await asyncio.create_subprocess_exec("systemctl", "restart", "yap-text.service")
    async def live_through(socket):
        frames = []
        try:
            async for frame in socket:
                frames.append(json.loads(frame)["error_code"])
        except websockets.ConnectionClosed:
            pass
        async with await connect() as again:
            await again.send('{"type": "ping"}')
            pong = json.loads(await again.recv())["type"]
        return [frames, socket.close_code, pong]
    told = await asyncio.gather(*map(live_through, sockets))
    print(json.dumps([told, waits]))
    await restart.wait()
asyncio.run(main())
"""
ROTATE = """
import asyncio, json, sys, websockets
async def main():
    turns, over = asyncio.Queue(), asyncio.Event()
    # Short ones: many turns, not many tokens.
    start = {"type": "start", "user_utterance": "Hi", "persona_text": "Hi", "history_text": "", "tools": []}
    start["sampling"] = {"max_tokens": 2}
    async def talk(name):
        url = "ws://127.0.0.1:8000/ws"
        async with websockets.connect(url, additional_headers={"X-API-Key": sys.argv[1]}, proxy=None) as socket:
            while not over.is_set():
                await socket.send(json.dumps(start | {"session_id": name}))
                while (frame := json.loads(await socket.recv()))["type"] != "done":
                    assert frame["type"] != "error", frame
                turns.put_nowait(frame)
    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(talk(f"user-{number}"))
        for _ in range(3):
            for _ in range(12):
                await turns.get()
            rotation = await asyncio.create_subprocess_exec("systemctl", "start", "yap-text-logrotate.service")
            assert await rotation.wait() == 0
        for _ in range(12):
            await turns.get()
        over.set()
asyncio.run(main())
"""
CALLS = """
import ctypes, errno, json, os, resource, tempfile
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
libc = ctypes.CDLL(None, use_errno=True)
def capset():  # no capabilities, which anybody may have
    if libc.capset(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), ctypes.byref((ctypes.c_uint32 * 6)())):
        raise OSError(ctypes.get_errno(), "")
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
with tempfile.NamedTemporaryFile() as own:
    found = {
        "chown": refused(os.chown, own.name, os.getuid(), os.getgid()),
        "setuid": refused(os.setuid, os.getuid()),
        "setresuid": refused(os.setresuid, -1, -1, -1),
        "capset": refused(capset),
        "sched_setparam": refused(os.sched_setparam, 0, os.sched_param(0)),
        "sched_setscheduler": refused(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0)),
        "sched_setaffinity": refused(os.sched_setaffinity, 0, os.sched_getaffinity(0)),
        "setpriority": refused(os.setpriority, os.PRIO_PROCESS, 0, 5),
        "setrlimit": refused(resource.setrlimit, resource.RLIMIT_NOFILE, (hard, hard)),
    }
print("calls", json.dumps(found), flush=True)
"""
"""Tries what every user may do, but for a filter of system calls; prints the errors."""


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    files = {"/opt/restart.py": RESTART, "/opt/rotate.py": ROTATE, "/opt/calls.py": CALLS, "/opt/settings": SETTINGS}
    for unit in ("yap-text", "yap-text-quantize"):
        files[f"/etc/systemd/system/{unit}.service.d/calls.conf"] = (
            '[Service]\nExecStartPre=-sh -c "python3 /opt/calls.py | cat"\n'
        )
    with boxed(files) as (box, _):
        yield box


def test_install_puts_units_in_place_that_systemd_knows(box: Container) -> None:
    """Each file is told; run again, it changes nothing; what was edited stays."""
    said = install(box)
    assert said[-3:] == ["Next:", "  systemctl enable --now yap-text", "  journalctl -u yap-text -f"]
    assert {line.split()[0] for line in said[:-3]} == {"installed"}
    box.run("sh", "-c", "cat /opt/settings >> /etc/yap-text/yap-text.env")
    assert {line.split()[0] for line in install(box)[:-3]} == {"unchanged", "kept"}
    assert SETTINGS in box.run("cat", "/etc/yap-text/yap-text.env")
    modes = box.run("sh", "-c", "stat -c '%a %U %n' /etc/yap-text/*").split("\n")
    assert modes[:5] == [
        "600 root /etc/yap-text/api-key",
        "600 root /etc/yap-text/hf-token",
        "644 root /etc/yap-text/keys",
        "644 root /etc/yap-text/logrotate.conf",
        "600 root /etc/yap-text/yap-text.env",
    ]


def test_start_is_ready_when_it_serves(box: Container) -> None:
    """The command that install names returns after the warm-up turn; the next turn is answered."""
    box.run("systemctl", "enable", "--now", "yap-text", timeout=300)
    assert "Serving on" in show(box, "StatusText")["StatusText"]
    assert "Paris" in warmup(box)["text"]
    assert box.run("systemctl", "is-active", "yap-text.socket", "yap-text-logrotate.timer").split() == ["active"] * 2


def test_nothing_to_quantize_is_done_at_once(box: Container) -> None:
    """It was asked before the start, as the same user, ended well within seconds, and asks again at the next start."""
    names = (
        "Result",
        "ExecMainStatus",
        "ActiveState",
        "ExecMainStartTimestampMonotonic",
        "ExecMainExitTimestampMonotonic",
    )
    shown = show(box, *names, unit="yap-text-quantize.service")
    assert shown["Result"] == "success" and shown["ExecMainStatus"] == "0" and shown["ActiveState"] == "inactive"
    begun, ended = (int(shown[name]) / 1e6 for name in names[-2:])
    served = int(show(box, "ExecMainStartTimestampMonotonic")["ExecMainStartTimestampMonotonic"]) / 1e6
    assert 0 < begun < ended <= served and ended - begun < 10


def test_the_journal_holds_json_with_priorities(box: Container) -> None:
    """Every line of the service parses, and is filed under its own priority; no key is in any."""
    entries = [entry for entry in journal(box) if entry.get("_COMM", "").startswith("python")]
    events = [(json.loads(entry["MESSAGE"]), int(entry["PRIORITY"])) for entry in entries]
    assert {event["event"] for event, _ in events} >= {"server.ready", "turn.finished", "weights.chosen"}
    for event, priority in events:
        assert priority == {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}[event["level"]], event
    assert not any(key(box) in json.dumps(entry) for entry in journal(box))


def test_the_key_is_in_no_environment_and_no_argument(box: Container) -> None:
    """It comes as a credential, which only the service can read."""
    script = "grep -lF -f /etc/yap-text/api-key /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null; true"
    assert box.run("sh", "-c", script) == ""


def test_a_reload_takes_a_new_key(box: Container) -> None:
    """The service, which is no user of the host, can read the file; its process is the same afterwards."""
    before = show(box, "MainPID")
    made = box.run("sh", "-c", "yap-text key new phone-app --file /etc/yap-text/keys 2>/dev/null").strip()
    box.run("systemctl", "reload", "yap-text")
    assert "Paris" in warmup(box, made)["text"] and show(box, "MainPID") == before
    (told,) = [str(entry["MESSAGE"]) for entry in journal(box) if "keys.loaded" in str(entry["MESSAGE"])]
    assert json.loads(told)["removed"] == [] and made not in str(journal(box))


def test_a_restart_loses_nobody(box: Container) -> None:
    """Each open socket hears going_away and 1012. Who comes back during the start is told how long it will take, never
    refused a connection, and is let in after that time."""
    told, waits = json.loads(box.run("sh", "/opt/client", "/opt/restart.py", timeout=250).splitlines()[-1])
    assert told == [[["going_away"], 1012, "pong"]] * 20
    assert len(waits) >= 20 and 2 <= max(waits) <= 60
    wait_active(box)


def test_a_restart_keeps_a_conversation(box: Container) -> None:
    """With `SESSION_STORE`, in the state folder and for nobody else's eyes: the next process's prompt is as long as the
    conversation, and its beginning was computed before anyone asked for it."""
    set_up(box, "SESSION_STORE=sqlite:sessions.db")
    box.run("systemctl", "restart", "yap-text", timeout=300)
    say = "YAP_TEXT_API_KEY=$(cat /etc/yap-text/api-key) yap-text warmup --session kept"
    told = json.loads(box.run("sh", "-c", f"{say} 'My name is Ada. {'Remember what I say. ' * 40}'").splitlines()[0])
    box.run("systemctl", "restart", "yap-text", timeout=300)
    told_of = "journalctl -o cat -u yap-text | grep -q sessions.rewarmed"
    box.run("sh", "-c", f"until {told_of}; do sleep 0.2; done", timeout=60)
    again = json.loads(box.run("sh", "-c", f"{say} 'Hi.'").splitlines()[0])
    usage = again["metrics"]["usage"]
    assert usage["prompt_tokens"] > told["metrics"]["usage"]["prompt_tokens"]
    assert usage["cached_tokens"] > 128
    assert set(box.run("sh", "-c", "stat -c %a /var/lib/private/yap-text/sessions.db*").split()) == {"600"}


def test_a_killed_engine_ends_the_service_which_comes_back(box: Container) -> None:
    """The exit status is recorded as a failure, and systemd starts it again."""
    process = show(box, "MainPID")["MainPID"]
    box.run("kill", "-KILL", engine_pid(box))
    wait_active(box, process)
    assert any("engine.died" in str(entry["MESSAGE"]) for entry in journal(box))
    assert "Paris" in warmup(box)["text"]


def test_a_hung_engine_trips_the_watchdog(box: Container) -> None:
    """Nothing is raised by a stopped process: the unfed watchdog restarts the service."""
    process = show(box, "MainPID")["MainPID"]
    box.run("kill", "-STOP", engine_pid(box))
    wait_active(box, process)
    assert any("Watchdog timeout" in str(entry["MESSAGE"]) for entry in journal(box))
    assert "Paris" in warmup(box)["text"]


def test_a_rotation_under_load_loses_and_doubles_no_line(box: Container) -> None:
    """Six users talk while the file is rotated three times: each turn of the journal is in one file, once."""
    before = len(journal(box))
    # A fourth rotation would delete the oldest file. This very call may wake a timer that is due: its run ends first.
    box.run("systemctl", "stop", "yap-text-logrotate.timer")
    box.run("systemctl", "stop", "yap-text-logrotate.service")
    box.run("sed", "-i", "s/size 100M/size 1/", "/etc/yap-text/logrotate.conf")
    box.run("sh", "/opt/client", "/opt/rotate.py", timeout=250)
    turns = Counter(str(entry["MESSAGE"]) for entry in journal(box) if '"turn.finished"' in str(entry["MESSAGE"]))
    assert len(journal(box)) - before >= 48
    files = box.run("sh", "-c", "ls /var/log/yap-text").split()
    assert files == ["yap-text.log", "yap-text.log.1", "yap-text.log.2.gz", "yap-text.log.3.gz"]
    lines = box.run("sh", "-c", "zcat -f /var/log/yap-text/*").splitlines()
    assert Counter(line for line in lines if '"turn.finished"' in line) == turns
    assert set(turns.values()) == {1}
    each = [box.run("zcat", "-f", f"/var/log/yap-text/{file}").count('"turn.finished"') for file in files]
    assert all(each), "a rotation without a turn shows nothing"


def test_awq_weights_are_made_before_the_start_and_served(box: Container) -> None:
    """`QUANTIZATION=awq` and a restart are all there is to do. A stop meanwhile leaves nothing unfinished, the next
    start goes through with it, and the one after that finds it done."""
    set_up(box, "QUANTIZATION=awq", "AWQ_CALIBRATION_SAMPLES=2", "AWQ_CALIBRATION_TOKENS=128")
    results = "/var/lib/private/yap-text/awq"
    box.run("systemctl", "restart", "--no-block", "yap-text.service")
    box.run(
        "sh", "-c", "journalctl -fn all -o cat -u yap-text-quantize.service | grep -m 1 quantize.layer", timeout=200
    )
    box.run("systemctl", "stop", "yap-text.service")
    stopping = show(box, "ActiveState", unit="yap-text-quantize.service")["ActiveState"]
    assert stopping in ("deactivating", "inactive")  # stopped with the service, though not waited for: hence once more
    box.run("systemctl", "stop", "yap-text-quantize.service")
    shown = show(box, "ActiveState", "Result", unit="yap-text-quantize.service")
    assert shown == {"ActiveState": "inactive", "Result": "success"}
    assert box.run("find", results, "-name", "*.safetensors") == ""
    box.run("systemctl", "start", "yap-text.service", timeout=600)
    chosen = [json.loads(entry["MESSAGE"]) for entry in journal(box) if '"weights.chosen"' in str(entry["MESSAGE"])]
    assert [(event["role"], event["weights"]) for event in chosen[-2:]] == [("tool", "awq"), ("chat", "awq")]
    assert chosen[-1]["model"].startswith("/var/lib/yap-text/awq/") and chosen[-1]["reason"]
    assert warmup(box)["text"]
    before = box.run("find", results, "-name", "*.safetensors")
    box.run("systemctl", "restart", "yap-text.service", timeout=300)
    assert box.run("find", results, "-name", "*.safetensors") == before != ""
    box.run("sed", "-i", "/^QUANTIZATION=/d", "/etc/yap-text/yap-text.env")


def test_no_privileged_call_is_allowed(box: Container) -> None:
    """Where it has served and quantized by now. Every one of these would be allowed to any user."""
    lines = box.run("journalctl", "-o", "cat", "-u", "yap-text.service", "-u", "yap-text-quantize.service").splitlines()
    found = [json.loads(line.removeprefix("calls ")) for line in lines if line.startswith("calls ")]
    refused = dict.fromkeys(("chown", "setuid", "setresuid", "capset", "sched_setparam"), "EPERM")
    allowed = dict.fromkeys(("sched_setscheduler", "sched_setaffinity", "setpriority", "setrlimit"), None)
    assert len(found) >= 8
    assert all(calls == refused | allowed for calls in found), found


def test_a_start_a_conversation_and_a_stop_warn_of_nothing(box: Container) -> None:
    """With models that are named: whatever stands under `journalctl -p warning` asks for something."""
    demo = box.run("sh", "-c", "echo /var/lib/yap-text/demo/*/").strip()
    box.run("systemctl", "stop", "yap-text.socket", "yap-text.service")
    set_up(box, f"CHAT_MODEL={demo}", f"TOOL_MODEL={demo}")
    (begun,) = box.run("date", "+%s").split()
    box.run("systemctl", "start", "yap-text.service", timeout=300)
    assert warmup(box)["text"]
    box.run("systemctl", "stop", "yap-text.socket", "yap-text.service")
    warnings = ("journalctl", "-u", "yap-text.service", "--since", f"@{begun}", "-o", "cat", "--no-pager")
    assert "server.ready" in box.run(*warnings)
    assert box.run(*warnings, "-p", "warning").replace("-- No entries --", "").strip() == ""
    box.run("sed", "-i", "/^[A-Z]*_MODEL=/d", "/etc/yap-text/yap-text.env")
    box.run("systemctl", "start", "yap-text.service", timeout=300)


def test_stop_is_clean_and_clean_removes_the_state(box: Container) -> None:
    """After a stop no process is left; `systemctl clean` takes the place of the deep clean."""
    box.run("systemctl", "stop", "yap-text.socket", "yap-text.service")
    assert show(box, "Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}
    assert "EngineCore" not in box.run("ps", "-eo", "args")
    box.run("systemctl", "clean", "--what=cache", "--what=state", "yap-text.service")
    assert box.run("sh", "-c", "ls -d /var/cache/yap-text /var/lib/yap-text 2>/dev/null; true") == ""


def test_a_missing_credential_is_a_clear_failure(box: Container) -> None:
    """Status 243, and the journal names the step."""
    box.run("mv", "/etc/yap-text/api-key", "/etc/yap-text/away")
    box.run("systemctl", "start", "yap-text.service", check=False)
    assert show(box, "ExecMainStatus")["ExecMainStatus"] == "243"
    assert any("Failed to set up credentials" in str(entry["MESSAGE"]) for entry in journal(box))
    box.run("mv", "/etc/yap-text/away", "/etc/yap-text/api-key")


def test_uninstall_leaves_nothing_behind_but_what_is_yours(box: Container) -> None:
    """A running service is stopped, systemd forgets the units, and the command that is told removes the rest."""
    box.run("systemctl", "restart", "yap-text.socket", "yap-text.service", timeout=300)
    said = install(box, "--uninstall")
    assert "EngineCore" not in box.run("ps", "-eo", "args")
    assert "0 unit files" in box.run("systemctl", "list-unit-files", "yap-text*", check=False)
    assert box.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "yap-text*") == ""
    assert "8000" not in box.run("ss", "-ltn")
    assert box.run("ls", "/etc/yap-text").split() == ["api-key", "keys", "logrotate.conf", "yap-text.env"]
    assert said[-1].startswith("  rm -r /etc/yap-text ")
    box.run("sh", "-c", said[-1])
    assert box.run("sh", "-c", "find / -xdev -name 'yap-text*' -not -path '/usr/local/bin/*' -not -path '/opt/*'") == ""


def test_the_units_in_the_repository_are_the_rendered_ones() -> None:
    """nix/units.nix is where they are defined; `make units` renders them."""
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-E", f"import {REPOSITORY}/nix/render.nix {{}}"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    folder = REPOSITORY / "systemd"
    by_hand = {"logrotate.conf", "yap-text.env", "README.md", "MIGRATING.md"}
    assert json.loads(rendered) == {
        file.name: file.read_text() for file in folder.iterdir() if file.name not in by_hand
    }


@pytest.mark.parametrize("unit", ["yap-text.service", "yap-text-quantize.service"])
def test_the_filter_of_system_calls_holds_nothing_privileged(unit: str) -> None:
    """Its lines count in their order: a later one can bring back what an earlier one took away."""
    allowed: set[str] = set()
    for line in (REPOSITORY / "systemd" / unit).read_text().splitlines():
        if line.startswith("SystemCallFilter="):
            value = line.removeprefix("SystemCallFilter=")
            calls = set[str]().union(*(_calls(name.split(":")[0]) for name in value.removeprefix("~").split()))
            allowed = allowed - calls if value.startswith("~") else allowed | calls
    assert {"read", "execve", "prlimit64", "get_mempolicy"} < allowed
    assert allowed & _calls("@privileged") == set()
    needed = {"sched_setaffinity", "sched_setscheduler", "setpriority", "set_mempolicy", "mbind", "migrate_pages"}
    assert allowed & _calls("@resources") == needed


def _calls(name: str) -> set[str]:
    """Of a group of systemd's, groups in it included, or the one of that name."""
    if not name.startswith("@"):
        return {name}
    command = ["systemd-analyze", "syscall-filter", "--no-pager", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.strip() for line in lines if line.startswith(" ") and not line.strip().startswith("#")]
    return set[str]().union(*map(_calls, names))


UVM, MPS = "yap-text-uvm.service", "yap-text-mps.service"


@pytest.mark.parametrize(
    "unit", ["yap-text.service", "yap-text-quantize.service", "yap-text-logrotate.service", UVM, MPS]
)
def test_the_units_are_hardened(unit: str) -> None:
    """`systemd-analyze security` rates them 2.0 or better; the one that loads a module 2.4."""
    threshold = f"--threshold={24 if unit == UVM else 20}"
    command = ["systemd-analyze", "security", "--offline=true", threshold, str(REPOSITORY / "systemd" / unit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-200:]
