"""The output file: laid out in full by HDF5, closed, and from then on filled by `pwrite` at the datasets' offsets.

HDF5 never writes to the file again, so a kill at any moment leaves it readable. A row whose status is `done` is on
disk: rows are synced before the status bytes that vouch for them. The file is `OUT.partial` until it is complete.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import Stopped, UserError

SCHEMA = 1
PENDING, DONE, SKIPPED = 0, 1, 2
STATUS_NAMES = ("pending", "done", "skipped")
TRUNCATED, REPLACED, RECOMPUTED, COPIED, WINDOWED = 1, 2, 4, 8, 16
FLAG_NAMES = {1: "truncated", 2: "replaced", 4: "recomputed in fp32", 8: "copied", 16: "windowed"}
REASONS = ("", "empty", "invalid residues", "too long", "not finite", "out of memory")
EMPTY, INVALID, TOO_LONG, NOT_FINITE, NO_MEMORY = 1, 2, 3, 4, 5
AFTER_TRYING = (NOT_FINITE, NO_MEMORY)
"""Reasons that no policy gives: what came of an attempt."""
REPORT_BYTES = 1 << 16
ENVIRONMENT_BYTES = 1 << 14
MOST_ENVIRONMENTS = 255
NAME_BLOCK = 1 << 16
LARGE_WRITE = 1 << 15
MOST_STAGED = 1 << 26
CHECKSUM_BLOCK, CHECKSUM_BYTES = 1 << 24, 64
ONLY_PLACE = ("attention", "device")
"""Fingerprint keys that change how values round and nothing else: a run may go on elsewhere, and the file says which rows did."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Layout:
    """Everything the file will ever hold except embeddings. N records, D hidden.

    names(start, stop) gives the record names of a range, name_bytes bounds their total; residue_offsets int64 [N + 1] only with per-residue output.
    """

    hidden: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    store_dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    replaced: NDArray[np.int32]
    flags: NDArray[np.uint16]
    status: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    residue_offsets: NDArray[np.int64] | None
    names: Callable[[int, int], list[str]]
    name_bytes: int  # of all names, at most
    records: NDArray[np.int64] | None = None  # of a shard: the number of each record in the input
    environment: str = "{}"  # of this run, in a line (several, with computed_by): see Store.compute_in
    computed_by: NDArray[np.uint8] | None = None  # all zero, unless they are known
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of the embeddings themselves."""
        pooled = len(self.lengths) * sum(kind != "residue" for kind in self.kinds)
        residues = int(self.residue_offsets[-1]) if self.residue_offsets is not None else 0
        return (pooled + residues) * len(self.layers) * self.hidden * self.store_dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """What the whole file takes at most: embeddings, names with their heap entries, small columns, HDF5's own."""
        per_record = (
            16
            + 40
            + 4
            + 4
            + 2
            + 1
            + 1
            + 1
            + 8 * (self.records is not None)
            + (8 if self.residue_offsets is not None else 0)
        )
        return (
            self.data_bytes
            + len(self.lengths) * per_record
            + self.name_bytes
            + REPORT_BYTES
            + ENVIRONMENT_BYTES
            + (1 << 17)
        )


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def check_destination(output: Path) -> None:
    """Raise UserError unless `output` could be created or replaced where it is."""
    folder = output.parent
    if output.is_dir():
        raise UserError(f"The output {output} is a directory.", "Name a file, such as out.h5.")
    if len(os.fsencode(output.name)) + len(".partial.new") > 255:
        raise UserError(
            f"The output name {output.name[:40]}... is too long for its .partial.", "Choose a shorter name."
        )
    for path in (output, partial_path(output)):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file.", "Choose another output with -o.")
    if not folder.is_dir():
        raise UserError(f"The output directory {folder} does not exist.", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"The output directory {folder} cannot be written.", "Choose another place with -o.")


def free_space(output: Path) -> int:
    """Bytes free where `output` will be."""
    return shutil.disk_usage(output.parent).free


def check_free_space(output: Path, needed: int) -> None:
    free = free_space(output)
    if free < needed:
        raise UserError(
            f"{output} will need {needed / 1e6:,.1f} MB, and only {free / 1e6:,.1f} MB are free in {output.parent}.",
            "Free some space, choose another disk with -o, or store less (--store-dtype fp16, fewer --layers, no residue pool).",
        )


