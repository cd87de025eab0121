"""The command line: parse -> config -> workflow -> exit code, a file for each command or kind of command.

Nothing heavy is imported until a command runs.
"""

import signal
import sys
from typing import Annotated, Any

import typer

from virnucpro_cli import __version__
from virnucpro_cli.cli import bench, embed, extract, files, layouts, look, machine, shards, validate
from virnucpro_cli.cli.process import StopOnce, bug, fail, on_stop_signals, open_closed_streams, say, usage_or_bug
from virnucpro_cli.errors import EXIT_INTERNAL, EXIT_OK, EXIT_SIGNAL_BASE, EXIT_USER_ERROR, Stopped, UserError

app = typer.Typer(
    name="virnucpro",
    help="Protein FASTA to ESM-2 embeddings: packed, resumable, checked.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = (
    (embed.embed, embed.EPILOG),
    (bench.bench, bench.EPILOG),
    (validate.validate, validate.EPILOG),
    (files.inspect, None),
    (files.verify, files.VERIFY_EPILOG),
    (look.search, look.SEARCH_EPILOG),
    (look.map, None),
    (extract.extract, None),
    (layouts.export, layouts.EXPORT_EPILOG),
    (layouts.import_, layouts.IMPORT_EPILOG),
    (shards.status, shards.STATUS_EPILOG),
    (shards.merge, shards.MERGE_EPILOG),
    (machine.doctor, machine.DOCTOR_EPILOG),
    (machine.fetch, None),
)
"""In the order of --help."""

for command, epilog in COMMANDS:
    settings = extract.UNTOUCHED if command is extract.extract else None
    app.command(command.__name__.rstrip("_"), epilog=epilog, context_settings=settings)(command)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        print(f"virnucpro {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit with its code."""
    open_closed_streams()
    stop_once = StopOnce()
    on_stop_signals(stop_once)
    try:
        code = app(args=arguments, standalone_mode=False) or EXIT_OK  # click hands back the code of a typer.Exit
    except UserError as error:
        fail(error)
        code = EXIT_USER_ERROR
    except typer.Abort as error:  # click's word for an EOFError
        bug(error.__cause__ or error)
        code = EXIT_INTERNAL
    except Stopped as stop:
        name = signal.Signals(stop.signum).name
        say(
            f"stopped by {name}; "
            + ("what was computed is kept, and the same command resumes." if stop.resumable else "nothing was written.")
        )
        code = EXIT_SIGNAL_BASE + stop.signum
    except Exception as error:  # the last resort: a bug, logged whole
        code = usage_or_bug(error)
    stop_once.stopped = True  # a signal that comes now finds nothing to stop
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.exit(code)
