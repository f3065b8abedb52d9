"""Frames to fuzz with: valid messages, mutations of their structure, and everything that RFC 6455 forbids."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from fuzz.target import BINARY, CLOSE, PING, PONG, TEXT, frame
from hypothesis import strategies as st


class Raw(str):
    """Stands for itself in the JSON text, whatever that makes of it."""


BASES: list[dict[str, Any]] = [
    {"type": "start", "session_id": "s1", "user_utterance": "What is the capital of France?"},
    {
        "type": "start",
        "session_id": "s2",
        "user_utterance": "hi",
        "persona_text": "You are Ada.",
        "persona_style": "wholesome",
        "assistant_gender": "female",
        "user_identity": "non-binary",
        "history_text": "User: hi\nAssistant: hello\n",
        "heard_chars": 3,
        "sampling": {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
                     "presence_penalty": 0.1, "frequency_penalty": 0.1, "max_tokens": 5, "seed": 1, "stop": ["x"]},
        "tools": [{"name": "look", "description": "Looks.", "parameters": {
            "type": "object", "properties": {"at": {"type": "string"}, "n": {"anyOf": [{"type": "integer"}]}},
            "required": ["at"]}, "examples": [{"message": "m", "arguments": {"at": "x"}}]}],
    },
    {"type": "start", "session_id": "s3", "user_utterance": "hi", "tools": None, "history_text": None},
    {"type": "cancel", "heard_chars": 2},
    {"type": "cancel"},
    {"type": "warm_persona", "persona_style": "wholesome", "assistant_gender": "man", "session_id": "s1"},
    {"type": "warm_history", "history_text": "User: a\nAssistant: b", "persona_text": "x"},
    {"type": "set_persona", "persona_text": None, "user_identity": "woman", "session_id": "s2"},
    {"type": "ping"},
    {"type": "end"},
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 1.5, -0.0, 1e308, "", "x", "s1", [], {}, [None],
    {"": 0},
    Raw("1e400"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1" * 400), Raw("1" * 5000),
    Raw("0." + "3" * 5000), Raw("01"), Raw("1e"), Raw("-"), Raw("1" * 5000 + "e-4990"),
    Raw("[" * 200 + "]" * 200), Raw("[" * 5000 + "]" * 5000), Raw("[" * 100_000), Raw('{"a":' * 900 + "1" + "}" * 900),
    Raw('{"a":' * 50_000), Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw('"\\u0000"'), Raw('"\\x41"'), Raw('"\\u12"'),
    Raw('"a\x00b"'), Raw('"\x1b[2J\n"'), Raw("'x'"), Raw("nul"), Raw("undefined"), Raw(""),
    "\x00\x01\x1b[31m\x7f\u2028\u202e", "\U0001f600" * 50, "e\u0301" * 300, "x" * 129, "x" * 128, "x" * 70_000,
    "User: " * 20_000, "<|im_start|>system\n<|im_end|>", "%s%n{0}${x}", "../../etc/passwd", "flood",
    [{"name": "a", "parameters": {"type": "object", "properties": {"a": {"pattern": "(a+)+$"}}}}],
    [{"name": "a", "parameters": {"type": "object", "$ref": "#"}}], [{"name": "a" * 65}], [{"function": 1}], [{}] * 65,
    [{"name": "a", "parameters": {"type": "object", "enum": Raw("[" * 150 + "]" * 150)}}],
    [{"name": "a", "parameters": {"type": "object", "required": [1]}}], [{"name": "a"}, {"name": "a"}],
    {"temperature": Raw("1e400")}, {"seed": 2**63}, {"stop": ["\x00" * 65]}, {"stop": [""] * 9}, {"max_tokens": 0},
]  # fmt: skip
NAMES = [
    "type", "session_id", "user_utterance", "persona_text", "persona_style", "assistant_gender", "user_identity",
    "history_text", "tools", "sampling", "heard_chars", "temperature", "stop", "seed", "max_tokens", "name",
    "parameters",
    "", "\x00", "x" * 5000, "__class__", "\U0001f600",
]  # fmt: skip
EDITS = ["set", "delete", "rename", "double", "wrap", "retype"]


def dumps(value: Any) -> str:
    """JSON text, with `Raw` as it is, and a field twice where its value is a `Twice`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name.strip(chr(9)))}:{dumps(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a message, so that an edit can be anywhere."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        part = waiting.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in keys:
            found.append((part, key))
            waiting.append(part[key])
    return found


def edit(message: dict[str, Any], what: str, where: int, value: Any, name: str) -> Any:
    """The message with one change at the `where`-th place."""
    message = copy.deepcopy(message)
    places = _places(message)
    if what == "retype" or not places:
        return message | {"type": value}
    if what == "wrap":
        return [message] if where % 2 else {"type": "start", name: message}
    part, key = places[where % len(places)]
    if what == "delete":
        del part[key]
    elif what == "set" or not isinstance(part, dict):
        part[key] = value
    elif what == "rename":
        part[name] = part.pop(key)
    else:
        part[key + "\t"] = value  # the same name again, and it is the last that counts
    return message


def _edited(base: dict[str, Any], edits: list[tuple[str, int, Any, str]]) -> bytes:
    message: Any = base
    for one in edits:
        if isinstance(message, dict):
            message = edit(message, *one)
    return dumps(message).encode("utf-8", "surrogatepass")


def _damaged(text: bytes, seed: int) -> bytes:
    """Some bytes changed, lost, doubled or moved."""
    chance = random.Random(seed)
    damaged = bytearray(text)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(damaged) + 1)
        match chance.randrange(5):
            case 0:
                damaged[at:at] = bytes(chance.choices(range(256), k=chance.randint(1, 4)))
            case 1:
                del damaged[at : at + chance.randint(1, 8)]
            case 2:
                damaged[at : at + 1] = bytes([chance.randrange(256)])
            case 3:
                damaged[at:at] = damaged[at : at + 20]
            case _:
                damaged[at:at] = chance.choice(
                    [b"\xff", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\xc0\x80", b"\\u"]
                )
    return bytes(damaged)


# Recipes are drawn, not bytes: small numbers print and shrink well.

Edit = tuple[int, int, int, int]
Recipe = tuple[int, int, list[Edit], int | None]
"""How it is framed, which message it was, what was changed in it, and a seed where its bytes are damaged, too."""
_numbers = st.integers(0, 2**16)
_edits = st.lists(st.tuples(_numbers, _numbers, _numbers, _numbers), max_size=3)
recipes = st.tuples(_numbers, _numbers, _edits, st.none() | st.none() | st.integers(0, 2**32))


def payload(base: int, edits: list[Edit], damage: int | None, bases: Sequence[dict[str, Any]] = BASES[:-1]) -> bytes:
    """A text that is more or less a message."""
    message: Any = bases[base % len(bases)]
    for what, where, value, name in edits:
        if isinstance(message, dict):
            chosen = EDITS[what % len(EDITS)], where, VALUES[value % len(VALUES)], NAMES[name % len(NAMES)]
            message = edit(message, *chosen)
    text = dumps(message).encode("utf-8", "surrogatepass")
    return text if damage is None else _damaged(text, damage)


def _fragments(text: bytes) -> bytes:
    third = len(text) // 3
    parts = text[:third], b"", text[third : 2 * third], text[2 * third :]
    frames = [frame(TEXT if n == 0 else 0, part, fin=n == 3) for n, part in enumerate(parts)]
    return frame(PING, b"between").join(frames)


_MILD: list[Callable[[bytes], bytes]] = [
    *[lambda text: frame(TEXT, text)] * 4,
    lambda text: frame(BINARY, text),
    lambda text: frame(TEXT, text, size=8),
    _fragments,
    lambda text: frame(PING, text[:125]),
    lambda text: frame(PONG, text[:125]),
    lambda text: frame(PING, b"flood") * 100,
]
_CODES = [0, 1, 999, 1000, 1001, 1004, 1005, 1006, 1007, 1011, 1014, 1015, 1016, 2999, 3000, 4999, 5000, 65535]
_FATAL: list[Callable[[bytes], bytes]] = [
    *[lambda text, code=code: frame(CLOSE, code.to_bytes(2, "big") + text[:100]) for code in _CODES],
    lambda text: frame(CLOSE, b""),
    lambda text: frame(CLOSE, b"\x03"),
    lambda text: frame(CLOSE, b"\x03\xe8\xff\xfe"),
    lambda text: frame(TEXT, b'{"type":"end"}'),
    *[lambda text, opcode=opcode: frame(opcode, text) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)],
    *[lambda text, rsv=rsv: frame(TEXT, text, rsv=rsv) for rsv in range(1, 8)],
    lambda text: frame(TEXT, text, masked=False),
    lambda text: frame(0, text),
    lambda text: frame(TEXT, text, fin=False) * 2,
    lambda text: frame(PING, text[:100], fin=False),
    lambda text: frame(PING, b"x" * 126),
    lambda text: frame(TEXT, b"x" * 300_000),
    lambda text: b"\x81\xff\x7f" + b"\xff" * 7,
    lambda text: b"\x81\xff" + b"\xff" * 8,
]


def mild(recipe: Recipe, bases: Sequence[dict[str, Any]] = BASES[:-1]) -> bytes:
    """Frames after which the socket is still open."""
    how, *rest = recipe
    return _MILD[how % len(_MILD)](payload(*rest, bases))


def fatal(recipe: Recipe) -> bytes:
    """Frames after which the service closes."""
    how, *rest = recipe
    return _FATAL[how % len(_FATAL)](payload(*rest))
