"""What fields of HTTP bodies mean, if their names do not say it."""

from __future__ import annotations

from typing import Any

MEANINGS = {
    "ChatRequest.messages": "The conversation so far. System messages come first, wherever they stand.",
    "ChatRequest.model": "`chat`, `tool` (the decision alone), a model's own name, or `persona/STYLE`. Absent: `chat`.",
    "ChatRequest.stream": "True sends the reply as events while it is made.",
    "ChatRequest.stream_options": "`include_usage` adds a last event with the usage.",
    "ChatRequest.tools": "Functions that the reply may call, by the rules of `tools` of `/ws`.",
    "ChatRequest.tool_choice": "`none` asks for no decision, `required` for a call, a named function for a call of it.",
    "ChatRequest.parallel_tool_calls": "False leaves out all calls but the first.",
    "ChatRequest.response_format": "The JSON schema that the reply has to fit, under the rules of a tool's schema.",
    "ChatRequest.temperature": "How random the choice of tokens is; 0 takes the likeliest.",
    "ChatRequest.top_p": "Tokens are taken from those that are likeliest, up to this probability.",
    "ChatRequest.top_k": "Tokens are taken from so many that are likeliest, 0 to 1000; 0 is all.",
    "ChatRequest.min_p": "Least probability of a token, as a share of that of the likeliest.",
    "ChatRequest.repetition_penalty": "Over 1 makes tokens that occurred less likely, 0.1 to 2.",
    "ChatRequest.presence_penalty": "Over 0 makes tokens that the reply has less likely.",
    "ChatRequest.frequency_penalty": "As `presence_penalty`, for each time that the token occurred.",
    "ChatRequest.max_tokens": "Most tokens of the reply; over 4096 is 4096. The older name of `max_completion_tokens`.",
    "ChatRequest.max_completion_tokens": "Most tokens of the reply; over 4096 is 4096.",
    "ChatRequest.seed": "The same seed and prompt give the same reply. Not negative.",
    "ChatRequest.stop": "Texts that end the reply, at most 8 of 1 to 64 characters.",
    "ChatRequest.n": "Only 1.",
    "ChatRequest.logprobs": "Only false.",
    "ChatRequest.top_logprobs": "Only 0.",
    "ChatRequest.user": "The session, if neither `metadata` nor `prompt_cache_key` names it.",
    "ChatRequest.prompt_cache_key": "The session, if `metadata` does not name it.",
    "ChatRequest.metadata": "`session_id` in it names the session. The rest is ignored.",
    "Message.role": "`developer` is `system`, `function` is `tool`.",
    "Message.content": "Text, or parts of type `text`.",
    "Message.name": "Ignored.",
    "Message.tool_calls": "Calls that the assistant made.",
    "Message.tool_call_id": "The call that this is the result of.",
    "arguments": "An object as JSON text.",
    "created": "Seconds since 1970.",
    "finish_reason": "`length`: the limit of tokens; `tool_calls`: calls instead of a reply; `stop`: any other end.",
    "cached_tokens": "Those of the prompt that the engine did not compute again.",
    "reasoning_tokens": "Those of the reply that were thinking, which is never sent.",
    "retry_after_ms": "Milliseconds after which a new try may succeed.",
    "expires_in_s": "Seconds.",
    "Status.status": "`running`; `degraded` without the tool model; `engine_silent`; or the phase.",
    "Status.healthy": "False if an engine is dead or does not answer.",
    "Status.silence": "Which engines do not answer.",
    "Status.reload": "The latest reload of keys and personas.",
    "Status.lacking": "Why the tool model is not there.",
    "Status.uptime_s": "Seconds since the service was ready.",
    "Status.connections": "WebSockets and requests that hold a slot.",
    "Status.session_tokens": "Tokens that a session keeps in the KV cache, as a mean; 0 before the first turn.",
    "Status.session_bytes": "Memory of all sessions.",
    "Status.session_bytes_max": "Its limit (MAX_SESSIONS_MB).",
    "Status.session_file_failing": "True if sessions cannot be saved.",
    "Status.engines": "By role: `chat`, `tool`, or `chat+tool` if one engine serves both.",
    "EngineState.quantization": "The kind of weights: float, fp8, awq or gptq.",
    "EngineState.running": "Requests that it works at.",
    "EngineState.kv_tokens": "Tokens that the KV cache holds.",
    "EngineState.kv_use": "Share of the KV cache that requests use.",
    "EngineState.backlog_ms": "Time to compute the prompts that wait.",
    "PromptState.format": "The chat template, or a form of the service's own.",
    "PromptState.exact": "True if the prompt is token by token what the template renders.",
    "PromptState.prefix_stable": "False if later turns find only a part of the prompt cached.",
    "PromptState.thinking": "Whether the model thinks before it replies.",
}
"""By `Schema.field`, or by the field alone."""

BOUNDS: dict[str, dict[str, dict[str, Any]]] = {
    "ChatRequest.n": {"integer": {"enum": [1]}},
    "ChatRequest.logprobs": {"boolean": {"enum": [False]}},
    "ChatRequest.top_logprobs": {"integer": {"maximum": 0}},
    "ChatRequest.top_k": {"integer": {"minimum": 0, "maximum": 1000}},
    "ChatRequest.repetition_penalty": {"number": {"minimum": 0.1, "maximum": 2}},
    "ChatRequest.seed": {"integer": {"minimum": 0, "maximum": 2**63 - 1}},
    "ChatRequest.stop": {
        "string": {"maxLength": 64},
        "array": {"maxItems": 8, "items": {"type": "string", "minLength": 1, "maxLength": 64}},
    },
}
"""Bounds that are checked when a body has been read, by `Schema.field` and type."""

RULES: dict[str, dict[str, Any]] = {
    "ResponseFormat": {
        "if": {"properties": {"type": {"const": "json_schema"}}},
        "then": {"properties": {"json_schema": {"type": "object"}}, "required": ["json_schema"]},
    },
}
"""What holds between the fields of a schema."""
