"""The sink of a run: takes each batch's embeddings to the rows of its records and of their copies, windows stitched."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli import report, store
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine.collate import Item, VarlenCollator
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.kinds import POOLED, by_residue
from virnucpro_cli.model import locate
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Plan, bounds_in
from virnucpro_cli.plan.policies import Decisions, Int64
from virnucpro_cli.store import sums
from virnucpro_cli.texts import ranges

COMMIT_SECONDS = 5.0

Pooled = dict[tuple[str, Any], NDArray[Any]]
Residue = dict[int | str, NDArray[Any]]


@dataclass(frozen=True)
class Job:
    """The computing of a run, by whomever. pending: bool [N], the representatives whose rows are not in the file."""

    config: EmbedConfig
    table: RecordTable
    decisions: Decisions
    plan: Plan
    pending: NDArray[np.bool_]
    weights: locate.Weights
    layers: tuple[int, ...]
    dtype: torch.dtype


class Rows(NamedTuple):
    """The rows of a batch of n segments, on the host.

    segments: int64 [n], their numbers; seqlens: int64 [n], tokens of each; finite: bool [n]; pooled: (kind, layer) ->
    [n, D], ("unmasked", score) -> [n]; residue: layer -> [tokens of all, D].
    """

    segments: Int64
    seqlens: Int64
    pooled: Pooled
    residue: Residue
    finite: NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        return int(self.seqlens.sum())


def rows_of(batch: PackedBatch, embeddings: Embeddings) -> Rows:
    """The rows of a batch whose embeddings are on the host: float32 [n, D], and [used, D] in the store dtype."""
    assert embeddings.finite is not None
    return Rows(
        batch.segments, batch.seqlens, {key: each.numpy() for key, each in embeddings.pooled.items()},
        {layer: each[: batch.used].numpy() for layer, each in embeddings.residue.items()}, embeddings.finite.numpy(),
    )  # fmt: skip


def rounded(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values [n, D] in float16 or float32, in one piece. PyTorch rounds as NumPy does, many times as fast."""
    if values.dtype != np.float32 or dtype != np.float16:
        return np.ascontiguousarray(values, dtype)
    own = values if values.flags.writeable else values.copy()  # Ray's are not, of which PyTorch warns
    into = np.empty(values.shape, np.float16)  # which the store may keep: it owns its memory
    torch.from_numpy(into).copy_(torch.from_numpy(np.ascontiguousarray(own)))
    return into


def is_limit(writing: float, seconds: float, beside: bool) -> bool:
    """Whether writing held up a forward of so many seconds, beside which or in turn with which rows were written.

    Writing that is hidden takes nearly all of the time before it holds anything up. A short run does not say.
    """
    return seconds >= 2 * COMMIT_SECONDS and writing > (0.9 if beside else 0.5) * seconds


