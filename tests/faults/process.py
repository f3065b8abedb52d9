"""`yap-text serve` as its own process, on an engine that fails as an utterance tells it to. Run, it is that process."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import journal
from websockets.sync.client import ClientConnection, connect

Frame = dict[str, Any]


class Process:
    """The process and what it wrote: `output` is stderr and stdout, whoever wrote there."""

    def __init__(self, popen: subprocess.Popen[bytes], file: Path, key: str) -> None:
        self.popen, self._file, self._key = popen, file, key
        self.http = ""

    @property
    def output(self) -> str:
        return self._file.read_text(encoding="utf-8", errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        return journal.events(self._file, name)

    def wait_ready(self) -> None:
        for _ in range(1800):
            assert self.popen.poll() is None, self.output[-3000:]
            for line in self.output.splitlines():
                if "server.ready" in line and (found := re.search(r"http://[\d.]+:\d+", line)):
                    self.http = found[0]
                    return
            time.sleep(0.1)
        raise AssertionError("not ready in three minutes")

    def connect(self, **options: Any) -> ClientConnection:
        headers = {"X-API-Key": self._key}
        return connect(f"ws{self.http[4:]}/ws", additional_headers=headers, proxy=None, legacy=True, **options)


@contextmanager
def serving(file: Path, command: Sequence[str], key: str, **variables: str) -> Iterator[Process]:
    environment = os.environ | {"PORT": "0", "YAP_TEXT_API_KEY": key, "LOG_FORMAT": "json"} | variables
    tests = Path(__file__).parents[1]
    paths = [environment.get("PYTHONPATH", ""), str(tests), str(tests.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with file.open("wb") as output:
        popen = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=file.parent, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Process(popen, file, key)
    finally:
        popen.kill()
        popen.wait()


def say(socket: ClientConnection, type: str, **fields: Any) -> None:
    socket.send(json.dumps({"type": type, **fields}))


def until(socket: ClientConnection, *types: str) -> list[Frame]:
    """Frames up to and with the first of one of the types."""
    frames: list[Frame] = []
    while not frames or frames[-1]["type"] not in types:
        frames.append(json.loads(socket.recv(timeout=120)))
    return frames


def turn(socket: ClientConnection, utterance: str, **fields: Any) -> list[Frame]:
    say(socket, "start", **{"session_id": "s", "user_utterance": utterance} | fields)
    return until(socket, "done", "error")


def _main() -> None:
    from fakes import Script, ScriptedEngine

    from yaptext.__main__ import main
    from yaptext.engine.base import CHAT, Delta, Engines, Sampling
    from yaptext.errors import EngineDead, EngineFailed
    from yaptext.observe import sinks

    decision = [os.environ.get("DECISION", "[]")]

    class Obedient(ScriptedEngine):
        """Fails in the way that the prompt names, and has the whole prompt in the words of the failure."""

        async def stream(
            self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT
        ) -> AsyncGenerator[Delta, None]:
            said = self.decode(prompt)
            last = said.rpartition("<|im_start|>user")[2]
            if sampling.json_schema is None or "DECIDE" in last:
                if "CRASH" in last:
                    try:
                        raise KeyError(said)
                    except KeyError as error:
                        raise ExceptionGroup(said, [ValueError(said)]) from error
                if "FAIL" in last:
                    raise EngineFailed("The engine failed on this request.")
                if "ASYNCIO" in last:
                    task = asyncio.create_task(self._crash(said))
                    await asyncio.wait([task])
                    del task
                    gc.collect()
                if "THREAD" in last:
                    await asyncio.to_thread(self._forget, said)
                if "MISLOG" in last:
                    logging.getLogger("vllm.engine").error("%d", said)
                    logging.getLogger("vllm.logging_utils.dump_input").error("Dumping scheduler output: %s", said)
                if "DIE" in last:
                    self.dead = True
                    raise EngineDead("The engine died.") from ValueError(said)
            self.decision = Script(decision if '"note"' in (sampling.json_schema or "") else ["[]"])
            async for delta in super().stream(prompt, sampling, priority=priority):
                yield delta

        def _forget(self, said: str) -> None:
            class Broken:
                def __del__(self) -> None:
                    raise ValueError(said)

            def crash() -> None:
                raise RuntimeError(said)

            Broken()
            thread = threading.Thread(target=crash)
            thread.start()
            thread.join()

        async def _crash(self, said: str) -> None:
            raise ValueError(said)

    engine = Obedient(chat=Script(os.environ.get("REPLY", "Hello there.").split()))
    sinks.FILE_PAUSE_S = 0.5
    vllm: Any = ModuleType("yaptext.engine.vllm.startup")

    def open_vllm(_: Any) -> Engines:
        if "OPENING" in os.environ:
            opening = Path(os.environ["OPENING"])  # a file that is there for as long as that takes
            opening.touch()
            while opening.exists():
                time.sleep(0.02)
        return Engines(engine, engine)

    vllm.open_vllm = open_vllm
    sys.modules["yaptext.engine.vllm.startup"] = vllm
    sys.argv[1:] = ["serve"]
    main()


if __name__ == "__main__":
    _main()
