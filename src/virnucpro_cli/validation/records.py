"""The columns of a file, against those that its records should have."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.errors import counted
from virnucpro_cli.features import stored_in
from virnucpro_cli.kinds import any_by_residue, by_residue, unmasked
from virnucpro_cli.validation.verdict import Check

NAMED_FLAGS = (store.TRUNCATED, store.WINDOWED, store.COPIED)


class Expected(NamedTuple):
    """The decision about each of N records under a run's policies.

    lengths, replaced, embedded: int [N], residues; flags: uint16 [N]; reason: uint8 [N], why one is skipped, or 0;
    representative: int64 [N], the record that is computed in its stead.
    """

    lengths: NDArray[Any]
    replaced: NDArray[Any]
    embedded: NDArray[Any]
    flags: NDArray[np.uint16]
    reason: NDArray[np.uint8]
    representative: NDArray[np.int64]


def cut_unknown(settings: dict[str, Any]) -> bool:
    """Whether it is an imported file that does not say what became of long proteins."""
    return "long" in settings.get("unknown", ())


def check(part: str, what: str, wrong: Any, note: str) -> Check:
    """A check that fails with a note if something is wrong."""
    return Check(part, what, not wrong, note=note if wrong else "")


def compared(
    file: store.EmbeddingFile, expected: Expected, other_names: NDArray[np.bool_], part: str
) -> Iterator[Check]:
    """A check of each column of the file; other_names: bool [N], whether a record's name is another than expected."""
    settings, kept = file.settings, expected.reason == 0
    tried = (file.status == store.SKIPPED) & np.isin(file.reason, store.AFTER_TRYING)
    open_ended = kept & (tried | (file.status == store.PENDING))
    status = np.where(kept, store.DONE, store.SKIPPED)
    flags = (file.flags ^ expected.flags) & ~np.uint16(store.RECOMPUTED | store.CACHED)
    if cut_unknown(settings):
        flags &= ~np.uint16(store.TRUNCATED)
    wrong = {
        "ids": other_names,
        "lengths": file.lengths != expected.lengths,
        "replaced residues": file.replaced != expected.replaced,
        "statuses and reasons": ~open_ended & ((file.status != status) | (file.reason != expected.reason)),
        "flags": flags,
        **{store.FLAG_NAMES[bit]: flags & bit for bit in NAMED_FLAGS},
        "replaced": ((file.flags & store.REPLACED) > 0) != (file.replaced > 0),
    }
    if any_by_residue(settings["pool"], settings.get("emit", ())):
        rows = np.diff(file.residue_offsets)
        wrong["residue/offsets"] = rows > expected.embedded if cut_unknown(settings) else rows != expected.embedded
        if "imported" in settings:  # what was not there has no rows
            wrong["residue/offsets"] &= file.status == store.DONE
    for what, mask in wrong.items():
        rows = np.flatnonzero(mask)
        first = f", the first is record {rows[0] + 1:,} ({file.names_at(rows[:1])[0]})" if len(rows) else ""
        yield check(part, what, len(rows), f"{counted(len(rows), 'row')}{first}")


def stored(file: store.EmbeddingFile, representative: NDArray[np.int64], part: str) -> list[Check]:
    """All stored numbers once: finite where a row is done, NaN where it is skipped, and copies like their originals.

    representative: int64 [N], the record that was computed in each record's stead.
    """
    settings = file.settings
    emit = settings.get("emit", ())
    done, skipped = file.status == store.DONE, file.status == store.SKIPPED
    copies = np.flatnonzero((representative != np.arange(len(file))) & done)
    wrong, unlike = sum(feature.count_wrong(file) for feature in stored_in(file)), 0
    names = [(kind, layer) for kind in settings["pool"] for layer in settings["layers"]]
    for kind, layer in (*names, *(("unmasked", name) for name in unmasked(emit))):
        data = file.dataset(kind, layer)
        offsets = file.residue_offsets if by_residue(kind, layer) else np.arange(len(file) + 1)
        for block in store.blocks(data.shape[0]):
            rows = data[block].reshape(block.stop - block.start, -1)
            owner = np.searchsorted(offsets, np.arange(block.start, block.stop), side="right") - 1
            wrong += int((~np.isfinite(rows).all(axis=1) & done[owner]).sum())
            wrong += int((~np.isnan(rows).all(axis=1) & skipped[owner]).sum())
        for block in store.blocks(0 if by_residue(kind, layer) else len(copies)):
            originals, back = np.unique(representative[copies[block]], return_inverse=True)
            ours, theirs = data[copies[block]], data[originals][back]
            unlike += int((ours != theirs).reshape(len(ours), -1).any(axis=1).sum())
    return [
        check(part, "done rows finite, skipped rows NaN", wrong, f"{wrong:,} are not, or maps not symmetric"),
        check(part, "copies equal their originals", unlike, f"{unlike:,} do not"),
    ]
