"""virnucpro bench."""

from typing import Annotated

import typer

from virnucpro_cli.cli import options, say
from virnucpro_cli.config import BenchConfig
from virnucpro_cli.errors import EXIT_GATE_FAILED

BENCH_EPILOG = "Exit codes: 0 done; 1 a --min-... gate was missed; 2 something to put right; 70 a bug."
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the report as one line on standard output.", rich_help_panel="Output and reports"
    ),
]


@options.of(BenchConfig)
def bench(settings: BenchConfig, json: Json = False) -> None:
    """Measure what packing buys on this device, and how far it is from the device's limit.

    Nothing else is needed: virnucpro bench --packed --unpacked.
    """
    from virnucpro_cli.benchmark import bench as workflow

    report = workflow.run_bench(settings)
    missed = workflow.failed_gates(report, settings)
    if json:
        print(report.to_json(indent=None))
    if missed:
        say(*(f"missed: {gate}" for gate in missed))
        raise typer.Exit(EXIT_GATE_FAILED)
