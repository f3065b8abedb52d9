"""Calibration: the text that a model reads while it is quantized, in the form of the service's prompts.

Chat samples go through the chat model's prompt builder, decisions through the tool model's; plain text is taken as
it is.
"""

from __future__ import annotations

import codecs
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Literal

import msgspec

from yaptext.dialogue.chat_prompt import ChatPrompts, Limits
from yaptext.dialogue.persona import Persona, gender, style
from yaptext.dialogue.tool_prompt import ToolPrompts, dumps
from yaptext.dialogue.tools import ToolSet
from yaptext.dialogue.transcript import Message
from yaptext.engine.base import Codec, Role
from yaptext.engine.hub_client import hub_token
from yaptext.engine.model_config import stays
from yaptext.errors import QuantizeDelayed, QuantizeRefused, SettingsError, YapError
from yaptext.files import read_file
from yaptext.settings import Settings
from yaptext.wire.frames import Call, Identity

HELD_OUT_BLOCKS = 4
"""Blocks that are set aside, to measure on what was not calibrated with."""
_HELD_OUT_TOKENS = 1024
"""Most of each that are measured on: a token takes as many numbers as the vocabulary has entries."""
LEAST_BLOCKS = 4
_HELD_OUT_EVERY = 5
_TEXT_CHARS = 2000
"""Paragraphs of a text are gathered up to about this many characters, and longer ones are cut."""
_PIECES = re.compile(rf".{{1,{_TEXT_CHARS}}}(?:\s|$)|.{{{_TEXT_CHARS}}}", re.DOTALL)
"""A long paragraph in pieces, cut behind its words where it has some."""
_HUB_ROWS = 4096
MAX_FILE_BYTES = 256 * 2**20
"""Most of one file: all of it is read at once, and a few MB are what a job takes samples from."""


