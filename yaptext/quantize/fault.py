"""What an exception of autoawq, torch, transformers or the disk means: whether a later try may do."""

from __future__ import annotations

import errno
from pathlib import Path

from yaptext.errors import QuantizeDelayed, QuantizeError, QuantizeRefused, SettingsError, YapError

_LASTING = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_CARD = ("CUDA error", "CUDA driver", "No CUDA GPUs", "NVIDIA driver", "CUDNN_STATUS", "CUBLAS_STATUS")
_SIZES = ("ignore_mismatched_sizes", "size mismatch")
"""How transformers and torch name weights that do not fit their config."""
_LONGEST = 300
_CONTEXT_BYTES = 2**30
"""Most that the driver and this process's kernels take of a card besides tensors."""


def named(error: Exception, model: str, row: Path) -> YapError:
    """The error with a name for what ended the work on `model`: `QuantizeDelayed` if a later try may do,
    `QuantizeRefused` if the model itself is the reason, `SettingsError` for a path that must be corrected, and
    `QuantizeError` for a crash. `row` is where the result was to go."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = f"{model} could not be quantized: {(lines[0] if lines else type(error).__name__)[:_LONGEST]}"
    if is_full(error):
        return QuantizeDelayed(f"the disk of {row} is full; nothing was kept of {model}")
    if (of_disk := _of_disk(error)) is not None:
        return kind_of_disk(of_disk)(line)
    if _is_memory(error):
        taken, size = _taken_by_others()
        if taken > 0:
            others = f"other processes hold {taken // 10**6} of the card's {size // 10**6} MB"
            return QuantizeDelayed(f"{model} did not fit into memory: {others}")
        return QuantizeRefused(f"{model} does not fit into memory: {line.partition(': ')[2]}")
    if type(error).__name__ == "AcceleratorError" or any(words in str(error) for words in _CARD):
        return QuantizeDelayed(line)
    if any(words in str(error) for words in _SIZES):
        return QuantizeRefused(
            f"{model} could not be quantized: its weights have other sizes than its config.json says"
        )
    # Weights that are no weights, a config or tokenizer that does not fit: transformers has OSErrors without a number.
    if isinstance(error, OSError | ValueError) or type(error).__name__.endswith(("SafetensorError", "ValidationError")):
        return QuantizeRefused(line)
    return QuantizeError(line)


def kind_of_disk(error: OSError) -> type[YapError]:
    """`SettingsError` if something must be corrected, such as rights or a file in the way; else `QuantizeDelayed`."""
    return SettingsError if isinstance(error, _LASTING) else QuantizeDelayed


def is_full(error: BaseException | None) -> bool:
    """Python's OSError, or the message with which safetensors reports one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "os error 28" in str(error) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _of_disk(error: BaseException | None) -> OSError | None:
    """The system's error that this one is, or was raised from; safetensors writes its number into the message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if "(os error " in str(error):
            return OSError(errno.EIO, str(error))
        error = error.__cause__
    return None


def _is_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a card
        or "DefaultCPUAllocator" in str(error)
    )


def _taken_by_others() -> tuple[int, int]:
    """Bytes of the card that other processes hold, and its size; 0 and 0 if no card is in use."""
    import torch

    if not torch.cuda.is_initialized():
        return 0, 0
    free, size = torch.cuda.mem_get_info()
    return max(0, size - free - torch.cuda.memory_reserved() - _CONTEXT_BYTES), size
