"""Which entry of a source is which record of a FASTA: by its sequence, by its key, or by its name, read in one way or another."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from virnucpro_cli import fasta, store
from virnucpro_cli.errors import UserError
from virnucpro_cli.imports.source import READINGS, Found, Int64
from virnucpro_cli.layouts.layout import Keys, Layout, possible

NOWHERE, SEVERAL = -1, -2


def joined(
    source: str, layout: Layout, found: Found, table: fasta.RecordTable, full: bool, notes: list[str]
) -> Int64:  # fmt: skip
    """For each record of the FASTA the entry that is its, NOWHERE, or SEVERAL where a name does not tell."""

    def hashes(read: Callable[[int, int], Iterable[str]]) -> Int64:
        every = store.blocks(len(table))
        return np.concatenate([np.fromiter(map(hash, read(each.start, each.stop)), np.int64) for each in every])

    names = partial(table.names, full=full)
    if layout.key_of is not None and found.keyed:
        key_of = layout.key_of
        theirs, ours, how = found.keys, hashes(lambda a, b: map(key_of, table.sequences(a, b))), "sequence"
        best = _match(theirs, ours, by_content=True)
    else:
        ways = []
        if layout.longest and found.keyed:
            ours = hashes(Keys(names, len(table), layout.longest))
            alike = hashes(lambda a, b: (possible(name, layout.longest) for name in names(a, b)))
            ways.append((_all_of_a_key(_match(found.keys, ours), alike), found.keys, ours, "key"))
        for theirs, (how, reading) in zip(found.names, READINGS, strict=True):
            ours = hashes(lambda a, b, reading=reading: map(reading, names(a, b)))  # type: ignore[misc]
            ways.append((_match(theirs, ours), theirs, ours, how))
        best, theirs, ours, how = max(ways, key=lambda way: int((way[0] >= 0).sum()))
    if not (best >= 0).any():
        raise UserError(
            f"None of the {len(found):,} proteins of {source} is in the FASTA, by {how}.",
            "Is it the FASTA that was embedded, and is --from right?",
        )
    if left_out := int((~np.isin(theirs, ours)).sum()):
        notes.append(
            f"{left_out:,} of {len(found):,} proteins of {source} are not in the FASTA (by {how}) and are left out"
        )
    return best


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
