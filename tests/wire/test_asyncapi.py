"""wire/asyncapi.py: the published document says all that protocol.md says, and nothing that does not resolve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fuzz.frames import BASES, EDITS, NAMES, VALUES, dumps, edit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator

from yaptext import __version__
from yaptext.errors import BadMessage
from yaptext.wire import meanings
from yaptext.wire.asyncapi import document
from yaptext.wire.frames import (
    SERVER_MESSAGES,
    Ack,
    Done,
    Models,
    Pong,
    ServerMessage,
    Timings,
    Token,
    ToolCall,
    Usage,
    Warmed,
    encode,
)
from yaptext.wire.reading import decode

SENT = {
    "start", "tool_result", "cancel", "warm_persona", "warm_history", "set_persona", "get_session", "forget", "ping",
    "end",
}  # fmt: skip
RECEIVED = {"ack", "toolcall", "token", "final", "done", "warmed", "session", "forgotten", "pong", "error"}
CODES = {
    "authentication_failed", "server_at_capacity", "bad_message", "text_too_long", "unknown_persona", "not_deployed",
    "rate_limited", "slow_client", "engine_failed", "going_away", "internal",
}  # fmt: skip
FIELDS: dict[str, set[str]] = {
    "start": {
        "session_id", "user_utterance", "persona_text", "persona_style", "assistant_gender", "user_identity",
        "history_text", "history", "tools", "await_tools", "sampling", "heard_chars", "heard_text", "speakable", "note",
    },
    "tool_result": {"session_id", "turn", "results", "sampling"},
    "cancel": {"heard_chars", "heard_text", "session_id"},
    "get_session": {"session_id"},
    "forget": {"session_id"},
    "warm_persona": {"persona_text", "persona_style", "assistant_gender", "session_id"},
    "warm_history": {"history_text", "history", "session_id", "persona_text", "persona_style", "assistant_gender"},
    "set_persona": {"persona_style", "assistant_gender", "user_identity", "persona_text", "session_id"},
    "ping": set(),
    "end": set(),
    "ack": {
        "for", "ok", "session_id", "turn", "seed", "now", "assistant_gender", "persona_style",
        "persona_text_override", "models", "ignored",
    },
    "toolcall": {"status", "raw", "turn", "tool_ms", "reason"},
    "token": {"text", "turn"},
    "final": {"normalized_text", "turn"},
    "done": {"turn", "session_id", "usage", "timings", "finish_reason", "cancelled", "cancel_ms", "tokens_sent"},
    "warmed": {"segment", "persona_style", "messages", "prefix_tokens", "cached_tokens", "prefix_stable", "ms"},
    "session": {"session_id", "known", "turns", "persona_style", "persona_text", "history"},
    "forgotten": {"session_id", "known"},
    "pong": set(),
    "error": {"error_code", "message", "turn", "session_id", "retry_after_ms", "capacity"},
}  # fmt: skip


SENT_VALIDATOR = Draft202012Validator(
    {"anyOf": [message["payload"] for tag, message in document()["components"]["messages"].items() if tag in SENT]}
    | {"components": document()["components"]}
)


def resolve(ref: str) -> Any:
    """What a local `$ref` points at."""
    assert ref.startswith("#/")
    found: Any = document()
    for step in ref[2:].split("/"):
        found = found[step]
    return found


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for inner in node.values():
            yield from refs(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from refs(inner)


def payload(tag: str) -> dict[str, Any]:
    """The JSON schema of one message."""
    schema: dict[str, Any] = resolve(document()["components"]["messages"][tag]["payload"]["$ref"])
    return schema


def check(frame: dict[str, Any]) -> None:
    """Holds a frame against the schema of its type. Raises `ValidationError`."""
    ref = document()["components"]["messages"][frame["type"]]["payload"]["$ref"]
    jsonschema.Draft202012Validator({"$ref": ref, "components": document()["components"]}).validate(frame)


def tags(operation: dict[str, Any]) -> set[str]:
    return {ref["$ref"].rsplit("/", 1)[1] for ref in operation["messages"]}


def test_every_message_of_the_protocol_is_in_the_document() -> None:
    """Each type stands in the components, in the channel and in the operation of its direction."""
    assert set(document()["components"]["messages"]) == SENT | RECEIVED
    assert set(document()["channels"]["ws"]["messages"]) == SENT | RECEIVED
    operations = document()["operations"]
    assert set(operations) == SENT | {"send"}
    for tag in SENT:
        assert (operations[tag]["action"], tags(operations[tag])) == ("receive", {tag})
        assert tags(operations[tag].get("reply", {"messages": []})) <= RECEIVED
    assert (operations["send"]["action"], tags(operations["send"])) == ("send", {"error", "done"})
    assert set().union(*(tags(each.get("reply", each)) for each in operations.values())) - SENT == RECEIVED


def test_the_document_has_the_form_of_asyncapi() -> None:
    """Every object has the fields that AsyncAPI 3.0 gives it, and no others but extensions."""
    shown = document()
    operations, messages = list(shown["operations"].values()), list(shown["components"]["messages"].values())
    replies = [each["reply"] for each in operations if "reply" in each]
    for found, needed, allowed in (
        ([shown], "asyncapi info", "defaultContentType servers channels operations components"),
        ([shown["info"]], "title version", "description license"),
        (list(shown["servers"].values()), "host protocol", "description variables security"),
        (list(shown["channels"].values()), "", "address title description servers messages bindings"),
        (operations, "action channel", "summary messages reply"),
        (replies, "", "channel messages"),
        (messages, "", "name summary payload examples"),
    ):
        assert found
        for each in found:
            fields = {field for field in each if not field.startswith("x-")}
            assert set(needed.split()) <= fields <= set(f"{needed} {allowed}".split())
    assert {each["action"] for each in shown["operations"].values()} == {"send", "receive"}


@pytest.mark.parametrize("tag", sorted(SENT | RECEIVED))
def test_every_frame_is_explained(tag: str) -> None:
    """What it is for, what each field means, and an example that fits its schema."""
    message = document()["components"]["messages"][tag]
    assert message["summary"]
    for example in message["examples"]:
        check(example["payload"])
    for schema in document()["components"]["schemas"].values():
        assert all(field["description"] for field in schema.get("properties", {}).values())


def test_every_meaning_is_of_something() -> None:
    """None is left of a field that has gone."""
    schemas = document()["components"]["schemas"]
    fields = {(name, field) for name, schema in schemas.items() for field in schema.get("properties", {})}
    used = {f"{name}.{field}" if f"{name}.{field}" in meanings.FIELDS else field for name, field in fields}
    assert set(meanings.FIELDS) == used
    assert set(meanings.MESSAGES) == set(meanings.EXAMPLES) == SENT | RECEIVED


def test_every_close_of_the_protocol_is_in_the_document() -> None:
    """Those of the room's page, with the error codes that close."""
    shown = document()["channels"]["ws"]
    page = Path(__file__).resolve().parents[2] / "yaptext" / "wire" / "README.md"
    assert set(shown["x-close-codes"]) == set(re.findall(r"^\| (\d{4}) \|", page.read_text(encoding="utf-8"), re.M))
    assert set(shown["x-error-codes"]) == CODES
    closing = {str(code["closeCode"]) for code in shown["x-error-codes"].values() if "closeCode" in code}
    assert closing < set(shown["x-close-codes"])


