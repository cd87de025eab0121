"""A laid-out file, filled by `pwrite`: rows, then the status bytes that vouch for them, each synced; and its end."""

import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import Stopped, UserError
from virnucpro_cli.kinds import POOLED
from virnucpro_cli.store.disk import (
    checksum,
    create_locked,
    disk_error,
    lock,
    open_existing,
    partial_path,
    pwrite_all,
    rename_new,
    reserve,
    sync_folder,
)
from virnucpro_cli.store.layout import Layout, lay_out
from virnucpro_cli.store.schema import (
    DONE,
    ENVIRONMENT_BYTES,
    MOST_ENVIRONMENTS,
    NO_MEMORY,
    PENDING,
    RECOMPUTED,
    REPORT_BYTES,
    SKIPPED,
    whole_lines,
)

LARGE_WRITE = 1 << 15
MOST_STAGED = 1 << 26


@dataclass(frozen=True)
class Place:
    """Where a dataset's rows lie in the file."""

    offset: int
    row_bytes: int
    dtype: np.dtype[Any]


class Store:
    """A laid-out file, locked by this process, filled row by row."""

    def __init__(self, output: Path, path: Path, fd: int):
        self.output, self.path, self.fd = output, path, fd
        self._uncommitted: list[tuple[NDArray[np.int64], int, int, int]] = []
        self._staged: dict[str, list[tuple[NDArray[np.int64], NDArray[Any]]]] = {}
        self._staged_bytes = 0
        self._environment: int | None = 0
        self._failed: UserError | None = None  # the first failed sync
        self._lock = threading.RLock()  # an error elsewhere may commit while a writing thread still places
        self.places: dict[str, Place] = {}
        with h5py.File(path, "r", locking=False) as file:
            self.status: NDArray[np.uint8] = file["status"][:]
            self.flags: NDArray[np.uint16] = file["flags"][:]
            self.reason: NDArray[np.uint8] = file["reason"][:]
            self.computed_by: NDArray[np.uint8] = file["computed_by"][:]
            self.environments: list[str] = whole_lines(file["run/environments"][()])

            def note(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset) and item.id.get_offset() is not None:
                    row = int(np.prod(item.shape[1:], dtype=np.int64)) * item.dtype.itemsize
                    self.places[name] = Place(item.id.get_offset(), row, item.dtype)

            file.visititems(note)
            for kind in POOLED:  # visititems reports a dataset once, perhaps as /embeddings
                for name, item in file[kind].items() if kind in file else ():
                    note(f"{kind}/{name}", item)

    @classmethod
    def create(cls, output: Path, layout: Layout, preallocate: bool = True) -> "Store":
        """Lay the file out under a name that no run resumes, make it whole and durable, then call it `.partial`."""
        partial = partial_path(output)
        new = partial.with_name(partial.name + ".new")
        fd = -1
        try:
            fd = create_locked(new)
            if partial.exists():
                raise UserError(
                    f"Another run began {partial} just now.", "Wait for it, or choose another output with -o."
                )
            if preallocate:
                reserve(fd, layout.file_bytes)
            lay_out(fd, layout)
            if preallocate:
                reserve(fd, os.fstat(fd).st_size)
            store = cls(output, new, fd)
            if not layout.sources:
                store._fill_skipped(layout)
            os.fsync(fd)
            os.rename(new, partial)  # whoever holds .new is the only one who can make a .partial
            sync_folder(partial.parent)
            store.path = partial
            return store
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
                new.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise disk_error(error, output, resumable=False) from None
            raise

    @classmethod
    def resume(cls, output: Path) -> "Store":
        """Open the `.partial` of an earlier run, locked; raises UserError if another process writes it now."""
        partial = partial_path(output)
        fd = open_existing(partial)
        try:
            lock(fd, partial)
            store = cls(output, partial, fd)
            # What there was no memory for is tried again; no reason at all is left by a kill while one is taken back.
            store.status[(store.status == SKIPPED) & np.isin(store.reason, (0, NO_MEMORY))] = PENDING
            store._write(memoryview(b"\0"), store.places["run/complete"].offset)
            store._sync()  # before any row changes
            return store
        except BaseException:
            os.close(fd)
            raise

    def _fill_skipped(self, layout: Layout) -> None:
        rows = np.flatnonzero(layout.status == SKIPPED)
        for kind in layout.kinds:
            for layer in layout.layers:
                if kind != "residue":
                    for block in np.array_split(rows, len(rows) // 4096 + 1):
                        self.place(kind, layer, block, np.full((len(block), layout.hidden), np.nan, layout.store_dtype))
        for name in layout.scores:
            self.place("unmasked", name, rows, np.full(len(rows), np.nan, np.float32))
        self._write_staged()

    def place(self, kind: str, layer: int | str, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Take values [n, D], already in the store dtype, for the given rows.

        A large run of neighbours is written at once; scattered rows are gathered until a commit, or until they are many, and
        neighbours among them then go out in one write.
        """
        if not len(rows):
            return
        name = f"{kind}/{layer}"
        place = self.places[name]
        assert len(rows) == len(values), "rows and values of different number; this is a bug"
        assert values[0].nbytes == place.row_bytes, "values in another dtype or width than the dataset; this is a bug"
        with self._lock:
            if values.nbytes >= LARGE_WRITE and (np.diff(rows) == 1).all():
                if name in self._staged:
                    self._write_staged()  # which may hold an older value of these rows
                self._write_rows(name, rows, np.ascontiguousarray(values))
                return
            self._staged.setdefault(name, []).append((rows, values if values.base is None else values.copy()))
            self._staged_bytes += values.nbytes
            if self._staged_bytes > MOST_STAGED:
                self._write_staged()

    def _write_staged(self) -> None:
        for name, parts in self._staged.items():
            rows = np.concatenate([rows for rows, _ in parts])
            order = np.argsort(rows, kind="stable")
            self._write_rows(name, rows[order], np.concatenate([values for _, values in parts])[order])
        self._staged.clear()
        self._staged_bytes = 0

    def _write_rows(self, name: str, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Values of rows in rising order; neighbours in one write, and never a byte of a row that is not among them."""
        place = self.places[name]
        starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)  # where a run of neighbours begins
        bounds = [*(starts * place.row_bytes).tolist(), values.nbytes]
        offsets = (place.offset + rows[starts] * place.row_bytes).tolist()
        data = memoryview(values.view(np.uint8).reshape(-1))  # type: ignore[arg-type]
        for (a, b), offset in zip(pairwise(bounds), offsets, strict=True):
            self._write(data[a:b], offset)

    def read(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows [n, D] of a dataset as they were written; those that are neighbours, and follow each other, in one read."""
        place = self.places[name]
        data = np.empty((len(rows), place.row_bytes), np.uint8)
        starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
        for a, b in pairwise([*starts.tolist(), len(rows)]):
            into: Any = data[a:b]
            if os.preadv(self.fd, [into], place.offset + int(rows[a]) * place.row_bytes) != into.nbytes:
                raise UserError(f"{self.path} was cut short while it was filled.", "Remove it, and run again.")
        return data.view(place.dtype)

    def mark(self, rows: NDArray[np.int64], status: int = DONE, flag: int = 0, reason: int = 0) -> None:
        """Note that the rows placed so far are final; it becomes true on disk with the next commit."""
        if len(rows):
            with self._lock:
                self._uncommitted.append((rows, status, flag, reason))

    def commit(self) -> None:
        """Make placed rows durable, then the status bytes that vouch for them. After a failed sync, never again."""
        with self._lock:
            if self._failed is not None:
                raise self._failed
            self._write_staged()
            if not self._uncommitted:
                return
            self._sync()
            for rows, status, flag, reason in self._uncommitted:
                self.status[rows] = status
                self._set("flags", self.flags, rows, self.flags[rows] & ~np.uint16(RECOMPUTED) | np.uint16(flag))
                self._set("reason", self.reason, rows, reason)
                if self._environment is not None:
                    self._set("computed_by", self.computed_by, rows, self._environment)
            self._sync()
            self._write_column("status", self.status, np.concatenate([rows for rows, *_ in self._uncommitted]))
            self._sync()
            self._uncommitted.clear()

    def settle(self, name: str, rows: NDArray[np.int64], value: int) -> None:
        """Make durable what was placed; then, also durably, give the rows of a column of its own a value that vouches for it."""
        with self._lock:
            self.commit()
            self._write_staged()
            if len(rows):
                self._sync()
                self._write_rows(name, np.sort(rows), np.full(len(rows), value, self.places[name].dtype))
                self._sync()

    def compute_in(self, environment: str) -> None:
        """Note that rows marked from now on were computed in this environment (a line of JSON), in the column computed_by."""
        with self._lock:
            self.commit()
            if environment not in self.environments and len(self.environments) < MOST_ENVIRONMENTS:
                text = "\n".join([*self.environments, environment, ""]).encode()
                if len(text) <= ENVIRONMENT_BYTES:
                    self._write(memoryview(text), self.places["run/environments"].offset)
                    self._sync()
                    self.environments.append(environment)
            known = environment in self.environments
            self._environment = self.environments.index(environment) if known else MOST_ENVIRONMENTS

    def keep_environments(self) -> None:
        """Leave in the column computed_by what the layout says."""
        self._environment = None

    def _set(self, name: str, column: NDArray[Any], rows: NDArray[np.int64], values: Any) -> None:
        """Write what changes, and only then remember it: a signal in the middle must not leave it looking written."""
        distinct, first = np.unique(rows, return_index=True)
        new = np.broadcast_to(np.asarray(values, column.dtype), len(rows))[first]
        if (column[distinct] != new).any():
            self._write_rows(name, distinct, new)
            column[distinct] = new

    def _write_column(self, name: str, column: NDArray[Any], rows: NDArray[np.int64]) -> None:
        rows = np.unique(rows)
        self._write_rows(name, rows, column[rows])

    def finish(self, report: str, overwrite: bool) -> str:
        """Store the report and the checksum, which is returned, declare the file complete, and give it its final name.

        Raises UserError if a record is pending: whoever calls this believes that none is.
        """
        self.commit()
        if pending := int((self.status == PENDING).sum()):
            raise UserError(
                f"{pending:,} records of {self.path} were not computed, though all seemed done; this is a bug.",
                "Run the same command again, which computes them, and please report it.",
            )
        self._write_report(report)
        found = checksum(self.fd, *(self.places[f"run/{name}"].offset for name in ("checksum", "complete")))
        self._write(memoryview(found.encode()), self.places["run/checksum"].offset)
        self._sync()
        self._write(memoryview(b"\1"), self.places["run/complete"].offset)
        self._sync()
        self.publish(overwrite)
        return found

    def _write_report(self, text: str) -> None:
        data = text.encode()
        assert len(data) <= REPORT_BYTES, "the report outgrew its place; this is a bug"
        self._write(memoryview(data.ljust(REPORT_BYTES, b"\0")), self.places["run/report"].offset)

    def sign(self) -> str:
        """Put a word that nobody else knows in the report's place, and return it: who reads it there sees this file."""
        word = json.dumps({"being filled": secrets.token_hex(16)})
        with self._lock:
            self._write_report(word)
            self._sync()
        return word

    def publish(self, overwrite: bool) -> None:
        if overwrite:
            os.replace(self.path, self.output)
        else:
            rename_new(self.path, self.output)
        self.path = self.output

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Commit what is done if the block fails or is stopped, as far as the disk still lets us, and close the file in any case."""
        try:
            yield
        except BaseException as error:
            with suppress(UserError):  # if the disk is what failed, the first error is the one to show
                self.commit()
            if isinstance(error, Stopped):
                error.resumable = True
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock. What was placed but not committed stays pending."""
        os.close(self.fd)

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            pwrite_all(self.fd, data, offset)
        except OSError as error:
            raise disk_error(error, self.output, resumable=True) from None

    def _sync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            # The kernel tells of a lost write once, whoever made it: nothing may vouch for a row any more.
            self._uncommitted.clear()
            self._failed = disk_error(error, self.output, resumable=True)
            raise self._failed from None
