"""The service as `settings_sweep.py` starts it, and the vLLM plugin that goes with it into the engine processes.

Both follow a file, `control.json`: what can change in a running engine changes there, so that a row of the table need
not cost a start. What was noted since the last change is then written to `ROLE-NUMBER.json`, by the machine's monotonic
clock.
"""

from __future__ import annotations

import contextvars
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER, ARGUMENTS, DUMMY, CHAT, MPS_CHAT, BLOCKS = (
    "SWEEP_FOLDER",
    "SWEEP_ARGUMENTS",
    "SWEEP_DUMMY",
    "SWEEP_CHAT",
    "SWEEP_MPS_CHAT",
    "SWEEP_BLOCKS",
)
_EVERY_S = 0.05


def _follow(role: str, apply: Callable[[dict[str, Any]], None], notes: dict[str, list[Any]]) -> None:
    """From a thread: the control's part for this role is applied, and what `notes` hold is written and forgotten."""
    folder = Path(os.environ[FOLDER])

    def watch() -> None:
        seen = 0
        while True:
            time.sleep(_EVERY_S)
            try:
                changed = (folder / "control.json").stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if changed == seen:
                continue
            seen = changed
            control = json.loads((folder / "control.json").read_text())
            knobs = control.get(role, {})
            apply(knobs)
            cpus = knobs.get("cpus") or range(os.cpu_count() or 1)
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), cpus)
            written = {name: list(values) for name, values in notes.items()}
            for values in notes.values():
                values.clear()
            file = folder / f"{role}-{control['number']}"
            file.write_text(json.dumps(written))
            file.rename(file.with_suffix(".json"))

    threading.Thread(target=watch, daemon=True).start()


# --- in the engine processes


def register() -> None:
    """Called by vLLM in each of its processes."""
    if FOLDER not in os.environ:
        return
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.executor.abstract import Executor

    if Scheduler.schedule.__name__ != "schedule":
        return  # vLLM loads plugins more than once
    init, executor_init = Scheduler.__init__, Executor.__init__
    add, schedule, update, finish = (
        Scheduler.add_request,
        Scheduler.schedule,
        Scheduler.update_from_output,
        Scheduler.finish_requests,
    )

    def prepared(self: Any, vllm_config: Any) -> None:
        """Before this process meets the card: under MPS the chat engine may be told to stand back."""
        if _role(vllm_config) == "chat":
            os.environ.update(json.loads(os.environ.get(MPS_CHAT) or "{}"))
        executor_init(self, vllm_config)

    def opened(self: Any, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        self.sweep_notes = {"steps": [], "freed": [], "added": [], "first": []}
        self.sweep_begun, self.sweep_knobs = {}, None
        own = {"tokens": self.max_num_scheduled_tokens, "seqs": self.max_num_running_reqs, "long": 0}

        def apply(knobs: dict[str, Any]) -> None:
            self.sweep_knobs = own | knobs

        _follow(_role(self.vllm_config), apply, self.sweep_notes)

    def added(self: Any, request: Any) -> None:
        self.sweep_notes["added"].append((request.request_id, time.monotonic()))
        add(self, request)

    def scheduled(self: Any, *args: Any, **named: Any) -> Any:
        if self.sweep_knobs is not None:  # between two steps: the scheduler checks itself against them
            knobs, self.sweep_knobs = self.sweep_knobs, None
            self.max_num_scheduled_tokens, self.max_num_running_reqs = knobs["tokens"], knobs["seqs"]
            self.scheduler_config.long_prefill_token_threshold = knobs["long"]
        begun = time.monotonic()
        output = schedule(self, *args, **named)
        if output.total_num_scheduled_tokens:
            self.sweep_begun[id(output)] = begun
        return output

    def updated(self: Any, output: Any, *args: Any, **named: Any) -> Any:
        if (begun := self.sweep_begun.pop(id(output), None)) is not None:
            tokens, requests = output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)
            now = time.monotonic()
            self.sweep_notes["steps"].append((begun, now, tokens, requests))
            for request in output.scheduled_new_reqs:
                self.sweep_notes["first"].append((request.req_id, begun, now))
        return update(self, output, *args, **named)

    def finished(self: Any, *args: Any, **named: Any) -> Any:
        ended = finish(self, *args, **named)
        now = time.monotonic()
        self.sweep_notes["freed"].extend((request.request_id, now) for request in ended)
        return ended

    scheduled.__name__ = "sweep"
    Executor.__init__ = prepared
    Scheduler.__init__, Scheduler.add_request, Scheduler.schedule = opened, added, scheduled
    Scheduler.update_from_output, Scheduler.finish_requests = updated, finished


def _role(vllm_config: Any) -> str:
    return "chat" if vllm_config.model_config.model == os.environ[CHAT] else "tool"


# --- in the service's own process

_answer: contextvars.ContextVar[Any] = contextvars.ContextVar("answer")


