"""A failed attempt: what is remembered of it, and for how long."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantize.forge import Bench, Forge, only
from quantize.hub_server import HubServer

from yaptext.engine import awq_results
from yaptext.engine.awq_results import FAILED, failed_attempt

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(600)]
WORSE = "from yaptext.quantize import verify; verify.Report.worthwhile = False"
"""Quantizes in earnest, and then finds the result too bad."""
NO_WORK = "from yaptext.quantize import job; job.make = lambda *_: None"
"""What would be tried is all that is asked."""


def raising(error: str) -> str:
    return f"import errno\nfrom yaptext.quantize import plan\ndef fails(*_): raise {error}\nplan.plan = fails"


def noted(bench: Bench) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bench.row / FAILED).read_text())
    return content


@pytest.fixture
def failed(fresh: Bench, tmp_path: Path) -> Bench:
    """A model of its own that failed in a moment, and is remembered."""
    fresh.model = Path(shutil.copytree(fresh.model, tmp_path / "own"))
    fresh.environment["CHAT_MODEL"] = str(fresh.model)
    status, events = fresh.run(before=raising("ValueError('odd weights')"))
    assert (status, events[-1]) == (2, "quantize.failed own could not be quantized: odd weights")
    return fresh


def test_a_result_that_is_too_bad_is_remembered(fresh: Bench) -> None:
    """What was to be made, of which source, by which code; why it failed, when, and with which status. The next run of
    the unit says so in one line, and makes nothing. A result takes the note away."""
    status, events = fresh.run(before=WORSE)
    assert status == 2 and len(only(events, "quantize.layer")) == 2
    note = noted(fresh)
    assert events[-1] == f"quantize.failed {note['reason']}" and note["exit_status"] == 2
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", note["failed_at"])
    wanted = note["wanted"]
    assert wanted["source"] == {
        "name": "Tiny-Llama",
        "revision": None,
        "content": awq_results.content(Path(fresh.model)),
    }
    assert wanted["recipe"]["samples"] == 4 and wanted["allow_worse"] is False
    assert set(wanted["made_by"]) == {"yaptext", "code", "autoawq", "torch", "transformers", "llmcompressor", "device"}

    before = (fresh.row / FAILED).stat()
    status, events = fresh.run("--when-wanted", QUANTIZATION="awq")
    assert status == 2
    assert events == [
        f"quantize.failed quantizing Tiny-Llama failed at {note['failed_at']}, and no setting, model file or code has "
        f"changed since: {note['reason']}. To try again: yap-text quantize --again"
    ]
    assert (fresh.row / FAILED).stat() == before
    assert fresh.run()[0] == 2, "by hand it is the same"

    assert fresh.run("--again")[0] == 0
    assert not (fresh.row / FAILED).exists()
    fresh.check_clean()


def test_the_unit_is_not_sent_to_another_state_folder(failed: Bench) -> None:
    """By hand root would write into its own home. What the line advises instead works."""
    state = {"STATE_DIRECTORY": failed.environment.pop("YAP_TEXT_STATE_DIR")}
    status, events = failed.run("--when-wanted", QUANTIZATION="awq", **state)
    assert status == 2 and "yap-text quantize" not in events[-1]
    remove, _, restart = events[-1].partition(". To try again: ")[2].partition(" && ")
    assert (remove, restart) == (f"rm {failed.row / FAILED}", "systemctl restart yap-text")
    subprocess.run(remove.split(), check=True)
    status, events = failed.run("--when-wanted", before=NO_WORK, QUANTIZATION="awq", **state)
    assert status == 0 and only(events, "quantize.begun")


def test_a_remembered_failure_loads_nothing_heavy(failed: Bench) -> None:
    """It costs a start of the service half a second."""
    driver = (
        "import sys; from yaptext.commands.main import run; status = run(['quantize', '--when-wanted']);"
        "print(status, *({'torch', 'transformers', 'awq', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    environment = failed.environment | {"QUANTIZATION": "awq"}
    done = subprocess.run([sys.executable, "-c", driver], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
    [
        ((), "AWQ_CALIBRATION_TOKENS", "256"),
        ((), "AWQ_GROUP_SIZE", "32"),
        ((), "CHAT_PROMPT_FORMAT", "turns"),
        (("--allow-worse",), "", ""),
        (("--again",), "", ""),
        (("--force",), "", ""),
    ],
)
def test_another_setting_is_another_attempt(
    failed: Bench, arguments: tuple[str, ...], setting: str, value: str
) -> None:
    """As is an option that asks for it."""
    status, events = failed.run(*arguments, before=NO_WORK, **({setting: value} if setting else {}))
    assert status == 0 and only(events, "quantize.begun") == ["quantize.begun no finished result"]


def test_what_is_of_no_account_is_no_other_attempt(failed: Bench) -> None:
    """Where the log goes, the other role's tools, and whether git could say which commit it is."""
    note = noted(failed)
    note["wanted"]["made_by"]["yaptext"] = "0.1.0"
    (failed.row / FAILED).write_text(json.dumps(note))
    status, events = failed.run(before=NO_WORK, LOG_LEVEL="debug", TOOLS_FILE="/gone")
    assert status == 2 and not only(events, "quantize.begun")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_other_files_of_the_model_are_another_attempt(failed: Bench, name: str) -> None:
    """Weights that were fetched again, a tokenizer that was mended."""
    file = Path(failed.model) / name
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    status, events = failed.run(before=NO_WORK)
    assert status == 0 and only(events, "quantize.begun")


