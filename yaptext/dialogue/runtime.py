"""The runtime: what every turn shares (engines, prompt builders, decider, sessions)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

import structlog
from cachetools import LRUCache
from msgspec import UNSET

from yaptext.dialogue import transcript
from yaptext.dialogue.chat_prompt import ChatPrompts, Limits, fit
from yaptext.dialogue.decision import Decider, NoDecider
from yaptext.dialogue.kept import KeptResponses
from yaptext.dialogue.layout import Layout
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.reply import reasoning_of
from yaptext.dialogue.session import Session
from yaptext.dialogue.session_store import SessionStore
from yaptext.dialogue.tools import ToolSet, ToolSets
from yaptext.dialogue.warmed import WarmedTranscripts
from yaptext.engine.base import Engine, Engines, Reasoning
from yaptext.errors import StartError, StartRefused
from yaptext.observe.metrics import Metrics
from yaptext.settings import Settings
from yaptext.wire.frames import (
    Ack,
    Forgotten,
    HistoryItem,
    Models,
    SessionState,
)

_log = structlog.get_logger(__name__)


class TurnObserver(Protocol):
    """What a benchmark registers. Each is called once for every turn, with its `dialogue.answer.Answer`."""

    def began(self, answer: Any) -> None:
        """The ack is out; in the turn's task, unless the turn is cut at once."""
        ...

    def decided(self, answer: Any) -> None:
        """The decision is out, and no text yet."""
        ...

    def ended(self, answer: Any) -> None:
        """Every engine has let go."""
        ...


