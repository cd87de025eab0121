"""biotrainer's embeddings file: an HDF5 dataset per distinct sequence under its hash, with the protein's name in `original_id`."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from virnucpro_cli.exchange.layouts import hdf5, keyed_h5
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.store import opened_hdf5

HASH_LETTERS = 64


def key_of(sequence: bytes) -> str:
    """SHA-256 of the sequence, `_` and its length (biotrainer 1.4.0, utilities/hashing.py)."""
    return hashlib.sha256(b"%s_%d" % (sequence, len(sequence))).hexdigest()


def write(selection: Selection, target: Path) -> None:
    keyed_h5.write(selection, target, always_named=True)


def _is_hash(key: str) -> bool:
    return len(key) == HASH_LETTERS and set(key) <= set("0123456789abcdef")


def read(path: Path) -> Iterator[Entry]:
    """Entries of a file; keys that are names (store_by_hash=False) join by name. A database of biotrainer-core is read too."""
    if _is_database(path):
        yield from _of_database(path)
        return
    for entry in keyed_h5.read(path):
        yield entry if _is_hash(entry.key) else replace(entry, key="")


def _of_database(path: Path) -> Iterator[Entry]:
    """biotrainer-core 2.0 (write_h5_db): keys are HASH_MODEL, and attributes say hash, length, model, and whether rows are reduced."""
    model = ""
    with opened_hdf5(path) as file:
        for key, data in keyed_h5.datasets(file):
            said = data.attrs
            model = model or str(said["embedder_name"])
            if str(said["embedder_name"]) != model:
                raise ValueError(f"it holds rows of several models, {model} and {said['embedder_name']}: keep one")
            if data.ndim != (1 if said["reduced"] else 2):
                raise ValueError(f"{key!r} has the shape {data.shape}, and reduced is {bool(said['reduced'])}")
            sequence = str(said["sequence_hash"])
            kind = "mean" if said["reduced"] else "residue"
            yield Entry(sequence, {(kind, None): data}, sequence, int(said["sequence_length"]))


def _is_database(path: Path) -> bool:
    first = keyed_h5.first_of(path)
    return first is not None and {"sequence_hash", "embedder_name", "reduced", "sequence_length"} <= first[1]


def provenance(path: Path) -> dict[str, Any]:
    """Provenance as an earlier export wrote it; of a database its model."""
    if not _is_database(path):
        return hdf5.provenance(path)
    with opened_hdf5(path) as file:
        _, first = next(keyed_h5.datasets(file))
        return {"model": str(first.attrs["embedder_name"])}


def recognises(path: Path) -> bool:
    first = keyed_h5.first_of(path)
    if first is None:
        return False
    return _is_database(path) or ("original_id" in first[1] and _is_hash(first[0]))


LAYOUT = Format(
    "biotrainer", "biotrainer's HDF5, a dataset per distinct sequence under its SHA-256", ".biotrainer.h5",
    KINDS, write, read, provenance, recognises, key_of=key_of,
)  # fmt: skip
