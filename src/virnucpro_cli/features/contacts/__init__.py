"""Contact maps in an embeddings file: where each lies, and the pass that computes them, a batch of proteins at a time.

Copies of a protein share its map. A map that is still pending in a finished file is one that there was no memory for.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from virnucpro_cli import fasta, report, store, tables
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.engine.placer import COMMIT_SECONDS
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features import Feature, Loaded, Run, Shards
from virnucpro_cli.features.contacts import head, totals
from virnucpro_cli.model import attention, locate
from virnucpro_cli.model.attention import BROKEN, describe
from virnucpro_cli.plan.packing import SPECIAL_TOKENS
from virnucpro_cli.plan.policies import Decisions
from virnucpro_cli.store import schema
from virnucpro_cli.store.parts import ContactMaps

T = TypeVar("T")
Predicted = tuple[torch.Tensor, bool]
"""A map [L, L] in the dtype of the file, and whether it is finite."""
Waiting = Callable[[], list[Predicted]]
"""Waits for the maps of a batch that was begun."""
BLOCK = 1 << 22  # values placed at a time
VALUES, STARTS, SIZES, STATUS, SUMS = (f"contacts/{name}" for name in ("values", "starts", "sizes", "status", "sums"))
COLUMNS = (STARTS, SIZES, STATUS, SUMS)
LEFT_OUT = "contact maps left out"


class Contacts(Feature):
    """A contact map of each protein, or of those that a list names."""

    reads = ("contacts_for",)
    remade = COLUMNS

    def __init__(self, config: EmbedConfig):
        """Raises UserError if the list of --contacts-for cannot be read."""
        super().__init__(config)
        self.names: set[str] | None = None
        self.wanted = np.zeros(0, np.bool_)
        if config.contacts_for is not None:
            lines = tables.Lines(config.contacts_for)
            self.names = {name.strip() for (name,) in tables.rows(lines, columns=1)} - {""}
            self.sha256 = lines.digest.hexdigest()

    def of_input(self, table: fasta.RecordTable, extra: store.Extra) -> store.Extra:
        """The fingerprint entry for the list. Raises UserError for a list that names no record."""
        self.wanted = np.ones(len(table), np.bool_)
        if self.names is None:
            return store.Extra()
        path, full, unknown = self.config.contacts_for, self.config.id == "full", set(self.names)
        for rows in store.blocks(len(table)):
            names = table.names(rows.start, rows.stop, full)
            self.wanted[rows] = [name in self.names for name in names]
            unknown.difference_update(names)
        if not self.wanted.any():
            refusal = f"--contacts-for {path} names no protein of the input."
            raise UserError(refusal, f"Names there are such as {table.examples(full)}.")
        counts = {f"names of {path} that no protein has": len(unknown)}
        return store.Extra(fingerprint={"contacts_for": self.sha256}, counts=counts)

    def of_part(self, records: NDArray[np.int64] | None, decisions: Decisions, extra: store.Extra) -> store.Extra:
        """Room for the maps of this part, see `laid_out`: int64 `starts`, int32 `sizes` [N]."""
        wanted = (self.wanted if records is None else self.wanted[records]) & (decisions.reason == 0)
        sizes = np.where(wanted, decisions.embedded, 0).astype(np.int32)
        return laid_out(np.where(wanted, decisions.representative, np.int64(-1)), sizes)

    def note(self, run: Run) -> str | None:
        longest = int(run.layout.extra.columns[SIZES].max(initial=0))
        if not longest:
            return None
        size = report.size(run.layout.extra.values[VALUES] * run.layout.store_dtype.itemsize)
        memory = report.size(head.bytes_needed(run.spec, [longest]))
        return (
            f"contacts: {size} of maps; a protein of {counted(longest, 'residue')} needs {memory} of memory beside the "
            "weights"
        )

    def fingerprint(self, weights: locate.Weights, dtype: torch.dtype) -> dict[str, Any]:
        beside = [path for path in head.regression_beside(weights) if path.is_file()]
        entries = {"contact_regression_sha256": locate.sha256_of(beside)} if beside else {}
        if dtype != torch.float32:
            entries["contact_dtype"] = describe(dtype_of(dtype))  # once it was float32, whatever the run
        return entries

    def check_weights(self, loaded: Loaded, weights: locate.Weights) -> None:
        spec, state, _ = loaded
        head.with_contact_head(state, spec, weights)

    def lacking(self, file: store.EmbeddingFile) -> dict[str, int]:
        maps = file.contact_maps
        return {LEFT_OUT: maps.pending} if maps is not None and maps.pending else {}

    def after(self, run: Run) -> None:
        with run.clock.stage("contacts"):
            left_out = fill(run)
        if left_out:
            run.summary.counts[LEFT_OUT] = left_out
            run.summary.missed += left_out
            remedy = "the same command where there is more tries them again"
            run.tell(f"{counted(left_out, 'protein')} without a contact map: out of memory; {remedy}")

    @staticmethod
    def of_merged(extra: store.Extra, shards: Shards) -> store.Extra:
        n = sum(len(records) for records, _ in shards)
        key, sizes, before = np.full(n, -1, np.int64), np.zeros(n, np.int32), 0
        for records, maps in _maps_of(shards):
            key[records] = np.where(maps.starts < 0, -1, maps.starts + before)
            sizes[records] = maps.sizes
            before += len(maps.values)
        return laid_out(key, sizes)

    @staticmethod
    def merge(file: store.Store, shards: Shards) -> None:
        """Copy all maps that are pending, a shard after the other; what a shard had no memory for stays pending."""
        for records, maps in _maps_of(shards):
            starts, status = file.read(STARTS, records)[:, 0], status_of(file)[records]
            first, _ = sharers(starts, np.flatnonzero(status == store.PENDING))
            for own in first:
                place(file, int(starts[own]), int(maps.sizes[own]), maps.raw(own))
            for code in (store.DONE, store.SKIPPED):
                rows = records[(starts >= 0) & (status == store.PENDING) & (maps.status == code)]
                settle(file, rows, code)

    @staticmethod
    def described(file: store.EmbeddingFile) -> Iterator[tuple[str, str]]:
        if (maps := file.contact_maps) is not None:
            left_out = f", {maps.pending:,} more left out: out of memory" if file.complete and maps.pending else ""
            size = report.size(maps.values.nbytes)
            yield "/contacts", f"maps of {counted(maps.done, 'protein')}, {size}{left_out}"

    @staticmethod
    def count_wrong(file: store.EmbeddingFile) -> int:
        """Number of maps that are neither finite and symmetric, where done, nor NaN."""
        wrong = 0
        if (maps := file.contact_maps) is not None:
            with_map = np.flatnonzero(maps.starts >= 0)
            settled = (maps.status != store.PENDING) | file.complete  # one that is left out is NaN
            for row in with_map[np.unique(maps.starts[with_map], return_index=True)[1]].tolist():
                if settled[row]:
                    values = maps.raw(row)
                    symmetric = np.isfinite(values).all() and (values == values.T).all()
                    wrong += not (symmetric if maps.status[row] == store.DONE else np.isnan(values).all())
        return wrong


def _maps_of(shards: Shards) -> Iterator[tuple[NDArray[np.int64], ContactMaps]]:
    """Records and maps of each shard."""
    for records, file in shards:
        maps = file.contact_maps
        assert maps is not None
        yield records, maps


def laid_out(key: NDArray[np.int64], sizes: NDArray[np.int32]) -> store.Extra:
    """Room for maps, all pending, in the order of their first records.

    key: int64 [N], the same for records that share a map, -1 for none; sizes: int32 [N], residues.
    """
    rows = np.flatnonzero(key >= 0)
    _, first, of = np.unique(key[rows], return_index=True, return_inverse=True)
    order = np.argsort(first)
    squares = sizes[rows[first[order]]].astype(np.int64) ** 2
    starts, status = np.full(len(key), -1, np.int64), np.full(len(key), store.SKIPPED, np.uint8)
    starts[rows] = (np.cumsum(squares) - squares)[np.argsort(order)[of]]
    status[rows] = store.PENDING
    return store.Extra(
        {STARTS: starts, SIZES: sizes, STATUS: status, SUMS: np.zeros(len(key), np.uint64)},
        values={VALUES: int(squares.sum())}, counts={"contact maps": len(rows)}, changing=frozenset((STATUS, SUMS)),
    )  # fmt: skip


def fill(run: Run) -> int:
    """Compute and place all maps that are pending, and return how many proteins have none for want of memory.

    Needs every record placed and marked. The map of a skipped record is NaN, as is a map that is not finite.
    A map or an embedding that there was no memory for leaves its map pending.
    """
    file = run.file
    file.commit()
    starts, sizes, before = _columns(file, STARTS, SIZES, STATUS)
    pending = np.flatnonzero(status_of(file) == store.PENDING)
    if lost := int((before[pending] != store.PENDING).sum()):
        lost_maps = f"contact maps of {counted(lost, 'protein')} not in {file.path} as they were committed"
        run.tell(f"{lost_maps}, and computed again: see to the disk")
    skipped = file.status[pending] == store.SKIPPED
    given_up = skipped & (file.reason[pending] != store.NO_MEMORY)
    for record in sharers(starts, pending[skipped])[0]:
        place(file, int(starts[record]), int(sizes[record]))
    settle(file, pending[given_up], store.SKIPPED)
    left_out = int((skipped & ~given_up).sum())
    first, sharing = sharers(starts, pending[~skipped])
    if not first:
        return left_out

    predict = _Predictor(run)
    records = list(zip(first, sharing, strict=True))
    settled: dict[int, list[NDArray[np.int64]]] = {store.DONE: [], store.SKIPPED: []}
    committed = time.perf_counter()
    with report.Tracker(run.out, int((sizes[first].astype(np.int64) ** 2).sum()), "pairs of residues") as tracker:
        for (record, sharing_it), predicted in zip(records, predict(first, sizes), strict=True):
            size = int(sizes[record])
            values, is_finite = predicted or (None, False)
            place(file, int(starts[record]), size, values.numpy() if values is not None and is_finite else None)
            if values is None:
                left_out += len(sharing_it)
            else:
                settled[store.DONE if is_finite else store.SKIPPED].append(sharing_it)
            if time.perf_counter() - committed > COMMIT_SECONDS:
                _settle_all(file, settled)
                committed = time.perf_counter()
            tracker.advance(size * size)
    _settle_all(file, settled)
    return left_out


class _Predictor:
    """Maps of proteins, batch by batch: in the dtype of `dtype_of`, and in fp32 those that are not finite."""

    def __init__(self, run: Run):
        self.run, self.spec, self.device = run, run.spec, run.device
        pin = self.device.type == "cuda"
        segments, embedded = run.decisions.segments, run.decisions.embedded
        self.collate = VarlenCollator(run.table, segments, embedded, run.plan, pin=pin)
        self.models: dict[torch.dtype, head.Contacts | None] = {}

    def __call__(self, records: list[int], sizes: NDArray[np.int32]) -> Iterator[Predicted | None]:
        """The map of each record, of int32 [N] residues, in order; None for one that there is no memory for.

        A batch is of neighbours whose tokens fit the budget, and is computed while the one before it is stored.
        """
        dtype = dtype_of(self.run.dtype)
        before: Iterator[Predicted | None] = iter(())
        tokens = np.append(0, np.cumsum(sizes[records].astype(np.int64) + SPECIAL_TOKENS))
        for first, last in schema.chunks(tokens, len(records), self.run.plan.token_budget):
            batch = records[first:last]
            after = self._begun(batch, sizes, dtype)
            yield from before
            before = self._ended(batch, sizes, dtype, after)
        yield from before

    def _ended(
        self, batch: list[int], sizes: NDArray[np.int32], dtype: torch.dtype, begun: Waiting | None
    ) -> Iterator[Predicted | None]:
        maps = begun and _or_none(begun)
        if maps is None and len(batch) > 1:
            for record in batch:
                yield from self._ended([record], sizes, dtype, self._begun([record], sizes, dtype))
            return
        alone: list[Predicted | None] = [None]
        for record, each in zip(batch, maps or alone, strict=True):
            if each is not None and not each[1] and dtype != torch.float32:
                (each,) = self._ended([record], sizes, torch.float32, self._begun([record], sizes, torch.float32))
            yield each

    def _begun(self, batch: list[int], sizes: NDArray[np.int32], dtype: torch.dtype) -> Waiting | None:
        if dtype not in self.models:
            self.models[dtype] = _or_none(self._model, dtype)
        model, fits = self.models[dtype], head.bytes_needed(self.spec, sizes[batch].tolist())
        if model is None or fits >= devices.free_memory(self.device):
            return None
        segments, _ = self.run.decisions.segments.bounds_of(self.run.decisions.representative[batch])
        return _or_none(model.start, self.collate(segments))

    def _model(self, dtype: torch.dtype) -> head.Contacts:
        run = self.run
        spec, state, _ = run.take_weights()
        state = head.with_contact_head(state, spec, run.weights)
        named = run.config.attention if dtype == run.dtype else "auto"
        backend = attention.resolve(named, run.device, dtype, run.config.residual)
        store_dtype = devices.store_dtype(run.config.store_dtype)
        model = head.Contacts(spec, state, dtype, run.device, backend, store_dtype)
        refusal = totals.refusal(run.device)
        if refusal is not None and BROKEN in refusal:
            run.tell(f"contacts in plain steps: {refusal}")
        return model


def dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of maps in a run of this dtype: fp16 for all that are narrower than fp32.

    On the real 8M weights and 30 viral proteins, the worst probability of fp16 is off by 0.022, and of bf16 by 0.47.
    """
    return torch.float32 if dtype == torch.float32 else torch.float16


