"""`yap-text` and `python -m yaptext`."""

from __future__ import annotations

import sys


def main() -> None:
    from yaptext.cli import run  # engine processes import this module anew, and need no CLI

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
