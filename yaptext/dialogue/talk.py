"""A conversation as prompts are made of it: messages in roles, each of lines that keep their token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant"]
Kept = dict[str, bytes]
"""Token ids of one line by where it stands, so that each is encoded once in its life, not once a turn."""


class Line(msgspec.Struct, eq=False, gc=False):
    """One line of a message, or several, without white space at its ends. `kept` is where its ids are kept. What is
    `volatile` changes with every turn, and so does all that follows. A `loose` line is encoded together with the one
    before: some tokenizers read a newline and a slash as one.

    Not seen by the garbage collector, like messages: a thousand long transcripts made each of its rounds take 0.3 s."""

    text: str
    kept: Kept | None = None
    volatile: bool = False
    loose: bool = False
    size: int | None = None
    """Its tokens, once they were measured."""

    def __post_init__(self) -> None:
        first = self.text[:1]
        self.loose = not (first.isascii() and (first.isalnum() or first in ("<", "(")))


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a conversation, as lines."""

    role: Role
    lines: Sequence[Line]

    @property
    def content(self) -> str:
        return "\n".join(line.text for line in self.lines)


Talk = Sequence[Said]


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool, and the text that it returned."""

    name: str
    arguments: dict[str, Any]
    content: str


Rounds = Sequence[Sequence[Called]]
"""Calls that were made for the last message of a conversation, those of each decision together."""


def in_turn(talk: Iterable[Said], *, system: bool) -> list[Said]:
    """The conversation as every template takes it: user and assistant alternate, the user first. Without `system` its
    text opens the first user message."""
    turns: list[Said] = []
    head: Said | None = None
    for said in talk:
        if said.role == "system":
            head = said
        elif turns and turns[-1].role == said.role:
            turns[-1] = Said(said.role, [*turns[-1].lines, *said.lines])
        elif not turns and said.role == "assistant":
            turns += [Said("user", [Line("")]), said]
        else:
            turns.append(said)
    if head is None:
        return turns
    if system:
        return [head, *turns]
    first, *rest = turns[0].lines
    apart = Line(f"\n{first.text}", volatile=first.volatile)
    return [Said("user", [*head.lines, apart, *rest]), *turns[1:]]
