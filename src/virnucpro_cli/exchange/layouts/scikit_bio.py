"""scikit-bio's `embed` format: embeddings one behind the other in one HDF5 dataset, each known by its sequence."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.alphabet import MASK_TEXT, without_stop
from virnucpro_cli.errors import UserError
from virnucpro_cli.exchange.layouts import hdf5
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.store import DONE, opened_hdf5

MOST = np.iinfo(np.int32).max


def key_of(sequence: bytes) -> str:
    """A letter for each residue that is embedded: upper case, without a stop at the end, X for `<mask>`."""
    return without_stop(sequence).upper().replace(MASK_TEXT.upper(), b"X").decode("latin-1")


def write(selection: Selection, target: Path) -> None:
    """Every sequence has an end in `idptr`, and one in `embedding_ptr` (as for scikit-bio's ProteinVector)."""
    lengths = selection.file.lengths[selection.file.status == DONE]
    n, letters = len(lengths), int(lengths.sum(dtype=np.int64))
    residues = selection.what[0] == "residue"
    if letters > MOST:
        raise UserError(f"scikit-bio's layout ends at {MOST:,} residues, and here are {letters:,}.", "Export parts.")
    with hdf5.created(target, selection) as sink:
        file = sink.file
        file.attrs["format"], file.attrs["format-version"] = "embedding", "1.0"
        file.attrs["dtype"], file.attrs["dim"] = "float32", selection.width
        data = file.create_dataset("embedding", (selection.rows(skipped=False), selection.width), np.float32)
        ids = file.create_dataset("id", (letters,), np.uint8, maxshape=(None,))
        ends = file.create_dataset("idptr", (n,), np.int32)
        rows_end = file.create_dataset("embedding_ptr", (n,), np.int32)
        record = letter = row = 0
        for block in sink.each(selection.blocks()):
            text = [key.encode("latin-1") for key in block.keys]
            if residues:  # of a protein that was cut, what its rows are of
                text = [key[:size] for key, size in zip(text, block.sizes.tolist(), strict=True)]
            values, joined = block.rows[selection.what], np.frombuffer(b"".join(text), np.uint8)
            stop = record + len(text)
            data[row : row + len(values)] = values
            ids[letter : letter + len(joined)] = joined
            ends[record:stop] = letter + np.cumsum([len(key) for key in text])
            rows_end[record:stop] = row + np.cumsum(block.sizes)
            record, letter, row = stop, letter + len(joined), row + len(values)
        ids.resize((letter,))


def read(path: Path) -> Iterator[Entry]:
    """scikit-bio's own writer (0.7) leaves out the last ends, which are those of the datasets."""
    with opened_hdf5(path) as file:
        there = dict(hdf5.datasets(file))
        ids, data = there["id"], there["embedding"]
        kind = hdf5.provenance(path).get("kind") or ("residue" if len(data) == len(ids) else "mean")
        ends = _complete(there["idptr"][:], len(ids))
        rows_end = _complete(there["embedding_ptr"][:], len(data)) if "embedding_ptr" in there else ends
        if len(rows_end) != len(ends):
            raise ValueError("idptr and embedding_ptr are of different lengths")
        letter = row = 0
        for number, (end, row_end) in enumerate(zip(ends.tolist(), rows_end.tolist(), strict=True), start=1):
            sequence, rows = ids[letter:end].tobytes().decode("latin-1"), data[row:row_end]
            yield Entry(str(number), {(kind, None): rows if kind == "residue" else rows[0]}, sequence, len(sequence))
            letter, row = end, row_end


def _complete(ends: NDArray[np.int32], last: int) -> NDArray[np.int64]:
    lacking = [last] if not len(ends) or ends[-1] < last else []
    return np.append(ends, lacking).astype(np.int64)


LAYOUT = Format(
    "scikit-bio", "scikit-bio's embed format, HDF5", ".skbio.h5", write, read, hdf5.has("embedding", "id", "idptr"),
    KINDS, hdf5.provenance, key_of=key_of,
)  # fmt: skip
