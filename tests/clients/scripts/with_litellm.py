"""LiteLLM, which maps every provider's errors to its own."""

from __future__ import annotations

from typing import Any

import litellm
import told
from told import BASE_URL, INSTRUCTIONS, KEY, LONG, MOST, OSLO, RESULT, SAID, WEATHER, ask, tell

litellm.suppress_debug_info = True
AT: dict[str, Any] = {"model": "openai/chat", "api_base": BASE_URL, "api_key": KEY}
MESSAGES: list[Any] = [{"role": "system", "content": INSTRUCTIONS}]


def models() -> None:
    found = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key=KEY, api_base=BASE_URL
    )
    tell("models", ids=[name.removeprefix("openai/") for name in found])


def conversation() -> None:
    for said in SAID:
        MESSAGES.append({"role": "user", "content": said})
        stream = litellm.completion(
            **AT, messages=MESSAGES, max_tokens=MOST, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        final = litellm.stream_chunk_builder(chunks)
        (choice,) = final.choices
        pieces = sum(bool(c.choices and c.choices[0].delta.content) for c in chunks)
        usage = final.usage
        tell(
            "turn",
            said=said,
            text=choice.message.content,
            pieces=pieces,
            finish=choice.finish_reason,
            cached=usage.prompt_tokens_details.cached_tokens,
            usage=usage.model_dump(),
        )
        MESSAGES.append({"role": "assistant", "content": choice.message.content})


def tool() -> None:
    MESSAGES.append({"role": "user", "content": ask(OSLO)})
    first = litellm.completion(**AT, messages=MESSAGES, tools=[WEATHER], tool_choice="required")
    message = first.choices[0].message
    calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
    tell("calls", calls=calls, finish=first.choices[0].finish_reason, text=message.content)
    MESSAGES.append(message)
    MESSAGES.extend({"role": "tool", "tool_call_id": call[0], "content": RESULT} for call in calls)
    said = litellm.completion(**AT, messages=MESSAGES, tools=[WEATHER], max_tokens=MOST)
    tell("turn", result=RESULT, text=said.choices[0].message.content, finish=said.choices[0].finish_reason)


def barge_in() -> None:
    """LiteLLM's stream has no `close` of its own: its users close the one inside."""
    MESSAGES.append({"role": "user", "content": ask(LONG)})
    heard = ""
    stream = litellm.completion(**AT, messages=MESSAGES, stream=True)
    for chunk in stream:
        heard += chunk.choices[0].delta.content or ""
        if len(heard.split()) >= 3:
            break
    stream.completion_stream.close()
    tell("closed", heard=heard)
    told.wait_for_test()
    MESSAGES.extend([{"role": "assistant", "content": heard}, {"role": "user", "content": SAID[0]}])
    said = litellm.completion(**AT, messages=MESSAGES, max_tokens=MOST)
    tell("turn", said=SAID[0], text=said.choices[0].message.content, finish=said.choices[0].finish_reason)


def failing() -> None:
    try:
        litellm.completion(**AT, messages=[{"role": "user", "content": "hi"}], max_retries=1)
    except Exception as error:
        told.tell_error(error)


told.run(globals())
