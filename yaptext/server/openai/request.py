"""How a body of `/v1/chat/completions` becomes the request of a turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from yaptext.dialogue.incoming import compiled
from yaptext.dialogue.persona import styles
from yaptext.dialogue.request import Told, TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.talk import Called
from yaptext.dialogue.tool_rounds import in_words
from yaptext.dialogue.tool_schema import check_references, check_schema, for_grammar
from yaptext.dialogue.tools import MAX_TOOLS_BYTES
from yaptext.dialogue.transcript import Message as Said
from yaptext.dialogue.transcript import cut_short, keep_recent
from yaptext.errors import BadMessage, NotDeployed, TextTooLong
from yaptext.server.access.accounts import Account
from yaptext.server.openai.schema import ChatRequest, Message, NamedTool, ToolCall
from yaptext.wire.frames import PersonaFields, SamplingFields

_LEAST_BYTES = 64
"""What a message of a history counts as at least."""
HEARD_CHARS = 65_536
"""Limit of a message that may be a part of a reply: no reply of the service is longer."""
_PERSONA = "persona/"
_NO_RESULT = "(no result)"
_M = TypeVar("_M")
_MOST_ROUNDS, _MOST_CALLS = 16, 64
_MOST_ARGUMENTS, _MOST_DEPTH = 32_768, 64
"""Limits of a call's arguments, in characters and in objects or lists. Others are kept as text."""
_LONG_ARGUMENTS = 4_096
"""Longer arguments are decoded after a pause, so that other turns can run."""


def model_names(runtime: Runtime) -> list[str]:
    """What `model` may be: the roles, the models' own names, the personas."""
    chat, tool = runtime.engines.chat, runtime.engines.tool
    names = ["chat", chat.model] if chat is not None else []
    names += ["tool", tool.model] if tool is not None else []
    return list(dict.fromkeys(names + [f"{_PERSONA}{style}" for style in styles() if chat is not None]))


async def request_of(
    runtime: Runtime, body: ChatRequest, account: Account, session: Session | None, sent: str = ""
) -> TurnRequest:
    """The request of a body. `session` is the one that the body names, `sent` the last reply of the conversation, if
    it is known otherwise. Raises `BadMessage`, `TextTooLong`, `NotDeployed`, `RateLimited`."""
    _check(body)
    known, model = model_names(runtime), body.model or "chat"
    if model not in known:
        raise NotDeployed(f"The model {model[:100]!r} does not exist; there are {', '.join(known)} - at $.model")
    tool = runtime.engines.tool
    replies = not (model == "tool" or (tool is not None and model == tool.model != _chat_name(runtime)))
    persona, history, utterance, rounds = await _parts(latest(runtime, body.messages, _is_system))
    limit = 16 * runtime.settings.tool_result_max_tokens
    rounds = [[replace(call, content=call.content[:limit]) for call in calls] for calls in rounds]
    await asyncio.sleep(0)  # others' turn: a long history was parsed
    if session is not None and not sent:
        replies_sent = (said.text for said in reversed(session.transcript.messages) if said.speaker == "assistant")
        sent = next(replies_sent, "")
    _mark_heard(history, sent, runtime.settings.interrupted_mark)
    sizes = [max(len(said.text.encode(errors="replace")), _LEAST_BYTES) for said in history]
    history = history[keep_recent(sizes, runtime.history_bytes) :]
    style = model.removeprefix(_PERSONA) if model.startswith(_PERSONA) else None
    # Without a system message and a persona the prompt has none.
    fields = PersonaFields(
        persona_text=persona if persona is not None or style is not None else "", persona_style=style
    )
    limit = 16 * runtime.settings.persona_max_tokens
    if persona is not None and len(persona) > limit:
        raise TextTooLong(f"the system message is {len(persona)} characters; limit is {limit} - at $.messages")
    if persona is not None and runtime.prompts is not None:
        try:
            await runtime.prompts.check_persona(persona)
        except TextTooLong as error:
            raise TextTooLong(f"the system message: {error.message.partition(' - at ')[0]} - at $.messages") from None
    if utterance is not None:
        await _check_utterance(runtime, utterance)
    tools = await _tools(runtime, body, account) if not rounds else []
    schema = await _json_schema(body)
    if schema is not None and runtime.engines.chat is not None and schema not in runtime.reply_schemas:
        account.spend("tools")
        await runtime.engines.chat.check_schema(schema)
        runtime.reply_schemas[schema] = None
    must_call = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    return TurnRequest(
        "",
        utterance,
        persona=fields,
        history=Told(history, "".join(said.text for said in history)),
        tools=tools,
        await_tools=True,
        speakable=False,
        rounds=rounds,
        decides=bool(tools) or not replies,
        must_call=must_call and bool(tools),
        replies=replies,
        plain=True,
        json_schema=schema,
        sampling=_sampling(body),
        alternatives=max(1, body.top_logprobs or 0) if body.logprobs else 0,
    )


