"""The official client."""

from __future__ import annotations

from typing import Any

import told
from openai import OpenAI, OpenAIError
from told import INSTRUCTIONS, LONG, MOST, OSLO, RESULT, SAID, WEATHER, ask, tell

MESSAGES: list[Any] = [{"role": "system", "content": INSTRUCTIONS}]


def models() -> None:
    client = OpenAI()
    listed = [model.id for model in client.models.list()]
    tell("models", ids=listed, one=client.models.retrieve("chat").id, persona=client.models.retrieve(listed[-1]).id)


def conversation() -> None:
    client = OpenAI()
    for said in SAID:
        MESSAGES.append({"role": "user", "content": said})
        pieces, finish, usage = [], None, None
        with client.chat.completions.create(
            model="chat",
            messages=MESSAGES,
            max_completion_tokens=MOST,
            stream=True,
            stream_options={"include_usage": True},
            user="user-1",
        ) as stream:
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    pieces.append(choice.delta.content or "")
                    finish = choice.finish_reason or finish
        assert usage is not None and usage.prompt_tokens_details is not None
        text = "".join(pieces)
        cached = usage.prompt_tokens_details.cached_tokens
        pieces = [piece for piece in pieces if piece]
        tell("turn", said=said, text=text, pieces=len(pieces), finish=finish, cached=cached, usage=usage.model_dump())
        MESSAGES.append({"role": "assistant", "content": text})


def whole() -> None:
    """Without a stream, with the fields that an answer has then."""
    said = OpenAI().chat.completions.create(model="chat", messages=[{"role": "user", "content": SAID[0]}], max_tokens=9)
    (choice,) = said.choices
    tell("turn", said=SAID[0], text=choice.message.content, finish=choice.finish_reason, usage=said.usage.model_dump())


def tool() -> None:
    client = OpenAI()
    MESSAGES.append({"role": "user", "content": OSLO})
    choices = ["required", {"type": "function", "function": {"name": "get_weather"}}]
    for choice in choices:
        ask(OSLO)
        asked: Any = {"model": "chat", "messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice}
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion()
        message = final.choices[0].message
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
        tell("calls", calls=calls, finish=final.choices[0].finish_reason, text=message.content)
    MESSAGES.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls or []:
        MESSAGES.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})
    said = client.chat.completions.create(model="chat", messages=MESSAGES, tools=[WEATHER], max_tokens=MOST)
    tell("turn", result=RESULT, text=said.choices[0].message.content, finish=said.choices[0].finish_reason)


def barge_in() -> None:
    client = OpenAI()
    MESSAGES.append({"role": "user", "content": ask(LONG)})
    heard = ""
    with client.chat.completions.create(model="chat", messages=MESSAGES, stream=True, user="user-2") as stream:
        for chunk in stream:
            heard += chunk.choices[0].delta.content or ""
            if len(heard.split()) >= 3:
                break
    tell("closed", heard=heard)
    told.wait_for_test()
    MESSAGES.extend([{"role": "assistant", "content": heard}, {"role": "user", "content": SAID[0]}])
    said = client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=MOST, user="user-2")
    tell("turn", said=SAID[0], text=said.choices[0].message.content, finish=said.choices[0].finish_reason)


def failing() -> None:
    try:
        OpenAI(max_retries=1).chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi"}])
    except OpenAIError as error:
        told.tell_error(error)


def waiting() -> None:
    """For a service that is full at first."""
    client = OpenAI(max_retries=5)
    tell("asking")
    said = client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi"}])
    tell("turn", said="hi", text=said.choices[0].message.content, finish=said.choices[0].finish_reason)


told.run(globals())
