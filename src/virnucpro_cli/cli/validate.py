"""virnucpro validate."""

import typer

from virnucpro_cli.cli import options
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.errors import EXIT_GATE_FAILED

VALIDATE_EPILOG = (
    "Exit codes: 0 the verdict is PASS; 1 it is FAIL; 2 something to put right (the message says what); 70 a bug."
)


@options.of(ValidateConfig)
def validate(settings: ValidateConfig) -> None:
    """Prove that the embeddings are ESM-2's: against fair-esm in fp32, one protein at a time.

    Nothing else is needed: virnucpro validate. The verdict has three parts: semantics (fp32 against fair-esm), precision
    (the run's dtype against its noise floor) and packing (the same bits in any company).
    """
    from virnucpro_cli.validation import validate as workflow

    verdict = workflow.run(settings)
    print("PASS" if verdict.passed else f"FAIL: {'; '.join(verdict.failed_parts)}")
    if not verdict.passed:
        raise typer.Exit(EXIT_GATE_FAILED)
