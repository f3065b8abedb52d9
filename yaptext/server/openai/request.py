"""How a body of `/v1/chat/completions` becomes the request of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from yaptext.dialogue.incoming import compiled
from yaptext.dialogue.persona import styles
from yaptext.dialogue.request import Told, TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.dialogue.talk import Called
from yaptext.dialogue.tool_rounds import in_words
from yaptext.dialogue.tool_schema import check_references, check_schema, for_grammar
from yaptext.dialogue.transcript import Message as Said
from yaptext.dialogue.transcript import cut_short, keep_recent
from yaptext.errors import BadMessage, NotDeployed, TextTooLong
from yaptext.server.access.accounts import Account
from yaptext.server.openai.schema import ChatRequest, Message, NamedTool, ToolCall
from yaptext.wire.frames import PersonaFields, SamplingFields

_LEAST_BYTES = 64
"""What a message of a history counts as at least."""
_PERSONA = "persona/"
_NO_RESULT = "(no result)"


def model_names(runtime: Runtime) -> list[str]:
    """What `model` may be: the roles, the models' own names, the personas."""
    chat, tool = runtime.engines.chat, runtime.engines.tool
    names = ["chat", chat.model] if chat is not None else []
    names += ["tool", tool.model] if tool is not None else []
    return list(dict.fromkeys(names + [f"{_PERSONA}{style}" for style in styles() if chat is not None]))


def session_id_of(body: ChatRequest) -> str | None:
    """Which session a request belongs to, if it says so."""
    named = (body.metadata or {}).get("session_id") or body.prompt_cache_key or body.user
    return named[:128] if isinstance(named, str) and named else None


async def request_of(runtime: Runtime, body: ChatRequest, account: Account, session: Session | None) -> TurnRequest:
    """The request of a body. `session` is the one that the body names. Raises `BadMessage`,
    `TextTooLong`, `NotDeployed`, `RateLimited`."""
    _check(body)
    known = model_names(runtime)
    if body.model not in known:
        raise NotDeployed(f"The model {body.model[:100]!r} does not exist; there are {', '.join(known)} - at $.model")
    tool = runtime.engines.tool
    replies = not (body.model == "tool" or (tool is not None and body.model == tool.model != _chat_name(runtime)))
    persona, history, utterance, rounds = _parts(body.messages)
    if session is not None:
        _mark_heard(history, session, runtime.settings.interrupted_mark)
    sizes = [max(len(said.text.encode(errors="replace")), _LEAST_BYTES) for said in history]
    history = history[keep_recent(sizes, runtime.history_bytes) :]
    style = body.model.removeprefix(_PERSONA) if body.model.startswith(_PERSONA) else None
    # Without a system message and a persona the prompt has none.
    fields = PersonaFields(
        persona_text=persona if persona is not None or style is not None else "", persona_style=style
    )
    limit = 16 * runtime.settings.persona_max_tokens
    if persona is not None and len(persona) > limit:
        raise TextTooLong(f"the system message is {len(persona)} characters; limit is {limit} - at $.messages")
    if persona is not None and runtime.prompts is not None:
        await runtime.prompts.check_persona(persona)
    if utterance is not None:
        await _check_utterance(runtime, utterance)
    tools = await _tools(runtime, body, account) if not rounds else []
    schema = _json_schema(body)
    if schema is not None and runtime.engines.chat is not None:
        account.spend("tools")
        await runtime.engines.chat.check_schema(schema)
    must_call = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    return TurnRequest(
        session_id_of(body) or "",
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
    )


def _chat_name(runtime: Runtime) -> str | None:
    return runtime.engines.chat.model if runtime.engines.chat is not None else None


def _check(body: ChatRequest) -> None:
    if body.n not in (None, 1):
        raise BadMessage(f"n is {body.n}; allowed is 1 - at $.n")
    if body.logprobs or body.top_logprobs:
        raise BadMessage("logprobs are not given - at $.logprobs")


