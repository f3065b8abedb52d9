"""A hub that does not answer: the client is set offline, so that models are read from the cache."""

from __future__ import annotations

import os

import structlog

from yaptext.engine import awq_results, hub_client
from yaptext.settings import Settings

_log = structlog.get_logger(__name__)
HUB_TIMEOUT_S = 5
"""How long the hub may take to answer."""
_left: list[str] = []
"""Why this process left the hub. Without a reason, HF_HUB_OFFLINE is the user's own."""


def leave_hub_if_down(settings: Settings) -> None:
    """Where a hub model is wanted and the hub does not answer, this process and its engines take what is in the cache.
    Else the client would ask again for 23 s a file, and longer where the connection hangs."""
    named = (settings.awq_chat_model or settings.chat_model, settings.awq_tool_model or settings.tool_model)
    ids = [source for source in named if source and not awq_results.is_folder(source) and source[0] not in "./~"]
    if not ids:
        return
    from huggingface_hub import constants, get_session

    _left.clear()
    if constants.HF_HUB_OFFLINE:
        return
    try:
        status = get_session().get(f"{constants.ENDPOINT}/api/models/{ids[0]}", timeout=HUB_TIMEOUT_S).status_code
        if status < 500:
            return
        failure = f"status {status}"
    except Exception as error:  # the client raises dozens of types
        failure = type(error).__name__
    _log.warning("hub.down", hub=hub_client.endpoint(), failure=failure, hint="models are read from the cache")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    _left.append(failure)


def why_away() -> str:
    """Why the hub is not asked, and what to do."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _left:
        return "HF_HUB_OFFLINE is set. Unset it, or copy the model into the cache"
    return f"the hub {hub_client.endpoint()} does not answer. Check the network"
