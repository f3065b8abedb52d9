"""Ctrl-C: one line and status 130, whatever the quantizer is doing, at a terminal and elsewhere. And what a person sees
of a job that goes on."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from quantize.forge import Bench, Forge, only
from quantize.hub_server import HubServer

from yaptext.commands import main

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(600)]
LINE = "stopped by Ctrl-C (SIGINT); no partial result is kept; results finished before are"

INTERRUPTED = """
import os, signal
def interrupted(place, name):
    do = getattr(place, name)
    def stop(*given, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return do(*given, **named)
    setattr(place, name, stop)
"""
MOMENTS = {
    "settings": "from yaptext.settings import Settings\ninterrupted(Settings, 'load')",
    "calibration": "from yaptext.quantize import calibration\ninterrupted(calibration, 'read')",
    "plan": "from yaptext.quantize import plan\ninterrupted(plan, 'plan')",
    "samples": "from yaptext.dialogue.chat_prompt import ChatPrompts\ninterrupted(ChatPrompts, 'turn')",
    "load": "from transformers import PreTrainedModel\ninterrupted(PreTrainedModel, '_load_pretrained_model')",
    "loaded": "from yaptext.quantize import verify\ninterrupted(verify, 'check_finite')",
    "measuring": "import torch\ninterrupted(torch, 'log_softmax')",
    "layer": "from yaptext.quantize import awq\ninterrupted(awq, 'pack')",
    "card": "from yaptext.quantize import model_card\ninterrupted(model_card, 'plot')",
    "destructor": "import torch\nfrom yaptext.quantize import verify\nmeasure = verify.Reference.measure\n"
    "class Thing:\n    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
    "def first(*given, **named):\n    Thing()\n    return measure(*given, **named)\n"
    "verify.Reference.measure = first",
    "swallowed": "from yaptext.quantize import verify\n"
    "def load(*_, **__):\n    try: os.kill(os.getpid(), signal.SIGINT)\n"
    "    except BaseException: raise ValueError('broken') from None\n"
    "verify.load = load",
}


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal's end to read from, and the code that makes standard error its other end."""
    ours, theirs = pty.openpty()
    yield ours, f"import os\nos.dup2(os.open({os.ttyname(theirs)!r}, os.O_WRONLY | os.O_NOCTTY), 2)\n"
    os.close(ours)
    os.close(theirs)


def read(terminal: int) -> str:
    """What was written there, without its colours."""
    os.set_blocking(terminal, False)
    told = b""
    while True:
        try:
            told += os.read(terminal, 2**16)
        except BlockingIOError:
            return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told.decode()).replace("\r", "\n")


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_one_line_of_the_journal(fresh: Bench, moment: str) -> None:
    """No traceback, nothing on the shelf, nothing remembered."""
    status, events = fresh.run(before=INTERRUPTED + MOMENTS[moment])
    assert status == 130
    assert events[-1] in (f"quantize.interrupted {LINE}", f"yap-text: {LINE}"), events
    assert events[-1].startswith("yap-text") == (moment == "settings"), "the log is not there yet"
    assert not [event for event in events if "Traceback" in event or "crashed" in event], events
    fresh.check_clean(0)
    assert not list(fresh.row.glob("*"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_one_line_of_a_terminal(fresh: Bench, terminal: tuple[int, str], moment: str) -> None:
    """Below the bar, if there was one."""
    ours, to_terminal = terminal
    job = fresh.start(before=to_terminal + INTERRUPTED + MOMENTS[moment], LOG_FORMAT="console")
    assert job.end() == 130
    told = read(ours)
    assert told.rstrip().splitlines()[-1] == f"yap-text: {LINE}", told
    assert "Traceback" not in told and "crashed" not in told
    fresh.check_clean(0)


def test_ctrl_c_ends_a_download_with_a_line(forge: Forge, tmp_path: Path, hub: HubServer) -> None:
    """Its threads do not hold the process."""
    hub.add("maker/model", {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(50_000_000)})
    hub.bytes_per_s = 2_000_000
    bench = Bench(forge, tmp_path / "state", "maker/model", HF_HOME=str(tmp_path / "hf"))
    job = bench.start()
    job.until("download.started")
    assert job.end(signal.SIGINT) == 130
    assert job.events[-1] == f"quantize.interrupted {LINE}"
    assert not only(job.events, "Traceback")
    bench.check_clean(0)


IMPORTING = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            {code}
sys.meta_path.insert(0, Finder())
sys.argv = ["yap-text", "quantize"]
runpy.run_module("yaptext", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["yaptext.commands.main", "pydantic", "yaptext.quantize.job", "torch._dynamo"])
@pytest.mark.parametrize("code", ["os.kill(os.getpid(), signal.SIGINT)", "exec('os.kill(os.getpid(), signal.SIGINT)')"])
def test_ctrl_c_is_one_line_during_an_import(fresh: Bench, module: str, code: str) -> None:
    """Of our own modules and of torch; also within code that a library makes up, after which Python would end by the
    signal itself."""
    source = IMPORTING.format(module=module, code=code)
    done = subprocess.run(
        [sys.executable, "-c", source], env=fresh.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "stopped by Ctrl-C (SIGINT)" in done.stderr.splitlines()[-1]


# What goes on


def test_a_terminal_sees_bars_of_all_three_steps(fresh: Bench, terminal: tuple[int, str]) -> None:
    """Before, the layers, and after; then the figures."""
    ours, to_terminal = terminal
    job = fresh.start(before=to_terminal, LOG_FORMAT="console")
    assert job.end() == 0
    told = read(ours)
    for bar in (
        r"Tiny-Llama, measured before it is quantized .* 8/8\s+blocks,",
        r"Tiny-Llama .* 2/2\s+layers,",
        r"Tiny-Llama, measured after it was quantized .* 4/4\s+blocks,",
    ):
        assert re.search(bar, told), told
    assert any("| AWQ |" in event for event in job.events)


def test_the_journal_hears_of_long_measurements(fresh: Bench, tmp_path: Path) -> None:
    """A line in half a minute, a status every two seconds: here each block takes twenty seconds."""
    slow = (
        "import itertools; from yaptext.quantize import progress\n"
        "clock, ticks = progress.Progress.__init__, itertools.count(0, 10)\n"
        "progress.Progress.__init__ = lambda self, terminal: clock(self, terminal, lambda: next(ticks))\n"
        "progress.notify = lambda *words: print(*words, flush=True)"
    )
    job = fresh.start(before=slow)
    lines = [line for line in job.lines() if line["event"] == "quantize.measuring"]
    assert job.end() == 0
    assert [line["when"] for line in lines] == ["before it is quantized"] * 4 + ["after it was quantized"] * 2
    assert [(line["block"], line["blocks"]) for line in lines] == [(1, 8), (3, 8), (5, 8), (7, 8), (1, 4), (3, 4)]
    assert [line["left_s"] for line in lines[:4]] == sorted({line["left_s"] for line in lines[:4]}, reverse=True)
    statuses = only(job.events, "STATUS=Measuring Tiny-Llama before it is quantized: block ")
    assert len(statuses) == 9 and statuses[0].endswith("block 0 of 8.") and statuses[-1].endswith(", 0 s left.")


def test_the_help_says_what_counts_if_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The defaults of the settings, how many samples there are, and where the result lies."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main.run(["quantize", "--help"])
    told = capsys.readouterr().out
    for words in (
        "AWQ_CALIBRATION: builtin, a .txt or .jsonl file, a folder of them, or hub:NAME (default: builtin)",
        "calibration samples, 1 to 4096; up to 4 more are set aside to measure on (default: 128 on CUDA, 8 on CPU)",
        "AWQ_CALIBRATION_TOKENS: tokens of one sample, 64 to 8192 (default: 512)",
        "AWQ_GROUP_SIZE: weights that share a scale: auto, 128, 64 or 32 (default: auto)",
        "only this model (default: those of DEPLOY_MODELS)",
        "The result is a folder in STATE/awq/NAME-HASH/",
        "STATE is YAP_TEXT_STATE_DIR (default: STATE_DIRECTORY under systemd, else ~/.local/state/yap-text)",
    ):
        assert words in told
