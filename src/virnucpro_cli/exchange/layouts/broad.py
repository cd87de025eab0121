"""The Broad Institute's VirNucPro fork: `embeddings` [N, D] in fp32 beside `sequence_ids`, in one HDF5 file."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from virnucpro_cli.exchange.layouts import hdf5
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection
from virnucpro_cli.store import opened_hdf5


def write(selection: Selection, target: Path) -> None:
    n, at = selection.rows(skipped=False), 0
    with hdf5.created(target, selection) as sink:
        data = sink.file.create_dataset("embeddings", (n, selection.width), np.float32)
        names = sink.file.create_dataset("sequence_ids", (n,), h5py.string_dtype("utf-8"))
        for block in sink.each(selection.blocks()):
            stop = at + len(block.names)
            data[at:stop], names[at:stop] = block.rows[selection.what], block.names
            at = stop


def read(path: Path) -> Iterator[Entry]:
    kind = hdf5.provenance(path).get("kind", "mean")
    with opened_hdf5(path) as file:
        data, names = (hdf5.item(file, name) for name in ("embeddings", "sequence_ids"))
        if len(data) != len(names):
            raise ValueError(f"{len(data)} embeddings for {len(names)} sequence_ids")
        for name, row in zip(hdf5.texts(names), hdf5.rows(data), strict=True):
            yield Entry(name, {(kind, None): row})


LAYOUT = Format(
    "broad", "HDF5 with embeddings and sequence_ids, as the Broad's VirNucPro", ".broad.h5", write, read,
    hdf5.has("embeddings", "sequence_ids"), provenance=hdf5.provenance,
)  # fmt: skip
