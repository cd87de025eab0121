"""Another program's prediction_results.txt beside ours: agreement, every changed call, and what one of them lacks.

Frames are joined by name, since the other file has nothing else. Chunks and contigs are compared by the frames that
both files have. What is of our run is here, what is of the other file is there. Frames and chunks are virus or others;
contigs have the calls of their own table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli import tables
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.predict import contigs
from virnucpro_cli.predict.frames import Scored, chunk_is_virus
from virnucpro_cli.predict.tables import HEADER_OF_FRAMES, LABELS

COMPARED = "compare.tsv"
COLUMNS = ("level", "name", "here", "there", "score1_here", "score2_here", "score1_there", "score2_there")
HEADER = HEADER_OF_FRAMES.decode().split()
MISSING = "missing"
SHOWN, BLOCK = 5, 1 << 16
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Other:
    """The m frames of another file, sorted by key. keys: uint64 [m, 2], hashes of their names; line: int64 [m].

    scores: float32 [m, 2].
    """

    path: str
    keys: NDArray[np.uint64] = field(repr=False)
    scores: NDArray[np.float32] = field(repr=False)
    line: NDArray[np.int64] = field(repr=False)


class Level(NamedTuple):
    """How many frames, chunks or contigs both files have, and of how many the call is the same."""

    name: str
    both: int
    same: int

    def __str__(self) -> str:
        share = f" ({self.same / self.both:.2%})" if self.both else ""
        return f"{self.same:,} of {counted(self.both, self.name)}{share}"


@dataclass
class Comparison:
    """The result of a comparison. largest: the largest difference of a score among frames of the same call.

    near: chunks whose highest scores differ by no more than twice that, so that such a difference could turn them.
    first: lines of the table, a few.
    """

    levels: list[Level]
    missing_here: int
    missing_there: int
    largest: float
    near: int
    first: list[Cells] = field(default_factory=list)

    def words(self) -> Iterator[str]:
        """The result in lines."""
        if self.levels[0].both == 0:
            yield "no frame is both here and there: are both files of the same contigs, by the same names?"
        yield "the same call here and there: " + ", ".join(map(str, self.levels))
        yield (
            f"scores of frames with the same call differ by {self.largest:.2g} at most; "
            f"{counted(self.near, 'chunk')} so near a tie that this could turn them"
        )
        if self.missing_here or self.missing_there:
            yield f"frames missing here: {self.missing_here:,}, missing there: {self.missing_there:,}"
        for level, name, here, there, *scores in self.first:
            ours, theirs = (", ".join(filter(None, pair)) for pair in (scores[:2], scores[2:]))
            yield f"  {level} {name}: {here} here ({ours}), {there} there ({theirs})"

    def as_numbers(self) -> dict[str, Any]:
        """The result for a report."""
        counts: dict[str, Any] = {f"{level.name}s with the same call": level.same for level in self.levels}
        counts |= {f"{level.name}s compared": level.both for level in self.levels}
        return counts | {
            "frames missing here": self.missing_here, "frames missing there": self.missing_there,
            "chunks near a tie": self.near,
        }  # fmt: skip


def is_free(path: Path) -> bool:
    """Whether a comparison may be written there: nothing is there, or an earlier one."""
    return not path.exists() or tables.is_of(path, COLUMNS)


def keys_of(names: list[str]) -> NDArray[np.uint64]:
    """Hashes of 128 bits of names as they stand in tables, uint64 [n, 2]."""
    data = b"".join(xxhash.xxh3_128_digest(tables.cell(name).encode()) for name in names)
    return np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2)


def read(path: str) -> Other:
    """The frames of a prediction_results.txt, of VirNucPro or of another program that writes the same.

    Raises UserError for another table, a score that is none, and a name that stands twice.
    """
    lines = tables.Lines(path)
    rows = (line.rstrip("\r\n").split("\t") for line in lines)
    header = next(rows, [])
    if header != HEADER:
        found = ", ".join(header)[:80] or "nothing"
        raise UserError(f"{path} is no prediction_results.txt: its columns are {found}.", f"Give {', '.join(HEADER)}.")
    keys, scores, numbers = [], [], []
    while some := [(lines.number, row) for row in islice(rows, BLOCK) if row != [""]]:
        for number, row in some:
            if len(row) != len(HEADER):
                refusal = f"{path} line {number:,} has {counted(len(row), 'column')}, not {len(HEADER)}."
                raise UserError(refusal, "Is the file whole?")
        keys.append(keys_of([row[0] for _, row in some]))
        numbers.append(np.array([number for number, _ in some]))
        try:
            values = np.array([row[2:] for _, row in some], np.float64).astype(np.float32)
        except ValueError as error:
            raise UserError(f"{path} has a score that is no number near line {some[-1][0]:,}: {error}.") from None
        _check(path, some, values)
        scores.append(values)
    if not keys:
        return Other(path, np.empty((0, 2), np.uint64), np.empty((0, 2), np.float32), np.empty(0, np.int64))
    every = np.concatenate(keys)
    order = np.lexsort((every[:, 1], every[:, 0]))
    other = Other(path, every[order], np.concatenate(scores)[order], np.concatenate(numbers)[order])
    alike = np.flatnonzero((np.diff(other.keys.astype(np.uint64), axis=0) == 0).all(axis=1))
    if len(alike):
        first, second = sorted(other.line[alike[0] : alike[0] + 2].tolist())
        raise UserError(
            f"{path} has the same name in lines {first:,} and {second:,}: frames are joined by name.",
            "Give each contig a name of its own, and predict again.",
        )
    return other


def _check(path: str, rows: list[tuple[int, list[str]]], scores: NDArray[np.float32]) -> None:
    """Raise UserError for scores float32 [n, 2] that are no probabilities, or not those of the call beside them.

    rows: numbers of lines, and their cells.
    """
    is_virus = np.array([row[1] == LABELS[1] for _, row in rows])
    others, virus = scores.T
    for wrong, what in (
        (np.array([row[1] not in LABELS for _, row in rows]), f"a call that is not {' or '.join(LABELS)}"),
        (~((scores >= 0) & (scores <= 1)).all(axis=1), "a score that is not from 0 to 1"),
        (np.where(is_virus, virus < others, virus > others), "a call that its scores contradict"),
    ):
        if wrong.any():
            number, row = rows[int(wrong.argmax())]
            raise UserError(f"{path} line {number:,} has {what}: {' '.join(row[1:])[:80]}.", "Is it as it was written?")


def _places(other: Other, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where in the other file each key is, int64 [n]; -1 where it is not. keys: uint64 [n, 2]."""
    pairs = np.dtype([("high", np.uint64), ("low", np.uint64)])
    there = np.ascontiguousarray(other.keys).view(pairs).reshape(-1)
    wanted = np.ascontiguousarray(keys).view(pairs).reshape(-1)
    at = np.searchsorted(there["high"], wanted["high"])
    if not len(there):
        return np.full(len(keys), -1)
    at = np.minimum(at, len(there) - 1)
    for _ in range(2):  # two names with the same first half are one in 10^5 files of 10^7 names
        on = (there["high"][at] == wanted["high"]) & (there["low"][at] != wanted["low"])
        at = np.minimum(at + on, len(there) - 1)
    return np.where(there[at] == wanted, at, -1)