def _prepare() -> None:
    from yaptext.dialogue import runtime
    from yaptext.engine.vllm import arguments, engine, environment, kv_blocks, request

    held = _Held(request.params_of)
    if os.environ.get(DUMMY):
        request.params_of = held  # type: ignore[assignment]
    own_arguments = arguments.engine_arguments
    more = json.loads(os.environ.get(ARGUMENTS, "{}"))
    dummy = {"load_format": "dummy"} if os.environ.get(DUMMY) else {}

    def with_more(settings: Any, checkpoint: Any, role: str, *args: Any, **named: Any) -> dict[str, Any]:
        own = own_arguments(settings, checkpoint, role, *args, **named)
        return own | dummy | more.get("both", {}) | more.get(role, {})

    arguments.engine_arguments = with_more
    own_environment = environment.engine_environment

    def with_log(settings: Any) -> dict[str, str]:
        """vLLM tells which kernels it chose, and what a start takes."""
        own = own_environment(settings)
        config = json.loads(Path(own["VLLM_LOGGING_CONFIG_PATH"]).read_text())
        config["loggers"]["vllm"]["level"] = "INFO"
        path = Path(os.environ[FOLDER], "vllm_logging.json")
        path.write_text(json.dumps(config))
        return own | {"VLLM_LOGGING_CONFIG_PATH": str(path)}

    environment.engine_environment = with_log
    if sizes := json.loads(os.environ.get(BLOCKS, "{}")):
        kv_blocks.Sizes.recall = lambda self: sizes  # type: ignore[method-assign,assignment]
    notes: dict[str, list[Any]] = {"aborts": [], "turns": []}
    _note_aborts(notes["aborts"])
    turns = Turns(notes["turns"])
    _note_engines(turns, engine.VllmEngine)
    open_stage = runtime.Runtime.open.__func__  # type: ignore[attr-defined]

    async def opened(cls: Any, settings: Any, *args: Any, **named: Any) -> Any:
        found = await open_stage(cls, settings, *args, **named)
        found.observer = turns
        own, prompts = dict(settings.__dict__), found.decider.prompts

        def apply(knobs: dict[str, Any]) -> None:
            settings.__dict__.update(own | knobs.get("settings", {}))
            prompts.history_tokens = settings.tool_history_tokens
            found.decider.threshold = settings.tool_yes_threshold
            held.tokens = knobs.get("no", 1)
            if knobs.get("thawed"):  # as if the service had not frozen what its start made
                gc.unfreeze()

        _follow("front", apply, notes)
        return found

    runtime.Runtime.open = classmethod(opened)


class _Held:
    """In place of `params_of`: every decision is `[]`, of one token or of two, since weights of chance have no opinion
    and would write calls of any length. The grammar is the tools' own."""

    def __init__(self, params_of: Callable[[Any], Any]) -> None:
        self._params_of, self.tokens = params_of, 1
        self._words: dict[str, int] = {}

    def __call__(self, sampling: Any) -> Any:
        params = self._params_of(sampling)
        if sampling.json_schema is not None:
            if not self._words:
                vocabulary = json.loads(Path(os.environ["TOOL_MODEL"], "tokenizer.json").read_text())["model"]["vocab"]
                self._words = {word: vocabulary[word] for word in ("[]", "[", "]")}
            words = ("[]",) if self.tokens == 1 else ("[", "]")
            params.logit_bias = dict.fromkeys((self._words[word] for word in words), 100.0)
        return params


def _note_aborts(aborts: list[Any]) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    abort = AsyncLLM.abort

    async def noted(self: Any, request_id: Any, *args: Any, **named: Any) -> None:
        aborts.append((request_id, time.monotonic()))
        await abort(self, request_id, *args, **named)

    AsyncLLM.abort = noted


class Turns:
    """The points of a turn's way: the frame there, the decision out, the first text passed on. Registered as the
    runtime's observer; a note is complete when its turn has ended."""

    def __init__(self, ended: list[Any]) -> None:
        self._ended = ended
        self._running: dict[Any, dict[str, Any]] = {}

    def of_task(self) -> dict[str, Any] | None:
        """The note of the turn that this task is of."""
        return self._running.get(_answer.get(None))

    def began(self, answer: Any) -> None:
        _answer.set(answer)
        self._running[answer] = {"received": answer.received_at}

    def decided(self, answer: Any) -> None:
        self._running[answer]["decided"] = time.monotonic()

    def ended(self, answer: Any) -> None:
        if (note := self._running.pop(answer, None)) is not None:  # else it was cut before it began
            if answer.reply.first_at is not None:
                note["passed"] = answer.reply.first_at
            self._ended.append(note)


def _note_engines(turns: Turns, engine: Any) -> None:
    """Into the notes of turns: each engine asked (and under which id), the chat engine's first text."""
    from vllm.v1.engine.async_llm import AsyncLLM

    stream, generate = engine.stream, AsyncLLM.generate

    def generated(self: Any, prompt: Any, params: Any, request_id: str, **named: Any) -> Any:
        if (note := turns.of_task()) is not None:
            note["tool" if request_id.startswith("0-") else "chat"] = (request_id, time.monotonic())
        return generate(self, prompt, params, request_id, **named)

    async def streamed(self: Any, prompt: Any, sampling: Any, *, priority: int = 1) -> Any:
        note = turns.of_task() if priority == 1 else None
        deltas = stream(self, prompt, sampling, priority=priority)
        try:
            async for delta in deltas:
                if note is not None and delta.text:
                    note["text"], note = time.monotonic(), None
                yield delta
        finally:
            await deltas.aclose()

    engine.stream, AsyncLLM.generate = streamed, generated


if __name__ == "__main__":
    _prepare()
    from yaptext.commands.main import run

    sys.exit(run(sys.argv[1:]))
