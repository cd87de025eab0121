"""Contact maps in an embeddings file: whose, where each lies, and the pass that computes them, one protein at a time.

Copies of a protein share its map. In a finished file, a map that is still pending is one that the device had no memory for.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import fasta, report, store, tables
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.engine.placer import COMMIT_SECONDS
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features.contacts import head
from virnucpro_cli.features.contacts.head import regression_beside
from virnucpro_cli.features.feature import Feature, Loaded, Run
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import Plan
from virnucpro_cli.plan.policies import Decisions

Made = TypeVar("Made")
BLOCK = 1 << 22  # values placed at a time
VALUES, STARTS, SIZES, STATUS, SUMS = (f"contacts/{name}" for name in ("values", "starts", "sizes", "status", "sums"))
COLUMNS = (STARTS, SIZES, STATUS, SUMS)
LEFT_OUT = "contact maps left out"


Named = tuple[set[str], str]
"""The names in a file, and the SHA-256 of it."""


class Contacts(Feature):
    """A contact map of each protein, or of those that a list names."""

    def __init__(self, config: EmbedConfig):
        """Raises UserError if the list of --contacts-for cannot be read."""
        super().__init__(config)
        self.named = None if config.contacts_for is None else _read(config.contacts_for)
        self.wanted = np.zeros(0, np.bool_)

    def reads(self) -> list[str]:
        return [self.config.contacts_for] if self.config.contacts_for is not None else []

    def of_input(self, table: fasta.RecordTable, extra: store.Extra) -> store.Extra:
        self.wanted, named = wanted(self.config, table, self.named)
        return named

    def of_part(self, records: NDArray[np.int64] | None, work: Decisions, extra: store.Extra) -> store.Extra:
        return room(self.wanted if records is None else self.wanted[records], work)

    def note(self, layout: store.Layout, spec: ModelSpec) -> str | None:
        return described(layout.extra, spec, layout.store_dtype.itemsize)

    def fingerprint(self, found: locate.Weights) -> dict[str, Any]:
        beside = [path for path in regression_beside(found) if path.is_file()]
        return {"contact_regression_sha256": locate.sha256_of(beside)} if beside else {}

    def check_weights(self, loaded: Loaded, found: locate.Weights) -> None:
        spec, state, _ = loaded
        head.with_contact_head(state, spec, found)

    def lacking(self, file: store.EmbeddingFile) -> dict[str, int]:
        maps = file.contact_maps
        return {LEFT_OUT: maps.pending} if maps is not None and maps.pending else {}

    def after(self, run: Run) -> None:
        with run.clock.stage("contacts"):
            left_out = fill(run.file, run.table, run.work, run.plan, run.found, run.device, run.out)
        if left_out:
            run.summary.counts[LEFT_OUT] = left_out
            run.summary.missed += left_out
            run.tell(
                f"{counted(left_out, 'protein')} without a contact map: out of memory; the same command where there is more "
                "tries them again"
            )


def wanted(config: EmbedConfig, table: fasta.RecordTable, named: Named | None) -> tuple[NDArray[np.bool_], store.Extra]:
    """Mask [N] of the records of the input that get a map, and the fingerprint entry for it. named: those of --contacts-for.

    Raises UserError for a list that names no record.
    """
    if named is None:
        return np.ones(len(table), np.bool_), store.Extra()
    names, sha256 = named
    unknown = set(names)
    chosen = _named(names, unknown, table, config)
    counts = {f"names of {config.contacts_for} that no protein has": len(unknown)}
    return chosen, store.Extra(fingerprint={"contacts_for": sha256}, counts=counts)


def room(wanted: NDArray[np.bool_], work: Decisions) -> store.Extra:
    """Where the maps will be: int64 `starts` in the flat values (-1: no map), int32 `sizes`, `status`. wanted: mask [N]."""
    wanted = wanted & (work.reason == 0)
    sizes = np.where(wanted, work.embedded, 0).astype(np.int32)
    return laid_out(np.where(wanted, work.representative, -1), sizes)


def laid_out(key: NDArray[np.int64], sizes: NDArray[np.int32]) -> store.Extra:
    """Room for maps, all pending, in the order of their first records. key: of each record, the same if they share a map, -1 for none."""
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


def _read(path: str) -> Named:
    lines = tables.Lines(path)
    names = {name.strip() for (name,) in tables.rows(lines, columns=1)}
    return names - {""}, lines.digest.hexdigest()


def _named(names: set[str], unknown: set[str], table: fasta.RecordTable, config: EmbedConfig) -> NDArray[np.bool_]:
    """Mask [N] of the records that `names` holds. Names of records leave `unknown`."""
    chosen = np.zeros(len(table), np.bool_)
    for rows in store.blocks(len(table)):
        there = table.names(rows.start, rows.stop, config.id == "full")
        chosen[rows] = [name in names for name in there]
        unknown.difference_update(there)
    if not chosen.any():
        raise UserError(
            f"--contacts-for {config.contacts_for} names no protein of the input.",
            f"Names there are such as {table.examples(config.id == 'full')}.",
        )
    return chosen


def described(extra: store.Extra, spec: ModelSpec, itemsize: int) -> str | None:
    """What the maps take, in words; None without any."""
    sizes = extra.columns.get(SIZES)
    if sizes is None or not sizes.any():
        return None
    longest = int(sizes.max())
    return (
        f"contacts: {report.size(extra.values[VALUES] * itemsize)} of maps; one protein at a time in fp32, up to "
        f"{report.size(head.bytes_needed(spec, longest))} of memory beside the weights (for {counted(longest, 'residue')})"
    )


def fill(
    file: store.Store, table: fasta.RecordTable, work: Decisions, plan: Plan, found: locate.Weights, device: torch.device, out: Console,
) -> int:  # fmt: skip
    """Compute and place all maps that are pending, and return how many proteins have none for want of memory.

    Needs every record placed and marked. The map of one that is skipped is NaN, as is one that is not finite; what there was no
    memory for, be it the embedding, stays pending.
    """
    file.commit()
    every = np.arange(len(file.status))
    starts, sizes = (file.read(name, every)[:, 0] for name in (STARTS, SIZES))
    pending = np.flatnonzero(status_of(file) == store.PENDING)
    skipped = file.status[pending] == store.SKIPPED
    given_up = skipped & (file.reason[pending] != store.NO_MEMORY)
    for record in sharers(starts, pending[skipped])[0]:
        place(file, int(starts[record]), int(sizes[record]))
    settle(file, pending[given_up], store.SKIPPED)
    left_out = int((skipped & ~given_up).sum())
    first, sharing = sharers(starts, pending[~skipped])
    if not first:
        return left_out

    spec, state, _ = model_weights.load(found)
    state = head.with_contact_head(state, spec, found)
    predict = _or_none(head.Contacts, spec, state, device)
    collate = VarlenCollator(table, work.segments, work.embedded, plan, pin=device.type == "cuda")
    ready: list[tuple[NDArray[np.int64], int]] = []
    committed = time.perf_counter()
    with report.Tracker(out, int((sizes[first].astype(np.int64) ** 2).sum()), "pairs of residues") as tracker:
        for record, sharing_it in zip(first, sharing, strict=True):
            size = int(sizes[record])
            batch = collate(np.searchsorted(work.segments.record, work.representative[[record]]))
            fits = head.bytes_needed(spec, size) < devices.free_memory(device)
            values = _or_none(predict, batch) if predict is not None and fits else None
            is_finite = values is not None and bool(values.isfinite().all())
            place(file, int(starts[record]), size, values.numpy() if values is not None and is_finite else None)
            if values is None:
                left_out += len(sharing_it)
            else:
                ready.append((sharing_it, store.DONE if is_finite else store.SKIPPED))
            if time.perf_counter() - committed > COMMIT_SECONDS:
                _settle(file, ready)
                committed = time.perf_counter()
            tracker.advance(size * size)
    _settle(file, ready)
    return left_out


def _settle(file: store.Store, ready: list[tuple[NDArray[np.int64], int]]) -> None:
    for code in (store.DONE, store.SKIPPED):
        rows = [rows for rows, status in ready if status == code]
        if rows:
            settle(file, np.concatenate(rows), code)
    ready.clear()


def settle(file: store.Store, records: NDArray[np.int64], status: int) -> None:
    """Make durable that the maps of these records are as they were placed, with their checksums."""
    file.commit()  # and all that was placed is in the file
    file.settle(STATUS, records, status, {SUMS: _sums(file, records, np.full(len(records), status))})


def status_of(file: store.Store) -> NDArray[np.uint8]:
    """Status of each record's map, uint8 [N]: pending also where a map is not as it was settled."""
    every = np.arange(len(file.status))
    starts, status, sums = (file.read(name, every)[:, 0] for name in (STARTS, STATUS, SUMS))
    settled = np.flatnonzero((status != store.PENDING) & (starts >= 0))
    status[settled[_sums(file, settled, status[settled]) != sums[settled]]] = store.PENDING
    return status


