"""Prometheus metrics of one service, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from yaptext.build import build
from yaptext.wire.frames import Timings, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
"""Seconds: the buckets of `vllm:time_to_first_token_seconds` and of OpenTelemetry's
`gen_ai.server.time_to_first_token`, so that one panel shows the service and its engine."""
_LONG = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
"""Seconds: the buckets of `gen_ai.server.request.duration`."""
_OLD_MS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000, 10_000, 30_000)

_SIZED_TURNS = 64

_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class Time:
    """A histogram in seconds, and the one in milliseconds that it replaced, if there was one."""

    def __init__(self, seconds: Histogram, old: Histogram | None) -> None:
        self._seconds, self._old = seconds, old

    def observe(self, ms: float) -> None:
        self._seconds.observe(ms / 1000)
        if self._old is not None:
            self._old.observe(ms)


class Metrics:
    """`old_names` also exposes times in milliseconds, under their old names."""

    def __init__(self, *, old_names: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._old = self.registry if old_names else None
        self.documented: list[tuple[str, Sequence[str], str]] = []
        """Name, labels and meaning of each: the table in README.md."""
        info = self._add(Gauge, "build_info", "Always 1; the labels name the code.", "version", "commit")
        info.labels(build().version, build().commit or "unknown").set(1)
        self.turns = self._add(Counter, "turns", "Turns, by outcome.", "outcome")
        self.decisions = self._add(Counter, "decisions", "Decisions: yes, no, or why there is none.", "outcome")
        self.errors = self._add(Counter, "errors", "Error frames, by code.", "code")
        self.tokens = self._add(Counter, "tokens", "Tokens, by kind: the fields of `usage`.", "kind")
        self.connections = self._add(Gauge, "connections", "Open WebSockets.")
        self.connections_max = self._add(Gauge, "connections_max", "WebSockets that are allowed now.")
        self.sessions = self._add(Gauge, "sessions", "Sessions in memory.")
        self.session_bytes = self._add(Gauge, "session_bytes", "Memory of all sessions in bytes, an estimate.")
        self.session_tokens = 0.0
        """Prompt and reply of a turn, the mean over recent ones: what a session keeps in the KV cache."""
        size = self._add(Gauge, "session_tokens", "Tokens of a session in the KV cache, a mean of recent turns.")
        size.set_function(lambda: self.session_tokens)
        self._sized = 0
        self.session_file_failing = self._add(Gauge, "session_file_failing", "1 while saving the session file fails.")
        self.tasks = self._add(Gauge, "tasks", "Tasks of the event loop.")
        ProcessCollector("yaptext", registry=self.registry)  # memory, files and CPU of this process, not of the engines
        self.engine_running = self._add(Gauge, "engine_streams", "Streams that an engine generates.", "engine")
        self.engine_requests = self._add(Gauge, "engine_requests", "Requests that an engine counts itself.", "engine")
        self.engine_kv_use = self._add(Gauge, "engine_kv_use", "Share of the KV cache in use, 0 to 1.", "engine")
        self._backlog = self._add(Gauge, "engine_backlog_seconds", "Time to compute the waiting prompts.", "engine")
        self._backlog_ms = Gauge("yaptext_engine_backlog_ms", "Old name.", ["engine"], registry=self._old)
        self.engine_silent = self._add(Gauge, "engine_silent", "1 while an engine does not answer.", "engine")
        self.reload_failed = self._add(Gauge, "reload_failed", "1 if the last reload was refused.")
        self.running_turns = 0
        """Turns between their ack and their end."""
        self.tool_ms = self._time("decision", "Time of a decision.", _SHORT, old="decision")
        self.ttft_ms = self._time("time_to_first_token", "Time from `start` to the first token.", _SHORT, old="ttft")
        self.total_ms = self._time("turn", "Time of a whole turn.", _LONG, old="turn")
        self.cancel_ms = self._time("cancel", "Time from `cancel` to its `done`.", _SHORT, old="cancel")

    def turn(self, outcome: str, usage: Usage, timings: Timings) -> None:
        self.turns.labels(outcome).inc()
        if usage.prompt_tokens:
            self._sized = min(self._sized + 1, _SIZED_TURNS)
            self.session_tokens += (usage.prompt_tokens + usage.completion_tokens - self.session_tokens) / self._sized
        for time, ms in (
            (self.tool_ms, timings.tool_ms),
            (self.ttft_ms, timings.ttft_ms),
            (self.total_ms, timings.total_ms),
        ):
            if ms is not None:
                time.observe(ms)
        for name, count in msgspec.structs.asdict(usage).items():
            self.tokens.labels(name.removesuffix("_tokens")).inc(count)

    def backlog(self, role: str, ms: float) -> None:
        self._backlog.labels(role).set(ms / 1000)
        self._backlog_ms.labels(role).set(ms)

    def exposition(self, refresh: Callable[[], None]) -> bytes:
        """The text that Prometheus scrapes; `refresh` sets the gauges first."""
        refresh()
        return generate_latest(self.registry)

    def _add(self, kind: type[_Kind], name: str, meaning: str, *labels: str) -> _Kind:
        self.documented.append((f"yaptext_{name}" + "_total" * (kind is Counter), labels, meaning))
        return kind(f"yaptext_{name}", meaning, labels, registry=self.registry)

    def _time(self, name: str, meaning: str, buckets: Sequence[float], *, old: str | None = None) -> Time:
        self.documented.append((f"yaptext_{name}_seconds", (), meaning))
        seconds = Histogram(f"yaptext_{name}_seconds", meaning, buckets=buckets, registry=self.registry)
        if old is None:
            return Time(seconds, None)
        return Time(seconds, Histogram(f"yaptext_{old}_ms", "Old name.", buckets=_OLD_MS, registry=self._old))
