"""A model's chat template: what it renders of messages, of the date, of a switch for thinking."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from yaptext.engine.base import Thinking

_SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "reasoning": (False, True),
    "thinking_mode": ("disabled", "enabled"),
    "thinking_budget": (0, None),
    "reasoning_effort": ("none", "high"),
}
"""Variables by which templates turn thinking off and on, each with its two values; None leaves it undefined."""
_VALUES_NAMED = {"thinking_mode", "reasoning_effort"}
"""Of these, templates take other values too: one counts only if the template names the value for off."""
_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>", "<channel|>"),
    ("<mm:think>", "</mm:think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel|>analysis", "<|channel|>final"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
"""What stands around thinking, model by model."""
_FORMATS = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_TIME_OF_DAY = re.compile(r"%[-#]?[HIMSfpXcrsT]")
_PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


class ChatTemplate:
    """The template of one tokenizer as transformers has it: a text, a dict of named ones, or none at all."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        fallback: str | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`fallback` is the template where the tokenizer has none."""
        found = tokenizer.chat_template or fallback or {}
        self._sources: Mapping[str, str] = {"default": found} if isinstance(found, str) else dict(found)
        self.exists = bool(self._sources)
        self._tokenizer, self.clock = tokenizer, clock
        self._formats = tuple(
            sorted({form for source in self._sources.values() for _, form in _FORMATS.findall(source)})
        )
        self.ticks = bool(_TIME_OF_DAY.search(" ".join(self._formats)))
        """Whether the template says the time of day: then no two prompts begin alike."""
        self._dated = not self.ticks and any("strftime_now" in source for source in self._sources.values())
        self._as_parts = False
        self._switches: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self._as_parts = self._loses_text()
        self._thinking = self._find_thinking()

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        reply: bool = True,
        thinking: bool = False,
    ) -> str | None:
        """The text of a conversation, ready for a reply unless told otherwise; None where there is no template or it
        refuses these roles."""
        source = self._source(tools)
        if source is None:
            return None
        told = self._apply(source, messages, tools, reply, self._switches[thinking])
        if told is None and tools is None:  # a template that is made for tools alone may want a list, be it empty
            told = self._apply(source, messages, [], reply, self._switches[thinking])
        return told

    def thinking(self, wanted: bool) -> Thinking:
        """What the model does if it is asked to think, or not to."""
        return self._thinking[wanted]

    @property
    def day(self) -> tuple[str, ...]:
        """What the template says of the date now. Whatever was rendered under another value is out of date."""
        if not self._dated:
            return ()
        now = self.clock()
        return tuple(now.strftime(form) for form in self._formats or ("%Y-%m-%d",))

    def _source(self, tools: Any) -> str | None:
        names = ("tool_use", "default") if tools else ("default",)
        return next((self._sources[name] for name in names if name in self._sources), None) or next(
            iter(self._sources.values()), None
        )

    def _apply(
        self, source: str, messages: list[dict[str, Any]], tools: Any, reply: bool, switches: Mapping[str, Any]
    ) -> str | None:
        given: list[Any] = messages
        if self._as_parts:
            given = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        more: dict[str, Any] = dict(switches)
        if "functions" in source:  # as a list in JSON: templates of before there were tools
            more |= {"functions": json.dumps(tools or []), "datetime": self.clock().strftime("%Y-%m-%d")}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    given,
                    tools=tools,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=reply,
                    strftime_now=lambda form: self.clock().strftime(form),
                    **more,
                )
            )
        except Exception:  # a template is a program: it refuses roles and tools by raising what it likes
            return None

    def _loses_text(self) -> bool:
        """Whether contents must be lists of parts, as the templates of some models that also see have it."""
        source = self._source(None)
        if source is None or "one" in (self.render(_PROBE) or ""):
            return False
        self._as_parts = True
        return "one" in (self.render(_PROBE) or "")

    def _find_thinking(self) -> tuple[Thinking, Thinking]:
        """Off and on."""
        source = self._source(None) or ""
        names = [
            name
            for name, (off, _) in _SWITCHES.items()
            if re.search(rf"\b{name}\b", source)
            and (name not in _VALUES_NAMED or re.search(rf"""['"]{off}['"]""", source))
        ]
        off, on = ({name: _SWITCHES[name][side] for name in names} for side in (0, 1))
        self._switches = (off, {name: value for name, value in on.items() if value is not None})
        prompts = [self.render(_PROBE, thinking=side) or "" for side in (False, True)]
        switched = prompts[0] != prompts[1] and "" not in prompts
        if not switched:
            self._switches = ({}, {})
        start, end = next(((start, end) for start, end in _MARKS if start in source or end in source), ("", ""))

        def thinking(side: bool) -> Thinking:
            return Thinking(
                switched,
                on=side if switched else bool(start),
                start=start,
                end=end,
                opened=bool(start) and _is_open(prompts[side].rpartition("three")[2], start, end),
            )

        return thinking(False), thinking(True)


def _is_open(text: str, start: str, end: str) -> bool:
    return text.rfind(start) > text.rfind(end)


def template_file(source: str, **options: Any) -> str | None:
    """The template of a model that keeps it in `chat_template.json` alone. `options` are `cached_file`'s."""
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "chat_template.json", _raise_exceptions_for_missing_entries=False, **options)
        found = None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or another's
        return None
    return found if isinstance(found, str) else None
