"""The prompts of the models for people to read: as text with its control tokens, and as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UnsetType

from yaptext.dialogue import incoming
from yaptext.dialogue.chat_prompt import Around, ChatPrompts
from yaptext.dialogue.decision import Decider
from yaptext.dialogue.layout import Layout
from yaptext.dialogue.persona import Persona
from yaptext.dialogue.request import TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.talk import Talk
from yaptext.dialogue.tool_prompt import ToolPrompts
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message, Transcript
from yaptext.engine.base import Codec


async def of_chat(
    prompts: ChatPrompts,
    codec: Codec,
    persona: str,
    messages: list[Message],
    utterance: str | None,
    now: str | None,
    around: Around | None = None,
) -> dict[str, Any]:
    """As `ChatPrompts.turn`, which it calls, with the same errors; `messages` is trimmed as there."""
    ids = await prompts.turn(persona, messages, utterance, now, around)
    talk = prompts.talk(persona, messages, utterance, now, around)
    prefix = await prompts.prefix(persona, list(messages))
    return {"format": prompts.format, **await _facts(codec, prompts.layout, talk, ids, len(prefix))}


async def of_tool(
    prompts: ToolPrompts, codec: Codec, tools: ToolSet, messages: Sequence[Message], utterance: str
) -> dict[str, Any]:
    """As `ToolPrompts.turn`, which it calls."""
    head = await prompts.head(tools)
    recent = await prompts.recent(messages, head)
    talk = head.talk(recent, utterance)
    ids = await prompts.turn(tools, messages, utterance)
    prefix = await head.layout.prefix([talk, head.talk(recent, "X")])
    return {"format": head.format, **await _facts(codec, head.layout, talk, ids, len(prefix))}


async def of_turn(runtime: Runtime, session: Session | None, request: TurnRequest) -> dict[str, Any]:
    """By role: what the models would be sent if the turn began now; None for one that would not be asked. A turn that
    runs in the session is not yet part of it. Nothing of the session changes. Raises `TextTooLong`, `EngineFailed`."""
    merged = (Persona() if session is None else session.persona).merge(request.persona)
    persona = merged.compose(runtime.settings.default_persona_style)
    said = Transcript() if session is None else session.transcript.copy()
    if (told := incoming.told(runtime, request.history)) is not None:
        said.messages = list(told.messages)
    if request.heard is not None:
        said.cut_reply(request.heard.chars, request.heard.text, runtime.settings.interrupted_mark)
    utterance = None if request.utterance is None else await runtime.utterance(request.utterance)
    shown: dict[str, Any] = {"chat": None, "tool": None}
    chat, tool, decider = runtime.engines.chat, runtime.engines.tool, runtime.decider
    if tool is not None and isinstance(decider, Decider) and utterance is not None:
        tools = _tools(runtime, session, request) or decider.tools
        if tools.names:
            found = await of_tool(decider.prompts, tool.codec, tools, said.messages, utterance)
            shown["tool"] = {"model": tool.model, **found}
    if chat is not None and runtime.prompts is not None:
        around = Around(request.note)
        found = await of_chat(runtime.prompts, chat.codec, persona, said.messages, utterance, runtime.now(), around)
        shown["chat"] = {"model": chat.model, **found}
    return shown


def _tools(runtime: Runtime, session: Session | None, request: TurnRequest) -> ToolSet | None:
    """Those of the request or the session; None: the service's own."""
    if isinstance(request.tools, UnsetType):
        return None if session is None else session.tools
    return None if request.tools is None else runtime.tool_sets.known(request.tools) or ToolSet(request.tools)


async def _facts(codec: Codec, layout: Layout, talk: Talk, ids: list[int], prefix_tokens: int) -> dict[str, Any]:
    rendered = layout.render(talk) or ""
    return {
        "exact": layout.exact and ids == await layout.encode(rendered),
        "prefix_stable": layout.stable,
        "text": "".join(codec.show([part]) if isinstance(part, int) else part for part in codec.split(rendered)),
        "ids": ids,
        "prefix_tokens": prefix_tokens,
        "stop_ids": sorted({*layout.stop_ids, *codec.end_ids}),
        "stop": list(layout.stop),
        "thinking": layout.thinking.word,
    }
