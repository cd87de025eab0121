"""Commands for the shards of an output: status, merge."""

from typing import Annotated

import typer

from virnucpro_cli.cli.options import Overwrite, ReportFile
from virnucpro_cli.errors import EXIT_GATE_FAILED, EXIT_SOME_SKIPPED

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
