"""The program: `virnucpro`, or `python -m virnucpro_cli`."""

import atexit
import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line and exit with its code."""
    ends_with = list[object]()
    atexit.register(_leave, ends_with)
    try:
        from virnucpro_cli import cli
    except KeyboardInterrupt:  # before the command line has its own handler
        print("stopped by SIGINT; nothing was written.", file=sys.stderr)
        sys.exit(130)
    try:
        cli.main()
    except SystemExit as end:
        ends_with.append(end.code)
        raise


def _leave(ends_with: list[object]) -> None:
    """End at once with the code, if there is one: Python would take PyTorch apart for half a second.

    What is registered first is called last, so all that others have to do at the end is done, and threads have ended.
    """
    if ends_with and isinstance(code := ends_with[0], int):
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
