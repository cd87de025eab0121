"""File layouts of other tools: a module for each, which writes and reads it. Adding a layout is adding a module and a line here."""

from pathlib import Path

from virnucpro_cli.errors import UserError
from virnucpro_cli.layouts import (
    anndata,
    bio_embeddings,
    biotrainer,
    broad,
    fair_esm,
    keyed_h5,
    npy,
    parquet,
    scikit_bio,
    virnucpro,
)
from virnucpro_cli.layouts.layout import Layout
from virnucpro_cli.store import DAMAGE

LAYOUTS = (
    npy.LAYOUT,
    parquet.LAYOUT,
    anndata.LAYOUT,
    fair_esm.LAYOUT,
    virnucpro.LAYOUT,
    broad.LAYOUT,
    scikit_bio.LAYOUT,
    biotrainer.LAYOUT,
    bio_embeddings.LAYOUT,
    keyed_h5.LAYOUT,
)
"""In the order in which a file is tried: keyed_h5 is what HDF5 is that is nothing else."""


def named(name: str) -> Layout:
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise UserError(f"There is no layout {name!r}.", f"Choose one of {', '.join(each.name for each in LAYOUTS)}.")


def guessed(path: Path) -> Layout | None:
    """The layout of what is at the path; None if it is of none, or damaged."""
    try:
        return next((layout for layout in LAYOUTS if layout.recognises(path)), None)
    except DAMAGE:
        return None
