"""ScriptedEngine: an Engine that says what a test sets, and counts what was opened and aborted."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from yaptext.engine.base import CHAT, Codec, Delta, Load, Place, Reasoning, Sampling, Thinking
from yaptext.errors import EngineDead, EngineFailed, EngineUnavailable

_SPECIAL = re.compile(r"(<\|im_start\|>|<\|im_end\|>)")
_DISGUISE = "\ufffe"
_PIECES = re.compile(r" ?\w{1,6}| ?[^\w\s]|\s")

Pace = Callable[[], Awaitable[None]]


async def at_once() -> None:
    """A pace without pauses."""


@dataclass
class Script:
    """What one kind of request is answered with: pieces of text, one a step, then an error or a finish. `alternatives`
    are told piece by piece; `calls` are the pieces where the grammar allows no empty list."""

    pieces: Sequence[str] = ("Hello", " there", ".")
    pace: Pace = at_once
    error: Exception | None = None
    finish: str = "stop"
    alternatives: Sequence[dict[str, float]] = ()
    calls: Sequence[str] | None = None


@dataclass
class ScriptedCodec:
    """A tokenizer that gives each new piece of text the next number, and templates in the manner of ChatML."""

    max_model_len: int = 4096
    block_size: int = 16
    leading: list[int] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    ticks: bool = False
    bounded_by_bytes: bool = True
    says: tuple[str, ...] = ()
    """What its template says of the date."""
    template: Literal["chatml", "tools", "no-system", "none"] = "chatml"

    def __post_init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []

    def _pieces(self, text: str, special: bool) -> list[str]:
        parts = _SPECIAL.split(text) if special else [text]
        found: list[str] = []
        for part in parts:
            found += [part] if special and _SPECIAL.fullmatch(part) else _PIECES.findall(part)
        return found

    async def encode(self, text: str, *, place: Place = "inside") -> list[int]:
        return self._ids_of(self._pieces(text, False))

    async def encode_rendered(self, rendered: str) -> list[int]:
        parts = self.split(rendered)
        return [i for part in parts for i in ([part] if isinstance(part, int) else await self.encode(part))]

    def split(self, rendered: str) -> list[int | str]:
        parts = [part for part in _SPECIAL.split(rendered) if part]
        return [self._ids_of([p])[0] if _SPECIAL.fullmatch(p) else p.replace(_DISGUISE, "") for p in parts]

    def disguise(self, text: str) -> str:
        return _SPECIAL.sub(lambda found: found[0][:1] + _DISGUISE + found[0][1:], text)

    def show(self, ids: Sequence[int]) -> str:
        return "".join(self._texts[token] for token in ids)

    def thinking(self, wanted: bool) -> Thinking:
        return Thinking()

    @property
    def has_template(self) -> bool:
        return self.template != "none"

    @property
    def day(self) -> tuple[str, ...]:
        return self.says

    def _ids_of(self, pieces: Iterable[str]) -> list[int]:
        ids = []
        for piece in pieces:
            if piece not in self._ids:
                self._ids[piece] = len(self._texts)
                self._texts.append(piece)
            ids.append(self._ids[piece])
        return ids

    async def encode_all(self, texts: Sequence[str], *, place: Place = "inside") -> list[list[int]]:
        return [await self.encode(text, place=place) for text in texts]

    async def clip(self, text: str, max_tokens: int, *, keep: Literal["start", "end"]) -> str:
        pieces = self._pieces(text, False)
        if max_tokens <= 0:
            return ""
        return "".join(pieces[:max_tokens] if keep == "start" else pieces[-max_tokens:])

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        reply: bool = True,
        thinking: bool = False,
    ) -> str | None:
        if self.template == "none":
            return None
        if self.template == "no-system" and messages[0]["role"] == "system":
            return None
        opening = ""
        if self.template == "tools" and tools is not None:
            names = ", ".join(tool["function"]["name"] for tool in tools)
            opening = f"<|im_start|>system\nYou may call {names}.<|im_end|>\n"
        told = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return f"{opening}{told}" + ("<|im_start|>assistant\n" if reply else "")


@dataclass
class ScriptedEngine:
    """`chat` answers free text, `decision` answers requests with a JSON schema. It keeps the rules of the Engine
    protocol: a prefix cache in whole blocks, `max_tokens`, `stop`, errors for prompts that are too long."""

    chat: Script = field(default_factory=Script)
    aborting: Pace = at_once
    """How long an abort takes."""
    decision: Script = field(default_factory=lambda: Script(("[]",)))
    codec: Codec = field(default_factory=ScriptedCodec)
    model: str = "scripted"
    weights: str = "float"
    cache_tokens: int = 100_000
    backlog_ms: float = 0.0
    requests: list[tuple[list[int], Sampling, int]] = field(default_factory=list)
    running: int = 0
    finished: int = 0
    aborted: int = 0
    dead: bool = False
    away: str = ""
    """Why it cannot be reached, for the log."""
    closed: bool = False
    hurried: bool = False

    def __post_init__(self) -> None:
        self._cache: set[tuple[str, tuple[int, ...]]] = set()

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT
    ) -> AsyncGenerator[Delta, None]:
        self.requests.append((list(prompt), sampling, priority))
        script = self.decision if sampling.json_schema is not None else self.chat
        if sampling.json_schema is not None and "const" in (schema := json.loads(sampling.json_schema)):
            script = Script(list(json.dumps(schema["const"], separators=(",", ":"))))
        if sampling.json_schema is not None and script.calls is not None and '"minItems":1' in sampling.json_schema:
            script = replace(script, pieces=script.calls, alternatives=())
        await self.check()
        if len(prompt) + 1 > self.codec.max_model_len:
            raise EngineFailed(f"The prompt is {len(prompt)} tokens; limit is {self.codec.max_model_len - 1}")
        cached = self._use_cache(list(prompt), sampling.cache_salt)
        self.running += 1
        done = False
        text = ""
        try:
            for number, scripted in enumerate(script.pieces, 1):
                piece = scripted
                await script.pace()
                await self.check()
                text += piece
                last = number == len(script.pieces) and script.error is None
                finish = script.finish if last else None
                for stop in sampling.stop:
                    if stop in text:
                        piece, finish = piece[: max(0, len(piece) - len(text) + text.index(stop))], "stop"
                if finish is None and number >= sampling.max_tokens:
                    finish = "length"
                done = finish is not None
                told = script.alternatives[number - 1 : number] if sampling.alternatives else ()
                yield Delta(piece, 1, len(prompt), cached, finish, told)
                if done:
                    return
            if script.error is not None:
                done = True
                raise script.error
        finally:
            if not done:
                await self.aborting()
            self.running -= 1
            self.finished += done
            self.aborted += not done

    def _use_cache(self, prompt: list[int], salt: str) -> int:
        """Tokens of `prompt` found in the cache under the salt; like vLLM never all of them, and in whole blocks."""
        size = self.codec.block_size
        ends = range(size, len(prompt) + 1, size)
        hit = 0
        for end in ends:
            if (salt, tuple(prompt[:end])) in self._cache and end < len(prompt):
                hit = end
        self._cache.update((salt, tuple(prompt[:end])) for end in ends)
        return hit

    async def check_schema(self, schema: str) -> None:
        pass

    def check_reasoning(self, reasoning: Reasoning) -> None:
        pass

    def decode(self, ids: Sequence[int]) -> str:
        """For tests: the text that a prompt's ids stand for."""
        return self.codec.show(ids)

    def load(self) -> Load:
        load = Load(self.running, 0.5 if self.running else 0.0, self.running, begun=len(self.requests))
        return replace(load, backlog_ms=self.backlog_ms)

    async def check(self) -> None:
        if self.dead:
            raise EngineDead("The engine died.")
        if self.away:
            error = EngineUnavailable("The model server does not answer.")
            error.add_note(self.away)
            raise error

    async def aclose(self, *, at_once: bool = False) -> None:
        self.closed, self.hurried = True, at_once


class Gate:
    """A pace that a test opens step by step: `await gate.step()` lets one delta through."""

    def __init__(self) -> None:
        self._permits = asyncio.Semaphore(0)
        self.waiting = 0

    async def __call__(self) -> None:
        self.waiting += 1
        try:
            await self._permits.acquire()
        finally:
            self.waiting -= 1

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._permits.release()


class TokenizedEngine(ScriptedEngine):
    """With the tokenizer and template of a real codec, and no memory of what it was asked: for measuring the service
    in front of it."""

    def __init__(self, codec: Codec, chat: Script | None = None) -> None:
        super().__init__(chat or Script(), codec=codec)

    def _use_cache(self, prompt: list[int], salt: str) -> int:
        return 0

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT
    ) -> AsyncGenerator[Delta, None]:
        self.requests.clear()
        await asyncio.sleep(0)  # no engine answers in the step of the loop that asks it
        async with aclosing(super().stream(prompt, sampling, priority=priority)) as deltas:
            async for delta in deltas:
                yield delta