@pytest.mark.parametrize("tag", FIELDS)
def test_every_field_of_the_protocol_is_in_the_document(tag: str) -> None:
    """The published fields of a message include those of the protocol's table, and its type is fixed."""
    schema = payload(tag)
    assert set(schema["properties"]) >= FIELDS[tag] | {"type"}
    assert "type" in schema["required"]
    assert schema["properties"]["type"]["enum"] == [tag]


def test_every_error_code_is_in_the_document() -> None:
    """A client author can read off which codes an error frame may have."""
    assert set(payload("error")["properties"]["error_code"]["enum"]) == CODES


def test_every_reference_resolves() -> None:
    """No `$ref` of the document leads nowhere."""
    found = list(refs(document()))
    assert found
    for ref in found:
        assert resolve(ref) is not None


def test_every_schema_is_a_json_schema() -> None:
    """Code can be generated from the payloads."""
    for schema in document()["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_document_is_plain_json_and_new_each_time() -> None:
    """What one caller does to the document, the next does not see."""
    assert json.loads(json.dumps(document())) == document()
    document()["components"]["messages"].clear()
    assert document()["components"]["messages"]


def test_the_document_names_the_service_and_where_it_listens() -> None:
    """Title, version, address, and the four ways to say who one is."""
    shown = document()
    assert shown["asyncapi"] == "3.0.0"
    assert shown["info"]["version"] == __version__
    assert shown["channels"]["ws"]["address"] == "/ws"
    ways = shown["components"]["securitySchemes"]
    assert {(way.get("name"), way.get("scheme")) for way in ways.values()} == {
        ("api_key", None),
        ("ticket", None),
        ("X-API-Key", None),
        (None, "bearer"),
    }


@pytest.mark.parametrize(
    "message",
    [
        Ack(
            for_="set_persona",
            ok=True,
            session_id="s",
            turn=0,
            seed=1,
            now="2026-11-22T21:46:00+01:00",
            assistant_gender="woman",
            persona_style=None,
            persona_text_override=True,
            models=Models(chat=None, tool="t"),
        ),
        ToolCall(status="no", raw=[], turn=1, tool_ms=300.1, reason="timeout"),
        Token(text="x", turn=1),
        Done(turn=1, usage=Usage(), timings=Timings(), finish_reason="stop"),
        Done(turn=0, cancelled=True, cancel_ms=0.0, tokens_sent=0),
        Warmed(
            segment="history",
            persona_style=None,
            persona_text_override=False,
            messages=0,
            bytes=1,
            prefix_tokens=1,
            cached_tokens=0,
            ms=1.0,
        ),
        Pong(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_frames_fit_their_own_schema(message: ServerMessage) -> None:
    """What the service sends is valid by what it publishes."""
    check(json.loads(encode(message)))


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "start", "session_id": "", "user_utterance": "x"},
        {"type": "start", "session_id": "s"},
        {"type": "start", "session_id": "s", "user_utterance": "x", "sampling": {"temperature": 3}},
        {"type": "error", "error_code": "unheard_of", "message": "x"},
    ],
)
def test_the_schemas_refuse_what_the_service_refuses(frame: dict[str, Any]) -> None:
    """Bounds, required fields and codes are part of the published schemas."""
    with pytest.raises(jsonschema.ValidationError):
        check(frame)


def _plain(value: Any) -> bool:
    """Whether it is JSON that every reader takes alike: no number that is cut, no half of a character."""
    try:
        return not isinstance(value, float) and bool(json.loads(dumps(value)) == value)
    except (ValueError, RecursionError):
        return False


_numbers = st.integers(0, 2**16)
_edits = st.tuples(
    st.sampled_from([what for what in EDITS if what != "double"]),
    _numbers,
    st.sampled_from(list(filter(_plain, VALUES))),
    st.sampled_from(NAMES),
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(BASES), st.lists(_edits, max_size=2))
def test_a_frame_fits_the_schemas_if_the_service_reads_it(base: dict[str, Any], edits: list[Any]) -> None:
    """And the other way round, of frames that are near to right ones. Older names and bounds in bytes are no part of a
    schema."""
    frame: Any = base
    for each in edits:
        frame = edit(frame, *each) if isinstance(frame, dict) else frame
    try:
        decode(dumps(frame))
        read = True
    except BadMessage as error:
        assume("bytes of JSON" not in error.message)
        read = False
    assert SENT_VALIDATOR.is_valid(frame) is read


def test_the_tables_of_this_file_are_complete() -> None:
    """Every struct of the unions is checked above."""
    assert len(SERVER_MESSAGES) == len(RECEIVED)
    assert set(FIELDS) == SENT | RECEIVED