def _chat_name(runtime: Runtime) -> str | None:
    return runtime.engines.chat.model if runtime.engines.chat is not None else None


def _check(body: ChatRequest) -> None:
    if body.n not in (None, 1):
        raise BadMessage(f"n is {body.n}; allowed is 1 - at $.n")
    if body.top_logprobs and not body.logprobs:
        raise BadMessage("top_logprobs needs logprobs - at $.top_logprobs")


async def _parts(messages: Sequence[Message]) -> tuple[str | None, list[Said], str | None, list[list[Called]]]:
    """Persona, history, utterance, and the rounds of calls that were made for the utterance. Others have their turn
    between the messages."""
    last = next((index for index in range(len(messages) - 1, -1, -1) if messages[index].role == "user"), None)
    tail = messages[last + 1 :] if last is not None else ()
    if any(message.role == "assistant" and not message.tool_calls and text_of(message) for message in tail):
        last, tail = None, ()  # the assistant has answered: it goes on by itself
    persona = [text_of(each) for each in messages if _is_system(each)]
    before = [each for each in (messages if last is None else messages[:last]) if not _is_system(each)]
    history: list[Said] = []
    for index, message in enumerate(before):
        if message.role in ("user", "assistant") and (text := text_of(message)):
            history.append(Said("user" if message.role == "user" else "assistant", text))
        if message.tool_calls:
            history += [Said("tool", text) for text in in_words([await _called(before, index)])]
    with_calls = [index for index, each in enumerate(tail) if each.tool_calls][-_MOST_ROUNDS:]
    rounds = []
    for index in with_calls:
        rounds.append(await _called(tail, index))
    utterance = None if last is None else text_of(messages[last]) or None
    return "\n\n".join(filter(None, persona)) or None, history, utterance, rounds


