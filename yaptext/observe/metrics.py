"""Prometheus metrics of one service, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from yaptext.build import build
from yaptext.wire.frames import Timings, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000, 10_000, 30_000)

_SIZED_TURNS = 64


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        info = self._gauge("yaptext_build_info", "1, with version and commit of the code.", "version", "commit")
        info.labels(build().version, build().commit or "unknown").set(1)
        self.turns = self._counter("yaptext_turns", "Turns by outcome.", "outcome")
        self.decisions = self._counter("yaptext_decisions", "Decisions: yes, no, or why there was none.", "outcome")
        self.errors = self._counter("yaptext_errors", "Error frames by code.", "code")
        self.tokens = self._counter("yaptext_tokens", "Tokens by kind.", "kind")
        self.connections = self._gauge("yaptext_connections", "Open WebSockets.")
        self.sessions = self._gauge("yaptext_sessions", "Sessions remembered.")
        self.session_bytes = self._gauge("yaptext_session_bytes", "Memory that sessions take, estimated.")
        self.session_file_failing = self._gauge(
            "yaptext_session_file_failing", "1 while the session file cannot be written."
        )
        self.tasks = self._gauge("yaptext_tasks", "Tasks of the event loop.")
        ProcessCollector("yaptext", registry=self.registry)  # memory, files and CPU of this process, not of the engines
        self.engine_running = self._gauge("yaptext_engine_streams", "Streams an engine is busy with.", "engine")
        self.engine_requests = self._gauge("yaptext_engine_requests", "Requests an engine itself counts.", "engine")
        self.engine_kv_use = self._gauge("yaptext_engine_kv_use", "Share of the KV cache in use.", "engine")
        self.engine_backlog_ms = self._gauge("yaptext_engine_backlog_ms", "Milliseconds of waiting prompts.", "engine")
        self.engine_silent = self._gauge("yaptext_engine_silent", "1 while an engine does not answer.", "engine")
        self.reload_failed = self._gauge("yaptext_reload_failed", "1 while the last reload was refused.")
        self.connections_max = self._gauge("yaptext_connections_max", "WebSockets there may be now.")
        self.session_tokens = 0.0
        """Prompt and reply of a turn, the mean over recent ones: what a session keeps in the KV cache."""
        size = self._gauge("yaptext_session_tokens", "KV cache tokens of a session.")
        size.set_function(lambda: self.session_tokens)
        self._sized = 0
        self.running_turns = 0
        """Turns between their ack and their end."""
        self.tool_ms = self._histogram("yaptext_decision_ms", "Milliseconds of a decision.")
        self.ttft_ms = self._histogram("yaptext_ttft_ms", "Milliseconds from start to the first token.")
        self.total_ms = self._histogram("yaptext_turn_ms", "Milliseconds of a whole turn.")
        self.cancel_ms = self._histogram("yaptext_cancel_ms", "Milliseconds from a cancel to its done.")

    def turn(self, outcome: str, usage: Usage, timings: Timings) -> None:
        self.turns.labels(outcome).inc()
        if usage.prompt_tokens:
            self._sized = min(self._sized + 1, _SIZED_TURNS)
            self.session_tokens += (usage.prompt_tokens + usage.completion_tokens - self.session_tokens) / self._sized
        for histogram, value in (
            (self.tool_ms, timings.tool_ms),
            (self.ttft_ms, timings.ttft_ms),
            (self.total_ms, timings.total_ms),
        ):
            if value is not None:
                histogram.observe(value)
        for name, count in msgspec.structs.asdict(usage).items():
            self.tokens.labels(name.removesuffix("_tokens")).inc(count)

    def exposition(self, refresh: Callable[[], None]) -> bytes:
        """The text that Prometheus scrapes; `refresh` sets the gauges first."""
        refresh()
        return generate_latest(self.registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(name, meaning, buckets=_MS, registry=self.registry)

    def _counter(self, name: str, meaning: str, label: str) -> Counter:
        return Counter(name, meaning, [label], registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, registry=self.registry)
