"""The fetch workflow: weights into the cache ahead of time, and a list of what is where."""

from virnucpro_cli import report
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import locate
from virnucpro_cli.model.spec import SIZES


def fetch_weights(model: str) -> locate.Weights:
    """Fetch a named model unless it is there, check it, and say where it is."""
    out = report.console()
    found = locate.verified(locate.fetch(model, lambda text: out.print(text)))
    if not found.files:
        raise UserError(f"There is nothing to fetch for {model!r}.")
    out.print(f"{found.name}: {found.place}\nSHA-256 {found.sha256}")
    return found


def show() -> None:
    """Print every known model with its place on this machine, a line for each, to standard output."""
    print(f"{'model':<22}{'layers':>6}{'hidden':>8}  place")
    for spec in SIZES.values():
        found = locate.locate(spec.name)
        place = found.place if found else "not on this machine"
        print(f"{spec.name:<22}{spec.layers:>6}{spec.hidden:>8}  {place}")
