"""A model's text side (tokenizer, chat template): what an engine or the quantizer makes prompts with.

A control token is any token that was added to the vocabulary, whether it is marked special or not: role marks and
`<think>` often are not. Templates write them; in a content they are text. The tokenizer cuts a prompt at them first and
encodes each stretch between them by itself, so that a prompt can be put together from stretches.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from yaptext.engine.base import Place, whose
from yaptext.engine.template import ChatTemplate
from yaptext.errors import StartRefused

_LONG_TEXT = 1000
"""Characters from which a text is tokenized in a thread (about 0.3 ms of the event loop)."""
_DISGUISE = "\ufffe"
"""Breaks a control token in two. Unicode keeps this character out of texts."""
_UNSEEN = f"\uffff{secrets.token_hex(8)}."
"""What a control token is called, with a number, in a tokenizer that must not find it."""
_STRETCH = "\uffff"
_PLACES: tuple[Place, ...] = ("start", "after", "inside")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACES = " \t\r\n\u2581"


_THREADS = max(2, (os.cpu_count() or 1) // 2)
_executor = ThreadPoolExecutor(
    _THREADS, thread_name_prefix="tokenize", initializer=partial(os.setpriority, os.PRIO_PROCESS, 0, 5)
)
"""The event loop goes first on a core that both want: a wait for a text is a wait of its own key."""
_gates: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]] = WeakKeyDictionary()
_T = TypeVar("_T")


class HubCodec:
    """The `Codec` of a fast tokenizer as transformers loads it. Raises `StartError` for any other."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_model_len: int,
        block_size: int,
        template: str | None = None,
        end_ids: Sequence[int] = (),
    ) -> None:
        """`template` is for a tokenizer that has none, `end_ids` are those of the model's configuration."""
        self.max_model_len, self.block_size = max_model_len, block_size
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise StartRefused(f"{type(tokenizer).__name__} is no fast tokenizer: the model needs a tokenizer.json")
        parts = _taken_apart(backend.to_str())
        self._whole, self._content, self._cutter, self.control = (
            parts.whole,
            parts.content,
            parts.cutter,
            parts.control,
        )
        first = "".join(re.escape(character) for character in sorted({content[0] for content in self.control}))
        self._begins_control = re.compile(f"[{first}]" if first else "(?!)")
        self.bounded_by_bytes = parts.bounded_by_bytes
        self._shown = tokenizer
        self.template = ChatTemplate(tokenizer, fallback=template)
        self.thinking, self.render = self.template.thinking, self.template.render
        self.ticks, self.has_template = self.template.ticks, self.template.exists
        self.leading: list[int] = _leading(self._whole)
        own = tokenizer.eos_token_id
        self.end_ids: list[int] = sorted({*end_ids, *([] if own is None else [own])})

    @property
    def day(self) -> tuple[str, ...]:
        return self.template.day

    async def encode(self, text: str, *, place: Place = "inside") -> list[int]:
        return (await _encode(self._content[place], [text]))[0]

    async def encode_all(self, texts: Sequence[str], *, place: Place = "inside") -> list[list[int]]:
        return await _encode(self._content[place], texts)

    async def clip(self, text: str, max_tokens: int, *, keep: Literal["start", "end"]) -> str:
        return await _in_thread(partial(self._clip, text, max_tokens, keep))

    def _clip(self, text: str, max_tokens: int, keep: Literal["start", "end"]) -> str:
        count = max_tokens
        while True:
            (encoding,) = self._content["inside"].encode_batch([text], add_special_tokens=False)
            if len(encoding.ids) <= max_tokens or not text:
                return text
            if count <= 0:
                return ""
            text = text[: encoding.offsets[count - 1][1]] if keep == "start" else text[encoding.offsets[-count][0] :]
            count -= 1  # a cut text can encode into more tokens than it was cut from

    def disguise(self, text: str) -> str:
        text = text.replace(_DISGUISE, "")
        if not self._begins_control.search(text):
            return text  # nearly always: to cut it costs 30 times as much
        while marks := [(start, control) for start, _, control in self._cut(text) if control is not None]:
            places = [0, *(text.index(control, start) + 1 for start, control in marks), len(text)]
            text = _DISGUISE.join(text[begin:end] for begin, end in pairwise(places))
        return text

    def split(self, rendered: str) -> list[int | str]:
        return [
            rendered[start:end].replace(_DISGUISE, "") if control is None else self.control[control]
            for start, end, control in self._cut(rendered)
        ]

    def _cut(self, text: str) -> list[tuple[int, int, str | None]]:
        """The spans of a text: control tokens (with the spaces that they take in), and the stretches between them."""
        (encoding,) = self._cutter.encode_batch([text], add_special_tokens=False)
        tokens = zip(encoding.offsets, encoding.tokens, strict=True)
        return [(start, end, None if token == _STRETCH else token) for (start, end), token in tokens]

    async def encode_rendered(self, rendered: str) -> list[int]:
        if _DISGUISE not in rendered:
            return (await _encode(self._whole, [rendered]))[0]
        parts = self.split(rendered)
        ids: list[int] = []
        for index, part in enumerate(parts):
            ids += [part] if isinstance(part, int) else await self.encode(part, place="after" if index else "start")
        return ids

    def show(self, ids: Sequence[int]) -> str:
        return str(self._shown.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True)
