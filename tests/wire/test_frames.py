"""wire/frames.py: what decodes, what is refused and how it says so, and how frames look on the wire."""

from __future__ import annotations

import json
import time
from typing import Any, Union

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from yaptext.dialogue.persona import gender
from yaptext.errors import BadMessage, Internal, ServerAtCapacity, WireError
from yaptext.wire.frames import (
    CLIENT_MESSAGES,
    SERVER_MESSAGES,
    Ack,
    Cancel,
    Capacity,
    ClientMessage,
    Done,
    End,
    Error,
    Final,
    Forget,
    Forgotten,
    GetSession,
    HistoryItem,
    IdentifiedCall,
    Models,
    PersonaFields,
    Ping,
    Pong,
    SamplingFields,
    ServerMessage,
    SetPersona,
    Start,
    Timings,
    Token,
    ToolCall,
    ToolResult,
    ToolResultItem,
    Usage,
    Warmed,
    WarmHistory,
    WarmPersona,
    encode,
    error_frame,
)
from yaptext.wire.reading import decode, read

often = settings(max_examples=150, deadline=None)

ACK = Ack(
    for_="start",
    ok=True,
    session_id="s",
    turn=1,
    seed=7,
    now="2026-11-22T21:46:00+01:00",
    assistant_gender=None,
    persona_style="wholesome",
    persona_text_override=False,
    models=Models(chat="c", tool=None),
)

# One frame of each client type with every field of protocol.md, and what it decodes to.
PERSONA = {"persona_text": "p", "persona_style": "savage", "assistant_gender": "female", "user_identity": "non-binary"}
SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.5,
    "max_tokens": 50,
    "soft_max_tokens": 20,
    "seed": 3,
    "stop": ["\n", "END"],
}
FULL: dict[str, tuple[dict[str, Any], ClientMessage]] = {
    "start": (
        {
            "session_id": "s",
            "user_utterance": "hey",
            "history_text": "User: hi",
            "tools": [{"name": "t"}],
            "sampling": SAMPLING,
            "history": [{"role": "user", "content": "hi", "name": "Bob"}],
            "await_tools": False,
            "heard_chars": 4,
            "heard_text": "hell",
            "speakable": False,
            "note": "in Paris",
            **PERSONA,
        },
        Start(
            session_id="s",
            user_utterance="hey",
            history_text="User: hi",
            tools=[{"name": "t"}],
            sampling=SamplingFields(**SAMPLING),
            history=[HistoryItem("user", "hi", "Bob")],
            await_tools=False,
            heard_chars=4,
            heard_text="hell",
            speakable=False,
            note="in Paris",
            **PERSONA,
        ),
    ),
    "tool_result": (
        {"session_id": "s", "turn": 2, "results": [{"id": "c", "content": {"a": 1}}], "sampling": SAMPLING},
        ToolResult(
            session_id="s", turn=2, results=[ToolResultItem("c", {"a": 1})], sampling=SamplingFields(**SAMPLING)
        ),
    ),
    "cancel": (
        {"heard_chars": 0, "heard_text": "", "session_id": "s"},
        Cancel(heard_chars=0, heard_text="", session_id="s"),
    ),
    "get_session": ({"session_id": "s"}, GetSession("s")),
    "forget": ({"session_id": "s"}, Forget("s")),
    "warm_persona": ({"session_id": "s", **PERSONA}, WarmPersona(session_id="s", **PERSONA)),
    "warm_history": (
        {"history_text": "User: hi", "history": [], "session_id": "s", **PERSONA},
        WarmHistory(history_text="User: hi", history=[], session_id="s", **PERSONA),
    ),
    "set_persona": ({"session_id": "s", **PERSONA}, SetPersona(session_id="s", **PERSONA)),
    "ping": ({}, Ping()),
    "end": ({}, End()),
}
REQUIRED = {
    "start": ("session_id", "user_utterance"),
    "tool_result": ("session_id", "turn", "results"),
    "get_session": ("session_id",),
    "forget": ("session_id",),
}
_PLACEHOLDERS = {"turn": 1, "results": []}


