"""What a layout is, and what passes between layouts and the workflows that write and read them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import counted
from virnucpro_cli.store import DONE, NAME_BLOCK, REASONS, STATUS_NAMES, EmbeddingFile, blocks

What = tuple[str, int]
"""Pooling kind and layer."""


@dataclass(frozen=True)
class Entry:
    """A protein as a file holds it. values: (kind, layer) -> [D], or [L, D] of residues, perhaps not read before it is used.

    layer: None where the layout has no place for it; key: what the layout knows it by instead of a name; length: residues,
    where the file says so; skipped: why it has no embedding.
    """

    name: str
    values: dict[tuple[str, int | None], Any]
    key: str = ""
    length: int | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Block:
    """Neighbouring records, n of them. numbers: int64 [n]; rows: pooled [n, D], or of residues [sum of sizes, D]."""

    numbers: NDArray[np.int64]
    names: list[str]
    keys: list[str]
    sizes: NDArray[np.int64]
    rows: dict[What, NDArray[Any]]

    def each(self) -> Iterator[tuple[int, str, str, dict[What, NDArray[Any]]]]:
        """(number, name, key, its values) of every record."""
        bounds = pairwise([0, *np.cumsum(self.sizes).tolist()])
        for i, (number, (a, b)) in enumerate(zip(self.numbers.tolist(), bounds, strict=True)):
            values = {what: rows[a:b] if what[0] == "residue" else rows[i] for what, rows in self.rows.items()}
            yield number, self.names[i], self.keys[i], values


@dataclass
class Selection:
    """What of an embeddings file is exported. keys(start, stop) gives what the layout knows records by."""

    file: EmbeddingFile
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    keys: Callable[[int, int], list[str]]
    provenance: dict[str, Any]
    advance: Callable[[int], None] = lambda records: None
    shared: int = field(
        default=0, init=False
    )  # records that found their dataset there, written for an identical protein

    @property
    def whats(self) -> list[What]:
        return [(kind, layer) for kind in self.kinds for layer in self.layers]

    @property
    def what(self) -> What:
        """The kind and layer, for a layout that has room for one."""
        return self.whats[0]

    @property
    def width(self) -> int:
        return int(self.file.dataset(*self.what).shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.file.dataset(*self.what).dtype

    def said(self, number: int) -> tuple[Any, str, str, Any]:
        """Length, status, reason and flags of a record, as tables have them."""
        file = self.file
        return file.lengths[number], STATUS_NAMES[file.status[number]], REASONS[file.reason[number]], file.flags[number]

    def count(self, skipped: bool) -> int:
        """How many records there are, those without an embedding among them or not."""
        return len(self.file) if skipped else int((self.file.status == DONE).sum())

    def rows(self, skipped: bool) -> int:
        """How many rows of the one kind those records have."""
        if self.kinds[0] != "residue":
            return self.count(skipped)
        sizes = np.diff(self.file.residue_offsets)
        return int((sizes if skipped else sizes[self.file.status == DONE]).sum())

    def blocks(self, skipped: bool = False) -> Iterator[Block]:
        """The records in order, a stretch after the other; skipped ones, with rows that are NaN, if they are wanted."""
        residues = "residue" in self.kinds
        offsets = self.file.residue_offsets if residues else None
        for stretch in self.file.chunks("residue" if residues else self.kinds[0]):
            start, stop = stretch.start, stretch.stop
            wanted = np.ones(stop - start, np.bool_) if skipped else self.file.status[stretch] == DONE
            sizes = np.ones(stop - start, np.int64) if offsets is None else np.diff(offsets[start : stop + 1])
            kept, rows = np.flatnonzero(wanted), {}
            for kind, layer in self.whats:
                data = self.file.dataset(kind, layer)
                if kind == "residue" and offsets is not None:
                    rows[kind, layer] = data[offsets[start] : offsets[stop]][np.repeat(wanted, sizes)]
                else:
                    rows[kind, layer] = data[stretch][wanted]
            names, keys = self.file.names_of(start, stop), self.keys(start, stop)
            yield Block(kept + start, [names[i] for i in kept], [keys[i] for i in kept], sizes[kept], rows)
            self.advance(stop - start)


@dataclass(frozen=True)
class Format:
    """A layout of files. Adding one is adding a module with this, and a line in `layouts.LAYOUTS`.

    what: in a few words; suffix: of the default target; folder: whether the target is one; kinds: what it has room for;
    several: for more than one layer at once; longest: bytes of a name that is a key or a file name (0: it is neither);
    key_of: what it knows a sequence by, if not by a name; beside: suffix of a file that lies beside the target;
    is_beside(path): whether such a file is export's;
    write(selection, target), read(path), provenance(path) as of an earlier export, recognises(path).
    """

    name: str
    what: str
    suffix: str
    kinds: tuple[str, ...]
    write: Callable[[Selection, Path], None]
    read: Callable[[Path], Iterator[Entry]]
    provenance: Callable[[Path], dict[str, Any]]
    recognises: Callable[[Path], bool]
    folder: bool = False
    several: bool = False
    holds_skipped: bool = False
    longest: int = 0
    key_of: Callable[[bytes], str] | None = None
    beside: str = ""
    is_beside: Callable[[Path], bool] = lambda path: False


# --- parts that layouts share ----------------------------------------------------------------------------------------


def begins(path: Path, magic: bytes) -> bool:
    """Whether it is a file that begins with these bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def entry_of(said: dict[str, Any], row: Any) -> Entry:
    """An entry by what a table says of it: `id`, and kind, layer, length, status and reason where they are."""
    layer, length = (int(said[name]) if said.get(name) not in (None, "") else None for name in ("layer", "length"))
    skipped = str(said.get("reason") or "") if said.get("status") == "skipped" else ""
    return Entry(str(said["id"]), {(said.get("kind") or "mean", layer): row}, length=length, skipped=skipped)