@dataclass(slots=True)
class Runtime:
    settings: Settings
    engines: Engines
    sessions: SessionStore
    metrics: Metrics
    prompts: ChatPrompts | None
    decider: Decider | NoDecider | None
    plain_prompts: ChatPrompts | None = None
    """Of a client that sends its prompt itself, in roles."""
    reasoning: Reasoning | None = None
    """How the chat model's thinking is kept out of its replies, if it thinks."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """By token, of `CHAT_LOGIT_BIAS`."""
    prompt_facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By role: what prompts are made of, for `/status`."""
    warmed: WarmedTranscripts = field(default_factory=WarmedTranscripts)
    kept: KeptResponses = field(default_factory=KeptResponses)
    large_frames: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Shared by all sockets: its holder may read a long text in this round of the loop."""
    reply_schemas: LRUCache[str, None] = field(default_factory=lambda: LRUCache(256))
    """JSON schemas of replies that the engine takes."""
    observer: TurnObserver | None = None
    tool_sets: ToolSets = field(init=False)

    def __post_init__(self) -> None:
        self.tool_sets = ToolSets(self._check_tools)

    async def _check_tools(self, schema: str) -> None:
        if self.engines.tool is not None:
            await self.engines.tool.check_schema(schema)

    @classmethod
    async def open(
        cls, settings: Settings, engines: Engines, tools: ToolSet, sessions: SessionStore | None = None
    ) -> Runtime:
        """Learns the models' templates. `sessions` are new ones of the settings unless given."""
        prompts, plain_prompts, reasoning = None, None, None
        decider: Decider | NoDecider | None = None
        if engines.chat is not None:
            codec, limits, thinking = engines.chat.codec, Limits.of(settings), settings.chat_thinking
            prompts = await ChatPrompts.open(codec, settings.chat_prompt_format, limits, thinking=thinking)
            plain_prompts = await ChatPrompts.open(codec, "turns", limits, thinking=thinking, plain=True)
            reasoning = reasoning_of(settings.reasoning_parser, prompts.layout.thinking)
            _check_reasoning(engines.chat, reasoning)
        if engines.tool is not None:
            decider = Decider(
                engines.tool,
                tools,
                max_out=settings.tool_max_out,
                # The demo model takes what was said before for what is asked now.
                history_tokens=0 if engines.demo else settings.tool_history_tokens,
                timeout_s=settings.tool_timeout_s,
                threshold=settings.tool_yes_threshold,
            )
        elif engines.lacking is not None:
            decider = NoDecider(tools)
        sessions = SessionStore.of(settings) if sessions is None else sessions
        sessions.start()
        metrics = Metrics(old_names=settings.metrics_old_names)
        runtime = cls(settings, engines, sessions, metrics, prompts, decider, plain_prompts, reasoning)
        await runtime.describe_prompts()
        if engines.chat is not None:
            runtime.logit_bias = await _token_bias(engines.chat, settings.chat_logit_bias)
        return runtime

    @property
    def models(self) -> Models:
        chat, tool = self.engines.chat, self.engines.tool
        return Models(chat=chat.model if chat else None, tool=tool.model if tool else None)

    @property
    def history_bytes(self) -> int:
        """Most bytes of a client's transcript that are looked at: no script takes more for a token on average."""
        return max(4096, 8 * self.settings.history_max_tokens)

    @property
    def note_chars(self) -> int:
        """Most characters of a turn's note."""
        return 4 * self.settings.user_utt_max_tokens

    @property
    def utterance_chars(self) -> int:
        """Most characters of an utterance that are looked at."""
        return 16 * self.settings.user_utt_max_tokens

    def persona(self, session: Session) -> str:
        return session.persona.compose(self.settings.default_persona_style)

    async def check_persona(self, persona: Persona) -> None:
        """Raises `TextTooLong` for a text that is over its limit in tokens."""
        if self.prompts is not None and persona.text is not None:
            await self.prompts.check_persona(persona.text)

    def take_warmed(self, key_name: str, told: str) -> Sequence[transcript.Message]:
        """The messages of a history that was warmed, with their token ids. They are then no longer kept."""
        return self.warmed.take(key_name, told)

    def ack(
        self,
        what: Literal["start", "set_persona", "tool_result"],
        session: Session,
        persona: Persona,
        turn: int,
        seed: int,
        ignored: Sequence[str] = (),
    ) -> Ack:
        return Ack(
            for_=what,
            ok=True,
            session_id=session.session_id,
            turn=turn,
            seed=seed,
            now=datetime.now().astimezone().isoformat(timespec="seconds"),
            assistant_gender=persona.gender,
            persona_style=persona.style or self.settings.default_persona_style,
            persona_text_override=persona.text is not None,
            models=self.models,
            ignored=list(ignored) or UNSET,
        )

    async def utterance(self, text: str) -> str:
        """The beginning of an utterance, within `USER_UTT_MAX_TOKENS`."""
        return await self._beginning(text, self.settings.user_utt_max_tokens)

    async def tool_result(self, text: str) -> str:
        """The beginning of what a tool returned, within `TOOL_RESULT_MAX_TOKENS`."""
        return await self._beginning(text, self.settings.tool_result_max_tokens)

    async def _beginning(self, text: str, limit: int) -> str:
        engine = self.engines.chat or self.engines.tool
        assert engine is not None
        return await fit(engine.codec, text, limit, keep="start", exact=self.settings.exact_token_trim)

    @staticmethod
    def now() -> str:
        """The time as a prompt has it, for example `Sunday, 21:46`."""
        return datetime.now().strftime("%A, %H:%M")  # the host's local time is what is meant

    async def describe_prompts(self) -> None:
        """One line of the log for each role: what its prompts are made of."""
        if self.prompts is not None and self.engines.chat is not None:
            layout = self.prompts.layout
            facts: dict[str, Any] = {"format": self.prompts.format}
            self._tell_prompt("chat", facts | _facts(layout, self.reasoning), self.prompts.lacking)
            room = self.prompts.room
            wanted = self.settings.persona_max_tokens + self.settings.history_max_tokens
            if room < 64:
                raise StartRefused(
                    f"the chat model's context is {self.engines.chat.codec.max_model_len} tokens: CHAT_MAX_OUT and "
                    f"USER_UTT_MAX_TOKENS leave {max(room, 0)} to persona and history; lower them, or raise "
                    "CHAT_MAX_MODEL_LEN"
                )
            if room < wanted:
                _log.warning(
                    "prompt.narrow",
                    room=room,
                    wanted=wanted,
                    hint="CHAT_MAX_OUT, USER_UTT_MAX_TOKENS, PERSONA_MAX_TOKENS and HISTORY_MAX_TOKENS together exceed "
                    "the context: a long persona shortens the history",
                )
        if isinstance(self.decider, Decider):
            head = await self.decider.head()
            self._tell_prompt("tool", {"format": head.format} | _facts(head.layout, None), None)

    def _tell_prompt(self, role: str, facts: dict[str, Any], lacking: str | None) -> None:
        self.prompt_facts[role] = facts
        if lacking is not None:
            _log.warning("prompt.fallback", role=role, format=facts["format"], reason=lacking)
        _log.info("prompt.taken", role=role, **facts)

    def describe(self, key_name: str, session_id: str, session: Session | None) -> SessionState:
        """What a session is now, for its client."""
        known = session or Session((key_name, session_id))
        roles: dict[str, Literal["user", "assistant", "system"]] = {"user": "user", "assistant": "assistant"}
        return SessionState(
            session_id=session_id,
            known=session is not None,
            turns=known.turns,
            assistant_gender=known.persona.gender,
            user_identity=known.persona.identity,
            persona_style=known.persona.style,
            persona_text=known.persona.text,
            tools=None if known.tools is None else known.tools.names,
            history=[
                HistoryItem(roles.get(message.speaker, "system"), message.text) for message in known.transcript.messages
            ],
        )

    def forget(self, key_name: str, session_id: str) -> Awaitable[Forgotten]:
        """Erases a session everywhere: its turn ends, and nothing of it is kept in memory or in the session file. All
        of that is under way when this returns; what it returns waits until it is done."""
        session, erased = self.sessions.forget((key_name, session_id))
        known = [self.warmed.forget(key_name, session_id), self.kept.forget(key_name, session_id), session is not None]
        running = session.running if session is not None else []
        if session is not None and session.warming is not None:
            session.warming.cancel()
        for turn in running:
            turn.cancel()

        async def done() -> Forgotten:
            for turn in running:
                await turn.finished.wait()
            if erased is not None:
                await asyncio.shield(asyncio.wrap_future(erased))
            return Forgotten(session_id, any(known))

        return done()


