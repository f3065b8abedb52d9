"""The page of `/docs`: both documents as HTML, without scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Yap Text: the interfaces</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip the contents</a>
<header><h1>Yap Text</h1><p>{version}. For programs: <a href="/openapi.json">OpenAPI</a>,
<a href="/asyncapi.json">AsyncAPI</a>.</p></header>
"""
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "over {}",
    "maximum": "at most {}",
    "minLength": "length at least {}",
    "maxLength": "length at most {}",
    "minItems": "items at least {}",
    "maxItems": "items at most {}",
}
_KEYS = {"bearer": "Authorization: Bearer KEY", "header": "X-API-Key: KEY", "query": "?api_key=KEY"}


def page(openapi: Mapping[str, Any], asyncapi: Mapping[str, Any]) -> str:
    """One HTML document."""
    channel, messages = asyncapi["channels"]["ws"], asyncapi["components"]["messages"]
    operations = [(path, method, it) for path, item in openapi["paths"].items() for method, it in item.items()]
    sent = [tag for tag, operation in asyncapi["operations"].items() if operation["action"] == "receive"]
    received = [tag for tag in messages if tag not in sent]
    http, ws = _Schemas(openapi, "http"), _Schemas(asyncapi, "ws")
    of_frames = {_name(message["payload"]["$ref"]) for message in messages.values()}
    parts = {
        "ws": ("WebSocket /ws", _text(asyncapi["info"]["description"]) + _text(channel["description"]), ""),
        "sent": ("Frames that a client sends", "", _all(_frame(asyncapi, tag, ws) for tag in sent)),
        "received": ("Frames that the service sends", "", _all(_frame(asyncapi, tag, ws) for tag in received)),
        "closes": ("Close codes", "", _list((code, _marked(it)) for code, it in channel["x-close-codes"].items())),
        "codes": ("Error codes", "", _list(_code(*each) for each in channel["x-error-codes"].items())),
        "ws-schemas": ("Parts of frames", "", ws.rest(of_frames)),
        "http": ("HTTP", _text(openapi["info"]["description"]), _all(_route(*it, openapi, http) for it in operations)),
        "http-schemas": ("Bodies", "", http.rest(set())),
    }  # fmt: skip
    contents = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, (title, _, _) in parts.items())
    sections = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>'
        f"{about}{_index(content)}{content}</section>\n"
        for name, (title, about, content) in parts.items()
    )
    head = _HEAD.format(style=STYLE, version=escape(openapi["info"]["version"]))
    return (
        f'{head}<nav aria-label="Contents"><ul>{contents}</ul></nav>\n<main id="main">{sections}</main></body></html>\n'
    )


class _Schemas:
    """The schemas of one document; links between them begin with `prefix`."""

    def __init__(self, document: Mapping[str, Any], prefix: str) -> None:
        self.by_name: dict[str, Any] = document["components"]["schemas"]
        self._prefix = prefix

    def rest(self, shown: set[str]) -> str:
        """All that are not elsewhere on the page."""
        return _all(
            f'<article id="{self._prefix}-{name}"><h3>{name}</h3>{_text(schema.get("description", ""))}'
            f"{self.fields(name)}{_examples(schema.get('examples', []))}</article>"
            for name, schema in self.by_name.items()
            if name not in shown
        )

    def fields(self, name: str) -> str:
        schema = self.by_name[name]
        required = schema.get("required", [])
        return _list(
            (
                field,
                f'<span class="type">{self.type_of(it)}{"" if field in required else ", optional"}.</span> '
                f"{_marked(it.get('description', ''))}",
            )
            for field, it in schema.get("properties", {}).items()
        )

    def type_of(self, schema: Mapping[str, Any]) -> str:
        """The type in words, as HTML."""
        if "$ref" in schema:
            name = _name(schema["$ref"])
            return f'<a href="#{self._prefix}-{name}">{name}</a>'
        if "anyOf" in schema:
            return " or ".join(map(self.type_of, schema["anyOf"]))
        if "enum" in schema:
            return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
        if schema.get("required") == ["data"]:
            _, content = schema["properties"]["data"]["anyOf"]
            return f"events of {self.type_of(content['contentSchema'])}"
        kind = escape(str(schema.get("type", "any JSON")))
        if kind == "array":
            kind = f"list of {self.type_of(schema.get('items', {}))}"
        elif isinstance(schema.get("additionalProperties"), dict):
            kind = f"object of {self.type_of(schema['additionalProperties'])}"
        return ", ".join([kind, *(words.format(schema[bound]) for bound, words in _BOUNDS.items() if bound in schema)])