def text_of(message: Message) -> str:
    """Raises `BadMessage` for a part that is no text."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                raise BadMessage(f"a part of a content is {part.type[:40]!r}; allowed is 'text' - at $.messages")
        return "\n".join(part.text for part in content).strip()
    return (content or "").strip()


async def _called(messages: Sequence[Message], index: int) -> list[Called]:
    """The calls of a message with what they returned, up to the next message with calls. One whose result is missing,
    as after an interruption, has none."""
    results: dict[str | None, str] = {}
    for after in range(index + 1, len(messages)):
        each = messages[after]
        if each.tool_calls:
            break
        if each.role in ("tool", "function"):
            results.setdefault(each.tool_call_id, text_of(each))
    calls = (messages[index].tool_calls or [])[:_MOST_CALLS]
    lacking = [call.id for call in calls if call.id not in results]
    if None in results and len(lacking) == 1:
        results[lacking[0]] = results[None]  # of a client that names no call
    called = []
    await asyncio.sleep(0)
    for call in calls:
        if len(call.function.arguments or "") > _LONG_ARGUMENTS:
            await asyncio.sleep(0)
        called.append(Called(call.function.name, _arguments(call), results.get(call.id, _NO_RESULT)))
    return called


def _arguments(call: ToolCall) -> dict[str, Any]:
    """Arguments that are broken, long or deep are kept as text, since a template walks through the others."""
    text = call.function.arguments or "{}"
    try:
        if len(text) <= _MOST_ARGUMENTS and max(text.count("["), text.count("{")) <= _MOST_DEPTH:
            return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        pass
    return {"arguments": text[:_MOST_ARGUMENTS]}


def latest(runtime: Runtime, messages: Sequence[_M], is_system: Callable[[_M], bool]) -> list[_M]:
    """The end of a long conversation, with the system messages before it: more is never used. Raises `TextTooLong`."""
    most = 2 * runtime.history_bytes // _LEAST_BYTES
    first = [each for each in messages[:-most] if is_system(each)]
    limit = runtime.settings.persona_max_tokens
    if len(first) > limit:
        raise TextTooLong(
            f"there are {len(first)} system messages; limit is {limit} tokens (PERSONA_MAX_TOKENS) - at $.messages"
        )
    return [*first, *messages[-most:]]


def _is_system(message: Message) -> bool:
    return message.role in ("system", "developer") and bool(message.content)


def _mark_heard(history: list[Said], sent: str, mark: str) -> None:
    """The last reply that the client shows, if it is shorter than what was sent, is what the user heard of it."""
    index = next((index for index in range(len(history) - 1, -1, -1) if history[index].speaker == "assistant"), None)
    if index is None or len(history[index].text) > HEARD_CHARS:
        return
    heard, whole = "".join(history[index].text.split()), "".join(sent.split())
    if len(heard) < len(whole) and whole.startswith(heard):
        history[index] = Said("assistant", cut_short(history[index].text, mark))


async def _check_utterance(runtime: Runtime, text: str) -> None:
    """Raises `TextTooLong`. `/ws` cuts a longer text off; a client of this API does not expect that."""
    engine, limit = runtime.engines.chat or runtime.engines.tool, runtime.settings.user_utt_max_tokens
    assert engine is not None
    size = len(text) if len(text) > runtime.utterance_chars else len(await engine.codec.encode(text))
    if size > limit:
        unit = "characters" if len(text) > runtime.utterance_chars else "tokens"
        raise TextTooLong(
            f"the user message is {size} {unit}; limit is {limit} tokens (USER_UTT_MAX_TOKENS) - at $.messages"
        )


async def _tools(runtime: Runtime, body: ChatRequest, account: Account) -> list[dict[str, Any]]:
    """The tools of the decision; none if there is nothing to decide."""
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        return []
    if runtime.decider is None and (choice == "required" or isinstance(choice, NamedTool)):
        raise NotDeployed("tool_choice needs the tool model; DEPLOY_MODELS=chat - at $.tool_choice")
    if choice == "required" and not tools and not runtime.settings.tools_on_openai:
        raise BadMessage("tool_choice is required, and there are no tools - at $.tool_choice")
    if not tools and runtime.settings.tools_on_openai and runtime.decider is not None:
        tools = list(runtime.decider.tools.given)
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if _name(tool) == choice.function.name]
        if not tools:
            raise BadMessage(
                f"tool_choice names {choice.function.name[:64]!r}, which is not in tools - at $.tool_choice"
            )
    if tools and runtime.decider is not None:
        await compiled(runtime, tools, account.spend)
    return tools if runtime.decider is not None else []


def _name(tool: dict[str, Any]) -> Any:
    inner = tool.get("function", tool)
    return inner.get("name") if isinstance(inner, dict) else None


async def _json_schema(body: ChatRequest) -> str | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise BadMessage("Object missing required field `json_schema` - at $.response_format")
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema
    size = len(msgspec.json.encode(schema))
    if size > MAX_TOOLS_BYTES:
        raise BadMessage(f"the schema is {size} bytes of JSON; limit is {MAX_TOOLS_BYTES} - at $.response_format")
    check_schema(schema, "response_format", "$.response_format")
    for _ in check_references(schema, "response_format", "$.response_format"):
        await asyncio.sleep(0)
    return msgspec.json.encode(for_grammar(schema)).decode()


def _sampling(body: ChatRequest) -> SamplingFields:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    fields = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
        )
        if (value := getattr(body, name)) is not None
    }
    most = body.max_completion_tokens or body.max_tokens
    if most is not None:
        fields["max_tokens"] = min(most, 4096)
    try:
        return msgspec.convert(fields | ({"stop": stop} if stop else {}), SamplingFields)
    except msgspec.ValidationError as error:
        raise BadMessage(str(error).replace("`", "")) from None
