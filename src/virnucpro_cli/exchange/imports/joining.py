"""Which entry of a source is which record of a FASTA: by its sequence, by its key, or by its name, read in one way or another."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter

import numpy as np

from virnucpro_cli import fasta, store
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.exchange.imports.source import READINGS, Int64, Source
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Keys, possible

NOWHERE, SEVERAL = -1, -2


@dataclass(frozen=True)
class Way:
    """How entries and records are matched: of(entry) and texts(start, stop) of records are equal where they belong together."""

    how: str
    of: Callable[[Entry], str]
    texts: Callable[[int, int], Iterable[str]]

    def check(self, entries: list[Entry], records: Int64, which: Int64) -> None:
        """Raise UserError unless records [k] are of entries[which], by their texts and not by a hash alone."""
        for start, stop in pairwise([0, *(np.flatnonzero(np.diff(records) != 1) + 1).tolist(), len(records)]):
            if start == stop:
                continue
            first = int(records[start])
            ours = self.texts(first, first + stop - start)
            for record, (text, entry) in enumerate(zip(ours, which[start:stop].tolist(), strict=True), first):
                if text != self.of(entries[entry]):
                    raise UserError(
                        f"Record {record + 1:,} of the FASTA and {entries[entry].name!r} have one hash by {self.how}, and differ.",
                        "This is chance: run the import again.",
                    )


def joined(
    source: str, layout: Format, found: Source, table: fasta.RecordTable, full: bool, notes: list[str]
) -> tuple[Int64, Way]:  # fmt: skip
    """For each record of the FASTA the entry that is its, NOWHERE, or SEVERAL where a name does not tell; and how that was found."""

    def hashes(read: Callable[[int, int], Iterable[str]]) -> Int64:
        every = store.blocks(len(table))
        return np.concatenate([np.fromiter(map(hash, read(each.start, each.stop)), np.int64) for each in every])

    names = partial(table.names, full=full)
    if layout.key_of is not None and found.keyed:
        key_of = layout.key_of
        way = Way("sequence", attrgetter("key"), lambda a, b: map(key_of, table.sequences(a, b)))
        theirs, ours = found.keys, hashes(way.texts)
        best = _match(theirs, ours, by_content=True)
    else:
        ways = []
        if layout.longest and found.keyed:
            keys = Way("key", attrgetter("key"), Keys(names, len(table), layout.longest))
            ours = hashes(keys.texts)
            alike = hashes(lambda a, b: (possible(name, layout.longest) for name in names(a, b)))
            ways.append((_all_of_a_key(_match(found.keys, ours), alike), found.keys, ours, keys))
        for theirs, (how, reading) in zip(found.names, READINGS, strict=True):
            read = Way(how, partial(_read_name, reading), partial(_read_names, reading, names))
            ours = hashes(read.texts)
            ways.append((_match(theirs, ours), theirs, ours, read))
        best, theirs, ours, way = max(ways, key=lambda way: int((way[0] >= 0).sum()))
    if not (best >= 0).any():
        raise UserError(
            f"None of the {counted(len(found), 'protein')} of {source} is in the FASTA, by {way.how}.",
            "Is it the FASTA that was embedded, and is --from right?",
        )
    if left_out := int((~np.isin(theirs, ours)).sum()):
        notes.append(
            f"{left_out:,} of {counted(len(found), 'protein')} of {source} not in the FASTA (by {way.how}), and left out"
        )
    return best, way


def _read_name(reading: Callable[[str], str], entry: Entry) -> str:
    return reading(entry.name)


def _read_names(
    reading: Callable[[str], str], names: Callable[[int, int], list[str]], start: int, stop: int
) -> Iterable[str]:
    return map(reading, names(start, stop))


def _match(theirs: Int64, ours: Int64, by_content: bool = False) -> Int64:
    """For each of ours the number of the one of theirs that is equal. Equal contents have equal rows; equal names need not."""
    if not by_content and np.array_equal(theirs, ours):
        return np.arange(len(ours))
    known, first, count = np.unique(theirs, return_index=True, return_counts=True)
    at = np.minimum(np.searchsorted(known, ours), len(known) - 1)
    there = known[at] == ours
    entry = np.where(there, first[at], NOWHERE)
    if not by_content:
        _, back, mine = np.unique(ours, return_inverse=True, return_counts=True)
        entry[there & ((count[at] > 1) | (mine[back] > 1))] = SEVERAL
    return entry


def _all_of_a_key(entry: Int64, keys: Int64) -> Int64:
    """The same, but where the names of several records come to one key, and not all of them are in the file, nobody knows whose those are."""
    _, back, count = np.unique(keys, return_inverse=True, return_counts=True)
    there = np.bincount(back, entry >= 0, len(count))
    return np.where(((there > 0) & (there < count))[back], SEVERAL, entry)
