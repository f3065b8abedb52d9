"""What safetensors files say of themselves (names, types, shapes of their tensors), read without a weight."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_BYTES = 100_000_000
"""Of a header, by the format. A header is read only if its file is longer than it says."""
_POINTER = b"version https://git-lfs.github.com/spec/"


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class BrokenFile(ValueError):
    """The file is not what its name says. The message is the end of a sentence that begins with the file."""


class LfsPointer(BrokenFile):
    """It names the file that Git LFS would put here."""

    def __init__(self) -> None:
        super().__init__("is a Git LFS pointer, not the file itself")


def is_pointer(file: Path) -> bool:
    """Raises `OSError`."""
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name. Raises `BrokenFile` and `OSError`."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BrokenFile("is no regular file")
        begin = opened.read(len(_POINTER))
        if begin == _POINTER:
            raise LfsPointer
        length = int.from_bytes(begin[:8], "little")
        if len(begin) < 8 or begin[8:9] != b"{" or length > _MOST_BYTES:
            raise BrokenFile("is empty" if not status.st_size else "is no safetensors file")
        if 8 + length > status.st_size:
            raise BrokenFile(f"is cut off after {status.st_size} bytes")
        opened.seek(8)
        header = opened.read(length)
    try:
        told = json.loads(header)
        told.pop("__metadata__", None)
        found = {name: Tensor(str(one["dtype"]), tuple(map(int, one["shape"]))) for name, one in told.items()}
        size = 8 + length + max((int(one["data_offsets"][1]) for one in told.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise BrokenFile("is no safetensors file") from None
    if size > status.st_size:
        raise BrokenFile(f"is cut off after {status.st_size} of {size} bytes")
    if size < status.st_size:
        raise BrokenFile(f"has {status.st_size} bytes, of which its header knows {size}")
    return found


def index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, by an index; None if there is none. Raises `BrokenFile` and `OSError`."""
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in files.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise (LfsPointer() if is_pointer(folder / INDEX) else BrokenFile("is no index of weights")) from None


def places(folder: Path) -> dict[str, Path]:
    """Each tensor of a checkpoint with the file that holds it: by the index, which need not be right, else by the
    headers. Empty if there are no such files. Raises `BrokenFile` and `OSError`."""
    if (named := index(folder)) is not None:
        return {name: folder / file for name, file in named.items()}
    whole = folder / WHOLE
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    return {name: file for file in files for name in tensors(file)}