def _frame(asyncapi: Mapping[str, Any], tag: str, schemas: _Schemas) -> str:
    message = asyncapi["components"]["messages"][tag]
    name = _name(message["payload"]["$ref"])
    operation = asyncapi["operations"].get(tag, {})
    answers = ", ".join(f"<code>{_name(it['$ref'])}</code>" for it in operation.get("reply", {}).get("messages", []))
    about = schemas.by_name[name].get("description", "")
    return (
        f'<article id="ws-{name}"><h3>{tag}</h3>{_text(message["summary"])}{_text(about)}'
        f"{f'<p>Answered by {answers}.</p>' if answers else ''}{schemas.fields(name)}"
        f"{_examples([each['payload'] for each in message['examples']])}</article>"
    )


def _route(path: str, method: str, operation: Mapping[str, Any], openapi: Mapping[str, Any], schemas: _Schemas) -> str:
    ways = [_KEYS[way] for ways in operation["security"] for way in ways]
    key = f"<p>Key: {' or '.join(f'<code>{escape(way)}</code>' for way in ways)}.</p>" if ways else ""
    known = openapi["components"]["parameters"]
    parameters = [known[_name(it["$ref"])] for it in operation.get("parameters", [])]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    return (
        f'<article id="{operation["operationId"]}"><h3><span class="method">{method.upper()}</span> {escape(path)}</h3>'
        f"{_text(operation['summary'] + '.')}{_text(operation.get('description', ''))}{key}"
        + _list((it["name"], f"{it['in']}. {_marked(it['description'])}") for it in parameters)
        + (f"<h4>Body</h4><p>{schemas.type_of(body['schema'])}</p>{_examples([body['example']])}" if body else "")
        + "<h4>Answers</h4>"
        + _list((status, _answer(it, schemas)) for status, it in operation["responses"].items())
        + (_socket(operation["x-websocket"], schemas) if "x-websocket" in operation else "")
        + "</article>"
    )


def _socket(socket: Mapping[str, Any], schemas: _Schemas) -> str:
    frames = (
        (name, schemas.type_of(socket[way]["schema"])) for name, way in (("sent", "receive"), ("received", "send"))
    )
    return f"<h4>WebSocket</h4>{_text(socket['description'])}{_list(frames)}{_list(socket['closeCodes'].items())}"


def _answer(answer: Mapping[str, Any], schemas: _Schemas) -> str:
    contents = "".join(
        f'<br><span class="type">{escape(media)}: {schemas.type_of(it["schema"])}</span>'
        for media, it in answer.get("content", {}).items()
    )
    headers = ", ".join(f"<code>{name}</code>" for name in answer.get("headers", {}))
    return _marked(answer["description"]) + contents + (f"<br>Headers: {headers}" if headers else "")


def _code(code: str, it: Mapping[str, Any]) -> tuple[str, str]:
    closes = f' <span class="type">Closes with {it["closeCode"]}.</span>' if "closeCode" in it else ""
    return code, _marked(it["description"]) + closes


def _name(ref: str) -> str:
    return ref.rpartition("/")[2]


def _all(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _list(pairs: Iterable[tuple[str, str]]) -> str:
    """Names as text, with their meanings as HTML."""
    found = "".join(f"<dt><code>{escape(name)}</code></dt><dd>{meaning}</dd>" for name, meaning in pairs)
    return f"<dl>{found}</dl>" if found else ""


def _index(content: str) -> str:
    """Links to the articles of a section."""
    found = re.findall(r'<article id="([^"]+)"><h3>(.*?)</h3>', content)
    links = "".join(f'<li><a href="#{name}">{re.sub("<.*?>", "", title)}</a></li>' for name, title in found)
    return f'<ul class="index">{links}</ul>' if links else ""


def _examples(examples: Iterable[Any]) -> str:
    return "".join(f"<pre><code>{escape(json.dumps(each, indent=2))}</code></pre>" for each in examples)


def _text(text: str) -> str:
    return f"<p>{_marked(text)}</p>" if text else ""


def _marked(text: str) -> str:
    """The text as HTML, with `code` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
