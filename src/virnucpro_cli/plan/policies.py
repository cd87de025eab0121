"""The user's policies applied to the record table: records skipped, cut or copied, and the segments that follow."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.plan.packing import Segments, whole_segments, windowed_segments

Int64 = NDArray[np.int64]
POLICIES = ("max_residues", "long", "overlap", "invalid", "gaps", "id", "dedup")
"""Settings that decide, besides the sequences, about each record; overlap: of `--long window` only."""


@dataclass(frozen=True)
class Decisions:
    """The proteins to embed: per-record decisions, and the segments and packs that follow from them.

    representative: int64 [N], the record that is computed in a record's stead: itself or an identical earlier one.
    embedded: int32 [N], residues that are embedded; flags: uint16 [N]; status, reason: uint8 [N].
    """

    representative: Int64
    embedded: NDArray[np.int32]
    flags: NDArray[np.uint16]
    status: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    segments: Segments


def decide(table: RecordTable, config: EmbedConfig) -> Decisions:
    """Apply the policies: which records are skipped, how long ones are cut, which are copies.

    Raises UserError if there are long proteins and `long` is "error", or if nothing is left of a whole input.
    """
    n, (word, letter) = len(table), config.words
    lengths = table.length.astype(np.int64)
    is_long = lengths > config.max_residues
    if config.long == "error" and is_long.any():
        example = int(np.flatnonzero(is_long)[0])
        raise UserError(
            f"{counted(int(is_long.sum()), word)} longer than {counted(config.max_residues, letter)}; "
            f"the first is {table.names(example, example + 1)[0]!r} with {lengths[example]:,}.",
            "Choose --long truncate, full, window or skip, or a larger --max-residues.",
        )
    reason = np.zeros(n, np.uint8)
    reason[is_long & (config.long == "skip")] = store.TOO_LONG
    reason[(table.replaced > 0) & (config.invalid == "skip")] = store.INVALID
    reason[lengths == 0] = store.EMPTY
    kept = np.flatnonzero(reason == 0)
    if not len(kept) and table.following is None:  # of a part of the input it may be so
        why = "holds no residues" if not lengths.any() else "leaves nothing to embed: every record is skipped"
        files = ", ".join(source.path for source in table.sources)
        raise UserError(f"The input {files} {why} ({counted(n, 'record')}).", "Check the input, --long and --invalid.")

    representative, alike = np.arange(n), table.unique_of[kept]
    first = np.full(n, n)
    np.minimum.at(first, alike, kept)
    representative[kept] = first[alike]

    kept_residues = np.minimum(lengths, config.max_residues) if config.long == "truncate" else lengths
    embedded = np.where(reason == 0, kept_residues, 0)
    flags = np.zeros(n, np.uint16)
    flags[(reason == 0) & (embedded < lengths)] |= store.TRUNCATED
    flags[table.replaced > 0] |= store.REPLACED
    flags[representative != np.arange(n)] |= store.COPIED
    compute = kept[representative[kept] == kept]
    if config.long == "window":
        flags[(reason == 0) & is_long] |= store.WINDOWED
        segments = windowed_segments(compute, lengths[compute], config.max_residues, config.overlap)
    else:
        segments = whole_segments(compute, embedded[compute])
    status = np.where(reason == 0, store.PENDING, store.SKIPPED).astype(np.uint8)
    return Decisions(representative, embedded.astype(np.int32), flags, status, reason, segments)
