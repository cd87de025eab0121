"""Commands about this machine: doctor, models, fetch."""

from typing import Annotated

import typer

from virnucpro_cli.errors import EXIT_GATE_FAILED, UserError, joined

DOCTOR_EPILOG = "Exit codes: 0 nothing stands in the way of a run; 1 something does, with a remedy."


def doctor() -> None:
    """Show what a run would find on this machine, and remedies: driver, GPUs, kernels, weights, disks, batch system."""
    from virnucpro_cli.machine.doctor import check_machine

    if not check_machine():
        raise typer.Exit(EXIT_GATE_FAILED)


def models(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A model, such as 650M or esmc-600m, or a family, such as esmc."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as one line of JSON on standard output.")] = False,
) -> None:
    """Show the models: size, letters, licence, what is here, and speed.

    Nothing is fetched. With NAME all that is known of one model is shown, or the models of a family.

    Kernels are fused where our own run: on Hopper GPUs, for families that have them. Plain steps are PyTorch's.

    Tokens/s are those that virnucpro bench --model NAME measured last on this machine, on lengths of natural proteins.
    They are of the device and dtype that a run would use here.

    A licence with a star binds whoever downloads the weights: virnucpro fetch NAME --accept-licence.
    """
    from virnucpro_cli.machine.models import show

    show(name, json)


def fetch(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]", help="Names, e.g. 650M demo; virnucpro models has all; virnucpro: see below."
        ),
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list", help="Show which models are on this machine, and where.")
    ] = False,
    accepted: Annotated[
        bool,
        typer.Option("--accept-licence", help="You have read a licence that has to be accepted, and accept it."),
    ] = False,
) -> None:
    """Put weights into the cache ahead of time, for compute nodes without internet access.

    The licence of what is fetched is printed. Some have to be accepted first: virnucpro models marks them with a star.
    The name virnucpro stands for what predict needs beside ESM-2 3B: DNABERT-S and VirNucPro's two heads.
    """
    from virnucpro_cli import report
    from virnucpro_cli.machine.fetch import fetch_weights, show
    from virnucpro_cli.predict import fetching

    if list_models:
        show()
    elif models:
        missing: list[UserError] = []
        for model in models:
            try:
                if model == fetching.NAME:
                    fetching.fetch_all(lambda text: report.console().print(text))
                else:
                    fetch_weights(model, accepted)
            except UserError as error:
                missing.append(error)
        if missing:
            raise joined(missing)
    else:
        raise UserError("fetch needs a model's name.", "virnucpro fetch 650M, or virnucpro fetch --list")