def _settle_all(file: store.Store, settled: dict[int, list[NDArray[np.int64]]]) -> None:
    for code, rows in settled.items():
        if rows:
            settle(file, np.concatenate(rows), code)
            rows.clear()


def settle(file: store.Store, records: NDArray[np.int64], status: int) -> None:
    """Make durable that the maps of these records, int64 [n], are as they were placed, with their checksums."""
    file.commit()  # and all that was placed is in the file
    file.settle(STATUS, records, status, {SUMS: _sums(file, records, np.full(len(records), status))})


def status_of(file: store.Store) -> NDArray[np.uint8]:
    """Status of each record's map, uint8 [N]: pending also where a map is not as it was settled."""
    starts, status, sums = _columns(file, STARTS, STATUS, SUMS)
    settled = np.flatnonzero((status != store.PENDING) & (starts >= 0))
    status[settled[_sums(file, settled, status[settled]) != sums[settled]]] = store.PENDING
    return status


def _columns(file: store.Store, *names: str) -> list[NDArray[Any]]:
    every = np.arange(len(file.status))
    return [file.read(name, every)[:, 0] for name in names]


def _sums(file: store.Store, records: NDArray[np.int64], status: NDArray[Any]) -> NDArray[np.uint64]:
    """XXH3 of the map of each record, uint64 [n], with its status as the seed."""
    starts, sizes = _columns(file, STARTS, SIZES)
    sums = np.zeros(len(file.status), np.uint64)
    for code in np.unique(status).tolist():
        for record, sharing in zip(*sharers(starts, records[status == code]), strict=True):
            hasher = xxhash.xxh3_64(seed=code)
            for part in store.blocks(int(sizes[record]) ** 2, BLOCK):
                hasher.update(file.read_at(VALUES, int(starts[record]) + part.start, part.stop - part.start).data)
            sums[sharing] = hasher.intdigest()
    return sums[records]


def _or_none(make: Callable[..., T], *arguments: Any) -> T | None:
    """None if there is no memory for it."""
    try:
        return make(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_for_want_of_memory(error):
            raise
        return None


def sharers(starts: NDArray[np.int64], records: NDArray[np.int64]) -> tuple[list[int], list[NDArray[np.int64]]]:
    """A record for each map, in the order of the maps, and all records that have it.

    starts: int64 [N], of the maps of all records; records: int64 [n], those to look at.
    """
    records = records[np.argsort(starts[records], kind="stable")]
    bounds = np.flatnonzero(np.diff(starts[records], prepend=-1))
    return records[bounds].tolist(), np.split(records, bounds[1:]) if len(records) else []


def place(file: store.Store, start: int, size: int, values: NDArray[Any] | None = None) -> None:
    """Take a map, float32 [size, size], to its place, some rows at a time; NaN without values."""
    dtype = file.places[VALUES].dtype
    for rows in store.blocks(size, max(1, BLOCK // size)):
        count = (rows.stop - rows.start) * size
        flat = np.full(count, np.nan, dtype) if values is None else values[rows].astype(dtype, copy=False).reshape(-1)
        file.place_at(VALUES, start + rows.start * size, flat)