def test_another_template_is_another_attempt(failed: Bench) -> None:
    """Also in the folder of its own, whose time does not change with what is in its files."""
    folder = Path(failed.model) / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ tools }}")
    assert failed.run(before=raising("ValueError('odd weights')"))[0] == 2
    status, events = failed.run(before=NO_WORK)
    assert status == 2 and not only(events, "quantize.begun")
    (folder / "tool_use.jinja").write_text("{{ other }}")
    status, events = failed.run(before=NO_WORK)
    assert status == 0 and only(events, "quantize.begun")


@pytest.mark.parametrize("part", ["code", "autoawq", "device"])
def test_other_code_is_another_attempt(failed: Bench, part: str) -> None:
    """An update of the service or of a library."""
    note = noted(failed)
    note["wanted"]["made_by"][part] = "other"
    (failed.row / FAILED).write_text(json.dumps(note))
    status, events = failed.run(before=NO_WORK)
    assert status == 0 and only(events, "quantize.begun")


def test_another_revision_is_another_attempt(forge: Forge, tmp_path: Path, hub: HubServer) -> None:
    """The unit asks the hub for its config at each run, and so hears of a new one."""
    hub.add("maker/moe", {"config.json": b'{"model_type": "a-new-one"}', "model.safetensors": b"x"})
    bench = Bench(forge, tmp_path / "state", "maker/moe", HF_HOME=str(tmp_path / "hf"), QUANTIZATION="awq")
    for begun in (1, 0):
        status, events = bench.run("--when-wanted")
        assert status == 2 and len(only(events, "quantize.begun")) == begun
    revision = noted(bench)["wanted"]["source"]["revision"]
    assert revision and "cannot quantize the architecture 'a-new-one'" in noted(bench)["reason"]
    hub.add("maker/moe", {"config.json": b'{"model_type": "other"}', "model.safetensors": b"x"})
    status, events = bench.run("--when-wanted")
    assert status == 2 and len(only(events, "quantize.begun")) == 1
    assert noted(bench)["wanted"]["source"]["revision"] != revision


def test_a_crash_is_remembered_with_its_own_status(fresh: Bench) -> None:
    """The traceback is in the log of the first run alone."""
    for begun in (1, 0):
        status, events = fresh.run(before=raising("LookupError('lost')"))
        assert status == 1 and "lost" in events[-1]
        assert len(only(events, "quantize.begun")) == len(only(events, "quantize.crashed")) == begun


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("OSError(errno.ENOSPC, 'No space left on device')", 75),
        ("OSError(errno.EIO, 'Input/output error')", 75),
        ("PermissionError(errno.EACCES, 'Permission denied')", 2),
        ("RuntimeError('CUDA error: unspecified launch failure')", 75),
        ("SystemExit(143)", 143),
        ("KeyboardInterrupt()", 130),
    ],
)
def test_what_may_pass_is_not_remembered(fresh: Bench, error: str, status: int) -> None:
    """Nor rights to a file, of which the note would not know that they were mended. The next run tries again."""
    for _ in range(2):
        ended, events = fresh.run(before=raising(error))
        assert ended == status and only(events, "quantize.begun")
        assert list(fresh.row.iterdir()) == []


