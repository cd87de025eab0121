"""From record lengths to segments to packs. Integers only: no text, no tensors, no files.

Everything is decided here before anything is computed: a plan is a pure function of the segment lengths and the
token budget, so a resumed run, a second device or another host each work through a subset of the same plan.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.texts import ranges

Int64 = NDArray[np.int64]
Numbers = NDArray[np.int32 | np.int64]
"""Numbers of records or segments, in the type of `numbers_below`; whatever is computed with them takes int64."""

SPECIAL_TOKENS = 2
"""`<cls>` and `<eos>`, one of each around every segment."""

SMALLEST_BUCKET = 1024
"""Fewest rows of a pack. GEMM rows are bitwise the same in any company from 777 rows up on a CPU (fp32, D=1280)
and from 1024 on an H100; below, BLAS may pick another kernel for another shape."""


@dataclass(frozen=True)
class Segments:
    """Pieces of records to embed, in record order.

    record: int32 or int64 [S], number of the record; start: int32 [S], first residue; length: int32 [S], residues.
    """

    record: Numbers
    start: NDArray[np.int32]
    length: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.record)

    def bounds_of(self, records: Numbers) -> tuple[Int64, Int64]:
        """The first segment of each record and the one past its last, int64 [n] both. records: int [n]."""
        return bounds_in(self.record, records)

    def of(self, record: int) -> range:
        """Numbers of the segments of a record."""
        (first,), (last,) = self.bounds_of(np.array([record]))
        return range(int(first), int(last))


def bounds_in(rising: Numbers, wanted: Numbers) -> tuple[Int64, Int64]:
    """The first place of each wanted number among rising ones, int [S], and the one past its last; int64 [n] both."""
    wanted = wanted.astype(rising.dtype)  # of another type NumPy would convert all of them
    return np.searchsorted(rising, wanted), np.searchsorted(rising, wanted, side="right")


@dataclass(frozen=True)
class Plan:
    """Packs of segments. Pack p holds `segments[offsets[p]:offsets[p + 1]]`, longest first, in `bucket[p]` rows.

    segments: int32 or int64 [S]; offsets: int64 [P + 1]; bucket: int64 [P]; tokens: int64 [P], used rows of each pack.
    """

    segments: Numbers
    offsets: Int64
    bucket: Int64
    tokens: Int64
    token_budget: int

    @classmethod
    def of(cls, segments: Numbers, sizes: Int64, tokens: Int64, token_budget: int) -> "Plan":
        """The plan of packs that hold so many segments (int64 [P]) and tokens (int64 [P]), one behind the other."""
        offsets = np.append(0, np.cumsum(sizes))
        return cls(segments, offsets, bucket_of(tokens, token_budget), tokens, token_budget)

    def __len__(self) -> int:
        return len(self.bucket)

    def pack(self, number: int) -> Int64:
        """Numbers of the segments of a pack, int64 [n]."""
        return self.segments[self.offsets[number] : self.offsets[number + 1]].astype(np.int64)

    @property
    def density(self) -> float:
        """Used rows over computed rows, all packs."""
        return float(self.tokens.sum() / self.bucket.sum()) if len(self) else 0.0

    @property
    def density_without_last(self) -> float:
        """Density of all packs but the last opened, which holds the rest."""
        return float(self.tokens[:-1].sum() / self.bucket[:-1].sum()) if len(self) > 1 else self.density


def numbers_below(n: int) -> type[np.int32] | type[np.int64]:
    """The narrowest type that is used for numbers below n."""
    return np.int32 if n <= 1 << 31 else np.int64


def whole_segments(records: Numbers, lengths: Numbers, longest: int | None = None) -> Segments:
    """One segment per record, cut after `longest` residues if given."""
    length = lengths if longest is None else np.minimum(lengths, longest)
    return Segments(records, np.zeros(len(records), np.int32), length.astype(np.int32, copy=False))


def windows_of(lengths: NDArray[Any], window: int, overlap: int) -> Int64:
    """Windows of each record, int64 [N]: 1 of one that is no longer than a window."""
    lengths = lengths.astype(np.int64)
    several = -((overlap - lengths) // (window - overlap))  # ceil((L - overlap) / (W - overlap))
    return np.where(lengths > window, several, 1)


def windowed_segments(records: Numbers, lengths: Int64, window: int, overlap: int) -> Segments:
    """Records of up to `window` residues whole; longer ones as evenly spread windows of `window` residues.

    Neighbouring windows share at least `overlap` residues.
    """
    counts = windows_of(lengths, window, overlap)
    total, count = (np.repeat(each, counts) for each in (lengths, counts))
    k = ranges(np.zeros(len(counts), np.int64), counts)
    start = np.where(count > 1, k * (total - window) // np.maximum(count - 1, 1), 0)
    return Segments(np.repeat(records, counts), start.astype(np.int32), np.minimum(total, window).astype(np.int32))


@lru_cache(maxsize=16)
def window_weights(total: int, starts: tuple[int, ...], window: int) -> list[NDArray[np.float32]]:
    """Blending weights, float32 [window] for each window of one record of `total` residues.

    Triangular, falling towards both edges of a window, and normalised so that they sum to one at every residue.
    """
    ramp = np.minimum(np.arange(1, window + 1), np.arange(window, 0, -1)).astype(np.float64)
    norm = np.zeros(total)
    for start in starts:
        norm[start : start + window] += ramp
    return [(ramp / norm[start : start + window]).astype(np.float32) for start in starts]


def buckets(token_budget: int) -> list[int]:
    """The ladder of pack sizes: 1024, 2048, 4096 ... and the budget itself."""
    ladder = [SMALLEST_BUCKET]
    while 2 * ladder[-1] < token_budget:
        ladder.append(2 * ladder[-1])
    return [*ladder, token_budget] if token_budget > SMALLEST_BUCKET else ladder


def bucket_of(tokens: Int64, token_budget: int) -> Int64:
    """Rows of packs of int64 [P] tokens, int64 [P]: the next bucket, or past the budget a multiple of the smallest."""
    ladder = np.asarray(buckets(token_budget), np.int64)
    beyond = -(-tokens // SMALLEST_BUCKET) * SMALLEST_BUCKET
    return np.where(tokens > ladder[-1], beyond, ladder.take(np.searchsorted(ladder, tokens), mode="clip"))


def first_fit_decreasing(lengths: NDArray[np.int32] | Int64, token_budget: int) -> Plan:
    """Pack segments of int [S] residues (plus two special tokens each) into packs of at most `token_budget` tokens.

    Exact first-fit decreasing, ties broken by segment number. A segment longer than the budget has a pack of its own.
    Equal lengths are placed in one step: first-fit puts c equal items into the open packs in order, as many into
    each as it has room for, which is a cumulative sum of those capacities cut at c. All indices are int64.
    """
    cost = np.asarray(lengths, np.int64) + SPECIAL_TOKENS
    order = _stable_order(int(cost.max(initial=0)) - cost)
    sorted_cost = cost[order]
    pack_of = np.empty(len(cost), np.int64)  # of the sorted segments
    changes = np.flatnonzero(np.diff(sorted_cost)) + 1

    n_packs, shortest = 0, int(cost.min(initial=token_budget))
    open_ids = np.empty(0, np.int64)  # packs that can still take the shortest segment, in order of opening
    open_room = np.empty(0, np.int64)
    for begin, end in pairwise([0, *changes.tolist(), len(cost)] if len(cost) else []):
        size, count = int(sorted_cost[begin]), end - begin
        left = count - int((open_room // size).sum())
        if left > 0:
            new = -(-left // max(token_budget // size, 1))
            open_ids = np.append(open_ids, n_packs + np.arange(new))
            open_room = np.append(open_room, np.full(new, max(token_budget, size)))
            n_packs += new
        taken = open_room // size
        filled = np.cumsum(taken)
        last = int(np.searchsorted(filled, count))  # the pack that takes the last of them
        taken = taken[: last + 1]
        taken[-1] -= int(filled[last]) - count
        pack_of[begin:end] = np.repeat(open_ids[: last + 1], taken)
        open_room[: last + 1] -= taken * size
        usable = open_room >= shortest
        if not usable.all():
            open_ids, open_room = open_ids[usable], open_room[usable]

    tokens = np.bincount(pack_of, weights=sorted_cost, minlength=n_packs).astype(np.int64)
    return Plan.of(order[_stable_order(pack_of)], np.bincount(pack_of), tokens, token_budget)


def _stable_order(values: Int64) -> Int64:
    """The order, int64 [n], that sorts values (int64 [n], none below 0); NumPy sorts those of 16 bits by radix."""
    small = int(values.max(initial=0)) < 1 << 16
    return np.argsort(values.astype(np.uint16) if small else values, kind="stable")


BLOCK = 1 << 17
FULL = 0.97


def in_blocks(lengths: NDArray[np.int32] | Int64, token_budget: int, block: int = BLOCK) -> Plan:
    """The plan of a run: first-fit decreasing within blocks of segments (int [S] residues; indices int64).

    Neighbours in the file are computed, read and written together. Segments longer than the budget come first: one that
    does not fit the device shows at once. Packs that a block leaves less than 97 % full are taken up by the next, so
    density does not suffer.
    """
    if len(lengths) < 2 * block:
        return first_fit_decreasing(lengths, token_budget)
    kind, shortest = numbers_below(len(lengths)), int(lengths.min()) + SPECIAL_TOKENS
    alone = np.flatnonzero(lengths > token_budget - SPECIAL_TOKENS)
    rest = np.delete(np.arange(len(lengths), dtype=kind), alone)
    parts = [alone, *(rest[start : start + block] for start in range(0, len(rest), block))]
    left_over = np.empty(0, kind)
    segments, end = np.empty(len(lengths), kind), 0
    packs = []  # sizes and tokens of those that are kept
    for part in parts:
        numbers = np.append(left_over, part)
        plan = first_fit_decreasing(lengths[numbers], token_budget)
        room, sizes = token_budget - plan.tokens, np.diff(plan.offsets)
        kept = (room <= (1 - FULL) * token_budget) | (room < shortest) | (part is parts[-1])
        in_kept = np.repeat(kept, sizes)
        packs.append((sizes[kept], plan.tokens[kept]))
        begin, end = end, end + int(sizes[kept].sum())
        segments[begin:end] = numbers[plan.segments[in_kept]]
        left_over = np.sort(numbers[plan.segments[~in_kept]])
    sizes, tokens = (np.concatenate(column) for column in zip(*packs, strict=True))
    return Plan.of(segments, sizes, tokens, token_budget)


def arranged(packs: list[list[int]], lengths: NDArray[np.int32] | Int64, token_budget: int) -> Plan:
    """The plan of packs made by hand: each a list of segments in the order in which they are to stand.

    lengths: int [S], residues; indices are int64.
    """
    sizes = np.array([len(pack) for pack in packs], np.int64)
    segments = np.concatenate([np.asarray(pack, np.int64) for pack in packs])
    tokens = np.add.reduceat(np.asarray(lengths, np.int64)[segments] + SPECIAL_TOKENS, np.cumsum(sizes) - sizes)
    return Plan.of(segments, sizes, tokens, token_budget)


def subset(plan: Plan, wanted: NDArray[np.bool_]) -> Int64:
    """Numbers of the packs that hold at least one wanted segment (bool [S]), in plan order: int64 [n]."""
    if not len(plan):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.logical_or.reduceat(wanted[plan.segments], plan.offsets[:-1]))


def worst_first(plan: Plan, packs: Int64, lengths: NDArray[np.int32] | Int64) -> Int64:
    """The same packs (int64 [n]), the one that needs the most memory first: the most rows, then the longest segment.

    lengths: int [S], residues of the segments.
    """
    if not len(packs):
        return packs
    longest = np.maximum.reduceat(lengths[plan.segments], plan.offsets[:-1])[packs]
    worst = np.lexsort((longest, plan.bucket[packs]))[-1:]
    return np.concatenate((packs[worst], np.delete(packs, worst)))
