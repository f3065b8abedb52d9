"""The ELF programs below a folder: `LOADER<tab>PATH`, a line each.

LOADER is what the program asks the kernel for (PT_INTERP): in a wheel /lib64/ld-linux-x86-64.so.2, which NixOS lacks.
"""

import os
import struct
import sys
from collections.abc import Iterator

HEADER = struct.Struct("<4sBB26xQ14xHH6x")  # magic, 64-bit, little-endian, e_phoff, e_phentsize, e_phnum
SEGMENT = struct.Struct("<I4xQ16xQ16x")  # p_type, p_offset, p_filesz
PT_INTERP = 3


def loader(path: str) -> str | None:
    """Nothing if the file is no program or starts without a loader."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(b"\x7fELF\x02\x01"):
            return None
        *_, offset, size, count = HEADER.unpack(header)
        file.seek(offset)
        table = file.read(size * count)
        for index in range(count):
            kind, start, length = SEGMENT.unpack_from(table, index * size)
            if kind == PT_INTERP:
                file.seek(start)
                return file.read(length).rstrip(b"\0").decode()
    return None


def programs(root: str) -> Iterator[tuple[str, str]]:
    for folder, _, files in os.walk(root):
        for name in files:
            path = os.path.join(folder, name)
            if not os.path.islink(path) and (asked := loader(path)):
                yield asked, path


if __name__ == "__main__":
    for asked, path in programs(sys.argv[1]):
        print(asked, path, sep="\t")