def frame(type: Any = "start", **fields: Any) -> str:
    """A frame of that type with its required fields, and `fields` laid over."""
    return json.dumps({"type": type} | {name: _PLACEHOLDERS.get(name, "x") for name in REQUIRED.get(type, ())} | fields)


def refusal(text: str | bytes) -> str:
    with pytest.raises(BadMessage) as caught:
        decode(text)
    return caught.value.message


def start(**fields: Any) -> Start:
    message = decode(frame(**fields))
    assert isinstance(message, Start)
    return message


# Client -> server: what decodes


def test_the_table_of_client_messages_is_the_union() -> None:
    """The tests below cover every type that a client may send."""
    assert {cls.__struct_config__.tag for cls in CLIENT_MESSAGES} == set(FULL)


def test_what_a_frame_costs_is_said_by_its_struct() -> None:
    """Work of the models is charged as a turn; the rest only as a message, and a cancel by its own bound."""
    costs = {str(cls.__struct_config__.tag): cls.cost for cls in CLIENT_MESSAGES if cls.cost is not None}
    turns = dict.fromkeys(("start", "tool_result", "warm_persona", "warm_history"), "turns")
    assert costs == {**turns, "cancel": "cancels"}


@pytest.mark.parametrize("type", FULL)
def test_every_field_of_every_client_message_decodes(type: str) -> None:
    """Each type takes exactly the fields that the protocol lists for it."""
    fields, message = FULL[type]
    assert decode(json.dumps({"type": type, **fields})) == message


@pytest.mark.parametrize("type", FULL)
def test_required_fields_are_enough(type: str) -> None:
    """What the protocol does not require may be absent."""
    assert decode(frame(type)).__struct_config__.tag == type


@pytest.mark.parametrize("type", FULL)
def test_text_and_binary_frames_decode_alike(type: str) -> None:
    """A JSON object in a binary frame is as good as one in a text frame."""
    assert decode(frame(type).encode()) == decode(frame(type))


@pytest.mark.parametrize("name", ["persona_text", "history_text", "persona_style"])
def test_absent_null_and_empty_texts_differ(name: str) -> None:
    """Absent keeps the session's value, null clears it, "" is a value of its own."""
    assert getattr(start(), name) is UNSET
    assert getattr(start(**{name: None}), name) is None
    assert getattr(start(**{name: ""}), name) == ""


@pytest.mark.parametrize("name", ["assistant_gender", "user_identity", "tools"])
def test_absent_and_null_differ(name: str) -> None:
    """Also a field that is no free text can be kept or cleared."""
    assert getattr(start(), name) is UNSET
    assert getattr(start(**{name: None}), name) is None


@pytest.mark.parametrize("name", ["sampling", "heard_chars"])
def test_null_is_absent_where_nothing_is_kept(name: str) -> None:
    """What belongs to one turn alone has nothing to clear."""
    assert getattr(start(**{name: None}), name) is None
    assert start(**{name: None}) == start()


@pytest.mark.parametrize("name", SAMPLING)
def test_a_null_sampling_field_is_an_absent_one(name: str) -> None:
    """null leaves the service's own value in force."""
    assert start(sampling={name: None}) == start(sampling={})


@pytest.mark.parametrize(
    ("given_as", "one"), [("woman", "woman"), ("man", "man"), ("female", "woman"), ("male", "man")]
)
def test_genders_have_aliases_and_one_spelling(given_as: Any, one: str) -> None:
    """woman and man, and the aliases female and male."""
    assert start(assistant_gender=given_as).assistant_gender == given_as
    assert gender(given_as) == one


@pytest.mark.parametrize("identity", ["woman", "man", "non-binary"])
def test_the_user_has_three_identities(identity: str) -> None:
    """woman, man and non-binary are known."""
    assert start(user_identity=identity).user_identity == identity


