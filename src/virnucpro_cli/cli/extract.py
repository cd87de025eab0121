"""virnucpro extract, with the arguments of fair-esm's scripts/extract.py, which only argparse understands."""

import argparse
import re
from typing import Annotated, Any, NoReturn

import typer

from virnucpro_cli.errors import EXIT_SOME_SKIPPED, UserError, shortened

EXTRACT_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": list[str]()}
OF_EMBED = {
    r"choose another disk with -o, or store less \(.*\)": "or write less (fewer --layers, no per_tok)",
    "--layers": "--repr_layers",
    "--token-budget": "--toks_per_batch",
    "--max-residues": "--truncation_seq_length",
}
"""Options of embed that have another name here, as patterns."""
INCLUDE = ("mean", "per_tok", "bos", "contacts")


class _Help(argparse.RawDescriptionHelpFormatter):
    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, "Usage: ")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(shortened(message))


class _NoAdapter(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        raise UserError(
            "extract has the arguments of fair-esm's extract.py, and no --adapter.",
            "Use virnucpro embed --adapter, then virnucpro export --to fair-esm; or copy the adapter into the folder "
            "of its base, and give that as MODEL.",
        )


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options of fair-esm's extract.py, with their defaults."""
    parser = _Parser(
        "virnucpro extract",
        description="Write what fair-esm's extract.py writes: OUTDIR/{header}.pt for each\nprotein, in fp32.",
        epilog="Existing files are replaced, as extract.py does. An interrupted run is resumed\nby the same command.\n"
        "Exit codes: 0 all done; 2 something to put right; 3 finished, but some records\nare empty and have no file.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="esm2_t6_8M_UR50D ..., a .pt file, or what embed --model takes")
    parser.add_argument("fasta", metavar="FASTA", help="proteins, plain or gz, bz2, xz, zst, or - for standard input")
    parser.add_argument("output", metavar="OUTDIR", help="made if it is not there")
    parser.add_argument("--include", nargs="+", choices=INCLUDE, required=True, help="what the files hold")
    parser.add_argument("--repr_layers", dest="layers", type=int, default=[-1], nargs="+", metavar="REPR_LAYERS",
                        help="0 is the embedding, -1 the last layer")  # fmt: skip
    parser.add_argument("--toks_per_batch", dest="tokens", type=_positive, metavar="TOKS_PER_BATCH",
                        help="tokens per pack; no value depends on it [default: auto]")  # fmt: skip
    parser.add_argument("--truncation_seq_length", dest="longest", type=_positive, default=1022,
                        metavar="TRUNCATION_SEQ_LENGTH", help="residues seen [default: 1022]")  # fmt: skip
    parser.add_argument("--adapter", action=_NoAdapter, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--nogpu", dest="gpu", action="store_false", help="use the CPU even if there is a GPU")
    return parser


def _renamed(text: str) -> str:
    for of_embed, own in OF_EMBED.items():
        text = re.sub(of_embed, own, text)
    return text


def extract(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="MODEL FASTA OUTDIR --include KIND...")] = None,
) -> None:
    """Write the .pt files of fair-esm's extract.py, with its arguments."""
    settings = vars(parser().parse_args(arguments or []))
    from virnucpro_cli.exchange.extract import extract_files

    try:
        written = extract_files(**settings)
    except UserError as error:
        raise UserError(_renamed(error.what), _renamed(error.remedy)) from None
    if written.skipped:
        raise typer.Exit(EXIT_SOME_SKIPPED)
