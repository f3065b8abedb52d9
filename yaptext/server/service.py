"""The service: what requests share, what it knows of itself at one moment."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from yaptext.dialogue.runtime import Runtime
from yaptext.engine.base import Engine, Load
from yaptext.errors import EngineDead
from yaptext.server.access.accounts import Keys
from yaptext.server.access.sparing import Sparing
from yaptext.server.admission import Admission
from yaptext.server.lifecycle import Lifecycle, Phase, Reload
from yaptext.server.pending import PendingConnections
from yaptext.settings import Settings
from yaptext.wire.frames import Capacity


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What `/status` and the gauges say is read here, once."""

    phase: Phase
    silence: str | None
    silent: set[str]
    """Engines that do not answer, by role."""
    reload: Reload | None
    capacity: Capacity
    session_tokens: float
    sessions: int
    session_bytes: int
    session_file_failing: bool
    engines: dict[str, tuple[Engine, Load]]
    """By role."""


@dataclass(frozen=True, slots=True)
class Service:
    """What requests share; lives in the lifespan state."""

    settings: Settings
    runtime: Runtime
    admission: Admission
    pending: PendingConnections
    keys: Keys
    lifecycle: Lifecycle
    refusals: Sparing
    started_at: float

    async def alive(self) -> bool:
        try:
            for pulse in self.lifecycle.pulses:
                await pulse.check()
        except EngineDead:
            return False
        return self.lifecycle.phase != "dead"

    def snapshot(self) -> Snapshot:
        lifecycle, sessions = self.lifecycle, self.runtime.sessions
        return Snapshot(
            phase=lifecycle.phase,
            silence=lifecycle.silence,
            silent={pulse.role for pulse in lifecycle.pulses if pulse.silence is not None},
            reload=lifecycle.reload,
            capacity=self.admission.capacity,
            session_tokens=self.runtime.metrics.session_tokens,
            sessions=len(sessions),
            session_bytes=sessions.held.bytes,
            session_file_failing=sessions.file_failing,
            engines={role: (engine, engine.load()) for role, engine in self.runtime.engines.distinct.items()},
        )

    def refresh_gauges(self) -> None:
        now, metrics = self.snapshot(), self.runtime.metrics
        metrics.connections.set(now.capacity.active)
        metrics.sessions.set(now.sessions)
        metrics.session_bytes.set(now.session_bytes)
        metrics.session_file_failing.set(now.session_file_failing)
        metrics.tasks.set(len(asyncio.all_tasks()))
        metrics.connections_max.set(now.capacity.max)
        metrics.reload_failed.set(now.reload is not None and not now.reload.ok)
        for role, (_, load) in now.engines.items():
            metrics.engine_silent.labels(role).set(role in now.silent)
            metrics.engine_running.labels(role).set(load.running)
            metrics.engine_requests.labels(role).set(load.requests)
            metrics.engine_kv_use.labels(role).set(load.kv_use)
            metrics.backlog(role, load.backlog_ms)
