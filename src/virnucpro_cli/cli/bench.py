"""virnucpro bench."""

from typing import Annotated

import typer

from virnucpro_cli.cli.options import ReportFile, budget
from virnucpro_cli.cli.process import say
from virnucpro_cli.config import BenchConfig, resolve
from virnucpro_cli.errors import EXIT_GATE_FAILED

EPILOG = "Exit codes: 0 done; 1 a --min-... gate was missed; 2 something to put right; 70 a bug."


def bench(
    packed: Annotated[bool, typer.Option("--packed", help="Time packed batches. [default: both]")] = False,
    unpacked: Annotated[
        bool,
        typer.Option("--unpacked", help="Time padded batches, in file order and sorted by length. [default: both]"),
    ] = False,
    fasta: Annotated[
        list[str] | None,
        typer.Option("--fasta", metavar="FILE", help="Your own proteins (a sample). [default: made-up ones]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="As in embed; random weights if it is not here. [default: 650M on a GPU, 8M on a CPU]",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="TYPE", help="As in embed.")] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="As in embed.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", metavar="NAME", help="As in embed.")] = None,
    token_budget: Annotated[
        str | None, typer.Option("--token-budget", metavar="N,N", help="One or several to compare. [default: auto]")
    ] = None,
    max_residues: Annotated[int | None, typer.Option("--max-residues", metavar="N", help="As in embed.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", metavar="S", help="About how long to measure. [default: 45]")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers", metavar="NAME,NAME", help="Also time fair-esm, transformers, esm-efficient, faesm if installed."
        ),
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option("--min-speedup", metavar="X", help="Exit 1 unless packed is X times padded in file order."),
    ] = None,
    min_density: Annotated[
        float | None, typer.Option("--min-density", metavar="X", help="Exit 1 unless packs are this full (0 to 1).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one line on standard output.")] = False,
    report: ReportFile = None,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw it (extra plots).")] = None,
    save_config: Annotated[
        str | None,
        typer.Option("--save-config", metavar="FILE.toml", help="Write the recommended settings for embed --config."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file, table [bench]; flags win."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Measure what packing buys on this device, and how far it is from the device's limit.

    Nothing else is needed: virnucpro bench --packed --unpacked.
    """
    flags = {
        "packed": packed or None, "unpacked": unpacked or None, "fasta": tuple(fasta) if fasta else None, "model": model,
        "dtype": dtype, "device": device, "attention": attention,
        "token_budget": None if token_budget is None else tuple(budget(part) for part in token_budget.split(",")),
        "max_residues": max_residues, "seconds": seconds, "min_speedup": min_speedup, "min_density": min_density,
        "peers": None if peers is None else tuple(dict.fromkeys(part.strip() for part in peers.split(","))),
        "report": report, "plot": plot, "save_config": save_config, "quiet": quiet or None,
    }  # fmt: skip
    settings = resolve(BenchConfig, config, flags)
    from virnucpro_cli.benchmark import bench as workflow

    found = workflow.run(settings)
    missed = workflow.failed_gates(found, settings)
    if json:
        print(found.to_json(indent=None))
    if missed:
        say(*(f"missed: {gate}" for gate in missed))
        raise typer.Exit(EXIT_GATE_FAILED)