def test_a_signal_that_a_library_turns_into_an_error_is_not_remembered(fresh: Bench) -> None:
    """The job ends with the signal's status."""
    turning = (
        "import os, signal; from yaptext.quantize import plan\n"
        "def turned(*_):\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException: raise ValueError('broken') from None\n"
        "plan.plan = turned"
    )
    status, events = fresh.run(before=turning)
    assert status == 143 and list(fresh.row.iterdir()) == [], events


def test_a_hub_that_is_down_is_asked_again(forge: Forge, tmp_path: Path, hub: HubServer) -> None:
    """Status 75. A model that the hub does not give is 2, and not remembered either: the token may be mended."""
    quick = "from yaptext.quantize import hub; hub.PAUSES_S = ()"
    bench = Bench(forge, tmp_path / "state", "maker/model", HF_HOME=str(tmp_path / "hf"))
    with hub.down():
        status, events = bench.run(before=quick)
    assert status == 75 and "the hub cannot be reached" in events[-1]
    hub.add("maker/model", {"config.json": b"{}"}, gated=True)
    for _ in range(2):
        status, events = bench.run()
        assert status == 2 and only(events, "quantize.begun") and "is gated" in events[-1]
    assert not list(bench.row.iterdir())


@pytest.mark.parametrize("moment", ["os.fsync", "Path.rename"])
def test_killed_while_it_is_written_it_is_whole_or_not_there(fresh: Bench, moment: str) -> None:
    """And then the next run tries again; what was half-written is nobody's note."""
    place, name = moment.split(".")
    dying = (
        "\nimport os, signal; from pathlib import Path\n"
        f"def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n{place}.{name} = die"
    )
    assert fresh.start(before=raising("ValueError('odd')") + dying).end() == -signal.SIGKILL
    assert failed_attempt(fresh.state, str(fresh.model)) is None and not (fresh.row / FAILED).exists()
    status, events = fresh.run(before=raising("ValueError('odd')"))
    assert status == 2 and only(events, "quantize.begun") and noted(fresh)["reason"].endswith("odd")
    assert [path.name for path in fresh.row.iterdir()] == [FAILED]


def test_a_note_that_cannot_be_written_does_not_hide_the_reason(fresh: Bench) -> None:
    """A warning comes before it."""
    (fresh.row / f".{FAILED}").mkdir(parents=True)
    status, events = fresh.run(before=raising("ValueError('odd')"))
    assert status == 2 and events[-1].endswith("odd")
    assert len(only(events, "quantize.failure_not_noted")) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"wanted": 5}'])
def test_a_note_that_cannot_be_read_counts_as_none(failed: Bench, content: str) -> None:
    """The next run tries again."""
    (failed.row / FAILED).write_text(content)
    status, events = failed.run(before=NO_WORK)
    assert status == 0 and only(events, "quantize.begun")


def test_a_finished_result_counts_more_than_a_failed_one(failed: Bench) -> None:
    """Another recipe failed later: the unit has what the server needs, by hand the failure is told."""
    assert failed.run("--again")[0] == 0
    status, _ = failed.run("--samples", "5", before=raising("ValueError('odd')"))
    assert status == 2 and (failed.row / FAILED).exists()
    assert failed.run("--when-wanted", QUANTIZATION="awq", AWQ_CALIBRATION_SAMPLES="5") == (
        0,
        ["quantize.finished_before"],
    )
    status, events = failed.run("--samples", "5")
    assert status == 2 and not only(events, "quantize.begun")


