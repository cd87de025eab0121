"""Rows that runs share: a folder of immutable segments, each a sorted list of content hashes and one row a protein of each dataset.

DIR/CACHEDIR.TAG says that the folder is a cache of this program; nothing else is touched but files of the forms below.
DIR/<hash of all settings that a row's bits depend on>/<unique>.rows; written under another name, synced, then renamed, so
that writers need no lock and a kill leaves no half of one. A segment is a line of JSON, arrays, and the XXH3 of all before it.
"""

import hashlib
import json
import mmap
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli import report, store
from virnucpro_cli.config import EmbedConfig, bytes_of
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features.feature import Feature, Run
from virnucpro_cli.kinds import POOLED
from virnucpro_cli.plan.policies import Decisions
from virnucpro_cli.store.disk import sync_folder

SUFFIX, UNFINISHED = ".rows", ".unfinished"
HEX = re.compile("[0-9a-f]{32}")
"""Form of the names of folders, and of segments before their suffix."""
HEAD = b'{"rows": '
TAG = "CACHEDIR.TAG"
SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# Rows of embeddings, kept by virnucpro --cache. See https://bford.info/cachedir/\n"
CHECK_BYTES = 16
BLOCK = 1 << 24
ROWS = 1 << 13  # copied at once
ABANDONED_SECONDS = 86400.0
NOT_OF_A_ROW = ("input_sha256", "shard")
"""What of a run's fingerprint says which proteins it is of, and not what becomes of one."""


class Damaged(Exception):
    """A segment that is not what was written."""