@dataclass(slots=True)
class Corpus:
    """Documents by kind, in the order they came."""

    conversations: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, row: Any, where: str) -> None:
        """Takes one JSON object: a conversation, a decision or a text. Raises `QuantizeRefused`."""
        try:
            if isinstance(row.get("messages"), list):
                told = [_told(message) for message in row["messages"]]
                messages = [message for message in told if message is not None]
                self.conversations.append({"persona": _persona(row), "messages": messages, "where": where})
            elif isinstance(row.get("utterance"), str):
                calls = msgspec.convert(row.get("calls", []), list[Call])
                history = [_told(message) for message in row.get("history", [])]
                self.decisions.append({"utterance": row["utterance"], "calls": calls, "history": history})
            else:
                self.texts += _gathered(row["text"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise QuantizeRefused(
                f'{where} is none of {{"text": ...}}, {{"messages": [...]}} and {{"utterance": ..., "calls": [...]}}'
                + (f": {error}" if isinstance(error, msgspec.ValidationError) else "")
            ) from None


def _told(message: dict[str, Any]) -> Message | None:
    """A message of `{"user": text}` or `{"role": "user", "content": text}`; None for a system message."""
    if "role" in message:
        message = {message["role"]: message["content"]}
    ((speaker, text),) = message.items()
    if speaker == "system":
        return None
    return Message(msgspec.convert(speaker, Literal["user", "assistant"]), msgspec.convert(text, str))


def _persona(row: dict[str, Any]) -> Persona:
    """Whose conversation it is: `style`, `gender` and `identity` as a client names them, or `persona_text`."""
    who = msgspec.convert(row.get("gender"), str | None)
    return Persona(
        msgspec.convert(row.get("style"), str | None),
        gender(who) if who else None,
        msgspec.convert(row.get("identity"), Identity | None),
        msgspec.convert(row.get("persona_text"), str | None),
    )


def label(settings: Settings) -> str:
    """The origin of the text, for readers of the result: `builtin`, the hub's data set, or `own`."""
    source = settings.awq_calibration
    on_hub = source.startswith("hub:") and not Path(source.removeprefix("hub:")).exists()
    return source if on_hub or source == "builtin" else "own"


def fingerprint(settings: Settings) -> str:
    """What the text is, in a word: the name of the hub's data set, or 16 hex digits of its files' sha256 (of a data
    set's that is a folder here, of its path's)."""
    source = settings.awq_calibration
    if source.startswith("hub:"):
        return source if label(settings) == source else hashlib.sha256(source.encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    for _, content in _files(source):
        digest.update(content)
    return digest.hexdigest()[:16]


def _files(source: str) -> Iterator[tuple[str, bytes]]:
    """Name, below the folder where it is one, and content."""
    try:
        if source == "builtin":
            folder = resources.files("yaptext.quantize") / "calibration_data"
            found = {file.name: file for file in sorted(folder.iterdir(), key=lambda file: file.name)}
        else:
            path = Path(source)
            if not path.exists():
                raise SettingsError(f"AWQ_CALIBRATION={source} is neither a file, a folder, `builtin` nor `hub:NAME`")
            if not (path.is_dir() or path.is_file()):
                raise SettingsError(f"AWQ_CALIBRATION={source} is not allowed: it is no regular file or folder")
            inside = sorted(path.rglob("*")) if path.is_dir() else []
            found = {str(file.relative_to(path)): file for file in inside} or {path.name: path}
        files = {name: file for name, file in found.items() if name.endswith((".txt", ".jsonl")) and file.is_file()}
        if not files:
            raise SettingsError(f"AWQ_CALIBRATION={source} holds no .txt or .jsonl file")
        for name, file in files.items():
            yield name, read_file(file, MAX_FILE_BYTES) if isinstance(file, Path) else file.read_bytes()
    except OSError as error:
        raise SettingsError(f"AWQ_CALIBRATION={source} cannot be read: {error}") from None


def read(settings: Settings) -> Corpus:
    """The documents that `AWQ_CALIBRATION` names. Raises `QuantizeRefused`, which names the file and line,
    `SettingsError` if there is no such text, and `QuantizeDelayed` if the hub does not answer."""
    if not settings.awq_calibration.startswith("hub:"):
        return _read_files(settings.awq_calibration)
    corpus = Corpus()
    for number, row in enumerate(_hub_rows(settings), 1):
        corpus.add(row, f"row {number} of {settings.awq_calibration}")
    return corpus


def _read_files(source: str) -> Corpus:
    corpus = Corpus()
    for name, read in _files(source):
        content = read.removeprefix(codecs.BOM_UTF8)
        if name.endswith(".txt"):
            try:
                corpus.texts += _gathered(content.decode("utf-8").replace("\r\n", "\n"))
            except UnicodeDecodeError as error:
                raise QuantizeRefused(f"calibration file {name} cannot be read: {error}") from None
            continue
        for number, line in enumerate(
            content.split(b"\n"), 1
        ):  # splitlines() also splits at characters that JSON strings may contain
            if line.strip():
                where = f"line {number} of {name}"
                try:
                    row = msgspec.json.decode(line)
                except (UnicodeDecodeError, msgspec.DecodeError) as error:
                    raise QuantizeRefused(f"{where} is no JSON: {error}") from None
                corpus.add(row, where)
    return corpus


def _gathered(text: str) -> list[str]:
    """The paragraphs of a text, neighbours together up to a document's size, longer ones cut to it."""
    documents = [""]
    for paragraph in text.split("\n\n"):
        for piece in _PIECES.findall(paragraph) or [paragraph]:
            if documents[-1] and len(documents[-1]) + len(piece) > _TEXT_CHARS:
                documents.append("")
            documents[-1] += piece
        documents[-1] += "\n\n"
    return [document.strip() for document in documents if document.strip()]


def _hub_rows(settings: Settings) -> Iterator[dict[str, Any]]:
    name = settings.awq_calibration.removeprefix("hub:")
    token = hub_token(settings)
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train", streaming=True, token=token)
        yield from islice(rows, _HUB_ROWS)
    except Exception as error:  # dozens of types of the data set library, its readers and the network
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        kind = SettingsError if stays(error) else QuantizeDelayed
        raise kind(f"cannot read the data set {name}: {detail}") from error


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids in blocks of one length: what is calibrated with, and what is measured on. `made_of` counts the
    documents by kind."""

    calibration: list[list[int]]
    held_out: list[list[int]]
    made_of: dict[str, int]


async def samples(settings: Settings, codec: Codec, corpus: Corpus, roles: Sequence[Role], tools: ToolSet) -> Samples:
    """Lays the corpus out for the roles that the model serves. Raises `QuantizeRefused` where it is too little."""
    size = settings.awq_calibration_tokens
    documents: dict[str, list[list[int]]] = {"text": [await codec.encode(text) for text in corpus.texts]}
    if "chat" in roles:
        documents["conversation"] = await _conversations(settings, codec, corpus.conversations)
    if "tool" in roles:
        decisions = corpus.decisions
        if not decisions and settings.awq_calibration != "builtin":
            decisions = _read_files("builtin").decisions
        documents["decision"] = await _decisions(settings, codec, decisions, tools, size)
    kept: list[list[list[int]]] = []
    aside: list[list[list[int]]] = []
    for kind in documents.values():
        random.Random(7).shuffle(kind)
        aside.append(_blocks(kind[::_HELD_OUT_EVERY], size))
        kept.append(_blocks([ids for index, ids in enumerate(kind) if index % _HELD_OUT_EVERY], size))
    calibration, held_out = _in_turn(kept), _in_turn(aside)
    if len(calibration) < LEAST_BLOCKS or not held_out:
        have = [len(ids) for kind in documents.values() for ids in kind]
        need = size * (LEAST_BLOCKS + 1) * _HELD_OUT_EVERY // (_HELD_OUT_EVERY - 1) + size
        raise QuantizeRefused(
            f"the calibration text is {sum(have)} tokens in {len(have)} documents; about {need} in several are needed "
            f"({LEAST_BLOCKS} samples of {size} tokens, and every fifth document to measure on)"
        )
    return Samples(
        calibration[: settings.calibration_samples],
        [block[:_HELD_OUT_TOKENS] for block in held_out[:HELD_OUT_BLOCKS]],
        {kind: len(found) for kind, found in documents.items() if found},
    )


async def _conversations(settings: Settings, codec: Codec, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Each conversation as the prompt of its last turn, and the reply."""
    prompts = await ChatPrompts.open(codec, settings.chat_prompt_format, Limits.of(settings))
    documents = []
    for number, row in enumerate(rows):
        persona: Persona = row["persona"]
        messages: list[Message] = row["messages"]
        last = max((index for index, message in enumerate(messages) if message.speaker == "user"), default=None)
        if last is None:
            continue
        try:
            if persona.style is not None:
                style(persona.style)
            text = persona.compose(settings.default_persona_style)
            now = f"{('Monday', 'Wednesday', 'Friday', 'Sunday')[number % 4]}, {number % 24:02}:{number * 7 % 60:02}"
            ids = await prompts.turn(text, messages[:last], messages[last].text, now)
        except YapError as error:
            raise QuantizeRefused(f"{row['where']}: {error}") from None
        for reply in messages[last + 1 :]:
            ids = ids + await codec.encode(reply.text)
        documents.append(ids)
    return documents


async def _decisions(
    settings: Settings, codec: Codec, rows: Sequence[dict[str, Any]], tools: ToolSet, size: int
) -> list[list[int]]:
    """Each decision as its prompt and answer. All open with the same head: after the first, their last `size` tokens
    say what is new."""
    prompts = ToolPrompts(codec, settings.tool_history_tokens)
    documents: list[list[int]] = []
    for row in rows:
        ids = await prompts.turn(tools, row["history"], row["utterance"])
        ids += await codec.encode(dumps(row["calls"]))
        documents.append(ids[-size:] if documents else ids)
    return documents


def _blocks(documents: Iterable[list[int]], size: int) -> list[list[int]]:
    """The documents end to end, cut to whole blocks."""
    ids = list(chain.from_iterable(documents))
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def _in_turn(kinds: Iterable[list[list[int]]]) -> list[list[int]]:
    """One block of each kind after the other, as long as there are any."""
    return [block for group in zip_longest(*kinds) for block in group if block is not None]
