"""Rows of residues written into a file by processes of other hosts that see it too. Its owner vouches for them when they say that they are durable."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import by_residue
from virnucpro_cli.store.disk import disk_error, pwrite_all
from virnucpro_cli.store.filling import Place, Store


class SharedFile(NamedTuple):
    """What another host needs to know of a file: where it is, the word in it, and where rows of residues lie."""

    path: Path
    output: Path
    word: str
    word_at: int
    places: dict[str, Place]


def share_file(file: Store) -> SharedFile:
    """Let others write rows of residues into a file. Raises UserError if it cannot be written."""
    places = {name: place for name, place in file.places.items() if by_residue(*name.partition("/")[::2])}
    places.pop("residue/offsets", None)
    return SharedFile(
        file.path.absolute(), file.output.absolute(), file.sign(), file.places["run/report"].offset, places
    )


class Residues:
    """The file as a process elsewhere writes it. Raises UserError if it is not the same file there."""

    def __init__(self, shared: SharedFile, node: str):
        self.shared, self.unsynced = shared, False
        try:
            self.fd = os.open(shared.path, os.O_RDWR)
            found = os.pread(self.fd, len(shared.word), shared.word_at)
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
        assert values[:1].nbytes == place.row_bytes, "values in another dtype or width than the dataset; this is a bug"
        data: Any = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self.unsynced = True
        try:
            pwrite_all(self.fd, memoryview(data), place.offset + first * place.row_bytes)
        except OSError as error:
            raise disk_error(error, self.shared.output, resumable=True) from None

    def sync(self) -> None:
        """Make durable what was written before this call."""
        if self.unsynced:
            self.unsynced = False
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                raise disk_error(error, self.shared.output, resumable=True) from None
