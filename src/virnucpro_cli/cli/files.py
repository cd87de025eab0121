"""Commands that look at a file: inspect, verify."""

from typing import Annotated

import typer

from virnucpro_cli.cli import end_at_once
from virnucpro_cli.cli.options import QcFile
from virnucpro_cli.errors import EXIT_GATE_FAILED


def inspect(
    file: Annotated[str, typer.Argument(metavar="OUT.h5", help="What embed wrote, or is writing (OUT.h5.partial).")],
    qc: QcFile = None,
) -> None:
    """Show what is in an embeddings file and how complete it is, with a sentence for your Methods."""
    from virnucpro_cli.explore.inspect import inspect_file

    end_at_once()
    inspect_file(file, qc)


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

    It needs no model; whether the values are ESM-2's is told by: virnucpro validate --against OUT.h5.
    """
    from virnucpro_cli.validation.verify import verify_file

    end_at_once()
    verdict = verify_file(file, tuple(fasta or ()), report)
    print(
        "PASS"
        if verdict.passed
        else f"FAIL: {'; '.join(check.what for check in verdict.checks if check.passed is False)}"
    )
    if not verdict.passed:
        raise typer.Exit(EXIT_GATE_FAILED)
