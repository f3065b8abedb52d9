"""fault.py: what a later try may mend, by what libraries and the disk raise."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from yaptext.errors import QuantizeDelayed, QuantizeError, QuantizeRefused, SettingsError, YapError
from yaptext.quantize import fault

ROW = Path("/state/awq/row")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), QuantizeDelayed),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), QuantizeDelayed),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), QuantizeDelayed),
        (SafetensorError("I/O error: Input/output error (os error 5)"), QuantizeDelayed),
        (OSError(errno.EROFS, "Read-only file system"), QuantizeDelayed),
        (caused(RuntimeError("no write"), OSError(errno.EIO, "Input/output error")), QuantizeDelayed),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/model/x"), SettingsError),
        (PermissionError(errno.EACCES, "Permission denied", "/model/x"), SettingsError),
        (FileExistsError(errno.EEXIST, "File exists", "/state"), SettingsError),
        (SafetensorError("Error while deserializing header: header too large"), QuantizeRefused),
        (ValueError("Unrecognized configuration"), QuantizeRefused),
        (OSError("/model does not appear to have a file named tokenizer.json"), QuantizeRefused),
        (RuntimeError("You set `ignore_mismatched_sizes` to `False`, thus raising an error."), QuantizeRefused),
        (MemoryError(), QuantizeRefused),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), QuantizeRefused),
        (torch.OutOfMemoryError("CUDA out of memory."), QuantizeRefused),
        (RuntimeError("CUDA error: unspecified launch failure"), QuantizeDelayed),
        (RuntimeError("No CUDA GPUs are available"), QuantizeDelayed),
        (torch.AcceleratorError("an illegal memory access", 700), QuantizeDelayed),
        (LookupError("lost"), QuantizeError),
        (RuntimeError("boom"), QuantizeError),
    ],
    ids=lambda given: str(given)[:40] if isinstance(given, Exception) else "",
)
def test_an_error_gets_the_name_of_what_helps(error: Exception, kind: type[YapError]) -> None:
    """One line with the model or the disk, whatever it was."""
    named = fault.named(error, "Tiny", ROW)
    assert type(named) is kind
    assert "Tiny" in str(named) and "\n" not in str(named)


@pytest.mark.parametrize(("taken_mb", "kind"), [(40_000, QuantizeDelayed), (900, QuantizeRefused)])
def test_a_card_that_others_use_may_be_free_later(
    monkeypatch: pytest.MonkeyPatch, taken_mb: int, kind: type[YapError]
) -> None:
    """What the driver itself takes is not another's."""
    size, ours = 80_000 * 10**6, 30_000 * 10**6
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (size - ours - taken_mb * 10**6, size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: ours)
    named = fault.named(torch.OutOfMemoryError("CUDA out of memory."), "Tiny", ROW)
    assert type(named) is kind
    assert ("other processes hold 38926 of the card's 80000 MB" in str(named)) == (kind is QuantizeDelayed)
