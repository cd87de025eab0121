"""An embeddings file as its readers see it."""

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import AGAIN, STOP_SIGNALS, Missing, UserError, counted, damage_named, damaged
from virnucpro_cli.kinds import KINDS, POOLED, PROTEIN, WORDS
from virnucpro_cli.stopping import cores
from virnucpro_cli.store import checked, disk, schema, sums
from virnucpro_cli.store.checked import (
    Dataset,
    columns_of,
    datasets_of,
    fingerprint_of,
    opened_hdf5,
    reading,
)
from virnucpro_cli.store.layout import packed, texts_as_written
from virnucpro_cli.store.schema import DONE, NAME_BLOCK, PENDING, STATUS_NAMES, blocks, chunks, unfit, whole_lines
from virnucpro_cli.texts import Texts

if TYPE_CHECKING:
    import anndata
    import pandas
    import polars

    from virnucpro_cli.store.parts import ContactMaps, Groups, Half
    from virnucpro_cli.store.tensors import Rows

CHUNK_BYTES = 1 << 26
MOST_NAMED = 10
"""Names and rows that a message lists, at most."""
OPENING_SECONDS, OPENING_RATE = 30, 10_000_000
"""Seconds that opening a file may take, and bytes of it for which there is a second more."""
CRASHES: tuple[int, ...] = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)
LOST = {int(signal.SIGALRM): "does not come back", **dict.fromkeys(CRASHES, "crashes")}
NOT_JSON = (ValueError, RecursionError)
_TRIED = set[tuple[int, ...]]()
"""Files that HDF5 has come back from in this process, by `disk.state_of`."""


def accession(name: str) -> str:
    """`Q87479` of `tr|Q87479|Q87479_SIV`, a name as UniProt has them; of another name itself."""
    match = re.match(r"(?:sp|tr)\|([^|]+)\|", name)
    return match[1] if match else name


