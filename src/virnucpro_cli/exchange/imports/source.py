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
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.exchange.layouts.layout import Entry, Format, What
from virnucpro_cli.store.reader import accession

Int64 = NDArray[np.int64]
LAST = -1
"""The layer, where nobody says which: taken to be the last one."""
BATCH, BATCH_BYTES = 4096, 1 << 26


READINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("name", str),
    ("first word of the name", lambda name: "".join(name.split(None, 1)[:1])),
    ("name with _ for / and .", lambda name: re.sub(r"[/.]", "_", "".join(name.split(None, 1)[:1]))),  # ProtTrans
    ("UniProt accession", accession),
)
"""How names of a file and of a FASTA are made comparable; the first that finds most is taken."""


@dataclass
class Source:
    """What is in the source, M entries. take: (kind, layer or None) of the source -> kind and layer in the file.

    keys: int64 [M], hashes of what entries are known by if not by name; names: the same of each of READINGS; lengths: residues, -1
    where not said; sizes: rows of residues; reasons: uint8, why an entry has no embedding.
    """

    take: dict[tuple[str, int | None], What]
    hidden: int
    dtype: np.dtype[Any]
    keyed: bool
    keys: Int64
    names: list[Int64]
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


@contextmanager
def reading_of(source: str, layout: Format) -> Iterator[None]:
    """What libraries say of files that are damaged, or of another layout."""
    try:
        yield
    except UserError:
        raise
    except store.DAMAGE as error:
        raise UserError(
            f"{source} cannot be read as {layout.name}: {in_a_line(error)}.",
            "Is it whole, and of that layout? Say of which one: --from LAYOUT",
        ) from None


def look(source: str, layout: Format, said: dict[str, Any], layer: int | None) -> Source:
    """The first pass: names, shapes and reasons; rows are read only where the layout cannot do without."""
    keys, lengths, sizes, reasons = array("q"), array("q"), array("q"), array("B")
    names = [array("q") for _ in READINGS]
    take: dict[tuple[str, int | None], What] = {}
    hidden = name_bytes = 0
    keyed = True
    dtype = np.dtype(np.float16)
    with reading_of(source, layout):
        for entry in layout.read(Path(source)):
            if not take:
                take = _taken(source, entry, said.get("layer"), layer)
                hidden = entry.values[next(iter(take))].shape[-1]
            size = 0
            for what, (kind, _) in take.items():
                rows = entry.values.get(what)
                shape = None if rows is None else rows.shape
                size = shape[0] if shape and kind == "residue" else size
                if (
                    rows is None
                    or rows.dtype.kind != "f"
                    or shape != ((size, hidden) if kind == "residue" else (hidden,))
                ):
                    other = "nothing" if rows is None else f"{rows.dtype} of shape {shape}"
                    raise ValueError(f"{entry.name!r} has {other} for its {kind} of {hidden} numbers, as others have")
                dtype = np.result_type(dtype, rows.dtype)
            keyed &= bool(entry.key)
            keys.append(hash(entry.key))
            for known, (_, reading) in zip(names, READINGS, strict=True):
                known.append(hash(reading(entry.name)))
            lengths.append(-1 if entry.length is None else entry.length)
            sizes.append(size)
            known_reason = entry.skipped in store.REASONS
            reasons.append(store.REASONS.index(entry.skipped) if known_reason else store.NOT_FINITE)
            name_bytes += len(entry.name.encode())
    if not take:
        raise UserError(f"{source} holds no protein.", "Is it the file that is meant?")
    return Source(
        take, hidden, np.dtype(np.float16 if dtype == np.float16 else np.float32), keyed,
        np.frombuffer(keys, np.int64), [np.frombuffer(known, np.int64) for known in names],
        np.frombuffer(lengths, np.int64), np.frombuffer(sizes, np.int64), np.frombuffer(reasons, np.uint8), name_bytes,
    )  # fmt: skip


def _taken(source: str, entry: Entry, said: int | None, asked: int | None) -> dict[tuple[str, int | None], What]:
    if asked is not None and said is not None and asked != said:
        raise UserError(f"{source} says that it is of layer {said}.", f"Leave --layer {asked} out.")
    unsaid = next(layer for layer in (said, asked, LAST) if layer is not None)
    take = {(kind, layer): (kind, unsaid if layer is None else layer) for kind, layer in entry.values}
    chosen = {what: to for what, to in take.items() if asked is None or to[1] == asked}
    if not chosen:
        there = ", ".join(str(layer) for _, layer in take.values())
        raise UserError(f"{source} has no layer {asked}.", f"It has {there}: --layer {next(iter(take.values()))[1]}")
    return chosen


@dataclass
class Batch:
    """Neighbouring entries, without their values, and the rows of each."""

    entries: list[Entry]
    rows: list[dict[What, NDArray[Any]]]

    def __len__(self) -> int:
        return len(self.rows)


def batches(source: str, layout: Format, found: Source) -> Iterator[Batch]:
    """The second pass: the rows of all entries in order, in the dtype of the file."""
    batch = Batch([], [])
    size = 0
    with reading_of(source, layout), np.errstate(over="ignore"):
        for entry in layout.read(Path(source)):
            rows = {to: np.asarray(entry.values[what]).astype(found.dtype) for what, to in found.take.items()}
            batch.rows.append(rows)
            batch.entries.append(replace(entry, values={}))
            size += sum(each.nbytes for each in rows.values())
            if len(batch) == BATCH or size > BATCH_BYTES:
                yield batch
                batch, size = Batch([], []), 0
    yield batch
