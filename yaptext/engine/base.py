"""The Engine protocol: token ids in, deltas of text out. Nothing of vLLM is known here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

Role = Literal["chat", "tool"]
DECIDE, CHAT, WARM = 0, 1, 2
"""Priorities: a lower number is computed first. A decision never waits behind chat tokens, and nobody who is waiting
behind what is only warmed."""


Place = Literal["start", "after", "inside"]
"""Where a text stands that is encoded by itself: at the start of a prompt, after a control token, or after other text.
Some tokenizers put a space before the first two."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a template says of thinking. `switched`: it has a switch; `on`: the model may think, as far as the template
    decides that. `start` and `end` stand around the thinking, empty if the template knows of none. `opened`: a prompt
    ends after `start`."""

    switched: bool = False
    on: bool = False
    start: str = ""
    end: str = ""
    opened: bool = False

    @property
    def word(self) -> str:
        """none, off, on, or always: on without a switch."""
        return ("on" if self.on else "off") if self.switched else ("always" if self.on else "none")


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How thinking is separated from speech in a model's output: by vLLM's `parser`, or between `start` and `end`
    if that is None. `opened`: the prompt ends after `start`."""

    parser: str | None = None
    start: str = ""
    end: str = ""
    opened: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request is sampled. `json_schema` constrains the text to compact JSON of that schema, without
    white space between its parts. `top_k=0` is off. `alternatives` asks for that many of each token's likeliest.
    `stop` and `stop_ids` end the text, and are no part of it. `reasoning` keeps thinking out of the text.
    Prompts of different `cache_salt` find nothing of each other in the prefix cache."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    reasoning: Reasoning | None = None
    json_schema: str | None = None
    alternatives: int = 0
    cache_salt: str = ""


class Delta(msgspec.Struct, frozen=True):
    """What one engine step added to one stream. `text` may be empty (half a character), `tokens` may be more
    than one; `finish_reason` is set on the last. The prompt counts are the same on every delta. `alternatives` holds,
    where they were asked for, each token's likeliest texts with their probability under the constraint. `reasoning` is
    how many of `tokens` are thinking, whose text is left out."""

    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str | None = None
    alternatives: Sequence[dict[str, float]] = ()
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is busy with. `running` counts streams that are open now, `begun` all so far. As the engine saw it
    at its last step: `kv_use`, the share of the KV cache in use (0 to 1), and `requests`, those it runs or has waiting.
    `backlog_ms` is the time that prompts which wait for their first token take at `prefill_tokens_per_s`, the best of
    late."""

    running: int
    kv_use: float
    requests: int
    begun: int = 0
    backlog_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0


whose: ContextVar[str] = ContextVar("whose", default="")
"""The name of the key that work is done for: no key's work takes all threads."""


class Codec(Protocol):
    """The text side of one model: its tokenizer and its chat template."""

    max_model_len: int
    """Most tokens of a prompt and its reply together."""
    block_size: int
    """Tokens that the prefix cache shares as one unit."""

    leading: list[int]
    """What the tokenizer puts before a text that no template wraps: the token for its beginning, or nothing."""
    end_ids: list[int]
    """Tokens that end a reply by the model's own configuration."""
    has_template: bool
    ticks: bool
    """Whether the template says the time of day: then no two prompts begin alike."""
    bounded_by_bytes: bool
    """True if no text takes more tokens than it has bytes in UTF-8."""

    @property
    def day(self) -> tuple[str, ...]:
        """What the template says of the date now. What was rendered under another value is out of date."""
        ...

    async def encode(self, text: str, *, place: Place = "inside") -> list[int]:
        """Token ids of `text` alone, nothing added. Control tokens written out in it are text."""
        ...

    async def encode_all(self, texts: Sequence[str], *, place: Place = "inside") -> list[list[int]]:
        """The same of many texts, each by itself."""
        ...

    async def clip(self, text: str, max_tokens: int, *, keep: Literal["start", "end"]) -> str:
        """The longest start or end of `text` that takes at most `max_tokens` tokens."""
        ...

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        reply: bool = True,
        thinking: bool = False,
    ) -> str | None:
        """The model's chat template over `messages`, with `reply` ready for one, with `thinking` asked to think if it
        has a switch for that; None where it has no template or the template refuses these roles."""
        ...

    def thinking(self, wanted: bool) -> Thinking:
        """What the template says of thinking if that is asked for, or not."""
        ...

    def disguise(self, text: str) -> str:
        """`text` with its control tokens made such that `split` takes them for text, and gives them back as they
        were: for contents that are to be rendered."""
        ...

    def split(self, rendered: str) -> list[int | str]:
        """What a template has rendered: its control tokens, and the texts between them."""
        ...

    async def encode_rendered(self, rendered: str) -> list[int]:
        """Token ids of what a template has rendered, as the tokenizer itself reads it; what was disguised is text."""
        ...

    def show(self, ids: Sequence[int]) -> str:
        """The text of the ids, control tokens included."""
        ...


