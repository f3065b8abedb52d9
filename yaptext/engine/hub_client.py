"""The Hugging Face Hub as every command uses it: its client, with each failure in one line.

What the client itself reads from the environment counts: HF_ENDPOINT, HF_HUB_OFFLINE, proxies, timeouts, certificates.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub as client  # loads its parts, and reads its variables, at their first use
import structlog

from yaptext.errors import SettingsError, YapError
from yaptext.settings import Settings

T = TypeVar("T")
Pause = Callable[[float], None]

PAUSES_S = (5.0, 20.0)
"""Between the three tries."""
_LONGEST_PAUSE_S = 120.0
SILENCE_S = 120.0
"""A hub that says nothing for this long counts as unreachable; of itself the client would wait for ever."""

_log = structlog.get_logger(__name__)
_PASSING = (408, 409, 412, 425, 429)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Hub:
    """The client with this command's token and cache. `stays` and `passes` are what its failures are raised as: those
    that a later try meets again, and the others."""

    def __init__(
        self, settings: Settings, stays: type[YapError], passes: type[YapError], *, pause: Pause = time.sleep
    ) -> None:
        self.stays, self.passes, self._pause = stays, passes, pause
        self._is_unit = is_unit(settings)
        self.is_watched = settings.log_format != "json" and sys.stderr.isatty()
        """A person reads standard error."""
        self.cache = prepare(settings)
        self.api = client.HfApi(token=hub_token(settings))

    def ask(self, repo: str, doing: str, attempt: Callable[[], T], *, label: str | None = None) -> T:
        """What `attempt` returns, tried three times while its errors may pass. What is raised has no cause: the
        client's errors quote signed addresses. `label` is `repo` for people."""
        import httpx2  # what the client speaks HTTP with

        for wait in (*PAUSES_S, None):
            hooks = client.get_session().event_hooks["request"]
            if _limit_silence not in hooks:
                hooks.append(_limit_silence)
            try:
                return attempt()
            except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:  # the roots of some dozens
                if wait is None or not may_pass(error):
                    raise self.failure(error, repo, doing, label=label) from None
                reason, pause_s = reason_of(error, self.api.token), max(wait, _asked_pause_s(error))
            _log.warning("hub.retry", repo=repo, error=reason, pause_s=pause_s)
            self._pause(pause_s)
        raise AssertionError("the last try returns or raises")

    def failure(self, error: BaseException, repo: str, doing: str, *, label: str | None = None) -> YapError:
        """The failure that a client's error is reported as."""
        line = access_line(error, repo, label or repo, known=bool(self.api.token), is_unit=self._is_unit)
        if line is None:
            line = self._line(error, reason_of(error, self.api.token), label or repo, doing)
        return (self.stays if _stays(error) else self.passes)(line)

    def _line(self, error: BaseException, reason: str, name: str, doing: str) -> str:
        if status_of(error) == 403:
            return f"HF_TOKEN may not {doing} {name} ({reason})"
        if has(error, client_errors().OfflineModeIsEnabled):
            return f"{name} is not in {self.cache}, and HF_HUB_OFFLINE is set: unset it, or copy the model there"
        if is_unanswered(error):
            return f"the hub cannot be reached for {name}: {reason}"
        if any(isinstance(link, OSError) and link.errno in _FULL for link in links(error)):
            return f"cannot {doing} {name}: {reason}. Free some of {self.cache}, or set HF_HOME to a larger disk"
        return f"cannot {doing} {name}: {reason}"


def prepare(settings: Settings) -> Path:
    """Where the client keeps what it fetches. Its bars and its lines, which quote signed addresses, are turned off."""
    folder = cache(settings)
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # where its variables had been read already
    logging.getLogger("huggingface_hub").handlers.clear()  # ours, at the root, writes its lines already
    for quoting in ("huggingface_hub", "httpx2"):
        logging.getLogger(quoting).setLevel(logging.ERROR)
    return folder


def cache(settings: Settings) -> Path:
    """The same, by the client's constants alone, which take 20 ms."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if settings.hf_home:
        os.environ["HF_HOME"] = str(settings.hf_home)
    if settings.hf_xet_high_performance:
        os.environ["HF_XET_HIGH_PERFORMANCE"] = "1"
    from huggingface_hub import constants

    if settings.hf_home and settings.hf_home.expanduser() != Path(constants.HF_HOME):
        return settings.hf_home.expanduser() / "hub"  # someone in this process used the client before
    return Path(constants.HF_HUB_CACHE)


def client_errors() -> Any:
    """The client's module of errors. It is no attribute of the client before something has imported it."""
    from huggingface_hub import errors

    return errors


