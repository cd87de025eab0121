"""FASTA texts to read: the user's files, or copies in a nameless file of what is compressed or comes through a pipe."""

import errno
import hashlib
import os
import resource
import shutil
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from virnucpro_cli.errors import UserError, absent
from virnucpro_cli.fasta.compressed import LONGEST_MAGIC, decoder_errors, decompressed, kind_of

HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 20  # the pass over one chunk stays within the L2 cache
BOM = b"\xef\xbb\xbf"
SPOOL_RESERVE = 1 << 28
"""Bytes that spooling leaves free on a disk, for everybody else and for the output; a small disk's half."""
MOST_OPEN = 64
SHARE_OF_OPEN = 4
"""One in so many of the files that a process may open is the user's; the others are for libraries and the output."""


@dataclass(frozen=True)
class State:
    """A file as it was when it was opened first; its time of change cannot be put back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "State":
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True)
class Source:
    """One FASTA text to read: the user's file, or a piece of a spool, a nameless file of plain copies. path: for messages.

    Every carriage return is read as a line feed, so that old Macintosh line ends among others end lines. That keeps sizes.
    """

    path: str
    size: int
    base: int  # offset of this text in the concatenation of all sources
    place: str = ""  # of the user's file, which is opened when it is read
    state: State | None = None
    spool: IO[bytes] | None = None
    start: int = 0  # of this text in the spool

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that inherits the spool's descriptor, under its number."""
        fd = None if self.spool is None else self.spool.fileno()
        return _inherited, (self.path, self.size, self.base, self.place, self.state, fd, self.start)

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of this text, with line feeds for carriage returns. Raises UserError if the file was replaced or has shrunk."""
        return self.read_raw(start, size).replace(b"\r", b"\n")

    def read_raw(self, start: int, size: int) -> bytes:
        """The same as the bytes stand in the file."""
        if self.spool is not None:
            return self._pread(self.spool.fileno(), self.start + start, size)
        with _OPEN.lock:  # nobody closes it meanwhile
            return self._pread(_OPEN.descriptor(self), start, size)

    def _pread(self, fd: int, at: int, size: int) -> bytes:
        data = os.pread(fd, size, at)
        while len(data) < size:
            more = os.pread(fd, size - len(data), at + len(data))
            if not more:
                raise self.changed()
            data += more
        return data

    def check_unchanged(self, sha256: str | None = None) -> None:
        """Raise UserError if the file is another now. sha256: of what was read; where the times leave it open, the file is read again."""
        if self.state is None:
            return
        with _OPEN.lock:
            now = State.of(os.fstat(_OPEN.descriptor(self)))
        if now in (self.state, _OPEN.accepted.get(self)):
            return
        if (now.size, now.mtime_ns) != (self.state.size, self.state.mtime_ns) or sha256 != self._sha256():
            raise self.changed()
        _OPEN.accepted[self] = now  # a link was made, say

    def _sha256(self) -> str:
        sha = hashlib.sha256()
        for at in range(0, self.size, READ_BYTES):
            sha.update(self.read_raw(at, min(READ_BYTES, self.size - at)))
        return sha.hexdigest()

    def changed(self) -> UserError:
        return UserError(
            f"{self.path} was changed while it was being read.",
            "Run again on a file that nothing else writes to; results of the old content are not mixed with the new.",
        )


class _Open:
    """Descriptors of the user's files, of which the least recently read is closed when there are many."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._files: OrderedDict[Source, IO[bytes]] = OrderedDict()
        self.accepted: dict[Source, State] = {}

    def descriptor(self, source: Source) -> int:
        """Descriptor of the file as it was opened first; the caller holds the lock. Raises UserError if another is there."""
        if source in self._files:
            self._files.move_to_end(source)
            return self._files[source].fileno()
        may_be_open, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if may_be_open == resource.RLIM_INFINITY:
            may_be_open = SHARE_OF_OPEN * MOST_OPEN
        while self._files and len(self._files) >= min(MOST_OPEN, may_be_open // SHARE_OF_OPEN):
            self._files.popitem(last=False)[1].close()
        file = _opened(source.place)
        assert source.state is not None
        now = State.of(os.fstat(file.fileno()))
        if (now.inode, now.size, now.mtime_ns) != (source.state.inode, source.state.size, source.state.mtime_ns):
            file.close()
            raise source.changed()
        self._files[source] = file
        return file.fileno()


_OPEN = _Open()


@cache
def _inherited_spool(fd: int) -> IO[bytes]:
    return os.fdopen(fd, "rb")


def _inherited(path: str, size: int, base: int, place: str, state: State | None, fd: int | None, start: int) -> Source:
    return Source(path, size, base, place, state, None if fd is None else _inherited_spool(fd), start)


def open_sources(inputs: Sequence[str], spool_dir: Path) -> list[Source]:
    """Open FASTA files, plain or compressed (gz, bz2, xz, zst; by content), or `-` for standard input.

    What is not a plain file is first copied to a nameless file in `spool_dir`, one for all, which vanishes with the process.
    """
    sources: list[Source] = []
    base, spool = 0, None
    for name in inputs:
        with _opened(name) as file:
            piped = name == "-" or not os.path.isfile(name)
            first = b"" if piped else file.read(LONGEST_MAGIC)
            if not piped:
                file.seek(0)
            if piped or kind_of(first):
                spool = spool or _new_spool(spool_dir)
                start = spool.seek(0, os.SEEK_END)
                _copy(file, name, spool, spool_dir, piped)
                size = spool.seek(0, os.SEEK_END) - start
                path = "standard input" if name == "-" else name
                source = Source(path, size, base, spool=spool, start=start)
            else:
                state = State.of(os.fstat(file.fileno()))
                source = Source(name, state.size, base, os.path.realpath(name), state)
        _check_is_fasta(source)
        sources.append(source)
        base += source.size
    return sources


def _opened(name: str) -> IO[bytes]:
    try:
        if name == "-" and sys.stdin is None:
            raise UserError("Standard input is closed.", "Pipe a FASTA into it, or name a file.")
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb") if name == "-" else open(name, "rb")
    except IsADirectoryError:
        raise UserError(
            f"{name} is a directory.", "Name the FASTA files in it, for example with a shell wildcard."
        ) from None
    except FileNotFoundError:
        raise UserError(f"{absent(name)}.", f"Paths are relative to {Path.cwd()}.") from None
    except OSError as error:
        remedy = "Let this process open more files: ulimit -n 1024" if error.errno == errno.EMFILE else ""
        raise UserError(f"{name} cannot be read: {error.strerror}.", remedy) from None


def _new_spool(folder: Path) -> IO[bytes]:
    try:
        spool: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    except OSError as error:
        raise _no_spool("Compressed and piped input", folder, error.strerror) from None
    return spool


def _no_spool(name: str, folder: Path, why: str | None) -> UserError:
    return UserError(
        f"{name} cannot be spooled to {folder}: {why}.",
        "Compressed and piped input needs room for its plain text beside the output.",
    )


def _copy(file: IO[bytes], name: str, spool: IO[bytes], folder: Path, piped: bool) -> None:
    """Append the plain text of a file or pipe to the spool, and leave room on its disk."""
    if piped:  # to be read twice: its first bytes say whether it is compressed
        with _new_spool(folder) as raw:
            _append(file, name, raw, folder)
            raw.seek(0)
            _append(decompressed(raw), name, spool, folder)
    else:
        _append(decompressed(file), name, spool, folder)


def _append(stream: IO[bytes], name: str, spool: IO[bytes], folder: Path) -> None:
    size, reserve = 0, min(SPOOL_RESERVE, shutil.disk_usage(folder).free // 2)
    try:
        while block := stream.read(READ_BYTES):
            if not size % (8 * READ_BYTES) and (free := shutil.disk_usage(folder).free) < reserve:
                raise _no_spool(
                    name,
                    folder,
                    f"its text has more than {size / 1e6:,.0f} MB, and only {free / 1e6:,.0f} MB are free there",
                )
            spool.write(block)
            size += len(block)
        spool.flush()
    except decoder_errors() as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _no_spool(name, folder, error.strerror) from None
        raise UserError(
            f"{name} is damaged: its compressed data ends early, does not decode, or is followed by something else ({error}).",
            "Fetch or copy the file again and compare its checksum.",
        ) from None


def _check_is_fasta(source: Source) -> None:
    head = source.read_raw(0, min(HEAD_BYTES, source.size))
    text = head.removeprefix(BOM).lstrip()
    at = len(head)
    while not text and at < source.size:
        more = source.read(at, min(1 << 16, source.size - at))
        at, text = at + len(more), more.lstrip()
    if text.startswith(b">") and b"\0" not in head:
        return
    if source.size == 0 or not text:
        raise UserError(f"{source.path} is empty: it holds no FASTA record.", "Is it the file that was meant?")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind, remedy = "UTF-16 text", "Save it as plain text or UTF-8."
    elif b"\0" in head:
        kind, remedy = "a binary file", "Give a FASTA text file; gz, bz2, xz and zst compression are recognised."
    elif text.startswith(b"@"):
        kind, remedy = (
            "FASTQ (it starts with '@')",
            "Reads must be translated to proteins first, e.g. with Prodigal or FragGeneScan.",
        )
    elif text[:1] == b"<":
        kind, remedy = (
            "an HTML or XML page, perhaps a failed download",
            "Look at its first lines and download the file again.",
        )
    else:
        shown = text.splitlines()[0][:40].decode("utf-8", "replace")
        kind, remedy = f"not FASTA (it starts with {shown!r})", "The first record must start with a '>' line."
    raise UserError(f"{source.path} is {kind}.", remedy)
