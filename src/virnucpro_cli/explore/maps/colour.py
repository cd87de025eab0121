"""The colour of a map's points: numbers on a scale, or classes with a colour and a shape each."""

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
    """values [n], None where there is none. The most frequent MOST_CLASSES are shown, each by itself."""

    title: str
    values: list[str | None]

    def words(self) -> list[str]:
        return [NO_VALUE if value is None else value for value in self.values]

    @property
    def parts(self) -> list[tuple[str, NDArray[np.int64], int]]:
        """Label with its count, points (int64 [m]) and rank by frequency of each class.

        The others are of rank -2, points without a value of rank -1: they come first, and lie below.
        """
        counts = Counter(value for value in self.values if value is not None)
        shown = sorted(counts, key=lambda value: (-counts[value], value))[:MOST_CLASSES]
        rank_of: dict[str | None, int] = {None: -1, **{value: rank for rank, value in enumerate(shown)}}
        points: list[list[int]] = [[] for _ in range(-2, len(shown))]
        for i, value in enumerate(self.values):
            points[rank_of.get(value, -2) + 2].append(i)
        labels = enumerate([f"{len(counts) - len(shown):,} others", NO_VALUE, *shown], start=-2)
        parts = zip(labels, points, strict=True)
        return [(f"{label} ({len(members):,})", np.array(members), rank) for (rank, label), members in parts if members]


Colour = Scale | Classes


def of(what: str, file: store.EmbeddingFile, rows: NDArray[np.int64]) -> Colour:
    """The colour of rows (int64 [n]): `length`, `status`, `group` or FILE.tsv:column. Raises UserError for others."""
    if what == "length":
        return Scale(LENGTH, file.lengths[rows].astype(np.float64), logarithmic=True)
    if what == "status":
        flags = file.flags[rows].tolist()
        named = {bits: ", ".join(name for bit, name in store.FLAG_NAMES.items() if bits & bit) for bits in set(flags)}
        return Classes("status", [named[bits] or "done" for bits in flags])
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


def _column(path: str, column: str, names: list[str]) -> Colour:
    """Numbers are a scale, unless they are whole and of at most MOST_CLASSES kinds, as cluster numbers are."""
    lines, wanted = tables.Lines(path), set(names)
    rows = tables.rows(lines)
    header = next(rows, [])
    if column not in header[1:]:
        known = f"Its columns after the name: {', '.join(header[1:])}." if header[1:] else "It has no columns."
        raise UserError(f"{path} has no column {column!r}; names are in its first.", known)
    place = header.index(column, 1)
    value_of = tables.by_name(lines, ((row[0], row[place]) for row in rows if row[0] in wanted), column)
    values = [value_of.get(name, "").strip() or None for name in names]
    kinds = set(values) - {None}
    if not kinds:
        raise UserError(
            f"{path} has no {column} for any protein of the map, such as {tables.cell(names[0])}.",
            "Its first column must hold the names as they are in the embeddings file.",
        )
    try:
        numbers = np.array([np.nan if value is None else float(value) for value in values])
    except ValueError:
        return Classes(column, [None if value is None else tables.cell(value) for value in values])
    numbers[~np.isfinite(numbers)] = np.nan
    known_numbers = numbers[np.isfinite(numbers)]
    if (known_numbers == np.round(known_numbers)).all() and (len(kinds) <= MOST_CLASSES or not len(known_numbers)):
        return Classes(column, values)
    return Scale(column, numbers)
