"""The index of large inputs as a file beside the output: one run makes it, and all that map it share its memory.

The file is of the safetensors format: columns of the record table, plain texts of compressed inputs, and what tells
whether an input is still the same. Nothing of it is used before its checksums and its inputs were compared.
"""

import hashlib
import json
import mmap
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli import alphabet
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import indexing
from virnucpro_cli.fasta.indexing import How, Inputs, Part, is_large
from virnucpro_cli.fasta.reading import Source, State, Text, open_sources
from virnucpro_cli.fasta.table import RecordTable, let_go
from virnucpro_cli.store import disk

SCHEMA = 1
"""Changes with the meaning of a column, and with the rules by which records are read."""
SETTLED_NS = 2_000_000_000
"""Age of a file from which on its times tell whether it has changed: clocks of file systems are coarse."""
BLOCK_BYTES = 1 << 24
COLUMNS: dict[str, tuple[str, type, int]] = {
    "offset": ("I64", np.int64, 1), "digest": ("U64", np.uint64, 2), "unique_of": ("I64", np.int64, 1),
    "length": ("I32", np.int32, 1), "replaced": ("I32", np.int32, 1), "gaps": ("I32", np.int32, 1),
    "nucleotide_like": ("BOOL", np.bool_, 1),
}  # fmt: skip
"""Columns of the file, as of `Part`: type in safetensors, type in NumPy, values of a record. The widest come first."""
_MARK = b'{"__metadata__":{"virnucpro":"index",'


def forget(path: Path) -> None:
    """Remove an index that nobody needs any more, and the lock of a killed run; nothing else of these names."""
    if is_there(path):
        path.unlink(missing_ok=True)
    if disk.lock_of(path).exists():
        with suppress(UserError), disk.alone(disk.lock_of(path), lambda _: None, "it is being made", wait=False):
            pass


def is_there(path: Path) -> bool:
    """Whether a file is an index, or empty, as one may be after the power went."""
    try:
        with open(path, "rb", opener=_at_once) as file:
            start = file.read(8 + len(_MARK))
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and (not start or start[8:] == _MARK)
    except OSError:
        return False


def _at_once(path: str, flags: int) -> int:
    """A descriptor of the file, even if that is a pipe, for which nobody waits."""
    return os.open(path, flags | os.O_NONBLOCK)


def _key(how: How) -> str:
    """A hash of the rules by which letters are read."""
    return hashlib.sha256(repr((SCHEMA, how.gaps, alphabet.letters(how.gaps, how.reading))).encode()).hexdigest()