@dataclass(frozen=True)
class _Segment:
    """A segment's arrays, mapped: high, low: uint64 [n], halves of the hashes, rising by `high`; row: int64 [n], of each hash in the datasets."""

    path: Path
    whole: NDArray[np.uint8]
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    row: NDArray[np.int64]
    datasets: dict[str, NDArray[np.uint8]]

    def find(self, digest: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Number in the datasets of each hash (uint64 [m, 2]), -1 where there is none."""
        at = np.minimum(np.searchsorted(self.high, digest[:, 0]), len(self.high) - 1)
        return np.where((self.high[at] == digest[:, 0]) & (self.low[at] == digest[:, 1]), self.row[at], -1)

    def check(self) -> None:
        """Raises Damaged unless all bytes are those that were written."""
        hasher = xxhash.xxh3_128()
        for block in store.blocks(len(self.whole) - CHECK_BYTES, BLOCK):
            hasher.update(self.whole[block].data)
        if hasher.digest() != self.whole[-CHECK_BYTES:].tobytes():
            raise Damaged


class CachedRows(Feature):
    """Rows that another run with this cache has computed, and those of this run for the next."""

    needs_digests = True

    def reads(self) -> list[str]:
        return [str(Path(self.config.cache or "").resolve())]

    def writes(self, whole: Path) -> list[Path]:
        if self.config.cache is not None and not self.config.dry_run:
            check_place(self.config.cache)
        return []

    def before(self, run: Run) -> None:
        assert run.table.digest is not None
        settings = {key: value for key, value in run.fingerprint.items() if key not in run.layout.extra.fingerprint}
        environment, digest = run.layout.environment, run.table.digest
        self.shared = Cache(run.config, settings, environment, run.file, run.work, digest, run.tell)
        with run.clock.stage("cache"):
            run.summary.counts |= self.shared.take()

    def finish(self, run: Run) -> None:
        self.shared.publish()


class Cache:
    """The segments of one run's settings. Trouble with the cache is told to `note`, and never stops the run."""

    def __init__(
        self, config: EmbedConfig, fingerprint: dict[str, Any], environment: str, file: store.Store, work: Decisions,
        digest: NDArray[np.uint64], note: Callable[[str], None],
    ):  # fmt: skip
        """environment: the line of `computed_by` that rows here are of; digest: uint64 [N, 2], content hash of each record."""
        assert config.cache is not None
        settings = {key: value for key, value in fingerprint.items() if key not in NOT_OF_A_ROW}
        name = hashlib.sha256(json.dumps([settings, environment], sort_keys=True).encode()).hexdigest()[:32]
        self.root, self.most = Path(config.cache), bytes_of(config.cache_size)
        self.folder = self.root / name
        self.environment, self.file, self.work, self.digest, self.note = environment, file, work, digest, note
        self.store_dtype = np.dtype(np.float16 if config.store_dtype == "fp16" else np.float32)
        self.datasets = {
            name: place.row_bytes for name, place in sorted(file.places.items()) if name.partition("/")[0] in POOLED
        }

    def take(self) -> dict[str, int]:
        """Place and commit the pending rows that are here. Returns what the report says of all that the file has from a cache."""
        self.file.compute_in(self.environment)
        for segment in self._segments():
            pending = np.flatnonzero(self.file.status == store.PENDING)
            found = segment.find(self.digest[pending])
            rows, source = pending[found >= 0], found[found >= 0]
            if not len(rows) or not self._is_sound(segment):
                continue
            for block in store.blocks(len(rows), ROWS):
                for name, values in segment.datasets.items():
                    kind, layer = name.split("/")
                    self.file.place(kind, layer, rows[block], np.asarray(values[source[block]]).view(self.store_dtype))
                self.file.mark(rows[block], flag=store.CACHED)
            self.file.commit()
            with suppress(OSError):
                os.utime(segment.path)
        cached = (self.file.flags & store.CACHED) > 0
        length = self.work.segments.length[cached[self.work.segments.record]].astype(np.int64)
        counts = {"from the cache": int(cached.sum()), "tokens saved by the cache": int((length + 2).sum())}
        self.note("{:,} of {} ({}) from the cache {}".format(
            counts["from the cache"], counted(len(cached), "protein"), counted(counts["tokens saved by the cache"], "token"), self.root))  # fmt: skip
        return counts

    def publish(self) -> None:
        """Add the rows that were computed in this run's environment, in its own dtype, and that are not here yet."""
        file, work = self.file, self.work
        if self.environment not in file.environments:
            return
        own = (file.status == store.DONE) & (file.computed_by == file.environments.index(self.environment))
        own &= ((file.flags & (store.CACHED | store.RECOMPUTED)) == 0) & (work.representative == np.arange(len(own)))
        rows = np.flatnonzero(own)
        for segment in self._segments():  # another run may have been faster
            rows = rows[segment.find(self.digest[rows]) < 0]
        if not len(rows):
            return
        size = len(rows) * (24 + sum(self.datasets.values())) + 4096
        if size > self.most:
            self.note(
                f"{counted(len(rows), 'protein')} not put into the cache {self.root}: {report.size(size)} are more than --cache-size"
            )
            return
        try:
            self._make_room(size)
            self._write(rows)
        except OSError as error:
            self.note(f"the cache {self.root} was not added to ({error.strerror}); the output has everything")

    def _segments(self) -> Iterator[_Segment]:
        for path in sorted(_named(self.folder, SUFFIX)):
            try:
                yield _open(path, self.datasets)
            except FileNotFoundError:  # another run made room just now
                continue
            except OSError as error:
                self.note(f"{path} of the cache cannot be read: {error.strerror}")
            except (Damaged, ValueError, KeyError, TypeError):
                self._drop(path)

    def _is_sound(self, segment: _Segment) -> bool:
        try:
            segment.check()
        except Damaged:
            self._drop(segment.path)
            return False
        return True

    def _drop(self, path: Path) -> None:
        self.note(f"{path} of the cache is damaged: it is not used, and removed")
        with suppress(OSError):
            path.unlink()

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest, of any settings, until `size` more bytes fit; and what killed runs have left."""
        for path, status in self._ours(UNFINISHED):
            if time.time() - status.st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        there = [(status.st_mtime_ns, status.st_size, path) for path, status in self._ours(SUFFIX)]
        total = sum(bytes_there for _, bytes_there, _ in there)
        for _, bytes_there, path in sorted(there):
            if total + size <= self.most:
                break
            path.unlink(missing_ok=True)
            total -= bytes_there

    def _ours(self, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Files of this program, of any settings: by their folder's name, their own, and how they begin."""
        for folder in self.root.iterdir():
            if HEX.fullmatch(folder.name) is None or folder.is_symlink():
                continue
            for path in _named(folder, suffix):
                with suppress(OSError), open(path, "rb") as file:
                    begin = file.read(len(HEAD))
                    if begin == HEAD or (suffix == UNFINISHED and not begin):
                        yield path, os.fstat(file.fileno())

    def _write(self, rows: NDArray[np.int64]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
        unfinished = path.with_suffix(UNFINISHED)
        hasher = xxhash.xxh3_128()
        order = np.argsort(self.digest[rows, 0], kind="stable")
        try:
            with open(unfinished, "xb") as out:

                def write(data: Any) -> None:
                    hasher.update(data)
                    out.write(data)

                head = json.dumps({"rows": len(rows), "datasets": self.datasets}).encode()
                write(head + b" " * (-(len(head) + 1) % 64) + b"\n")
                for column in (self.digest[rows[order], 0], self.digest[rows[order], 1], order.astype(np.int64)):
                    write(np.ascontiguousarray(column).data)
                for name, row_bytes in self.datasets.items():
                    shape = (len(self.file.status), row_bytes)
                    values = np.memmap(self.file.path, np.uint8, "r", self.file.places[name].offset, shape)
                    for block in store.blocks(len(rows), ROWS):
                        write(np.ascontiguousarray(values[rows[block]]).data)
                out.write(hasher.digest())
                out.flush()
                os.fsync(out.fileno())
            os.rename(unfinished, path)
            sync_folder(self.folder)
        finally:
            unfinished.unlink(missing_ok=True)


def _open(path: Path, datasets: dict[str, int]) -> _Segment:
    """Raises OSError, or Damaged and what JSON raises for a file that is no segment of these datasets (name -> bytes a row)."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise Damaged
        whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        line = file.readline()
    head = json.loads(line)
    n, at = int(head["rows"]), len(line)
    size = at + n * (24 + sum(datasets.values())) + CHECK_BYTES
    if n < 1 or head["datasets"] != datasets or len(whole) != size:
        raise Damaged
    columns: list[Any] = []
    for dtype in (np.uint64, np.uint64, np.int64):
        columns.append(whole[at : at + 8 * n].view(dtype))
        at += 8 * n
    found = {}
    for name, row_bytes in datasets.items():
        found[name] = whole[at : at + n * row_bytes].reshape(n, row_bytes)
        at += n * row_bytes
    return _Segment(path, whole, columns[0], columns[1], columns[2], found)


def _named(folder: Path, suffix: str) -> list[Path]:
    """Regular files in a folder that have the form of a segment's name."""
    try:
        with os.scandir(folder) as entries:
            stems = [each.name.removesuffix(suffix) for each in entries if each.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for stem in stems if HEX.fullmatch(stem) and (path := folder / f"{stem}{suffix}").is_file()]


def check_place(folder: str) -> None:
    """Make the cache's folder, and mark it. Raises UserError if it holds anything else, or nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        tag = Path(folder) / TAG
        if not tag.exists():
            others = [name for name in os.listdir(folder) if not (HEX.fullmatch(name) or name.startswith(TAG))]
            if others:
                raise _not_ours(folder, f"it holds {min(others)}")
            new = tag.with_name(f"{TAG}.{uuid.uuid4().hex}")
            new.write_text(SIGNATURE)  # readable for all who share the folder
            os.replace(new, tag)
        elif tag.read_bytes() != SIGNATURE.encode():
            raise _not_ours(folder, f"its {TAG} is of another program")
    except OSError as error:
        raise UserError(
            f"The cache {folder} cannot be written: {error.strerror}.",
            "Name another folder with --cache, or leave it out.",
        ) from None


def _not_ours(folder: str, why: str) -> UserError:
    return UserError(
        f"{folder} is no cache of virnucpro: {why}.",
        "Name a new or empty folder with --cache; old rows in it are removed.",
    )
