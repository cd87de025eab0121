"""What the layouts in HDF5 share: the provenance in an attribute, the names in a dataset, and a look at what is at the root."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from virnucpro_cli.store import HDF5_MAGIC, blocks

PROVENANCE = "virnucpro"


def mark(file: h5py.File, provenance: dict[str, Any]) -> None:
    file.attrs[PROVENANCE] = json.dumps(provenance)


def provenance(path: Path) -> dict[str, Any]:
    with h5py.File(path, "r", locking=False) as file:
        return json.loads(file.attrs.get(PROVENANCE, "{}"))


def is_hdf5(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(8) == HDF5_MAGIC


def has(path: Path, *names: str) -> bool:
    """Whether it is an HDF5 file with these at its root, and not one that embed wrote."""
    if not is_hdf5(path):
        return False
    with h5py.File(path, "r", locking=False) as file:
        return "schema" not in file.attrs and all(name in file for name in names)


def texts(data: h5py.Dataset) -> Iterator[str]:
    for block in blocks(len(data)):
        yield from data.asstr()[block].tolist()


def rows(data: h5py.Dataset) -> Iterator[Any]:
    """The rows of [N, ...], read in blocks."""
    step = max(1, (1 << 22) // max(1, data.dtype.itemsize * int(data.shape[-1])))
    for block in blocks(len(data), step):
        yield from data[block]
