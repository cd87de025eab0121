"""The program: `virnucpro`, or `python -m virnucpro_cli`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from virnucpro_cli import cli
    except KeyboardInterrupt:  # before the command line has its own handler
        print("stopped by SIGINT; nothing was written.", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
