"""A start that fails: what the operator reads of it and where, and whether systemd tries again."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from faults.process import serving
from huggingface_hub import errors as hub

from yaptext.engine.model_config import start_error_of
from yaptext.errors import SettingsError, StartError, StartRefused, YapError

SERVE = ("-m", "yaptext", "serve")
FRONT_END = (str(Path(__file__).parent / "faults" / "process.py"),)
BAD_ENGINES = """
import sys, types
from yaptext import errors
from yaptext.__main__ import main
def open_vllm(_):
    raise {error}
sys.modules["yaptext.engine.vllm.startup"] = vllm = types.ModuleType("yaptext.engine.vllm.startup")
vllm.open_vllm = open_vllm
sys.argv[1:] = ["serve"]
main()
"""


class Ended(NamedTuple):
    """How a start ended under systemd: stderr is the journal's, and NOTIFY_SOCKET is there."""

    status: int
    journal: list[str]
    file: list[dict[str, Any]]
    notified: list[str]

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line.partition(">")[2]) for line in self.journal]
        return [event for event in found if event["event"] == name]


def start(folder: Path, *command: str, pass_fds: tuple[int, ...] = (), **variables: str) -> Ended:
    log = folder / "yap-text.log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor, (folder / "journal").open("wb") as journal:
        supervisor.bind(str(folder / "notify"))
        supervisor.setblocking(False)
        stream = os.fstat(journal.fileno())
        environment = {
            "JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}",
            "NOTIFY_SOCKET": str(folder / "notify"),
            "YAP_TEXT_LOG_FILE": str(log),
            "YAP_TEXT_STATE_DIR": str(folder),
        }
        ended = subprocess.run(
            command or (sys.executable, *SERVE),
            env=os.environ | environment | variables,
            stderr=journal,
            pass_fds=pass_fds,
            timeout=120,
            check=False,
        )
        notified = []
        while True:
            try:
                notified.append(supervisor.recv(4096).decode())
            except BlockingIOError:
                break
    lines = (folder / "journal").read_text().splitlines()
    kept = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Ended(ended.returncode, lines, kept, notified)


# Where it is told


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"TOOLS_FILE": "/nowhere.json"}, ["TOOLS_FILE='/nowhere.json'"]),
        ({"PORT": "http", "LOG_FORMAT": "xml", "CHAT_TEMPRATURE": "1"}, ["PORT='http'", "LOG_FORMAT=", "CHAT_TEMPR"]),
        ({"CHAT_MODEL": "/nowhere", "TOOL_MODEL": "/nowhere"}, ["/nowhere is not a folder"]),
    ],
    ids=["after the settings", "the settings themselves", "the models"],
)
def test_the_reason_is_one_event_wherever_the_log_goes(
    tmp_path: Path, variables: dict[str, str], told: list[str]
) -> None:
    """Critical, with all that is wrong and the exit status: in the journal under its priority, in the log file, and as
    the unit's status."""
    ended = start(tmp_path, **variables)
    assert ended.status == 2
    assert [line[:46] for line in ended.journal if '"critical"' in line] == [
        '<2>{"event": "start.failed", "level": "critica'
    ], ended.journal
    (event,) = ended.events("start.failed")
    assert all(words in event["reason"] for words in told) and event["exit_status"] == 2
    assert event["hint"].endswith("yap-text doctor")
    assert [kept["reason"] for kept in ended.file if kept["event"] == "start.failed"] == [event["reason"]]
    status = ended.notified[-1]
    assert status.startswith("STATUS=The start failed: ") and all(words in status for words in told)
    assert "\n" not in status


@pytest.mark.subprocess
@pytest.mark.parametrize("other", [{}, {"PORT": "http"}])
def test_without_a_log_file_that_can_be_written_stderr_has_it(tmp_path: Path, other: dict[str, str]) -> None:
    """Whether it is the reason itself or comes on top."""
    ended = start(tmp_path, YAP_TEXT_LOG_FILE="/nowhere/log", **other)
    (event,) = ended.events("start.failed")
    assert ("PORT=" if other else "YAP_TEXT_LOG_FILE='/nowhere/log' cannot be written") in event["reason"]
    assert (ended.status, event["exit_status"], len(ended.journal)) == (2, 2, 1)