class Placer:
    """The sink of the runner: what a batch yields goes to the rows of its records and of their copies.

    Windows of a long record wait here until the last has come, and are then added in window order.
    It is entered before the first batch; at the end of the block its threads have written all that they were given.
    """

    def __init__(self, file: store.Store, job: Job, clock: report.Clock, pin: bool):
        self.file, self.job, self.clock, self.pending = file, job, clock, job.pending
        self.segments, self.embedded = job.decisions.segments, job.decisions.embedded
        self.collator = VarlenCollator(job.table, self.segments, self.embedded, job.plan, pin)
        self.store_dtype = np.dtype(np.float16 if job.config.store_dtype == "fp16" else np.float32)
        self.tracker: report.Part | None = None
        self.broken: list[int] = []  # records with a value that is not finite
        self.unfit: list[int] = []  # records that the device has no memory for
        self.flag = 0
        self.started = self.last_commit = time.perf_counter()
        self.writing = 0.0  # seconds
        representative = job.decisions.representative
        copies = np.flatnonzero((job.decisions.flags & store.COPIED) > 0)
        by_original = np.argsort(representative[copies], kind="stable")
        self._copies = copies[by_original].astype(representative.dtype)
        self._originals = representative[self._copies]
        self._windows: dict[int, tuple[Pooled, Residue]] = {}  # by segment
        self._beside = ThreadPoolExecutor(2, "disk")  # one to write, and one to wait for the disk
        self._commit: Future[None] | None = None

    @cached_property
    def _offsets(self) -> Int64:
        return np.append(0, np.cumsum(self.embedded, dtype=np.int64))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown()

    def __call__(self, batch: PackedBatch, embeddings: Embeddings) -> None:
        self.place(rows_of(batch, embeddings))

    def place(self, rows: Rows) -> None:
        """Place what a batch yields of pending records, float32 [n, D] and residues; note what of it is not finite."""
        began = time.perf_counter()
        with self.clock.beside("write (overlapped)" if self.collator.pin else "write"):
            record = self.segments.record[rows.segments].astype(np.int64)
            wanted = self.pending[record]
            whole = rows.seqlens - SPECIAL_TOKENS == self.embedded[record]
            self.broken += record[wanted & whole & ~rows.finite].tolist()
            self._place_whole(record, np.flatnonzero(wanted & whole & rows.finite), rows)
            for i in np.flatnonzero(wanted & ~whole).tolist():
                self._weigh_window(rows, i)
            self.commit_now_and_then()
        self.writing += time.perf_counter() - began
        self.advance(rows.tokens)

    def limit(self, seconds: float) -> str | None:
        """Words for a forward of so many seconds, in this process, that the disk held up; None for others."""
        rate = f"{report.size(self.file.written / seconds)}/s to {self.file.output.parent}"
        return f"writing was the limit: {rate}" if is_limit(self.writing, seconds, self.collator.pin) else None

    def commit_now_and_then(self) -> None:
        """Begin a commit every few seconds. The disk is waited for by another thread, so that rows can be placed."""
        if time.perf_counter() - self.last_commit > COMMIT_SECONDS and (self._commit is None or self._commit.done()):
            if self._commit is not None:
                self._commit.result()
            self._commit = self._beside.submit(self.file.commit)
            self.job.table.let_go()
            self.last_commit = time.perf_counter()

    def advance(self, tokens: int) -> None:
        self.clock.meanwhile.setdefault("first pack", time.perf_counter() - self.started)
        if self.tracker:
            self.tracker.advance(tokens)

    def note_unfit(self, item: Item) -> None:
        """Note that the device has no memory for an item of one segment."""
        self.unfit.append(int(self.segments.record[self.collator.segments_of(item)[0]]))

    def give_up(self, records: Int64, reason: int) -> None:
        """Skip representatives, int64 [n], that cannot be embedded, and their copies: their rows become NaN."""
        rows, _ = self.rows_of(records)
        for name, extent in self.file.places.items():
            kind, _, layer = name.partition("/")
            width = extent.row_bytes // extent.dtype.itemsize
            if by_residue(kind, layer) and layer != "offsets":
                for row, length in zip(rows, self.embedded[rows], strict=True):
                    self._place_residues(layer, row[None], np.full((length, width), np.nan), np.zeros(1, np.int64))
            elif kind in (*POOLED, "unmasked"):
                self.file.place(kind, layer, rows, np.full((len(rows), width), np.nan, extent.dtype))
        self.file.mark(rows, store.SKIPPED, reason=reason)

    def rows_of(self, records: Int64) -> tuple[Int64, Int64]:
        """Rows of representatives [n] and then of their copies, and the position of each's representative.

        Both int64 [m].
        """
        order = np.argsort(records)
        first, last = bounds_in(self._originals, records[order])
        copies, source = self._copies[ranges(first, last - first)], np.repeat(order, last - first)
        return np.append(records, copies), np.append(np.arange(len(records)), source)

    def _place_whole(self, record: Int64, chosen: Int64, rows: Rows) -> None:
        places, source = self.rows_of(record[chosen])
        row_sums = np.zeros(len(places), np.uint64)
        is_all, has_copies = len(chosen) == len(record), len(places) > len(chosen)
        for (kind, layer), values in rows.pooled.items():
            own = values if is_all else values[chosen]
            stored = rounded(own, np.dtype(np.float32) if kind == "unmasked" else self.store_dtype)
            row_sums += sums.of_rows(f"{kind}/{layer}", stored)[source]
            self.file.place(kind, layer, places, stored[source] if has_copies else stored)
        starts = np.cumsum(rows.seqlens) - rows.seqlens + 1
        for layer, values in rows.residue.items():
            row_sums += self._place_residues(layer, places, values, starts[chosen][source])
        self.file.mark(places, flag=self.flag, row_sums=row_sums)

    def _place_residues(
        self, layer: int | str, records: Int64, values: NDArray[Any], starts: Int64
    ) -> NDArray[np.uint64]:
        """Place residues of records (int64 [m]), of each from starts[i] in values [n, D] on; digests, uint64 [m].

        Digests of all rows are computed at once, while another thread writes.
        """
        name = f"{'unmasked' if layer == 'logits' else 'residue'}/{layer}"
        stored = rounded(values, self.store_dtype)
        first, counts = self._offsets[records], self.embedded[records].astype(np.int64)
        written = self._beside.submit(self.file.place_runs, name, first, stored, starts, counts)
        digests = sums.of_rows(name, stored)[ranges(starts, counts)]
        written.result()
        return sums.of_records(ranges(first, counts), digests, counts)

    def _weigh_window(self, rows: Rows, i: int) -> None:
        segment, end = int(rows.segments[i]), int(rows.seqlens[: i + 1].sum())
        weights = self.collator.weights_of(segment)
        total = self.embedded[self.segments.record[segment]]
        is_last = self.segments.start[segment] + len(weights) == total
        shares = {"bos": np.float32(weights.sum(dtype=np.float64) / total), "eos": np.float32(is_last)}
        pooled = {
            (kind, layer): values[i] * shares.get(kind, np.float32(1))  # a mean is weighted already
            for (kind, layer), values in rows.pooled.items()
        }
        inside = slice(end - int(rows.seqlens[i]) + 1, end - 1)
        self.keep(segment, pooled, {layer: values[inside].copy() for layer, values in rows.residue.items()})

    def keep(self, segment: int, pooled: Pooled, residue: Residue) -> None:
        """Take what a window adds to its record, weighted: pooled float32 [D], residue float32 [length, D].

        With the last of its windows the record is placed.
        """
        self._windows[segment] = pooled, residue
        record = int(self.segments.record[segment])
        every = self.segments.of(record)
        if all(each in self._windows for each in every):
            starts = self.segments.start[every.start : every.stop].tolist()
            self._place_windows(record, starts, [self._windows.pop(each) for each in every])

    def forget_windows(self) -> None:
        """Drop windows of records whose other windows have not come."""
        self._windows.clear()

    def _place_windows(self, record: int, starts: list[int], windows: list[tuple[Pooled, Residue]]) -> None:
        """Add the windows up in their order, check the result in the store dtype, and place it."""
        rows, _ = self.rows_of(np.asarray([record]))
        first_pooled, first_residue = windows[0]
        pooled = {key: sum(each[key] for each, _ in windows) for key in first_pooled}
        stored = {key: rounded(np.asarray(values), self.store_dtype) for key, values in pooled.items()}
        residue = {}
        for layer in first_residue:
            whole = np.zeros((int(self.embedded[record]), first_residue[layer].shape[1]), np.float32)
            for start, (_, each) in zip(starts, windows, strict=True):
                whole[start : start + len(each[layer])] += each[layer]
            residue[layer] = rounded(whole, self.store_dtype)
        if not all(np.isfinite(values).all() for values in (*stored.values(), *residue.values())):
            self.broken.append(record)
            return
        for (kind, layer), values in stored.items():
            self.file.place(kind, layer, rows, np.broadcast_to(values, (len(rows), len(values))))
        for layer, values in residue.items():
            self._place_residues(layer, rows, values, np.zeros(len(rows), np.int64))
        self.file.mark(rows, flag=self.flag)
