"""The official client: responses over HTTP."""

from __future__ import annotations

from typing import Any

import told
from openai import OpenAI, OpenAIError
from responding import TOOL, calls, finish, used
from told import INSTRUCTIONS, LONG, MOST, OSLO, RESULT, SAID, ask, tell

ASKED: dict[str, Any] = {"model": "chat", "instructions": INSTRUCTIONS}


def conversation() -> None:
    """The second turn names the first."""
    client = OpenAI()
    before = None
    for said in SAID:
        pieces = []
        asked: Any = {**ASKED, "input": said, "max_output_tokens": MOST, "user": "user-1"}
        if before is not None:
            asked["previous_response_id"] = before.id
        with client.responses.stream(**asked) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    pieces.append(event.delta)
                    assert event.snapshot == "".join(pieces)
                elif event.type in ("response.completed", "response.incomplete"):
                    before = event.response
        assert before is not None and before.output_text == "".join(pieces)
        text, ended = before.output_text, finish(before)
        tell("turn", said=said, text=text, pieces=len(pieces), finish=ended, **used(before))


def whole() -> None:
    """Without a stream, with the fields that an answer has then."""
    response = OpenAI().responses.create(model="chat", input=SAID[0], max_output_tokens=9)
    tell("turn", said=SAID[0], text=response.output_text, finish=finish(response), **used(response))


def tool() -> None:
    client = OpenAI()
    given: list[Any] = [{"role": "user", "content": OSLO}]
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        ask(OSLO)
        asked: Any = {**ASKED, "input": given, "tools": [TOOL], "tool_choice": choice}
        with client.responses.stream(**asked) as stream:
            response = stream.get_final_response()
        tell("calls", calls=calls(response), finish=finish(response), text=response.output_text)
    given += response.output  # as the client's own guide does
    for call, _, _ in calls(response):
        given.append({"type": "function_call_output", "call_id": call, "output": RESULT})
    response = client.responses.create(**ASKED, input=given, tools=[TOOL], max_output_tokens=MOST)
    tell("turn", result=RESULT, text=response.output_text, finish=finish(response))


def barge_in() -> None:
    client = OpenAI()
    heard = ""
    with client.responses.create(**ASKED, input=ask(LONG), stream=True, user="user-2") as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                heard += event.delta
                if len(heard.split()) >= 3:
                    break
    tell("closed", heard=heard)
    told.wait_for_test()
    talk = [("user", LONG), ("assistant", heard), ("user", SAID[0])]
    given: Any = [{"role": role, "content": text} for role, text in talk]
    response = client.responses.create(**ASKED, input=given, max_output_tokens=MOST, user="user-2")
    tell("turn", said=SAID[0], text=response.output_text, finish=finish(response))


def failing() -> None:
    try:
        OpenAI(max_retries=1).responses.create(model="chat", input="hi")
    except OpenAIError as error:
        told.tell_error(error)


def waiting() -> None:
    """For a service that is full at first."""
    client = OpenAI(max_retries=5)
    tell("asking")
    response = client.responses.create(model="chat", input="hi")
    tell("turn", said="hi", text=response.output_text, finish=finish(response))


told.run(globals())
