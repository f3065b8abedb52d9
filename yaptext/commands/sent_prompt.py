"""The prompt that a model gets, made without an engine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaptext.dialogue import shown_prompt, transcript
from yaptext.dialogue.chat_prompt import ChatPrompts, Format, Limits
from yaptext.dialogue.persona import Persona, style
from yaptext.dialogue.reply import reasoning_of
from yaptext.dialogue.tool_prompt import ToolPrompts, shows
from yaptext.dialogue.tools import ToolSet
from yaptext.engine.base import Role
from yaptext.engine.codec import HubCodec
from yaptext.engine.model_config import open_codec
from yaptext.errors import SettingsError, YapError
from yaptext.settings import Settings

NOW = "Sunday, 21:46"
"""The fixed time in these prompts, so that two runs are the same."""


@dataclass(frozen=True, slots=True)
class Options:
    """The parts of the prompt. A `format` of None means that of the settings."""

    role: Role = "chat"
    format: Format | None = None
    persona_style: str | None = None
    history: Path | None = None
    tools: Path | None = None
    utterance: str = "Hello!"
    as_json: bool = False


def prompt(settings: Settings, models: Sequence[str], options: Options) -> int:
    """Prints one prompt for each model; returns 1 if one of them cannot be used. Raises `YapError` for the options."""
    tools = ToolSet.from_file(options.tools or settings.tools_file)
    style(options.persona_style or settings.default_persona_style)
    try:
        told = options.history.read_text(encoding="utf-8") if options.history is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--history {options.history} cannot be read: {error}") from None
    failed = False
    for model in models:
        try:
            shown = asyncio.run(_describe(settings, model, options, tools, told))
        except YapError as error:
            failed = True
            shown = {"model": model, "role": options.role, "error": str(error)}
        if options.as_json:
            print(json.dumps(shown, ensure_ascii=False), flush=True)
        else:
            _show(shown)
    return int(failed)


async def _describe(settings: Settings, model: str, options: Options, tools: ToolSet, told: str) -> dict[str, Any]:
    codec = open_codec(settings, model)
    messages = transcript.parse(told)
    if options.role == "tool":
        return {"model": model, "role": "tool"} | await _tool(settings, codec, options, tools, messages)
    return {"model": model, "role": "chat"} | await _chat(settings, codec, options, messages)


async def _chat(
    settings: Settings, codec: HubCodec, options: Options, messages: list[transcript.Message]
) -> dict[str, Any]:
    format = options.format or settings.chat_prompt_format
    prompts = await ChatPrompts.open(codec, format, Limits.of(settings), thinking=settings.chat_thinking)
    persona = Persona(style=options.persona_style).compose(settings.default_persona_style)
    shown = await shown_prompt.of_chat(prompts, codec, persona, messages, options.utterance, NOW)
    reasoning = reasoning_of(settings.reasoning_parser, prompts.layout.thinking)
    more = {"reasoning_parser": reasoning and (reasoning.parser or f"{reasoning.start} {reasoning.end}")}
    return {**shown, "tools_told": None, **more, "fallback": prompts.lacking}


async def _tool(
    settings: Settings, codec: HubCodec, options: Options, tools: ToolSet, messages: list[transcript.Message]
) -> dict[str, Any]:
    prompts = ToolPrompts(codec, settings.tool_history_tokens)
    shown = await shown_prompt.of_tool(prompts, codec, tools, messages, options.utterance)
    return {**shown, "tools_told": all(shows(shown["text"], tool) for tool in tools.tools)}


def _show(shown: dict[str, Any]) -> None:
    facts = {
        name: value for name, value in shown.items() if name not in ("model", "text", "ids") and value not in (None, [])
    }
    facts |= {"tokens": len(shown["ids"])} if "ids" in shown else {}
    print(f"== {shown['model']}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    if "text" in shown:
        print(shown["text"])
    sys.stdout.flush()
