"""Every error that Yap Text raises on purpose.

YapError
├── SettingsError              a variable is wrong; the start ends with this line
├── StartError                 weights or an engine cannot be opened; the start ends, a later one may not
│   └── StartRefused           nor can a later one: the settings name what is not there, or does not fit
├── HostNotAllowed             a browser asks under another site's name; HTTP only, 403
├── QuantizeError              a model cannot be quantized, verified or pushed; nothing half-made is left
│   ├── QuantizeRefused        nor can it later: the settings, the model or the code have to change first
│   └── QuantizeDelayed        the hub, the disk, the card or another job was in the way; a later try may do
└── WireError                  sent to the client as an `error` frame
    ├── AuthenticationFailed   closes the socket, 1008
    ├── ServerAtCapacity       closes the socket, 1013; a retry helps
    ├── GoingAway              closes the socket, 1012; a retry helps
    ├── SlowClient             closes the socket, 4001
    ├── BadMessage             the frame is not of the protocol
    ├── TextTooLong            the message names the size and the limit
    ├── UnknownPersona         nothing is known to warm or to change
    ├── NotDeployed            the model that would do it is not deployed
    ├── RateLimited            a retry helps
    ├── EngineFailed           this request failed, the engine lives
    │   ├── EngineUnavailable  the engine is away, and may come back; the process lives
    │   └── EngineDead         the engine is gone; the process will end
    └── Internal               a fault of ours; the journal has the traceback
"""

from __future__ import annotations

from typing import ClassVar


class YapError(Exception):
    """The root: `except YapError` is every error that has a name here.

    `exit_status` is that of a command which ends with the error: 2 stays wrong until something is corrected, and
    systemd does not try again (`RestartPreventExitStatus=`); 75 (EX_TEMPFAIL of sysexits.h) may pass by itself.
    """

    exit_status: ClassVar[int] = 1


class SettingsError(YapError):
    """One line that names the variable, its value and what is allowed."""

    exit_status = 2


class StartError(YapError):
    """The service cannot start; the message says what to do about it. The hub, the driver, the disk or the port may
    be there at the next try."""

    exit_status = 75


class StartRefused(StartError):
    """The service cannot start with these settings and models, however often it is tried."""

    exit_status = 2


class HostNotAllowed(YapError):
    """The `Host` of a request names neither this machine nor what the operator allows."""


class QuantizeError(YapError):
    """A quantizer's job ends; the message says why, and what was kept. As it is, it means a crash."""


class QuantizeRefused(QuantizeError):
    """The same job fails the same way until settings, model or code change."""

    exit_status = 2


class QuantizeDelayed(QuantizeError):
    """The job could not be done now. The message says what was in the way."""

    exit_status = 75


class WireError(YapError):
    """An error with a place in the protocol.

    `code` is the frame's `error_code`; `close_code` is the WebSocket close code where the error ends
    the connection; `retry_after_ms` says that waiting helps, and how long.
    """

    code: ClassVar[str] = "internal"
    close_code: ClassVar[int | None] = None

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms


class AuthenticationFailed(WireError):
    code, close_code = "authentication_failed", 1008

    def __init__(
        self,
        message: str = "Authentication required. Provide valid API key via 'api_key' query parameter or "
        "'X-API-Key' header.",
    ) -> None:
        super().__init__(message)


class ServerAtCapacity(WireError):
    code, close_code = "server_at_capacity", 1013


class GoingAway(WireError):
    code, close_code = "going_away", 1012


class SlowClient(WireError):
    code, close_code = "slow_client", 4001


class BadMessage(WireError):
    code = "bad_message"


class TextTooLong(WireError):
    code = "text_too_long"


class UnknownPersona(WireError):
    code = "unknown_persona"


class NotDeployed(WireError):
    code = "not_deployed"


class RateLimited(WireError):
    code = "rate_limited"


class EngineFailed(WireError):
    code = "engine_failed"


class EngineUnavailable(EngineFailed):
    pass


class EngineDead(EngineFailed):
    pass


class Internal(WireError):
    code, close_code = "internal", 1011


def wire_codes(root: type[WireError] = WireError) -> list[str]:
    """Every `error_code` of the protocol, in the order of the tree above."""
    codes: dict[str, None] = {}
    for child in root.__subclasses__():
        codes[child.code] = None
        codes.update(dict.fromkeys(wire_codes(child)))
    return list(codes)
