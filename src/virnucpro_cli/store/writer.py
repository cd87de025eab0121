"""A laid-out file, filled by `pwrite`: rows, then the status bytes that vouch for them, each synced; and its end."""

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import DAMAGE, UserError, damage_named
from virnucpro_cli.kinds import by_residue
from virnucpro_cli.stopping import resumable
from virnucpro_cli.store import disk, schema, sums
from virnucpro_cli.store.layout import Layout, extents_of, lay_out
from virnucpro_cli.store.schema import DONE, NO_MEMORY, PENDING, RECOMPUTED, SKIPPED, STATES, blocks, chunks, distinct

LARGE_WRITE = 1 << 15
MOST_STAGED, LONG_RUN = 1 << 27, 16  # bytes, rows
COMPARED_ROWS = 1 << 16
NEAR_BYTES = 1 << 12  # a page, which is written whole anyway
RESTART = "Discard it with --restart."
DAMAGED = ((*DAMAGE, MemoryError), RESTART)


class Mark(NamedTuple):
    """Records, int64 [n], that are final as placed. sums: uint64 [n], digests of their rows; None: see the file."""

    rows: NDArray[np.int64]
    status: int
    flag: int
    reason: int
    sums: NDArray[np.uint64] | None


def _alike(marks: list[Mark]) -> Iterator[tuple[tuple[int, int, int, bool], list[Mark]]]:
    """Status, flag, reason and whether there are sums, with the marks that follow each other and agree in them.

    Marks are some COMPARED_ROWS rows at a time, so that the memory that they take does not grow with their number.
    """
    turns = (np.cumsum([len(mark.rows) for mark in marks]) // COMPARED_ROWS).tolist()
    for key, group in groupby(
        zip(marks, turns, strict=True), lambda each: (*each[0][1:4], each[0].sums is not None, each[1])
    ):
        yield key[:4], [mark for mark, _ in group]


def _in_order(parts: list[NDArray[Any]], order: NDArray[np.int64]) -> NDArray[Any]:
    """The rows `order` (int64 [n]) of all parts [.., D] behind one another, which are copied once."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    values, begin = np.empty((len(order), *parts[0].shape[1:]), parts[0].dtype), 0
    for part in parts:
        _in_one(values)[place[begin : begin + len(part)]] = _in_one(np.ascontiguousarray(part))
        begin += len(part)
    return values


def _in_one(values: NDArray[Any]) -> NDArray[np.void]:
    """Rows [n, D], which lie in one piece, each as one value, which NumPy moves at once: [n]."""
    return values.view(np.uint8).reshape(-1).view(np.dtype((np.void, values[0].nbytes)))


class Store:
    """A laid-out file, locked by this process, filled row by row.

    locked: whether its file system has locks; replaces: the finished file that this is to be a better one of.
    half: the folder whose rows and states this store fills, by names without it; empty for the file's own.
    halves: stores of the other models' rows in the file.
    """

    def __init__(self, output: Path, path: Path, fd: int, locked: bool = True, half: str = ""):
        self.output, self.path, self.fd, self.locked, self.half = output, path, fd, locked, half
        self.replaces: os.stat_result | None = None
        self._uncommitted: list[Mark] = []
        self._staged: defaultdict[str, list[tuple[NDArray[np.int64], NDArray[Any]]]] = defaultdict(list)
        self._staged_bytes = 0
        self._environment: int | None = 0
        self._failed: UserError | None = None  # the first failed sync
        self._lock = threading.RLock()  # of what is placed and marked, which a commit on another thread takes over
        self._committing = threading.RLock()
        self._passing: disk.PassingDigests | None = None
        self.written = 0  # bytes
        with h5py.File(path, "r", locking=False) as file:
            columns = [file[schema.name_in(half, name)][:] for name in STATES]
            self.environments: list[str] = schema.whole_lines(file["run/environments"][()])
            has_offsets = not half and "residue/offsets" in file
            self._offsets: NDArray[np.int64] | None = file["residue/offsets"][:] if has_offsets else None
            extents = extents_of(file, path)
        self.status: NDArray[np.uint8]
        self.flags: NDArray[np.uint16]
        self.reason: NDArray[np.uint8]
        self.computed_by: NDArray[np.uint8]
        self.status, self.flags, self.reason, self.computed_by = columns
        self.places = extents if not half else {
            name.removeprefix(f"{half}/"): extent for name, extent in extents.items() if name.startswith(f"{half}/")
        } | {name: extent for name, extent in extents.items() if name.startswith("run/")}  # fmt: skip
        if half:
            self.places["run/sums"] = extents[schema.name_in(half, "run/sums")]
        self._vouched = [name for name in self.places if schema.is_of_rows(name)]
        self.halves: dict[str, Store] = {}
        for name in schema.HALVES if not half else ():
            if schema.name_in(name, "status") in extents:
                self.halves[name] = Store(output, path, fd, locked, name)
                self.halves[name].environments = self.environments

    @classmethod
    def create(cls, output: Path, layout: Layout, preallocate: bool = True) -> "Store":
        """Lay the file out under a name that no run resumes, make it whole and durable, then call it `.partial`.

        Whoever holds the first name is the only one who can make a `.partial`. Raises UserError if that fails.
        """
        partial = disk.partial_path(output)
        try:
            with disk.making(partial, os.rename) as (fd, locked):
                if partial.exists():
                    raise disk.Overtaken(partial)
                if preallocate:
                    disk.reserve(fd, layout.file_bytes)
                lay_out(fd, layout)
                if preallocate:
                    disk.reserve(fd, os.fstat(fd).st_size)
                store = cls(output, disk.new_path(partial), fd, locked)
                for each, its in store._with_layouts(layout):
                    for rows in blocks(len(store.status)):
                        each._begin(its, np.arange(rows.start, rows.stop))
                store._write_text("run/layout", store._sum_of_the_rest(layout))
        except OSError as error:
            raise disk.disk_error(error, output, resumable=False) from None
        for each in (store, *store.halves.values()):
            each.path = partial
        return store

    @classmethod
    def resume(cls, output: Path) -> "Store":
        """Open the `.partial` of an earlier run, locked. Raises UserError if it is damaged, or another run has it."""
        partial = disk.partial_path(output)
        fd = disk.open_existing(partial)
        try:
            locked = disk.lock(fd, partial)
            with damage_named(partial, *DAMAGED):
                store = cls(output, partial, fd, locked)
            for each in (store, *store.halves.values()):
                # What there was no memory for is tried again; a kill while one is taken back leaves no reason at all.
                each.status[(each.status == SKIPPED) & np.isin(each.reason, (0, NO_MEMORY))] = PENDING
            store._write_text("run/complete", b"\0")
            store._sync()  # before any row changes
            return store
        except BaseException:
            os.close(fd)
            raise

    def _with_layouts(self, layout: Layout) -> "list[tuple[Store, Layout]]":
        """This store with its layout, and its halves with theirs."""
        return [(self, layout), *((self.halves[name], its) for name, its in layout.extra.halves.items())]

    def recheck(self, layout: Layout) -> int:
        """Compare all that an earlier run committed with its checksums, and make the records that differ pending again.

        Returns how many they are, each half counted by itself. layout: as it is written for a new file. Raises
        UserError if the file differs where no record is, or has no checksums.
        """
        if "run/layout" not in self.places:
            raise UserError(f"{self.path} was begun by an earlier version, without checksums.", RESTART)
        extent = self.places["run/layout"]
        with damage_named(self.path, *DAMAGED):
            if os.pread(self.fd, extent.row_bytes, extent.offset) != self._sum_of_the_rest(layout):
                raise ValueError("its names or columns are not those that were laid out")
        return sum(each._recheck(its) for each, its in self._with_layouts(layout))

    def _recheck(self, layout: Layout) -> int:
        lost, n = 0, len(self.status)
        offsets = np.arange(n + 1) if self._offsets is None else self._offsets
        for start, stop in chunks(offsets, n, COMPARED_ROWS):
            rows = np.arange(start, stop)
            states = [self.read(name, rows)[:, 0] for name in STATES]
            expected, vouched = sums.of_states(states, self.environments), states[0] != PENDING
            expected[vouched] += self._row_sums(rows[vouched])
            differs = expected != self.read("run/sums", rows)[:, 0]
            if differs.any():
                self._begin(layout, rows[differs])
                lost += int((differs & vouched).sum())
        if lost:
            self._sync()
        return lost

    def _begin(self, layout: Layout, rows: NDArray[np.int64]) -> None:
        """Give records the values that they have in a new file, and the checksums of these."""
        for name in STATES:
            column, held = getattr(layout, name), getattr(self, name)
            first = np.zeros(len(rows), held.dtype) if column is None else column[rows].astype(held.dtype)
            if (self.read(name, rows)[:, 0] != first).any():
                self._write_rows(name, rows, first)
            held[rows] = first
        skipped = layout.status[rows] == SKIPPED
        self._fill_nan(rows[skipped])
        expected = self._state_sums(rows)
        expected[skipped] += self._row_sums(rows[skipped])
        self._write_rows("run/sums", rows, expected)

    def _fill_nan(self, records: NDArray[np.int64]) -> None:
        for name in self._vouched if len(records) else ():
            extent, (rows, _), (kind, _, layer) = self.places[name], self._rows_of(name, records), name.partition("/")
            width = extent.row_bytes // extent.dtype.itemsize
            for block in blocks(len(rows), max(1, MOST_STAGED // extent.row_bytes)):
                some = rows[block]
                self.place(kind, layer, some, np.full((len(some), width), np.nan, extent.dtype))
        self._write_staged()

    def _rows_of(self, name: str, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Rows of records (rising) in a dataset, and how many are of each in one that has a row for each residue."""
        if not by_residue(*name.partition("/")[::2]):
            return records, None
        assert self._offsets is not None
        first = self._offsets[records]
        counts = self._offsets[records + 1] - first
        return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum()), counts

    def _state_sums(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Digests of the states of rows, as this process holds them."""
        return sums.of_states([getattr(self, name)[rows] for name in STATES], self.environments)

    def _row_sums(self, records: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Sums of the digests of all rows of records (rising), as they are in the file."""
        total = np.zeros(len(records), np.uint64)
        for name in self._vouched if len(records) else ():
            rows, counts = self._rows_of(name, records)
            digests = np.empty(len(rows), np.uint64)
            for block in blocks(len(rows), max(1, MOST_STAGED // self.places[name].row_bytes)):
                digests[block] = sums.of_rows(name, self.read(name, rows[block]))
            total += digests if counts is None else sums.of_records(rows, digests, counts)
        return total

    def _sum_of_the_rest(self, layout: Layout) -> bytes:
        changing = [self.places[name] for name in layout.changing & self.places.keys()]
        return sums.of_the_rest(self.fd, [(extent.offset, extent.rows * extent.row_bytes) for extent in changing])

    def place(self, kind: str, layer: int | str, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Take values [n, D], already in the store dtype, for the given rows (int64 [n]).

        Many neighbours are written at once; scattered rows are gathered until a commit, or until they are many, and
        neighbours among them then go out in one write.
        """
        if not len(rows):
            return
        name = f"{kind}/{layer}"
        if len(rows) != len(values) or values[0].nbytes != self.places[name].row_bytes:
            raise RuntimeError("values in another number, dtype or width than their rows")
        with self._lock:
            if values.nbytes >= LARGE_WRITE and (np.diff(rows) == 1).all():
                if name in self._staged:
                    self._write_staged()  # which may hold an older value of these rows
                self._write_rows(name, rows, np.ascontiguousarray(values))
                return
            self._staged[name].append((rows, values if values.base is None else values.copy()))
            self._staged_bytes += values.nbytes
            if self._staged_bytes > MOST_STAGED:
                self._write_staged(LONG_RUN)
                if self._staged_bytes > MOST_STAGED // 2:
                    self._write_staged()

    def place_runs(
        self, name: str, rows: NDArray[np.int64], values: NDArray[Any], starts: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Write runs of rows of a dataset from where they lie in values [n, D], already in the store dtype.

        Run i is `values[starts[i]:starts[i] + counts[i]]`, for row rows[i] and those that follow it; all int64 [m].
        Nothing is copied, and the disk begins with them at once: they are many, and nobody writes beside them later.
        Raises UserError if the disk fails.
        """
        extent = self.places[name]
        if values.nbytes != len(values) * extent.row_bytes or not values.flags.c_contiguous:
            raise RuntimeError("values in another dtype or width than their rows, or not in one piece")
        data, order = values.view(np.uint8).reshape(-1).data, np.argsort(rows)
        begins, ends = starts[order] * extent.row_bytes, (starts + counts)[order] * extent.row_bytes
        offsets = extent.offset + rows[order] * extent.row_bytes
        with self._lock:
            if name in self._staged:
                self._write_staged()  # which may hold an older value of these rows
            for begin, end, offset in zip(begins.tolist(), ends.tolist(), offsets.tolist(), strict=True):
                self._write(data[begin:end], offset)
        disk.begin_to_write(self.fd, extent.offset, extent.rows * extent.row_bytes)

    def place_at(self, name: str, first: int, values: NDArray[Any]) -> None:
        """Write values [n, D], already in the store dtype, to a row and those that follow it, none of them staged."""
        extent = self.places[name]
        if values.nbytes != len(values) * extent.row_bytes or not 0 <= first <= extent.rows - len(values):
            raise RuntimeError("values in another dtype or width than their rows, or outside of them")
        with self._lock:
            data = np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
            self._write(data, extent.offset + first * extent.row_bytes)

    def _write_staged(self, least: int = 1) -> None:
        """Write staged rows. Runs of fewer than `least` neighbours stay: their other neighbours may be on their way."""
        kept: dict[str, tuple[NDArray[np.int64], NDArray[Any]]] = {}
        for name, parts in self._staged.items():
            rows = np.concatenate([rows for rows, _ in parts])
            order = np.argsort(rows, kind="stable")
            rows, values = rows[order], _in_order([values for _, values in parts], order)
            runs = np.cumsum(np.diff(rows, prepend=rows[0]) > 1)  # a row that was placed twice is of one run
            long = np.bincount(runs)[runs] >= least
            if long.all():
                self._write_rows(name, rows, values)
                continue
            kept[name] = rows[~long], values[~long]
            if long.any():
                self._write_rows(name, rows[long], values[long])
        self._staged.clear()  # once all is written: a failure leaves it for the next commit
        self._staged |= {name: [part] for name, part in kept.items()}
        self._staged_bytes = sum(values.nbytes for _, values in kept.values())

    def _write_rows(self, name: str, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Values of rows in rising order; neighbours in one write, and never a byte of a row that is not among them."""
        extent = self.places[name]
        starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)  # where a run of neighbours begins
        bounds = [*(starts * extent.row_bytes).tolist(), values.nbytes]
        offsets = (extent.offset + rows[starts] * extent.row_bytes).tolist()
        data = values.view(np.uint8).reshape(-1).data
        for (a, b), offset in zip(pairwise(bounds), offsets, strict=True):
            self._write(data[a:b], offset)

    def _write_column(self, name: str, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write rows of a column that this process alone writes: rows between near ones go out with them."""
        extent = self.places[name]
        near = NEAR_BYTES // extent.row_bytes
        starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - near - 1) > near)
        for a, b in pairwise([*starts.tolist(), len(rows)]):
            first, last = rows[[a, b - 1]].tolist()
            column = np.empty(last - first + 1, extent.dtype)
            self._read_run(name, first, column.view(np.uint8))
            column[rows[a:b] - first] = values[a:b]
            self._write(column.view(np.uint8).data, extent.offset + first * extent.row_bytes)

    def _read_run(self, name: str, first: int, into: NDArray[np.uint8]) -> None:
        extent = self.places[name]
        view = into.reshape(-1).data
        if disk.pread_all(self.fd, view, extent.offset + first * extent.row_bytes) < len(view):
            raise UserError(f"{self.path} was cut short while it was filled.", "Remove it, and run again.")

    def read(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows (int64 [n]) of a dataset as written: [n, D] in its dtype. Raises UserError if the file was cut short."""
        extent = self.places[name]
        data = np.empty((len(rows), extent.row_bytes), np.uint8)
        starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
        for a, b in pairwise([*starts.tolist(), len(rows)]):
            self._read_run(name, int(rows[a]), data[a:b])
        return data.view(extent.dtype)

    def read_at(self, name: str, first: int, count: int) -> NDArray[Any]:
        """A row and those that follow it, [count, D] in the dtype of the dataset, as `read`."""
        extent = self.places[name]
        data = np.empty((count, extent.row_bytes), np.uint8)
        self._read_run(name, first, data)
        return data.view(extent.dtype)

    def mark(
        self, rows: NDArray[np.int64], status: int = DONE, flag: int = 0, reason: int = 0,
        row_sums: NDArray[np.uint64] | None = None,
    ) -> None:  # fmt: skip
        """Note that rows (int64 [n]) are final as placed so far; it becomes true on disk with the next commit.

        row_sums: uint64 [n], the digests of all rows of each record, added up. Without them they are read in the file.
        """
        if len(rows):
            with self._lock:
                self._uncommitted.append(Mark(rows, status, flag, reason, row_sums))

    def commit(self) -> None:
        """Make placed rows durable, then the status bytes that vouch for them. After a failed sync, never again.

        Other threads may place and mark meanwhile; that is the next commit's. Raises UserError if the disk fails.
        """
        with self._committing:
            with self._lock:
                if self._failed is not None:
                    raise self._failed
                self._write_staged()
                marks, self._uncommitted = self._uncommitted, []
            try:
                if marks:
                    self._vouch_for(marks)
            except BaseException:
                with self._lock:
                    if self._failed is None:
                        self._uncommitted[:0] = marks
                raise

    def _vouch_for(self, marks: list[Mark]) -> None:
        self._sync()
        every = distinct(np.concatenate([mark.rows for mark in marks]))
        total, known = np.zeros(len(every), np.uint64), np.zeros(len(every), np.bool_)
        for (status, flag, reason, has_sums), group in _alike(marks):
            marked = np.concatenate([mark.rows for mark in group])
            at = np.searchsorted(every, marked)
            known[at] = has_sums
            if has_sums:
                total[at] = np.concatenate([mark.sums for mark in group if mark.sums is not None])
            rows = distinct(marked)
            self.status[rows] = status
            self._set("flags", self.flags, rows, self.flags[rows] & ~np.uint16(RECOMPUTED) | np.uint16(flag))
            self._set("reason", self.reason, rows, np.full(len(rows), reason, np.uint8))
            if self._environment is not None:
                self._set("computed_by", self.computed_by, rows, np.full(len(rows), self._environment, np.uint8))
        total[~known] = self._row_sums(every[~known])
        for block in blocks(len(every)):
            self._write_column("run/sums", every[block], self._state_sums(every[block]) + total[block])
        self._sync()
        for block in blocks(len(every)):
            self._write_column("status", every[block], self.status[every[block]])
        self._sync()

    def settle(self, name: str, rows: NDArray[np.int64], value: int, columns: dict[str, NDArray[np.uint64]]) -> None:
        """Make placed values durable, with those (uint64 [n]) of other columns for rows (int64 [n]).

        Then, also durably, give rows of the column `name` a value that vouches for them. Raises UserError on failure.
        """
        with self._committing:
            self.commit()
            if len(rows):
                order = np.argsort(rows)
                for column, values in columns.items():
                    self._write_rows(column, rows[order], values[order])
                self._sync()
                self._write_rows(name, rows[order], np.full(len(rows), value, self.places[name].dtype))
                self._sync()

    def compute_in(self, environment: str) -> None:
        """Note in the column computed_by that rows marked from now on are of this environment (a line of JSON)."""
        with self._committing:
            self.commit()
            text = "\n".join([*self.environments, environment, ""]).encode()
            room = len(text) <= schema.ENVIRONMENT_BYTES and len(self.environments) < schema.MOST_ENVIRONMENTS
            if environment not in self.environments and room:
                self._write_text("run/environments", text)
                self._sync()
                self.environments.append(environment)
            known = environment in self.environments
            self._environment = self.environments.index(environment) if known else schema.MOST_ENVIRONMENTS

    def hash_as_written(self) -> None:
        """From now on take the checksum of blocks that are written in order as they pass, instead of reading them."""
        self._passing = disk.PassingDigests()
        for half in self.halves.values():
            half._passing = self._passing

    def keep_environments(self) -> None:
        """Leave in the column computed_by what the layout says."""
        self._environment = None

    def _set(self, name: str, column: NDArray[Any], rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write what changes, and only then remember it: a signal in the middle must not leave it looking written.

        rows: int64 [n], rising; values: [n] in the column's dtype.
        """
        if (column[rows] != values).any():
            self._write_column(name, rows, values)
            column[rows] = values

    def finish(self, report: str, overwrite: bool) -> str:
        """Store the report and the checksum, which is returned, declare the file complete, and give it its final name.

        Without overwrite, no other file than `replaces` is replaced. Raises UserError if another file has the name, the
        disk fails, or a record is pending: whoever calls this believes that none is.
        """
        every = (self, *self.halves.values())
        for each in every:
            each.commit()
        if pending := sum(int((each.status == PENDING).sum()) for each in every):
            raise UserError(
                f"{pending:,} records of {self.path} were not computed, though all seemed done; this is a bug.",
                "Run the same command again, which computes them, and please report it.",
            )
        self._write_text("run/report", report.encode().ljust(schema.REPORT_BYTES, b"\0"))
        passed = self._passing.whole if self._passing else {}
        itself, complete = (self.places[f"run/{name}"].offset for name in ("checksum", "complete"))
        checksum = disk.checksum(self.fd, itself, complete, passed)
        self._write_text("run/checksum", checksum.encode())
        self._sync()
        self._write_text("run/complete", b"\1")
        self._sync()
        ours = self.replaces is not None and disk.is_the_file(self.output, self.replaces, unchanged=True)
        try:
            disk.rename_asked_for(self.path, self.output, overwrite or ours)
        except OSError as error:
            raise disk.disk_error(error, self.output, resumable=True) from None
        self.path = self.output
        return checksum

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Close the file after the block. If it fails or is stopped, commit first, as far as the disk still lets us."""
        try:
            with resumable(True):
                yield
        except BaseException:
            with suppress(UserError):  # if the disk is what failed, the first error is the one to show
                for each in (self, *self.halves.values()):
                    each.commit()
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock. What was placed but not committed stays pending."""
        if self._passing:
            self._passing.close()
        os.close(self.fd)

    def _write_text(self, name: str, text: bytes) -> None:
        assert len(text) <= self.places[name].row_bytes, f"{name} outgrew its place; this is a bug"
        self._write(memoryview(text), self.places[name].offset)

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            with self._passing.taken(data, offset) if self._passing else nullcontext():
                disk.pwrite_all(self.fd, data, offset)
            self.written += len(data)
        except OSError as error:
            raise disk.disk_error(error, self.output, resumable=True) from None

    def _sync(self) -> None:
        try:
            disk.sync_data(self.fd)
        except OSError as error:
            # The kernel tells of a lost write once, whoever made it: nothing may vouch for a row any more.
            self._uncommitted.clear()
            self._failed = disk.disk_error(error, self.output, resumable=True)
            raise self._failed from None