@given(type=st.sampled_from(sorted(FULL)), extra=st.dictionaries(st.text().map(lambda name: f"x{name}"), st.integers()))
@often
def test_unknown_fields_are_ignored(type: str, extra: dict[str, Any]) -> None:
    """Old services and new clients interoperate."""
    assert decode(frame(type, **extra)) == decode(frame(type))


def test_unknown_fields_inside_sampling_are_refused() -> None:
    """A slip there would otherwise change nothing and say nothing."""
    assert refusal(frame(sampling={"temprature": 0.5})) == "Object contains unknown field temprature - at $.sampling"


@pytest.mark.parametrize(
    ("old", "new"),
    [("chat_prompt", "persona_text"), ("gender", "assistant_gender"), ("personality", "persona_style")],
)
def test_names_of_older_clients_are_read(old: str, new: str) -> None:
    """As today's, unless that is there too."""
    assert getattr(start(**{old: "f"}), new) == "f"
    both = read(frame(**{old: "f", new: "m"}))
    assert (getattr(both.message, new), both.ignored) == ("m", [old])


def test_an_utterance_by_its_old_name() -> None:
    """Also one that is required."""
    found = decode('{"type": "start", "session_id": "s", "message": "hi"}')
    assert isinstance(found, Start) and found.user_utterance == "hi"


def test_what_is_not_known_is_told() -> None:
    """Sorted, and no more of a name than its beginning."""
    assert read(frame(b=1, a={"x": []}, **{"z" * 100: 1})).ignored == ["a", "b", "z" * 64]
    assert read(frame("ping", a=1)).ignored == ["a"]
    assert read(frame()).ignored == []


# Client -> server: what is refused


def test_the_example_of_the_protocol() -> None:
    """A wrong type is told in the very words of the protocol."""
    assert refusal(frame(session_id=5)) == "Expected str, got int - at $.session_id"


@pytest.mark.parametrize(("type", "name"), [(type, name) for type, names in REQUIRED.items() for name in names])
def test_a_missing_required_field_is_named(type: str, name: str) -> None:
    """The client learns which field it forgot."""
    fields = {field: _PLACEHOLDERS.get(field, "x") for field in REQUIRED[type] if field != name}
    assert f"missing required field {name}" in refusal(json.dumps({"type": type, **fields}))


@pytest.mark.parametrize(("type", "name"), [(type, name) for type, (fields, _) in FULL.items() for name in fields])
def test_a_wrong_type_names_the_field(type: str, name: str) -> None:
    """true fits no field of any message but those of yes and no."""
    wrong: Any = 5 if name in ("await_tools", "speakable") else True
    message = refusal(frame(type, **{name: wrong}))
    assert message.startswith(("Expected", "Invalid"))
    assert message.endswith(f"at $.{name}")


@pytest.mark.parametrize("name", SAMPLING)
def test_a_wrong_type_inside_sampling_names_the_field(name: str) -> None:
    """The path leads into the object."""
    assert refusal(frame(sampling={name: True})).endswith(f"at $.sampling.{name}")


@pytest.mark.parametrize("wrong", ["robot", "", "Start", "robot" * 100])
def test_an_unknown_type_is_quoted_with_the_known_ones(wrong: str) -> None:
    """However long it is: the client learns what it may send."""
    message = refusal(json.dumps(json.loads(frame()) | {"type": wrong}))
    assert message.startswith(f"Unknown type {wrong[:64]!r}; known are start, tool_result, cancel, ")
    assert message.endswith(" - at $.type") and len(message) < 300


def test_an_unknown_role_is_told_the_known_ones() -> None:
    """With the place in the list."""
    message = refusal(frame(history=[{"role": "user", "content": ""}, {"role": "tool", "content": ""}]))
    assert message == "Invalid enum value; allowed are user, assistant, system - at $.history[1].role"


