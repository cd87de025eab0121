"""Tokens in a file of blocks beside the output: what a killed run made of them, the same command finds.

A block is known by the text that it is of, and nothing of one is used before its checksum was compared. Bytes that
another process may have mapped are never written again: a file of other text is replaced by a new one.
"""

import mmap
import os
import stat
import struct
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli.store import disk

MARK = b"virnucpro tokens"
HEAD = struct.Struct("<16s16s16sqq")
"""The head of a block: mark, key of its text, checksum of what follows, numbers of records and of tokens."""


class Block(NamedTuple):
    """Tokens of some records. counts: int32 [n], tokens of each; first: the place of the first one in the file."""

    counts: NDArray[np.int32]
    first: int


def forget(path: Path) -> None:
    """Remove the tokens of a finished run, and nothing else of this name."""
    with suppress(OSError):
        if _is_ours(path):
            path.unlink()


def _is_ours(path: Path) -> bool:
    """Whether a file is of tokens, or empty, as one may be after the power went."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with open(path, "rb") as file:
        return file.read(len(MARK)) in (b"", MARK)


class TokenFile:
    """A file that blocks are read from, as far as they are of the wanted text, and then added to.

    path: None for a nameless file in the folder, which also stands in where something else has the name.
    Raises OSError if it cannot be made, and UserError while another run writes it.
    """

    def __init__(self, folder: Path, path: Path | None):
        self.at, self.path = 0, path
        with suppress(FileNotFoundError):
            if path is not None and not _is_ours(path):
                self.path = None
        if self.path is None:
            self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as this is)
            return
        self.file = open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")  # noqa: SIM115
        disk.lock(self.file.fileno(), self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def found(self, key: bytes) -> Block | None:
        """The next block, if it is there and whole and of the text with this key of 16 bytes."""
        self.file.seek(self.at)
        head = self.file.read(HEAD.size)
        if len(head) < HEAD.size:
            return None
        mark, its_key, checksum, records, tokens = HEAD.unpack(head)
        if (mark, its_key) != (MARK, key):
            return None
        body = self.file.read(4 * records + 2 * tokens)
        if len(body) < 4 * records + 2 * tokens or xxhash.xxh3_128_digest(body) != checksum:
            return None
        return self._block(np.frombuffer(body, np.int32, records), len(body))

    def add(self, key: bytes, count: NDArray[np.int32], ids: NDArray[np.uint16]) -> Block:
        """The next block, of the text with this key of 16 bytes: count int32 [n], ids uint16 [sum of count]."""
        if self.path is not None and os.fstat(self.file.fileno()).st_size > self.at:
            self._replace(self.path)
        body = count.tobytes() + ids.tobytes()
        self.file.seek(self.at)
        self.file.write(HEAD.pack(MARK, key, xxhash.xxh3_128_digest(body), len(count), len(ids)) + body)
        self.file.flush()
        return self._block(count, len(body))

    def _block(self, count: NDArray[np.int32], size: int) -> Block:
        block = Block(count, (self.at + HEAD.size + 4 * len(count)) // 2)
        self.at += HEAD.size + size
        return block

    def _replace(self, path: Path) -> None:
        """Go on in a new file of this name, with the blocks that were found."""
        path.unlink()
        new = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "r+b")  # noqa: SIM115
        disk.lock(new.fileno(), path)
        self.file.seek(0)
        with self.file as old:
            for start in range(0, self.at, 1 << 24):
                new.write(old.read(min(1 << 24, self.at - start)))
        self.file = new

    def mapped(self) -> NDArray[np.uint16]:
        """All of the file, uint16 [n], in which a block's tokens lie from its `first` on. It is not locked any more."""
        if not self.at:
            return np.empty(0, np.uint16)
        with ExitStack() as stack:
            file = self.file if self.path is None else stack.enter_context(open(self.path, "rb"))
            if self.path is not None and not disk.is_the_file(self.path, os.fstat(self.file.fileno())):
                raise disk.Overtaken(self.path)
            return np.frombuffer(mmap.mmap(file.fileno(), self.at, access=mmap.ACCESS_READ), np.uint16)
