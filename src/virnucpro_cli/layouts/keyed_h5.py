"""One dataset per protein at the root of an HDF5 file, [D] or [L, D], as UniProt and ProtTrans publish them."""

from collections.abc import Iterator
from pathlib import Path

import h5py

from virnucpro_cli.kinds import KINDS
from virnucpro_cli.layouts import hdf5
from virnucpro_cli.layouts.layout import Entry, Layout, Selection

LONGEST_KEY = 1000


def write(selection: Selection, target: Path, always_named: bool = False) -> None:
    """always_named: whether every dataset tells its protein's name, or only where its key does not."""
    with hdf5.created(target) as sink:
        file = sink.file
        hdf5.mark(file, selection.provenance)
        for block in sink.each(selection.blocks()):
            for _, name, key, values in block.each():
                if key in file:
                    selection.shared += 1
                    continue
                data = file.create_dataset(key, data=values[selection.what])
                if always_named or key != name:
                    data.attrs["original_id"] = name


def read(path: Path) -> Iterator[Entry]:
    kind = hdf5.provenance(path).get("kind", "mean")
    with h5py.File(path, "r", locking=False) as file:
        for key in file:
            data = file[key]
            if not isinstance(data, h5py.Dataset) or data.ndim not in (1, 2):
                raise ValueError(f"{key!r} is not a dataset of [D] or [L, D]")
            name = data.attrs.get("original_id", key)
            yield Entry(
                name.decode() if isinstance(name, bytes) else str(name),
                {("residue" if data.ndim == 2 else kind, None): data},
                key,
            )


def first_of(path: Path) -> tuple[str, bool] | None:
    """(key, whether it has an original_id) of the first dataset, if all that is at the root looks like datasets of proteins."""
    if not hdf5.has(path):
        return None
    with h5py.File(path, "r", locking=False) as file:
        key = next(iter(file), None)
        data = file[key] if key is not None else None
        if not isinstance(data, h5py.Dataset) or data.ndim not in (1, 2) or data.dtype.kind != "f":
            return None
        return str(key), "original_id" in data.attrs


def recognises(path: Path) -> bool:
    return first_of(path) is not None


LAYOUT = Layout(
    "keyed-h5", "HDF5, one dataset per protein, as UniProt and ProtTrans", ".keyed.h5", KINDS,
    write, read, hdf5.provenance, recognises, longest=LONGEST_KEY,
)  # fmt: skip
