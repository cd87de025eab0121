"""Plain tables, comma- or tab-separated: a line for each protein, and behind what is known of it a column for each dimension."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection, entry_of, no_provenance
from virnucpro_cli.kinds import POOLED

COLUMNS = ("id", "length", "status", "reason", "flags", "kind", "layer")
DIALECTS = {"csv": "excel", "tsv": "excel-tab"}


def write(name: str, selection: Selection, target: Path) -> None:
    """Numbers are the shortest that give the same fp32 again; a skipped protein has none."""
    kind, layer = selection.what
    with open(target, "w", newline="", encoding="utf-8") as text:
        table = csv.writer(text, DIALECTS[name], lineterminator="\n")
        table.writerow((*COLUMNS, *range(selection.width)))
        for block in selection.blocks(skipped=True):
            values = block.rows[kind, layer].astype(np.float32)
            words = values.astype(str)
            words[np.isnan(values)] = ""
            for number, each, row in zip(block.numbers.tolist(), block.names, words.tolist(), strict=True):
                table.writerow((each, *selection.said(number), kind, layer, *row))


def read(name: str, path: Path) -> Iterator[Entry]:
    """Needs the column id, and 0, 1, 2 ... behind each other; the others are taken where they are. Raises ValueError with the line."""
    with open(path, newline="", encoding="utf-8-sig") as text:
        table = csv.reader(text, DIALECTS[name], strict=True)
        header = next(table, [])
        first = header.index("0") if "0" in header and "id" in header else -1
        if first < 0 or header[first:] != [str(i) for i in range(len(header) - first)]:
            raise ValueError("its first line does not name a column id, and at the end columns 0, 1, 2 ...")
        for line in table:
            if len(line) != len(header):
                raise ValueError(f"line {table.line_num} has {len(line)} columns, and the first line {len(header)}")
            try:
                entry = entry_of(dict(zip(header[:first], line, strict=False)), _numbers(line[first:]))
            except ValueError as error:
                raise ValueError(f"line {table.line_num}: {error}") from None
            yield entry


def _numbers(words: list[str]) -> NDArray[np.float32]:
    return np.array(words if any(words) else ["nan"] * len(words), np.float32)


def recognises(name: str, path: Path) -> bool:
    if not path.is_file():
        return False
    delimiter = csv.get_dialect(DIALECTS[name]).delimiter.encode()
    with open(path, "rb") as file:
        columns = file.readline(1 << 16).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(delimiter)
    return b"id" in columns and b"0" in columns


def _layout(name: str, what: str) -> Format:
    return Format(
        name, what, f".{name}", tuple(POOLED), partial(write, name), partial(read, name), no_provenance,
        partial(recognises, name), holds_skipped=True,
    )  # fmt: skip


CSV = _layout("csv", "a comma-separated table")
TSV = _layout("tsv", "a tab-separated table")
