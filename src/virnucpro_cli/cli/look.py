"""Commands that look at a file: inspect, map, search."""

from typing import Annotated

import typer

from virnucpro_cli.cli import end_at_once, options
from virnucpro_cli.cli.options import QcFile
from virnucpro_cli.errors import EXIT_SOME_SKIPPED
from virnucpro_cli.explore import MapConfig, SearchConfig

SEARCH_EPILOG = (
    "Exit codes: 0 done; 2 something to put right (the message says what); 3 done, but some queries were skipped, and "
    "have no hits; 70 a bug."
)


def inspect(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed wrote, or is writing (OUT.h5.partial).")],
    qc: QcFile = None,
) -> None:
    """Show what is in an embeddings file and how complete it is, with a sentence for your Methods."""
    from virnucpro_cli.explore.inspect import inspect_file

    end_at_once()
    inspect_file(file, qc)


@options.of(MapConfig)
def map(settings: MapConfig) -> None:
    """Draw where the proteins of a file lie: its rows on a plane (extra maps).

    Nothing else is needed: virnucpro map embeddings.h5 -o map.html.
    """
    from virnucpro_cli.explore.mapping import write_map

    end_at_once()
    write_map(settings)


@options.of(SearchConfig)
def search(settings: SearchConfig) -> None:
    """Find the nearest proteins of a file by the cosine of their rows, minus the mean of all.

    It is exact, and needs no index.
    """
    from virnucpro_cli.explore.search import search_file

    if search_file(settings):
        raise typer.Exit(EXIT_SOME_SKIPPED)
