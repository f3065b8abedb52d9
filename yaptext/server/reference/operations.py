"""Every HTTP route as its clients see it: request, answers, key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from yaptext.server.openai.bodies import Chunk, Completion, Model, ModelList, OpenAIError
from yaptext.server.openai.responses_bodies import EVENTS as RESPONSE_EVENTS
from yaptext.server.openai.responses_bodies import ErrorEvent, Response
from yaptext.server.openai.responses_schema import Cancel, Create, ResponsesRequest
from yaptext.server.openai.schema import ChatRequest
from yaptext.server.reference import bodies, examples
from yaptext.wire.frames import Start

JSON, EVENTS, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
Content = tuple[Any, ...] | str
"""The structs that a body may be; or what a body that is no JSON holds."""
_NONE: Mapping[int, Any] = {}
_RETRY = ("Retry-After",)
_RETRY_MS = ("retry-after-ms", "Retry-After")


@dataclass(frozen=True)
class Answer:
    """What one status of a route means; `content` by media type."""

    meaning: str
    content: Mapping[str, Content] = field(default_factory=dict)
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """`key` says where a key is taken from: nowhere, headers alone, headers or the query; `remote`: a client on the
    service's own host needs none."""

    method: Literal["get", "post"]
    path: str
    name: str
    summary: str
    answers: Mapping[int, Answer]
    meaning: str = ""
    key: Literal["none", "header", "any", "remote"] = "none"
    body: type | None = None
    parameters: tuple[str, ...] = ()
    example: Any = None
    socket: tuple[tuple[type, ...], tuple[type, ...]] | None = None
    """Frames that a client sends, and that it gets, on a WebSocket of the same path."""


_NO_MODEL = Answer("There is no such model.", {JSON: (OpenAIError,)})
_NO_NAME = Answer(
    "There is no such model. Plain text if the name has a line break.", {JSON: (OpenAIError,), TEXT: "A word."}
)
_STARTING = Answer("The service is starting.", {JSON: (bodies.Starting,)}, _RETRY)
_WRONG_HOST = Answer(
    "The service listens on loopback, and `Host` names another site (`host_not_allowed`).", {JSON: (bodies.HttpError,)}
)
_KEYED = {
    401: Answer("No key, or a wrong one (`authentication_failed`).", {JSON: (bodies.HttpError,)}),
    403: _WRONG_HOST,
    429: Answer("Too many wrong keys, or the key is over its limit.", {JSON: (bodies.HttpError,)}, _RETRY),
}  # fmt: skip
_OPENAI = {
    401: Answer("No key, a wrong one, or an origin that is not allowed.", {JSON: (OpenAIError,)}),
    403: Answer(_WRONG_HOST.meaning, {JSON: (OpenAIError,)}),
    429: Answer("The key is over its limit, or too many wrong keys were given.", {JSON: (OpenAIError,)}, _RETRY_MS),
    503: Answer("The service is full, drains or is starting.", {JSON: (OpenAIError, bodies.Starting)}, _RETRY_MS),
}


def _probe(path: str, name: str, summary: str, good: Content, broken: str) -> Operation:
    answers = {
        200: Answer("Yes.", {JSON: good}),
        403: _WRONG_HOST,
        503: Answer(broken, {JSON: (good[0], bodies.Starting)}, _RETRY),
    }
    return Operation("get", path, name, summary, answers)


def _file(
    path: str, name: str, summary: str, media_type: str, holds: str, more: Mapping[int, Answer] = _NONE
) -> Operation:
    """A route whose bytes stay the same while the service runs."""
    answers = {
        200: Answer(holds, {media_type: (dict[str, Any],) if media_type == JSON else holds}, ("ETag", "Cache-Control")),
        304: Answer("The client has it already.", {}, ("ETag", "Cache-Control")),
        403: _WRONG_HOST,
        503: _STARTING,
        **more,
    }
    return Operation("get", path, name, summary, answers, parameters=("If-None-Match",))


def generation(
    path: str,
    name: str,
    summary: str,
    body: type,
    whole: type,
    events: tuple[type, ...],
    example: Any,
    socket: tuple[tuple[type, ...], tuple[type, ...]] | None = None,
) -> Operation:
    """A route of `/v1/` that makes a reply: one object, or a stream of events if the request has `stream: true`."""
    answers = {
        200: Answer(
            "The reply, as one object or as events. A line that begins with `:` keeps a silent stream open. The "
            "last event of a stream that fails is the error.",
            {JSON: (whole,), EVENTS: events},
        ),
        400: Answer("A field is wrong or too long. The message gives the limit.", {JSON: (OpenAIError,)}),
        **_OPENAI,
        404: _NO_MODEL,
        500: Answer("The engine or the service failed at this request.", {JSON: (OpenAIError,)}),
    }
    meaning = (
        "A request takes a slot while it runs. It is charged as a message and a turn. Fields that the service does not "
        "know are ignored. If the client disconnects, the turn ends."
    )
    return Operation("post", path, name, summary, answers, meaning, "header", body, example=example, socket=socket)


