"""Rows that runs share: a folder of immutable segments, each a sorted list of content hashes and a row of each dataset.

DIR/CACHEDIR.TAG says that the folder is a cache of this program; nothing else is touched but files of the forms below.
A segment is DIR/<hash of all settings that a row's bits depend on>/<unique>.rows: a line of JSON, arrays, and the XXH3
of both. It is written under another name, synced, then renamed. Writers need no lock and a kill leaves no half of it.
"""

import hashlib
import json
import mmap
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli import report, store
from virnucpro_cli.config import bytes_of
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features import Feature, Run
from virnucpro_cli.kinds import POOLED
from virnucpro_cli.plan.packing import SPECIAL_TOKENS
from virnucpro_cli.store.disk import sync_folder

SUFFIX, UNFINISHED = ".rows", ".unfinished"
HEX = re.compile("[0-9a-f]{32}")
"""Form of the names of folders, and of segments before their suffix."""
HEAD = b'{"rows": '
TAG = "CACHEDIR.TAG"
SIGNATURE = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Rows of embeddings, kept by virnucpro --cache. See https://bford.info/cachedir/\n"
)
CHECK_BYTES = 16
BLOCK = 1 << 24
ROWS = 1 << 13  # copied at once
ABANDONED_SECONDS = 86400.0
NOT_OF_A_ROW = ("input_sha256", "shard")
"""Entries of a run's fingerprint that say which proteins it is of, and not what becomes of each."""


class Damaged(Exception):
    """A segment that is not what was written."""


