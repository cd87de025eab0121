"""A line for each protein of an embeddings file: the table that is opened first. Needs the file alone."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import report, store, tables
from virnucpro_cli.features import Feature
from virnucpro_cli.plan.packing import windows_of
from virnucpro_cli.stopping import resumable

COLUMNS = ("name", "status", "reason", "length", "embedded", "truncated", "windows", "replaced", "gaps", "copied",
           "recomputed", "norm", "nearest")  # fmt: skip
MOST_COMPARED = 10_000
"""Proteins up to which each is compared with every other."""


class Table(Feature):
    """The table of --qc."""

    def written(self, output: Path) -> None:
        assert self.config.qc is not None
        with resumable(True), store.read_embeddings(output) as file:  # it is complete: the table alone is written then
            write(self.config.qc, file)


def write(path: str, file: store.EmbeddingFile) -> None:
    """Write the table as tab-separated text. Raises UserError if that fails.

    norm: Euclidean, of the default embedding (empty if pending or skipped, or if only per-residue rows are stored);
    nearest: the distance of that embedding to the nearest other's, for at most MOST_COMPARED proteins.
    """
    settings = file.settings
    embedded, windows, nearest = embedded_of(file, settings), _windows(file, settings), _nearest(file)
    gaps = file.columns.get("gaps", np.zeros(len(file), np.int32))
    with report.text_to(path) as out:
        table = tables.writer(out)
        table.writerow(COLUMNS)
        for rows in store.blocks(len(file)):
            truncated, copied, recomputed = (
                ((file.flags[rows] & bit) > 0).astype(int).tolist()
                for bit in (store.TRUNCATED, store.COPIED, store.RECOMPUTED)
            )
            lines = zip(
                (tables.cell(name) for name in file.names_of(rows.start, rows.stop)),
                (store.STATUS_NAMES[code] for code in file.status[rows].tolist()),
                (store.REASONS[code] for code in file.reason[rows].tolist()),
                file.lengths[rows].tolist(), embedded[rows].tolist(), truncated, windows[rows].tolist(),
                file.replaced[rows].tolist(), gaps[rows].tolist(), copied, recomputed, _words(norms(file, rows)),
                _words(nearest[rows]), strict=True,
            )  # fmt: skip
            table.writerows(lines)


def embedded_of(file: store.EmbeddingFile, settings: dict[str, Any]) -> NDArray[np.int64]:
    """Letters, or tokens of several, of each record that its embedding is of (or will be), int64 [N]."""
    cut, sizes = (file.flags & store.TRUNCATED) > 0, file.sizes
    whole = np.where(cut, np.minimum(sizes, settings["max_residues"]), sizes).astype(np.int64)
    whole[file.status == store.SKIPPED] = 0
    return whole


def _windows(file: store.EmbeddingFile, settings: dict[str, Any]) -> NDArray[np.int64]:
    """Pieces of each record: 0 of a skipped one."""
    count = (file.status != store.SKIPPED).astype(np.int64)
    if settings["long"] == "window":
        windowed = ((file.flags & store.WINDOWED) > 0) & (count > 0)
        count[windowed] = windows_of(file.sizes[windowed], settings["max_residues"], settings["overlap"])
    return count


def norms(file: store.EmbeddingFile, rows: slice) -> NDArray[np.float64]:
    """Euclidean norms of the default embedding, float64 [n]; NaN where there is none."""
    done = file.status[rows] == store.DONE
    norm = np.full(len(done), np.nan)
    if file.default is not None and done.any():
        norm[done] = np.linalg.norm(file[rows][done].astype(np.float32), axis=1)
    return norm


def _nearest(file: store.EmbeddingFile) -> NDArray[np.float64]:
    nearest = np.full(len(file), np.nan)
    done = np.flatnonzero(file.status == store.DONE)
    if file.default is None or not 2 <= len(done) <= MOST_COMPARED:
        return nearest
    rows = file[:][done].astype(np.float64)
    rows -= rows.mean(axis=0)  # of what they have in common, which would cost digits below
    squares = (rows**2).sum(axis=1)
    for block in store.blocks(len(rows), 512):
        distance = squares[block, None] + squares - 2 * rows[block] @ rows.T
        distance[np.arange(len(distance)), np.arange(block.start, block.stop)] = np.inf
        nearest[done[block]] = np.linalg.norm(rows[block] - rows[distance.argmin(axis=1)], axis=1)
    return nearest


def _words(values: NDArray[np.float64]) -> list[str]:
    return ["" if value != value else f"{value:.5g}" for value in values.tolist()]
