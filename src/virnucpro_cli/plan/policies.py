"""The user's policies applied to the record table: records skipped, cut or copied, and the segments that follow."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.plan.packing import (
    SPECIAL_TOKENS,
    Numbers,
    Segments,
    numbers_below,
    whole_segments,
    windowed_segments,
)

Int64 = NDArray[np.int64]
POLICIES = ("max_residues", "long", "overlap", "invalid", "gaps", "id", "dedup")
"""Settings that decide, besides the sequences, about each record; overlap: of `--long window` only."""
AT_ONCE = 1 << 20
"""Records of which something is worked out at once, so that memory does not grow with the input."""


@dataclass(frozen=True)
class Decisions:
    """The proteins to embed: per-record decisions, and the segments and packs that follow from them.

    representative: int32 or int64 [N], the record that is computed in a record's stead: itself or an identical earlier
    one. embedded: int32 [N], residues that are embedded; flags: uint16 [N]; status, reason: uint8 [N].
    """

    representative: Numbers
    embedded: NDArray[np.int32]
    flags: NDArray[np.uint16]
    status: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    segments: Segments


def decide(table: RecordTable, config: EmbedConfig) -> Decisions:
    """Apply the policies: which records are skipped, how long ones are cut, which are copies.

    Raises UserError if there are long proteins and `long` is "error", or if nothing is left of a whole input.
    """
    n, kind = len(table), numbers_below(len(table))
    representative, embedded = np.empty(n, kind), np.empty(n, np.int32)
    flags, reason = np.zeros(n, np.uint16), np.empty(n, np.uint8)
    computed = [np.empty(0, kind)]
    for rows, those in representatives(table, config):
        representative[rows] = those
        reason[rows], embedded[rows] = _each(table, rows, config)
        is_kept, is_own, size = reason[rows] == 0, those == np.arange(rows.start, rows.stop), table.sizes[rows]
        flags[rows][is_kept & (embedded[rows] < size)] |= store.TRUNCATED
        flags[rows][table.replaced[rows] > 0] |= store.REPLACED
        flags[rows][~is_own] |= store.COPIED
        if config.long == "window":
            flags[rows][is_kept & (size > config.max_residues)] |= store.WINDOWED
        computed.append((rows.start + np.flatnonzero(is_kept & is_own)).astype(kind))
    compute = np.concatenate(computed)
    status = np.where(reason == 0, np.uint8(store.PENDING), np.uint8(store.SKIPPED))
    return Decisions(representative, embedded, flags, status, reason, _segments(compute, embedded[compute], config))


def representatives(table: RecordTable, config: EmbedConfig) -> Iterator[tuple[slice, Int64]]:
    """Ranges of records, and for each record the one that is computed in its stead, int64 [n].

    That is the first of its equals that is not skipped; a skipped record stands for itself. Raises UserError if there
    are long proteins and `long` is "error", or if nothing is left of a whole input.
    """
    if config.long == "error" and len(long := np.flatnonzero(table.sizes > config.max_residues)):
        (word, letter), first = config.words, int(long[0])
        raise UserError(
            f"{counted(len(long), word)} longer than {counted(config.max_residues, table.unit(letter))}; "
            f"the first is {table.names(first, first + 1)[0]!r} with {int(table.sizes[first]):,}.",
            "Choose --long truncate, full, window or skip, or a larger --max-residues.",
        )
    (leaders, instead), some_left = _stand_ins(table, config), False
    for rows in store.blocks(len(table), AT_ONCE):
        reason, _ = _each(table, rows, config)
        those = np.where(reason == 0, table.unique_of[rows], np.arange(rows.start, rows.stop))
        if len(leaders):
            at = np.minimum(np.searchsorted(leaders, those), len(leaders) - 1)
            those = np.where((leaders[at] == those) & (reason == 0), instead[at], those)
        some_left |= bool((reason == 0).any())
        yield rows, those
    if not some_left and table.following is None:  # of a part of the input it may be so
        why = "leaves nothing to embed: every record is skipped" if table.residues else "holds no residues"
        files = ", ".join(source.path for source in table.sources)
        what = f"The input {files} {why} ({counted(len(table), 'record')})."
        raise UserError(what, "Check the input, --long and --invalid.")


def costs(table: RecordTable, rows: slice, those: Int64, config: EmbedConfig) -> Int64:
    """Tokens that each record of a range costs, int64 [n]; none, if it is skipped or a copy.

    those: their representatives, int64 [n].
    """
    reason, embedded = _each(table, rows, config)
    compute = np.flatnonzero((reason == 0) & (those == np.arange(rows.start, rows.stop)))
    segments = _segments(compute, embedded[compute], config)
    cost = np.bincount(segments.record, segments.length.astype(np.int64) + SPECIAL_TOKENS, rows.stop - rows.start)
    return cost.astype(np.int64)


def _each(table: RecordTable, rows: slice, config: EmbedConfig) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Why each record of a range is skipped, uint8 [n], and how many of its residues are embedded, int32 [n]."""
    length = table.sizes[rows]
    reason = np.zeros(len(length), np.uint8)
    reason[(length > config.max_residues) & (config.long == "skip")] = store.TOO_LONG
    reason[(table.replaced[rows] > 0) & (config.invalid == "skip")] = store.INVALID
    reason[length == 0] = store.EMPTY
    kept = np.minimum(length, config.max_residues) if config.long == "truncate" else length
    return reason, np.where(reason == 0, kept, 0).astype(np.int32)


def _stand_ins(table: RecordTable, config: EmbedConfig) -> tuple[Int64, Int64]:
    """First ones of equal records that are skipped where others are not, and the first of those others.

    int64 [m] both, the first rising. Equal records differ only in residues that were replaced.
    """
    leaders, others = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rows in store.blocks(len(table), AT_ONCE) if config.invalid == "skip" else ():
        first = table.unique_of[rows]
        copies = np.flatnonzero((first != np.arange(rows.start, rows.stop)) & (table.replaced[rows] == 0))
        copies = copies[table.replaced[first[copies]] > 0]
        leaders.append(first[copies])
        others.append(rows.start + copies)
    of, at = np.unique(np.concatenate(leaders), return_index=True)
    return of, np.concatenate(others)[at]


def _segments(compute: Numbers, residues: NDArray[np.int32], config: EmbedConfig) -> Segments:
    """Segments of the records to compute, int [n], of so many residues each, int32 [n]."""
    if config.long == "window":
        return windowed_segments(compute, residues.astype(np.int64), config.max_residues, config.overlap)
    return whole_segments(compute, residues)
