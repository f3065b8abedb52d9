"""Prompts put together from pieces: a stretch of text between two control tokens, or a line, is encoded by itself."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from yaptext.dialogue.talk import Kept, Line, Role, Talk
from yaptext.engine.base import Codec, Place

_BREAKS = (
    "Alpha\nUser: beta?!\nAssistant: 12\n7 ...\nNow: \u2026\n<|history|>\nMessage: (\u4f60\u3002)\n(now) \U0001f642\nz"
)
"""Lines that end and begin as those of prompts do."""


@dataclass(frozen=True, slots=True)
class Joint:
    """What a template writes between two contents: text that is encoded with the one before, control tokens, and text
    that is encoded with the one after. Without `control` there are no tokens, and all text is in `left`."""

    left: str
    ids: Sequence[int]
    right: str
    control: bool

    @classmethod
    async def learn(cls, codec: Codec, text: str, *, opening: bool = False) -> Joint:
        parts = codec.split(text)
        marks = [index for index, part in enumerate(parts) if isinstance(part, int)]
        if not marks:
            return cls("" if opening else text, (), text if opening else "", control=False)
        begin, end = marks[0], marks[-1] + 1
        left = "".join(str(part) for part in parts[:begin])
        ids: list[int] = []
        if opening:
            ids, left = (await codec.encode(left, place="start") if left else []), ""
        for part in parts[begin:end]:
            ids += [part] if isinstance(part, int) else await codec.encode(part, place="after")
        return cls(left, ids, "".join(str(part) for part in parts[end:]), control=True)


@dataclass(slots=True)
class _Stretch:
    """A text that is encoded by itself. `kept`, if one line alone is in it, keeps its ids."""

    place: Place
    prefix: str
    suffix: str = ""
    text: str = ""
    kept: Kept | None = None
    lines: int = 0
    volatile: bool = False
    ids: Sequence[int] = ()

    def add(self, lines: Sequence[Line]) -> None:
        """Lines of one message."""
        self.text += self.suffix + "\n".join(line.text for line in lines)
        self.suffix = ""
        self.kept = lines[0].kept if not self.lines and len(lines) == 1 else None
        self.lines += len(lines)
        self.volatile |= any(line.volatile for line in lines)


class Pieces:
    """What one template writes around the contents of a conversation, as tokens."""

    def __init__(self, codec: Codec, kind: str, leading: Sequence[int] = ()) -> None:
        """`kind` keeps the ids of different builders apart; `leading` opens a prompt that no template does."""
        self._codec, self._kind = codec, kind
        self._joints: dict[tuple[str, str], Joint] = {}
        self._opening, self._closing = Joint("", leading, "", control=False), Joint("", (), "", control=False)

    async def learn(self, texts: Sequence[str], roles: Sequence[str]) -> None:
        """`texts` are what stands before, between and after the contents of messages in those roles."""
        opening, *between, closing = texts
        self._opening = await Joint.learn(self._codec, opening, opening=True)
        end = await Joint.learn(self._codec, closing)
        if end.right:  # nothing follows it
            end = replace(end, ids=[*end.ids, *await self._codec.encode(end.right, place="after")], right="")
        self._closing = end
        for pair, text in zip(pairwise(roles), between, strict=True):
            self._joints[pair] = await Joint.learn(self._codec, text)

    async def breaks(self) -> bool:
        """Whether a line that begins after a newline is encoded as by itself."""
        first, *rest = _BREAKS.splitlines(keepends=True)
        ids = [await self._codec.encode(first, place="start"), *await self._codec.encode_all(rest)]
        return list(chain.from_iterable(ids)) == await self._codec.encode(_BREAKS, place="start")

    @property
    def opening(self) -> int:
        """Tokens before the first content."""
        return len(self._opening.ids)

    @property
    def overhead(self) -> int:
        """Most tokens between two messages; a guess if that was not learned."""
        return max((len(joint.ids) for joint in self._joints.values()), default=8)

    @property
    def are_cut(self) -> bool:
        """Control tokens stand between all messages: what follows one changes nothing in it."""
        return all(joint.control for joint in self._joints.values())

    async def measure(self, lines: Sequence[tuple[Role | None, Line]], *, alone: bool) -> list[int]:
        """Tokens of each line: of one among others, or of a message in that role, or (not `alone`) its first line."""
        new = [
            (line, _Stretch(*self._usual(role, alone), line.text, line.kept))
            for role, line in lines
            if line.size is None
        ]
        await self._encode([stretch for _, stretch in new])
        for line, stretch in new:
            line.size = len(stretch.ids)
        return [line.size or 0 for _, line in lines]

    def _usual(self, role: Role | None, alone: bool) -> tuple[Place, str, str]:
        """Where such a line stands most often, and what is encoded with it."""
        if role is None:
            return "inside", "", "\n"
        if role == "system":
            following = self._joints.get(("system", "user")) if alone else None
            place: Place = "after" if self._opening.control else "start"
            return place, self._opening.right, "\n" if following is None else following.left
        other = "assistant" if role == "user" else "user"
        before = self._joints[other, role]
        return "after" if before.control else "inside", before.right, self._joints[role, other].left

    async def assemble(self, turns: Talk) -> tuple[list[int], int]:
        """The ids, and how many of them stand before the first stretch with a volatile line."""
        parts: list[_Stretch | Sequence[int]] = [self._opening.ids]
        stretch: _Stretch | None = None
        """Begun in an earlier message, if no control token stands between."""
        place: Place = "after" if self._opening.control else "start"
        prefix = self._opening.right
        for said, following in zip(turns, [*turns[1:], None], strict=True):
            joint = self._closing if following is None else self._joints[said.role, following.role]
            lines, count, begin = said.lines, len(said.lines), 0
            while begin < count:
                end = begin + 1
                while end < count and lines[end].loose:
                    end += 1
                suffix = "\n" if end < count else joint.left
                is_cut = end < count or joint.control
                known = None
                if stretch is None and is_cut and end == begin + 1 and (kept := lines[begin].kept):
                    known = kept.get(_where(self._kind, place, prefix, suffix))
                if known is not None:
                    parts.append(memoryview(known).cast("I"))
                else:
                    stretch = stretch or _Stretch(place, prefix)
                    stretch.add(lines[begin:end])
                    stretch.suffix = suffix
                    if is_cut or following is None:
                        parts.append(stretch)
                        stretch = None
                begin, place, prefix = end, "inside", ""
            if joint.control:
                parts.append(joint.ids)
                place, prefix = "after", joint.right
        if prefix:
            parts.append(_Stretch(place, prefix))
        await self._encode([part for part in parts if isinstance(part, _Stretch)])
        ids: list[int] = []
        stable = None
        for part in parts:
            if isinstance(part, _Stretch):
                if part.volatile and stable is None:
                    stable = len(ids)
                ids += part.ids
            else:
                ids += part
        return ids, len(ids) if stable is None else stable

    async def _encode(self, stretches: Iterable[_Stretch]) -> None:
        new: dict[Place, list[_Stretch]] = {}
        for stretch in stretches:
            where = _where(self._kind, stretch.place, stretch.prefix, stretch.suffix)
            if stretch.kept and (known := stretch.kept.get(where)) is not None:
                stretch.ids = memoryview(known).cast("I")
            else:
                new.setdefault(stretch.place, []).append(stretch)
        for place, group in new.items():
            texts = [stretch.prefix + stretch.text + stretch.suffix for stretch in group]
            for stretch, ids in zip(group, await self._codec.encode_all(texts, place=place), strict=True):
                stretch.ids = ids
                if stretch.kept is not None:
                    where = _where(self._kind, place, stretch.prefix, stretch.suffix)
                    stretch.kept[where] = array("I", ids).tobytes()


def _where(kind: str, place: Place, prefix: str, suffix: str) -> str:
    """The key of `Kept`."""
    return f"{kind}\0{place}\0{prefix}\0{suffix}"
