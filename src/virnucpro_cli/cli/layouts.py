"""virnucpro export and import."""

from typing import Annotated

import typer

from virnucpro_cli.cli.options import Overwrite, numbers
from virnucpro_cli.errors import EXIT_SOME_SKIPPED

NAMES = "npy, parquet, csv, tsv, anndata, fair-esm, virnucpro, broad, scikit-bio, biotrainer or keyed-h5"
EXPORT_EPILOG = (
    "Exit codes: 0 done; 2 something to put right (the message says what); 70 a bug; 128+signal after a stop."
)
IMPORT_EPILOG = (
    "Exit codes: 0 done; 2 something to put right (the message says what); 3 done, but some records are without an "
    "embedding; 70 a bug; 128+signal after a stop."
)


KINDS = "As in --pool, or groups/mean, groups/max ... for rows of groups; several for fair-esm. [default: the file's]"
SEQUENCES = "For layouts that know proteins by their sequences; may be repeated. [default: where embed read it]"
TO = f"{NAMES}. [default: by the suffix of -o]"
FROM = f"{NAMES}. [default: seen from the file]"
LAYERS = "Several for fair-esm. [default: the file's]"
BESIDE = "File or folder. [default: beside OUT.h5, by its name]"
ORDER = "What was embedded: rows get its order and lengths; may be repeated."
WHICH = "Which layer they are of, or which of several to take."


def export(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="A finished file that embed wrote.")],
    to: Annotated[str | None, typer.Option("--to", metavar="LAYOUT", help=TO)] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="TARGET", help=BESIDE)] = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help=KINDS)] = None,
    layer: Annotated[str | None, typer.Option("--layer", metavar="N", help=LAYERS)] = None,
    fasta: Annotated[list[str] | None, typer.Option("--fasta", metavar="FILE", help=SEQUENCES)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write embeddings in the layout of another tool."""
    from virnucpro_cli.exchange.export import export_file

    kinds = tuple(kind.split(",")) if kind else ()
    export_file(file, to, output, kinds, numbers(layer, "--layer") or (), tuple(fasta or ()), overwrite)


def import_(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_FOLDER", help="Embeddings in the layout of another tool.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT.h5", help="The file to make.")],
    layout: Annotated[str | None, typer.Option("--from", metavar="LAYOUT", help=FROM)] = None,
    fasta: Annotated[list[str] | None, typer.Option("--fasta", metavar="FILE", help=ORDER)] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="What made them.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", metavar="N", help=WHICH)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a file like embed's, of embeddings in the layout of another tool."""
    from virnucpro_cli.exchange.importing import import_file

    summary = import_file(source, output, layout, tuple(fasta or ()), model, layer, overwrite)
    if summary.counts["skipped"]:
        raise typer.Exit(EXIT_SOME_SKIPPED)
