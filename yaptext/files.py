"""Files that a setting names, read so that none of them can hang or fill the process."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_file(path: Path, most_bytes: int) -> bytes:
    """The content of a file that a setting names. Raises `OSError`, also for a FIFO, which would never open, for a
    device, which would never end, and for more than `most_bytes`."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it is over {most_bytes} bytes, the limit", str(path))
    return content
