"""One dataset per protein at the root of an HDF5 file, [D] or [L, D], as UniProt and ProtTrans publish them."""

from collections.abc import Iterator
from pathlib import Path

import h5py

from virnucpro_cli.exchange.layouts import hdf5
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.store import opened_hdf5

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


def datasets(group: h5py.Group, above: str = "", depth: int = 0) -> Iterator[tuple[str, h5py.Dataset]]:
    """(key, dataset) of every protein. A name with a `/` made groups of its parts."""
    if depth > hdf5.MOST_DEEP:
        raise ValueError(f"{above!r} is nested more than {hdf5.MOST_DEEP} deep")
    for name in group:
        data = hdf5.item(group, name)
        if isinstance(data, h5py.Group):
            yield from datasets(data, f"{above}{name}/", depth + 1)
        elif isinstance(data, h5py.Dataset) and data.ndim in (1, 2):
            yield above + name, data
        else:
            raise ValueError(f"{above + name!r} is not a dataset of [D] or [L, D]")


def read(path: Path) -> Iterator[Entry]:
    """Datasets of [1, D] are means whose first dimension was kept, unless another one has more rows or an export says residue."""
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
    """(key, names of its attributes) of the first dataset, if all that is at the root looks like datasets of proteins."""
    if not hdf5.has(path):
        return None
    with opened_hdf5(path) as file:
        key, data = next(datasets(file), (None, None))
        if key is None or data is None or data.dtype.kind != "f":
            return None
        return key, set(data.attrs)


def recognises(path: Path) -> bool:
    return first_of(path) is not None


LAYOUT = Format(
    "keyed-h5", "HDF5, one dataset per protein, as UniProt and ProtTrans", ".keyed.h5", KINDS,
    write, read, hdf5.provenance, recognises, longest=LONGEST_KEY,
)  # fmt: skip
