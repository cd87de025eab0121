"""virnucpro validate."""

from typing import Annotated

import typer

from virnucpro_cli.cli.options import budget, numbers
from virnucpro_cli.config import ValidateConfig, resolve
from virnucpro_cli.errors import EXIT_GATE_FAILED

EPILOG = "Exit codes: 0 the verdict is PASS; 1 it is FAIL; 2 something to put right (the message says what); 70 a bug."


def validate(
    fasta: Annotated[
        list[str] | None,
        typer.Option(
            "--fasta",
            metavar="FILE",
            help="Your own proteins; may be repeated. [default: 128 that ship with virnucpro]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="OUT.h5",
            help="Audit a file that embed wrote, with the model and settings it names; or another tool's, with --model and --fasta.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="As in embed. [default: demo]")] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            metavar="N",
            help="Proteins to compare at least, spread over the lengths; odd ones included. [default: 60]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the sample. [default: 0]")] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            "--min-cosine",
            metavar="X",
            help="Least cosine of a pooled row with fair-esm's. [default: 0.999, bf16 0.998]",
        ),
    ] = None,
    max_rel_l2: Annotated[
        float | None,
        typer.Option(
            "--max-rel-l2",
            metavar="X",
            help="Largest relative L2 error of a pooled row. [default: fp32 1e-5, fp16 1e-2, bf16 6e-2]",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="N,N", help="Layers to compare. [default: 0, the middle and the last]"),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="TYPE", help="As in embed.")] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="As in embed.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", metavar="NAME", help="As in embed.")] = None,
    token_budget: Annotated[str | None, typer.Option("--token-budget", metavar="N", help="As in embed.")] = None,
    max_residues: Annotated[int | None, typer.Option("--max-residues", metavar="N", help="As in embed.")] = None,
    reference_device: Annotated[
        str | None,
        typer.Option(
            "--reference-device", metavar="DEVICE", help="Where fair-esm runs; cuda for large models. [default: cpu]"
        ),
    ] = None,
    golden: Annotated[
        str | None, typer.Option("--golden", metavar="FILE", help="Compare with rows that --write-golden stored.")
    ] = None,
    write_golden: Annotated[
        str | None,
        typer.Option("--write-golden", metavar="FILE", help="Store fair-esm's rows of three shipped proteins."),
    ] = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.json", help="Write every number as JSON.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file, table [validate]; flags win."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")] = False,
) -> None:
    """Prove that the embeddings are ESM-2's: against fair-esm in fp32, one protein at a time.

    Nothing else is needed: virnucpro validate. The verdict has three parts: semantics (fp32 against fair-esm), precision
    (the run's dtype against its noise floor) and packing (the same bits in any company).
    """
    flags = {
        "fasta": tuple(fasta) if fasta else None, "against": against, "model": model, "sample": sample, "seed": seed,
        "min_cosine": min_cosine, "max_rel_l2": max_rel_l2, "layers": numbers(layers), "dtype": dtype,
        "device": device, "attention": attention, "token_budget": budget(token_budget),
        "max_residues": max_residues, "reference_device": reference_device, "golden": golden,
        "write_golden": write_golden, "report": report, "quiet": quiet or None,
    }  # fmt: skip
    settings = resolve(ValidateConfig, config, flags)
    from virnucpro_cli.validation import validate as workflow

    verdict = workflow.run(settings)
    print("PASS" if verdict.passed else f"FAIL: {'; '.join(verdict.failed_parts)}")
    if not verdict.passed:
        raise typer.Exit(EXIT_GATE_FAILED)
