"""What takes more than an ordinary user's rights. Without them a test is skipped; with them nothing is excused."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NET_ADMIN, SYS_ADMIN = 12, 21
"""Bits of capabilities(7)."""


def require(*capabilities: int) -> None:
    """Skips the test where this process lacks one of them."""
    effective = re.search(r"^CapEff:\s+([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert effective is not None
    if any(not int(effective[1], 16) >> bit & 1 for bit in capabilities):
        pytest.skip("needs capabilities that root has")


@contextmanager
def tmpfs(folder: Path, options: str, *, lazily: bool = True) -> Iterator[Path]:
    """A file system of its own, which at the end is taken away. With `lazily` files may still be open there."""
    require(SYS_ADMIN)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", *(["--lazy"] if lazily else []), folder], check=True)
