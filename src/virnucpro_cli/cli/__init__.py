"""The command line: parse -> config -> workflow -> exit code, a file for each command or kind of command.

Nothing heavy is imported until a command runs.
"""

import errno
import keyword
import os
import re
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer

import virnucpro_cli
from virnucpro_cli import stopping
from virnucpro_cli.cli.options import InPanels
from virnucpro_cli.cli.process import bug, fail, open_streams, say, usage_or_bug
from virnucpro_cli.errors import EXIT_INTERNAL, EXIT_OK, EXIT_SIGNAL_BASE, EXIT_USER_ERROR, UserError

COMMANDS = {
    "embed": "embed", "bench": "bench", "validate": "validate", "inspect": "files", "verify": "files", "search": "look",
    "map": "look", "extract": "extract", "export": "layouts", "import": "layouts", "status": "shards", "merge": "shards",
    "doctor": "machine", "fetch": "machine",
}  # fmt: skip
"""Each command and the module of this package that has its function, in the order of --help."""


def program(*names: str) -> typer.Typer:
    """The command line with these commands. Only their modules are imported."""
    app = typer.Typer(
        name="virnucpro",
        help="Protein FASTA to ESM-2 embeddings: packed, resumable, checked.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
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
    open_streams()
    stopper = stopping.install()
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
        code = _stopped(stopper.signum, stopping.stop_in(raised))
    elif raised is not None:
        code = _told(raised)
    with suppress(UserError):
        sys.stdout.flush()
    sys.exit(code)


def _check_current_folder() -> None:
    """Raise UserError if it is gone, without which no relative name means anything, and some libraries end the process."""
    try:
        os.getcwd()
    except OSError:
        raise UserError(
            "The current folder is not there any more.", "cd to one that is, and run the command again."
        ) from None


def _called(arguments: list[str]) -> int:
    """The exit code of a command. Raises UserError for an option that an earlier version had."""
    try:
        app = program(*(arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS))
        return app(args=arguments, standalone_mode=False) or EXIT_OK  # click hands back the code of a typer.Exit
    except Exception as error:
        from virnucpro_cli.config.options import refuse_removed

        refuse_removed(getattr(error, "option_name", None) or "")
        raise


def _stopped(signum: int, stop: BaseException | None) -> int:
    """Say what became of a command that a signal stopped, and return its exit code."""
    kept = "what was computed is kept, and the same command resumes."
    left = kept if getattr(stop, "resumable", False) else "nothing was written."
    if stop is None:  # it was seen when all was done
        left = "it came too late to stop anything; the same command says what is there."
    say(f"stopped by {signal.Signals(signum).name}; {left}")
    return EXIT_SIGNAL_BASE + signum


def _told(error: BaseException) -> int:
    """Say what went wrong, and return the exit code."""
    if isinstance(error, UserError):
        fail(error)
        return EXIT_USER_ERROR
    if isinstance(error, typer.Abort):  # click's word for an EOFError
        bug(error.__cause__ or error)
        return EXIT_INTERNAL
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        fail(UserError(f"No file can have the name {error.filename!r}: it is too long.", "Give a shorter one."))
        return EXIT_USER_ERROR
    if not isinstance(error, Exception):  # SystemExit of a library
        raise error
    return usage_or_bug(error)  # the last resort: a bug, logged whole