class Engine(Protocol):
    """One model, ready to stream. One object serves all turns of its roles, on one event loop."""

    codec: Codec
    """The model's tokenizer and template. It is local, wherever the model itself runs."""
    model: str
    """The name or folder it was opened from, for people."""
    weights: str
    """The kind of weights: float, fp8, awq or gptq."""
    cache_tokens: int
    """Tokens that the KV cache holds, of running and of earlier requests."""

    def stream(self, prompt: Sequence[int], sampling: Sampling, *, priority: int = CHAT) -> AsyncGenerator[Delta, None]:
        """The deltas of one reply to the token ids of `prompt`; the last one has a `finish_reason`.

        Called for each decision, reply and warmed prefix, many at a time; nothing is sent before the first delta is
        awaited. To close the generator, or to cancel the task that reads it, aborts the request: when that returns,
        nothing of it runs on. Raises `EngineFailed` if this request fails and others may succeed (a prompt over the
        context), `EngineUnavailable` if none can succeed before the engine is back, `EngineDead` if none ever can.
        """
        ...

    def load(self) -> Load:
        """Called at every admission, by each probe and for each look at the metrics: it answers at once, by what is
        known here, and raises nothing."""
        ...

    async def check_schema(self, schema: str) -> None:
        """Called once for each list of tools that a client brings, before the first decision with it; it may take
        seconds. Raises `BadMessage` for a schema of decisions that takes this engine too long to compile, and
        `RateLimited` for a key whose schemas have recently taken too much."""
        ...

    def check_reasoning(self, reasoning: Reasoning) -> None:
        """Called once, at the start, for a chat model that thinks. Raises `StartError` if this engine cannot tell such
        thinking from speech."""
        ...

    async def check(self) -> None:
        """Called twice a second, and for each question about the service's health: it asks nothing of the model. Raises
        `EngineUnavailable` while the engine is away: until a check succeeds, the service is not ready. Raises
        `EngineDead` if the engine cannot work any more, which ends the process. Anyone may read their messages; the
        cause is in their notes (`add_note`), which the log gets."""
        ...

    async def aclose(self, *, at_once: bool = False) -> None:
        """Called once, at the end, when no stream is read any more. `at_once`: an engine died, and its process is
        not waited for."""
        ...


async def exhaust(stream: AsyncGenerator[Delta, None]) -> Delta | None:
    """Reads a stream to its end, for what that leaves in the cache; returns the last delta."""
    last = None
    async with aclosing(stream) as deltas:
        async for delta in deltas:
            last = delta
    return last


@dataclass(frozen=True, slots=True)
class Engines:
    """The deployed engines. Both names may refer to one object (a shared engine). `lacking` says why a deployed tool
    engine is not among them (`TOOL_OPTIONAL`)."""

    chat: Engine | None
    tool: Engine | None
    awq: bool = False
    demo: bool = False
    lacking: str | None = None

    @property
    def distinct(self) -> dict[str, Engine]:
        """Each engine once, by the roles it serves: `{"chat": ..., "tool": ...}` or `{"chat+tool": ...}`."""
        if self.chat is not None and self.chat is self.tool:
            return {"chat+tool": self.chat}
        named = {"chat": self.chat, "tool": self.tool}
        return {role: engine for role, engine in named.items() if engine is not None}
