"""Pipecat: `OpenAIResponsesHttpLLMService` in the same pipeline."""

from __future__ import annotations

from functools import partial
from typing import Any

import told
import with_pipecat
from pipecat.services.openai.responses.llm import OpenAIResponsesHttpLLMService
from told import BASE_URL, INSTRUCTIONS, KEY


def service(**settings: Any) -> OpenAIResponsesHttpLLMService:
    settings.pop("max_completion_tokens", None)  # the service reports a reply that comes to this limit as an error
    found = OpenAIResponsesHttpLLMService.Settings(model="chat", system_instruction=INSTRUCTIONS, **settings)
    return OpenAIResponsesHttpLLMService(base_url=BASE_URL, api_key=KEY, settings=found)


async def tool() -> None:
    """The service does not send the context's `tool_choice`."""
    with_pipecat.service = partial(service, extra={"tool_choice": "required"})
    await with_pipecat.tool()


with_pipecat.service = service
told.run(vars(with_pipecat) | {"tool": tool})
