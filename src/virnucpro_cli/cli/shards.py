"""Commands for the shards of an output: index, status, merge."""

from typing import Annotated

import typer

from virnucpro_cli.cli.options import Gaps, Kind, Model, Output, Overwrite, ReportFile
from virnucpro_cli.errors import EXIT_GATE_FAILED, EXIT_SOME_SKIPPED

INDEX_EPILOG = "Exit codes: 0 done; 2 something to put right (the message says what); 70 a bug."


def index(
    inputs: Annotated[list[str], typer.Argument(metavar="FASTA...", help="What embed will be given.")],
    output: Output,
    model: Model = None,
    kind: Kind = None,
    gaps: Gaps = None,
) -> None:
    """Make the index of large inputs, OUT.h5.index, before the shards of OUT.h5 begin.

    The first run makes it by itself, and others wait for it. Where the file system has no locks, each would make its
    own. Give --model, --kind and --gaps as embed will have them. A finished run and a merge remove the index.
    """
    from virnucpro_cli import report
    from virnucpro_cli.config import EmbedConfig, resolve
    from virnucpro_cli.embed.recipe import index_input

    given = {"inputs": tuple(inputs), "output": output, "model": model, "kind": kind, "gaps": gaps}
    index_input(resolve(EmbedConfig, None, given), report.console())


STATUS_EPILOG = "Exit codes: 0 all shards, or the output itself, are complete; 1 something is not; 2 there are none."


def status(output: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed was given as -o.")]) -> None:
    """Show which shards of an output are complete, partial or missing."""
    from virnucpro_cli.cluster.status import show_shards

    if not show_shards(output):
        raise typer.Exit(EXIT_GATE_FAILED)


MERGE_EPILOG = (
    "Exit codes: 0 done; 2 something to put right (the message says what); 3 done, but some records were skipped by "
    "their shards; 70 a bug; 128+signal after an orderly stop."
)


def merge(
    output: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed was given as -o.")],
    of: Annotated[
        int | None, typer.Option("--of", metavar="N", help="How many shards, if there are sets of several numbers.")
    ] = None,
    overwrite: Overwrite = False,
    report: ReportFile = None,
) -> None:
    """Make one file, in the order of the FASTA, of all shards of an output.

    They must all be complete, and parts of one run.
    """
    from virnucpro_cli.cluster.merge import merge_shards

    merged = merge_shards(output, of, overwrite, report)
    if merged.counts.get("skipped") and not merged.already_complete:
        raise typer.Exit(EXIT_SOME_SKIPPED)