@dataclass(frozen=True)
class _Segment:
    """A segment's arrays, mapped.

    high, low: uint64 [n], halves of the hashes, rising by `high`; row: int64 [n], of each hash in the datasets.
    """

    path: Path
    whole: NDArray[np.uint8]
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    row: NDArray[np.int64]
    datasets: dict[str, NDArray[np.uint8]]

    def find(self, digest: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Number in the datasets of each hash (uint64 [m, 2]), int64 [m], -1 where there is none."""
        at = np.minimum(np.searchsorted(self.high, digest[:, 0]), len(self.high) - 1)
        return np.where((self.high[at] == digest[:, 0]) & (self.low[at] == digest[:, 1]), self.row[at], -1)

    def check(self) -> None:
        """Raises Damaged unless all bytes are those that were written."""
        hasher = xxhash.xxh3_128()
        for block in store.blocks(len(self.whole) - CHECK_BYTES, BLOCK):
            hasher.update(self.whole[block].data)
        if hasher.digest() != self.whole[-CHECK_BYTES:].tobytes():
            raise Damaged


class Cache(Feature):
    """Rows that another run with this cache has computed, and those of this run for the next.

    Trouble with the cache is told, and never stops the run.
    """

    needs_digests = True
    reads = ("cache",)
    run: Run
    digest: NDArray[np.uint64]
    folder: Path
    datasets: dict[str, int]

    @property
    def root(self) -> Path:
        return Path(self.config.cache or "")

    def writes(self, whole: Path) -> list[Path]:
        if not self.config.dry_run:
            check_folder(self.root)
        return []

    def before(self, run: Run) -> None:
        """Place and commit the pending rows that are here."""
        assert run.table.digest is not None
        self.run, self.digest = run, run.table.digest
        left_out = {*run.layout.extra.fingerprint, *NOT_OF_A_ROW}
        settings = {key: value for key, value in run.fingerprint.items() if key not in left_out}
        text = json.dumps([settings, run.layout.environment], sort_keys=True)
        self.folder = self.root / hashlib.sha256(text.encode()).hexdigest()[:32]
        places = sorted(run.file.places.items())
        self.datasets = {name: place.row_bytes for name, place in places if name.partition("/")[0] in POOLED}
        with run.clock.stage("cache"):
            self._take()
        cached = (run.file.flags & store.CACHED) > 0
        segments = run.decisions.segments
        tokens = int((segments.length[cached[segments.record]].astype(np.int64) + SPECIAL_TOKENS).sum())
        run.summary.counts |= {"from the cache": int(cached.sum()), "tokens saved by the cache": tokens}
        proteins = f"{int(cached.sum()):,} of {counted(len(cached), self.config.words[0])}"
        run.tell(f"{proteins} ({counted(tokens, 'token')}) from the cache {self.root}")

    def _take(self) -> None:
        file = self.run.file
        file.compute_in(self.run.layout.environment)
        for segment in self._segments():
            pending = np.flatnonzero(file.status == store.PENDING)
            source = segment.find(self.digest[pending])
            rows, source = pending[source >= 0], source[source >= 0]
            if not len(rows):
                continue
            try:
                segment.check()
            except Damaged:
                self._drop(segment.path)
                continue
            for block in store.blocks(len(rows), ROWS):
                for name, values in segment.datasets.items():
                    kind, layer = name.split("/")
                    dtype = self.run.layout.store_dtype
                    file.place(kind, layer, rows[block], np.asarray(values[source[block]]).view(dtype))
                file.mark(rows[block], flag=store.CACHED)
            file.commit()
            with suppress(OSError):
                os.utime(segment.path)

    def finish(self, run: Run) -> None:
        """Add the rows that were computed in this run's environment, in its own dtype, and that are not here yet."""
        file, environment = run.file, run.layout.environment
        if environment not in file.environments:
            return
        fit = (file.status == store.DONE) & (file.computed_by == file.environments.index(environment))
        fit &= (file.flags & (store.CACHED | store.RECOMPUTED)) == 0
        fit &= run.decisions.representative == np.arange(len(fit))
        rows = np.flatnonzero(fit)
        for segment in self._segments():  # another run may have been faster
            rows = rows[segment.find(self.digest[rows]) < 0]
        if not len(rows):
            return
        size, most = len(rows) * (24 + sum(self.datasets.values())) + 4096, bytes_of(self.config.cache_size)
        if size > most:
            not_put = f"{counted(len(rows), self.config.words[0])} not put into the cache {self.root}"
            run.tell(f"{not_put}: {report.size(size)} are more than --cache-size")
            return
        try:
            self._make_room(size, most)
            self._write(rows)
        except OSError as error:
            run.tell(f"the cache {self.root} was not added to ({error.strerror}); the output has everything")

    def _segments(self) -> Iterator[_Segment]:
        for path in sorted(_named(self.folder, SUFFIX)):
            try:
                yield _open(path, self.datasets)
            except FileNotFoundError:  # another run made room just now
                continue
            except OSError as error:
                self.run.tell(f"{path} of the cache cannot be read: {error.strerror}")
            except (Damaged, ValueError, KeyError, TypeError):
                self._drop(path)

    def _drop(self, path: Path) -> None:
        self.run.tell(f"{path} of the cache is damaged: it is not used, and removed")
        with suppress(OSError):
            path.unlink()

    def _make_room(self, size: int, most: int) -> None:
        """Remove what killed runs have left, and until `size` more bytes fit what was not used for longest."""
        for path, status in self._ours(UNFINISHED):
            if time.time() - status.st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        there = sorted((status.st_mtime_ns, status.st_size, path) for path, status in self._ours(SUFFIX))
        total = size + sum(bytes_there for _, bytes_there, _ in there)
        for _, bytes_there, path in there:
            if total <= most:
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
        try:
            with open(unfinished, "xb") as out:
                hasher = xxhash.xxh3_128()
                for data in self._content(rows):
                    hasher.update(data)
                    out.write(data)
                out.write(hasher.digest())
                out.flush()
                os.fsync(out.fileno())
            os.rename(unfinished, path)
            sync_folder(self.folder)
        finally:
            unfinished.unlink(missing_ok=True)

    def _content(self, rows: NDArray[np.int64]) -> Iterator[Any]:
        file, order = self.run.file, np.argsort(self.digest[rows, 0], kind="stable")
        head = json.dumps({"rows": len(rows), "datasets": self.datasets}).encode()
        yield head + b" " * (-(len(head) + 1) % 64) + b"\n"
        for column in (self.digest[rows[order], 0], self.digest[rows[order], 1], order.astype(np.int64)):
            yield np.ascontiguousarray(column).data
        for name, row_bytes in self.datasets.items():
            shape = (len(file.status), row_bytes)
            values = np.memmap(file.path, np.uint8, "r", file.places[name].offset, shape)
            for block in store.blocks(len(rows), ROWS):
                yield np.ascontiguousarray(values[rows[block]]).data


def _open(path: Path, datasets: dict[str, int]) -> _Segment:
    """Open a segment of these datasets (name -> bytes a row).

    Raises OSError, or Damaged and what JSON raises for a file that is none.
    """
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise Damaged
        whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        line = file.readline()
    head = json.loads(line)
    n, widths = int(head["rows"]), [8, 8, 8, *datasets.values()]
    ends = list(accumulate([n * width for width in widths], initial=len(line)))
    if n < 1 or head["datasets"] != datasets or len(whole) != ends[-1] + CHECK_BYTES:
        raise Damaged
    parts = [whole[a:b].reshape(n, -1) for a, b in pairwise(ends)]
    high, low, row = (part.reshape(-1).view(dtype) for part, dtype in zip(parts, ("u8", "u8", "i8"), strict=False))
    return _Segment(path, whole, high, low, row, dict(zip(datasets, parts[3:], strict=True)))


def _named(folder: Path, suffix: str) -> list[Path]:
    """Regular files in a folder that have the form of a segment's name."""
    try:
        with os.scandir(folder) as entries:
            names = [each.name for each in entries if each.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / name for name in names if name.endswith(suffix) and HEX.fullmatch(name.removesuffix(suffix))]


def check_folder(folder: Path) -> None:
    """Make the cache's folder, and mark it.

    Raises UserError if it holds anything else, or nothing can be written there.
    """
    why = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        tag = folder / TAG
        if not tag.exists():
            others = [name for name in os.listdir(folder) if not (HEX.fullmatch(name) or name.startswith(TAG))]
            if others:
                why = f"it holds {min(others)}"
            else:
                new = tag.with_name(f"{TAG}.{uuid.uuid4().hex}")
                new.write_text(SIGNATURE)  # readable for all who share the folder
                os.replace(new, tag)
        elif tag.read_bytes() != SIGNATURE.encode():
            why = f"its {TAG} is of another program"
    except OSError as error:
        remedy = "Name another folder with --cache, or leave it out."
        raise UserError(f"The cache {folder} cannot be written: {error.strerror}.", remedy) from None
    if why:
        remedy = "Name a new or empty folder with --cache; old rows in it are removed."
        raise UserError(f"{folder} is no cache of virnucpro: {why}.", remedy)