def test_null_is_no_session_but_may_be_an_utterance() -> None:
    """Without one the assistant speaks; it has to be said that there is none."""
    assert refusal(frame(session_id=None)) == "Expected str, got null - at $.session_id"
    assert start(user_utterance=None).user_utterance is None
    assert "missing required field user_utterance" in refusal('{"type": "start", "session_id": "s"}')


@pytest.mark.parametrize("type", ["nope", "", "Start", 5, None, ["start"]])
def test_an_unknown_type_is_refused(type: Any) -> None:
    """A type that the protocol does not have is a bad message at $.type."""
    assert "at $.type" in refusal(json.dumps({"type": type}))


def test_a_frame_without_a_type_is_refused() -> None:
    """An object that does not say what it is, is nothing."""
    assert refusal("{}") == "Object missing required field type"


@pytest.mark.parametrize(
    "text", ["", " ", "null", "5", '"start"', "[]", "[{}]", "{", '{"type":"ping"', "{} {}", "\ufeff{}"]
)
def test_what_is_no_json_object_is_refused(text: str) -> None:
    """One JSON object a frame, nothing else."""
    assert refusal(text)


@pytest.mark.parametrize("text", [b"\xff", b'{"type":"\xff"}', "\ud800", '{"type":"ping","x":"\ud800"}'])
def test_what_is_no_unicode_is_refused(text: str | bytes) -> None:
    """Broken UTF-8 and lone surrogates are bad messages, not faults of the service."""
    assert refusal(text)


def test_no_decoded_text_is_unencodable() -> None:
    """An escaped lone surrogate is refused: the text that comes in can always go out again."""
    assert refusal('{"type":"start","session_id":"s","user_utterance":"a \\ud800 b"}')


@pytest.mark.parametrize("length", [1, 128])
def test_session_ids_within_bounds_decode(length: int) -> None:
    """1 to 128 characters, of whatever script."""
    assert start(session_id="é" * length).session_id == "é" * length


@pytest.mark.parametrize("length", [0, 129, 100_000])
@pytest.mark.parametrize("type", ["start", "warm_persona", "warm_history", "set_persona"])
def test_session_ids_out_of_bounds_are_refused(type: str, length: int) -> None:
    """An empty or an endless session_id is a bad message that says the bound."""
    bound = "length >= 1" if not length else "length <= 128"
    assert refusal(frame(type, session_id="x" * length)).endswith(f"{bound} - at $.session_id")


BOUNDS = [
    ("temperature", [0, 2, 0.7], [-0.01, 2.01, -1, 3]),
    ("top_p", [0.01, 1], [0, -0.1, 1.01]),
    ("top_k", [0, 1000], [-1, 1001, 1.5]),
    ("min_p", [0, 1], [-0.01, 1.01]),
    ("repetition_penalty", [0.1, 2], [0, -1, 0.09, 2.01]),
    ("presence_penalty", [-2, 2], [-2.01, 2.01]),
    ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
    ("max_tokens", [1, 4096], [0, -1, 4097, 1.5]),
    ("soft_max_tokens", [1, 4096], [0, 4097]),
    ("seed", [0, 2**63 - 1], [-1, 2**63, 1.5]),
    ("stop", [[], ["x"], ["x" * 64] * 8], [[""], ["x" * 65], ["x"] * 9, "x", [1]]),
]


def test_every_sampling_field_has_bounds() -> None:
    """The table of bounds covers the fields of the protocol."""
    assert [name for name, _, _ in BOUNDS] == list(SAMPLING) == list(SamplingFields.__struct_fields__)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, fine, _ in BOUNDS for value in fine])
def test_sampling_within_bounds_decodes(name: str, value: Any) -> None:
    """The bounds themselves are allowed."""
    assert getattr(start(sampling={name: value}).sampling, name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, _, bad in BOUNDS for value in bad])
def test_sampling_out_of_bounds_is_a_bad_message(name: str, value: Any) -> None:
    """The message names the field where it stands, and what was expected there."""
    message = refusal(frame(sampling={name: value}))
    assert message.startswith("Expected")
    assert f"at $.sampling.{name}" in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused(number: str) -> None:
    """No sampling field becomes infinite or not a number."""
    assert refusal(frame(sampling={"temperature": 0}).replace("0", number))


