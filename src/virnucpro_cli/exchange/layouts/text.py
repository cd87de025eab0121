"""Plain tables, comma- or tab-separated: a line for each protein, with a column for each dimension at the end."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection, entry_of

COLUMNS = ("id", "length", "status", "reason", "flags", "kind", "layer")


def write(dialect: str, selection: Selection, target: Path) -> None:
    """Numbers are the shortest that give the same fp32 again; a skipped protein has none."""
    kind, layer = selection.what
    with open(target, "w", newline="", encoding="utf-8") as text:
        table = csv.writer(text, dialect, lineterminator="\n")
        table.writerow((*COLUMNS, *range(selection.width)))
        for block in selection.blocks(skipped=True):
            values = block.rows[kind, layer].astype(np.float32)
            words = values.astype(str)
            words[np.isnan(values)] = ""
            for number, name, row in zip(block.numbers.tolist(), block.names, words.tolist(), strict=True):
                table.writerow((name, *selection.facts(number), kind, layer, *row))


def read(dialect: str, path: Path) -> Iterator[Entry]:
    """Needs the column id, and 0, 1, 2 ... behind each other; the others are taken where they are.

    Raises ValueError, which names the line, for what cannot be read.
    """
    with open(path, newline="", encoding="utf-8-sig") as text:
        table = csv.reader(text, dialect, strict=True)
        header = next(table, [])
        first = header.index("0") if "0" in header and "id" in header else -1
        if first < 0 or header[first:] != [str(i) for i in range(len(header) - first)]:
            raise ValueError("its first line does not name a column id, and at the end columns 0, 1, 2 ...")
        for line in table:
            if len(line) != len(header):
                raise ValueError(f"line {table.line_num} has {len(line)} columns, and the first line {len(header)}")
            words = line[first:] if any(line[first:]) else ["nan"] * len(line[first:])
            try:
                entry = entry_of(dict(zip(header[:first], line, strict=False)), np.array(words, np.float32))
            except ValueError as error:
                raise ValueError(f"line {table.line_num}: {error}") from None
            yield entry


def recognises(dialect: str, path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        line = file.readline(1 << 16).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    return {b"id", b"0"} <= set(line.split(csv.get_dialect(dialect).delimiter.encode()))


LAYOUTS = [
    Format(name, f"a {separator}-separated table", f".{name}", partial(write, dialect), partial(read, dialect),
           partial(recognises, dialect), holds_skipped=True)
    for name, separator, dialect in (("csv", "comma", "excel"), ("tsv", "tab", "excel-tab"))
]  # fmt: skip
