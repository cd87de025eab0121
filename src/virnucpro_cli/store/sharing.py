"""Rows of residues written into a file by processes of other hosts that see it too. Its owner vouches for them when they say that they are durable."""

import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import by_residue
from virnucpro_cli.store.disk import disk_error, pwrite_all, sync_data
from virnucpro_cli.store.writer import Place, Store


class SharedFile(NamedTuple):
    """What another host needs to know of a file: where it is, the word in it, and where rows of residues lie."""

    path: Path
    output: Path
    word: str
    word_at: int
    places: dict[str, Place]


BY_PAGES = ("nfs", "nfs4", "cifs", "smb3")
"""File systems whose clients write back whole pages, and so zeros over what another host has just written beside its own rows."""


def refuse_by_pages(path: Path, mounts: Path = Path("/proc/mounts")) -> None:
    """Raise UserError if the file lies where several hosts cannot write neighbouring rows."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:  # not Linux
        return
    real = str(path.parent.resolve())
    above = [(len(point), kind) for _, point, kind, *_ in lines if f"{real}/".startswith(f"{point.rstrip('/')}/")]
    kind = max(above, default=(0, ""))[1]
    if kind in BY_PAGES:
        raise UserError(
            f"--write worker: {path.parent} is on {kind}, whose clients write whole pages: rows of other hosts would be lost.",
            "Put -o on Lustre, GPFS, BeeGFS, CephFS or the like, leave --write worker out, or use --shard.",
        )


def share_file(file: Store) -> SharedFile:
    """Let others write rows of residues into a file. Raises UserError if it cannot be written, or not by several hosts."""
    refuse_by_pages(file.path.absolute())
    places = {name: place for name, place in file.places.items() if by_residue(*name.partition("/")[::2])}
    places.pop("residue/offsets", None)
    return SharedFile(
        file.path.absolute(), file.output.absolute(), file.sign(), file.places["run/report"].offset, places
    )


class Residues:
    """The file as a process elsewhere writes it. Raises UserError if it is not the same file there."""

    def __init__(self, shared: SharedFile, node: str):
        self.shared, self._unsynced = shared, False
        self._syncing = threading.Lock()
        self._failed: UserError | None = None
        refuse_by_pages(shared.path)
        try:
            reading = os.open(shared.path, os.O_RDONLY)
            try:
                found = os.pread(reading, len(shared.word), shared.word_at)
            finally:
                os.close(reading)
            self.fd = os.open(shared.path, os.O_WRONLY)
        except OSError as error:
            found, why = b"", f": {error.strerror}"
        else:
            why = ""
        if found != shared.word.encode():
            raise UserError(
                f"--write worker: {node} does not have this run's {shared.path}{why}.",
                "Put -o on a file system that all nodes share under the same path, or leave --write worker out.",
            )

    def place(self, layer: int | str, first: int, values: NDArray[Any]) -> None:
        """Write rows [n, D], in the store dtype, from row `first` on."""
        place = self.shared.places["unmasked/logits" if layer == "logits" else f"residue/{layer}"]
        if values[:1].nbytes != place.row_bytes:
            raise RuntimeError("values in another dtype or width than the dataset")
        data: Any = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        try:
            pwrite_all(self.fd, memoryview(data), place.offset + first * place.row_bytes)
        except OSError as error:
            raise disk_error(error, self.shared.output, resumable=True) from None
        self._unsynced = True

    def sync(self) -> None:
        """Make durable what was written before this call; several threads may ask. After a failure, never again."""
        with self._syncing:
            if self._failed is not None:
                raise self._failed
            if self._unsynced:
                self._unsynced = False
                try:
                    sync_data(self.fd)
                except OSError as error:
                    self._failed = disk_error(error, self.shared.output, resumable=True)
                    raise self._failed from None
