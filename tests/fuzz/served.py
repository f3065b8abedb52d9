"""The service as its own process, as in production (uvloop, JSON log on stderr), on an engine that forgets what it
was asked. `/inside` tells what a leak would make grow. Settings come from the environment.

    PYTHONPATH=tests python tests/fuzz/served.py PORT_FD     writes the port there when it serves
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from documented import Documented
from fakes import Script, ScriptedCodec, ScriptedEngine
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from yaptext.engine.base import CHAT, Engines, Sampling
from yaptext.observe import logs
from yaptext.server.app import create_app
from yaptext.server.lifecycle import Lifecycle
from yaptext.server.process import Server
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)


async def _step() -> None:
    await asyncio.sleep(0)


class Characters(ScriptedCodec):
    """A token a character, and no memory."""

    async def encode(self, text: str, *, place: Any = "inside") -> list[int]:
        return list(map(ord, text))

    def show(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    async def clip(self, text: str, max_tokens: int, *, keep: Any) -> str:
        return "" if max_tokens <= 0 else text[:max_tokens] if keep == "start" else text[-max_tokens:]


class Forgetful(ScriptedEngine):
    """Keeps nothing. An utterance that begins with `flood` is answered at length."""

    def _use_cache(self, prompt: list[int], salt: str) -> int:
        return 0

    def stream(self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT) -> Any:
        self.requests.clear()
        if sampling.json_schema is None:
            said = "".join(map(chr, prompt[-4000:]))
            flood = "flood" in said.rpartition("user\n")[2]
            self.chat = Script(("x" * 4000,) * 4000 if flood else ("Hello", " there", "."), pace=_step)
        return super().stream(prompt, sampling, priority=priority)


async def inside(request: Request) -> Response:
    """Tasks, files, memory, sessions and connections, now."""
    service = request.state.service
    gc.collect()
    return JSONResponse(
        {
            "tasks": len(asyncio.all_tasks()),
            "files": len(os.listdir("/proc/self/fd")),
            "rss_mb": _memory_mb("VmRSS:"),
            "peak_mb": _memory_mb("VmHWM:"),
            "sessions": len(service.runtime.sessions),
            "connections": len(service.admission.slots),
            "running": service.runtime.engines.chat.running,
        }
    )


def _memory_mb(name: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) / 1024


class Logged(Documented):
    """What the service sends that its documents do not allow is a fault in its log."""

    def note(self, what: str, fault: str | None) -> None:
        if fault is not None:
            _log.error("answer.undocumented", what=what, fault=fault[:500])


class Told(Server):
    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets=sockets)
        with os.fdopen(int(sys.argv[1]), "w") as pipe:
            pipe.write(f"{self.bound_port}\n")


def main() -> None:
    logs.configure(level="info", format="json", journald=False)
    settings = Settings.load(PORT=0)
    lifecycle = Lifecycle()
    engine = Forgetful(codec=Characters(max_model_len=32_768))
    app = create_app(settings, open_engines=lambda _: Engines(chat=engine, tool=engine), lifecycle=lifecycle)
    app.routes.append(Route("/inside", inside))
    Told(Logged(app), settings, lifecycle).run()


if __name__ == "__main__":
    main()
