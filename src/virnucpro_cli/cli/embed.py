"""virnucpro embed."""

import typer

import virnucpro_cli
from virnucpro_cli.cli import options
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import EXIT_SOME_SKIPPED

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
    if settings.engine == "local" and settings.device != "cpu":
        from virnucpro_cli.waking import wake

        wake(settings.device)
    from virnucpro_cli import embed as workflow

    if workflow.run(settings, since=virnucpro_cli.BEGUN).missed:
        raise typer.Exit(EXIT_SOME_SKIPPED)