def compared(scored: Scored, other: Other, file: IO[bytes]) -> Comparison:
    """Compare, and write a line for each changed call and each frame that one of them lacks."""
    at = np.concatenate([np.empty(0, np.int64), *(_places(other, keys_of(n)) for _, n in scored.frames.names() if n)])
    both = np.flatnonzero(at >= 0)
    here = Scored(scored.frames, scored.rows[both], scored.contig[both], scored.chunk[both], scored.scores[both])
    there = replace(here, scores=other.scores[at[both]])
    same = here.is_virus == there.is_virus
    largest = float(np.abs(here.scores - there.scores)[same].max(initial=0.0))
    gap = np.abs(np.diff(here.highest.astype(np.float64), axis=1))
    found = Comparison([], len(other.line) - len(both), len(at) - len(both), largest, int((gap <= 2 * largest).sum()))
    with tables.written_to(file) as table:
        table.writerow(COLUMNS)
        for name, level in (("frame", _frames), ("chunk", _chunks), ("contig", _contigs)):
            changed, (count, lines) = 0, level(here, there)
            for of, *cells in lines:
                changed += 1
                line = (name, tables.cell(of), *cells)
                table.writerow(line)
                found.first += [line] * (changed <= SHOWN)
            found.levels.append(Level(name, count, count - changed))
        for name in _names_at(scored, np.flatnonzero(at < 0)):
            table.writerow(("frame", tables.cell(name), "", MISSING, "", "", "", ""))
        for name in _names_missing_here(other, at[both]):
            table.writerow(("frame", tables.cell(name), MISSING, "", "", "", "", ""))
    return found


