"""Parts that the layouts in HDF5 share: a write that HDF5 survives, the provenance in an attribute, safe reading."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from virnucpro_cli.exchange.layouts.layout import Selection, begins
from virnucpro_cli.store import HDF5_MAGIC, blocks, opened_hdf5
from virnucpro_cli.store.layout import Sink

PROVENANCE = "virnucpro"
MOST_DEEP = 32


@contextmanager
def created(path: Path, selection: Selection | None = None) -> Iterator[Sink]:
    """A new HDF5 file to write, at `sink.file`, with the provenance of a selection.

    Raises the error of a write that failed, once HDF5 has closed the file.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        sink = Sink(fd)
        try:
            with h5py.File(sink, "w") as sink.file:
                if selection is not None:
                    sink.file.attrs[PROVENANCE] = json.dumps(selection.provenance)
                yield sink
        finally:
            sink.end()
        os.ftruncate(fd, sink.size)
    finally:
        os.close(fd)


def provenance(path: Path) -> dict[str, Any]:
    with opened_hdf5(path) as file:
        return json.loads(file.attrs.get(PROVENANCE, "{}"))


def has(*names: str) -> Callable[[Path], bool]:
    """Tells of a path whether it is an HDF5 file with these at its root, and not one that embed wrote."""

    def recognises(path: Path) -> bool:
        if not begins(HDF5_MAGIC)(path):
            return False
        with opened_hdf5(path) as file:
            return "schema" not in file.attrs and all(name in file for name in names)

    return recognises


def item(group: h5py.Group, name: str) -> Any:
    """The group or dataset of a name. Raises ValueError for a link, and for external or virtual storage."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name!r} is a link")
    there = group[name]
    if isinstance(there, h5py.Dataset) and (there.is_virtual or there.external):
        raise ValueError(f"{name!r} keeps its values in other files")
    return there


def datasets(group: h5py.Group, above: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(name, what is there) of all that is in a group and below, but for groups. Raises ValueError as `item` does."""
    if depth > MOST_DEEP:
        raise ValueError(f"{above!r} is nested more than {MOST_DEEP} deep")
    for name in group:
        there = item(group, name)
        if isinstance(there, h5py.Group):
            yield from datasets(there, f"{above}{name}/", depth + 1)
        else:
            yield above + name, there


def texts(data: h5py.Dataset) -> Iterator[str]:
    for block in blocks(len(data)):
        yield from data.asstr()[block].tolist()


def rows(data: h5py.Dataset) -> Iterator[Any]:
    """The rows of [N, ...], read in blocks."""
    step = max(1, (1 << 22) // max(1, data.dtype.itemsize * int(data.shape[-1])))
    for block in blocks(len(data), step):
        yield from data[block]
