"""An embeddings file as its readers see it."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import POOLED
from virnucpro_cli.packing import stretches
from virnucpro_cli.store.disk import allow_open_files, checksum
from virnucpro_cli.store.schema import (
    DONE,
    NAME_BLOCK,
    ONLY_PLACE,
    PENDING,
    SCHEMA,
    blocks,
    whole_lines,
)

if TYPE_CHECKING:
    import anndata
    import pandas
    import polars

    from virnucpro_cli.tensors import Rows
STRETCH_BYTES = 1 << 26


def fingerprint_of(path: Path) -> tuple[dict[str, Any], bool] | None:
    """(fingerprint, complete) of a file that this program wrote; None if it is something else."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("schema") != SCHEMA or "fingerprint" not in file.attrs:
                return None
            return json.loads(file.attrs["fingerprint"]), bool(file["run/complete"][()])
    except (OSError, KeyError, ValueError):
        return None


def is_view(path: Path) -> bool:
    """Whether a file shows the rows of shards, finished or not."""
    with h5py.File(path, "r", locking=False) as file:
        return "virtual_of" in file.attrs


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints in words, but for ONLY_PLACE."""
    keys = sorted((theirs.keys() | ours.keys()) - set(ONLY_PLACE))
    keys = [key for key in keys if theirs.get(key) != ours.get(key)]
    words = {
        "contigs_sha256": "the content of the contigs differs",
        "input_sha256": "the content of the input differs",
        "weights_sha256": "the model's weights differ",
    }
    return [words.get(key, f"{key}: {theirs.get(key)} there, {ours.get(key)} now") for key in keys]


class Groups:
    """Groups of records. ids: their names; members: int64 [G], records of each that were embedded; of: int64 [N], the group of each
    record, -1 for none.
    """

    def __init__(self, group: h5py.Group, layer: int):
        self._group, self._layer = group, layer
        self.of: NDArray[np.int64] = group["of"][:]

    def __len__(self) -> int:
        return len(self._group["ids"])

    @cached_property
    def ids(self) -> list[str]:
        names: list[str] = self._group["ids"].asstr()[:].tolist()
        return names

    @property
    def members(self) -> NDArray[np.int64]:
        return self._group["members"][:]

    def rows(self, kind: str = "mean", layer: int | None = None) -> h5py.Dataset:
        """A row for each group, [G, D]: mean, length_weighted_mean or max of its members' means. NaN for a group without members."""
        return self._group[kind][str(self._layer if layer is None else layer)]


class ContactMaps:
    """Contact maps of records. values: all of them, flat; starts: int64 [N], where each record's begins, -1 for none; sizes: int32 [N],
    its residues; status: uint8 [N], of codes as /status.
    """

    def __init__(self, group: h5py.Group):
        self.values: h5py.Dataset = group["values"]
        self.starts: NDArray[np.int64] = group["starts"][:]
        self.sizes: NDArray[np.int32] = group["sizes"][:]
        self.status: NDArray[np.uint8] = group["status"][:]

    @property
    def done(self) -> int:
        return int((self.status == DONE).sum())

    @property
    def pending(self) -> int:
        return int((self.status == PENDING).sum())

    def of(self, row: int) -> NDArray[Any]:
        """The map [L, L] of a record; empty if it has none."""
        return self.raw(row) if self.status[row] == DONE else self.values[:0].reshape(0, 0)

    def raw(self, row: int) -> NDArray[Any]:
        """What is in the place of a record's map [L, L], whatever its status."""
        size, first = int(self.sizes[row]), int(self.starts[row])
        return self.values[first : first + size * size].reshape(size, size)


