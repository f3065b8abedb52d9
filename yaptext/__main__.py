"""`yap-text` and `python -m yaptext`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        # It may be a reload of the keys, and waits until it is known whether it is, and until that can be done.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        from yaptext.commands.main import run  # engine processes import this module, too, and need no CLI
    except KeyboardInterrupt:
        eval("0")  # if it came within an eval, Python would end by the signal, and not with 130
        print("yap-text: stopped by Ctrl-C (SIGINT)", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "yaptext":
            raise
        hint = "The package alone is the client; pip install 'yaptext[serve]' brings what the commands need."
        print(f"yap-text: there is no Python package {error.name}. {hint}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
