"""biotrainer's embeddings file: an HDF5 dataset per distinct sequence under its hash, with the protein's name in `original_id`."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from virnucpro_cli.kinds import KINDS
from virnucpro_cli.layouts import hdf5, keyed_h5
from virnucpro_cli.layouts.layout import Entry, Layout, Selection

HASH_LETTERS = 64


def key_of(sequence: bytes) -> str:
    """SHA-256 of the sequence, `_` and its length (biotrainer 1.4.0, utilities/hashing.py)."""
    return hashlib.sha256(b"%s_%d" % (sequence, len(sequence))).hexdigest()


def write(selection: Selection, target: Path) -> None:
    keyed_h5.write(selection, target, always_named=True)


def is_hash(key: str, letters: int) -> bool:
    return len(key) == letters and set(key) <= set("0123456789abcdef")


def read(path: Path) -> Iterator[Entry]:
    """Its keys may be names as well (store_by_hash=False): then they join by name."""
    for entry in keyed_h5.read(path):
        yield entry if is_hash(entry.key, HASH_LETTERS) else replace(entry, key="")


def recognises(path: Path) -> bool:
    first = keyed_h5.first_of(path)
    return first is not None and first[1] and is_hash(first[0], HASH_LETTERS)


LAYOUT = Layout(
    "biotrainer", "biotrainer's HDF5, a dataset per distinct sequence under its SHA-256", ".biotrainer.h5",
    KINDS, write, read, hdf5.provenance, recognises, key_of=key_of,
)  # fmt: skip
