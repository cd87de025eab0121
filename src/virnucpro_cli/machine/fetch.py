"""The fetch workflow: weights into the cache ahead of time, and a list of what is where."""

from virnucpro_cli import report
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import locate
from virnucpro_cli.model.families import SIZES


def fetch_weights(model: str, accepted: bool = False) -> None:
    """Fetch a named model unless it is there, check it, and say where it is and under which licence.

    accepted: as in `locate.fetch`. Raises UserError if that fails.
    """
    out = report.console()
    weights = locate.verified(locate.fetch(model, lambda text: out.print(text), accepted))
    if not weights.files:
        raise UserError(f"There is nothing to fetch for {model!r}.")
    licence = locate.licence_of(weights) or "not known here"
    out.print(f"{weights.name}: {weights.place}\nSHA-256 {weights.sha256}\nlicence: {licence}")


def show() -> None:
    """Print every known model with its place on this machine, a line for each, to standard output."""
    print(f"{'model':<22}{'layers':>6}{'hidden':>8}  place")
    for spec in SIZES.values():
        weights = locate.locate(spec.name)
        place = weights.place if weights else "not on this machine"
        print(f"{spec.name:<22}{spec.layers:>6}{spec.hidden:>8}  {place}")
