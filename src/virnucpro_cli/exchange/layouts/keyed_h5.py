"""One dataset per protein at the root of an HDF5 file, [D] or [L, D], as UniProt and ProtTrans publish them."""

from collections.abc import Iterator
from pathlib import Path

import h5py

from virnucpro_cli.exchange.layouts import hdf5
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.store import opened_hdf5


def write(selection: Selection, target: Path, always_named: bool = False) -> None:
    """always_named: whether every dataset tells its protein's name, or only where its key does not."""
    with hdf5.created(target, selection) as sink:
        for block in sink.each(selection.blocks()):
            for _, name, key, values in block.each():
                if key in sink.file:
                    selection.shared += 1
                    continue
                data = sink.file.create_dataset(key, data=values[selection.what])
                if always_named or key != name:
                    data.attrs["original_id"] = name


def datasets(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """(key, dataset) of every protein. A name with a `/` made groups of its parts. Raises ValueError for others."""
    for key, data in hdf5.datasets(file):
        if not isinstance(data, h5py.Dataset) or data.ndim not in (1, 2):
            raise ValueError(f"{key!r} is not a dataset of [D] or [L, D]")
        yield key, data


def read(path: Path) -> Iterator[Entry]:
    """Datasets of [1, D] are means whose first dimension was kept, if all are, unless an export says residue."""
    kind = hdf5.provenance(path).get("kind")
    with opened_hdf5(path) as file:
        kept = kind != "residue" and all(data.ndim == 2 and len(data) == 1 for _, data in datasets(file))
        for key, data in datasets(file):
            name = data.attrs.get("original_id", key)
            yield Entry(
                name.decode() if isinstance(name, bytes) else str(name),
                {("residue" if data.ndim == 2 and not kept else kind or "mean", None): data[0] if kept else data},
                key,
            )


def first_of(path: Path) -> tuple[str, set[str]] | None:
    """(key, names of its attributes) of the first dataset, if it looks like that of a protein."""
    if not hdf5.has()(path):
        return None
    with opened_hdf5(path) as file:
        key, data = next(datasets(file), ("", None))
        return None if data is None or data.dtype.kind != "f" else (key, set(data.attrs))


def recognises(path: Path) -> bool:
    return first_of(path) is not None


LAYOUT = Format(
    "keyed-h5", "HDF5, one dataset per protein, as UniProt and ProtTrans", ".keyed.h5", write, read, recognises, KINDS,
    hdf5.provenance, longest=1000,
)  # fmt: skip