def fingerprint_of(path: Path) -> tuple[dict[str, Any], bool] | None:
    """(fingerprint, complete) of a file that this program wrote; None if it is something else."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("schema") != SCHEMA or "fingerprint" not in file.attrs:
                return None
            return json.loads(file.attrs["fingerprint"]), bool(file["run/complete"][()])
    except (OSError, KeyError, ValueError):
        return None


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints in words, but for ONLY_PLACE."""
    keys = sorted((theirs.keys() | ours.keys()) - set(ONLY_PLACE))
    keys = [key for key in keys if theirs.get(key) != ours.get(key)]
    words = {"input_sha256": "the content of the input differs", "weights_sha256": "the model's weights differ"}
    return [words.get(key, f"{key}: {theirs.get(key)} there, {ours.get(key)} now") for key in keys]


def _create_contiguous(group: Any, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """A dataset whose bytes have their place in the file from the start, and are not touched by HDF5."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, creation)


class _Reserved:
    """A file as HDF5 writes its layout into it: never made smaller, so that room once reserved stays reserved.

    `error` is the first OSError of a write, which HDF5 itself reports as something else.
    """

    def __init__(self, fd: int):
        self.fd, self.at, self.size = fd, 0, 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (self.size if whence == os.SEEK_END else self.at if whence == os.SEEK_CUR else 0)
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, count: int = -1) -> bytes:
        data = os.pread(self.fd, self.size - self.at if count < 0 else count, self.at)
        self.at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self.fd, [buffer], self.at)
        self.at += count
        return count

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            _pwrite_all(self.fd, view, self.at)
        except OSError as error:
            self.error = self.error or error
            raise
        self.at += view.nbytes
        self.size = max(self.size, self.at)
        return view.nbytes

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        return self.size

    def flush(self) -> None:
        pass


def _lay_out(fd: int, layout: Layout) -> None:
    """Write everything but embeddings, and make the file exactly as long as HDF5 says. Raises OSError."""
    file = _Reserved(fd)
    try:
        _write_layout(file, layout)
    except Exception:
        if file.error is not None:
            raise file.error from None
        raise
    os.ftruncate(fd, file.size)


def _write_layout(room: _Reserved, layout: Layout) -> None:
    n = len(layout.lengths)
    with h5py.File(room, "w") as file:
        for key, value in layout.attributes.items():
            file.attrs[key] = value
        file.attrs["schema"] = SCHEMA
        file.attrs["status_names"] = json.dumps(dict(enumerate(STATUS_NAMES)))
        file.attrs["flag_names"] = json.dumps(FLAG_NAMES)
        file.attrs["reason_names"] = json.dumps(dict(enumerate(REASONS)))
        names = file.create_dataset("sequence_ids", (n,), h5py.string_dtype("utf-8"))
        for start in range(0, n, NAME_BLOCK):
            stop = min(n, start + NAME_BLOCK)
            names[start:stop] = layout.names(start, stop)
        for name in ("lengths", "replaced", "flags", "status", "reason"):
            column = getattr(layout, name)
            _create_contiguous(file, name, (n,), column.dtype)
            file[name][:] = column
        _create_contiguous(file, "computed_by", (n,), np.uint8)
        file["computed_by"][:] = np.zeros(n, np.uint8) if layout.computed_by is None else layout.computed_by
        if layout.records is not None:
            file["records"] = layout.records
        if layout.residue_offsets is not None:
            residue = file.create_group("residue")
            residue["offsets"] = layout.residue_offsets
            for layer in layout.layers:
                _create_contiguous(
                    residue, str(layer), (int(layout.residue_offsets[-1]), layout.hidden), layout.store_dtype
                )
        pooled = [kind for kind in ("mean", "bos") if kind in layout.kinds]
        for kind in pooled:
            group = file.create_group(kind)
            for layer in layout.layers:
                _create_contiguous(group, str(layer), (n, layout.hidden), layout.store_dtype)
        if pooled:
            file["embeddings"] = file[pooled[0]][str(layout.layers[-1])]
        run = file.create_group("run")
        _create_contiguous(run, "report", (), f"S{REPORT_BYTES}")
        run["report"][()] = b"{}"
        _create_contiguous(run, "environments", (), f"S{ENVIRONMENT_BYTES}")
        run["environments"][()] = layout.environment.encode() + b"\n"
        _create_contiguous(run, "checksum", (), f"S{CHECKSUM_BYTES}")
        run["checksum"][()] = b""
        _create_contiguous(run, "complete", (), np.uint8)
        run["complete"][()] = 0


@dataclass(frozen=True)
class _Place:
    offset: int
    row_bytes: int


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
        self.places: dict[str, _Place] = {}
        with h5py.File(path, "r", locking=False) as file:
            self.status: NDArray[np.uint8] = file["status"][:]
            self.flags: NDArray[np.uint16] = file["flags"][:]
            self.reason: NDArray[np.uint8] = file["reason"][:]
            self.computed_by: NDArray[np.uint8] = file["computed_by"][:]
            self.environments: list[str] = _whole_lines(file["run/environments"][()])

            def note(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset) and item.id.get_offset() is not None:
                    row = int(np.prod(item.shape[1:], dtype=np.int64)) * item.dtype.itemsize
                    self.places[name] = _Place(item.id.get_offset(), row)

            file.visititems(note)
            for kind in ("mean", "bos"):  # visititems reports a dataset once, perhaps as /embeddings
                for name, item in file[kind].items() if kind in file else ():
                    note(f"{kind}/{name}", item)

    @classmethod
    def create(cls, output: Path, layout: Layout, preallocate: bool = True) -> "Store":
        """Lay the file out under a name that no run resumes, make it whole and durable, then call it `.partial`."""
        partial = partial_path(output)
        new = partial.with_name(partial.name + ".new")
        fd = -1
        try:
            fd = _create_locked(new)
            if partial.exists():
                raise UserError(
                    f"Another run began {partial} just now.", "Wait for it, or choose another output with -o."
                )
            if preallocate:
                _reserve(fd, layout.file_bytes)
            _lay_out(fd, layout)
            if preallocate:
                _reserve(fd, os.fstat(fd).st_size)
            store = cls(output, new, fd)
            store._fill_skipped(layout)
            os.fsync(fd)
            os.rename(new, partial)  # whoever holds .new is the only one who can make a .partial
            _sync_folder(partial.parent)
            store.path = partial
            return store
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
                new.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _disk_error(error, output, resumable=False) from None
            raise

    @classmethod
    def resume(cls, output: Path) -> "Store":
        """Open the `.partial` of an earlier run, locked; raises UserError if another process writes it now."""
        partial = partial_path(output)
        fd = _open_existing(partial)
        try:
            _lock(fd, partial)
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
        self._write_staged()

    def place(self, kind: str, layer: int, rows: NDArray[np.int64], values: NDArray[Any]) -> None:
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
        """Store the report and the checksum, which is returned, declare the file complete, and give it its final name."""
        self.commit()
        data = report.encode()
        assert len(data) <= REPORT_BYTES, "the report outgrew its place; this is a bug"
        self._write(memoryview(data.ljust(REPORT_BYTES, b"\0")), self.places["run/report"].offset)
        found = checksum(self.fd, *(self.places[f"run/{name}"].offset for name in ("checksum", "complete")))
        self._write(memoryview(found.encode()), self.places["run/checksum"].offset)
        self._sync()
        self._write(memoryview(b"\1"), self.places["run/complete"].offset)
        self._sync()
        self.publish(overwrite)
        return found

    def publish(self, overwrite: bool) -> None:
        if overwrite:
            os.replace(self.path, self.output)
        else:
            _rename_new(self.path, self.output)
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
            _pwrite_all(self.fd, data, offset)
        except OSError as error:
            raise _disk_error(error, self.output, resumable=True) from None

    def _sync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            # The kernel tells of a lost write once, whoever made it: nothing may vouch for a row any more.
            self._uncommitted.clear()
            self._failed = _disk_error(error, self.output, resumable=True)
            raise self._failed from None


def _whole_lines(text: bytes) -> list[str]:
    """A last line without its end is one that a power cut tore."""
    return text[: text.rfind(b"\n") + 1].decode().splitlines()


def take_back(output: Path) -> None:
    """Make a finished file the partial one again, for a run to go on with. Raises UserError if that cannot be."""
    if not os.access(output, os.W_OK):
        raise UserError(
            f"{output} is to be gone on with, and cannot be written.", "Ask its owner, or choose another -o."
        )
    try:
        os.rename(output, partial_path(output))
    except FileNotFoundError:  # another run has just done the same, and holds the lock
        return
    except OSError as error:
        raise _disk_error(error, output, resumable=True) from None
    _sync_folder(output.parent)


def checksum(fd: int, itself: int, complete: int) -> str:
    """SHA-256, in hex, of the SHA-256 of every 16 MiB of a file whose /run/checksum and /run/complete, at those offsets, count
    as zeros: they are written last. Everything else counts: embeddings, names, columns, attributes, the report.
    """

    def of_block(start: int) -> bytes:
        block = bytearray(CHECKSUM_BLOCK)
        view, filled = memoryview(block), 0
        while count := os.preadv(fd, [view[filled:]], start + filled):
            filled += count
        for offset, size in ((itself, CHECKSUM_BYTES), (complete, 1)):
            first, last = max(offset - start, 0), min(offset + size - start, filled)
            if first < last:
                view[first:last] = bytes(last - first)
        return hashlib.sha256(view[:filled]).digest()

    pool = ThreadPoolExecutor(4)  # hashing lets go of Python
    try:
        starts = range(0, os.fstat(fd).st_size, CHECKSUM_BLOCK)
        return hashlib.sha256(b"".join(pool.map(of_block, starts))).hexdigest()
    finally:
        pool.shutdown(cancel_futures=True)


def _pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _disk_error(error: OSError, output: Path, resumable: bool) -> UserError:
    if error.errno in NO_SPACE:
        what = (
            f"No space is left for {output}"
            if error.errno == errno.ENOSPC
            else f"The disk quota is used up for {output}"
        )
    else:
        what = f"{output} cannot be written: {error.strerror}"
    room = "Make room" if error.errno in NO_SPACE else "See to the file system"
    if resumable:
        return UserError(
            f"{what}. Nothing that was computed and committed is lost.",
            f"{room}, then run the same command again to resume.",
        )
    return UserError(f"{what}.", f"{room} or choose another disk with -o, and run again.")


def _lock(fd: int, path: Path) -> None:
    """Take the file's lock, which the kernel drops when its process dies."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another run is writing {path} now.", "Wait for it, or choose another output with -o."
        ) from None
    try:
        same = os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:
        raise UserError(f"{path} was finished or replaced by another run just now.", "Run the command again.")


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        raise UserError(
            f"{path} is there and cannot be opened for writing: {error.strerror}.",
            "Ask its owner, or choose another output with -o.",
        ) from None