@pytest.mark.parametrize("type", ["start", "cancel"])
def test_heard_chars_is_a_count(type: str) -> None:
    """Nobody hears a negative number of characters."""
    assert refusal(frame(type, heard_chars=-1)) == "Expected int >= 0 - at $.heard_chars"


def test_tools_are_a_list_of_objects() -> None:
    """The place of a wrong tool is told."""
    assert refusal(frame(tools=[{}, "x"])) == "Expected object, got str - at $.tools[1]"


@pytest.mark.parametrize("depth", [100, 999, 1000, 5000, 200_000])
@pytest.mark.parametrize("opens", ["[", '{"a":'])
def test_deep_json_is_read_or_refused(depth: int, opens: str) -> None:
    """A frame nested to any depth is a message or a bad message, never a crash."""
    closes = ("]" if opens == "[" else "}") * depth
    text = f'{{"type":"ping","x":{opens * depth}1{closes}}}'
    try:
        assert decode(text) == Ping()
    except BadMessage as error:
        assert "recursion" in error.message


@given(st.text() | st.binary() | st.text(alphabet='\ud800\udfff{}"[]:,a1'))
@example('{"type":"start","session_id":"s","user_utterance":"\\ud800"}')
@often
def test_arbitrary_frames_raise_nothing_but_bad_message(text: str | bytes) -> None:
    """Whatever a client sends is a message or an error frame, and that error frame can be sent."""
    try:
        decode(text)
    except BadMessage as error:
        assert json.loads(encode(error_frame(error)))["error_code"] == "bad_message"


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = sorted({"type", *(name for fields, _ in FULL.values() for name in fields)})


@given(st.dictionaries(st.sampled_from(names), anything, max_size=6), st.sampled_from(sorted(FULL)))
@often
def test_arbitrary_objects_raise_nothing_but_bad_message(fields: dict[str, Any], type: str) -> None:
    """Known fields with any value are a message or an error that can be sent and is no longer than a line."""
    try:
        decode(frame(type, **{name: value for name, value in fields.items() if name != "type"}))
    except BadMessage as error:
        assert len(error.message) <= 300
        assert encode(error_frame(error))


# Round trips

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.integers(0, 2**31)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


