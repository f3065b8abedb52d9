"""What a turn is asked for, through whatever door the request came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, UnsetType

from yaptext.dialogue.heard import Heard
from yaptext.dialogue.talk import Rounds
from yaptext.dialogue.transcript import Message
from yaptext.wire.frames import HistoryItem, PersonaFields, SamplingFields, Start, ToolResult, WarmHistory


@dataclass(frozen=True, slots=True)
class Told:
    """A history as a client sent it: `text` finds it again, `size` is its length in characters."""

    messages: list[Message]
    text: str

    @property
    def size(self) -> int:
        return len(self.text)


History = str | list[HistoryItem] | Told | UnsetType | None
"""A transcript of the client: written, as a list, or as messages. Absent it is the session's own; null is
an empty one."""


def history_of(frame: Start | WarmHistory) -> History:
    """Of the two forms that a frame may have it in, the one that it has."""
    if isinstance(frame.history, list) or isinstance(frame.history_text, UnsetType):
        return frame.history
    return frame.history_text


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One request for a turn. A door makes it of what its client sent; its texts are within their bounds
    (`incoming.bounded`)."""

    session_id: str
    utterance: str | None = None
    """None: the assistant speaks first or continues, or tools have returned."""
    persona: PersonaFields = field(default_factory=PersonaFields)
    """Fields that change the session's persona."""
    history: History = UNSET
    heard: Heard | None = None
    """What the user heard of the reply before."""
    note: str = ""
    tools: list[dict[str, Any]] | UnsetType | None = UNSET
    results: ToolResult | None = None
    """The results of an earlier turn's calls: this turn continues its utterance."""
    await_tools: bool | None = None
    speakable: bool | None = None
    rounds: Rounds = ()
    """Calls for this utterance that have returned already, from a client that sends all of it each time."""
    decides: bool = True
    """Whether the tool model is asked; `must_call`: no is not among its answers."""
    must_call: bool = False
    replies: bool = True
    """Whether the chat model is asked."""
    plain: bool = False
    """Whether the prompt is the client's own: its messages in roles, with no mark and no time."""
    json_schema: str | None = None
    """What the reply has to be, as compact JSON."""
    sampling: SamplingFields | None = None
    alternatives: int = 0
    """Of each token of the reply, to be kept with their probability."""
    ignored: Sequence[str] = ()
    """Fields that the client sent in vain, for the ack."""

    @classmethod
    def of(cls, frame: Start | ToolResult, ignored: Sequence[str] = ()) -> TurnRequest:
        if isinstance(frame, ToolResult):
            return cls(frame.session_id, results=frame, sampling=frame.sampling, ignored=ignored)
        return cls(
            frame.session_id,
            frame.user_utterance,
            persona=frame,
            history=history_of(frame),
            heard=Heard.of(frame),
            note=frame.note or "",
            tools=frame.tools,
            await_tools=frame.await_tools,
            speakable=frame.speakable,
            sampling=frame.sampling,
            ignored=ignored,
        )