@pytest.mark.subprocess
def test_a_very_long_reason_reaches_systemd(tmp_path: Path) -> None:
    """Which drops a message of over 4096 bytes."""
    ended = start(tmp_path, CHAT_LOGIT_BIAS="\u00e9" * 20_000, PORT="http")
    assert ended.notified and all(len(message.encode()) < 4096 for message in ended.notified)


@pytest.mark.subprocess
def test_a_person_at_a_terminal_reads_plain_lines(tmp_path: Path) -> None:
    """Without JSON and without a time, and at last what else there is to do."""
    master, slave = pty.openpty()
    environment = os.environ | {"TOOLS_FILE": "/nowhere.json", "YAP_TEXT_STATE_DIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, *SERVE], env=environment, stderr=slave, timeout=120, check=False)
    os.close(slave)
    screen = os.read(master, 65_536).decode()
    os.close(master)
    assert ended.returncode == 2 and screen.startswith("yap-text: TOOLS_FILE='/nowhere.json'"), screen
    assert screen.count("\n") == 2 and screen.rstrip().endswith("yap-text doctor")


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, r"Yap Text serves on (http://127\.0\.0\.1:\d+) - open it in a browser\. Ctrl-C stops it\."),
        (
            {"HOST": "0.0.0.0", "YAP_TEXT_API_KEY": "a-key"},
            r"serves on (http://127\.0\.0\.1:\d+) - open it in a browser",
        ),
        ({"HOST": "::1"}, r"serves on (http://\[::1\]:\d+) - open"),
        ({"PLAYGROUND": "0"}, r"Yap Text serves on (http://127\.0\.0\.1:\d+)\. Ctrl-C"),
    ],
)
def test_a_person_at_a_terminal_reads_where_to_go(tmp_path: Path, variables: dict[str, str], told: str) -> None:
    """In the last line, when the service is ready; it is the address of the page."""
    master, slave = pty.openpty()
    environment = os.environ | {"PORT": "0", "YAP_TEXT_STATE_DIR": str(tmp_path)} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with subprocess.Popen([sys.executable, *FRONT_END], env=environment, stdout=slave, stderr=slave) as process:
        os.close(slave)
        screen = ""
        while "Ctrl-C stops it." not in screen:
            screen += os.read(master, 65_536).decode()
        (url,) = re.findall(told, screen)
        answer = httpx2.get(url, headers={"Accept": "text/html"}, trust_env=False)
        assert answer.status_code == (404 if "PLAYGROUND" in variables else 200)
        assert screen.rstrip().splitlines()[-1].startswith("Yap Text serves on"), screen
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    os.close(master)


@pytest.mark.subprocess
def test_a_log_that_is_no_terminal_has_only_events(tmp_path: Path) -> None:
    """Programs read it, journald's among them."""
    with serving(tmp_path / "log", FRONT_END, "k", YAP_TEXT_STATE_DIR=str(tmp_path)) as process:
        process.wait_ready()
        assert httpx2.get(f"{process.http}/readyz", trust_env=False).status_code == 200
        for line in process.output.splitlines():
            json.loads(line)


# Whether systemd tries again


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        ("errors.StartError('no card answers')", 75, "no card answers"),
        ("errors.StartRefused('no fit')", 2, "no fit"),
        ("KeyError('x')", 1, "the start crashed; the log has the traceback"),
    ],
)
def test_the_exit_status_says_whether_a_later_try_may_help(
    tmp_path: Path, error: str, status: int, reason: str
) -> None:
    """2 stays down (`RestartPreventExitStatus=`), 75 is a temporary failure, 1 a crash."""
    ended = start(tmp_path, sys.executable, "-c", BAD_ENGINES.format(error=error), PORT="0")
    (event,) = ended.events("start.failed")
    assert (ended.status, event["exit_status"], event["reason"]) == (status, status, reason)
    assert ("hint" in event) == (status != 1), "of a crash the doctor knows nothing"


@pytest.mark.subprocess
def test_a_crash_is_the_units_status_too(tmp_path: Path) -> None:
    """By its type: its words may be anybody's."""
    code = "import sys; sys.modules['yaptext.server.app'] = None; sys.argv[1:] = ['serve']\n"
    ended = start(tmp_path, sys.executable, "-c", code + "from yaptext.__main__ import main; main()")
    assert (ended.status, len(ended.events("process.crashed"))) == (1, 1)
    assert ended.notified[-1] == "STATUS=It crashed: ModuleNotFoundError"