def _create_locked(path: Path) -> int:
    """Create a file that did not exist and lock it; what a killed layout left under its name is removed first."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            old = _open_existing(path)
            try:
                _lock(old, path)
                os.unlink(path)
            finally:
                os.close(old)
        else:
            _lock(fd, path)
            return fd


def _reserve(fd: int, size: int) -> None:
    """Take the disk space now, so that a full disk shows now; a file system that cannot is left to show it later."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def discard_partial(output: Path) -> None:
    """Remove OUT.partial, whatever it holds; raises UserError if a living run writes it."""
    path = partial_path(output)
    fd = _open_existing(path)
    try:
        _lock(fd, path)
        path.unlink()
    finally:
        os.close(fd)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rename_new(source: Path, target: Path) -> None:
    """Rename without ever replacing a file that appeared meanwhile."""
    try:
        os.link(source, target)
        os.unlink(source)
    except FileExistsError:
        raise UserError(
            f"{target} appeared while this run was working; it was not touched.",
            f"The result is in {source}; rename it yourself.",
        ) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(source, target)  # a file system without hard links
    _sync_folder(target.parent)


# --- reading -----------------------------------------------------------------------------------------------------


class EmbeddingFile:
    """An embeddings file opened for reading. Rows are in FASTA order; a record's number is its identity.

    `file[3]`, `file[10:20]`, `file["P12345"]` give rows of the default embedding (the `/embeddings` link).
    """

    def __init__(self, path: str | Path):
        self._file = h5py.File(path, "r", locking=False)  # its structure never changes, even while a run fills it
        if self._file.attrs.get("schema") != SCHEMA:
            self._file.close()
            raise UserError(f"{path} is not an embeddings file of schema {SCHEMA}.")
        self.attributes: dict[str, Any] = dict(self._file.attrs)
        self.lengths: NDArray[np.int32] = self._file["lengths"][:]
        self.status: NDArray[np.uint8] = self._file["status"][:]
        self.flags: NDArray[np.uint16] = self._file["flags"][:]
        self.reason: NDArray[np.uint8] = self._file["reason"][:]
        self.replaced: NDArray[np.int32] = self._file["replaced"][:]
        self._rows: dict[str, list[int]] | None = None
        self._names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __enter__(self) -> "EmbeddingFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def complete(self) -> bool:
        return int(self._file["run/complete"][()]) == 1

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self._file["run/report"][()])

    @property
    def records(self) -> NDArray[np.int64] | None:
        """Of a shard: the number of each row's record in the input; None of a whole file, where that is the row's own."""
        return self._file["records"][:] if "records" in self._file else None

    @property
    def computed_by(self) -> NDArray[np.uint8]:
        """Number in `environments` of what computed each record; it counts where a row is done."""
        return self._file["computed_by"][:]

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Device, attention backend and versions of the runs that filled this file: one, unless it was resumed elsewhere."""
        return [json.loads(line) for line in _whole_lines(self._file["run/environments"][()])]

    @property
    def checksum_of_the_run(self) -> str:
        """What `checksum` was when embed had finished; empty before."""
        return self._file["run/checksum"][()].decode()

    @property
    def unaltered(self) -> bool:
        """Whether its bytes are those that embed wrote; reads all of them."""
        return self.checksum_of_the_run == self.checksum()

    def checksum(self) -> str:
        """The checksum of the file as it is now."""
        offsets = [self._file[f"run/{name}"].id.get_offset() for name in ("checksum", "complete")]
        with open(self._file.filename, "rb") as file:
            return checksum(file.fileno(), *offsets)

    def names_of(self, start: int, stop: int) -> list[str]:
        """The names of a range of records, read from the file."""
        names: list[str] = self._file["sequence_ids"].asstr()[start:stop].tolist()
        return names

    @property
    def names(self) -> list[str]:
        if self._names is None:
            self._names = self._file["sequence_ids"].asstr()[:].tolist()
        return self._names

    @property
    def layers(self) -> list[int]:
        return [int(x) for x in json.loads(self.attributes["layers"])]

    @property
    def default(self) -> str | None:
        """What `/embeddings` is, such as mean/33; None if it is absent or nothing of the run's."""
        there = self._file.get("embeddings")
        names = [f"{kind}/{layer}" for kind in ("mean", "bos") for layer in self.layers]
        return next((name for name in names if name in self._file and self._file[name] == there), None)

    @property
    def residue_offsets(self) -> NDArray[np.int64]:
        """int64 [N + 1]; needs `--pool residue`."""
        return self._file["residue/offsets"][:]

    def rows(self, name: str) -> list[int]:
        """Every row of that name, in order; names need not be unique. Raises KeyError."""
        if self._rows is None:
            self._rows = {}
            for row, known in enumerate(self.names):
                self._rows.setdefault(known, []).append(row)
        return self._rows[name]

    def dataset(self, kind: str | None = None, layer: int | None = None) -> h5py.Dataset:
        """The h5py dataset of a pooling kind and layer (default: the last requested); negative layers are not resolved."""
        if kind is None and layer is None:
            if "embeddings" not in self._file:
                raise KeyError("this file holds only per-residue embeddings: use residues(row)")
            return self._file["embeddings"]
        return self._file[kind or "mean"][str(self.layers[-1] if layer is None else layer)]

    def __getitem__(self, key: int | slice | str | list[int] | NDArray[Any]) -> NDArray[Any]:
        if isinstance(key, str):
            key = self.rows(key)[0]
        if (
            isinstance(key, list | np.ndarray) and np.asarray(key).dtype != np.bool_
        ):  # h5py wants them increasing and distinct
            distinct, back = np.unique(np.asarray(key), return_inverse=True)
            return self.dataset()[distinct][back]
        return self.dataset()[key]

    def __iter__(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(name, row) of every record, in order."""
        for start in range(0, len(self), NAME_BLOCK):
            yield from zip(
                self.names[start : start + NAME_BLOCK], self.dataset()[start : start + NAME_BLOCK], strict=True
            )

    def residues(self, key: int | str, layer: int | None = None) -> NDArray[Any]:
        """Per-residue array [L, D] of a record (empty if it was skipped); needs `--pool residue`."""
        row = self.rows(key)[0] if isinstance(key, str) else range(len(self))[key]
        first, last = self._file["residue/offsets"][row : row + 2]
        return self.dataset("residue", layer)[first:last]


def read_embeddings(path: str | Path) -> EmbeddingFile:
    """Open an embeddings file. No torch needed."""
    return EmbeddingFile(path)
