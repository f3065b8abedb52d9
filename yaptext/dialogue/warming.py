"""What is computed before it is asked for: at the start, while the user listens, after a restart, on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

import structlog
from msgspec import UnsetType

from yaptext.dialogue import transcript
from yaptext.dialogue.incoming import told
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.request import Told, TurnRequest, history_of
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.sampling import salt, sampling
from yaptext.dialogue.session import Session
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.warmed import Warm
from yaptext.engine.base import WARM, Engine, Sampling, exhaust
from yaptext.errors import EngineFailed, NotDeployed, UnknownPersona, WireError
from yaptext.wire.frames import PersonaFields, SamplingFields, Usage, Warmed, WarmHistory, WarmPersona

_log = structlog.get_logger(__name__)
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
for new users."""
_NEXT_AFTER_S, _STEP_TOKENS = 0.1, 64
"""A turn that follows at once is not to wait for warming; one engine step cannot be interrupted, so each is small."""


async def prime(runtime: Runtime) -> None:
    """Throw-away decisions and replies, so that the first user finds both engines, the fixed tool prompt and every
    kernel warm."""
    cuda = runtime.settings.on_cuda
    if runtime.decider is not None:
        await runtime.decider.prime(_PRIMED_BATCHES if cuda else (1,))
    if runtime.engines.chat is not None and runtime.prompts is not None:
        prompt = await runtime.prompts.turn(runtime.persona(Session(("", ""))), [], "Hello!", runtime.now())
        for fields, batches in _PRIMED_SAMPLINGS if cuda else ((None, (1,)),):
            wanted = sampling(runtime, fields, 7, 12)
            for size in batches:
                streams = [runtime.engines.chat.stream(prompt, wanted) for _ in range(size)]
                await asyncio.gather(*map(exhaust, streams))


async def keep_warm(runtime: Runtime) -> None:
    """Keeps the fixed tool prompt in the cache, for ever."""
    while runtime.decider is not None:
        await asyncio.sleep(_REFRESH_S)
        with suppress(EngineFailed):  # the next decision, or the watch over the engines, reports it
            await runtime.decider.refresh()


async def warm(
    runtime: Runtime,
    message: WarmPersona | WarmHistory,
    session: Session | None,
    key_name: str,
    last: Persona | None = None,
) -> tuple[Warmed, Persona]:
    """Computes the prefix that the next turn of this persona (and history) will find in the cache. Without persona
    fields that is `last`, the one that the socket warmed or set last, else the session's.

    Nothing of the session changes; the persona is returned. Raises `NotDeployed`, `UnknownPersona`, `BadMessage`,
    `TextTooLong`, `EngineFailed`.
    """
    begun = time.perf_counter()
    if runtime.engines.chat is None or runtime.prompts is None:
        raise NotDeployed("warming needs the chat model; DEPLOY_MODELS=tool")
    base = last if last is not None and _names_none(message) else (session or Session(("", ""))).persona
    persona = base.merge(message)
    if isinstance(message, WarmPersona):
        if persona.text is None and persona.style is None and session is None:
            raise UnknownPersona("warm_persona needs persona_text or persona_style, or a session_id that has one")
        if isinstance(message.persona_style, str) and not isinstance(message.persona_text, str):
            persona = replace(persona, text=None)  # the style is what is to be warm
    text = persona.compose(runtime.settings.default_persona_style)
    history = (told(runtime, history_of(message)) if isinstance(message, WarmHistory) else None) or Told([], "")
    await asyncio.sleep(0)  # others' turn: a long history was parsed
    await runtime.check_persona(persona)
    prefix = await runtime.prompts.prefix(text, list(history.messages))
    if history.text and history.size <= transcript.REMEMBERED_CHARS:
        by = message.session_id or (session.session_id if session is not None else None)
        runtime.warmed.keep(key_name, history.text, Warm(history.messages, by))
    cached = await _compute(runtime, runtime.engines.chat, prefix, key_name)
    warmed = Warmed(
        segment="history" if isinstance(message, WarmHistory) else "persona_static",
        persona_style=persona.style or runtime.settings.default_persona_style,
        persona_text_override=persona.text is not None,
        messages=len(history.messages),
        bytes=len((history.text or text).encode()),
        prefix_tokens=len(prefix),
        cached_tokens=cached,
        prefix_stable=runtime.prompts.layout.stable,
        ms=round((time.perf_counter() - begun) * 1000, 2),
    )
    return warmed, persona


