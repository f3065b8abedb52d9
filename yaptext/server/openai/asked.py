"""What a body asks for, in either dialect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from yaptext.dialogue.kept import Kept, KeptResponses
from yaptext.dialogue.request import TurnRequest
from yaptext.dialogue.runtime import Runtime
from yaptext.dialogue.session import Session
from yaptext.errors import BadMessage
from yaptext.server.access.accounts import Account
from yaptext.server.openai.chunks import Chunks, arguments_of
from yaptext.server.openai.events import Events
from yaptext.server.openai.naming import SessionName, session_name
from yaptext.server.openai.request import request_of
from yaptext.server.openai.responses_request import chat_request, kept, messages_of, sent_text
from yaptext.server.openai.responses_schema import ResponsesRequest
from yaptext.server.openai.said import Dialect, Said
from yaptext.server.openai.schema import ChatRequest, Function, Message, ToolCall


def _forgets(said: Said) -> None:
    return


@dataclass(frozen=True, slots=True)
class Asked:
    chat: ChatRequest
    dialect: Dialect
    stream: bool
    answered: Callable[[Said], None] = _forgets
    """Called with what was said, if the turn did not fail: see `Said`."""
    sent: str = ""
    """The reply that the conversation continues, if it is known here."""

    @asynccontextmanager
    async def turn(self, runtime: Runtime, account: Account) -> AsyncIterator[tuple[Session, TurnRequest]]:
        """The session of this turn alone, so that requests of one session may run beside each other, and the request.
        What the turn leaves is the named session's. Raises as `request_of` does."""
        name = session_of(self.chat)
        own = Session((account.name, "" if name is None else name.in_log))
        own.forgotten = True  # nothing of it is kept
        if name is None:
            yield own, await request_of(runtime, self.chat, account, None, self.sent)
            return
        named = runtime.sessions.open((account.name, name.id))
        named.beside.add(own)  # in use from here on
        before = 0
        try:
            request = await request_of(runtime, self.chat, account, named, self.sent)
            own.seed, own.transcript = named.seed, named.transcript.copy()
            own.turns = before = max(named.turns, *(each.turns for each in named.beside))
            yield own, request
        finally:
            named.beside.discard(own)
            if named.forgotten:
                runtime.kept.forget(account.name, named.session_id)
            elif own.turns > max(before, named.turns):  # else there was no turn, or a later one is over or of `/ws`
                named.turns = own.turns
                if named.current is None:  # else that turn of `/ws` has the transcript
                    named.transcript = own.transcript
                runtime.sessions.keep(named)


def session_of(body: ChatRequest | ResponsesRequest) -> SessionName | None:
    return session_name(body.metadata, body.prompt_cache_key, body.user)


def asked_of_chat(body: ChatRequest) -> Asked:
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    chunks = Chunks(
        body.model or "chat",
        with_usage=with_usage,
        one_call=body.parallel_tool_calls is False,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return Asked(body, chunks, bool(body.stream))


def _of_session(runtime: Runtime, account: Account, body: ResponsesRequest) -> Kept | None:
    """The conversation of the session that the body names, for an id that a restart has lost. LiveKit sends only what
    is new, and does not send the rest when the id is refused."""
    name = session_of(body)
    session = None if name is None else runtime.sessions.find((account.name, name.id))
    if name is None or session is None or not session.transcript.messages:
        return None
    said = session.transcript.messages
    messages = [Message(each.speaker, each.text) for each in said if each.speaker in ("user", "assistant")]
    return kept(messages, 2 * runtime.history_bytes, frozenset([name.id]))


def asked_of_responses(
    runtime: Runtime, account: Account, body: ResponsesRequest, events: Events, of_socket: KeptResponses | None = None
) -> Asked:
    """`of_socket` has the responses that only their socket may continue (`store: false`). Raises `BadMessage`,
    `TextTooLong`."""
    before, known = None, [runtime.kept] if of_socket is None else [of_socket, runtime.kept]
    if body.previous_response_id is not None:
        found = (each.find(account.name, body.previous_response_id) for each in known)
        before = next((each for each in found if each is not None), None)
        if before is None and body.store is not False:
            before = _of_session(runtime, account, body)
        if before is None:
            given = body.previous_response_id[:100]
            raise BadMessage(f"Previous response with id {given!r} not found. - at $.previous_response_id")
    messages = messages_of(runtime, body, before)
    chat = chat_request(body, messages)
    sessions = before.session_ids if before is not None else frozenset()
    if (name := session_of(body)) is not None:
        sessions |= {name.id}
    keeper = of_socket if body.store is False else runtime.kept

    def answered(said: Said) -> None:
        if keeper is None or (before is not None and before.forgotten):
            return
        calls = [ToolCall(call.id, Function(call.name, arguments_of(call))) for call in said.calls]
        reply = [Message("assistant", said.text, tool_calls=calls or None)] if said.text or calls else []
        conversation = kept([*messages, *reply], 2 * runtime.history_bytes, sessions)
        keeper.keep(account.name, events.id, conversation)

    return Asked(chat, events, bool(body.stream), answered, sent_text(before))