class EmbeddingFile:
    """An embeddings file opened for reading. Rows are in FASTA order; a record's number is its identity.

    `file[3]`, `file[10:20]`, `file["P12345"]` give rows of the default embedding (the `/embeddings` link).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = h5py.File(path, "r", locking=False)  # its structure never changes, even while a run fills it
        if self._file.attrs.get("schema") != SCHEMA:
            self._file.close()
            raise UserError(f"{path} is not an embeddings file of schema {SCHEMA}.")
        self.attributes: dict[str, Any] = dict(self._file.attrs)
        self.sources: list[Path] = self._checked_sources()
        self.lengths: NDArray[np.int32] = self._file["lengths"][:]
        self.status: NDArray[np.uint8] = self._file["status"][:]
        self.flags: NDArray[np.uint16] = self._file["flags"][:]
        self.reason: NDArray[np.uint8] = self._file["reason"][:]
        self.replaced: NDArray[np.int32] = self._file["replaced"][:]
        self._rows: dict[str, list[int]] | None = None
        self._names: list[str] | None = None

    def _checked_sources(self) -> list[Path]:
        """Of a view, the shards that it shows, all there and what they were; HDF5 would give NaN for what is missing."""
        shown, folder = json.loads(self.attributes.get("virtual_of", "[]")), self.path.resolve().parent
        if shown and (most := allow_open_files(len(shown))):  # HDF5 takes a shard that it cannot open for a missing one
            self._file.close()
            raise UserError(
                f"{self.path} shows rows of {len(shown):,} files, and this process may open {most:,}.",
                "Raise the limit (ulimit -n), or merge without --virtual.",
            )
        for name, recorded in shown:
            path = folder / name
            try:
                with h5py.File(path, "r", locking=False) as there:
                    found = there["run/checksum"][()].decode()
            except (OSError, KeyError):
                found = None
            if found != recorded:
                self._file.close()
                raise UserError(
                    f"{self.path} shows rows of {path}, which is {'missing' if found is None else 'another file now'}.",
                    "Put the shard back beside it, or merge again with --overwrite.",
                )
        return [folder / name for name, _ in shown]

    def __len__(self) -> int:
        return len(self.lengths)

    def __enter__(self) -> "EmbeddingFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def complete(self) -> bool:
        return int(self._file["run/complete"][()]) == 1

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self._file["run/report"][()])

    @property
    def records(self) -> NDArray[np.int64] | None:
        """Of a shard, or a view of shards: the number of each row's record in the input; None of another file, where that is the row's own."""
        return self._file["records"][:] if "records" in self._file else None

    @property
    def computed_by(self) -> NDArray[np.uint8]:
        """Number in `environments` of what computed each record; it counts where a row is done."""
        return self._file["computed_by"][:]

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Device, attention backend and versions of the runs that filled this file: one, unless it was resumed elsewhere."""
        return [json.loads(line) for line in whole_lines(self._file["run/environments"][()])]

    @property
    def checksum_of_the_run(self) -> str:
        """What `checksum` was when embed had finished; empty before."""
        return self._file["run/checksum"][()].decode()

    @property
    def unaltered(self) -> bool:
        """Whether its bytes, and those of the shards that it shows, are those that embed wrote; reads all of them."""
        if self.checksum_of_the_run != self.checksum():
            return False
        for path in self.sources:
            with EmbeddingFile(path) as shard:
                if not shard.unaltered:
                    return False
        return True

    def checksum(self) -> str:
        """The checksum of the file as it is now."""
        offsets = [self._file[f"run/{name}"].id.get_offset() for name in ("checksum", "complete")]
        with open(self._file.filename, "rb") as file:
            return checksum(file.fileno(), *offsets)

    def names_of(self, start: int, stop: int) -> list[str]:
        """The names of a range of records, read from the file."""
        names: list[str] = self._file["sequence_ids"].asstr()[start:stop].tolist()
        return names

    def names_at(self, rows: NDArray[np.int64]) -> list[str]:
        """The names of some records, in that order; the file's names are read in blocks, not held."""
        found: dict[int, str] = {}
        block_of = rows // NAME_BLOCK
        for block in np.unique(block_of).tolist():
            names = self.names_of(block * NAME_BLOCK, (block + 1) * NAME_BLOCK)
            found |= {row: names[row % NAME_BLOCK] for row in np.unique(rows[block_of == block]).tolist()}
        return [found[row] for row in rows.tolist()]

    def find(self, name: str) -> list[int]:
        """As `rows`, for a single question: reads all names in blocks and keeps none. Empty if there is no such name."""
        return [
            row
            for rows in blocks(len(self))
            for row, known in enumerate(self.names_of(rows.start, rows.stop), rows.start)
            if known == name
        ]

    @property
    def names(self) -> list[str]:
        if self._names is None:
            self._names = self._file["sequence_ids"].asstr()[:].tolist()
        return self._names

    @property
    def layers(self) -> list[int]:
        return [int(x) for x in json.loads(self.attributes["layers"])]

    @property
    def default(self) -> str | None:
        """What `/embeddings` is, such as mean/33; None if it is absent or nothing of the run's."""
        there = self._file.get("embeddings")
        names = [f"{kind}/{layer}" for kind in POOLED for layer in self.layers]
        return next((name for name in names if name in self._file and self._file[name] == there), None)

    @property
    def residue_offsets(self) -> NDArray[np.int64]:
        """int64 [N + 1]; needs `--pool residue` or `--emit logits`."""
        return self._file["residue/offsets"][:]

    @property
    def groups(self) -> Groups | None:
        """None of a file made without one of the --group options."""
        return Groups(self._file["groups"], self.layers[-1]) if "groups" in self._file else None

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Columns that not every file has, by name: genes/contig, genes/begin, genes/end, genes/strand, groups/of."""
        return {name: self._file[name][:] for name in json.loads(self.attributes.get("columns", "[]"))}

    @property
    def tables(self) -> dict[str, h5py.Dataset]:
        """Datasets of other things than records, by name: contigs/ids, contigs/lengths, groups/ids, groups/members."""
        return {name: self._file[name] for name in json.loads(self.attributes.get("tables", "[]"))}

    def rows(self, name: str) -> list[int]:
        """Every row of that name, in order; names need not be unique. Raises KeyError."""
        if self._rows is None:
            self._rows = {}
            for row, known in enumerate(self.names):
                self._rows.setdefault(known, []).append(row)
        return self._rows[name]

    def dataset(self, kind: str | None = None, layer: int | str | None = None) -> h5py.Dataset:
        """The h5py dataset of a pooling kind and layer (default: the last requested); negative layers are not resolved. ("unmasked", "entropy") gives a score."""
        if kind is None and layer is None:
            if "embeddings" not in self._file:
                raise KeyError("this file holds only per-residue embeddings: use residues(row)")
            return self._file["embeddings"]
        return self._file[kind or "mean"][str(self.layers[-1] if layer is None else layer)]

    def array(self, kind: str | None = None, layer: int | None = None) -> NDArray[Any]:
        """A dataset (see `dataset`) as a read-only memory map: [N, D], or [sum L, D] of residues. Nothing is copied, and it
        stays good when the file is closed. Of a view of shards it is a copy.
        """
        data = self.dataset(kind, layer)
        offset = data.id.get_offset()
        if offset is None:  # it is empty, or has its place in other files
            return data[:]
        return np.memmap(self._file.filename, data.dtype, "r", offset, data.shape)

    def to_torch(self, kind: str | None = None, layer: int | None = None) -> "Rows":
        """A `torch.utils.data.Dataset` of (row, record number) of each record that is done; see `tensors.Rows`."""
        from virnucpro_cli.tensors import Rows

        return Rows(self, kind, layer)

    def to_pandas(self, kind: str | None = None, layer: int | None = None) -> "pandas.DataFrame":
        """A data frame: name (the index, not made unique), length, status, and a column for each dimension, "0", "1" ..."""
        from virnucpro_cli import frames

        return frames.to_pandas(self, kind, layer)

    def to_polars(self, kind: str | None = None, layer: int | None = None) -> "polars.DataFrame":
        """A data frame: name, length, status, embedding (an array of D)."""
        from virnucpro_cli import frames

        return frames.to_polars(self, kind, layer)

    def to_anndata(self, kind: str | None = None, layer: int | None = None) -> "anndata.AnnData":
        """X float32 [N, D]; obs has name, length and status, and its index the names made unique; uns says what made it."""
        from virnucpro_cli import frames

        return frames.to_anndata(self, kind, layer)

    def stretches(self, kind: str) -> Iterator[slice]:
        """All records, one stretch after the other, each of about 64 MB of rows of that kind in fp32 (or a single record)."""
        rows = max(1, min(NAME_BLOCK, STRETCH_BYTES // (4 * self.dataset(kind, self.layers[0]).shape[1])))
        offsets = self.residue_offsets if kind == "residue" else np.arange(len(self) + 1)
        return (slice(*each) for each in stretches(offsets, len(self), rows))

    def __getitem__(self, key: int | slice | str | list[int] | NDArray[Any]) -> NDArray[Any]:
        if isinstance(key, str):
            key = self.rows(key)[0]
        if (
            isinstance(key, list | np.ndarray) and np.asarray(key).dtype != np.bool_
        ):  # h5py wants them increasing and distinct
            distinct, back = np.unique(np.asarray(key), return_inverse=True)
            return self.dataset()[distinct][back]
        return self.dataset()[key]

    def __iter__(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(name, row) of every record, in order."""
        for rows in blocks(len(self)):
            yield from zip(self.names_of(rows.start, rows.stop), self.dataset()[rows], strict=True)

    def logits(self, key: int | str) -> NDArray[Any]:
        """Logits [L, 33] of a record's residues (empty if it was skipped); needs `--emit logits`."""
        return self._of_residues(self.dataset("unmasked", "logits"), key)

    @cached_property
    def contact_maps(self) -> ContactMaps | None:
        """None of a file made without `--emit contacts`."""
        return ContactMaps(self._file["contacts"]) if "contacts" in self._file else None

    def contacts(self, key: int | str) -> NDArray[Any]:
        """Probabilities of contact [L, L] of a record's residues (empty if it has none); needs `--emit contacts`."""
        maps = self.contact_maps
        if maps is None:
            raise KeyError("this file holds no contacts: it was made without --emit contacts")
        return maps.of(self._row(key))

    def residues(self, key: int | str, layer: int | None = None) -> NDArray[Any]:
        """Per-residue array [L, D] of a record (empty if it was skipped); needs `--pool residue`."""
        return self._of_residues(self.dataset("residue", layer), key)

    def _of_residues(self, data: h5py.Dataset, key: int | str) -> NDArray[Any]:
        row = self._row(key)
        first, last = self._file["residue/offsets"][row : row + 2]
        return data[first:last]

    def _row(self, key: int | str) -> int:
        return self.rows(key)[0] if isinstance(key, str) else range(len(self))[key]


def read_embeddings(path: str | Path) -> EmbeddingFile:
    """Open an embeddings file. No torch needed."""
    return EmbeddingFile(path)
