"""The stage: what every turn shares (engines, prompt builders, decider, sessions)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, TypeVar

import msgspec
import structlog
from msgspec import UNSET, UnsetType

from yaptext.dialogue import transcript
from yaptext.dialogue.chat_prompt import ChatPrompts, Limits, fit
from yaptext.dialogue.decision import Decider, NoDecider
from yaptext.dialogue.layout import Layout
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.reply import reasoning_of
from yaptext.dialogue.session import Session, SessionStore
from yaptext.dialogue.tools import ToolSet, ToolSets
from yaptext.dialogue.warmed import Warm, WarmedTranscripts
from yaptext.engine.base import WARM, Engine, Engines, Reasoning, Sampling, exhaust
from yaptext.errors import (
    BadMessage,
    EngineFailed,
    NotDeployed,
    StartError,
    StartRefused,
    TextTooLong,
    UnknownPersona,
    WireError,
)
from yaptext.observe.metrics import Metrics
from yaptext.settings import Settings
from yaptext.wire.frames import (
    Ack,
    Forgotten,
    HistoryItem,
    Models,
    PersonaFields,
    SamplingFields,
    SessionState,
    Start,
    Warmed,
    WarmHistory,
    WarmPersona,
)

_log = structlog.get_logger(__name__)
_TEMPERATURE = 0.8
_PRIMED_BATCHES = (1, 2, 3, 6, 12, 16, 24, 32, 40, 48, 65, 80)
"""On CUDA vLLM compiles its seeded sampling kernels at the first batch of each size class, seconds in which every
stream stands still (3.3 s at 32 sessions, measured on an H200): these batches meet them all before READY."""
_PRIMED_SAMPLINGS = (
    (None, _PRIMED_BATCHES),
    (SamplingFields(temperature=0), (1, 3, 24)),
    (SamplingFields(top_k=0), (1, 3, 24)),
    (SamplingFields(top_p=1), (1, 3, 24)),
    (SamplingFields(top_k=0, top_p=1, min_p=0, repetition_penalty=1), (1, 3, 24)),
)
"""What a client may turn off takes other kernels. A turn always has a seed."""
_REFRESH_S = 30.0
_REWARM_WITHIN_S, _REWARM_SHARE, _REWARM_PAUSE_S = 600.0, 0.5, 0.02
"""Who spoke that long before a restart may well come back (a cold start takes minutes). The other half of the cache is
for who comes anew."""
_ITEM_BYTES, _NAME_CHARS = 64, 64
_HEARD_CHARS = 65_536
_NEXT_AFTER_S, _STEP_TOKENS = 0.1, 64
"""A turn that follows at once is not to wait for warming; one engine step cannot be interrupted, so each is small."""


@dataclass(frozen=True, slots=True)
class Told:
    """A history as a client sent it: `text` finds it again, `size` is its length in characters."""

    messages: list[transcript.Message]
    text: str

    @property
    def size(self) -> int:
        return len(self.text)


_Frame = TypeVar("_Frame", bound=PersonaFields)


@dataclass(slots=True)
class Stage:
    settings: Settings
    engines: Engines
    sessions: SessionStore
    metrics: Metrics
    prompts: ChatPrompts | None
    decider: Decider | NoDecider | None
    reasoning: Reasoning | None = None
    """How the chat model's thinking is kept out of its replies, if it thinks."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """By token, of `CHAT_LOGIT_BIAS`."""
    prompt_facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By role: what prompts are made of, for `/status`."""
    warmed: WarmedTranscripts = field(default_factory=WarmedTranscripts)
    large_frames: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of all sockets: who holds it may read one in this round of the loop."""
    tool_sets: ToolSets = field(init=False)

    def __post_init__(self) -> None:
        self.tool_sets = ToolSets(self._check_tools)

    async def _check_tools(self, schema: str) -> None:
        if self.engines.tool is not None:
            await self.engines.tool.check_schema(schema)

    @classmethod
    async def open(
        cls, settings: Settings, engines: Engines, tools: ToolSet, sessions: SessionStore | None = None
    ) -> Stage:
        """Learns the models' templates. `sessions` are new ones of the settings unless given."""
        prompts, reasoning = None, None
        decider: Decider | NoDecider | None = None
        if engines.chat is not None:
            prompts = await ChatPrompts.open(
                engines.chat, settings.chat_prompt_format, Limits.of(settings), thinking=settings.chat_thinking
            )
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
        stage = cls(settings, engines, sessions, Metrics(), prompts, decider, reasoning)
        await stage.describe_prompts()
        if engines.chat is not None:
            stage.logit_bias = await _token_bias(engines.chat, settings.chat_logit_bias)
        return stage

    async def prime(self) -> None:
        """Throw-away decisions and replies, so that the first user finds both engines, the fixed tool prompt and every
        kernel warm."""
        cuda = self.settings.on_cuda
        if self.decider is not None:
            await self.decider.prime(_PRIMED_BATCHES if cuda else (1,))
        if self.engines.chat is not None and self.prompts is not None:
            prompt = await self.prompts.turn(self.persona(Session(("", ""))), [], "Hello!", self.now())
            for fields, batches in _PRIMED_SAMPLINGS if cuda else ((None, (1,)),):
                sampling = self.sampling(fields, 7, 12)
                for size in batches:
                    streams = [self.engines.chat.stream(prompt, sampling) for _ in range(size)]
                    await asyncio.gather(*map(exhaust, streams))

    async def keep_warm(self) -> None:
        """Keeps the fixed tool prompt in the cache, for ever."""
        while self.decider is not None:
            await asyncio.sleep(_REFRESH_S)
            with suppress(EngineFailed):  # the next decision, or the watch over the engines, tells
                await self.decider.refresh()

    @property
    def models(self) -> Models:
        chat, tool = self.engines.chat, self.engines.tool
        return Models(chat=chat.model if chat else None, tool=tool.model if tool else None)

    @property
    def history_bytes(self) -> int:
        """Most bytes of a client's transcript that are looked at: no script takes more for a token on average."""
        return max(4096, 8 * self.settings.history_max_tokens)

    def reply_tokens(self, given: SamplingFields | None) -> int:
        """Most tokens of a reply that are spoken."""
        wanted = given.max_tokens if given is not None else None
        return wanted or self.settings.chat_max_out

    @property
    def note_chars(self) -> int:
        """Most characters of a turn's note."""
        return 4 * self.settings.user_utt_max_tokens

    @property
    def utterance_chars(self) -> int:
        """Most characters of an utterance that are looked at."""
        return 16 * self.settings.user_utt_max_tokens

    def bounded(self, frame: _Frame) -> _Frame:
        """The frame with no more of its texts than is ever looked at: it may wait, and what waits is kept. Raises
        `BadMessage`, and `TextTooLong` for a text that is over its limit in tokens, however few it takes."""
        limit = 16 * self.settings.persona_max_tokens
        if isinstance(frame.persona_text, str) and len(frame.persona_text) > limit:
            raise TextTooLong(f"persona_text is {len(frame.persona_text)} characters; limit is {limit}")
        changes: dict[str, Any] = {}
        if isinstance(frame, Start):
            if frame.note is not None and len(frame.note) > self.note_chars:
                raise TextTooLong(f"note is {len(frame.note)} characters; limit is {self.note_chars} - at $.note")
            if frame.user_utterance is not None:
                changes["user_utterance"] = frame.user_utterance[: self.utterance_chars]
            if frame.heard_text is not None:
                changes["heard_text"] = frame.heard_text[:_HEARD_CHARS]
        if isinstance(frame, Start | WarmHistory):
            text, items = frame.history_text, frame.history
            if isinstance(text, str) and isinstance(items, list):
                raise BadMessage("history and history_text say two things; send one - at $.history")
            if isinstance(text, str):
                changes["history_text"] = transcript.recent(text, self.history_bytes)
            if isinstance(items, list):
                changes["history"] = _latest(items, self.history_bytes)
        return msgspec.structs.replace(frame, **changes) if changes else frame

    def persona(self, session: Session) -> str:
        return session.persona.compose(self.settings.default_persona_style)

    async def check_persona(self, persona: Persona) -> None:
        """Raises `TextTooLong` for a text that is over its limit in tokens."""
        if self.prompts is not None and persona.text is not None:
            await self.prompts.check_persona(persona.text)

    def told(self, frame: Start | WarmHistory) -> Told | None:
        """The history of a bounded frame, in whatever form; None if it has none."""
        text, items = frame.history_text, frame.history
        if isinstance(items, list):
            return Told(transcript.of_items(items), msgspec.json.encode(items).decode())
        if isinstance(text, str):
            messages = transcript.parse(text)
            sizes = [max(len(message.text), _ITEM_BYTES) for message in messages]
            return Told(messages[transcript.keep_recent(sizes, self.history_bytes) :], text)
        return None if isinstance(text, UnsetType) and isinstance(items, UnsetType) else Told([], "")

    def take_warmed(self, key_name: str, told: Told) -> Sequence[transcript.Message]:
        """The messages of a history that was warmed, with their token ids. They are then no longer kept."""
        return self.warmed.take(key_name, told.text)

    def soft_limit(self, given: SamplingFields | None) -> int | None:
        """Tokens after which a reply ends with its sentence."""
        wanted = given.soft_max_tokens if given is not None else None
        return wanted or self.settings.chat_soft_max_out

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
        engine = self.engines.chat or self.engines.tool
        assert engine is not None
        settings = self.settings
        return await fit(engine, text, settings.user_utt_max_tokens, keep="start", exact=settings.exact_token_trim)

    async def tool_result(self, text: str) -> str:
        """The beginning of what a tool returned, within `TOOL_RESULT_MAX_TOKENS`."""
        engine = self.engines.chat or self.engines.tool
        assert engine is not None
        settings = self.settings
        return await fit(engine, text, settings.tool_result_max_tokens, keep="start", exact=settings.exact_token_trim)

    @property
    def _temperature(self) -> float:
        chosen = self.settings.chat_temperature
        if chosen is None:
            return 0.0 if self.engines.demo else _TEMPERATURE
        return chosen

    @staticmethod
    def now() -> str:
        """The time as a prompt tells it, for example `Sunday, 21:46`."""
        return datetime.now().strftime("%A, %H:%M")  # the host's local time is what is meant

    def _salt(self, key_name: str) -> str:
        return key_name if self.settings.cache_per_key else ""

    @property
    def thinking_room(self) -> int:
        """Tokens by which thinking may lengthen a reply."""
        return self.settings.chat_thinking_max_out if self.reasoning is not None else 0

    @property
    def _layout_stop(self) -> tuple[str, ...]:
        return self.prompts.layout.stop if self.prompts else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a reply: the template's tokens, and those of the model's configuration."""
        if self.prompts is None or self.engines.chat is None:
            return ()
        return tuple(sorted({*self.prompts.layout.stop_ids, *self.engines.chat.end_ids}))

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
                    f"the chat model's context is {self.engines.chat.max_model_len} tokens: CHAT_MAX_OUT and "
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

    def sampling(self, given: SamplingFields | None, seed: int, room: int, key_name: str = "") -> Sampling:
        """The settings' sampling with the client's laid over; at most `room` tokens."""
        settings, given = self.settings, given or SamplingFields()

        def pick(value: float | None, default: float) -> float:
            return default if value is None else value

        thinking = self.thinking_room
        return Sampling(
            max_tokens=max(1, min(self.reply_tokens(given) + thinking, room)),
            temperature=pick(given.temperature, self._temperature),
            top_p=pick(given.top_p, settings.chat_top_p),
            top_k=int(pick(given.top_k, settings.chat_top_k)),
            min_p=pick(given.min_p, settings.chat_min_p),
            repetition_penalty=pick(given.repetition_penalty, settings.chat_repetition_penalty),
            presence_penalty=pick(given.presence_penalty, settings.chat_presence_penalty),
            frequency_penalty=pick(given.frequency_penalty, settings.chat_frequency_penalty),
            seed=seed if given.seed is None else given.seed,
            logit_bias=self.logit_bias,
            stop=(*self._layout_stop, *(given.stop or ())),
            stop_ids=self.stop_ids,
            reasoning=self.reasoning,
            cache_salt=self._salt(key_name),
        )

    async def warm(
        self, message: WarmPersona | WarmHistory, session: Session | None, key_name: str, last: Persona | None = None
    ) -> tuple[Warmed, Persona]:
        """Computes the prefix that the next turn of this persona (and history) will find in the cache. Without persona
        fields that is `last`, the one that the socket warmed or set last, else the session's.

        Nothing of the session changes; the persona is returned. Raises `NotDeployed`, `UnknownPersona`, `BadMessage`,
        `TextTooLong`, `EngineFailed`.
        """
        begun = time.perf_counter()
        if self.engines.chat is None or self.prompts is None:
            raise NotDeployed("warming needs the chat model; DEPLOY_MODELS=tool")
        base = last if last is not None and _names_none(message) else (session or Session(("", ""))).persona
        persona = base.merge(message)
        if isinstance(message, WarmPersona):
            if persona.text is None and persona.style is None and session is None:
                raise UnknownPersona("warm_persona needs persona_text or persona_style, or a session_id that has one")
            if isinstance(message.persona_style, str) and not isinstance(message.persona_text, str):
                persona = replace(persona, text=None)  # the style is what is to be warm
        text = persona.compose(self.settings.default_persona_style)
        told = (self.told(message) if isinstance(message, WarmHistory) else None) or Told([], "")
        await asyncio.sleep(0)  # others' turn: a long history was parsed
        await self.check_persona(persona)
        prefix = await self.prompts.prefix(text, list(told.messages))
        if told.text and told.size <= transcript.REMEMBERED_CHARS:
            by = message.session_id or (session.session_id if session is not None else None)
            self.warmed.keep(key_name, told.text, Warm(told.messages, by))
        cached = await self._compute(self.engines.chat, prefix, key_name)
        warmed = Warmed(
            segment="history" if isinstance(message, WarmHistory) else "persona_static",
            persona_style=persona.style or self.settings.default_persona_style,
            persona_text_override=persona.text is not None,
            messages=len(told.messages),
            bytes=len((told.text or text).encode()),
            prefix_tokens=len(prefix),
            cached_tokens=cached,
            prefix_stable=self.prompts.layout.stable,
            ms=round((time.perf_counter() - begun) * 1000, 2),
        )
        return warmed, persona

    async def warm_next(self, session: Session) -> None:
        """While the user listens: computes what the next decision's and the next reply's prompts begin with, in small
        steps of the lowest priority. A turn that begins meanwhile ends it."""
        if not self.settings.warm_next_turn:
            return
        await asyncio.sleep(_NEXT_AFTER_S)
        messages = session.transcript.messages
        chat, tool = self.engines.chat, self.engines.tool
        if tool is not None and self.decider is not None and chat is not tool:
            tools = session.tools or self.decider.tools
            if tools.names and self.decider.history_tokens:
                await self._in_steps(tool, await self.decider.prefix(tools, messages), 0, "")
        if chat is not None and self.prompts is not None:
            persona = self.persona(session)
            before = await self.prompts.prefix(persona, messages[:-2])
            prefix = await self.prompts.prefix(persona, list(messages))
            await self._in_steps(chat, prefix, len(before), session.key_name)

    async def _in_steps(self, engine: Engine, prefix: list[int], known: int, key_name: str) -> None:
        for end in range(known + _STEP_TOKENS, len(prefix) + _STEP_TOKENS, _STEP_TOKENS):
            await self._compute(engine, prefix[: min(end, len(prefix))], key_name)

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
        warmed = self.warmed.forget(key_name, session_id)
        current = session.current if session is not None else None
        if session is not None and session.warming is not None:
            session.warming.cancel()
        if current is not None:
            current.cancel()

        async def done() -> Forgotten:
            if current is not None:
                await current.finished.wait()
            if erased is not None:
                await asyncio.shield(asyncio.wrap_future(erased))
            return Forgotten(session_id, session is not None or warmed)

        return done()

    async def _compute(self, engine: Engine, prefix: list[int], key_name: str) -> int:
        """Puts a prefix of a key into the cache; returns how many of its tokens were there."""
        if not prefix:
            return 0
        sampling = Sampling(max_tokens=1, cache_salt=self._salt(key_name))
        last = await exhaust(engine.stream(prefix, sampling, priority=WARM))
        return last.cached_tokens if last else 0

    def rewarm(self, most: int) -> AsyncGenerator[None, None]:
        """After a restart: computes the prefixes of the sessions that were last in use, step by step, each only while
        no engine has anything else to do. A session that has come back meanwhile does so itself."""
        sessions = self.sessions.recent(_REWARM_WITHIN_S)[:most]  # now: who comes later was not there before
        return self._rewarm([(session, session.used_at) for session in sessions])

    async def _rewarm(self, sessions: list[tuple[Session, float]]) -> AsyncGenerator[None, None]:
        engine, prompts = self.engines.chat, self.prompts
        if engine is None or prompts is None or not sessions:
            return
        begun, warmed, tokens = time.perf_counter(), 0, 0
        try:
            for session, used_at in sessions:
                yield
                while any(each.load().running for each in self.engines.distinct.values()):
                    await asyncio.sleep(_REWARM_PAUSE_S)
                    yield
                if session.used_at != used_at:
                    continue
                with suppress(WireError):  # its next turn tells
                    prefix = await prompts.prefix(self.persona(session), list(session.transcript.messages))
                    if tokens + len(prefix) > _REWARM_SHARE * engine.cache_tokens:
                        break
                    await self._compute(engine, prefix, session.key_name)
                    warmed, tokens = warmed + 1, tokens + len(prefix)
        finally:
            seconds = round(time.perf_counter() - begun, 2)
            _log.info("sessions.rewarmed", sessions=warmed, of=len(sessions), prefix_tokens=tokens, seconds=seconds)


def _facts(layout: Layout, reasoning: Reasoning | None) -> dict[str, Any]:
    parser = None if reasoning is None else reasoning.parser or f"{reasoning.start} {reasoning.end}"
    facts: dict[str, Any] = {"exact": layout.exact, "prefix_stable": layout.stable, "thinking": layout.thinking.word}
    return facts | ({"reasoning_parser": parser} if parser else {})


def _latest(items: list[HistoryItem], max_bytes: int) -> list[HistoryItem]:
    """The end of a long history, in steps, as of one that is a text. An item counts as no fewer than 64 bytes."""
    if len(items) * _ITEM_BYTES > 2 * max_bytes:
        items = items[-(max_bytes // _ITEM_BYTES) :]
    sizes = [max(len(item.content.encode(errors="replace")), _ITEM_BYTES) + len(item.name or "") for item in items]
    if items and sizes[-1] > max_bytes:
        last = items[-1]
        return [HistoryItem(last.role, last.content[-max_bytes // 4 :], (last.name or "")[:_NAME_CHARS] or None)]
    return items[transcript.keep_recent(sizes, max_bytes) :]


def _names_none(message: PersonaFields) -> bool:
    fields = (message.persona_text, message.persona_style, message.assistant_gender, message.user_identity)
    return all(isinstance(field, UnsetType) for field in fields)


async def _token_bias(engine: Engine, by_text: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Raises `StartError` for a text that is not one token of the model."""
    found = []
    for text, bias in by_text.items():
        ids = await engine.encode(text)
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
