"""FASTA texts to read: the user's files, or copies in a nameless file of what is compressed or comes through a pipe."""

import errno
import hashlib
import io
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import chain
from pathlib import Path
from threading import Event
from typing import IO, Any, NamedTuple

from virnucpro_cli.errors import MORE_FILES, UserError, absent
from virnucpro_cli.stopping import cores, threads

HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 20  # the pass over one chunk stays within the L2 cache
BOM = b"\xef\xbb\xbf"
MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
MAGIC |= {bytes([0x50 + i, 0x2A, 0x4D, 0x18]): "zst" for i in range(16)}
"""The last 16 begin a frame without content, with which pzstd begins (RFC 8878, section 3.1.2)."""
LONGEST_MAGIC = 6
PROGRAMS = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd"}
"""Each prints the plain bytes of a file with -dc."""
FASTQ = b"@"
"""The byte that a FASTQ begins with, and no FASTA."""
SPOOL_RESERVE = 1 << 28
"""Bytes that spooling leaves free on a disk, for everybody else and for the output; a small disk's half."""
_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
MOST_OPEN = 64 if _limit == resource.RLIM_INFINITY else min(64, _limit // 4)
"""The user's files that are open at once. The other files of a process are for libraries and the output."""

State = tuple[int, int, int, int]


class Text(NamedTuple):
    """A plain text within a file."""

    file: IO[bytes]
    start: int
    size: int


@dataclass(frozen=True)
class Source:
    """One FASTA text to read: the user's file, or a piece of a spool, a nameless file of plain copies.

    Every carriage return is read as a line feed, so that old Macintosh line ends among others end lines.
    """

    path: str  # for messages
    size: int
    base: int  # offset of this text in the concatenation of all sources
    file: str = ""  # the user's, which is opened when it is read; of a spool, the compressed file
    state: State | None = None  # of that file when it was opened first; None of a pipe
    spool: IO[bytes] | None = None
    start: int = 0  # of this text in the spool

    def __getstate__(self) -> dict[str, Any]:
        """For a process that has the spool's descriptor too, under its number here; see `INHERITED`."""
        return vars(self) | {"spool": self.spool and self.spool.fileno()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spool=None if state["spool"] is None else _inherited(state["spool"]))

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of this text, with line feeds for carriage returns.

        Raises UserError if the file was replaced or has shrunk, or the system cannot read it.
        """
        return self.read_raw(start, size).replace(b"\r", b"\n")

    def read_raw(self, start: int, size: int) -> bytes:
        """The same as the bytes stand in the file."""
        file, data = self.spool or _reopened(self), b""
        while len(data) < size:
            with _readable(self.path):
                more = os.pread(file.fileno(), size - len(data), self.start + start + len(data))
            if not more:
                raise self.changed()
            data = data + more if data else more
        return data

    def check_unchanged(self, sha256: str | None = None) -> None:
        """Raise UserError if the file is another now.

        sha256: of what was read. Where the times leave it open, the file is read again.
        """
        if self.spool is not None or self.state is None:
            return
        now = _state_of(_reopened(self))
        if now in (self.state, _ACCEPTED.get(self)):
            return
        if now[:3] != self.state[:3] or sha256 != self.sha256():
            raise self.changed()
        _ACCEPTED[self] = now  # a link was made, say

    def sha256(self, given_up: Event | None = None) -> str:
        """The SHA-256 of all bytes, as they stand in the file. given_up: once set, nobody wants it any more."""
        sha = hashlib.sha256()
        for at in range(0, self.size, READ_BYTES):
            if given_up is not None and given_up.is_set():
                break
            sha.update(self.read_raw(at, min(READ_BYTES, self.size - at)))
        return sha.hexdigest()

    def file_sha256(self) -> str:
        """The SHA-256 of the user's file, compressed as it may be. Raises UserError if it has changed."""
        assert self.state is not None
        return replace(self, size=self.state[1], spool=None, start=0).sha256()

    def changed(self) -> UserError:
        return UserError(
            f"{self.path} was changed while it was being read.",
            "Run again on a file that nothing else writes to; results of the old content are not mixed with the new.",
        )

    def line_number(self, offset: int) -> int:
        """1-based number of the line that holds the byte at `offset`; lines end with LF, CRLF or CR."""
        line, at, last = 1, 0, b""
        while at < offset:
            text = self.read_raw(at, min(READ_BYTES, offset - at))
            line += text.count(b"\n") + text.count(b"\r") - (last + text).count(b"\r\n")
            at, last = at + len(text), text[-1:]
        return line - (last == b"\r" and offset < self.size and self.read_raw(offset, 1) == b"\n")

    def record_text(self, offset: int) -> bytes:
        """The text of the record whose `>` is at `offset`."""
        size = READ_BYTES
        while True:
            text = self.read(offset, min(size, self.size - offset))
            if (end := text.find(b"\n>")) >= 0 or offset + len(text) == self.size:
                return text[: end + 1] if end >= 0 else text
            size *= 2


_ACCEPTED: dict[Source, State] = {}


def _state_of(file: IO[bytes]) -> State:
    """Inode, size, time of the content's change, and time of any change, which cannot be put back."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=MOST_OPEN)  # one that falls out is closed when its last reader lets go of it
def _reopened(source: Source) -> IO[bytes]:
    """The user's file, as it was when it was opened first. Raises UserError if another is there."""
    file = _opened(source.file)
    if source.state is None or _state_of(file)[:3] != source.state[:3]:
        file.close()
        raise source.changed()
    return file


INHERITED: dict[int, int] = {}
"""Descriptors that this process has under another number than the one that it is told: its own for each."""


@cache
def _inherited(descriptor: int) -> IO[bytes]:
    return os.fdopen(INHERITED.get(descriptor, descriptor), "rb")


Kept = Callable[[str, State], Text | None]
"""Gives the plain text of a compressed file that an earlier run has kept, by path and state."""


def open_sources(inputs: Sequence[str], spool_dir: Path, kept: Kept | None = None) -> list[Source]:
    """Open FASTA files, plain or compressed (gz, bz2, xz, zst; by content), or `-` for standard input.

    All that is not a plain file is first copied to a nameless file in `spool_dir`, which vanishes with the process; but
    what is kept of it. FASTQ, plain or not, becomes FASTA there.
    Raises UserError if a file cannot be read, is damaged, or holds no FASTA.
    """
    sources: list[Source] = []
    base, spool = 0, None
    for name in inputs:
        with _opened(name) as file:
            is_file = name != "-" and os.path.isfile(name)
            path, state = (os.path.realpath(name), _state_of(file)) if is_file else ("", None)
            with _readable(name):
                first = file.peek(LONGEST_MAGIC) if state is not None else b""
            if state is not None and not kind_of(first) and not _is_fastq(first):
                source = Source(name, state[1], base, path, state)
            elif state is not None and kept is not None and (text := kept(path, state)):
                source = Source(name, text.size, base, path, state, text.file, text.start)
            else:
                spool = spool or _new_spool(spool_dir)
                start = spool.seek(0, os.SEEK_END)
                _copy(file, name, spool, spool_dir)
                shown = "standard input" if name == "-" else name
                source = Source(shown, spool.tell() - start, base, path, state, spool, start)
        _check_is_fasta(source)
        sources.append(source)
        base += source.size
    return sources


def lacks_end(name: str) -> bool:
    """Whether a file is BGZF, and lacks the empty block that its writers put at the end: it may be cut short.

    Raises UserError if it cannot be read.
    """
    if not os.path.isfile(name):
        return False
    with _opened(name) as file, _readable(name):
        if kind_of(file.peek(LONGEST_MAGIC)) != "gz":
            return False
        from virnucpro_cli.fasta.compressed import BGZF_END, BGZF_HEAD, BGZF_HEAD_BYTES

        is_bgzf = bool(BGZF_HEAD.match(file.read(BGZF_HEAD_BYTES)))
        size = file.seek(0, os.SEEK_END)
        file.seek(-min(size, len(BGZF_END)), os.SEEK_END)
        return is_bgzf and file.read() != BGZF_END


def kind_of(first: bytes) -> str | None:
    """gz, bz2, xz or zst by the first bytes of a file; None of plain text."""
    return next((kind for magic, kind in MAGIC.items() if first.startswith(magic)), None)


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """The plain bytes of a buffered file or pipe at its beginning, compressed or not.

    Reading raises one of `compressed.decoder_errors()` where they are damaged.
    """
    from virnucpro_cli.fasta.compressed import begun, decoded

    first, file = begun(file, LONGEST_MAGIC)
    return decoded(file, kind_of(first))


def _opened(name: str) -> io.BufferedReader:
    try:
        if name == "-" and sys.stdin is None:
            raise UserError("Standard input is closed.", "Pipe a FASTA into it, or name a file.")
        return open(os.dup(sys.stdin.fileno()) if name == "-" else name, "rb")
    except IsADirectoryError:
        remedy = "Name the FASTA files in it, for example with a shell wildcard."
        raise UserError(f"{name} is a directory.", remedy) from None
    except FileNotFoundError:
        raise UserError(f"{absent(name)}.", f"Paths are relative to {Path.cwd()}.") from None
    except OSError as error:
        if error.errno == errno.EMFILE and _reopened.cache_info().currsize:
            _reopened.cache_clear()
            return _opened(name)
        remedy = MORE_FILES if error.errno == errno.EMFILE else ""
        raise UserError(f"{name} cannot be read: {error.strerror}.", remedy) from None


def _new_spool(folder: Path) -> IO[bytes]:
    try:
        spool: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    except OSError as error:
        raise _no_spool("The plain text of the input", folder, error.strerror) from None
    return spool


def _no_spool(name: str, folder: Path, why: str | None) -> UserError:
    return UserError(
        f"{name} cannot be spooled to {folder}: {why}.",
        "Compressed and piped input, and FASTQ, need room for their plain text beside the output.",
    )


def _copy(file: IO[bytes], name: str, spool: IO[bytes], folder: Path) -> None:
    """Append the plain text of a file or pipe to the spool, and leave room on its disk."""
    from virnucpro_cli.fasta.compressed import decoder_errors

    shown = "standard input" if name == "-" else name
    size, looked, reserve = 0, 0, min(SPOOL_RESERVE, shutil.disk_usage(folder).free // 2)

    def keep(block: bytes) -> None:
        try:
            spool.write(block)
            spool.flush()
        except OSError as error:
            raise _no_spool(name, folder, error.strerror) from None

    try:
        with _readable(shown), _beside(keep) as write:
            for block in _texts(decompressed(file), shown):
                if size >= looked and (free := shutil.disk_usage(folder).free) < reserve:
                    room = f"its text has more than {size / 1e6:,.0f} MB, and only {free / 1e6:,.0f} MB are free there"
                    raise _no_spool(name, folder, room)
                looked = size + 8 * READ_BYTES if size >= looked else looked
                write(block)
                size += len(block)
    except decoder_errors() as error:
        raise UserError(
            f"{name} is damaged: its compressed data ends early, does not decode, or is followed by something else "
            f"({error}).",
            "Fetch or copy the file again and compare its checksum.",
        ) from None


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Tell what the system says of a file that it cannot read, say of a disk that fails or a server that is gone."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a decompressor
            raise
        remedy = "See to the disk or the server that it is on; the same command then goes on."
        raise UserError(f"{name} cannot be read: {error.strerror}.", remedy) from None


@contextmanager
def _beside(write: Callable[[bytes], object]) -> Iterator[Callable[[bytes], object]]:
    """Have blocks written by a thread, one after the other, while the next is made; on one core at once.

    An error of a block is raised at the next, or at the end.
    """
    if cores() == 1:
        yield write
        return
    with threads(1, "spool") as pool:
        last = pool.submit(write, b"")

        def begin(block: bytes) -> None:
            nonlocal last
            last.result()
            last = pool.submit(write, block)

        yield begin
        last.result()


def _texts(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """A plain text in blocks; of FASTQ, the FASTA of it."""
    blocks = iter(partial(stream.read, READ_BYTES), b"")
    first = next(blocks, b"")
    every = chain([first], blocks)
    if not _is_fastq(first):
        return every
    from virnucpro_cli.fasta.fastq import as_fasta

    return as_fasta(chain([first.removeprefix(BOM)], blocks), name)


def _is_fastq(first: bytes) -> bool:
    return first.removeprefix(BOM).startswith(FASTQ)


def _check_is_fasta(source: Source) -> None:
    """Raise UserError, which says what the text is, if its first record does not begin with `>`."""
    head = source.read_raw(0, min(HEAD_BYTES, source.size))
    text, at = head.removeprefix(BOM).lstrip(), len(head)
    while not text and at < source.size:
        more = source.read(at, min(HEAD_BYTES, source.size - at))
        at, text = at + len(more), more.lstrip()
    if text.startswith(b">") and b"\0" not in head:
        return
    from virnucpro_cli.fasta.fastq import FROM_SAM

    start = re.split(rb"[\r\n]", text, maxsplit=1)[0][:40].decode("utf-8", "replace")
    kinds = (
        (not text, "empty: it holds no FASTA record", "Is it the file that was meant?"),
        (head.startswith((b"\xff\xfe", b"\xfe\xff")), "UTF-16 text", "Save it as plain text or UTF-8."),
        (head.startswith((b"BAM\1", b"CRAM")), "BAM or CRAM", FROM_SAM),
        (b"\0" in head, "a binary file", "Give a FASTA text file; gz, bz2, xz and zst compression are recognised."),
        (text.startswith(b"@"), "not FASTQ as it is read here (white space comes before '@')", "Remove it."),
        (text.startswith(b"<"), "an HTML or XML page, perhaps a failed download",
         "Look at its first lines and download the file again."),
        (True, f"not FASTA (it starts with {start!r})", "The first record must start with a '>' line."),
    )  # fmt: skip
    raise next(UserError(f"{source.path} is {kind}.", remedy) for so, kind, remedy in kinds if so)