SOCKET_CLOSES = {
    1001: "No frame came for IDLE_TIMEOUT_S.",
    1007: "A text was not UTF-8.",
    1008: "The key was removed, or the client did not read.",
    1009: "A frame was over MAX_FRAME_BYTES, or had too many fragments.",
    1011: "A fault of the service.",
    1012: "The service is stopping, or has lost an engine.",
}
"""Of the sockets of OpenAI's API: their clients reconnect after 1001, 1011 and 1012."""
OPERATIONS = (
    generation(
        "/v1/chat/completions", "createChatCompletion", "A reply to a list of messages, or the calls of its tools",
        ChatRequest, Completion, (Chunk, OpenAIError), examples.CHAT_REQUEST,
    ),
    generation(
        "/v1/responses", "createResponse", "A reply to what is added to a conversation, or the calls of its tools",
        ResponsesRequest, Response, RESPONSE_EVENTS, examples.RESPONSES_REQUEST,
        ((Create, Cancel), (*RESPONSE_EVENTS, ErrorEvent)),
    ),
    Operation(
        "get", "/v1/models", "listModels", "The names that `model` may be",
        {200: Answer("Roles, models and personas.", {JSON: (ModelList,)}), **_OPENAI},
        key="header",
    ),
    Operation(
        "get", "/v1/models/{name}", "retrieveModel", "One of those names",
        {200: Answer("It exists.", {JSON: (Model,)}), 404: _NO_NAME, **_OPENAI}, "The name may contain slashes.",
        "header", parameters=("name",),
    ),
    Operation(
        "post", "/ticket", "createTicket", "A ticket, which opens one `/ws`",
        {200: Answer("The ticket works once.", {JSON: (bodies.Ticket,)}, ("Cache-Control",)), **_KEYED, 503: _STARTING},
        "For the backend of a web page: the page itself must not have the key.", "header",
    ),
    Operation(
        "get", "/status", "getStatus", "Capacity, models, caches, sessions, version",
        {200: Answer("How the service is now.", {JSON: (bodies.Status,)}), **_KEYED, 503: _STARTING}, key="any",
    ),
    Operation(
        "get", "/metrics", "getMetrics", "Metrics for Prometheus",
        {200: Answer("All metrics.", {TEXT: "The text format of Prometheus."}), **_KEYED, 503: _STARTING},
        "Needs a key, except from the service's own host without a proxy.", "remote",
    ),
    _probe(
        "/livez", "getLiveness", "Whether the service lives", (bodies.Health, bodies.Starting),
        "An engine is dead or does not answer. During a start the answer is 200.",
    ),
    _probe(
        "/healthz", "getHealth", "Whether the service lives, and has started", (bodies.Health,),
        "An engine is dead or does not answer, or the service is starting.",
    ),
    _probe(
        "/readyz", "getReadiness", "Whether new conversations are accepted", (bodies.Readiness,),
        "The service is starting or drains, or an engine is dead or does not answer.",
    ),
    _file("/openapi.json", "getOpenApi", "This document", JSON, "An OpenAPI 3.1 document."),
    _file("/asyncapi.json", "getAsyncApi", "The protocol of `/ws`", JSON, "An AsyncAPI 3.0 document."),
    _file("/docs", "getDocs", "Both documents as a page", HTML, "A page without scripts."),
    _file("/client.js", "getClient", "The browser client", "text/javascript", "An ES module."),
    _file("/client.d.ts", "getClientTypes", "The types of the browser client", TEXT, "Declarations of TypeScript."),
    _file(
        "/", "getPlayground", "The playground", HTML, "A page to talk to the service.",
        {
            404: Answer("The request does not accept `text/html`, or PLAYGROUND=0.", {TEXT: "A word."}),
            503: Answer("The service is starting.", {HTML: "A page that waits.", JSON: (bodies.Starting,)}, _RETRY),
        },
    ),
    Operation(
        "post", "/playground/prompt", "showPrompt", "The exact prompts of a turn that does not run",
        {
            200: Answer("The prompt of each model.", {JSON: (bodies.ShownPrompts,)}, ("Cache-Control",)),
            400: Answer("The frame would be refused.", {JSON: (bodies.FrameRefused,)}, ("Cache-Control",)),
            404: Answer("PLAYGROUND=0.", {TEXT: "A word."}),
            **_KEYED,
            503: _STARTING,
        },
        "A request is charged as a message. Nothing of it is kept.", "header", Start, example=examples.START,
    ),
)  # fmt: skip
