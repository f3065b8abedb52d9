"""The stage: what every turn shares (engines, prompt builders, decider, sessions)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import structlog

from yaptext.dialogue import history
from yaptext.dialogue.layout import Layout
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.prompt import ChatPrompts, Limits, fit
from yaptext.dialogue.reply import reasoning_of
from yaptext.dialogue.session import Session, SessionStore
from yaptext.dialogue.toolcall import Decider, NoDecider
from yaptext.dialogue.toolset import ToolSet
from yaptext.engine.base import WARM, Engine, Engines, Reasoning, Sampling, exhaust
from yaptext.errors import EngineFailed, NotDeployed, StartError, TextTooLong, UnknownPersona, WireError
from yaptext.observe.metrics import Metrics
from yaptext.settings import Settings
from yaptext.wire.messages import Ack, Models, PersonaFields, SamplingFields, Warmed, WarmHistory, WarmPersona

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
_WARMED_TRANSCRIPTS = 64


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
    prompt_facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By role: what prompts are made of, for `/status`."""
    warmed: dict[tuple[str, str], list[history.Message]] = field(default_factory=dict)
    """Transcripts that were warmed, by name of the key and text, with their token ids, until the turn that they were
    warmed for."""

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
    def history_chars(self) -> int:
        """Most characters of a client's transcript that are looked at."""
        return max(4096, 16 * self.settings.history_max_tokens)

    def merge(self, persona: Persona, fields: PersonaFields) -> Persona:
        """The persona with a client's fields laid over. Raises `BadMessage`, and `TextTooLong` for a text that is
        over the limit at any rate of characters a token."""
        limit = 16 * self.settings.persona_max_tokens
        if isinstance(fields.persona_text, str) and len(fields.persona_text) > limit:
            raise TextTooLong(f"persona_text is {len(fields.persona_text)} characters; limit is {limit}")
        return persona.merge(fields)

    def persona(self, session: Session) -> str:
        return session.persona.compose(self.settings.default_persona_style)

    def ack(
        self, what: Literal["start", "set_persona"], session: Session, persona: Persona, turn: int, seed: int
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
        )

    async def utterance(self, text: str) -> str:
        """The beginning of an utterance, within `USER_UTT_MAX_TOKENS`."""
        engine = self.engines.chat or self.engines.tool
        assert engine is not None
        settings = self.settings
        return await fit(engine, text, settings.user_utt_max_tokens, keep="start", exact=settings.exact_token_trim)

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
                raise StartError(
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
            max_tokens=max(1, min((given.max_tokens or settings.chat_max_out) + thinking, room)),
            temperature=pick(given.temperature, self._temperature),
            top_p=pick(given.top_p, settings.chat_top_p),
            top_k=int(pick(given.top_k, settings.chat_top_k)),
            min_p=pick(given.min_p, settings.chat_min_p),
            repetition_penalty=pick(given.repetition_penalty, settings.chat_repetition_penalty),
            presence_penalty=pick(given.presence_penalty, 0.0),
            frequency_penalty=pick(given.frequency_penalty, 0.0),
            seed=seed if given.seed is None else given.seed,
            stop=(*self._layout_stop, *(given.stop or ())),
            stop_ids=self.stop_ids,
            reasoning=self.reasoning,
            cache_salt=self._salt(key_name),
        )

    async def warm(self, message: WarmPersona | WarmHistory, session: Session | None, key_name: str) -> Warmed:
        """Computes the prefix that the next turn of this persona (and history) will find in the cache.

        Nothing of the session changes. Raises `NotDeployed`, `UnknownPersona`, `TextTooLong`, `EngineFailed`.
        """
        begun = time.perf_counter()
        if self.engines.chat is None or self.prompts is None:
            raise NotDeployed("warming needs the chat model; DEPLOY_MODELS=tool")
        known = session or Session(("", ""))
        persona = self.merge(known.persona, message)
        if isinstance(message, WarmPersona) and persona.text is None and persona.style is None and session is None:
            raise UnknownPersona("warm_persona needs persona_text or persona_style, or a session_id that has one")
        text = persona.compose(self.settings.default_persona_style)
        told = history.recent(message.history_text, self.history_chars) if isinstance(message, WarmHistory) else ""
        messages = history.parse(told)
        prefix = await self.prompts.prefix(text, list(messages))
        if told:
            self.warmed[key_name, told] = messages
            if len(self.warmed) > _WARMED_TRANSCRIPTS:
                del self.warmed[next(iter(self.warmed))]
        cached = await self._compute(self.engines.chat, prefix, key_name)
        return Warmed(
            segment="history" if isinstance(message, WarmHistory) else "persona_static",
            bytes=len((told or text).encode()),
            prefix_tokens=len(prefix),
            cached_tokens=cached,
            prefix_stable=self.prompts.layout.stable,
            ms=round((time.perf_counter() - begun) * 1000, 2),
        )

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


def _check_reasoning(engine: Engine, reasoning: Reasoning | None) -> None:
    """Raises `StartError` for a model whose thinking would be spoken."""
    if reasoning is None:
        return
    try:
        engine.check_reasoning(reasoning)
    except StartError as error:
        raise StartError(
            f"{engine.model} thinks before it speaks, and that cannot be kept out of its replies: {error}. Name vLLM's "
            "parser in REASONING_PARSER; with REASONING_PARSER=none thinking is sent like speech"
        ) from None
