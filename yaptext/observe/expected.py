"""Library warnings that need no action. They become lines of level debug: a start logs little else, so that its last
lines show what matters."""

from __future__ import annotations

import logging
import os

LEVEL = "YAPTEXT_LOG_LEVEL"
"""Set in the environment of this process and its engines: the lowest level that is logged."""
EXPECTED = {
    "vllm.config.vllm": (
        # On CPU the service sets this (engine/vllm/arguments.py), on CUDA the operator (ENFORCE_EAGER).
        "Enforce eager set,",
        "TORCH_COMPILE_DISABLE is set,",
        "Inductor compilation was disabled by user settings",
        # The lock of the CPU build has no Triton.
        "Model Runner V2 requires Triton",
    ),
    "vllm.engine.arg_utils": (
        # VLLM_ENABLE_V1_MULTIPROCESSING=0 (engine/vllm/environment.py). The service needs no secret random number.
        "The global random seed is set to",
        # On CPU a prompt is computed whole (engine/vllm/arguments.py).
        "This model does not officially support disabling chunked prefill",
    ),
    "vllm.platforms.cpu": (
        "Triton is not installed.",
        # Meant for models with a state space. vLLM logs it for any model.
        "Reset SSM cache type to float32",
    ),
    "vllm.v1.engine.input_processor": (
        # Prompts are token ids (engine/vllm/request.py). A new vLLM is tested before it is locked.
        "Passing raw prompts to InputProcessor is deprecated",
    ),
    "vllm.v1.utils": (
        # An engine process has 5 s to end (engine/vllm/engine.py); a busy machine needs more. It has nothing to save.
        "[shutdown] Process manager: force killing remaining process",
    ),
    "vllm.v1.worker.cpu_worker": (
        # Faster allocators and threads for a CPU. The start works without them.
        "libtcmalloc is not found in LD_PRELOAD",
        "libiomp is not found in LD_PRELOAD",
    ),
}
"""The beginnings of messages, by logger."""


def lower(record: logging.LogRecord) -> bool:
    """A filter for handlers: gives an expected warning the level debug. False if that is below LOG_LEVEL. A record that
    passes several handlers is seen several times."""
    if record.levelno not in (logging.WARNING, logging.DEBUG) or not _is_expected(record):
        return True
    record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
    return os.environ.get(LEVEL) == "debug"


def _is_expected(record: logging.LogRecord) -> bool:
    beginnings = EXPECTED.get(record.name)
    if beginnings is None:
        return False
    try:
        return record.getMessage().startswith(beginnings)
    except Exception:  # wrong arguments: the handler reports them
        return False
