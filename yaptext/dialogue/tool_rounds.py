"""Rounds of tool calls that a client makes for one utterance, with their results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec

from yaptext.dialogue.talk import Called, Rounds
from yaptext.errors import BadMessage, TextTooLong
from yaptext.wire.frames import Call, IdentifiedCall, ToolResult


@dataclass(frozen=True, slots=True)
class Asked:
    """The calls of turn `turn`, whose results its client owes, and what the next turn takes over with them."""

    turn: int
    utterance: str | None
    calls: Sequence[IdentifiedCall]
    before: Sequence[list[Called]] = ()
    """The rounds of calls for the same utterance that have returned already."""
    note: str = ""
    speakable: bool = False

    @property
    def rounds(self) -> int:
        """How many decisions there were for the utterance."""
        return len(self.before) + 1

    def new(self, calls: Iterable[Call]) -> list[Call]:
        """Those that were not made yet: a small model may want the same again, whose result stands in its prompt."""
        made = [(call.name, call.arguments) for call in self.calls]
        made += [(call.name, call.arguments) for call in chain.from_iterable(self.before)]
        return [call for call in calls if (call.name, call.arguments) not in made]


def returned(frame: ToolResult, asked: Asked | None, max_tokens: int) -> list[Called]:
    """What each call of a turn returned. Raises `BadMessage`, and `TextTooLong` for a text that is over the limit
    however many characters its tokens have."""
    if asked is None or asked.turn != frame.turn:
        raise BadMessage(f"Turn {frame.turn} waits for no tool results - at $.turn")
    given = {result.id: result.content for result in frame.results}
    known = [call.id for call in asked.calls]
    for index, result in enumerate(frame.results):
        if result.id not in known:
            raise BadMessage(f"Unknown id; the calls are {', '.join(known)} - at $.results[{index}].id")
    if missing := [id for id in known if id not in given]:
        raise BadMessage(f"The result of {missing[0]} is missing - at $.results")
    limit = 16 * max_tokens
    contents = [given[id] if isinstance(given[id], str) else msgspec.json.encode(given[id]).decode() for id in known]
    for text in contents:
        if len(text) > limit:
            raise TextTooLong(f"a tool result is {len(text)} characters; limit is {limit} - at $.results")
    return [Called(c.name, c.arguments, text.strip()) for c, text in zip(asked.calls, contents, strict=True)]


def in_words(rounds: Rounds) -> list[str]:
    """What the tools returned, for a prompt whose template has no form for calls, and for the transcript."""
    return [
        f"({call.name} {msgspec.json.encode(call.arguments).decode()} returned: {call.content})"
        for calls in rounds
        for call in calls
    ]
