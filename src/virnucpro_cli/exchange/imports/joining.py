"""Which entry of a source is which record of a FASTA: by its sequence, its key, or its name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter

import numpy as np

from virnucpro_cli import fasta
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.exchange.imports.source import READINGS, Int64, Source
from virnucpro_cli.exchange.layouts.layout import Entry, Keys, possible
from virnucpro_cli.store import schema

NOWHERE, SEVERAL = -1, -2


@dataclass(frozen=True)
class Way:
    """How entries and records are matched: of(entry) and texts(start, stop) of records are equal where they match."""

    how: str
    of: Callable[[Entry], str]
    texts: Callable[[int, int], Iterable[str]]

    def check(self, entries: list[Entry], records: Int64, which: Int64) -> None:
        """Raise UserError unless records (int64 [k]) match entries[which], by their texts and not by a hash alone."""
        breaks = np.flatnonzero(np.diff(records) != 1) + 1
        for start, stop in pairwise([0, *breaks.tolist(), len(records)] if len(records) else []):
            first = int(records[start])
            texts = self.texts(first, first + stop - start)
            for record, (text, entry) in enumerate(zip(texts, which[start:stop].tolist(), strict=True), first):
                if text != self.of(entries[entry]):
                    both = f"Record {record + 1:,} of the FASTA and {entries[entry].name!r}"
                    raise UserError(
                        f"{both} have one hash by {self.how}, and differ.", "This is chance: run the import again."
                    )


def joined(source: Source, table: fasta.RecordTable, full: bool, notes: list[str]) -> tuple[Int64, Way]:
    """The entry of each of the N records, and how it was found. Raises UserError if no record has one.

    int64 [N]: an entry's number, NOWHERE, or SEVERAL where a name does not tell.
    """

    hashes = partial(schema.hashes, len(table))
    names, layout = partial(table.names, full=full), source.layout
    key_of, longest = layout.key_of, layout.longest
    if key_of is not None and source.keyed:
        way = Way("sequence", attrgetter("key"), lambda a, b: map(key_of, table.sequences(a, b)))
        theirs, ours = source.keys, hashes(way.texts)
        entry_of = _match(theirs, ours, by_content=True)
    else:
        ways = []
        if longest and source.keyed:
            keys = Keys(names, len(table), longest)
            by_key = hashes(keys)
            alike = hashes(lambda a, b: (possible(name, longest) for name in names(a, b)))
            matches = _all_of_a_key(_match(source.keys, by_key), alike)
            ways.append((matches, source.keys, by_key, Way("key", attrgetter("key"), keys)))
        for theirs, (how, reading) in zip(source.names, READINGS, strict=True):
            read = _by_name(how, reading, names)
            ours = hashes(read.texts)
            ways.append((_match(theirs, ours), theirs, ours, read))
        entry_of, theirs, ours, way = max(ways, key=lambda way: int((way[0] >= 0).sum()))
    proteins = f"{counted(len(source), 'protein')} of {source.path}"
    if not (entry_of >= 0).any():
        remedy = "Is it the FASTA that was embedded, and is --from right?"
        raise UserError(f"None of the {proteins} is in the FASTA, by {way.how}.", remedy)
    if left_out := int((~np.isin(theirs, ours)).sum()):
        notes.append(f"{left_out:,} of {proteins} not in the FASTA (by {way.how}), and left out")
    return entry_of, way


def _by_name(how: str, reading: Callable[[str], str], names: Callable[[int, int], list[str]]) -> Way:
    return Way(how, lambda entry: reading(entry.name), lambda a, b: map(reading, names(a, b)))


def _match(theirs: Int64, ours: Int64, by_content: bool = False) -> Int64:
    """For each of ours the number of the equal one of theirs. Equal contents have equal rows; equal names need not."""
    if not by_content and np.array_equal(theirs, ours):
        return np.arange(len(ours))
    known, first, count = np.unique(theirs, return_index=True, return_counts=True)
    at = np.minimum(np.searchsorted(known, ours), len(known) - 1)
    is_there = known[at] == ours
    entry = np.where(is_there, first[at], NOWHERE)
    if not by_content:
        _, back, mine = np.unique(ours, return_inverse=True, return_counts=True)
        entry[is_there & ((count[at] > 1) | (mine[back] > 1))] = SEVERAL
    return entry


def _all_of_a_key(entry: Int64, keys: Int64) -> Int64:
    """Entries, but SEVERAL where names of several records come to one key and not all of those have an entry."""
    _, back, count = np.unique(keys, return_inverse=True, return_counts=True)
    matched = np.bincount(back, entry >= 0, len(count))
    return np.where(((matched > 0) & (matched < count))[back], SEVERAL, entry)
