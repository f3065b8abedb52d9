"""Runs `yap-text quantize` in processes of its own, forked from one that has imported what takes seconds.

A job is what the command is from `cli.run` on: its own process, which signals and SIGKILL reach and which reads its own
environment. Only what libraries read at import is the forge's, for all jobs: where the hub is.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yaptext.engine import awq_results

CHILD = """
import json, os, sys, traceback, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
import matplotlib.backends.backend_agg
from yaptext.quantize import awq, calibration, hub, job, model_card, progress, verify
awq.bring_autoawq()
awq.quantizer_class(print)
from yaptext.commands.main import run

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    status = 1
    try:
        log = os.open(asked["log"], os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environ.update(asked["environment"])
        exec(asked["before"])
        status = run(["quantize", *asked["arguments"]])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
"""


class Job:
    """One run of the command. `lines` are what it tells, as they come."""

    def __init__(self, forge: Forge, pid: int, log: Path) -> None:
        self.pid, self._forge = pid, forge
        self._log = log.open(encoding="utf-8")
        self.status: int | None = None
        self.events: list[str] = []
        """The events so far, each with its reason or error; a line that is no event as it stands."""

    def lines(self) -> Iterator[dict[str, Any]]:
        for line in self._log:
            try:
                told: dict[str, Any] = json.loads(line)
                self.events.append(f"{told['event']} {told.get('reason') or told.get('error') or ''}".strip())
                yield told
            except ValueError:
                self.events.append(line.rstrip())

    def until(self, event: str, **fields: Any) -> None:
        for line in self.lines():
            if line["event"] == event and fields.items() <= line.items():
                return
        raise AssertionError(f"no {event} in {self.events}")

    def end(self, number: int | None = None) -> int:
        """The exit status, after all has been read; with a `number` that signal is sent before."""
        if self.status is None:
            if number is not None:
                os.kill(self.pid, number)
            list(self.lines())
            self._log.close()
            self.status = self._forge.wait(self.pid)
        return self.status


class Forge:
    """`with Forge(environment) as forge:` has the process that jobs are forked from."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._count = folder, 0
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", CHILD], env=environment, text=True, **pipes
        )

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(60)
        self._process.stdout.close()  # type: ignore[union-attr]

    def start(self, arguments: list[str], environment: dict[str, str], before: str = "") -> Job:
        """Forks a job; `before` is Python that it runs first."""
        self._count += 1
        log = self._folder / f"log-{self._count}"
        os.mkfifo(log)
        pid = self._ask(log=str(log), arguments=arguments, environment=environment, before=before)
        return Job(self, pid, log)

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def _ask(self, **fields: Any) -> int:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(fields), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


class Bench:
    """A state folder, a model, and the command over them."""

    def __init__(self, forge: Forge, state: Path, model: Path | str, **environment: str) -> None:
        self.forge, self.state, self.model = forge, state, model
        self.environment = os.environ | {
            "YAP_TEXT_STATE_DIR": str(state),
            "YAP_TEXT_DEVICE": "cpu",
            "CHAT_MODEL": str(model),
            "DEPLOY_MODELS": "chat",
            "AWQ_CALIBRATION_SAMPLES": "4",
            "AWQ_CALIBRATION_TOKENS": "128",
            "LOG_FORMAT": "json",
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    @property
    def row(self) -> Path:
        return awq_results.row(self.state, str(self.model))

    def start(self, *arguments: str, before: str = "", **environment: str) -> Job:
        return self.forge.start(list(arguments), self.environment | environment, before)

    def run(self, *arguments: str, before: str = "", **environment: str) -> tuple[int, list[str]]:
        """Exit status and events."""
        job = self.start(*arguments, before=before, **environment)
        return job.end(), job.events

    def finished(self) -> awq_results.Finished:
        found = awq_results.finished(self.state, str(self.model))
        assert found is not None
        return found

    def check_clean(self, results: int = 1) -> None:
        """So many results and nothing else in the row; the newest is whole by its own manifest."""
        lying = [path.name for path in self.row.iterdir() if path.suffix != ".json"] if self.row.exists() else []
        assert len(lying) == results and not [name for name in lying if name.startswith(".")], lying
        if results:
            found = self.finished()
            inside = [path.relative_to(found.folder) for path in found.folder.rglob("*") if path.is_file()]
            files = {path.as_posix() for path in inside} - {awq_results.MANIFEST}
            assert files == set(found.manifest["files"])
            for name, entry in found.manifest["files"].items():
                assert hashlib.sha256((found.folder / name).read_bytes()).hexdigest() == entry["sha256"], name


def only(events: list[str], name: str) -> list[str]:
    return [event for event in events if event.startswith(name)]
