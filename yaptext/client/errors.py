"""Every error that the client raises on purpose.

YapTextError
├── Refused                   the service cannot be reached
│   ├── ConnectionLost        the socket broke or was closed; `close_code` says how
│   └── TicketFailed          retryable: the caller's `ticket` brought none
├── Unreadable                the service sent a frame that this version of the client cannot read
└── ServiceError              an `error` frame of the service
    ├── AuthenticationFailed  the key is wrong, or was removed
    ├── ServerAtCapacity      retryable: no free slot
    ├── GoingAway             retryable: the service starts or stops
    ├── SlowClient            this client did not read
    ├── BadMessage            a field is wrong; raised before anything is sent, too
    ├── TextTooLong           the message names the size and the limit
    ├── UnknownPersona        the message lists the known styles
    ├── NotDeployed           the model that would do it is not deployed
    ├── RateLimited           retryable: the key is over its limit
    ├── EngineFailed          retryable: this request failed
    └── Internal              retryable: a fault of the service

The names are those of `yaptext.errors`, which the service raises; these classes are others. A command that ends with
one of these has exit status 1: what a service ends with says nothing about its clients."""

from __future__ import annotations

from msgspec import UNSET

from yaptext.errors import YapError
from yaptext.wire.frames import Capacity, Error

IDLE, TOO_LARGE, TOO_SLOW = 4000, 1009, 4001
RECONNECTS = frozenset({1001, 1005, 1006, 1011, 1012, 1013})
"""Close codes after which a new socket is opened at once: the network or the server went, not this conversation."""
RECONNECTS_WHEN_NEEDED = frozenset({IDLE, TOO_LARGE, TOO_SLOW})
"""Close codes after which the next call opens a socket. 4000: nobody spoke, so the slot belongs to others until then.
1009, 4001: the same frame, or the same machine, would cause it again at once."""


class YapTextError(YapError):
    """The root. `code` is the frame's `error_code`, or the client's own word. If `retryable`, the same call may succeed
    later: after `retry_after_ms`, if that is known."""

    code: str = "client"
    retryable: bool = False

    def __init__(self, message: str, *, retryable: bool | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms
        if retryable is not None:
            self.retryable = retryable


class Refused(YapTextError):
    code = "unreachable"


class TicketFailed(Refused):
    code, retryable = "ticket_failed", True


class ConnectionLost(Refused):
    code = "connection_lost"

    def __init__(self, close_code: int, reason: str = "") -> None:
        retryable = close_code in RECONNECTS | {IDLE}
        super().__init__(f"the service closed the connection: {f'{close_code} {reason}'.strip()}", retryable=retryable)
        self.close_code = close_code


class Unreadable(YapTextError):
    code = "unreadable"


class ServiceError(YapTextError):
    """As it is: a code of a newer service. `turn` is None if the error belongs to no turn."""

    code = "unknown"
    turn: int | None = None
    capacity: Capacity | None = None


class AuthenticationFailed(ServiceError):
    code = "authentication_failed"


class ServerAtCapacity(ServiceError):
    """`capacity` has the numbers."""

    code, retryable = "server_at_capacity", True


class GoingAway(ServiceError):
    code, retryable = "going_away", True


class SlowClient(ServiceError):
    code = "slow_client"


class BadMessage(ServiceError):
    code = "bad_message"


class TextTooLong(ServiceError):
    code = "text_too_long"


class UnknownPersona(ServiceError):
    code = "unknown_persona"


class NotDeployed(ServiceError):
    code = "not_deployed"


class RateLimited(ServiceError):
    code, retryable = "rate_limited", True


class EngineFailed(ServiceError):
    code, retryable = "engine_failed", True


class Internal(ServiceError):
    code, retryable = "internal", True


CLASSES = {cls.code: cls for cls in ServiceError.__subclasses__()}
"""The class of each `error_code`."""


def error_of(frame: Error) -> ServiceError:
    """The exception of an `error` frame. Time to wait makes any of them retryable."""
    after = None if frame.retry_after_ms is UNSET else frame.retry_after_ms
    retryable = None if after is None else True
    error = CLASSES.get(frame.error_code, ServiceError)(frame.message, retryable=retryable, retry_after_ms=after)
    error.code = frame.error_code
    error.turn = None if frame.turn is UNSET else frame.turn
    error.capacity = None if frame.capacity is UNSET else frame.capacity
    return error
