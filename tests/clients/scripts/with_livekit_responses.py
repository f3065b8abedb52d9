"""LiveKit Agents with its plugin's Responses model over HTTP."""

from __future__ import annotations

from typing import Any

import told
import with_livekit
from livekit.plugins import openai
from told import BASE_URL, KEY


def model(**options: Any) -> openai.responses.LLM:
    options.pop("max_completion_tokens", None)  # a reply that comes to a limit of its user is a failure to the plugin
    return openai.responses.LLM(model="chat", use_websocket=False, base_url=BASE_URL, api_key=KEY, **options)


with_livekit.model = model
told.run(vars(with_livekit))