def _facts(layout: Layout, reasoning: Reasoning | None) -> dict[str, Any]:
    parser = None if reasoning is None else reasoning.parser or f"{reasoning.start} {reasoning.end}"
    facts: dict[str, Any] = {"exact": layout.exact, "prefix_stable": layout.stable, "thinking": layout.thinking.word}
    return facts | ({"reasoning_parser": parser} if parser else {})


async def _token_bias(engine: Engine, by_text: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Raises `StartError` for a text that is not one token of the model."""
    found = []
    for text, bias in by_text.items():
        ids = await engine.codec.encode(text)
        if len(ids) != 1 or not -100 <= bias <= 100:
            raise StartRefused(
                f"CHAT_LOGIT_BIAS: {text!r} is {len(ids)} tokens of {engine.model}, bias {bias}; allowed are single "
                "tokens, and -100 to 100"
            )
        found.append((ids[0], bias))
    return tuple(found)


def _check_reasoning(engine: Engine, reasoning: Reasoning | None) -> None:
    """Raises `StartError` for a model whose thinking would be spoken."""
    if reasoning is None:
        return
    try:
        engine.check_reasoning(reasoning)
    except StartError as error:
        raise StartRefused(
            f"{engine.model} thinks before it speaks, and that cannot be kept out of its replies: {error}. Name vLLM's "
            "parser in REASONING_PARSER; with REASONING_PARSER=none thinking is sent like speech"
        ) from None