def _parts(messages: Sequence[Message]) -> tuple[str | None, list[Said], str | None, list[list[Called]]]:
    """Persona, history, utterance, and the rounds of calls that were made for the utterance."""
    last = next((index for index in range(len(messages) - 1, -1, -1) if messages[index].role == "user"), None)
    tail = messages[last + 1 :] if last is not None else ()
    if any(message.role == "assistant" and not message.tool_calls and _text(message) for message in tail):
        last, tail = None, ()  # the assistant has answered: it goes on by itself
    persona = [_text(each) for each in messages if each.role in ("system", "developer")]
    before = [
        each for each in (messages if last is None else messages[:last]) if each.role not in ("system", "developer")
    ]
    history: list[Said] = []
    for index, message in enumerate(before):
        if message.role in ("user", "assistant") and (text := _text(message)):
            history.append(Said("user" if message.role == "user" else "assistant", text))
        if message.tool_calls:
            history += [Said("tool", text) for text in in_words([_called(message.tool_calls, before[index + 1 :])])]
    rounds = [_called(each.tool_calls, tail[index + 1 :]) for index, each in enumerate(tail) if each.tool_calls]
    utterance = None if last is None else _text(messages[last]) or None
    return "\n\n".join(filter(None, persona)) or None, history, utterance, rounds


def _text(message: Message) -> str:
    """Raises `BadMessage` for a part that is no text."""
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                raise BadMessage(f"a part of a content is {part.type[:40]!r}; allowed is 'text' - at $.messages")
        return "\n".join(part.text for part in content).strip()
    return (content or "").strip()


def _called(calls: Sequence[ToolCall], after: Sequence[Message]) -> list[Called]:
    """The calls with what they returned. One whose result is missing, as after an interruption, has none."""
    results = {each.tool_call_id: _text(each) for each in after if each.role == "tool"}
    return [Called(call.function.name, _arguments(call), results.get(call.id, _NO_RESULT)) for call in calls]


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        return msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except msgspec.DecodeError:
        return {"arguments": call.function.arguments}


def _mark_heard(history: list[Said], session: Session, mark: str) -> None:
    """The last reply that the client shows, if it is shorter than what was sent, is what the user heard of it."""
    sent = next((said.text for said in reversed(session.transcript.messages) if said.speaker == "assistant"), "")
    index = next((index for index in range(len(history) - 1, -1, -1) if history[index].speaker == "assistant"), None)
    if index is None:
        return
    heard, whole = "".join(history[index].text.split()), "".join(sent.split())
    if len(heard) < len(whole) and whole.startswith(heard):
        history[index] = Said("assistant", cut_short(history[index].text, mark))


async def _check_utterance(runtime: Runtime, text: str) -> None:
    """Raises `TextTooLong`: what is over the limit would be cut off, and a client of this API expects no such thing."""
    engine, limit = runtime.engines.chat or runtime.engines.tool, runtime.settings.user_utt_max_tokens
    assert engine is not None
    size = len(text) if len(text) > runtime.utterance_chars else len(await engine.codec.encode(text))
    if size > limit:
        unit = "characters" if len(text) > runtime.utterance_chars else "tokens"
        raise TextTooLong(
            f"the user message is {size} {unit}; limit is {limit} tokens (USER_UTT_MAX_TOKENS) - at $.messages"
        )


async def _tools(runtime: Runtime, body: ChatRequest, account: Account) -> list[dict[str, Any]]:
    """Those that the decision is about; none if there is nothing to decide."""
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        return []
    if runtime.decider is None and (choice == "required" or isinstance(choice, NamedTool)):
        raise NotDeployed("tool_choice needs the tool model; DEPLOY_MODELS=chat - at $.tool_choice")
    if not tools and runtime.settings.tools_on_openai and runtime.decider is not None:
        tools = list(runtime.decider.tools.given)
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if (tool.get("function") or tool).get("name") == choice.function.name]
        if not tools:
            raise BadMessage(
                f"tool_choice names {choice.function.name[:64]!r}, which is not in tools - at $.tool_choice"
            )
    if tools and runtime.decider is not None:
        await compiled(runtime, tools, account.spend)
    return tools if runtime.decider is not None else []


def _json_schema(body: ChatRequest) -> str | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise BadMessage("Object missing required field `json_schema` - at $.response_format")
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema
    check_schema(schema, "response_format", "$.response_format")
    for _ in check_references(schema, "response_format", "$.response_format"):
        pass
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
