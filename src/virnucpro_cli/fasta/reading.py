"""FASTA texts open for reading: the user's files, or nameless copies of what is compressed or comes through a pipe."""

import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xopen import xopen

from virnucpro_cli.errors import UserError, absent

HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 20  # the pass over one chunk stays within the L2 cache
BOM = b"\xef\xbb\xbf"
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")


def decoder_errors() -> tuple[type[Exception], ...]:
    """What the decompressors behind xopen raise on damaged data; which of them are installed depends on the platform."""
    errors: list[type[Exception]] = [EOFError, OSError, ValueError, zlib.error, lzma.LZMAError]
    for module, name in (("isal.isal_zlib", "error"), ("zlib_ng.zlib_ng", "error"),
                         ("backports.zstd", "ZstdError"), ("compression.zstd", "ZstdError"),
                         ("zstandard", "ZstdError")):  # fmt: skip
        found = sys.modules.get(module)
        if found is not None and hasattr(found, name):
            errors.append(getattr(found, name))
    return tuple(errors)


@dataclass(frozen=True)
class Source:
    """One FASTA text open for reading: the user's file, or a nameless spooled copy of compressed or piped input."""

    path: str
    file: IO[bytes]
    size: int
    mtime_ns: int
    base: int  # offset of this text in the concatenation of all sources

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that inherits the descriptor, under its number."""
        return _inherited, (self.path, self.file.fileno(), self.size, self.mtime_ns, self.base)

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of this text. Raises UserError if the file has shrunk meanwhile."""
        data = os.pread(self.file.fileno(), size, start)
        while len(data) < size:
            more = os.pread(self.file.fileno(), size - len(data), start + len(data))
            if not more:
                raise self.changed()
            data += more
        return data

    def check_unchanged(self) -> None:
        now = os.fstat(self.file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.changed()

    def changed(self) -> UserError:
        return UserError(
            f"{self.path} was changed while it was being read.",
            "Run again on a file that nothing else writes to; results of the old content are not mixed with the new.",
        )


def _inherited(path: str, fd: int, size: int, mtime_ns: int, base: int) -> Source:
    return Source(path, os.fdopen(fd, "rb"), size, mtime_ns, base)


def open_sources(inputs: Sequence[str], spool_dir: Path) -> list[Source]:
    """Open FASTA files, plain or compressed (gz, bz2, xz, zst; by content), or `-` for standard input.

    What is not a plain file is first spooled to a nameless file in `spool_dir`, which vanishes with the process.
    """
    sources: list[Source] = []
    base = 0
    for name in inputs:
        file = _open_plain(name, spool_dir)
        status = os.fstat(file.fileno())
        source = Source("standard input" if name == "-" else name, file, status.st_size, status.st_mtime_ns, base)
        _check_is_fasta(source)
        sources.append(source)
        base += source.size
    return sources


def _open_plain(name: str, spool_dir: Path) -> IO[bytes]:
    try:
        if name == "-" and sys.stdin is None:
            raise UserError("Standard input is closed.", "Pipe a FASTA into it, or name a file.")
        file: IO[bytes] = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115 (the table reads it later)
    except IsADirectoryError:
        raise UserError(
            f"{name} is a directory.", "Name the FASTA files in it, for example with a shell wildcard."
        ) from None
    except FileNotFoundError:
        raise UserError(f"{absent(name)}.", f"Paths are relative to {Path.cwd()}.") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None
    if name == "-" or not os.path.isfile(name):  # pipes, process substitution
        file = _spool(file, name, spool_dir)
    magic = file.read(6)
    file.seek(0)
    return _spool(_decompressed(file), name, spool_dir) if magic.startswith(COMPRESSED_MAGIC) else file


def _decompressed(file: IO[bytes]) -> Any:
    return xopen(file, "rb", threads=0)


def _spool(stream: Any, name: str, spool_dir: Path) -> IO[bytes]:
    try:
        spool: Any = tempfile.TemporaryFile(dir=spool_dir)  # noqa: SIM115
        shutil.copyfileobj(stream, spool, READ_BYTES)
        spool.flush()
    except decoder_errors() as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(
                f"{name} cannot be spooled to {spool_dir}: {error.strerror}.",
                "Compressed and piped input needs room for its plain text beside the output.",
            ) from None
        raise UserError(
            f"{name} is damaged: its compressed data ends early or does not decode ({error}).",
            "Fetch or copy the file again and compare its checksum.",
        ) from None
    spool.seek(0)
    return spool


def _check_is_fasta(source: Source) -> None:
    head = os.pread(source.file.fileno(), HEAD_BYTES, 0)
    text = head.removeprefix(BOM).lstrip()
    at = len(head)
    while not text and at < source.size:
        more = source.read(at, min(1 << 16, source.size - at))
        at, text = at + len(more), more.lstrip()
    if text.startswith(b">") and b"\0" not in head:
        if b"\n" not in head and b"\r" in head:
            raise UserError(
                f"{source.path} has old Macintosh line ends (CR only).", "Convert it: tr '\\r' '\\n' < in > out"
            )
        return
    if source.size == 0 or not text:
        raise UserError(f"{source.path} is empty: it holds no FASTA record.")
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
