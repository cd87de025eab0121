"""A layout, and what passes between layouts and the workflows that write and read them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import counted, shortened
from virnucpro_cli.kinds import POOLED
from virnucpro_cli.store import DONE, REASONS, STATUS_NAMES, EmbeddingFile, blocks
from virnucpro_cli.store.schema import hashes

What = tuple[str, int]
"""Pooling kind and layer."""
Names = Callable[[int, int], list[str]]
"""Names, or keys, of a range of records."""


@dataclass(frozen=True)
class Entry:
    """A protein as a file holds it. values: (kind, layer) -> [D], or [L, D] of residues, perhaps read on use only.

    layer: None where the layout has no place for it; key: known by the layout instead of a name; length: residues,
    where the file says so; skipped: why it has no embedding.
    """

    name: str
    values: dict[tuple[str, Any], Any]
    key: str = ""
    length: int | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Block:
    """Neighbouring records, n of them. numbers: int64 [n]; sizes: int64 [n], rows of residues (1 if there are none).

    rows: pooled [n, D], or of residues [sum of sizes, D], in the dtype of the file.
    """

    numbers: NDArray[np.int64]
    names: list[str]
    keys: list[str]
    sizes: NDArray[np.int64]
    rows: dict[What, NDArray[Any]]

    def each(self) -> Iterator[tuple[int, str, str, dict[What, NDArray[Any]]]]:
        """(number, name, key, values) of every record. Values are fp16 or fp32, [D] or [L, D] of residues."""
        ends = np.cumsum(self.sizes).tolist()
        for i, (number, end, size) in enumerate(zip(self.numbers.tolist(), ends, self.sizes.tolist(), strict=True)):
            values = {
                what: rows[end - size : end] if what[0] == "residue" else rows[i] for what, rows in self.rows.items()
            }
            yield number, self.names[i], self.keys[i], values


@dataclass
class Selection:
    """The part of an embeddings file that is exported. keys: what the layout knows records by.

    shared: records that found their dataset there, written for an identical protein.
    """

    file: EmbeddingFile
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    keys: Names
    provenance: dict[str, Any]
    advance: Callable[[int], None] = lambda records: None
    shared: int = field(default=0, init=False)

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

    def facts(self, number: int) -> tuple[Any, str, str, Any]:
        """Length, status, reason and flags of a record, as tables have them."""
        file = self.file
        return file.lengths[number], STATUS_NAMES[file.status[number]], REASONS[file.reason[number]], file.flags[number]

    def rows(self, skipped: bool) -> int:
        """How many rows of the first kind there are, those of skipped records among them or not."""
        wanted = np.ones(len(self.file), np.bool_) if skipped else self.file.status == DONE
        return int(np.diff(self.file.residue_offsets)[wanted].sum() if self.kinds[0] == "residue" else wanted.sum())

    def blocks(self, skipped: bool = False) -> Iterator[Block]:
        """The records in order, chunk by chunk; skipped ones, with rows that are NaN, if they are wanted."""
        residues, file = "residue" in self.kinds, self.file
        offsets = file.residue_offsets if residues else np.arange(len(file) + 1)
        for chunk in file.chunks("residue" if residues else self.kinds[0]):
            start, stop, rows = chunk.start, chunk.stop, {}
            wanted = np.ones(stop - start, np.bool_) if skipped else file.status[chunk] == DONE
            kept, sizes = np.flatnonzero(wanted), np.diff(offsets[start : stop + 1])
            for kind, layer in self.whats:
                data = file.dataset(kind, layer)
                if kind == "residue":
                    rows[kind, layer] = data[offsets[start] : offsets[stop]][np.repeat(wanted, sizes)]
                else:
                    rows[kind, layer] = data[chunk][wanted]
            names, keys = file.names_of(start, stop), self.keys(start, stop)
            yield Block(kept + start, [names[i] for i in kept], [keys[i] for i in kept], sizes[kept], rows)
            self.advance(stop - start)


@dataclass(frozen=True)
class Format:
    """A layout of files. Adding one is adding a module with this, and a line in `layouts.LAYOUTS`.

    what: in a few words; suffix: of the default target; write(selection, target); read(path); recognises(path);
    kinds: those that it has room for; provenance(path): as an earlier export wrote it; folder: the target is one;
    several: room for more than one kind and layer; longest: bytes of a name that is a key or a file name, else 0;
    key_of: the key of a sequence, if keys are not names; beside: suffix of a file that lies beside the target;
    is_beside(path): whether such a file is export's.
    """

    name: str
    what: str
    suffix: str
    write: Callable[[Selection, Path], None]
    read: Callable[[Path], Iterator[Entry]]
    recognises: Callable[[Path], bool]
    kinds: tuple[str, ...] = tuple(POOLED)
    provenance: Callable[[Path], dict[str, Any]] = lambda path: {}
    folder: bool = False
    several: bool = False
    holds_skipped: bool = False
    longest: int = 0
    key_of: Callable[[bytes], str] | None = None
    beside: str = ""
    is_beside: Callable[[Path], bool] = lambda path: False


def begins(magic: bytes) -> Callable[[Path], bool]:
    """Tells of a path whether it is a file that begins with these bytes."""

    def recognises(path: Path) -> bool:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic

    return recognises


def entry_of(facts: dict[str, Any], row: Any) -> Entry:
    """An entry from its line of a table: `id`, and kind, layer, length, status and reason where they are."""
    layer, length = (int(facts[name]) if facts.get(name) not in (None, "") else None for name in ("layer", "length"))
    skipped = str(facts.get("reason") or "") if facts.get("status") == "skipped" else ""
    return Entry(str(facts["id"]), {(facts.get("kind") or "mean", layer): row}, length=length, skipped=skipped)


# --- names as keys ---------------------------------------------------------------------------------------------------


def possible(name: str, longest: int) -> str:
    """The name as an HDF5 key or a file name of so many bytes at most.

    `/` and what cannot be printed become `_`. A name that is too long is cut, and ends in a hash of all of it.
    """
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

    Holds the keys that have a number, and 8 bytes a record while it is made.
    """

    def __init__(self, names: Names, count: int, longest: int, possible: Callable[[str, int], str] = possible):
        self._names, self._longest, self._possible = names, longest, possible
        self._numbered: dict[int, str] = {}
        self.changed = 0
        self.examples: list[str] = []
        every = hashes(count, lambda start, stop: (possible(name, longest) for name in names(start, stop)))
        taken, first = np.unique(every, return_index=True)
        repeats = np.ones(count, np.bool_)
        repeats[first] = False
        self._number(repeats, taken)

    def _number(self, repeats: NDArray[np.bool_], taken: NDArray[np.int64]) -> None:
        """Give each repeat [N] a key with a number; taken: sorted hashes of all keys without one."""
        numbered: set[str] = set()
        last: dict[str, int] = {}
        for block in blocks(len(repeats)):
            records = block.start + np.flatnonzero(repeats[block])
            names = self._names(block.start, block.stop) if len(records) else []
            for record in records.tolist():
                key = self._possible(names[record - block.start], self._longest - 12)
                number = last.get(key, 1) + 1
                while f"{key}_{number}" in numbered or _is_among(hash(f"{key}_{number}"), taken):
                    number += 1
                last[key] = number
                self._numbered[record] = f"{key}_{number}"
                numbered.add(f"{key}_{number}")

    def __call__(self, start: int, stop: int) -> list[str]:
        keys = []
        for record, name in enumerate(self._names(start, stop), start=start):
            key = self._numbered.get(record) or self._possible(name, self._longest)
            if key != name:
                self.changed += 1
                self.examples = [*self.examples, f"{name!r} is {key!r}"][:3]
            keys.append(key)
        return keys

    @property
    def described(self) -> str:
        """Words for the names that were changed; empty if none was."""
        what = f"{counted(self.changed, 'name')} changed to be possible and unique: {', '.join(self.examples)}"
        return shortened(what) if self.changed else ""


def _is_among(value: int, ordered: NDArray[np.int64]) -> bool:
    at = int(np.searchsorted(ordered, value))
    return at < len(ordered) and bool(ordered[at] == value)
