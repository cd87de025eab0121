"""Commands with a verdict: validate, verify."""

from typing import Annotated

import typer

from virnucpro_cli.cli import end_at_once, options
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.errors import EXIT_GATE_FAILED

VALIDATE_EPILOG = (
    "Exit codes: 0 the verdict is PASS; 1 it is FAIL; 2 something to put right (the message says what); 70 a bug."
)


@options.of(ValidateConfig)
def validate(settings: ValidateConfig) -> None:
    """Prove that the embeddings are the model's: against a public reference in fp32, one protein at a time.

    Nothing else is needed: virnucpro validate. The reference is the class that other people run: fair-esm's for ESM-2,
    transformers' for ESM C, and so on. The verdict has three parts: semantics (fp32 against the reference), precision
    (the run's dtype against its noise floor) and packing (the same bits in any company).
    """
    from virnucpro_cli.validation import validate as workflow

    verdict = workflow.run(settings)
    _end(verdict.failed_parts)


VERIFY_EPILOG = "Exit codes: 0 the verdict is PASS; 1 it is FAIL; 2 something to put right (the message says what)."


def verify(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="A finished file that embed wrote.")],
    fasta: Annotated[
        list[str] | None,
        typer.Option("--fasta", metavar="FILE", help="Its input; may be repeated. [default: where embed read it]"),
    ] = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.json", help="Write the checks as JSON.")
    ] = None,
) -> None:
    """Check that a file is whole, unaltered since embed wrote it, and of this FASTA: every byte, every record.

    It needs no model; whether the values are the model's is told by: virnucpro validate --against OUT.h5.
    """
    from virnucpro_cli.validation.verify import verify_file

    if not report:
        end_at_once()
    verdict = verify_file(file, tuple(fasta or ()), report)
    _end([check.what for check in verdict.checks if check.passed is False])


def _end(failed: list[str]) -> None:
    print(f"FAIL: {'; '.join(failed)}" if failed else "PASS")
    if failed:
        raise typer.Exit(EXIT_GATE_FAILED)