def kept(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A field that is absent, cleared or given."""
    return st.just(UNSET) | st.none() | values


personas: dict[str, st.SearchStrategy[Any]] = {
    "persona_text": kept(texts),
    "persona_style": kept(texts),
    "assistant_gender": kept(st.sampled_from(["woman", "man", "female", "male"])),
    "user_identity": kept(st.sampled_from(["woman", "man", "non-binary"])),
}
session_ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128)
samplings = st.builds(
    SamplingFields,
    temperature=st.none() | st.floats(0, 2),
    top_k=st.none() | st.integers(0, 1000),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64), max_size=8),
)
clients = st.one_of(
    st.builds(
        Start,
        session_id=session_ids,
        user_utterance=texts,
        history_text=kept(texts),
        tools=kept(st.lists(st.dictionaries(texts, json_values, max_size=2), max_size=2)),
        sampling=st.none() | samplings,
        heard_chars=st.none() | counts,
        **personas,
    ),
    st.builds(Cancel, heard_chars=st.none() | counts, heard_text=st.none() | texts, session_id=st.none() | session_ids),
    st.builds(
        ToolResult, session_id=session_ids, turn=counts, results=st.lists(st.builds(ToolResultItem, texts, json_values))
    ),
    st.builds(GetSession, session_ids),
    st.builds(Forget, session_ids),
    st.builds(WarmPersona, session_id=st.none() | session_ids, **personas),
    st.builds(WarmHistory, history_text=texts, session_id=st.none() | session_ids, **personas),
    st.builds(SetPersona, session_id=st.none() | session_ids, **personas),
    st.just(Ping()),
    st.just(End()),
)
milliseconds = st.floats(0, 1e9)
usages = st.builds(Usage, *[counts] * 6)
timings = st.builds(Timings, *[st.none() | milliseconds] * 4)
turns = st.integers(1, 2**31)
servers = st.one_of(
    st.just(ACK),
    st.builds(
        ToolCall,
        status=st.sampled_from(["yes", "no"]),
        raw=st.lists(
            st.builds(IdentifiedCall, texts, texts, st.dictionaries(texts, json_values, max_size=2)), max_size=4
        ),
        turn=turns,
        tool_ms=milliseconds,
        reason=st.just(UNSET) | texts,
    ),
    st.builds(Token, text=texts, turn=turns),
    st.builds(Final, normalized_text=texts, turn=turns),
    st.builds(Done, turn=counts, usage=usages, timings=timings, finish_reason=texts),
    st.builds(Done, turn=counts, cancelled=st.just(True), cancel_ms=milliseconds, tokens_sent=counts),
    st.builds(
        Warmed,
        segment=st.sampled_from(["persona_static", "history"]),
        persona_style=st.none() | texts,
        persona_text_override=st.booleans(),
        messages=counts,
        bytes=counts,
        prefix_tokens=counts,
        cached_tokens=counts,
        ms=milliseconds,
    ),
    st.just(Pong()),
    st.builds(Forgotten, texts, st.booleans()),
    st.builds(
        Error, error_code=texts, message=texts, turn=st.just(UNSET) | turns, retry_after_ms=st.just(UNSET) | counts
    ),
)


@given(clients)
@often
def test_client_messages_survive_the_wire(message: ClientMessage) -> None:
    """What a client of this package encodes, the service decodes to the same message."""
    assert decode(msgspec.json.encode(message)) == message


@given(servers)
@often
def test_server_messages_survive_the_wire(message: ServerMessage) -> None:
    """A frame is one JSON object with its type, and holds all that the message held."""
    text = encode(message)
    assert json.loads(text)["type"] == message.__struct_config__.tag
    assert msgspec.json.decode(text, type=Union[(*SERVER_MESSAGES,)]) == message


# Server -> client: how frames look


def test_ack_has_the_field_for() -> None:
    """`for` is no name that Python can give a field, but it is the protocol's."""
    shown = json.loads(encode(ACK))
    assert shown["for"] == "start"
    assert set(shown) == {
        "type", "for", "ok", "session_id", "turn", "seed", "now", "assistant_gender", "persona_style",
        "persona_text_override", "models",
    }  # fmt: skip
    assert shown["assistant_gender"] is None
    assert shown["models"] == {"chat": "c", "tool": None}


def test_a_no_is_an_empty_list_without_a_reason() -> None:
    """`raw` is always a list; `reason` is there only where something decided in the model's place."""
    no = ToolCall(status="no", raw=[], turn=1, tool_ms=2.5)
    assert json.loads(encode(no)) == {"type": "toolcall", "status": "no", "raw": [], "turn": 1, "tool_ms": 2.5}


def test_done_shows_every_figure_of_a_finished_turn() -> None:
    """Figures that are 0 or unknown still stand in the frame."""
    shown = json.loads(encode(Done(turn=1, usage=Usage(), timings=Timings(), finish_reason="stop")))
    assert list(shown["usage"]) == [
        "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "tool_prompt_tokens",
        "tool_cached_tokens", "tool_completion_tokens",
    ]  # fmt: skip
    assert shown["timings"] == {"queue_ms": None, "tool_ms": None, "ttft_ms": None, "total_ms": None}
    assert "cancelled" not in shown


def test_text_is_sent_as_it_is() -> None:
    """Characters beyond ASCII travel unescaped, and a frame is one line."""
    assert encode(Token(text="naïve 🫠\n", turn=1)) == '{"type":"token","text":"naïve 🫠\\n","turn":1}'.encode()


@pytest.mark.parametrize(
    ("frame_of", "shown"),
    [
        (error_frame(BadMessage("m")), {"error_code": "bad_message", "message": "m"}),
        (error_frame(Internal("m"), turn=3), {"error_code": "internal", "message": "m", "turn": 3}),
        (
            error_frame(ServerAtCapacity("m", retry_after_ms=0), capacity=Capacity(2, 2, 0, True)),
            {
                "error_code": "server_at_capacity",
                "message": "m",
                "retry_after_ms": 0,
                "capacity": {"active": 2, "max": 2, "available": 0, "at_capacity": True},
            },
        ),
    ],
)
def test_error_frames_hold_what_applies(frame_of: Error, shown: dict[str, Any]) -> None:
    """turn, retry_after_ms and capacity are there where they mean something, and absent elsewhere."""
    assert json.loads(encode(frame_of)) == {"type": "error", **shown}


def test_an_error_frame_takes_code_and_text_from_the_error() -> None:
    """Every error that reaches a client does so under its own code."""

    class Odd(WireError):
        code = BadMessage.code

    assert error_frame(Odd("why")) == Error(error_code="bad_message", message="why")


def test_persona_fields_are_the_same_wherever_they_stand() -> None:
    """start, set_persona and the warm-ups share one set of persona fields."""
    for cls in (Start, SetPersona, WarmPersona, WarmHistory):
        assert issubclass(cls, PersonaFields)


def _filled(before: str, item: str, after: str, size: int = 1_000_000) -> str:
    count = (size - len(before) - len(after)) // (len(item) + 1)
    return before + ",".join([item] * count) + after


START = '{"type":"start","session_id":"a","user_utterance":"x"'
RESULT = '{"type":"tool_result","session_id":"a","turn":1,"results":['


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            _filled(START + ',"tools":[{"a":[', "[]", "]}]}"),
            "tools are 9....[0-9] bytes of JSON; limit is 65536 - at $.tools",
        ),
        (
            _filled(START + ',"sampling":{"stop":[', '"a"', "]}}"),
            "sampling are 9....[0-9] bytes of JSON; limit is 4096 - at $.sampling",
        ),
        (
            _filled(RESULT + '{"id":"a","content":[', "1.2345678901234567e-300", "]}]}"),
            "results are 9....[0-9] bytes of JSON; limit is 131072 - at $.results",
        ),
    ],
)
def test_what_costs_more_to_read_than_a_text_is_bounded_in_bytes(frame: str, message: str) -> None:
    """A list of a million brackets took 50 ms of the event loop."""
    with pytest.raises(BadMessage, match=message.replace("$", "[$]")):
        decode(frame)


