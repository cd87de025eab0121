"""The command line: parse -> config -> workflow -> exit code, a file for each command or kind of command.

Nothing heavy is imported until a command runs. Signals, standard streams and errors of the process are here, too.
"""

import errno
import io
import keyword
import os
import re
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer

import virnucpro_cli
from virnucpro_cli import stopping
from virnucpro_cli.cli.options import InPanels
from virnucpro_cli.config.options import refuse_removed
from virnucpro_cli.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_SIGNAL_BASE,
    EXIT_USER_ERROR,
    MORE_FILES,
    MORE_MEMORY,
    MORE_PROCESSES,
    UserError,
    printable,
    shortened,
)  # fmt: skip

COMMANDS = {
    "embed": "embed", "predict": "predict", "bench": "bench", "validate": "validate", "inspect": "look",
    "verify": "validate", "search": "look", "map": "look", "extract": "extract", "export": "layouts",
    "import": "layouts",
    "index": "shards", "status": "shards", "merge": "shards", "doctor": "machine", "models": "machine",
    "fetch": "machine",
}  # fmt: skip
"""Each command and the module of this package that has its function, in the order of --help."""
NO_MEMORY = (os.strerror(errno.ENOMEM), "failed to map segment")
"""Words of the system, and of the loader of libraries, for a lack of memory."""


def program(*names: str) -> typer.Typer:
    """The command line with these commands. Only their modules are imported."""
    app = typer.Typer(
        name="virnucpro", help="Protein FASTA to language-model embeddings: packed, resumable, checked.",
        no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback(invoke_without_command=True)(_version)
    for name in names:
        module = import_module(f"virnucpro_cli.cli.{COMMANDS[name]}")
        command = getattr(module, f"{name}_" if keyword.iskeyword(name) else name)
        app.command(
            name, cls=InPanels, epilog=getattr(module, f"{name.upper()}_EPILOG", None),
            context_settings=getattr(module, f"{name.upper()}_SETTINGS", None),
            short_help=str(command.__doc__).partition("\n")[0],  # typer would cut it short
        )(command)  # fmt: skip
    return app


def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        print(f"virnucpro {virnucpro_cli.__version__}")
        raise typer.Exit


def at_home(argument: str) -> str:
    """An argument with its ~ expanded where no shell does so: after `--option=`, or in quotes."""
    option, home = re.match(r"(--[a-z-]+=|-o)?(~(?:/.*)?\Z)?", argument, re.S).groups()  # type: ignore[union-attr]
    return (option or "") + os.path.expanduser(home) if home else argument


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit with its code."""
    _open_streams()
    try:
        stopper = stopping.install()
    except (OSError, RuntimeError) as error:
        sys.exit(_failed(error))
    code, raised = EXIT_OK, None
    try:
        try:
            _check_current_folder()
            code = _called([at_home(each) for each in (sys.argv[1:] if arguments is None else arguments)])
            sys.stdout.flush()
        finally:
            stopper.end()
    except BaseException as error:
        stopper.end()
        raised = error
    if stopper.signum is not None:  # whatever else was raised came of it
        code = _stopped(stopper.signum, stopping.stop_in(raised), stopper.wrote)
    elif raised is not None:
        code = _failed(raised)
    with suppress(UserError):
        sys.stdout.flush()
    if code != EXIT_OK:
        end_at_once()  # all is said, and threads of libraries that never end are not waited for
    sys.exit(code)


def _check_current_folder() -> None:
    """Raise UserError if it is gone: no relative name means anything then, and some libraries end the process."""
    try:
        os.getcwd()
    except OSError:
        remedy = "cd to one that is, and run the command again."
        raise UserError("The current folder is not there any more.", remedy) from None


def _called(arguments: list[str]) -> int:
    """The exit code of a command. Raises UserError for an option that an earlier version had."""
    try:
        app = program(*(arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS))
        return app(args=arguments, standalone_mode=False) or EXIT_OK  # click hands back the code of a typer.Exit
    except Exception as error:
        refuse_removed(getattr(error, "option_name", None) or "")
        raise


def _stopped(signum: int, stop: BaseException | None, wrote: bool) -> int:
    """Say what became of a command that a signal stopped, and return its exit code."""
    left = "what was written by then is there." if wrote else "nothing was written."
    if getattr(stop, "resumable", False):
        left = "what was computed is kept, and the same command resumes."
    if stop is None:  # it was seen when all was done
        left = "it came too late to stop anything; the same command says what is there."
    say(f"stopped by {signal.Signals(signum).name}; {left}")
    return EXIT_SIGNAL_BASE + signum


def _failed(error: BaseException) -> int:
    """Say what went wrong, and return the exit code."""
    if not isinstance(error, UserError):
        error = _of_the_system(error) or error
    if isinstance(error, UserError):
        say(f"error: {error.what}", *([error.remedy] if error.remedy else []))
        return EXIT_USER_ERROR
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
        error.show()
        return EXIT_USER_ERROR
    if not isinstance(error, Exception):  # SystemExit of a library
        raise error
    _report_bug(error.__cause__ or error if isinstance(error, typer.Abort) else error)  # click's word for an EOFError
    return EXIT_INTERNAL


def _of_the_system(error: BaseException) -> UserError | None:
    """The words for an error by which the system refuses what any command may ask of it; None for others."""
    match getattr(error, "errno", None):
        case errno.ENAMETOOLONG:
            name = error.filename  # type: ignore[attr-defined]
            return UserError(f"No file can have the name {name!r}: it is too long.", "Give a shorter one.")
        case errno.EMFILE | errno.ENFILE:
            name = error.filename  # type: ignore[attr-defined]
            return UserError(f"Too many files are open{f' for {name}' if name else ''}.", MORE_FILES)
        case errno.EAGAIN:  # of a fork
            return UserError("The system lets no more processes begin.", MORE_PROCESSES)
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return UserError("The system gives this process no more memory.", MORE_MEMORY)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return UserError("The system lets no more threads begin.", MORE_PROCESSES)
    return None


def _report_bug(error: BaseException) -> None:
    what = f"internal error, a bug in virnucpro: {type(error).__name__}: {shortened(str(error))}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="virnucpro-", suffix=".log", delete=False) as log:
            log.write(f"virnucpro {virnucpro_cli.__version__}: {sys.argv}\n")
            traceback.print_exception(error, file=log)
        say(what, f"The traceback is in {log.name}; please report it.")
    except OSError:  # no temporary folder
        say(what, "".join(traceback.format_exception(error)), "Please report it.")


def say(*lines: str) -> None:
    with suppress(OSError):  # nobody may be listening any more
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)


def end_at_once() -> None:
    """Let signals kill a command that has nothing to put in order.

    HDF5 can be lost in a damaged file, where no handler gets its turn.
    """
    stopping.on_stop_signals(signal.SIG_DFL)


class _StandardOutput(io.RawIOBase):
    """Standard output. The rest is dropped once its reader, say `head`, is gone. Other failures: a UserError, once."""

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
                refusal = f"Standard output cannot be written: {error.strerror}."
                raise UserError(refusal, "Make room, or send it elsewhere.") from None
        return memoryview(data).nbytes


def _open_streams() -> None:
    """Make all standard streams such that a command can use them.

    A closed one would give its number to the next file opened, and libraries would write into that.
    Letters that the encoding of standard output lacks are escaped.
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
        buffer = io.BufferedWriter(_StandardOutput())
        sys.stdout = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
