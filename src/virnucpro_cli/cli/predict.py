"""virnucpro predict."""

import typer

import virnucpro_cli
from virnucpro_cli.cli import options
from virnucpro_cli.config.predict import PredictConfig
from virnucpro_cli.errors import EXIT_SOME_SKIPPED

PREDICT_EPILOG = (
    "Exit codes: 0 all done; 2 something to put right (the message says what); 3 finished, but some frames have no "
    "score; 70 a bug; 128+signal after an orderly stop, which the same command resumes."
)


@options.of(PredictConfig)
def predict(settings: PredictConfig) -> None:
    """Call contigs or reads virus or others, as VirNucPro does: scores for frames, chunks and contigs, in DIR.

    Nothing else is needed: virnucpro predict contigs.fna -o DIR. An interrupted run is resumed by the same command.
    """
    if settings.engine == "local" and settings.device != "cpu":
        from virnucpro_cli.waking import wake

        wake(settings.device)
    from virnucpro_cli import predict as workflow

    if workflow.run(settings, since=virnucpro_cli.BEGUN).missed:
        raise typer.Exit(EXIT_SOME_SKIPPED)
