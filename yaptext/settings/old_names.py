"""Names and values of earlier versions, and their names today."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import NamedTuple

RENAMED = {
    "HUGGING_FACE_HUB_TOKEN": "HF_TOKEN",
    "HUGGINGFACE_HUB_TOKEN": "HF_TOKEN",
    "HUGGINGFACE_TOKEN": "HF_TOKEN",
    "HF_HUB_ENABLE_HF_TRANSFER": "HF_XET_HIGH_PERFORMANCE",
    "GEN_TIMEOUT_S": "CHAT_TIMEOUT_S",
    "FORWARDED_ALLOW_IPS": "TRUSTED_PROXIES",
    "CHAT_MAX_LEN": "CHAT_MAX_MODEL_LEN",
    "TOOL_MAX_LEN": "TOOL_MAX_MODEL_LEN",
    "MAX_NUM_BATCHED_TOKENS_CHAT": "CHAT_MAX_NUM_BATCHED_TOKENS",
    "MAX_NUM_BATCHED_TOKENS_TOOL": "TOOL_MAX_NUM_BATCHED_TOKENS",
    "AWQ_NSAMPLES": "AWQ_CALIBRATION_SAMPLES",
    "AWQ_SEQLEN": "AWQ_CALIBRATION_TOKENS",
    "AWQ_CALIB_DATASET": "AWQ_CALIBRATION",
    "AWQ_CACHE_DIR": "YAP_TEXT_STATE_DIR",
    "CHAT_MAX_TOKENS": "CHAT_MAX_OUT",
    "TOOL_MAX_TOKENS": "TOOL_MAX_OUT",
}
_QUANTIZATIONS = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "compressed-tensors": "auto",
    "compressed_tensors": "auto",
    "float": "none",
    "bf16": "none",
    "bfloat16": "none",
}
"""Words of vLLM and others, and what they mean here: the checkpoint's own config says how it is quantized."""


class Moved(NamedTuple):
    """`values` of old names, by today's variable name, and one of the `notes` for each."""

    values: dict[str, str]
    notes: list[str]


def moved_names(environ: Mapping[str, str] | None = None) -> Moved:
    """Maps old variables and values to today's (`environ` defaults to the process's own)."""
    environ = os.environ if environ is None else environ
    values: dict[str, str] = {}
    notes: list[str] = []

    def rename(old: str, new: str) -> None:
        if environ.get(old) and not environ.get(new) and new not in values:
            values[new] = "0" if new == "CHAT_TIMEOUT_S" and environ[old].startswith("-") else environ[old]
            notes.append(f"{old} is now {new}")

    for old, new in RENAMED.items():
        rename(old, new)
    backend = environ.get("VLLM_ATTENTION_BACKEND", "").upper()
    if backend == "XFORMERS":
        values["VLLM_ATTENTION_BACKEND"] = "FLASH_ATTN"
        notes.append("VLLM_ATTENTION_BACKEND=XFORMERS no longer exists in vLLM: FLASH_ATTN is used")
    elif backend:
        values["VLLM_ATTENTION_BACKEND"] = "auto" if backend == "AUTO" else backend
        if backend != "AUTO":
            notes.append("VLLM_ATTENTION_BACKEND is now an argument of the engine: it is passed on as one")
    for name in ("QUANTIZATION", "CHAT_QUANTIZATION", "TOOL_QUANTIZATION"):
        value = environ.get(name, "").lower()
        if value in _QUANTIZATIONS:
            values[name] = _QUANTIZATIONS[value]
            notes.append(f"{name}={environ[name]} means {_QUANTIZATIONS[value]} here")
    tool_timeout = environ.get("TOOL_TIMEOUT_S", "")
    if tool_timeout and not environ.get("TOOL_HARD_TIMEOUT_MS"):
        seconds = _number(tool_timeout)
        if seconds is not None:
            if math.isfinite(seconds * 1000):
                tool_timeout = str(round(seconds * 1000) if seconds > 0 else 86_400_000)
            values["TOOL_HARD_TIMEOUT_MS"] = tool_timeout
            notes.append("TOOL_TIMEOUT_S is now TOOL_HARD_TIMEOUT_MS, in milliseconds")
    if environ.get("KV_DTYPE", "").lower() == "int8":
        values["KV_DTYPE"] = "int8_per_token_head"
        notes.append("KV_DTYPE=int8 is now int8_per_token_head")
    return Moved(values, notes)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