def _sum(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


class Entry(NamedTuple):
    """An input as the index knows it. state, file_sha256: of the user's file; sha256, nucleotide_share: of its text."""

    state: State
    is_settled: bool
    file_sha256: str
    sha256: str
    nucleotide_share: float

    def is_of(self, path: str, state: State) -> bool:
        """Whether this is the file at the path, by its times, else by its bytes. Raises UserError if it cannot tell."""
        if self.is_settled and self.state == state:
            return True
        return self.state[1] == state[1] and self.file_sha256 == Source(path, state[1], 0, path, state).sha256()


class IndexFile:
    """A kept index, mapped. Raises OSError if it cannot be read, and ValueError if it is not as it was made."""

    def __init__(self, path: Path):
        self.file = open(path, "rb")  # noqa: SIM115  (mapped, and read as a spool, until nobody has it any more)
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(self.map[:8], "little")
        try:
            head = json.loads(self.map[8:begin])
            metadata = head.pop("__metadata__")
            about = json.loads(metadata["about"])
            self.key = about["key"]
            self.entries = [Entry(tuple(state), *rest) for state, *rest in about["inputs"]]
            self.places = {name: [begin + each for each in part["data_offsets"]] for name, part in head.items()}
            parts = {name: np.frombuffer(self.map, np.uint8, end - at, at) for name, (at, end) in self.places.items()}
            sums = {name: self._sum_of(part) for name, part in parts.items()}
            is_whole = metadata["sum"] == _sum(metadata["about"].encode()) and sums == about["sums"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its head lacks {error}") from None
        if not is_whole:
            raise ValueError("its bytes are not those that were written")
        self.columns: dict[str, NDArray[Any]] = {
            name: parts[name].view(dtype).reshape((-1, width) if width > 1 else -1)
            for name, (_, dtype, width) in COLUMNS.items()
        }

    def _sum_of(self, part: NDArray[np.uint8]) -> str:
        total = _sum(part.data)
        let_go(self.map)
        return total

    def text(self, number: int) -> Text | None:
        """The plain text of an input, if that is compressed."""
        at, end = self.places.get(f"text/{number}", (0, 0))
        return Text(self.file, at, end - at) if end else None

    def table(self, sources: list[Source], how: How, dedup: bool, keep_digests: bool) -> RecordTable:
        """The record table, whose columns nobody may write. Raises UserError for a letter that is refused."""
        columns = self.columns
        table = RecordTable(
            [self._as_kept(number, source) for number, source in enumerate(sources)],
            [entry.sha256 for entry in self.entries], columns["offset"], columns["length"], columns["replaced"],
            columns["unique_of"] if dedup else np.arange(len(columns["offset"])),
            [entry.nucleotide_share for entry in self.entries], columns["digest"] if keep_digests else None,
            read_as=alphabet.letters(how.gaps, how.reading), gaps=columns["gaps"],
            nucleotide_like=np.flatnonzero(columns["nucleotide_like"]),
        )  # fmt: skip
        indexing.refuse(table, how, table.sources)
        return table

    def _as_kept(self, number: int, source: Source) -> Source:
        """The source, with its text in this file if it is here."""
        text = self.text(number)
        return source if text is None else replace(source, spool=text.file, start=text.start)


class Kept(Inputs):
    """Inputs whose index is a file. It is read if it is of the input, else made by one run, for which others wait.

    say: told what takes time, and why an index is not kept. needed_by: a file; the index goes at the end of the context
    unless that is there. None for an index that other runs need.
    """

    def __init__(self, path: Path, say: Callable[[str], None], needed_by: Path | None = None):
        self.path, self.say, self.needed_by = path, say, needed_by
        self._there: IndexFile | None = None
        self._damaged: tuple[int, ...] = ()  # the state of a file that is no whole index
        self._lock = ExitStack()
        self._is_locked = self._is_made = False

    def __exit__(self, *exc: object) -> None:
        self._unlock()
        if self._there is not None:
            self._there.file.close()  # what is mapped stays
        is_refused = exc[0] is not None and not self._is_made  # then the index is another command's
        if self.needed_by is not None and not self.needed_by.exists() and not is_refused:
            forget(self.path)

    def sources(self, inputs: Sequence[str], folder: Path) -> list[Source]:
        """Open the inputs as `open_sources` does. Plain texts of compressed ones are taken from the index."""
        return open_sources(inputs, folder, self._text if is_large(inputs) else None)

    def table(self, sources: list[Source], how: How, dedup: bool = True, keep_digests: bool = False) -> RecordTable:
        """The record table of the sources, from the file if there can be one."""
        try:
            there = self._of(sources, how)
        finally:
            self._unlock()
        if there is None:
            return super().table(sources, how, dedup, keep_digests)
        return there.table(sources, how, dedup, keep_digests)

    def _of(self, sources: list[Source], how: How) -> IndexFile | None:
        """The index of the sources: as it is there, else made now. None if it cannot or need not be kept."""
        if not all(source.state for source in sources) or not is_large([source.file for source in sources]):
            return None
        if self._fits(there := self._look(), sources, how):
            return there
        self._wait_for_lock()
        if (now := self._look()) is not there and self._fits(now, sources, how):
            return now
        if os.path.lexists(self.path) and not is_there(self.path):
            self.say(
                f"{self.path} is no index of this program: it stays, and the input's index is not kept. Move it away."
            )
            return None
        self._make(sources, how)
        self._is_made = True
        return self._look()

    def _fits(self, there: IndexFile | None, sources: list[Source], how: How) -> bool:
        if there is None or there.key != _key(how) or len(there.entries) != len(sources):
            return False
        return all(
            source.spool in (None, there.file) and entry.is_of(source.file, source.state)
            for entry, source in zip(there.entries, sources, strict=True)
            if source.state is not None
        )

    def _text(self, path: str, state: State) -> Text | None:
        """The plain text of a compressed file, if it is kept; this run is the one that makes it if not."""
        if (text := self._kept_text(path, state)) is None and not self._is_locked:
            self._wait_for_lock()
            text = self._kept_text(path, state)
        return text

    def _kept_text(self, path: str, state: State) -> Text | None:
        if (there := self._look()) is None:
            return None
        texts = (there.text(number) for number, entry in enumerate(there.entries) if entry.is_of(path, state))
        return next(filter(None, texts), None)

    def _look(self) -> IndexFile | None:
        """The index that is there now; None without one that is whole."""
        if self._there is not None and disk.is_the_file(self.path, os.fstat(self._there.file.fileno())):
            return self._there
        self._there = None
        if is_there(self.path) and self._damaged != (found := disk.state_of(self.path)):
            try:
                self._there = IndexFile(self.path)
            except (OSError, ValueError) as error:
                self._damaged = found
                self.say(f"{self.path} is damaged, and made again: {error}")
        return self._there

    def _wait_for_lock(self) -> None:
        if not self._is_locked:
            waiting = f"another run is making {self.path}: waiting for it"
            has_locks = self._lock.enter_context(disk.alone(disk.lock_of(self.path), self.say, waiting))
            self._is_locked = True
            if not has_locks:
                self.say("runs that begin together each index the input; virnucpro index does it once, beforehand")

    def _unlock(self) -> None:
        """End the waiting of others."""
        self._lock.close()
        self._is_locked = False

    def _make(self, sources: list[Source], how: How) -> None:
        """Make the file, or say why there is none. Raises UserError for what is refused in the sources."""
        try:
            with _Spools(self.path.parent) as spools:
                now = time.time_ns()
                sha256, shares = indexing.read_all(sources, how, spools.take)
                spools.write("unique_of", indexing.first_of_equal(spools.digests()))
                entries = [
                    Entry(
                        source.state, now - max(source.state[2:]) > SETTLED_NS,
                        sha if source.spool is None else source.file_sha256(), sha, share,
                    )
                    for source, sha, share in zip(sources, sha256, shares, strict=True)
                    if source.state is not None
                ]  # fmt: skip
                self._save(spools, sources, _key(how), entries)
        except OSError as error:
            self.say(f"{self.path} cannot be written, and the input's index is not kept: {error.strerror}")

    def _save(self, spools: "_Spools", sources: list[Source], key: str, entries: list[Entry]) -> None:
        try:
            with disk.written_whole(self.path, durable=False) as file:
                spools.join(file, sources, key, entries)
        except UserError as error:
            self.say(f"{error.what} The input's index is not kept.")


class _Spools:
    """Columns in nameless files, one each, until all records are read."""

    def __init__(self, folder: Path):
        self.open = ExitStack()
        self.files: dict[str, IO[bytes]] = {
            name: self.open.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
            for name in COLUMNS
        }
        self.hashers = {name: xxhash.xxh3_128() for name in COLUMNS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open.close()

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Append values [n] or [n, 2] to a column, in its dtype."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
        self.hashers[name].update(data)
        self.files[name].write(data)

    def take(self, part: Part) -> None:
        for name, values in part._asdict().items():
            self.write(name, values)

    def digests(self) -> NDArray[np.uint64]:
        """All digests so far, uint64 [n, 2], mapped."""
        file = self.files["digest"]
        file.flush()
        size = file.tell()
        return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint64).reshape(-1, 2)

    def join(self, file: IO[bytes], sources: list[Source], key: str, entries: list[Entry]) -> None:
        """Write the index: its head, the columns, and the texts of compressed sources."""
        texts = {f"text/{number}": source for number, source in enumerate(sources) if source.spool is not None}
        sizes = {name: spool.tell() for name, spool in self.files.items()}
        sizes |= {name: source.size for name, source in texts.items()}
        sums = {name: hasher.hexdigest() for name, hasher in self.hashers.items()}
        unknown = dict.fromkeys(texts, _sum(b""))  # of the same length
        file.write(_head(sizes, sums | unknown, key, entries))
        for spool in self.files.values():
            spool.seek(0)
            shutil.copyfileobj(spool, file, BLOCK_BYTES)
        for name, source in texts.items():
            hasher = xxhash.xxh3_128()
            for at in range(0, source.size, BLOCK_BYTES):
                block = source.read_raw(at, min(BLOCK_BYTES, source.size - at))
                hasher.update(block)
                file.write(block)
            sums[name] = hasher.hexdigest()
        file.seek(0)
        file.write(_head(sizes, sums, key, entries))


def _head(sizes: dict[str, int], sums: dict[str, str], key: str, entries: list[Entry]) -> bytes:
    """The head of the file: a length, and JSON of that length, padded so that the columns after it are aligned."""
    about = json.dumps({"key": key, "sums": sums, "inputs": entries})
    metadata = {"virnucpro": "index", "about": about, "sum": _sum(about.encode())}
    head: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, size in sizes.items():
        of, dtype, width = COLUMNS.get(name, ("U8", np.uint8, 1))
        rows = size // (np.dtype(dtype).itemsize * width)
        shape = [rows, width] if width > 1 else [rows]
        head[name] = {"dtype": of, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
