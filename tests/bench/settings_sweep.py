"""Engine settings by measurement: the service, started with each, under the same load.

    python tests/bench/settings_sweep.py measure --out FOLDER [--only 'NAME;...'] [--tokenizer FOLDER]
    python tests/bench/settings_sweep.py render --out FOLDER [--figures FOLDER]

`measure` writes FOLDER/NAME.json step by step and prints a table of each start; one that fails is told, the next
comes, and the exit status is 1. `render` makes tables (Markdown) and plots (SVG) of what lies there. The models have
the shapes of 12B Mistral-Nemo and 1.5B Qwen2 with weights of chance, and decisions are held to `[]`, of one token but
for the step `[ and ]`; `--demo` tries it all with the embedded model.

A start is what needs one (weights, kernels, graphs); its steps are what can change meanwhile (`sweep_service.py`).
FOLDER/stop ends the whole after the step, FOLDER/hold lets it wait before the first. Where py-spy is installed, the
step `profiled` leaves what each process did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sweep_service
import sweep_shapes
from sweep_figures import engine_steps, freed, render, rows, way

from yaptext.bench import scenarios
from yaptext.bench.campaign import Campaign
from yaptext.bench.plan import Plan, Sampling
from yaptext.bench.run import Guest, Run
from yaptext.bench.service import Service
from yaptext.bench.text import table
from yaptext.engine import demo
from yaptext.settings import Settings

PORT = 8100
READY_LIMIT_S = 420.0
RUN_LIMIT_S = 100.0
ANSWER_LIMIT_S = 20.0
ROOT = Path(__file__).parents[2]

# --- the load


def _plan(scenario: str, sessions: int = 32, turns: int = 4, **more: Any) -> Plan:
    """Replies as clients get them that ask for nothing: with the service's own sampling."""
    more = {"persona_tokens": 1000, "history_tokens": 2000, "sampling": Sampling(64, greedy=False)} | more
    return Plan((scenario,), (sessions,), turns, 1, turn_timeout_s=20.0, **more)


RUNS = {
    "at once": _plan("warm"),
    "spread": _plan("warm", turns=3, spread_s=2.0),
    "greedy": _plan("warm", sampling=Sampling(64)),
    "eight": _plan("warm", 8),
    "one": _plan("warm", 1, turns=8),
    "loading": _plan("loading", turns=3),
    "often": _plan("warm", turns=8, spread_s=2.0),
    "talking": _plan("conversation", turns=8, spread_s=2.0),
    "cancel": _plan("barge-in", turns=8),
    "idle": _plan("idle", 8, turns=2, gap_s=10.0),
}


async def loading(run: Run) -> None:
    """Every fourth user brings a story the server never saw with each turn (part `cold`); the prefixes of the others
    are warm, and what they notice of that is the figure."""

    async def listen(guest: Guest) -> None:
        for number in run.numbers():
            await run.say(guest, number, again=True)

    async def come(guest: Guest) -> None:
        for number in run.numbers():
            run.meet(guest, variant=number + 1)
            await run.say(guest, number, part="cold")

    async def warmed(guest: Guest) -> None:
        run.meet(guest)
        await run.warm(guest)

    async def talk(guest: Guest) -> None:
        await (listen(guest) if guest.user % 4 else come(guest))

    async with run.crowd() as crowd:
        await run.each([guest for guest in crowd if guest.user % 4], warmed)
        await run.each(crowd, talk)


scenarios.SCENARIOS["loading"] = loading

# --- the settings


@dataclass(frozen=True)
class Step:
    """`knobs` by process (chat, tool, front), as `sweep_service.py` knows them; what is not named is as started."""

    name: str
    runs: tuple[str, ...]
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """`arguments` are the engines' (both, chat, tool). `mps` starts NVIDIA's Multi-Process Service, and is what the
    chat engine's process has in its environment for it."""

    steps: tuple[Step, ...]
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    awq: bool = False
    mps: dict[str, str] | None = None


def _step(
    name: str, *runs: str, chat: int = 2048, tool: int = 2048, long: int = 0, cpus: bool = False, **front: Any
) -> Step:
    """`chat` and `tool` are the tokens that a step of those engines may compute, `long` those of one chat prompt."""
    chat_knobs = {"tokens": chat, "long": long}
    knobs: dict[str, dict[str, Any]] = {"chat": chat_knobs, "tool": {"tokens": tool}, "front": front}
    if cpus:
        for number, values in enumerate(knobs.values()):
            values["cpus"] = list(range(4 * number, 4 * number + 4))
    return Step(name, runs, knobs)


