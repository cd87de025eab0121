"""biotrainer's embeddings file: an HDF5 dataset per distinct sequence, under its hash, with a name in `original_id`."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from virnucpro_cli.exchange.layouts import hdf5, keyed_h5
from virnucpro_cli.exchange.layouts.layout import Entry, Format
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.store import opened_hdf5

HASH = re.compile("[0-9a-f]{64}")


def key_of(sequence: bytes) -> str:
    """SHA-256 of the sequence, `_` and its length (biotrainer 1.4.0, utilities/hashing.py)."""
    return hashlib.sha256(b"%s_%d" % (sequence, len(sequence))).hexdigest()


def read(path: Path) -> Iterator[Entry]:
    """Keys that are names (store_by_hash=False) join by name. A database of biotrainer-core is read too."""
    if _is_database(path):
        yield from _of_database(path)
        return
    for entry in keyed_h5.read(path):
        yield entry if HASH.fullmatch(entry.key) else replace(entry, key="")


def _of_database(path: Path) -> Iterator[Entry]:
    """biotrainer-core 2.0 (write_h5_db): keys are HASH_MODEL, and attributes say hash, length, model, and reduced."""
    model = provenance(path)["model"]
    with opened_hdf5(path) as file:
        for key, data in keyed_h5.datasets(file):
            facts = data.attrs
            if str(facts["embedder_name"]) != model:
                raise ValueError(f"it holds rows of several models, {model} and {facts['embedder_name']}: keep one")
            if data.ndim != (1 if facts["reduced"] else 2):
                raise ValueError(f"{key!r} has the shape {data.shape}, and reduced is {bool(facts['reduced'])}")
            sequence = str(facts["sequence_hash"])
            kind = "mean" if facts["reduced"] else "residue"
            yield Entry(sequence, {(kind, None): data}, sequence, int(facts["sequence_length"]))


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
    has_hashes = first is not None and "original_id" in first[1] and HASH.fullmatch(first[0])
    return bool(has_hashes) or _is_database(path)


LAYOUT = Format(
    "biotrainer", "biotrainer's HDF5, a dataset per distinct sequence under its SHA-256", ".biotrainer.h5",
    partial(keyed_h5.write, always_named=True), read, recognises, KINDS, provenance, key_of=key_of,
)  # fmt: skip
