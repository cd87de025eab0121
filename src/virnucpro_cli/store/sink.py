"""A way for HDF5 to write a file that it survives, whatever becomes of the file."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from virnucpro_cli.store.disk import pwrite_all


class Sink:
    """An open file as HDF5 writes it through Python. HDF5 crashes when a write fails, and may close a file late.

    So no write fails here: an error, or a signal, is kept in `error`, and writes that follow it go to memory, as do those after
    `end`. `each` raises it soon. The file is never made smaller, so that room once reserved stays reserved; `size` is its size.
    """

    def __init__(self, fd: int):
        self._fd = fd
        self._at = self.size = 0
        self._after: list[tuple[int, bytes]] = []
        self._ended = False
        self.error: BaseException | None = None
        self.file: Any = None  # the h5py.File, for who needs both

    def each(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """The blocks, as long as all that came of earlier ones is written."""
        for block in blocks:
            yield block
            if self.error is not None:
                raise self.error

    def end(self) -> None:
        """HDF5 is done, or should be: the descriptor may be another file's from now on. Raises the error of a write that failed."""
        self._ended = True
        self._after.clear()
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None and not self._ended:
            try:
                pwrite_all(self._fd, view, self._at)
            except BaseException as error:
                self.error = error
        if self.error is not None and not self._ended:
            self._after.append((self._at, bytes(view)))
        self._at += view.nbytes
        self.size = max(self.size, self._at)
        return view.nbytes

    def readinto(self, into: Any) -> int:
        """Bytes of the file with zeros behind its end, and over them those that could not be written."""
        there = b"" if self._ended else os.pread(self._fd, len(into), self._at)
        found = bytearray(there.ljust(len(into), b"\0"))
        for offset, data in self._after:
            first, last = max(offset, self._at), min(offset + len(data), self._at + len(into))
            if first < last:
                found[first - self._at : last - self._at] = data[first - offset : last - offset]
        into[:] = found
        self._at += len(into)
        return len(into)

    def read(self, size: int = -1) -> bytes:
        found = bytearray(self.size - self._at if size < 0 else size)
        self.readinto(found)
        return bytes(found)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def flush(self) -> None:
        """Everything was written at once."""
