"""A NumPy array in one file, and beside it a table that says which rows are whose."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from virnucpro_cli import tables
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection, begins, entry_of
from virnucpro_cli.kinds import KINDS

BESIDE = ".tsv"
COLUMNS = ("row", "rows", "id", "length", "status", "reason", "flags", "kind", "layer")


def write(selection: Selection, target: Path) -> None:
    """row: a protein's first, counted from 0; rows: how many, 1 if pooled; flags: bits as in embed's file."""
    kind, layer = selection.what
    shape = (selection.rows(skipped=True), selection.width)
    header = {"descr": selection.dtype.str, "fortran_order": False, "shape": shape}
    with open(target, "wb") as array, open(target.with_suffix(BESIDE), "w", newline="", encoding="utf-8") as text:
        np.lib.format.write_array_header_1_0(array, header)
        table = tables.writer(text)
        table.writerow(COLUMNS)
        row = 0
        for block in selection.blocks(skipped=True):
            block.rows[kind, layer].tofile(array)
            for number, name, size in zip(block.numbers.tolist(), block.names, block.sizes.tolist(), strict=True):
                table.writerow((row, size, name, *selection.facts(number), kind, layer))
                row += size


def read(path: Path) -> Iterator[Entry]:
    """Without the table, rows are named by their numbers."""
    array, beside = np.load(path, mmap_mode="r", allow_pickle=False), path.with_suffix(BESIDE)
    if array.ndim != 2 or array.dtype.kind != "f":
        is_not = f"an array of {array.dtype} of shape {array.shape}"
        raise ValueError(f"it is {is_not}, not [N, D] of floating-point numbers")
    if not beside.is_file():
        for number, values in enumerate(array):
            yield Entry(str(number), {("mean", None): values})
        return
    end = 0
    table = tables.rows(tables.Lines(str(beside)))
    header = next(table, [])
    if not {"row", "id"} <= set(header):
        raise ValueError(f"{beside} has no columns row and id")
    for line in (dict(zip(header, cells, strict=True)) for cells in table):
        row = int(line["row"])
        end = row + int(line.get("rows") or 1)
        if not 0 <= row <= end <= len(array):
            raise ValueError(f"{beside} speaks of row {row} of {line['id']!r}, and there are {len(array):,}")
        yield entry_of(line, array[row:end] if line.get("kind") == "residue" else array[row])
    if end != len(array):
        raise ValueError(f"{beside} ends at row {end:,}, and there are {len(array):,}")


LAYOUT = Format(
    "npy", "a NumPy array, and a table of its rows beside it", ".npy", write, read, begins(b"\x93NUMPY"), KINDS,
    holds_skipped=True, beside=BESIDE, is_beside=partial(tables.is_of, columns=COLUMNS),
)  # fmt: skip
