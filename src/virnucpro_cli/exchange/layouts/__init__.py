"""File layouts of other tools: a module for each, which writes and reads it."""

from pathlib import Path

from virnucpro_cli.config.options import refuse_removed
from virnucpro_cli.errors import DAMAGE, UserError, choose
from virnucpro_cli.exchange.layouts import (
    anndata,
    biotrainer,
    broad,
    fair_esm,
    keyed_h5,
    npy,
    parquet,
    scikit_bio,
    text,
    virnucpro,
)  # fmt: skip
from virnucpro_cli.exchange.layouts.layout import Format

LAYOUTS = (
    npy.LAYOUT, parquet.LAYOUT, anndata.LAYOUT, fair_esm.LAYOUT, virnucpro.LAYOUT, broad.LAYOUT, scikit_bio.LAYOUT,
    biotrainer.LAYOUT, keyed_h5.LAYOUT, *text.LAYOUTS,
)  # fmt: skip
"""A file is tried in this order: keyed_h5 takes all HDF5 that is nothing else."""
NAMES = [layout.name for layout in LAYOUTS]


def named(name: str) -> Format:
    """The layout of that name. Raises UserError if there is none."""
    if name not in NAMES:
        refuse_removed(name)
        raise UserError(f"There is no layout {name!r}.", choose(name, NAMES))
    return LAYOUTS[NAMES.index(name)]


def of_suffix(target: str | None) -> Format:
    """The layout whose suffix a target ends in. Raises UserError if there is none."""
    ends = [layout for layout in LAYOUTS if target and target.lower().endswith(layout.suffix)]
    if not ends:
        raise UserError("The name of the target does not tell its layout.", f"Say --to LAYOUT: {', '.join(NAMES)}.")
    return max(ends, key=lambda layout: len(layout.suffix))


def guessed(path: Path) -> Format | None:
    """The layout of what is at the path; None if it is of none, or damaged."""
    try:
        return next((layout for layout in LAYOUTS if layout.recognises(path)), None)
    except DAMAGE:
        return None
