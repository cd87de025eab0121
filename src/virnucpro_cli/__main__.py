"""The program: `virnucpro`, or `python -m virnucpro_cli`."""

import atexit
import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line and exit with its code."""
    atexit.register(_leave)
    try:
        from virnucpro_cli import cli
    except KeyboardInterrupt:  # before the command line has its own handler
        print("stopped by SIGINT; nothing was written.", file=sys.stderr)
        sys.exit(130)
    try:
        cli.main()
    except SystemExit as end:
        _ends_with.append(end.code)
        raise


_ends_with = list[object]()


def _leave() -> None:
    """End at once: Python would take PyTorch apart for half a second.

    What is registered first is called last, so all that others have to do at the end is done, and threads have ended.
    """
    if _ends_with and isinstance(code := _ends_with[0], int):
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
