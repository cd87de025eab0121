"""virnucpro embed."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

import virnucpro_cli
from virnucpro_cli.cli import options
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import EXIT_SOME_SKIPPED

if TYPE_CHECKING:
    from virnucpro_cli.waking import Begun

UNASKED_TIMES = 8
"""How many times larger than a large input is one for which all GPUs begin at once, if nobody asks for them."""
EMBED_EPILOG = (
    "Exit codes: 0 all done; 2 something to put right (the message says what); 3 finished, but some records were "
    "skipped; 70 a bug; 128+signal after an orderly stop, which the same command resumes."
)


@options.of(EmbedConfig)
def embed(settings: EmbedConfig) -> None:
    """Embed FASTA files of proteins, or of contigs (--from contigs), into an HDF5 file, row i for record i.

    Nothing else is needed: virnucpro embed proteins.fasta -o embeddings.h5. An interrupted run is resumed by the same
    command.
    """
    with ExitStack() as stack:
        waiting = _begun(settings, stack)
        from virnucpro_cli import embed as workflow

        if workflow.run(settings, since=virnucpro_cli.BEGUN, waiting=waiting).missed:
            raise typer.Exit(EXIT_SOME_SKIPPED)


def _begun(settings: EmbedConfig, stack: ExitStack) -> "list[Begun]":
    """Begin what the run will need before PyTorch is read: the first GPU, and the workers of a large input."""
    if settings.engine != "local" or (settings.device == "cpu" and settings.workers in ("auto", 1)):
        return []
    from virnucpro_cli import waking
    from virnucpro_cli.fasta import is_large

    waking.wake(settings.device)
    if settings.dry_run or not is_large(settings.inputs, 1 if settings.asks_for_processes else UNASKED_TIMES):
        return []
    return stack.enter_context(waking.begun_for(settings.device, settings.workers))
