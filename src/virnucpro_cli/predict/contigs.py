"""A call for each contig from its chunks, by the rules of viral-ngs (virnucpro_contigs), for all contigs at once.

Chunks are those of a contig by its number, whatever names look like. Contigs without a frame are listed, too.
"""

from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store, tables
from virnucpro_cli.predict.frames import Scored

CONTIGS = "contigs.tsv"
COLUMNS = (
    "ID", "call", "tier", "weighted_delta", "n_chunks", "n_confident_viral", "n_confident_nonviral", "n_ambiguous",
    "viral_proportion", "nonviral_proportion",
)  # fmt: skip
CALLS = ("Viral", "Non-viral", "Ambiguous", "no frame", "no score")
VIRAL, NON_VIRAL, AMBIGUOUS, NO_FRAME, NO_SCORE = range(5)
TIERS = ("high_confidence", "moderate_confidence", "low_confidence", "review", "")
HIGH, MODERATE, LOW, REVIEW, NO_TIER = range(5)
LEAST_DELTA, HIGH_DELTA = 0.3, 0.6
CONFIDENT, OPPOSING, BOTH = 0.8, 0.3, 0.7
"""Least score of a confident chunk and most of its other class; least of both in an ambiguous chunk."""
LEAST_SHARE, FEW_CHUNKS = 0.1, 5


class Calls(NamedTuple):
    """Calls of G contigs. call, tier: int64 [G], places in CALLS and TIERS; delta: float64 [G], NaN without a chunk.

    counts: int64 [G, 4], chunks: all, confident viral, confident non-viral, ambiguous; shares: float64 [G, 2].
    """

    call: NDArray[np.int64]
    tier: NDArray[np.int64]
    delta: NDArray[np.float64]
    counts: NDArray[np.int64]
    shares: NDArray[np.float64]


def calls_of(contig: NDArray[np.int64], highest: NDArray[np.float32], n: int) -> Calls:
    """Calls of n contigs. contig: int64 [C], that of each chunk; highest: float32 [C, 2], scores of its chunks."""
    others, virus = highest.astype(np.float64).T
    delta = virus - others
    weight = np.sqrt(np.abs(delta))
    kinds = (
        np.ones(len(contig), np.bool_),
        (virus > CONFIDENT) & (others < OPPOSING),
        (others > CONFIDENT) & (virus < OPPOSING),
        (virus > BOTH) & (others > BOTH),
    )
    counts = np.stack([np.bincount(contig[kind], minlength=n) for kind in kinds], axis=1)
    weights, sums = np.bincount(contig, weight, n), np.bincount(contig, delta * weight, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(contig, delta, n) / counts[:, 0]
        weighted = np.where(weights > 0, sums / weights, mean)
        effective = counts[:, 0] - counts[:, 3]
        shares = np.where(effective[:, None] > 0, counts[:, 1:3] / effective[:, None], 0.0)
    conditions = [counts[:, 0] == 0, weighted > LEAST_DELTA, weighted < -LEAST_DELTA]
    call = np.select(conditions, [NO_FRAME, VIRAL, NON_VIRAL], AMBIGUOUS)
    return Calls(call, _tiers(call, weighted, counts, shares), weighted, counts, shares)


def _tiers(
    call: NDArray[np.int64], delta: NDArray[np.float64], counts: NDArray[np.int64], shares: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The tier of each contig, int64 [G]. The arrays are those of Calls."""
    side = np.where(call == NON_VIRAL, 1, 0)
    every = np.arange(len(call))
    supported = (counts[every, 1 + side] >= 1) & (shares[every, side] >= LEAST_SHARE)
    tier = np.where(supported, np.where(np.abs(delta) > HIGH_DELTA, HIGH, MODERATE), LOW)
    tier = np.where(call == AMBIGUOUS, REVIEW, tier)
    demoted = np.array([LOW, LOW, REVIEW, REVIEW])[tier]
    tier = np.where(counts[:, 0] < FEW_CHUNKS, demoted, tier)
    return np.where(call == NO_FRAME, NO_TIER, tier)


def of(scored: Scored) -> Calls:
    """The call of each contig of a file, in the order of the input."""
    frames = scored.frames
    calls = calls_of(scored.contig_of_chunk, scored.highest, frames.contigs)
    has_frames = np.bincount(frames.contig, minlength=frames.contigs) > 0
    return calls._replace(call=np.where((calls.call == NO_FRAME) & has_frames, NO_SCORE, calls.call))


def write(file: IO[bytes], calls: Calls, scored: Scored) -> None:
    """A line for each contig, in the order of the input."""
    with tables.written_to(file) as table:
        table.writerow(COLUMNS)
        for block in store.blocks(len(calls.call), store.NAME_BLOCK):
            names = scored.frames.file.texts("contigs/ids", block.start, block.stop)
            table.writerows(_lines(names, *(column[block] for column in calls)))


def _lines(names: list[str], *columns: NDArray[Any]) -> list[list[object]]:
    """The cells of some contigs. columns: those of Calls."""
    call, tier, delta, counts, shares = (
        column.tolist() if column.dtype.kind == "i" else np.round(column, 3).tolist() for column in columns
    )
    return [
        [tables.cell(name), CALLS[c], TIERS[t], "" if d != d else d, *n, *s]
        for name, c, t, d, n, s in zip(names, call, tier, delta, counts, shares, strict=True)
    ]