class _Parts:
    """A tokenizer as a codec needs it: `whole` as it is, `content` for texts without control tokens, `cutter` for
    finding those, and their ids."""

    whole: Tokenizer
    content: dict[Place, Tokenizer]
    cutter: Tokenizer
    control: dict[str, int]
    bounded_by_bytes: bool


@lru_cache(maxsize=2)
def _taken_apart(text: str) -> _Parts:
    """Of a tokenizer.json. Two models often share one."""
    source = json.loads(text)
    control = {token["content"]: token for token in source["added_tokens"] if _is_control(token)}
    plain = _without(source, set(control))
    texts: dict[Place, str] = {place: json.dumps(_placed(plain, place)) for place in _PLACES}
    loaded = {text: _load(text) for text in set(texts.values())}
    return _Parts(
        whole=_load(text),
        content={place: loaded[text] for place, text in texts.items()},
        cutter=_cutter(control.values()),
        control={content: token["id"] for content, token in control.items()},
        bounded_by_bytes=source["normalizer"] is None and source["model"]["type"] in ("BPE", "WordLevel"),
    )


def _load(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_control(token: dict[str, Any]) -> bool:
    """Runs of spaces and newlines are added to some vocabularies, and the bytes of which rare characters are made."""
    content = token["content"]
    return len(content) > 1 and bool(content.strip(_SPACES)) and not _BYTE.fullmatch(content)


def _cutter(control: Iterable[dict[str, Any]]) -> Tokenizer:
    """Finds control tokens just as the whole tokenizer does; what is between two is one unknown word to it."""
    tokenizer = Tokenizer(WordLevel({_STRETCH: 0}, unk_token=_STRETCH))
    kinds = ("single_word", "lstrip", "rstrip")
    tokenizer.add_tokens(
        [AddedToken(token["content"], normalized=False, **{kind: token[kind] for kind in kinds}) for token in control]
    )
    return tokenizer


def _without(source: dict[str, Any], control: set[str]) -> dict[str, Any]:
    """The tokenizer without its control tokens: their ids stay taken, under names that no text has. Vocabularies made
    by SentencePiece hold them as words, too, and merges that lead to them."""
    names = {content: f"{_UNSEEN}{index}" for index, content in enumerate(sorted(control))}
    model = dict(source["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(word, word): index for word, index in vocab.items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in vocab]
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[one, two] for one, two in pairs if not {one, two, one + two} & control]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [
        token | {"content": names[token["content"]], "lstrip": False, "rstrip": False}
        if token["content"] in names
        else token
        for token in source["added_tokens"]
    ]
    return source | {"model": model, "added_tokens": added, "post_processor": None}


def _placed(part: Any, place: Place) -> Any:
    """A tokenizer's parts as they are for a text at `place`."""
    if isinstance(part, list):
        return [_placed(item, place) for item in part if not (place == "inside" and _is_prepend(item))]
    if not isinstance(part, dict) or place == "start":
        return part
    placed = {name: _placed(value, place) if name in _STEPS else value for name, value in part.items()}
    if place == "inside" and _is_prepend(placed.get("normalizer")):
        placed["normalizer"] = None
    if part.get("type") == "Metaspace" and (place == "inside" or part.get("prepend_scheme") == "first"):
        placed["prepend_scheme"] = "never"
        placed.pop("add_prefix_space", None)
    if part.get("type") == "ByteLevel" and place == "inside":
        placed["add_prefix_space"] = False
    return placed


_STEPS = {"normalizer", "pre_tokenizer", "normalizers", "pretokenizers"}


def _is_prepend(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"


def _leading(tokenizer: Tokenizer) -> list[int]:
    alone, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    for start in range(len(whole)):
        if whole[start : start + len(alone)] == alone:
            return whole[:start]
    return []


async def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """In batches alone the tokenizer lets go of the interpreter's lock: its `encode` would hold up the loop from a
    thread, too."""

    def encode() -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return await _in_thread(encode) if sum(map(len, texts)) > _LONG_TEXT else encode()


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Runs it in a thread of its own kind. One key has all but one of them at most, so that others never wait for its
    texts."""
    gates = _gates.setdefault(asyncio.get_running_loop(), {})
    async with gates.setdefault(whose.get(), asyncio.Semaphore(_THREADS - 1)):
        return await asyncio.get_running_loop().run_in_executor(_executor, work)