def _start(*steps: Step, both: dict[str, Any] | None = None, **more: Any) -> Start:
    """All compiled for 8,192 tokens a step, so that they find each other's graphs; steps lower that. Sessions are new
    to the service in the first step alone: it has yet to tokenize what they bring."""
    arguments = {"both": {"max_num_batched_tokens": 8192} | (both or {})}
    arguments |= {role: more.pop(role, {}) for role in ("chat", "tool")}
    return Start((_step("first turns", "at once"), *steps), arguments, **more)


SIZES = (256, 512, 1024, 4096, 8192)
MIDDLE, SMALL = ("at once", "spread", "loading"), {"chat": 512, "tool": 8192}
WHOLE = ("at once", "spread", "eight", "one", "loading", "cancel")
VLLM_GRAPHS = {"CUDA_GRAPHS": "auto"}
CHAT_STANDS_BACK = {"CUDA_MPS_CLIENT_PRIORITY": "1"}
CONCURRENT = {"concurrent_model_call": True}
AHEAD, NOT_AHEAD = {"async_scheduling": True}, {"async_scheduling": False}


def _own(*runs: str, name: str = "as it is", concurrent: bool = False) -> Step:
    """With the service's own settings."""
    return _set("concurrent", *runs, **CONCURRENT) if concurrent else Step(name, runs)


def _set(name: str, *runs: str, **settings: Any) -> Step:
    """With other settings of the service's process, by their names in `yaptext/settings/table.py`."""
    return Step(name, runs, {"front": {"settings": settings}})


STARTS = {
    "default": Start(
        (
            Step("first turns", ("at once",)),
            _own(*WHOLE),
            _own("at once", "spread", "one", "loading", concurrent=True),
            Step("[ and ]", ("spread", "one"), {"front": {"no": 2}}),
            _set("threshold", "spread", tool_yes_threshold=0.5),
            Step("idle", ("idle",)),
        )
    ),
    "next turn": Start(
        (
            Step("first turns", ("at once",)),
            *(
                step
                for again in ("", ", again")
                for step in (
                    _own("often", "talking", name="next turn warm" + again),
                    _set("next turn not warm" + again, "often", "talking", warm_next_turn=False),
                )
            ),
            *(_set(f"tool history {tokens}", "often", tool_history_tokens=tokens) for tokens in (0, 100, 400, 800)),
            _set("no repetition penalty", "often", chat_repetition_penalty=1.0),
        )
    ),
    "default, again": Start((Step("profiled", ("spread", "cancel")),)),
    "default, beside MPS": Start(
        (_own("at once", "spread", "one", "loading", "cancel"), _own("spread", "one", "loading", concurrent=True)),
        mps=CHAT_STANDS_BACK,
    ),
    "default, chat not ahead": Start(
        (_own("spread", "one", "loading"), _own("spread", "one", concurrent=True)), {"chat": NOT_AHEAD}
    ),
    "default, tool ahead": Start((_own("at once", "spread", "one"),), {"tool": AHEAD}),
    "default, beside MPS without priority": Start((_own("spread", "loading"),), mps={"CUDA_MPS_CLIENT_PRIORITY": "0"}),
    "default, 64 sequences": Start((_own("at once", "spread"),), {"both": {"max_num_seqs": 64}}),
    "default, FLASHINFER": Start((_own("spread", "one", "loading"),), {"both": {"attention_backend": "FLASHINFER"}}),
    "default, AWQ, fp8 KV": Start(
        (_own("spread", "one"),), {"chat": {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}}, awq=True
    ),
    "fp8": _start(_step("2048/2048", *WHOLE), _step("profiled", "one", "eight"), environ=VLLM_GRAPHS),
    "whole graphs": _start(
        _step("2048/2048", *WHOLE), _step("512/8192", *MIDDLE, **SMALL), _step("profiled", "one", "eight")
    ),
    "whole graphs, mps": _start(_step("2048/2048", *WHOLE), _step("512/8192", *MIDDLE, **SMALL), mps=CHAT_STANDS_BACK),
    "in place": _start(
        *(_step(f"{size}/2048", "at once", "loading", chat=size) for size in (256, 1024, 8192)),
        *(_step(f"2048/{size}", "at once", tool=size) for size in (512, 8192)),
        _step("1024/8192", "spread", "loading", chat=1024, tool=8192),
        _step("1024/8192, a prompt 256", "loading", chat=1024, tool=8192, long=256),
        _step("concurrent", "at once", "spread", chat=1024, tool=8192, settings=CONCURRENT),
        _step("4 CPUs for each process", "spread", chat=1024, tool=8192, cpus=True),
        _step("threshold", "spread", chat=1024, tool=8192, settings={"tool_yes_threshold": 0.5}),
        _step("idle", "idle", chat=1024, tool=8192),
        _step("garbage not frozen", "spread", chat=1024, tool=8192, thawed=True),
        mps=CHAT_STANDS_BACK,
    ),
    "no async scheduling": _start(_step("2048/2048", *MIDDLE), both=NOT_AHEAD, environ=VLLM_GRAPHS),
    "AWQ": _start(_step("2048/2048", "at once", "spread", "one"), awq=True),
    "fp8 KV": _start(_step("2048/2048", "at once", "spread", "one"), chat={"kv_cache_dtype": "fp8"}),
    "AWQ, fp8 KV": _start(
        _step("2048/2048", "at once", "spread", "one"), awq=True, chat={"kv_cache_dtype": "fp8", "dtype": "bfloat16"}
    ),
    "FLASHINFER": _start(_step("2048/2048", *MIDDLE), chat={"attention_backend": "FLASHINFER"}),
    "mps without priority": _start(_step("512/8192", *MIDDLE, **SMALL), mps={"CUDA_MPS_CLIENT_PRIORITY": "0"}),
    "64 sequences": _start(_step("2048/2048", "at once"), both={"max_num_seqs": 64}),
    "demo": Start(
        (
            _step(
                "as it is",
                "at once",
                "often",
                "talking",
                "loading",
                "cancel",
                chat=8192,
                tool=8192,
                settings=CONCURRENT,
            ),
        )
    ),
}
"""A step's name is the tokens that chat and tool may compute at once, where nothing else is said."""

