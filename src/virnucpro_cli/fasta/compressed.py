"""Compressed bytes to plain ones, every stream of a file: gz, bz2, xz and zst."""

import bz2
import io
import lzma
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import chain
from typing import IO, Any

from virnucpro_cli.stopping import cores, threads

BLOCK_BYTES, MOST_AT_ONCE = 1 << 20, 1 << 24
BGZF_HEAD = re.compile(rb"\x1f\x8b\x08\x04.{6}\x06\x00BC\x02\x00(..)", re.DOTALL)
"""The head of a BGZF block, a gzip member that holds its own size less 1 (SAM specification, section 4.1)."""
BGZF_HEAD_BYTES, BGZF_BLOCK_BYTES = 18, 1 << 16
BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block at the end of a BGZF file."""
PIECE_BYTES, PIECE_BLOCKS, MOST_THREADS = 1 << 18, 8, 16
"""A thread gets half a megabyte of text at once, which stays within a cache on its way to the file."""
OPTIONAL_ERRORS = {
    "isal.isal_zlib": "error", "zlib_ng.zlib_ng": "error",
    "backports.zstd": "ZstdError", "compression.zstd": "ZstdError", "zstandard": "ZstdError",
}  # fmt: skip
"""Modules of decompressors, which may be installed, and the name of their error."""


def begun(file: IO[bytes], size: int) -> tuple[bytes, IO[bytes]]:
    """The first bytes of a buffered file or pipe, so many of them, and the same from its beginning."""
    first = file.read(size)  # a pipe may show fewer bytes to a peek
    if file.seekable():
        file.seek(-len(first), os.SEEK_CUR)
    else:
        file = plain(chain([first], iter(partial(file.read, BLOCK_BYTES), b"")))
    return first, file


def decoded(file: IO[bytes], kind: str | None) -> IO[bytes]:
    """The plain bytes of a file or pipe at its beginning, which is compressed as `kind` says, or not.

    Reading raises one of `decoder_errors()` where a stream is damaged, cut, or followed by bytes that are no stream.
    """
    match kind:
        case None:
            return file
        case "bz2":
            return plain(_every_stream(file, bz2.BZ2Decompressor, padded=False))
        case "xz":
            return plain(_every_stream(file, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), padded=True))
        case "gz":
            first, file = begun(file, BGZF_HEAD_BYTES)
            return plain(_bgzf(file)) if cores() > 1 and BGZF_HEAD.match(first) else _xopened(file, kind)
        case kind:
            return _xopened(file, kind)


def decoder_errors() -> tuple[type[Exception], ...]:
    """Errors of the decompressors on damaged data, of those modules that are loaded."""
    optional = [getattr(sys.modules[name], error) for name, error in OPTIONAL_ERRORS.items() if name in sys.modules]
    return (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, *optional)


def _xopened(file: IO[bytes], kind: str) -> IO[bytes]:
    from xopen import xopen  # for a third of a second, and not by helpers, which read plain bytes

    opened: Any = xopen(file, "rb", threads=0, format=kind)
    return opened


def _bgzf(file: IO[bytes]) -> Iterator[bytes]:
    """Decompress the blocks of a BGZF file by threads beside one another, in order.

    From the first member that is no sound block on, the rest is read as any gzip file is. An empty block stands before
    it, since zeros may follow a member and not precede the first.
    """
    pieces, ahead = _bgzf_pieces(file), deque[tuple[list[bytes], Future[list[bytes]]]]()
    decoder, most = _inflater(), 2 * min(cores(), MOST_THREADS)
    with threads(MOST_THREADS, "bgzf") as pool:
        while True:
            while len(ahead) < most and (piece := next(pieces, None)):
                ahead.append((piece, pool.submit(_inflated, piece, decoder)))
            if not ahead:
                return
            piece, future = ahead.popleft()
            yield from (texts := future.result())
            if len(texts) < len(piece):
                break
    waiting = chain.from_iterable(blocks for blocks, _ in ahead)
    rest = plain(chain([BGZF_END], piece[len(texts) :], waiting, chain.from_iterable(pieces)))
    yield from iter(partial(_xopened(rest, "gz").read, BLOCK_BYTES), b"")


def _bgzf_pieces(file: IO[bytes]) -> Iterator[list[bytes]]:
    """Cut a file into BGZF blocks, and give so many at once. Other bytes are pieces too, as they come."""
    data, blocks = b"", list[bytes]()
    while more := file.read(PIECE_BYTES):
        data, at = data + more, 0
        while (head := BGZF_HEAD.match(data, at)) and (end := at + int.from_bytes(head[1], "little") + 1) <= len(data):
            blocks.append(data[at:end])
            at = end
            if len(blocks) == PIECE_BLOCKS:
                yield blocks
                blocks = []
        data = data[at:]
        if len(data) >= BGZF_BLOCK_BYTES:  # half a block is less
            blocks, data = [*blocks, data], b""
        if blocks:
            yield blocks
            blocks = []
    if data:
        yield [data]


def _inflater() -> Any:
    """The module that decompresses gzip files for xopen."""
    import xopen  # noqa: F401

    return next((sys.modules[name] for name in ("isal.isal_zlib", "zlib_ng.zlib_ng") if name in sys.modules), zlib)


def _inflated(blocks: list[bytes], decoder: Any) -> list[bytes]:
    """The plain bytes of each block, up to the first that is not sound."""
    texts = list[bytes]()
    for block in blocks:
        inflating = decoder.decompressobj(-zlib.MAX_WBITS)
        try:
            text = inflating.decompress(memoryview(block)[BGZF_HEAD_BYTES:-8], BGZF_BLOCK_BYTES)
        except decoder_errors():
            break
        sums = decoder.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little")
        if not (BGZF_HEAD.match(block) and inflating.eof and not inflating.unused_data and block[-8:] == sums):
            break
        texts.append(text)
    return texts


def _every_stream(file: IO[bytes], new: Callable[[], Any], padded: bool) -> Iterator[bytes]:
    """Decompress every stream. The standard library's own files end silently at bytes that are no stream.

    padded: zeros may follow a stream, in fours.
    """
    decoder, begun, left, zeros = new(), False, b"", 0
    while data := left or file.read(BLOCK_BYTES):
        left = b""
        if padded and not begun:
            zeros += len(data) - len(data.lstrip(b"\0"))
            data = data.lstrip(b"\0")
            if data and zeros % 4:
                raise EOFError(f"{zeros:,} bytes of padding are no multiple of four")
        if data:
            begun = True
            yield decoder.decompress(data, MOST_AT_ONCE)
            while not (decoder.eof or decoder.needs_input):
                yield decoder.decompress(b"", MOST_AT_ONCE)
        if decoder.eof:
            left, decoder, begun = decoder.unused_data, new(), False
    if begun or zeros % 4:
        raise EOFError("the last stream or its padding is cut short")


def plain(blocks: Iterator[bytes]) -> IO[bytes]:
    """Blocks of bytes as a file to read."""
    return io.BufferedReader(_Blocks(blocks), BLOCK_BYTES)


class _Blocks(io.RawIOBase):
    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._block = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._block:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._block = memoryview(block)
        size = min(len(buffer), len(self._block))
        buffer[:size], self._block = self._block[:size], self._block[size:]
        return size