def test_a_field_that_stands_there_often_is_read_once() -> None:
    """The last one counts, and the others cost nothing."""
    often = ",".join(['"sampling":{"stop":' + "[" * 50 + "]" * 50 + "}"] * 100)
    assert decode(START + f',{often},"sampling":{{"seed":1}}}}') == Start(
        session_id="a", user_utterance="x", sampling=SamplingFields(seed=1)
    )


def test_errors_in_a_costly_field_name_its_place() -> None:
    """As those of any other."""
    for sampling, message in (
        ('{"temperature":3}', "Expected float <= 2.0 - at [$].sampling.temperature"),
        ("[]", "Expected object [|] null, got array - at [$].sampling"),
        ('{"temprature":1}', "Object contains unknown field temprature - at [$].sampling"),
    ):
        with pytest.raises(BadMessage, match=message):
            decode(START + f',"sampling":{sampling}}}')


def test_a_frame_of_many_fields_is_read_in_time() -> None:
    """90,000 unknown ones took more than 9 s of the event loop, each looked up in all others. They are then not
    told."""
    begun = time.process_time()
    found = read(START + "".join(f',"k{number}":0' for number in range(90_000)) + "}")
    assert time.process_time() - begun < 1
    assert found == (Start(session_id="a", user_utterance="x"), [])
