"""A conversation with a running service, from Python.

    async with connect("ws://127.0.0.1:8000/ws", "yap_token") as yap:
        async with yap.turn("What is the capital of France?") as turn:
            async for event in turn:
                ...

`yaptext.client.sync` has the same without `async`. It depends on msgspec and websockets, and imports nothing of the
service but its frames."""

from yaptext.client.client import Yap, connect
from yaptext.client.errors import (
    AuthenticationFailed,
    BadMessage,
    ConnectionLost,
    EngineFailed,
    GoingAway,
    Internal,
    NotDeployed,
    RateLimited,
    Refused,
    ServerAtCapacity,
    ServiceError,
    SlowClient,
    TextTooLong,
    TicketFailed,
    UnknownPersona,
    Unreadable,
    YapTextError,
)
from yaptext.client.events import Event
from yaptext.client.turn import Turn
from yaptext.wire.frames import (
    Ack,
    Done,
    Final,
    Forgotten,
    HistoryItem,
    IdentifiedCall,
    SamplingFields,
    SessionState,
    Timings,
    Token,
    ToolCall,
    Usage,
    Warmed,
)

__all__ = [
    "Ack",
    "AuthenticationFailed",
    "BadMessage",
    "ConnectionLost",
    "Done",
    "EngineFailed",
    "Event",
    "Final",
    "Forgotten",
    "GoingAway",
    "HistoryItem",
    "IdentifiedCall",
    "Internal",
    "NotDeployed",
    "RateLimited",
    "Refused",
    "SamplingFields",
    "ServerAtCapacity",
    "ServiceError",
    "SessionState",
    "SlowClient",
    "TextTooLong",
    "TicketFailed",
    "Timings",
    "Token",
    "ToolCall",
    "Turn",
    "UnknownPersona",
    "Unreadable",
    "Usage",
    "Warmed",
    "Yap",
    "YapTextError",
    "connect",
]