def _labels(is_virus: NDArray[np.bool_]) -> Iterator[str]:
    """Calls of both files, bool [2], in words."""
    return (LABELS[each] for each in is_virus.tolist())


def _cells(*scores: NDArray[np.float32]) -> Iterator[str]:
    """Scores of both files, float32 [2] each, as text."""
    return (str(each) for pair in scores for each in pair)


def _frames(here: Scored, there: Scored) -> tuple[int, Iterator[Cells]]:
    """How many frames are compared, and those whose call changed."""
    calls = np.stack([here.is_virus, there.is_virus], axis=1)
    places = np.flatnonzero(calls[:, 0] != calls[:, 1])
    lines = (
        (name, *_labels(calls[i]), *_cells(here.scores[i], there.scores[i]))
        for i, name in zip(places.tolist(), _names_at(here, places), strict=True)
    )
    return len(here.rows), lines


def _chunks(here: Scored, there: Scored) -> tuple[int, Iterator[Cells]]:
    """How many chunks are compared, and those whose call changed, with their highest scores."""
    calls = np.stack([chunk_is_virus(here.highest), chunk_is_virus(there.highest)], axis=1)
    places = np.flatnonzero(calls[:, 0] != calls[:, 1])
    lines = (
        (name[:-2], *_labels(calls[i]), *_cells(here.highest[i], there.highest[i]))
        for i, name in zip(places.tolist(), _names_at(here, here.first[places]), strict=True)
    )
    return len(here.first), lines


def _contigs(ours: Scored, theirs: Scored) -> tuple[int, Iterator[Cells]]:
    """How many contigs are compared, and those whose call changed, with their weighted deltas as score2."""
    frames = ours.frames
    here, there = (contigs.calls_of(each.contig_of_chunk, each.highest, frames.contigs) for each in (ours, theirs))
    lines = (
        (frames.file.texts("contigs/ids", i, i + 1)[0], contigs.CALLS[here.call[i]], contigs.CALLS[there.call[i]],
         "", f"{here.delta[i]:.3f}", "", f"{there.delta[i]:.3f}")
        for i in np.flatnonzero(here.call != there.call).tolist()
    )  # fmt: skip
    return int((here.counts[:, 0] > 0).sum()), lines


def _names_at(scored: Scored, places: NDArray[np.int64]) -> Iterator[str]:
    """Names of scored frames, by their places, int64 [n] in rising order."""
    for first in range(0, len(places), BLOCK):
        yield from scored.frames.file.names_at(scored.rows[places[first : first + BLOCK]])


def _names_missing_here(other: Other, there: NDArray[np.int64]) -> Iterator[str]:
    """Names of the other file that are not here. there: int64 [b], places of those that are."""
    is_missing = np.ones(len(other.line), np.bool_)
    is_missing[there] = False
    if not is_missing.any():
        return
    wanted = np.zeros(int(other.line.max()) + 2, np.bool_)
    wanted[other.line[is_missing]] = True
    lines = tables.Lines(other.path)
    yield from (text.partition("\t")[0] for text in lines if wanted[min(lines.number, len(wanted) - 1)])
