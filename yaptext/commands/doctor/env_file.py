"""The environment file of the units, read as systemd reads it (`parse_env_file_internal`), and what is odd in it."""

from __future__ import annotations

import re
from typing import NamedTuple

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPACE = " \t\n\r"
_ENDS = "\n\r"


class EnvFile(NamedTuple):
    """`faults` are lines that do not say what their writer meant; `oddities` are harmless to systemd. Both name a line
    and show no value."""

    values: dict[str, str]
    faults: list[str]
    oddities: list[str]


def parse(content: bytes) -> EnvFile:
    """Never raises."""
    faults: list[str] = []
    oddities: list[str] = []
    if content.startswith(b"\xef\xbb\xbf"):
        faults.append("line 1 begins with a byte order mark: systemd does not know its variable")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return EnvFile({}, [*faults, "the file is not UTF-8: systemd refuses it"], oddities)
    if "\0" in text:
        faults.append("the file has NUL bytes")
    if "\r\n" in text:
        oddities.append("lines end in CRLF, as on Windows: a shell that reads the file keeps the CR in each value")
    values: dict[str, str] = {}
    for number, name, value, is_open, is_quoted in _pairs(text):
        bare = name.removeprefix("\ufeff")
        if _NAME.fullmatch(name) is None:
            if bare == name:
                what = "export is a shell command" if name.startswith("export ") else "no variable has such a name"
                faults.append(f"line {number}: {what}: systemd ignores the line")
            continue
        if is_open:
            faults.append(f"line {number}: {name} opens a quote that is never closed: it includes the lines below")
        elif "\n" in value:
            faults.append(f"line {number}: {name} has a quoted value over several lines")
        elif not is_quoted and re.search(r"\s#", value):
            faults.append(f"line {number}: the comment after {name} is part of its value")
        elif value[:1] in "\u201c\u2018\u201d" and value:
            faults.append(f"line {number}: the value of {name} begins with a typographic quote")
        elif not is_quoted and value[-1:] in "\"'" and value:
            faults.append(f"line {number}: the value of {name} ends with a quote that was never opened")
        if name in values:
            faults.append(f"line {number}: {name} is set twice; the last line applies")
        values[name] = value
    return EnvFile(values, faults, oddities)


def _pairs(text: str) -> list[tuple[int, str, str, bool, bool]]:
    """Line, name, value, whether a quote is left open, whether it was quoted. A line without `=` has an odd name."""
    found: list[tuple[int, str, str, bool, bool]] = []
    at, end = 0, len(text)

    def line_of(place: int) -> int:
        return text.count("\n", 0, place) + 1

    while at < end:
        if text[at] in _SPACE:
            at += 1
            continue
        if text[at] in "#;":
            at = _line_end(text, at)
            continue
        begin = at
        while at < end and text[at] not in "=" + _ENDS:
            at += 1
        name = text[begin:at].rstrip()
        if at == end or text[at] != "=":
            found.append((line_of(begin), f"{name} ", "", False, False))
            continue
        value, at, is_open, is_quoted = _value(text, at + 1)
        found.append((line_of(begin), name, value, is_open, is_quoted))
    return found


def _line_end(text: str, at: int) -> int:
    """Of a comment, which a backslash before the line end continues."""
    while at < len(text) and text[at] not in _ENDS:
        at += 2 if text[at] == "\\" else 1
    return at


def _value(text: str, at: int) -> tuple[str, int, bool, bool]:
    value, kept, is_quoted = "", 0, False
    end = len(text)
    while at < end and text[at] in " \t":
        at += 1
    while at < end and text[at] not in _ENDS:
        char = text[at]
        if char == "\\":
            if text[at + 1 : at + 2] not in ("\n", "\r", ""):
                value += text[at + 1]
            at += 2
            kept = len(value)
        elif char in "\"'" and (not value or is_quoted):
            is_quoted = True
            at += 1
            while at < end and text[at] != char:
                if char == '"' and text[at] == "\\" and text[at + 1 : at + 2] in ('"', "\\", "`", "$"):
                    at += 1
                value += text[at]
                at += 1
            if at >= end:
                return value, end, True, True
            at += 1
            kept = len(value)
        else:
            value += char
            at += 1
            if char not in _SPACE:
                kept = len(value)
    return value[:kept], at, False, is_quoted