# --- the service


class Control:
    """The file that the processes follow, and what they write when it changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    async def turn(self, knobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Applies knobs; returns what each process noted since the last call. Raises `RuntimeError` where one does not
        follow: its figures would be of other settings."""
        self._number += 1
        new = self._folder / "control.new"
        new.write_text(json.dumps({"number": self._number} | knobs))
        new.rename(self._folder / "control.json")
        until = time.monotonic() + ANSWER_LIMIT_S
        found: dict[str, Any] = {}
        while missing := {"front", "chat", "tool"} - found.keys():
            if time.monotonic() > until:
                raise RuntimeError(f"{', '.join(sorted(missing))}: no answer in {ANSWER_LIMIT_S:g} s")
            await asyncio.sleep(0.05)
            for role in missing:
                file = self._folder / f"{role}-{self._number}.json"
                if file.exists():
                    found[role] = json.loads(file.read_text())
                    file.unlink()
        return found


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name)


class Process:
    """The service of one start, with a log of its own."""

    def __init__(self, start: Start, name: str, out: Path, tokenizer: Path, small: bool) -> None:
        self._start = start
        self.folder = out / "run"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*.json"):
            old.unlink()
        self.log = out / f"{_file_name(name)}.log"
        environ = {
            "HOST": "127.0.0.1",
            "PORT": str(PORT),
            "LOG_FORMAT": "json",
            "MAX_CONCURRENT_CONNECTIONS": "128",
            "MAX_PREFILL_BACKLOG_MS": "0",
            "MAX_FRAME_BYTES": "4000000",
            sweep_service.FOLDER: str(self.folder),
            sweep_service.ARGUMENTS: json.dumps(start.arguments),
        }
        made = {role: sweep_shapes.make(out / "models", role, tokenizer, awq=start.awq) for role in ("chat", "tool")}
        environ |= {"CHAT_MODEL": str(made["chat"]), "TOOL_MODEL": str(made["tool"]), "HF_HUB_OFFLINE": "1"}
        environ |= {sweep_service.CHAT: str(made["chat"])} | ({} if small else {sweep_service.DUMMY: "1"})
        if start.mps is not None:
            environ |= self._mps_folders | {sweep_service.MPS_CHAT: json.dumps(start.mps)}
        self._environ = os.environ | environ | start.environ
        self._process: subprocess.Popen[bytes] | None = None
        self._plugin()

    @property
    def _mps_folders(self) -> dict[str, str]:
        return {f"CUDA_MPS_{kind}_DIRECTORY": str(self.folder / kind.lower()) for kind in ("PIPE", "LOG")}

    def _plugin(self) -> None:
        """An installed package, as far as vLLM can see."""
        info = self.folder / "settings_sweep-0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: settings-sweep\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\nsweep = sweep_service:register\n")
        paths = [str(self.folder), str(Path(__file__).parent), str(ROOT), self._environ.get("PYTHONPATH", "")]
        self._environ["PYTHONPATH"] = ":".join(filter(None, paths))

    def open(self) -> dict[str, Any]:
        """Raises `RuntimeError` where it does not come up; else what the start took, in seconds."""
        if self._start.mps is not None:
            for folder in self._mps_folders.values():
                Path(folder).mkdir(exist_ok=True)
            subprocess.run(["nvidia-cuda-mps-control", "-d"], env=self._environ, check=True, timeout=20)
        begun = time.monotonic()
        command = [sys.executable, sweep_service.__file__, "serve"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, env=self._environ, stdout=log, stderr=log, start_new_session=True)
        while not any(line.get("event") == "server.ready" for line in self.lines()):
            if not self.is_alive or time.monotonic() - begun > READY_LIMIT_S:
                words = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])[-3000:]
                raise RuntimeError(f"not ready after {time.monotonic() - begun:.0f} s:\n{words}")
            time.sleep(0.2)
        took = {"ready": round(time.monotonic() - begun, 1)}
        for line in self.lines():
            if line.get("event") in ("engine.opened", "engines.opened", "engines.warm"):
                took[line.get("role", line["event"].removeprefix("engines."))] = line["seconds"]
        return took

    def lines(self, offset: int = 0) -> list[dict[str, Any]]:
        with self.log.open(errors="replace") as log:
            log.seek(offset)
            return [json.loads(line) for line in log if line.startswith("{") and line.endswith("}\n")]

    def spied(self, name: str) -> list[subprocess.Popen[bytes]]:
        """Samplers of the service and its engines, that end by themselves; none without py-spy."""
        if self._process is None or (command := shutil.which("py-spy")) is None:
            return []
        family = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        found = []
        for pid in (str(self._process.pid), *family):
            file = self.log.with_name(f"spy-{_file_name(name)}-{pid}")
            options = ["record", "--nonblocking", "-d", "4", "-r", "500", "-t", "-f", "raw", "-o", str(file), "-p", pid]
            found.append(subprocess.Popen([command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return found

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(25)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its own session: whatever it left
            self._process.wait()
        if self._start.mps is not None:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=self._environ, timeout=20, check=False)
        time.sleep(1.0)


# --- the measurement


class _Silent:
    def begin(self, *_: object) -> None: ...
    def tick(self, *_: object) -> None: ...
    def end(self, *_: object) -> None: ...


async def _bench(plan: Plan, nonce: str) -> dict[str, Any]:
    """The result of one run. The warm stories are the same in all steps of a start, and are warmed once."""
    service = Service(f"ws://127.0.0.1:{PORT}/ws", "yap_token", plan.sampling)
    campaign = Campaign(plan, [service], _Silent())
    if plan.scenarios == ("warm",):
        campaign.nonce = nonce
    try:
        async with asyncio.timeout(RUN_LIMIT_S):
            await campaign.measure()
    except Exception as error:  # the other steps are worth having
        return {"failed": f"{type(error).__name__}: {error}"}
    [result] = campaign.report()["results"]
    for figure in result["figures"].values():
        figure.pop("curve", None)
        figure.pop("rounds", None)
    return result


async def _steps(start: Start, process: Process, found: dict[str, Any], keep: Any, small: bool) -> None:
    control = Control(process.folder)
    nonce = f"{time.time_ns() // 1_000_000:x}"
    for step in start.steps:
        if (process.folder.parent / "stop").exists():
            return
        await control.turn(step.knobs)
        noted: dict[str, Any] = {"name": step.name, "knobs": step.knobs, "runs": {}}
        found["steps"].append(noted)
        for name in step.runs:
            plan = RUNS[name]
            if small:
                plan = Plan(
                    plan.scenarios,
                    (4,),
                    2,
                    1,
                    sampling=Sampling(8, greedy=False),
                    spread_s=plan.spread_s,
                    gap_s=1.0,
                    persona_tokens=50,
                    history_tokens=100,
                )
            begun, offset = time.monotonic(), process.log.stat().st_size
            clocks = _clocks() if name == "idle" else None
            spies = process.spied(f"{found['name']}-{name}") if step.name == "profiled" else []
            result = await _bench(plan, nonce)
            notes = await control.turn(step.knobs) if process.is_alive else {}
            noted["runs"][name] = {
                "client": result,
                "seconds": round(time.monotonic() - begun, 1),
                "way": way(notes),
                "freed": freed(notes),
                "engines": {role: engine_steps(notes.get(role, {}).get("steps", [])) for role in ("chat", "tool")},
                "warnings": [line for line in process.lines(offset) if line.get("level") in ("warning", "error")][:5],
            }
            for spy in spies:
                await asyncio.to_thread(spy.wait, 20)
            if clocks is not None:
                clocks.terminate()
                noted["runs"][name]["clocks_mhz"] = clocks.communicate()[0].decode().split()
            keep()
            if result.get("failed") and not process.is_alive:
                raise RuntimeError("the service died")


def _clocks() -> subprocess.Popen[bytes] | None:
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-lms", "250"]
    try:
        return subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        return None


def _card() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.used,clocks.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=False, capture_output=True, text=True, timeout=20).stdout.strip()
    except FileNotFoundError:
        return "no NVIDIA card"


def measure(names: Sequence[str], out: Path, tokenizer: Path, small: bool) -> int:
    """The exit status: 1 where a start or a run has failed."""
    import uvloop

    status = 0
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (out / "stop").exists():
            break
        start = STARTS[name]
        found: dict[str, Any] = {"name": name, "start": asdict(start), "steps": []}
        file = out / f"{_file_name(name)}.json"

        def keep(found: dict[str, Any] = found, file: Path = file) -> None:
            file.with_suffix(".new").write_text(json.dumps(found, indent=1))
            file.with_suffix(".new").rename(file)

        begun = time.monotonic()
        process = Process(start, name, out, tokenizer, small)
        try:
            found["seconds"] = process.open()
            while (out / "hold").exists():
                time.sleep(0.2)
            found["card"] = _card()
            print(f"{name}: {found['seconds']}, {found['card']}", flush=True)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_steps(start, process, found, keep, small))
        except Exception as error:  # the other starts are worth having
            found["failed"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            process.close()
            keep()
        runs = [run["client"] for step in found["steps"] for run in step["runs"].values()]
        if any("failed" in part for part in (found, *runs)):
            status = 1
        print(table(rows([found])), f"{time.monotonic() - begun:.0f} s", sep="\n", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "render"))
    parser.add_argument("--out", type=Path, required=True)
    every = ";".join(name for name in STARTS if name != "demo")
    parser.add_argument("--only", default=every, metavar="NAME;...", help=every)
    parser.add_argument("--tokenizer", type=Path, help="a folder with one (default: the embedded model's)")
    parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
    parser.add_argument("--demo", action="store_true")
    parsed = parser.parse_args()
    if parsed.action == "render":
        print(render([json.loads(file.read_text()) for file in sorted(parsed.out.glob("*.json"))], parsed.figures))
        return 0
    tokenizer = parsed.tokenizer
    if tokenizer is None:
        tokenizer = demo.folder(Settings.load().state)
    if parsed.demo:
        (parsed.out / "models").mkdir(parents=True, exist_ok=True)
        for role in ("chat", "tool"):  # two folders of one model: two engines
            with contextlib.suppress(FileExistsError):
                (parsed.out / "models" / role).symlink_to(tokenizer)
    names = ["demo"] if parsed.demo else parsed.only.split(";")
    return measure(names, parsed.out.resolve(), tokenizer, parsed.demo)


if __name__ == "__main__":
    sys.exit(main())
