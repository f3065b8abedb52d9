"""The official client: responses on a socket."""

from __future__ import annotations

from typing import Any

import told
from openai import OpenAI
from responding import TOOL, Refused, calls, finish, tell_handshake, used
from told import INSTRUCTIONS, LONG, MOST, OSLO, RESULT, SAID, ask, tell
from websockets.exceptions import ConnectionClosed, InvalidStatus

ASKED: dict[str, Any] = {"model": "chat", "instructions": INSTRUCTIONS}


def read(connection: Any) -> tuple[Any, list[str]]:
    """The next response, and its text as it came."""
    pieces: list[str] = []
    for event in connection:
        if event.type == "response.output_text.delta":
            pieces.append(event.delta)
        elif event.type in ("response.completed", "response.incomplete"):
            return event.response, pieces
        elif event.type == "error":
            raise Refused(event)
    raise RuntimeError("The socket closed.")


def turn(connection: Any, said: Any, **asked: Any) -> Any:
    connection.response.create(**ASKED, input=said, **asked)
    response, pieces = read(connection)
    assert response.output_text == "".join(pieces)
    text, ended = response.output_text, finish(response)
    tell("turn", said=said, text=text, pieces=len(pieces), finish=ended, **used(response))
    return response


def conversation() -> None:
    """Each turn after the first is its user's words alone."""
    with OpenAI().responses.connect() as connection:
        first = turn(connection, SAID[0], max_output_tokens=MOST)
        turn(connection, SAID[1], max_output_tokens=MOST, previous_response_id=first.id)


def warm() -> None:
    """The persona, before the user has said anything."""
    with OpenAI().responses.connect() as connection:
        connection.response.create(**ASKED, generate=False)
        warmed, pieces = read(connection)
        tell("warmed", text=warmed.output_text, pieces=len(pieces), **used(warmed))
        turn(connection, SAID[0], previous_response_id=warmed.id)


def tool() -> None:
    with OpenAI().responses.connect() as connection:
        connection.response.create(**ASKED, input=ask(OSLO), tools=[TOOL], tool_choice="required")
        first, _ = read(connection)
        tell("calls", calls=calls(first), finish=finish(first), text=first.output_text)
        given: Any = [{"type": "function_call_output", "call_id": call[0], "output": RESULT} for call in calls(first)]
        connection.response.create(**ASKED, input=given, tools=[TOOL], previous_response_id=first.id)
        response, _ = read(connection)
        tell("turn", result=RESULT, text=response.output_text, finish=finish(response))


def barge_in() -> None:
    """The client knows no cancel: its users close the socket."""
    heard = ""
    with OpenAI().responses.connect() as connection:
        connection.response.create(**ASKED, input=ask(LONG))
        for event in connection:
            if event.type == "response.output_text.delta":
                heard += event.delta
                if len(heard.split()) >= 3:
                    break
    tell("closed", heard=heard)
    told.wait_for_test()
    with OpenAI().responses.connect() as connection:
        turn(connection, SAID[0], max_output_tokens=MOST)


def closed() -> None:
    """Something happens between two turns, and nothing reads meanwhile: the client does not connect again by itself."""
    connection = OpenAI().responses.connect().enter()
    first = turn(connection, SAID[0])
    tell("idle")
    told.wait_for_test()
    try:
        turn(connection, SAID[1], previous_response_id=first.id)
    except ConnectionClosed as error:
        told.tell_error(error)
        connection = OpenAI().responses.connect().enter()
        second(connection, first)
    except Refused:
        pass
    connection.close()


def second(connection: Any, first: Any) -> None:
    try:
        turn(connection, SAID[1], previous_response_id=first.id)
    except Refused:
        talk = [("user", SAID[0]), ("assistant", first.output_text), ("user", SAID[1])]
        turn(connection, [{"role": role, "content": text} for role, text in talk])


def failing() -> None:
    try:
        with OpenAI().responses.connect() as connection:
            turn(connection, SAID[0])
    except InvalidStatus as error:
        tell_handshake(error)


told.run(globals())