def test_what_a_killed_job_left_goes_although_nothing_is_tried(failed: Bench) -> None:
    """It may be gigabytes."""
    (failed.row / ".partial-20260101T000000Z").mkdir()
    assert failed.run()[0] == 2
    assert [path.name for path in failed.row.iterdir()] == [FAILED]


# Where it is told


def unit_run(folder: Path, *command: str, **variables: str) -> tuple[int, list[str]]:
    """Status and lines of the command whose stderr is the journal's."""
    with (folder / "journal").open("wb") as journal:
        stream = os.fstat(journal.fileno())
        environment = {"JOURNAL_STREAM": f"{stream.st_dev}:{stream.st_ino}", "STATE_DIRECTORY": str(folder / "state")}
        environment |= {"DEPLOY_MODELS": "chat", "YAP_TEXT_DEVICE": "cpu"}
        environment = {name: value for name, value in os.environ.items() if name != "YAP_TEXT_STATE_DIR"} | environment
        ended = subprocess.run(
            command or (sys.executable, "-m", "yaptext", "quantize", "--when-wanted"),
            env=environment | {"QUANTIZATION": "awq"} | variables, stderr=journal, timeout=120, check=False,
        )  # fmt: skip
    return ended.returncode, (folder / "journal").read_text().splitlines()


CRASHING = """
import sys
from yaptext.__main__ import main
from yaptext.quantize import job
def run(*_): raise KeyError("x")
job.run = run
sys.argv[1:] = ["quantize"]
main()
"""


def test_the_journal_has_one_critical_event(tmp_path: Path) -> None:
    """Under its priority, which `journalctl -p warning` shows, with the reason and the exit status, at each run and
    also if the settings themselves are wrong."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "mamba"}')

    def told(lines: list[str]) -> dict[str, Any]:
        (line,) = [line for line in lines if line[:3] in ("<0>", "<1>", "<2>", "<3>", "<4>")]
        assert line.startswith('<2>{"event": "quantize.failed", "level": "critical"'), line
        event: dict[str, Any] = json.loads(line[3:])
        return event

    status, lines = unit_run(tmp_path, CHAT_MODEL=str(model))
    assert status == 2 and all(re.match(r"<6>\{|<2>\{", line) for line in lines), lines
    event = told(lines)
    assert "cannot quantize the architecture 'mamba'" in event["reason"] and event["exit_status"] == 2
    status, lines = unit_run(tmp_path, CHAT_MODEL=str(model))
    assert (status, len(lines)) == (2, 1) and event["reason"] in told(lines)["reason"]
    status, lines = unit_run(tmp_path, CHAT_MODEL=str(model), AWQ_GROUP_SIZE="96")
    assert (status, len(lines)) == (2, 1) and "AWQ_GROUP_SIZE='96'" in told(lines)["reason"]


def test_a_crash_outside_the_work_is_one_event_too(tmp_path: Path) -> None:
    """Status 1; the traceback comes before."""
    status, lines = unit_run(tmp_path, sys.executable, "-c", CRASHING)
    crashed, failed = (json.loads(line[3:]) for line in lines)
    assert [line[:3] for line in lines] == ["<3>", "<2>"]
    assert (crashed["event"], crashed["exception"][0]["exc_type"]) == ("quantize.crashed", "KeyError")
    assert (status, failed["event"], failed["exit_status"]) == (1, "quantize.failed", 1)
    assert failed["reason"] == "it crashed: KeyError; the log has the traceback"


def test_a_person_at_a_terminal_reads_a_plain_line(failed: Bench) -> None:
    """Without JSON, which is of the log."""
    import pty

    master, slave = pty.openpty()
    environment = failed.environment | {"LOG_FORMAT": "auto"}
    command = [sys.executable, "-m", "yaptext", "quantize"]
    ended = subprocess.run(command, env=environment, stderr=slave, timeout=120, check=False)
    os.close(slave)
    screen = os.read(master, 65_536).decode()
    os.close(master)
    assert ended.returncode == 2 and screen.startswith("yap-text: quantizing own failed at 20"), screen
    assert screen.count("\n") == 1 and "yap-text quantize --again" in screen
