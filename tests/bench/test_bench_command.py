"""`yap-text bench` as a command: its options, its files, and what it needs installed."""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import service
from fakes import Script, ScriptedEngine

from yaptext.bench import options
from yaptext.bench.plan import Plan
from yaptext.bench.run import Run
from yaptext.bench.scenarios import SCENARIOS
from yaptext.bench.screen import Screen, watcher
from yaptext.bench.service import Service
from yaptext.bench.turn import Turn
from yaptext.commands.main import run
from yaptext.engine.base import Engines

SHORT = ("--turns", "1", "--rounds", "2", "--sessions", "1,2", "--persona-tokens", "20", "--history-tokens", "20")


def test_every_scenario_can_be_named() -> None:
    """The options know them without importing what they need."""
    assert tuple(SCENARIOS) == tuple(options.SCENARIOS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--scenario", "cold,hot"), "'hot' is unknown; known are all, cold, warm"),
        (("--sessions", "1,x"), "'1,x' is not a list of numbers"),
        (("--sessions", "0"), "each number of sessions is from 1"),
        (("--turns", "0"), "0 is not allowed: 1 to 1000"),
        (("--duration-s", "soon"), "'soon' is not a number"),
        (("--gap-s", "nan"), "nan is not allowed"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With what is allowed."""
    with pytest.raises(SystemExit) as ended:
        run(["bench", *arguments])
    assert ended.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--openai", "http://127.0.0.1:9"), "--openai needs --model"),
        (("--only-openai",), "--only-openai needs --openai"),
        (("--openai", "http://127.0.0.1:9", "--model", "m", "--openai-key-file", "/nowhere"), "cannot read /nowhere"),
        (("--url", "ws://127.0.0.1:9/ws"), "cannot connect to ws://127.0.0.1:9/ws"),
        (("--compare", "/nowhere.json", "/nowhere.json"), "cannot read /nowhere.json"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, no traceback."""
    assert run(["bench", *arguments]) == 1
    assert told in capsys.readouterr().err.splitlines()[-1]


async def test_a_bench_writes_what_it_measured(tmp_path: Path) -> None:
    """Figures as JSON, a page, a table on stdout and a line a run on stderr; compared with itself nothing changed."""
    engine = ScriptedEngine(chat=Script([" word"] * 4))
    figures, page = tmp_path / "a.json", tmp_path / "a.html"
    async with service(Engines(chat=engine, tool=engine)) as running:
        command = [sys.executable, "-m", "yaptext", "bench", "--url", running.ws, "--scenario", "warm", *SHORT]
        process = await asyncio.create_subprocess_exec(
            *command, "--json", str(figures), "--html", str(page), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = (stream.decode() for stream in await process.communicate())
    assert process.returncode == 0, err
    assert "warm, 2 sessions, yap-text" in out and re.search(r"^ttft +4 ", out, re.MULTILINE)
    assert "4/4 warm, 2 sessions, yap-text, round 2: 2 turns, first token" in err and "\033" not in err
    content = json.loads(figures.read_text())
    assert [result["sessions"] for result in content["results"]] == [1, 2]
    assert "warm, 2 sessions, yap-text" in page.read_text()
    assert run(["bench", "--compare", str(figures), str(figures)]) == 0


def test_it_needs_nothing_of_the_service() -> None:
    """What the client environment has is enough: no Starlette, no uvloop, no rich."""
    missing = (
        "starlette",
        "uvicorn",
        "uvloop",
        "structlog",
        "rich",
        "vllm",
        "tokenizers",
        "prometheus_client",
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); "
        "from yaptext.commands.main import run; sys.exit(run(['bench', '--url', 'ws://127.0.0.1:9/ws']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "cannot connect to ws://127.0.0.1:9/ws" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "lacking"), [((), "httptools, numpy"), (("--html", "page.html"), "httptools, numpy, matplotlib")]
)
def test_a_package_that_is_missing_is_named(arguments: tuple[str, ...], lacking: str) -> None:
    """With the command that installs it, before anything is measured; plots are needed for a page alone."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('httptools', 'numpy', 'matplotlib'))); "
        f"from yaptext.commands.main import run; sys.exit(run(['bench', *{arguments!r}]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"bench needs {lacking}, not installed here: pip install 'yaptext[bench]'" in ended.stderr.splitlines()[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_run_that_is_on() -> None:
    """Two lines, drawn again in their place: how far it is, and its figures so far."""
    out = Terminal()
    screen = watcher(out)
    assert isinstance(screen, Screen)
    plan = Plan(("warm",))
    measured = Run(plan, Service("ws://x/ws", "k", plan.sampling), "warm", 8, 2, "n")
    screen.begin(measured, 3, 9)
    turn = Turn(0.0)
    for arrival in (0.1, 0.12, 0.14):
        turn.token("a", arrival)
    measured.turns.append(turn)
    measured.counts["refusals"] = 2
    screen.tick(measured)
    screen.end(measured)
    drawn = out.getvalue()
    assert drawn.count("\033[2A") == 3 and "3/9 warm, 8 sessions, yap-text, round 2" in drawn
    assert "0 turns, first token 100.0 ms, between tokens 20.0 ms, 2 refused" in drawn
