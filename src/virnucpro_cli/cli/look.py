"""Commands that look at a file: inspect, map, search."""

from typing import Annotated

import typer

from virnucpro_cli.cli import end_at_once
from virnucpro_cli.cli.options import Overwrite, QcFile
from virnucpro_cli.errors import EXIT_SOME_SKIPPED

Kind = Annotated[
    str | None, typer.Option("--kind", metavar="KIND", help="Rows of which --pool. [default: those of /embeddings]")
]
Layer = Annotated[
    int | None, typer.Option("--layer", metavar="N", help="Rows of which layer. [default: the last stored]")
]
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


def map(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed wrote.")],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="MAP.png",
            help="What to draw: .png, .pdf, .svg, .jpg; .html, a page to look around in; or .tsv, the coordinates.",
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="HOW", help="pca, umap or tsne. [default: umap if it is installed, else pca]"),
    ] = None,
    color: Annotated[
        str,
        typer.Option(
            "--color",
            metavar="WHAT",
            help="length, status, group, or a column of a table whose first column holds the names: FILE.tsv:column.",
        ),
    ] = "length",
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", help="Most proteins to show; of more, a random sample.")
    ] = 100_000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the sample, UMAP and t-SNE.")] = 0,
    kind: Kind = None,
    layer: Layer = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw where the proteins of a file lie: its rows on a plane (extra maps).

    Nothing else is needed: virnucpro map embeddings.h5 -o map.html.
    """
    from virnucpro_cli.explore.mapping import write_map

    end_at_once()
    write_map(file, output, method, color, sample, seed, overwrite, kind, layer)


def search(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed wrote: the proteins to search among.")],
    query: Annotated[
        str,
        typer.Option(
            "--query",
            metavar="QUERY",
            help="A FASTA file (- for standard input), embedded as OUT.h5 was; the name of a protein in OUT.h5; or "
            "another file that embed wrote.",
        ),
    ],
    k: Annotated[int, typer.Option("-k", metavar="N", help="Hits for each query.")] = 10,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Plain cosines. Those of ESM-2 are nearly blind: unrelated proteins reach .9."),
    ] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="HITS.tsv", help="[default: standard output]")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="PATH", help="Where the weights of OUT.h5 are now, for a FASTA query."),
    ] = None,
    force_protein: Annotated[bool, typer.Option("--force-protein", help="As in embed, for a FASTA query.")] = False,
    kind: Kind = None,
    layer: Layer = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the nearest proteins of a file by the cosine of their rows, minus the mean of all: exactly, without an index."""
    from virnucpro_cli.explore.search import search_file

    if search_file(file, query, k, raw, output, model, overwrite, force_protein, kind, layer):
        raise typer.Exit(EXIT_SOME_SKIPPED)