class EmbeddingFile:
    """An embeddings file opened for reading. Rows are in FASTA order; a record's number is its identity.

    `file[3]`, `file[10:20]`, `file["P12345"]` give rows of the default embedding (the `/embeddings` link). Opening
    compares every dataset and attribute with the schema. Raises UserError for another or a damaged file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        _check_there(self.path, path)
        self._index: dict[Callable[[str], str], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._file = opened_hdf5(self.path)
        try:
            self.attributes, self._parsed = checked.attributes_of(self._file, self.path)
            self._data = datasets_of(self._file, self.path)
            columns = columns_of(self.path, self._data, self._parsed)
        except BaseException:
            self.close()
            raise
        self.lengths: NDArray[np.int32] = columns["lengths"]
        self.status: NDArray[np.uint8] = columns["status"]
        self.flags: NDArray[np.uint16] = columns["flags"]
        self.reason: NDArray[np.uint8] = columns["reason"]
        self.replaced: NDArray[np.int32] = columns["replaced"]

    def holds(self, name: str) -> bool:
        """Whether the file has a dataset of this name."""
        return name in self._data

    def at(self, name: str) -> Dataset:
        """The dataset of that name in the file. Raises UserError if there is none."""
        if name not in self._data:
            raise Missing(f"{self.path} has no dataset {name}.", f"It has {', '.join(sorted(self._data))}.")
        return self._data[name]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The fingerprint: all that the values depend on. Raises UserError if the file lacks anything it promises."""
        settings = checked.settings_of(self.path, self.attributes, self._parsed, self._data)
        if not self.environments:
            raise damaged(self.path, "run/environments is empty")
        return settings

    @property
    def words(self) -> tuple[str, str]:
        """The words for a record and for a letter of it: protein and residue, or sequence and base."""
        return WORDS[self.settings.get("kind", PROTEIN)]

    @property
    def unit(self) -> str:
        """The word for what `max_residues` and `sizes` count: a letter, or a token of several."""
        return "token" if "tokens" in self._parsed.get("columns", []) else self.words[1]

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Letters of each record, or tokens of several: as many as a model reads if it cuts nothing. int32 [N]."""
        return self.at("tokens")[:] if self.unit == "token" else self.lengths

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """Files that were embedded: path, bytes and sha256 of each."""
        return list(self._parsed["inputs"])

    def __repr__(self) -> str:
        proteins, state = counted(len(self), self.words[0]), "" if self.complete else ", not complete"
        return f"<EmbeddingFile {str(self.path)!r}: {proteins}, {self.default or 'residues alone'}{state}>"

    def __contains__(self, name: object) -> bool:
        """Whether there is a record of that name, or of that accession."""
        return isinstance(name, str) and bool(self.find(name))

    def keys(self) -> list[str]:
        """Names of all records in order."""
        return self.names

    def __len__(self) -> int:
        return len(self.lengths)

    def __enter__(self) -> "EmbeddingFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; memory maps that `array` gave stay good."""
        self._file.close()

    # --- the run ---

    @property
    def complete(self) -> bool:
        """Whether the run ended: no record is pending."""
        return int(self.at("run/complete")[()]) == 1

    @property
    def report(self) -> dict[str, Any]:
        """Numbers of the run, as the command's --report has them."""
        with damage_named(self.path, NOT_JSON):
            report: dict[str, Any] = json.loads(self.at("run/report")[()])
        return report

    @property
    def records(self) -> NDArray[np.int64] | None:
        """Number in the input of each record of a shard, int64 [N]; None of another file, where it is the row's."""
        return self.at("records")[:] if "records" in self._data else None

    @property
    def computed_by(self) -> NDArray[np.uint8]:
        """Number in `environments` of the one that computed each record: uint8 [N]. It counts where a row is done."""
        return self.at("computed_by")[:]

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Device, attention backend and versions of the runs that filled this file: several if it went on elsewhere."""
        with damage_named(self.path, NOT_JSON):
            environments = [json.loads(line) for line in whole_lines(self.at("run/environments")[()])]
        if (place := unfit(environments, [dict])) is not None:
            raise damaged(self.path, f"run/environments is not as it was written, in line {place}")
        return environments

    @property
    def state_sums(self) -> NDArray[np.uint64]:
        """Digests of what each record's status, flags, reason and environment are, uint64 [N]; see `sums.of_states`."""
        return sums.of_states([self.at(name)[:] for name in schema.STATES], self.environment_lines)

    @cached_property
    def environment_lines(self) -> list[str]:
        """The environments as they stand in the file, a line of JSON each."""
        with reading(self.path):
            return whole_lines(self.at("run/environments")[()])

    @property
    def checksum_of_the_run(self) -> str:
        """The checksum when embed had finished; empty before."""
        text: bytes = self.at("run/checksum")[()]
        return text.decode("ascii", "replace")

    @property
    def unaltered(self) -> bool:
        """Whether its bytes are those that embed wrote; reads all of them."""
        return self.checksum_of_the_run == self.checksum()

    def checksum(self) -> str:
        """The checksum of the file as it is now."""
        offsets = [self._data[f"run/{name}"].id.get_offset() for name in ("checksum", "complete")]
        with reading(self.path):
            return disk.checksum(self._file.id.get_vfd_handle(), *offsets)

    @property
    def is_as_laid_out(self) -> bool:
        """Whether all that is neither rows nor their states is as it was before the first row. Reads all of that.

        Files of earlier versions, which cannot tell, and files with groups or contact maps are not.
        """
        if not self._data.keys() >= {"run/layout", "run/sums"} or self.groups is not None or self.contact_maps:
            return False
        halves = tuple(f"{half}/" for half in schema.HALVES)
        changing = [
            name for name in self._data
            if name in schema.STATES or schema.is_of_rows(name) or name.startswith(halves)
        ]  # fmt: skip
        extents = [self._extent(name) for name in (*changing, *(n for n in self._data if n.startswith("run/")))]
        with reading(self.path):
            return sums.of_the_rest(self._file.id.get_vfd_handle(), extents) == self.at("run/layout")[()]

    def _extent(self, name: str) -> tuple[int, int]:
        """Offset and bytes of a dataset."""
        data = self.at(name)
        return data.id.get_offset() or 0, data.dtype.itemsize * data.size

    @property
    def identity(self) -> str:
        """Words that tell this file from another that takes its name later."""
        created, settings = (str(self.attributes.get(name)) for name in ("created", "fingerprint"))
        return f"{self.checksum_of_the_run} {len(self)} {created} {hashlib.sha256(settings.encode()).hexdigest()}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (str(self.path), self.identity)

    # --- names ---

    def texts(self, name: str, start: int, stop: int) -> list[str]:
        """A range of a dataset of text. Together they are no longer than the file, whatever their entries say."""
        data = self.at(name)
        start, stop = max(0, start), min(len(data), stop)
        if start >= stop:
            return []
        with reading(self.path):
            if (as_written := self._as_written(name, start, stop)) is not None:
                return as_written.strings()
            fd, size = self._file.id.get_vfd_handle(), checked.HEAP_ENTRY
            entries = os.pread(fd, size * (stop - start), data.id.get_offset() + size * start)
            if np.frombuffer(entries, "<u4")[::4].sum(dtype=np.int64) > os.fstat(fd).st_size:
                raise damaged(self.path, f"{name} has longer texts than the file")
            texts: list[str] = data.asstr()[start:stop].tolist()
        return texts

    def names_of(self, start: int, stop: int) -> list[str]:
        """The names of a range of records, read from the file."""
        return self.texts("sequence_ids", start, stop)

    def name_texts(self, start: int, stop: int) -> Texts:
        """The same, packed."""
        with reading(self.path):
            return self._as_written("sequence_ids", start, stop) or packed(self.names_of(start, stop))

    def _as_written(self, name: str, start: int, stop: int) -> Texts | None:
        """Texts that lie in the file as this program writes them. HDF5, which takes twice as long, reads others."""
        at, fd = self.at(name).id.get_offset(), self._file.id.get_vfd_handle()
        if at is None or not 0 <= start < stop <= len(self.at(name)):
            return None
        return texts_as_written(fd, at, start, stop)

    def names_at(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The names of records (int64 [n]), in that order; the file's names are read in blocks, not held."""
        rows = np.asarray(rows, np.int64)
        names: dict[int, str] = {}
        block_of = rows // NAME_BLOCK
        for block in np.unique(block_of).tolist():
            wanted = np.unique(rows[block_of == block]).tolist()
            read = self.names_of(wanted[0], wanted[-1] + 1)
            names |= {row: read[row - wanted[0]] for row in wanted}
        return [names[row] for row in rows.tolist()]

    @cached_property
    def names(self) -> list[str]:
        """Names of all records in order, read on first use and held."""
        return self.names_of(0, len(self))

    def find(self, name: str) -> list[int]:
        """Every record of that name, else of that accession, in order; empty if there is none. Holds 16 bytes a record.

        Raises UserError for an accession in several names.
        """
        if rows := self._by_hash(name, str):
            return rows
        rows = self._by_hash(name, accession)
        names = list(dict.fromkeys(self.names_at(np.array(rows[:MOST_NAMED], np.int64))))
        if len(names) > 1:
            several = f"{name} is the accession of several names in {self.path}: {', '.join(names)}."
            raise UserError(several, "Give the whole name.")
        return rows

    def _by_hash(self, wanted: str, key: Callable[[str], str]) -> list[int]:
        """Records, in order, of whose names `key` makes the text that is wanted."""
        if key not in self._index:
            hashes = schema.hashes(len(self), lambda start, stop: map(key, self.names_of(start, stop)))
            order = np.argsort(hashes, kind="stable")
            self._index[key] = hashes[order], order
        hashes, order = self._index[key]
        first, last = np.searchsorted(hashes, hash(wanted)), np.searchsorted(hashes, hash(wanted), "right")
        likely = order[first:last]
        return [row for row, name in zip(likely.tolist(), self.names_at(likely), strict=True) if key(name) == wanted]

    def rows(self, name: str) -> list[int]:
        """Records of a name, see `find`. Raises UserError, which is a KeyError too, if there is none."""
        if not (rows := self.find(name)):
            raise Missing(f"{self.path} has no record {name!r}.", "Its names are in file.names.")
        return rows

    def _row(self, key: int | str | np.integer[Any]) -> int:
        if not isinstance(key, str):
            return range(len(self))[int(key)]
        rows = self.rows(key)
        if len(rows) > 1:
            some = f"{', '.join(map(str, rows[:MOST_NAMED]))}{' ...' if len(rows) > MOST_NAMED else ''}"
            raise Missing(
                f"{len(rows):,} records of {self.path} are named {key!r}: {some}.",
                f"Choose by number; file.rows({key!r}) gives all of them.",
            )
        return rows[0]

    # --- datasets ---

    @property
    def layers(self) -> list[int]:
        """Resolved numbers of the layers that are stored, as in 33."""
        return list(self._parsed.get("layers") or [])

    def layer(self, number: int | None = None) -> int:
        """A layer by its number, or counted from the model's last, -1, as with --layers; by default the last stored.

        Raises UserError for a negative one if the file does not tell the depth of its model.
        """
        if number is None:
            return self.layers[-1]
        if number in self.layers or number >= 0:
            return number
        asked = self._parsed.get("config", {}).get("layers")
        if "model_layers" in self.attributes:
            depth = int(self.attributes["model_layers"])
        elif isinstance(asked, list) and -1 in asked:
            depth = self.layers[-1]
        else:
            raise Missing(
                f"{self.path} does not say how many layers its model has.",
                f"It has layers {', '.join(map(str, self.layers))}.",
            )
        return depth + 1 + number

    @cached_property
    def default(self) -> str | None:
        """The dataset that `/embeddings` is, such as mean/33; None if it is absent or nothing of the run's."""
        default = self._data.get("embeddings")
        names = [f"{kind}/{layer}" for kind in POOLED for layer in self.layers]
        return next((name for name in names if default is not None and self._data.get(name) == default), None)

    @property
    def residue_offsets(self) -> NDArray[np.int64]:
        """int64 [N + 1]; needs `--pool residue` or `--emit logits`. Raises UserError if the file has none."""
        if "residue/offsets" not in self._data:
            reason = "It was made without --pool residue and --emit logits."
            raise Missing(f"{self.path} holds no rows of residues.", reason)
        return self.at("residue/offsets")[:]

    @property
    def groups(self) -> "Groups | None":
        """Rows of groups, see `Groups`; None for a file made without one of the --group options."""
        from virnucpro_cli.store.parts import Groups

        return Groups(self.at, self.texts, self.layer) if "groups/of" in self._data else None

    @cached_property
    def contact_maps(self) -> "ContactMaps | None":
        """All contact maps with their columns; None for a file made without `--emit contacts`."""
        from virnucpro_cli.store.parts import ContactMaps

        return ContactMaps(self.at) if self.holds("contacts/values") else None

    def half(self, name: str) -> "Half":
        """Rows of another model, such as `dna` of --nucleotide. Raises UserError if the file has none."""
        from virnucpro_cli.store.parts import Half

        if name not in self.settings:
            raise Missing(f"{self.path} holds no rows in /{name}.", "It was made without --nucleotide.")
        return Half(self, name, self.settings[name])

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Columns [N] that not every file has, by name: genes/contig, genes/begin, genes/end, genes/strand (integers),
        groups/of (int64).
        """
        return {name: self.at(name)[:] for name in self._parsed.get("columns", [])}

    @property
    def tables(self) -> dict[str, h5py.Dataset]:
        """Datasets of other things than records, by name: contigs/ids, contigs/lengths, groups/ids, groups/members."""
        return {name: self.at(name) for name in self._parsed.get("tables", [])}

    def kind_and_layer(self, kind: str | None = None, layer: int | None = None) -> tuple[str, int]:
        """Kind and layer of a dataset, by default of /embeddings. Raises UserError if the file has no such dataset."""
        if kind is None:
            if self.default is None:
                remedy = "Use residues(row), or to_torch('residue')."
                raise Missing(f"{self.path} holds rows of residues alone.", remedy)
            kind = self.default.partition("/")[0]
        number = self.layer(layer)
        if f"{kind}/{number}" not in self._data:
            there = {each: [str(n) for n in self.layers if f"{each}/{n}" in self._data] for each in KINDS}
            have = ", ".join(f"{each} ({', '.join(numbers)})" for each, numbers in there.items() if numbers)
            raise Missing(f"{self.path} has no {kind} of layer {number}.", f"It has these kinds and layers: {have}.")
        return kind, number

    def dataset(self, kind: str | None = None, layer: int | str | None = None) -> h5py.Dataset:
        """The h5py dataset of a kind and layer (default: the last requested); ("unmasked", "entropy") gives a score.

        Negative layers are as with --layers. Raises UserError if there is no such dataset.
        """
        if isinstance(layer, str):
            return self.at(f"{kind}/{layer}")
        if kind is None and layer is None and "embeddings" in self._data:
            return self.at("embeddings")
        return self.at("{}/{}".format(*self.kind_and_layer(kind, layer)))

    def rows_at(self, name: str, first: int, count: int) -> NDArray[Any]:
        """A row of a dataset and those behind it, [count, D] in its dtype. HDF5 is passed by: threads wait for none.

        Raises UserError if the file was cut short.
        """
        data = self._data[name]
        rows = np.empty((count, *data.shape[1:]), data.dtype)
        view, offset = rows.view(np.uint8).reshape(-1).data, self._extent(name)[0]
        with reading(self.path):
            offset += first * (rows.nbytes // max(count, 1))
            if disk.pread_all(self._file.id.get_vfd_handle(), view, offset) < len(view):
                raise damaged(self.path, f"{name} ends early")
        return rows

    def array(self, kind: str | None = None, layer: int | None = None) -> NDArray[Any]:
        """A dataset (see `dataset`) as a read-only memory map, float16 or float32: [N, D], or [sum L, D] of residues.

        Nothing is copied, and it stays good when the file is closed, or another takes its name. Raises UserError if
        there is no such dataset, or the file was cut since.
        """
        return self.mapped(self.dataset(kind, layer))

    def mapped(self, data: h5py.Dataset) -> NDArray[Any]:
        """A dataset of the file, [n, D], as a read-only memory map in its dtype; see `array`."""
        offset = data.id.get_offset()
        if offset is None:  # it is empty
            return data[:]
        with (
            damage_named(self.path, (OSError, ValueError)),
            os.fdopen(os.dup(self._file.id.get_vfd_handle()), "rb") as file,
        ):
            return np.memmap(file, data.dtype, "r", offset, data.shape)

    def to_torch(self, kind: str | None = None, layer: int | None = None) -> "Rows":
        """A `torch.utils.data.Dataset` of (row, record number) of each record that is done; skipped ones are left out.

        A row is [D], or [L, D] of residues, in the dtype of the file. A worker opens the file again, and refuses
        another that has its name by then. Raises UserError if there is no such dataset.
        """
        from virnucpro_cli.store.tensors import Rows

        kind, layer = self.kind_and_layer("residue" if kind is None and self.default is None else kind, layer)
        offsets = self.residue_offsets if kind == "residue" else None
        again = _to_torch, (str(self.path), self.identity, kind, layer)
        return Rows(np.flatnonzero(self.status == DONE), self.array(kind, layer), offsets, again)

    def to_pandas(self, kind: str | None = None, layer: int | None = None) -> "pandas.DataFrame":
        """A data frame in float32: name (the index, not made unique), length, status, and a column for each dimension.

        Dimensions are "0", "1" ... For residues they are the only columns, and the index is (name, position), from 1.
        Needs the extra frames.
        """
        from virnucpro_cli.store import frames

        return frames.to_pandas(*self._labelled(kind, layer))

    def to_polars(self, kind: str | None = None, layer: int | None = None) -> "polars.DataFrame":
        """A data frame: name, length, status, embedding (an array of D); for residues name, position, embedding."""
        from virnucpro_cli.store import frames

        return frames.to_polars(*self._labelled(kind, layer))

    def to_anndata(self, kind: str | None = None, layer: int | None = None) -> "anndata.AnnData":
        """X float32 [N, D]; obs has name, length and status, and the names made unique as index; uns has the model."""
        from virnucpro_cli.store import frames

        labels, values = self._labelled(kind, layer)
        if "position" in labels:
            raise UserError("An AnnData has a row for each protein, not for each residue.", "Use to_pandas('residue').")
        keys = ("model", "weights_sha256", "dtype", "tool_version")
        return frames.to_anndata(labels, values, {key: str(self.attributes[key]) for key in keys})

    def _labelled(self, kind: str | None, layer: int | None) -> tuple[dict[str, Any], NDArray[Any]]:
        """Names, lengths and statuses, or names and positions, and the rows that they belong to."""
        kind, layer = self.kind_and_layer(kind, layer)
        if kind != "residue":
            status = np.array(STATUS_NAMES)[self.status].tolist()
            return {"name": self.names, "length": self.lengths, "status": status}, self.array(kind, layer)
        offsets = self.residue_offsets
        sizes = np.diff(offsets)
        positions = np.arange(1, offsets[-1] + 1) - np.repeat(offsets[:-1], sizes)
        return {"name": np.repeat(np.array(self.names, object), sizes), "position": positions}, self.array(kind, layer)

    def chunks(self, kind: str) -> Iterator[slice]:
        """All records, in chunks of about 64 MB of rows of that kind in fp32 (or a single record)."""
        rows = max(1, min(NAME_BLOCK, CHUNK_BYTES // (4 * self.dataset(kind, self.layers[0]).shape[1])))
        offsets = self.residue_offsets if kind == "residue" else np.arange(len(self) + 1)
        return (slice(*each) for each in chunks(offsets, len(self), rows))

    def __getitem__(self, key: int | slice | str | list[int] | NDArray[Any]) -> NDArray[Any]:
        if isinstance(key, str | int | np.integer):
            return self.dataset()[self._row(key)]
        if isinstance(key, list | np.ndarray) and np.asarray(key).dtype != np.bool_:
            distinct, back = np.unique(np.asarray(key), return_inverse=True)  # as h5py wants them
            return self.dataset()[distinct][back]
        return self.dataset()[key]

    def __iter__(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(name, row) of every record, in order."""
        for rows in blocks(len(self)):
            yield from zip(self.names_of(rows.start, rows.stop), self.dataset()[rows], strict=True)

    def logits(self, key: int | str) -> NDArray[Any]:
        """Logits of a record's residues, float16 or float32 [L, V] for V tokens; empty if it was skipped.

        Raises UserError for a file made without `--emit logits`.
        """
        return self._of_residues("unmasked", "logits", key)

    def contacts(self, key: int | str) -> NDArray[Any]:
        """Probabilities of contact of a record's residues, float16 or float32 [L, L]; empty if it has none.

        Raises UserError for a file made without `--emit contacts`.
        """
        maps = self.contact_maps
        if maps is None:
            raise Missing(f"{self.path} holds no contacts: it was made without --emit contacts.")
        return maps.of(self._row(key))

    def residues(self, key: int | str, layer: int | None = None) -> NDArray[Any]:
        """Rows of a record's residues, float16 or float32 [L, D]; empty if it was skipped.

        Raises UserError for a file made without `--pool residue`.
        """
        return self._of_residues("residue", layer, key)

    def _of_residues(self, kind: str, layer: int | str | None, key: int | str) -> NDArray[Any]:
        data, row = self.dataset(kind, layer), self._row(key)
        first, last = self.at("residue/offsets")[row : row + 2]
        return data[first:last]


def _check_there(path: Path, named: str | Path) -> None:
    """Raise UserError if there is no such file; a run that has not finished it is named."""
    if os.path.lexists(path):
        return
    begun = disk.partial_path(path)
    if not begun.is_file():
        raise UserError(f"There is no file {named}.", checked.NAME_ANOTHER)
    with EmbeddingFile(begun) as file:
        remedy = "Repeat the embed command, which goes on; or name that file."
        raise UserError(f"{named} is {unfinished(file)}.", remedy)


def unfinished(file: EmbeddingFile) -> str:
    """Words for how far a partial file is."""
    halves = [file.half(name).status for name in schema.HALVES if name in file.settings]
    done = int(np.logical_and.reduce([status != PENDING for status in (file.status, *halves)]).sum())
    return f"unfinished: {done:,} of {counted(len(file), file.words[0])} in {file.path.name}"


def _reopened(path: str, identity: str) -> EmbeddingFile:
    """The file that was pickled. Raises UserError if another has its name now."""
    file = EmbeddingFile(path)
    if file.identity != identity:
        file.close()
        raise UserError(f"{path} is another file than the one that was opened.", "Open it again, and send that.")
    return file


def _to_torch(path: str, identity: str, kind: str, layer: int) -> "Rows":
    with _reopened(path, identity) as file:
        return file.to_torch(kind, layer)


def read_embeddings(path: str | Path) -> EmbeddingFile:
    """Open an embeddings file. No torch needed."""
    return EmbeddingFile(path)


def opened(path: str | Path) -> EmbeddingFile:
    """The file at `path` for a command, with all that its fingerprint promises. Raises UserError if it is none."""
    return opened_all([path])[0]


def opened_all(paths: Sequence[str | Path]) -> list[EmbeddingFile]:
    """The files at `paths`, each as `opened` gives it. Raises UserError for the first that is none."""
    _try_in_children([Path(path).absolute() for path in paths], cores())
    files: list[EmbeddingFile] = []
    try:
        for path in paths:
            files.append(EmbeddingFile(path))
            files[-1].settings  # noqa: B018  (it raises)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def fingerprint_tried(path: Path, remedy: str = AGAIN) -> tuple[dict[str, Any], bool] | None:
    """The same as `fingerprint_of`. Raises UserError, with the remedy, if the file is such that HDF5 is lost in it."""
    _try_in_children([path.absolute()], 1, remedy)
    return fingerprint_of(path)


def _try_in_children(paths: list[Path], children: int, remedy: str = AGAIN) -> None:
    """Raise UserError if HDF5 crashes or does not come back when it opens a file, as it may with a damaged one.

    A file that has not changed since it was tried is not tried again.
    """
    states = {path: disk.state_of(path) for path in paths}
    untried = [path for path in paths if states[path] not in _TRIED]
    shares = [share for first in range(children) if (share := untried[first::children])]
    pids = [_child_that_opens(share) for share in shares]
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    for share, status in zip(shares, ends, strict=True):
        if os.WIFSIGNALED(status) and (signum := os.WTERMSIG(status)) in LOST:
            if len(share) == 1:
                raise damaged(share[0], f"the HDF5 library {LOST[signum]} when it reads it", remedy)
            for path in share:
                _try_in_children([path], 1, remedy)
        elif status == 0:
            _TRIED.update(states[path] for path in share if states[path])


def _child_that_opens(paths: list[Path]) -> int:
    """The number of a process that opens files one after the other, and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            for each in (*LOST, *STOP_SIGNALS):
                signal.signal(each, signal.SIG_DFL)
            for path in paths:
                signal.alarm(OPENING_SECONDS + path.stat().st_size // OPENING_RATE)
                with suppress(Exception), EmbeddingFile(path) as file:
                    file.name_texts(0, min(NAME_BLOCK, len(file)))
        finally:
            os._exit(0)  # an error is told by the process that asks
    return pid