@pytest.mark.subprocess
def test_a_port_that_is_taken_may_be_free_later(tmp_path: Path) -> None:
    """The reason names the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serving(tmp_path / "output", FRONT_END, "key", PORT=port, YAP_TEXT_STATE_DIR=str(tmp_path)) as process:
            assert process.popen.wait(60) == 75, process.output
            (event,) = process.events("start.failed")
    assert f"PORT={port}" in event["reason"] and "in use" in event["reason"]


@pytest.mark.subprocess
def test_a_hub_that_does_not_answer_may_be_back(tmp_path: Path) -> None:
    """Nothing is in the cache, so the start ends; the next one may find it."""
    models = {"CHAT_MODEL": "acme/yap", "TOOL_MODEL": "acme/yap"}
    down = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    ended = start(tmp_path, **models, **down)
    (event,) = ended.events("start.failed")
    assert ended.status == 75 and event["reason"].startswith("cannot read the config of acme/yap (CHAT_MODEL")


def of_hub(kind: type[hub.HfHubHTTPError], status: int) -> Exception:
    request = httpx2.Request("GET", "https://hub.invalid/acme/yap")
    return kind("no", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (of_hub(hub.RepositoryNotFoundError, 404), StartRefused),
        (of_hub(hub.GatedRepoError, 403), StartRefused),
        (of_hub(hub.RemoteEntryNotFoundError, 404), StartRefused),
        (of_hub(hub.HfHubHTTPError, 401), StartRefused),
        (of_hub(hub.HfHubHTTPError, 503), StartError),
        (hub.LocalEntryNotFoundError("no"), StartError),
        (hub.HFValidationError("no"), StartRefused),
        (FileNotFoundError(2, "no"), StartRefused),
        (PermissionError(13, "no"), StartRefused),
        (json.JSONDecodeError("no", "", 0), StartRefused),
        (OSError(28, "No space left on device"), StartError),
        (TimeoutError(), StartError),
        (httpx2.ConnectError("no"), StartError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_a_config_that_cannot_be_read_is_there_later_or_never(error: Exception, kind: type[StartError]) -> None:
    """What the hub, the network or the disk cannot do now is tried again; what is not there is not."""
    assert start_error_of(error) is kind


def test_each_kind_of_error_has_its_exit_status() -> None:
    """Of any command."""
    assert [kind.exit_status for kind in (YapError, SettingsError, StartError, StartRefused)] == [1, 2, 75, 2]


UNIT = (Path(__file__).parents[1] / "systemd" / "yap-text.service").read_text().splitlines()


def test_the_unit_stays_down_for_2_alone() -> None:
    """Any other status is tried again, some seconds later."""
    assert {"Restart=on-failure", "RestartPreventExitStatus=2", "RestartSec=5"} <= set(UNIT)


@pytest.mark.subprocess
@pytest.mark.parametrize("status", ["0", "1", "2", "75", "143", "TERM", ""])
def test_with_2_the_socket_goes_too(tmp_path: Path, status: str) -> None:
    """The socket's next client would start the service again, every two seconds."""
    (command,) = [line.partition(" -c ")[2].strip("'") for line in UNIT if line.startswith("ExecStopPost=-+/bin/sh ")]
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    systemctl.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EXIT_STATUS": status}
    subprocess.run(["/bin/sh", "-c", command.replace("$$", "$")], env=environment, timeout=60, check=True)
    told = (tmp_path / "told").read_text().split() if (tmp_path / "told").exists() else []
    assert (told[-2:] == ["stop", "yap-text.socket"]) == (status == "2") and bool(told) == (status == "2")


# What is told before


@pytest.mark.subprocess
def test_the_settings_are_one_line_before_the_engines_open(tmp_path: Path) -> None:
    """By name, with where each came from, and without a secret."""
    code = BAD_ENGINES.format(error="errors.StartError('no card answers')")
    (tmp_path / "SESSION_STORE_KEY").write_text("sealed-with-this-key")
    variables = {"CREDENTIALS_DIRECTORY": str(tmp_path), "PORT": "0", "HUGGINGFACE_HUB_TOKEN": "hf_canary"}
    ended = start(tmp_path, sys.executable, "-c", code, **variables)
    (event,) = ended.events("server.settings")
    assert event["level"] == "info"
    set_here = {"YAP_TEXT_LOG_FILE": f"{tmp_path}/yap-text.log", "YAP_TEXT_STATE_DIR": str(tmp_path)}
    assert event["settings"] == set_here | {"PORT": 0, "HF_TOKEN": "set", "SESSION_STORE_KEY": "set"}
    assert event["sources"] == dict.fromkeys(event["settings"], "environment") | {"SESSION_STORE_KEY": "credential"}
    names = [json.loads(line.partition(">")[2])["event"] for line in ended.journal]
    assert names.index("server.settings") < names.index("start.failed")
    assert not [line for line in ended.journal if "hf_canary" in line or "sealed-with-this-key" in line]


