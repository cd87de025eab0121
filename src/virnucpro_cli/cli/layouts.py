"""virnucpro export."""

from typing import Annotated

import typer

from virnucpro_cli.cli.options import Overwrite, numbers

NAMES = "npy, parquet, anndata, fair-esm, virnucpro, broad, scikit-bio, biotrainer, bio-embeddings or keyed-h5"
EXPORT_EPILOG = (
    "Exit codes: 0 done; 2 something to put right (the message says what); 70 a bug; 128+signal after a stop."
)


def export(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="A finished file that embed wrote.")],
    to: Annotated[str, typer.Option("--to", metavar="LAYOUT", help=f"{NAMES}.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="TARGET", help="File or folder. [default: beside OUT.h5, by its name]"),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--kind", metavar="KIND", help="As in --pool; several for fair-esm. [default: the file's]"),
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="N", help="Several for fair-esm. [default: the file's]")
    ] = None,
    fasta: Annotated[
        list[str] | None,
        typer.Option(
            "--fasta",
            metavar="FILE",
            help="For layouts that know proteins by their sequences; may be repeated. [default: where embed read it]",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write embeddings in the layout of another tool."""
    from virnucpro_cli import export as workflow

    kinds = tuple(kind.split(",")) if kind else ()
    workflow.run(file, to, output, kinds, numbers(layer, "--layer") or (), tuple(fasta or ()), overwrite)
