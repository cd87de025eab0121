"""Compressed bytes to plain ones, every stream of a file: gz, bz2, xz and zst."""

import bz2
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import IO, Any

BLOCK_BYTES, MOST_AT_ONCE = 1 << 20, 1 << 24
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
        case kind:
            from xopen import xopen  # for a third of a second, and not by helpers, which read plain bytes

            opened: Any = xopen(file, "rb", threads=0, format=kind)
            return opened


def decoder_errors() -> tuple[type[Exception], ...]:
    """Errors of the decompressors on damaged data, of those modules that are loaded."""
    optional = [getattr(sys.modules[name], error) for name, error in OPTIONAL_ERRORS.items() if name in sys.modules]
    return (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, *optional)


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
