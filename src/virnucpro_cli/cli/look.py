"""Commands that look at a file: inspect, map, search."""

from typing import Annotated

import typer

from virnucpro_cli.cli import end_at_once, options
from virnucpro_cli.cli.options import QcFile
from virnucpro_cli.errors import EXIT_SOME_SKIPPED, UserError
from virnucpro_cli.explore import MapConfig, SearchConfig

SEARCH_EPILOG = (
    "Exit codes: 0 done; 2 something to put right (the message says what); 3 done, but some queries were skipped, and "
    "have no hits; 70 a bug."
)


def inspect(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed wrote, or is writing (OUT.h5.partial).")],
    qc: QcFile = None,
    multiqc: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write numbers and bar charts of this sample for MultiQC.")
    ] = None,
    ro_crate: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write ro-crate-metadata.json for the folder that holds the file."),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(metavar="WHO", help="Who made the file, for --ro-crate: a name, or an ORCID's URL."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of others with these names.")] = False,
) -> None:
    """Show what is in an embeddings file and how complete it is, with a sentence for your Methods."""
    from virnucpro_cli.explore.inspect import inspect_file

    if agent is not None and ro_crate is None:
        raise UserError("--agent is for a crate.", "Add --ro-crate DIR, or leave it out.")
    for flag, folder in (("--multiqc", multiqc), ("--ro-crate", ro_crate)):
        if folder == "":
            raise UserError(f"{flag} is empty.", "Name a folder: . is this one.")
    if not (qc or multiqc or ro_crate):
        end_at_once()
    inspect_file(file, qc, multiqc, ro_crate, agent, overwrite)


@options.of(MapConfig)
def map(settings: MapConfig) -> None:
    """Draw where the proteins of a file lie: its rows on a plane (extra maps).

    Nothing else is needed: virnucpro map embeddings.h5 -o map.html.
    """
    from virnucpro_cli.explore.mapping import write_map

    write_map(settings)


@options.of(SearchConfig)
def search(settings: SearchConfig) -> None:
    """Find the nearest proteins of a file by the cosine of their rows, minus the mean of all.

    It is exact, and needs no index.
    """
    from virnucpro_cli.explore.search import search_file

    if search_file(settings):
        raise typer.Exit(EXIT_SOME_SKIPPED)
