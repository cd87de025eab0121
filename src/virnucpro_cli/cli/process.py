"""A command as a process: its signals, its standard streams, and how an error is told."""

import io
import os
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from typing import Any

import virnucpro_cli
from virnucpro_cli import stopping
from virnucpro_cli.errors import EXIT_INTERNAL, EXIT_USER_ERROR, UserError, printable, shortened


def end_at_once() -> None:
    """Signals kill a command that has nothing to put in order: HDF5 can be lost in a damaged file, where no handler gets its turn."""
    stopping.on_stop_signals(signal.SIG_DFL)


def say(*lines: str) -> None:
    with suppress(OSError):  # nobody may be listening any more
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)


def fail(error: UserError) -> None:
    say(f"error: {error.what}", *([error.remedy] if error.remedy else []))


def bug(error: BaseException) -> None:
    what = f"internal error, a bug in virnucpro: {type(error).__name__}: {shortened(str(error))}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="virnucpro-", suffix=".log", delete=False) as log:
            log.write(f"virnucpro {virnucpro_cli.__version__}: {sys.argv}\n")
            traceback.print_exception(error, file=log)
        say(what, f"The traceback is in {log.name}; please report it.")
    except OSError:  # no temporary folder
        say(what, "".join(traceback.format_exception(error)), "Please report it.")


class _StandardOutput(io.RawIOBase):
    """Standard output whose reader, `head` for one, may go: the rest is dropped. Another failure is a UserError, once."""

    def __init__(self) -> None:
        self._gone = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def isatty(self) -> bool:
        return os.isatty(1)

    def write(self, data: Any) -> int:
        if not self._gone:
            try:
                return os.write(1, data)
            except BrokenPipeError:
                self._gone = True
            except OSError as error:
                self._gone = True
                raise UserError(
                    f"Standard output cannot be written: {error.strerror}.", "Make room, or send it elsewhere."
                ) from None
        return memoryview(data).nbytes


def open_streams() -> None:
    """Make all standard streams such that a command can use them.

    A closed one would give its number to the next file opened, and libraries would write into that. Letters that the encoding of
    standard output lacks are escaped.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_StandardOutput()), encoding, "backslashreplace", line_buffering=True
        )


def usage_or_bug(error: Exception) -> int:
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
        error.show()
        return EXIT_USER_ERROR
    bug(error)
    return EXIT_INTERNAL
