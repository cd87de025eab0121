"""What the points of a map are coloured by: numbers on a scale, or classes with a colour and a shape each."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store, tables
from virnucpro_cli.errors import UserError
from virnucpro_cli.report import amount

MOST_CLASSES = 20
NO_VALUE = "no value"
LENGTH = "length (residues)"


@dataclass(frozen=True)
class Scale:
    """values: float64 [n], NaN where there is none; logarithmic: whether equal ratios are equal steps."""

    title: str
    values: NDArray[np.float64]
    logarithmic: bool = False

    def words(self) -> list[str]:
        return [NO_VALUE if value != value else amount(value) for value in self.values.tolist()]


@dataclass(frozen=True)
class Classes:
    """values [n], None where there is none; names: those shown, the most frequent first, at most MOST_CLASSES."""

    title: str
    values: list[str | None]

    @property
    def parts(self) -> list[tuple[str, NDArray[np.int64], bool]]:
        """(label with its count, points, whether it is a class of its own), those that are none first: they lie below."""
        counts = Counter(value for value in self.values if value is not None)
        shown = sorted(counts, key=lambda value: (-counts[value], value))[:MOST_CLASSES]
        places: dict[str | None, list[int]] = {}
        for i, value in enumerate(self.values):
            places.setdefault(value if value is None or value in shown else "", []).append(i)
        rest = [(f"{len(counts) - len(shown):,} others", places.get("", [])), (NO_VALUE, places.get(None, []))]
        parts = [(label, found, False) for label, found in rest if found]
        parts += [(value, places[value], True) for value in shown]
        return [(f"{label} ({len(found):,})", np.array(found), own) for label, found, own in parts]

    def words(self) -> list[str]:
        return [NO_VALUE if value is None else value for value in self.values]


Colour = Scale | Classes


def of(what: str, file: store.EmbeddingFile, rows: NDArray[np.int64]) -> Colour:
    """The colour of some rows by `length`, `status`, `group` or FILE.tsv:column. Raises UserError if there is no such thing."""
    if what == "length":
        return Scale(LENGTH, file.lengths[rows].astype(np.float64), logarithmic=True)
    if what == "status":
        return Classes("status", [_flags(int(flags)) for flags in file.flags[rows]])
    if what == "group":
        if file.groups is None:
            raise UserError(
                "--color is group, and the file has no groups.", "Choose length, status or FILE.tsv:column."
            )
        number, names = file.groups.of, file.groups.ids
        return Classes("group", [tables.cell(names[i]) if i >= 0 else None for i in number[rows].tolist()])
    path, separator, column = what.rpartition(":")
    if not separator:
        raise UserError(f"--color is {what!r}.", "Choose length, status, group or FILE.tsv:column.")
    return _column(path, column, file.names_at(rows))


def _flags(flags: int) -> str:
    return ", ".join(name for bit, name in store.FLAG_NAMES.items() if flags & bit) or "done"


def _column(path: str, column: str, names: list[str]) -> Colour:
    """Numbers are a scale, unless they are whole and of at most MOST_CLASSES kinds, as cluster numbers are."""
    lines, wanted = tables.Lines(path), set(names)
    rows = tables.rows(lines)
    header = next(rows, [])
    if column not in header[1:]:
        known = f"Its columns after the name: {', '.join(header[1:])}." if header[1:] else "It has no columns."
        raise UserError(f"{path} has no column {column!r}; names are in its first.", known)
    place = header.index(column, 1)
    found = tables.by_name(lines, ((row[0], row[place]) for row in rows if row[0] in wanted), column)
    values = [found.get(name, "").strip() or None for name in names]
    there = {value for value in values if value is not None}
    if not there:
        raise UserError(
            f"{path} has no {column} for any protein of the map, such as {tables.cell(names[0])}.",
            "Its first column must hold the names as they are in the embeddings file.",
        )
    try:
        numbers = np.array([np.nan if value is None else float(value) for value in values])
    except ValueError:
        return Classes(column, [None if value is None else tables.cell(value) for value in values])
    numbers[~np.isfinite(numbers)] = np.nan
    known = numbers[np.isfinite(numbers)]
    if len(known) == 0 or ((known == np.round(known)).all() and len(there) <= MOST_CLASSES):
        return Classes(column, values)
    return Scale(column, numbers)
