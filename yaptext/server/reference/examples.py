"""Bodies to copy and to compare with."""

from __future__ import annotations

from typing import Any

from yaptext.wire import meanings

CHAT_REQUEST: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather of a place.",
                "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
            },
        }
    ],
    "max_completion_tokens": 200,
    "prompt_cache_key": "user-1",
}
RESPONSES_REQUEST: dict[str, Any] = {
    "model": "persona/savage",
    "instructions": "Answer in one sentence.",
    "input": [{"type": "message", "role": "user", "content": "And tomorrow?"}],
    "stream": True,
    "max_output_tokens": 200,
}
START = {"type": "start", **meanings.EXAMPLES["start"]}
_HEAD = {"id": "chatcmpl-4f1c9a", "created": 1796083560, "model": "chat"}
_CALL = {
    "id": "call_5f0c1e2ab9d4",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"place":"Oslo"}'},
}
_MODEL = {"id": "chat", "object": "model", "created": 1796083560, "owned_by": "yap-text"}

BODIES: dict[str, Any] = {
    "Completion": _HEAD
    | {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, "refusal": None, "tool_calls": [_CALL]},
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 402,
            "completion_tokens": 14,
            "total_tokens": 416,
            "prompt_tokens_details": {"cached_tokens": 384},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    },
    "Chunk": _HEAD
    | {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": "Sunny"}, "logprobs": None, "finish_reason": None}],
    },
    "TextDelta": {
        "type": "response.output_text.delta",
        "sequence_number": 4,
        "item_id": "msg_4f1c9a",
        "output_index": 0,
        "content_index": 0,
        "delta": "Sunny",
        "logprobs": [],
    },
    "OpenAIError": {
        "error": {
            "message": "n is 2; allowed is 1",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_value",
        }
    },
    "ModelList": {"object": "list", "data": [_MODEL]},
    "Model": _MODEL,
    "Ticket": {"ticket": "7Yw0m1", "expires_in_s": 60},
    "HttpError": {
        "error_code": "rate_limited",
        "message": "Too many failed attempts from this address.",
        "detail": "Too many failed attempts from this address.",
    },
    "Starting": {
        "status": "starting",
        "error_code": "going_away",
        "message": "The service is starting.",
        "detail": "The service is starting.",
        "retry_after_ms": 15000,
    },
    "Health": {"status": "ok"},
    "Readiness": {"status": "draining"},
}
"""By the name of the schema."""
