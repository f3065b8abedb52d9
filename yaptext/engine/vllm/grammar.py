"""Schemas of clients' decisions, compiled before vLLM meets them, in a process that can be killed.

vLLM compiles grammars in a few threads of the engine's process: one that takes minutes stops everybody's decisions, and
cannot be stopped. What compiles here in time does so there.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import suppress

import structlog

from yaptext.engine.base import whose
from yaptext.errors import BadMessage, RateLimited

_log = structlog.get_logger(__name__)
COMPILE_S = 2.0
"""Seconds that one list of tools may take."""
KEY_S = 10.0
"""Seconds a minute that the lists of one key may take, and all of that at once."""
_START_S = 120.0


class GrammarCheck:
    """One process, started for the first schema, with the tokenizer of the engine whose decisions they are."""

    def __init__(self, tokenizer: str, vocab_size: int, *, compile_s: float = COMPILE_S, key_s: float = KEY_S) -> None:
        """`tokenizer` is a folder or hub id whose files are here, `vocab_size` the model's."""
        self._command = [sys.executable, "-m", "yaptext.engine.vllm.grammar", tokenizer, str(vocab_size)]
        self.compile_s, self._key_s = compile_s, key_s
        self._process: asyncio.subprocess.Process | None = None
        self._one = asyncio.Lock()
        self._left: dict[str, tuple[float, float]] = {}
        """By key: seconds that it had left, and when."""

    async def check(self, schema: str) -> None:
        """Raises `BadMessage` for a schema that takes too long or cannot be compiled, and `RateLimited` for a key whose
        lists recently took too long. If the process cannot start, that is logged, and all pass."""
        left = self._left_of(whose.get())
        if left <= 0:
            wait_s = -left * 60 / self._key_s + 1
            message = (
                f"new lists of tools took {self._key_s:g} s to compile within a minute, which is the limit of a key"
            )
            raise RateLimited(message, retry_after_ms=round(wait_s * 1000))
        async with self._one:
            process = await self._started()
            if process is None:
                return
            begun = time.monotonic()
            try:
                async with asyncio.timeout(self.compile_s):
                    problem = await self._ask(process, schema)
            except (TimeoutError, OSError) as error:
                await self._kill()
                problem = str(error) or f"takes more than {self.compile_s:g} s to compile: simpler schemas are needed"
            except BaseException:
                await self._kill()  # what it was asked for would be the next one's answer
                raise
            finally:
                now = time.monotonic()
                self._left[whose.get()] = (self._left_of(whose.get()) - (now - begun), now)
            if problem is not None:
                raise BadMessage(f"the grammar of the tools {problem} - at $.tools")

    async def aclose(self) -> None:
        await self._kill()

    def _left_of(self, key_name: str) -> float:
        left, at = self._left.get(key_name, (self._key_s, 0.0))
        return min(self._key_s, left + (time.monotonic() - at) * self._key_s / 60)

    async def _started(self) -> asyncio.subprocess.Process | None:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            environ = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=environ
                )
                async with asyncio.timeout(_START_S):
                    assert self._process.stdout is not None
                    if not await self._process.stdout.readline():
                        raise OSError("it ended at once")
            except (OSError, TimeoutError) as error:
                _log.warning("grammars.unchecked", error=str(error) or type(error).__name__)
                await self._kill()
                return None
        return self._process

    async def _ask(self, process: asyncio.subprocess.Process, schema: str) -> str | None:
        """What is wrong with it. Raises `OSError` if the process is gone."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(schema).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise ConnectionResetError("ended the process that compiles it")
        answer: str | None = json.loads(line)
        return answer

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _serve(tokenizer: str, vocab_size: int) -> None:
    """The process: a schema a line, as a JSON string; answers null, or what is wrong. Ends with its stdin."""
    import xgrammar
    from transformers import AutoTokenizer

    os.nice(10)
    known = AutoTokenizer.from_pretrained(tokenizer)
    info = xgrammar.TokenizerInfo.from_huggingface(known, vocab_size=vocab_size or None)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    print("ready", flush=True)
    for line in sys.stdin:
        answer = None
        try:
            compiler.compile_json_schema(json.loads(line), any_whitespace=False)
        except Exception as error:  # xgrammar raises RuntimeError and ValueError
            answer = f"cannot be made: {str(error).splitlines()[-1][:200]}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
