"""The sink of a run: takes each batch's embeddings to the rows of its records and of their copies, windows stitched."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine.collate import Item, VarlenCollator
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.kinds import POOLED, any_by_residue, by_residue
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Plan, ranges
from virnucpro_cli.plan.policies import Decisions, Int64

COMMIT_SECONDS = 5.0


class Packed(Protocol):
    """What the placer wants to know of a batch: numbers of its segments and their tokens, int64 [n] each, and all tokens."""

    @property
    def segments(self) -> NDArray[np.int64]: ...
    @property
    def seqlens(self) -> NDArray[np.int64]: ...
    @property
    def used(self) -> int: ...


class HostEmbeddings(Protocol):
    """Embeddings on the host, as tensors or arrays."""

    @property
    def pooled(self) -> Mapping[tuple[str, Any], Any]: ...
    @property
    def residue(self) -> Mapping[Any, Any]: ...
    @property
    def finite(self) -> Any: ...


class Placer:
    """The sink of the runner: what a batch yields goes to the rows of its records and of their copies.

    Windows of a long record wait here until the last has come, and are then added in window order.
    """

    def __init__(
        self, file: store.Store, table: RecordTable, work: Decisions, plan: Plan, config: EmbedConfig,
        todo: NDArray[np.bool_], clock: report.Clock, pin: bool,
    ):  # fmt: skip
        self.file, self.table, self.work, self.config, self.todo, self.clock = file, table, work, config, todo, clock
        self.collator = VarlenCollator(table, work.segments, work.embedded, plan, pin)
        self.store_dtype = np.dtype(np.float16 if config.store_dtype == "fp16" else np.float32)
        self.tracker: report.Tracker | None = None
        self.broken: list[int] = []  # records with a value that is not finite
        self.unfit: list[int] = []  # records that the device has no memory for
        self.flag = 0
        self.started = self.last_commit = time.perf_counter()
        self.first_pack: float | None = None
        self._members = np.argsort(work.representative, kind="stable")
        self._sorted_representatives = work.representative[self._members]
        self._offsets = (
            np.append(0, np.cumsum(work.embedded, dtype=np.int64)) if any_by_residue(config.pool, config.emit) else None
        )
        self._windows: dict[int, dict[int, Window]] = {}

    def __call__(self, batch: Packed, found: HostEmbeddings) -> None:
        with self.clock.stage("write (overlapped)" if self.collator.pin else "write"):
            assert found.finite is not None
            record = self.work.segments.record[batch.segments]
            finite = np.asarray(found.finite)
            wanted = self.todo[record]
            whole = batch.seqlens - SPECIAL_TOKENS == self.work.embedded[record]
            self.broken += record[wanted & whole & ~finite].tolist()
            self._place_whole(record, np.flatnonzero(wanted & whole & finite), batch, found)
            for i in np.flatnonzero(wanted & ~whole).tolist():
                self._keep_window(int(record[i]), i, batch, found)
            self.commit_now_and_then()
        self.advance(batch.used)

    def commit_now_and_then(self) -> None:
        if time.perf_counter() - self.last_commit > COMMIT_SECONDS:
            self.file.commit()
            self.last_commit = time.perf_counter()

    def advance(self, tokens: int) -> None:
        if self.first_pack is None:
            self.first_pack = time.perf_counter() - self.started
        if self.tracker:
            self.tracker.advance(tokens)

    def record_of(self, item: Item) -> int:
        """The record of an item that is one segment."""
        return int(self.work.segments.record[self.collator.segments_of(item)[0]])

    def note_unfit(self, item: Item) -> None:
        self.unfit.append(self.record_of(item))

    def give_up(self, records: Int64, reason: int) -> None:
        """Units that cannot be embedded: their rows and those of their copies become NaN, and are skipped."""
        rows, _ = self.rows_of(records)
        for name, place in self.file.places.items():
            kind, _, layer = name.partition("/")
            width = place.row_bytes // self.store_dtype.itemsize
            if layer == "offsets":
                continue
            if by_residue(kind, layer):
                for row in rows.tolist():
                    self._place_residues(layer, row, np.full((int(self.work.embedded[row]), width), np.nan))
            elif kind == "unmasked":
                self.file.place(kind, layer, rows, np.full(len(rows), np.nan, np.float32))
            elif kind in POOLED:
                self.file.place(kind, int(layer), rows, np.full((len(rows), width), np.nan, self.store_dtype))
        self.file.mark(rows, store.SKIPPED, reason=reason)

    def rows_of(self, records: Int64) -> tuple[Int64, Int64]:
        """Rows of the given representatives and their copies, and for each the position of its representative in `records`."""
        first = np.searchsorted(self._sorted_representatives, records, side="left")
        counts = np.searchsorted(self._sorted_representatives, records, side="right") - first
        source = np.repeat(np.arange(len(records)), counts)
        return self._members[ranges(first, counts)], source

    def _place_whole(self, record: Int64, chosen: Int64, batch: Packed, found: HostEmbeddings) -> None:
        rows, source = self.rows_of(record[chosen])
        for (kind, layer), values in found.pooled.items():
            dtype = np.float32 if kind == "unmasked" else self.store_dtype
            self.file.place(kind, layer, rows, np.asarray(values)[chosen][source].astype(dtype))
        if found.residue:
            ends = np.cumsum(batch.seqlens)
            for row, i in zip(rows.tolist(), chosen[source].tolist(), strict=True):
                inside = slice(int(ends[i] - batch.seqlens[i]) + 1, int(ends[i]) - 1)
                for layer, values in found.residue.items():
                    self._place_residues(layer, row, np.asarray(values)[inside])
        self.file.mark(rows, flag=self.flag)

    def _place_residues(self, layer: int | str, row: int, values: NDArray[Any]) -> None:
        assert self._offsets is not None
        rows = np.arange(self._offsets[row], self._offsets[row + 1])
        kind = "unmasked" if layer == "logits" else "residue"
        self.file.place(kind, layer, rows, values.astype(self.store_dtype, copy=False))

    def _keep_window(self, record: int, i: int, batch: Packed, found: HostEmbeddings) -> None:
        segment = int(batch.segments[i])
        weights = self.collator.weights_of(segment)
        share = np.float32(weights.sum(dtype=np.float64) / self.work.embedded[record])
        start = int(self.work.segments.start[segment])
        is_last = start + len(weights) == self.work.embedded[record]
        part = {"bos": share, "eos": np.float32(is_last)}  # a mean is weighted already
        end = int(batch.seqlens[: i + 1].sum())
        inside = slice(end - int(batch.seqlens[i]) + 1, end - 1)
        pooled = {
            (kind, layer): np.asarray(values)[i] * part.get(kind, np.float32(1))
            for (kind, layer), values in found.pooled.items()
        }
        residue = {layer: np.asarray(values)[inside].copy() for layer, values in found.residue.items()}
        self.keep(record, Window(segment, start, pooled, residue))

    def keep(self, record: int, window: "Window") -> None:
        """Take one window of a record; with the last of them the record is placed."""
        windows = self._windows.setdefault(record, {})
        windows[window.segment] = window
        first, last = np.searchsorted(self.work.segments.record, [record, record + 1])
        if len(windows) == last - first:
            self._place_windows(record, [windows[s] for s in range(int(first), int(last))])
            del self._windows[record]

    def forget_windows(self) -> None:
        """Drop windows of records whose other windows have not come."""
        self._windows.clear()

    def _place_windows(self, record: int, windows: "list[Window]") -> None:
        with np.errstate(over="ignore"):  # what does not fit the store dtype is found below
            self._place_blend(record, windows)

    def _place_blend(self, record: int, windows: "list[Window]") -> None:
        """Add the windows up in their order, check the result in the store dtype, and place it."""
        rows, _ = self.rows_of(np.asarray([record]))
        pooled = {key: sum(w.pooled[key] for w in windows) for key in windows[0].pooled}
        stored = {key: np.asarray(values).astype(self.store_dtype) for key, values in pooled.items()}
        residue = {}
        for layer in windows[0].residue:
            whole = np.zeros((int(self.work.embedded[record]), windows[0].residue[layer].shape[1]), np.float32)
            for w in windows:
                whole[w.start : w.start + len(w.residue[layer])] += w.residue[layer]
            residue[layer] = whole.astype(self.store_dtype)
        if not all(np.isfinite(values).all() for values in (*stored.values(), *residue.values())):
            self.broken.append(record)
            return
        for (kind, layer), values in stored.items():
            self.file.place(kind, layer, rows, np.broadcast_to(values, (len(rows), len(values))))
        for layer, values in residue.items():
            for row in rows.tolist():
                self._place_residues(layer, row, values)
        self.file.mark(rows, flag=self.flag)


@dataclass(frozen=True)
class Window:
    """What a window adds to its record: weighted already. segment: its number; start: its first residue in the record."""

    segment: int
    start: int
    pooled: dict[tuple[str, Any], NDArray[np.float32]]
    residue: dict[int | str, NDArray[np.float32]]