async def warm_request(runtime: Runtime, session: Session, request: TurnRequest) -> Usage:
    """Computes what the prompts of a turn would begin with; returns the tokens of the reply's. Nothing of the session
    changes. Raises `EngineFailed`, `TextTooLong`."""
    messages = list((told(runtime, request.history) or Told([], "")).messages)
    chat, tool, prompts, decider = runtime.engines.chat, runtime.engines.tool, runtime.plain_prompts, runtime.decider
    if tool is not None and decider is not None and request.decides and isinstance(request.tools, list):
        tools = runtime.tool_sets.known(request.tools) or ToolSet(request.tools)
        await _compute(runtime, tool, await decider.prefix(tools, messages), "")
    if chat is None or prompts is None:
        return Usage()
    persona = session.persona.merge(request.persona).compose(runtime.settings.default_persona_style)
    prefix = await prompts.prefix(persona, messages)
    cached = await _compute(runtime, chat, prefix, session.key_name)
    return Usage(prompt_tokens=len(prefix), cached_tokens=cached)


async def warm_next(runtime: Runtime, session: Session) -> None:
    """While the user listens: computes what the next decision's and the next reply's prompts begin with, in small
    steps of the lowest priority. A turn that begins meanwhile ends it."""
    if not runtime.settings.warm_next_turn:
        return
    await asyncio.sleep(_NEXT_AFTER_S)
    messages = session.transcript.messages
    chat, tool = runtime.engines.chat, runtime.engines.tool
    if tool is not None and runtime.decider is not None and chat is not tool:
        tools = session.tools or runtime.decider.tools
        if tools.names and runtime.decider.history_tokens:
            await _in_steps(runtime, tool, await runtime.decider.prefix(tools, messages), 0, "")
    if chat is not None and runtime.prompts is not None:
        persona = runtime.persona(session)
        before = await runtime.prompts.prefix(persona, messages[:-2])
        prefix = await runtime.prompts.prefix(persona, list(messages))
        await _in_steps(runtime, chat, prefix, len(before), session.key_name)


async def _in_steps(runtime: Runtime, engine: Engine, prefix: list[int], known: int, key_name: str) -> None:
    for end in range(known + _STEP_TOKENS, len(prefix) + _STEP_TOKENS, _STEP_TOKENS):
        await _compute(runtime, engine, prefix[: min(end, len(prefix))], key_name)


async def _compute(runtime: Runtime, engine: Engine, prefix: list[int], key_name: str) -> int:
    """Puts a prefix of a key into the cache; returns how many of its tokens were there."""
    if not prefix:
        return 0
    one = Sampling(max_tokens=1, cache_salt=salt(runtime, key_name))
    last = await exhaust(engine.stream(prefix, one, priority=WARM))
    return last.cached_tokens if last else 0


def rewarm(runtime: Runtime, most: int) -> AsyncGenerator[None, None]:
    """After a restart: computes the prefixes of the sessions that were last in use, step by step, each only while
    no engine has anything else to do. A session that has come back meanwhile does so itself."""
    sessions = runtime.sessions.recent(_REWARM_WITHIN_S)[:most]  # now: a session that comes later was not there before
    return _rewarm(runtime, [(session, session.used_at) for session in sessions])


async def _rewarm(runtime: Runtime, sessions: list[tuple[Session, float]]) -> AsyncGenerator[None, None]:
    engine, prompts = runtime.engines.chat, runtime.prompts
    if engine is None or prompts is None or not sessions:
        return
    begun, warmed, tokens = time.perf_counter(), 0, 0
    try:
        for session, used_at in sessions:
            yield
            while any(each.load().running for each in runtime.engines.distinct.values()):
                await asyncio.sleep(_REWARM_PAUSE_S)
                yield
            if session.used_at != used_at:
                continue
            with suppress(WireError):  # its next turn reports it
                prefix = await prompts.prefix(runtime.persona(session), list(session.transcript.messages))
                if tokens + len(prefix) > _REWARM_SHARE * engine.cache_tokens:
                    break
                await _compute(runtime, engine, prefix, session.key_name)
                warmed, tokens = warmed + 1, tokens + len(prefix)
    finally:
        seconds = round(time.perf_counter() - begun, 2)
        _log.info("sessions.rewarmed", sessions=warmed, of=len(sessions), prefix_tokens=tokens, seconds=seconds)


def _names_none(message: PersonaFields) -> bool:
    fields = (message.persona_text, message.persona_style, message.assistant_gender, message.user_identity)
    return all(isinstance(field, UnsetType) for field in fields)