def _sums(file: store.Store, records: NDArray[np.int64], status: NDArray[Any]) -> NDArray[np.uint64]:
    """XXH3 of the map of each record [n], with its status as the seed."""
    every = np.arange(len(file.status))
    starts, sizes = (file.read(name, every)[:, 0] for name in (STARTS, SIZES))
    found = np.zeros(len(file.status), np.uint64)
    for code in np.unique(status).tolist():
        for record, sharing in zip(*sharers(starts, records[status == code]), strict=True):
            hasher = xxhash.xxh3_64(seed=code)
            for part in store.blocks(int(sizes[record]) ** 2, BLOCK):
                hasher.update(file.read(VALUES, int(starts[record]) + np.arange(part.start, part.stop)).data)
            found[sharing] = hasher.intdigest()
    return found[records]


def _or_none(make: Callable[..., Made], *arguments: Any) -> Made | None:
    """None if there is no memory for it."""
    try:
        return make(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_for_want_of_memory(error):
            raise
        return None


def sharers(starts: NDArray[np.int64], records: NDArray[np.int64]) -> tuple[list[int], list[NDArray[np.int64]]]:
    """Of records, one for each map, in the order of the maps, and all that have it."""
    records = records[np.argsort(starts[records], kind="stable")]
    bounds = np.flatnonzero(np.diff(starts[records], prepend=-1))
    groups = np.split(records, bounds[1:]) if len(records) else []
    return records[bounds].tolist(), groups


def place(file: store.Store, start: int, size: int, values: NDArray[Any] | None = None) -> None:
    """Take a map [size, size] for its place, NaN without values, some rows at a time."""
    dtype = file.places[VALUES].dtype
    group, _, name = VALUES.rpartition("/")
    for rows in store.blocks(size, max(1, BLOCK // size)):
        count = (rows.stop - rows.start) * size
        flat = np.full(count, np.nan, dtype) if values is None else values[rows].astype(dtype).reshape(-1)
        first = start + rows.start * size
        file.place(group, name, np.arange(first, first + count), flat)