def no_provenance(path: Path) -> dict[str, Any]:
    """Of a layout that has no place for it."""
    return {}


# --- names as keys ---------------------------------------------------------------------------------------------------


def possible(name: str, longest: int) -> str:
    """The name, made possible as an HDF5 key or a file name of so many bytes at most: `/` and what cannot be printed become `_`,
    what is too long is cut and ends in a hash of all of it."""
    if "/" in name or not name.isprintable():
        name = "".join(c if c != "/" and c.isprintable() else "_" for c in name)
    if name in ("", ".", ".."):
        name = "_" * max(1, len(name))
    if len(name.encode()) > longest:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name.encode()[: longest - 17].decode(errors='ignore')}-{digest}"
    return name


def encodable(name: str) -> str:
    """The name with `_` for each letter that names of files cannot have in this locale."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "".join(c if c.isascii() else "_" for c in name)
    return name


class Keys:
    """A key for every record: its name, made possible, with `_2` or a higher number behind it if an earlier one has it.

    names(start, stop) gives those of a range; possible(name, longest) makes a key of one. Holds 8 bytes a record while it is made, and
    the keys that have a number.
    """

    def __init__(
        self,
        names: Callable[[int, int], list[str]],
        count: int,
        longest: int,
        possible: Callable[[str, int], str] = possible,
    ):
        self._names, self._longest, self._possible = names, longest, possible
        self._numbered: dict[int, str] = {}
        self.changed = 0
        self.examples: list[tuple[str, str]] = []
        hashes = np.empty(count, np.int64)
        for block in blocks(count):
            hashes[block] = [hash(possible(name, longest)) for name in names(block.start, block.stop)]
        taken, first, back = np.unique(hashes, return_index=True, return_inverse=True)
        again = np.flatnonzero(first[back] != np.arange(count))
        self._number(again, taken)

    def _number(self, again: NDArray[np.int64], taken: NDArray[np.int64]) -> None:
        new: set[str] = set()
        last: dict[str, int] = {}

        def free(key: str) -> bool:
            at = int(np.searchsorted(taken, hash(key)))
            return key not in new and (at == len(taken) or taken[at] != hash(key))

        for block in np.split(again, np.flatnonzero(np.diff(again // NAME_BLOCK)) + 1) if len(again) else []:
            start = int(block[0])
            names = self._names(start, int(block[-1]) + 1)
            for record in block.tolist():
                key = self._possible(names[record - start], self._longest - 12)
                number = last.get(key, 1) + 1
                while not free(f"{key}_{number}"):
                    number += 1
                last[key] = number
                self._numbered[record] = f"{key}_{number}"
                new.add(f"{key}_{number}")

    def __call__(self, start: int, stop: int) -> list[str]:
        keys = []
        for record, name in enumerate(self._names(start, stop), start=start):
            key = self._numbered.get(record) or self._possible(name, self._longest)
            if key != name:
                self.changed += 1
                if len(self.examples) < 3:
                    self.examples.append((name, key))
            keys.append(key)
        return keys

    @property
    def told(self) -> str:
        """Words for the names that were changed; empty if none was."""
        shown = ", ".join(f"{name!r} is {key!r}" for name, key in self.examples)
        return f"{counted(self.changed, 'name')} changed to be possible and unique: {shown}" if self.changed else ""
