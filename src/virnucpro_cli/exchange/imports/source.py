"""The source of an import, read twice: once for what is in it, and once for the rows."""

import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.errors import DAMAGE, UserError, in_a_line
from virnucpro_cli.exchange.layouts.layout import Entry, Format, What
from virnucpro_cli.store.reader import accession

Int64 = NDArray[np.int64]
LAST = -1
"""The layer, where nobody says which: taken to be the last one."""
BATCH, BATCH_BYTES = 4096, 1 << 26


def _first_word(name: str) -> str:
    return "".join(name.split(None, 1)[:1])


READINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("name", str),
    ("first word of the name", _first_word),
    ("name with _ for / and .", lambda name: re.sub(r"[/.]", "_", _first_word(name))),  # ProtTrans
    ("UniProt accession", accession),
)
"""How names of a file and of a FASTA are made comparable; the first that finds most is taken."""


@dataclass
class Source:
    """A file or folder of M entries. take: (kind, layer or None) of the source -> kind and layer to store.

    keyed: whether every entry has a key; keys: int64 [M], their hashes; names: int64 [R, M], hashes of names as each
    of READINGS has them; lengths: int64 [M], residues, -1 where not said; sizes: int64 [M], rows of residues;
    reasons: uint8 [M], why an entry has no embedding.
    """

    path: str
    layout: Format
    take: dict[tuple[str, int | None], What]
    hidden: int
    dtype: np.dtype[Any]
    keyed: bool
    keys: Int64
    names: Int64
    lengths: Int64
    sizes: Int64
    reasons: NDArray[np.uint8]
    name_bytes: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for kind, _ in self.take.values()))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for _, layer in self.take.values()}))

    def batches(self) -> Iterator[list[Entry]]:
        """The second pass: entries in order, with values by kind and layer, [D] or [L, D] in the dtype of the file."""
        batch: list[Entry] = []
        size = 0
        with reading_of(self.path, self.layout), np.errstate(over="ignore"):
            for entry in self.layout.read(Path(self.path)):
                rows: dict[tuple[str, Any], Any] = {
                    to: np.asarray(entry.values[what]).astype(self.dtype) for what, to in self.take.items()
                }
                batch.append(replace(entry, values=rows))
                size += sum(each.nbytes for each in rows.values())
                if len(batch) == BATCH or size > BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        yield batch


@contextmanager
def reading_of(path: str, layout: Format) -> Iterator[None]:
    """Raises UserError for what libraries say of files that are damaged, or of another layout."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(
            f"{path} cannot be read as {layout.name}: {in_a_line(error)}.",
            "Is it whole, and of that layout? Say of which one: --from LAYOUT",
        ) from None


def look(path: str, layout: Format, provenance: dict[str, Any], layer: int | None) -> Source:
    """The first pass: names, shapes and reasons; rows are read only where the layout cannot do without."""
    facts = array("q")  # key, length, size, reason and names of each entry
    take: dict[tuple[str, int | None], What] = {}
    hidden = name_bytes = 0
    keyed = True
    dtype: np.dtype[Any] = np.dtype(np.float16)
    with reading_of(path, layout):
        for entry in layout.read(Path(path)):
            if not take:
                take = _taken(path, entry, provenance.get("layer"), layer)
                hidden = entry.values[next(iter(take))].shape[-1]
            size = _size_of(entry, take, hidden)
            dtype = np.result_type(dtype, *(entry.values[what].dtype for what in take))
            keyed &= bool(entry.key)
            reason = store.REASONS.index(entry.skipped) if entry.skipped in store.REASONS else store.NOT_FINITE
            length = -1 if entry.length is None else entry.length
            names = (hash(reading(entry.name)) for _, reading in READINGS)
            facts.extend((hash(entry.key), length, size, reason, *names))
            name_bytes += len(entry.name.encode())
    if not take:
        raise UserError(f"{path} holds no protein.", "Is it the file that is meant?")
    keys, lengths, sizes, reasons, *names_of = np.frombuffer(facts, np.int64).reshape(-1, 4 + len(READINGS)).T
    dtype = np.dtype(np.float16 if dtype == np.float16 else np.float32)
    return Source(
        path, layout, take, hidden, dtype, keyed, keys, np.array(names_of), lengths, sizes, reasons.astype(np.uint8),
        name_bytes,
    )  # fmt: skip


def _taken(path: str, entry: Entry, said: int | None, asked: int | None) -> dict[tuple[str, int | None], What]:
    """Kinds and layers to take, by the first entry. said: the layer by the provenance; asked: by --layer."""
    if asked is not None and said is not None and asked != said:
        raise UserError(f"{path} says that it is of layer {said}.", f"Leave --layer {asked} out.")
    unsaid = next(layer for layer in (said, asked, LAST) if layer is not None)
    take = {(kind, layer): (kind, unsaid if layer is None else layer) for kind, layer in entry.values}
    chosen = {what: to for what, to in take.items() if asked is None or to[1] == asked}
    if not chosen:
        there = ", ".join(str(layer) for _, layer in take.values())
        raise UserError(f"{path} has no layer {asked}.", f"It has {there}: --layer {next(iter(take.values()))[1]}")
    return chosen


def _size_of(entry: Entry, take: dict[tuple[str, int | None], What], hidden: int) -> int:
    """Rows of residues of an entry, 0 without them. Raises ValueError for values shaped unlike those of others."""
    size = 0
    for what, (kind, _) in take.items():
        rows = entry.values.get(what)
        shape: tuple[int, ...] = () if rows is None else rows.shape
        if kind == "residue" and shape:
            size = size or shape[0]
        if rows is None or rows.dtype.kind != "f" or shape != ((size, hidden) if kind == "residue" else (hidden,)):
            other = "nothing" if rows is None else f"{rows.dtype} of shape {shape}"
            raise ValueError(f"{entry.name!r} has {other} for its {kind} of {hidden} numbers, as others have")
    return size