def hub_token(settings: Settings) -> str | None:
    """`HF_TOKEN` as it may go into a header: an error of the client would quote any other. Raises `SettingsError`."""
    token = settings.hf_token.get_secret_value().strip() if settings.hf_token else ""
    if token and not re.fullmatch(r"[!-~]+", token):
        raise SettingsError("HF_TOKEN=(hidden) is not allowed: a token is one word of printable ASCII")
    return token or None


def is_unit(settings: Settings) -> bool:
    """True in a unit of systemd, which says where its state folder is."""
    return settings.state_directory is not None


def endpoint() -> str:
    """The hub's address for people: without a user and a password."""
    from huggingface_hub import constants

    return without_secrets(constants.ENDPOINT)


def without_secrets(text: str) -> str:
    """Without the user and password of an address, and without what follows its `?`, which may be a signature."""
    return re.sub(r"(?<=://)[^/@\s]*@", "***@", re.sub(r"\?\S+", "", text))


def _limit_silence(request: Any) -> None:
    limits = request.extensions.get("timeout") or {}
    steps = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {step: limits.get(step) or SILENCE_S for step in steps}


# --- what an error means


def links(error: BaseException) -> list[BaseException]:
    """The error and its causes, the first cause last."""
    return [error, *(links(error.__cause__) if error.__cause__ else [])]


def has(error: BaseException, *types: type[BaseException]) -> bool:
    return any(isinstance(link, types) for link in links(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer, None if none came."""
    answers = [link.response for link in links(error) if isinstance(link, client_errors().HfHubHTTPError)]
    return answers[0].status_code if answers else None


def _asked_pause_s(error: BaseException) -> float:
    """What a hub that has no time asks for (Retry-After), as far as we go along."""
    for link in links(error):
        if isinstance(link, client_errors().HfHubHTTPError):
            asked = link.response.headers.get("Retry-After", "")
            return min(float(asked), _LONGEST_PAUSE_S) if asked.isdigit() else 0.0
    return 0.0


def is_unanswered(error: BaseException) -> bool:
    return may_pass(error) or has(error, client_errors().OfflineModeIsEnabled)


def may_pass(error: BaseException) -> bool:
    import httpx2

    if status := status_of(error):
        return status in _PASSING or status >= 500
    files = [link for link in links(error) if isinstance(link, OSError)]
    if any(link.filename or link.errno in _FULL for link in files):
        return False
    # hf_xet raises RuntimeErrors, and a file that came too short is an OSError.
    passing = has(error, httpx2.TransportError, RuntimeError, OSError)
    return passing and not has(error, client_errors().OfflineModeIsEnabled)


def _stays(error: BaseException) -> bool:
    """A later try ends the same way: the hub says no, or there is no such name, or the cache is no folder of ours."""
    wrong = (client_errors().HFValidationError, FileExistsError, NotADirectoryError, PermissionError)
    return not is_unanswered(error) and (status_of(error) is not None or has(error, *wrong))


def reason_of(error: BaseException, token: str | bool | None = None) -> str:
    """One line of the client's own words, without secrets."""
    last = links(error)[-1]
    text = f"{type(last).__name__}: {last}"
    for link in links(error):
        if isinstance(link, client_errors().HfHubHTTPError):
            text = f"{link.response.status_code} {link.server_message or link.response.reason_phrase}"
    return without_secrets(text).replace(str(token or "\0"), "***").splitlines()[0][:300]


def access_line(error: BaseException, repo: str, label: str, *, known: bool, is_unit: bool = False) -> str | None:
    """What to do about a model that the hub does not give, None if that is not what went wrong. `known` says that
    there is a token."""
    place = "/etc/yap-text/hf-token (HF_TOKEN)" if is_unit else "HF_TOKEN"
    if has(error, client_errors().HFValidationError):
        return f"{label} is neither a folder nor the name of a model on the hub"
    if has(error, client_errors().GatedRepoError):
        page = f"{endpoint()}/{repo}"
        return f"{label} is gated: accept its terms on its page, {page}, and set {place} to a token of that account"
    if status_of(error) == 401 and known:
        return f"HF_TOKEN is not valid: the hub does not know it. Set {place} to another, or to none"
    if status_of(error) == 401 or has(error, client_errors().RepositoryNotFoundError):
        private = "HF_TOKEN may not see it" if known else f"is private and needs {place}"
        return f"{label} is not on the hub, or {private}: check the name"
    return None
