"""`yap-text` and `python -m yaptext`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        # It may be a reload of the keys, and waits until it is known whether it is, and until that can be done.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from yaptext.cli import run  # engine processes import this module anew, and need no CLI

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
