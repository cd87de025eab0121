"""The stage folder of a bio_embeddings pipeline: HDF5 datasets under the MD5 of the sequence, and a table of what is what."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

from virnucpro_cli.exchange.layouts import biotrainer, hdf5, keyed_h5
from virnucpro_cli.exchange.layouts.layout import Entry, Layout, Selection
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.store import DONE, blocks

POOLED_FILE, RESIDUE_FILE = "reduced_embeddings_file.h5", "embeddings_file.h5"
MAPPING = "mapping_file.csv"
HASH_LETTERS = 32


def key_of(sequence: bytes) -> str:
    return hashlib.md5(sequence, usedforsecurity=False).hexdigest()


def write(selection: Selection, target: Path) -> None:
    """The table has a line for each protein; those that share a dataset share its key."""
    target.mkdir()
    keyed_h5.write(
        selection, target / (RESIDUE_FILE if selection.kinds == ("residue",) else POOLED_FILE), always_named=True
    )
    with open(target / MAPPING, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["", "original_id", "sequence_length"])
        for rows in blocks(len(selection.file)):
            there = selection.file.status[rows] == DONE
            lines = zip(
                selection.keys(rows.start, rows.stop), selection.file.names_of(rows.start, rows.stop),
                selection.file.lengths[rows].tolist(), strict=True,
            )  # fmt: skip
            table.writerows(compress(lines, there))


def _file(path: Path) -> Path:
    """The HDF5 file that is meant: the path itself, or the one in the folder."""
    if not path.is_dir():
        return path
    there = [path / name for name in (POOLED_FILE, RESIDUE_FILE) if (path / name).is_file()]
    if len(there) != 1:
        raise ValueError(f"it holds {len(there)} of {POOLED_FILE} and {RESIDUE_FILE}: name the file that is meant")
    return there[0]


def read(path: Path) -> Iterator[Entry]:
    """Its keys may be numbers as well (simple_remapping): then they join by name."""
    for entry in keyed_h5.read(_file(path)):
        yield entry if biotrainer.is_hash(entry.key, HASH_LETTERS) else replace(entry, key="")


def provenance(path: Path) -> dict[str, Any]:
    return hdf5.provenance(_file(path))


def recognises(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in (POOLED_FILE, RESIDUE_FILE))
    first = keyed_h5.first_of(path)
    return (
        first is not None
        and "original_id" in first[1]
        and (biotrainer.is_hash(first[0], HASH_LETTERS) or first[0].isdigit())
    )


LAYOUT = Layout(
    "bio-embeddings", "bio_embeddings' folder, a dataset per distinct sequence under its MD5", ".bio-embeddings",
    KINDS, write, read, provenance, recognises, folder=True, key_of=key_of,
)  # fmt: skip