@pytest.mark.subprocess
def test_a_start_with_defaults_says_that_nothing_differs(tmp_path: Path) -> None:
    """A line that is missing would not. Here systemd holds the port."""
    code = BAD_ENGINES.format(error="errors.StartError('no card answers')")
    with socket.create_server(("127.0.0.1", 0)) as held:
        ended = subprocess.run(
            [sys.executable, "-c", HELD, str(held.fileno()), "-c", code],
            env=os.environ | {"HOME": str(tmp_path)},
            pass_fds=(held.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    (event,) = [json.loads(line) for line in ended.stderr.splitlines() if "server.settings" in line]
    assert (event["settings"], event["sources"]) == ({}, {})


@pytest.mark.subprocess
@pytest.mark.parametrize("content", ["", "\n", "\ufeff\n", "yap_token\n"])
def test_a_credential_without_a_key_is_told(tmp_path: Path, content: str) -> None:
    """The public default key then opens the service."""
    (tmp_path / "YAP_TEXT_API_KEY").write_text(content, encoding="utf-8")
    ended = start(tmp_path, CREDENTIALS_DIRECTORY=str(tmp_path), TOOLS_FILE="/nowhere.json")
    (event,) = ended.events("key.default")
    assert event["level"] == "warning" and "yap_token" in event["hint"] and "/etc/yap-text/api-key" in event["hint"]


@pytest.mark.subprocess
@pytest.mark.parametrize("how", ["credential", "environment", "key file", "none"])
def test_with_a_key_or_without_a_credential_nothing_is_told(tmp_path: Path, how: str) -> None:
    """Another key counts; or nobody meant to give one."""
    variables = {"TOOLS_FILE": "/nowhere.json", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    if how != "none":
        (tmp_path / "YAP_TEXT_API_KEY").write_text("own\n" if how == "credential" else "")
    if how == "environment":
        variables["YAP_TEXT_API_KEY"] = "own"
    if how == "key file":
        (tmp_path / "YAP_TEXT_KEY_FILE").touch()
    ended = start(tmp_path, **variables)
    assert ended.events("start.failed") and not ended.events("key.default")


HELD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
listening = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execve(sys.executable, [sys.executable, *sys.argv[2:]], os.environ | listening)
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_an_address_beside_the_held_socket_is_told(tmp_path: Path, family: socket.AddressFamily) -> None:
    """What HOST and PORT ask for is ignored there: one warning, which says where the address stands."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as held:
        port, file = held.getsockname()[1], held.fileno()

        def told(name: str, **variables: str) -> list[str]:
            folder = tmp_path / name
            folder.mkdir()
            command = (sys.executable, "-c", HELD, str(file), *SERVE)
            options = {"YAP_TEXT_API_KEY": "own", "TOOLS_FILE": "/nowhere.json"}
            ended = start(folder, *command, pass_fds=(file,), **options, **variables)
            assert ended.events("start.failed")
            return [event["note"] for event in ended.events("setting.ignored") if event["level"] == "warning"]

        (note,) = told("both", HOST="0.0.0.0", PORT="9")
        assert all(words in note for words in ("HOST=0.0.0.0 and PORT=9", f"{host}:{port}", "yap-text.socket"))
        (note,) = told("one", HOST="localhost", PORT="9")
        assert "HOST" not in note and "PORT=9" in note
        assert told("same", HOST=host, PORT=str(port)) == told("none") == []


@pytest.mark.subprocess
def test_a_path_that_the_unit_hides_is_told_with_the_reason(tmp_path: Path) -> None:
    """It looks missing, and is there for anybody else."""
    models = {"CHAT_MODEL": "/home/ada/model", "TOOL_MODEL": "/root/model"}
    reason = start(tmp_path, INVOCATION_ID="5f0c1e2ab9d4", **models).events("start.failed")[0]["reason"]
    assert reason.startswith("/root/model is not a folder (TOOL_MODEL) | TOOL_MODEL: ") and "ProtectHome" in reason
    assert "CHAT_MODEL" not in reason
