"""The frames of an embeddings file and their scores. A frame is a record; a chunk is a contig's number and its own."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.errors import UserError
from virnucpro_cli.predict.head import BATCH, Head
from virnucpro_cli.store import EmbeddingFile

CALLER, KIND, HALF, HALF_KIND = "virnucpro", "mean", "dna", "mean-all"
REMEDY = "Make it with virnucpro predict, or with virnucpro embed --from contigs --genes virnucpro --nucleotide."
ROWS = 16 * BATCH
"""Rows of features that are read at once."""
_NAME = re.compile(r"_chunk_([1-9][0-9]{0,8})[FR][123]\Z")


class NoFile:
    """The embeddings file that there would be of contigs without any frame. ids: their names."""

    def __init__(self, path: Path, ids: list[str]):
        self.path, self.ids = path, ids
        self.checksum_of_the_run = hashlib.sha256("\n".join(ids).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return 0

    def at(self, name: str) -> list[str]:
        return self.ids

    def texts(self, name: str, start: int, stop: int) -> list[str]:
        return self.ids[start:stop]

    def names_of(self, start: int, stop: int) -> list[str]:
        return []

    def names_at(self, rows: NDArray[np.int64]) -> list[str]:
        return []

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class Frames:
    """The N frames of a file. protein, dna: float16 or float32 [N, D] and [N, E], mapped; contig: int64 [N].

    done: bool [N], whether both halves have a row; chunk: bases of a chunk.
    """

    file: EmbeddingFile | NoFile
    protein: NDArray[Any] = field(repr=False)
    dna: NDArray[Any] = field(repr=False)
    contig: NDArray[np.int64] = field(repr=False)
    done: NDArray[np.bool_] = field(repr=False)
    chunk: int

    @property
    def features(self) -> int:
        return int(self.dna.shape[1] + self.protein.shape[1])

    @property
    def contigs(self) -> int:
        """How many contigs there are, with and without frames."""
        return len(self.file.at("contigs/ids"))

    def names(self) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
        """Numbers of the frames that are done, int64 [m], and their names, block by block in order."""
        for block in store.blocks(len(self.done), store.NAME_BLOCK):
            rows = np.flatnonzero(self.done[block])
            names = self.file.names_of(block.start, block.stop)
            yield rows + block.start, [names[row] for row in rows.tolist()]


def none_of(path: Path, ids: list[str], head: Head, chunk: int) -> Frames:
    """No frame of contigs of these names, of the features that a head takes."""
    protein, dna = np.empty((0, head.features), np.float32), np.empty((0, 0), np.float32)
    return Frames(NoFile(path, ids), protein, dna, np.empty(0, np.int64), np.empty(0, np.bool_), chunk)


def opened(path: str | Path) -> Frames:
    """The frames of a file. Raises UserError if it is unfinished, or lacks what VirNucPro takes."""
    file = store.opened(path)
    try:
        if not file.complete:
            raise UserError(f"{path} is not complete.", "Finish it by the command that began it.")
        caller = json.loads(str(file.attributes.get("gene_caller", "{}")))
        if not isinstance(caller, dict) or caller.get("name") != CALLER or "chunk" not in caller:
            raise UserError(f"{path} is not of VirNucPro's frames.", REMEDY)
        if HALF not in file.settings:
            raise UserError(f"{path} has no nucleotide half.", REMEDY)
        half = file.half(HALF)
        dna_name = next((name for name in reversed(half.names) if name.startswith(f"{HALF_KIND}/")), None)
        if KIND not in file.settings["pool"] or dna_name is None:
            raise UserError(f"{path} lacks {KIND} or {HALF}/{HALF_KIND}, which VirNucPro takes.", REMEDY)
        if file.records is not None:
            raise UserError(f"{path} is a shard.", "Merge the shards first: virnucpro merge.")
        done = (file.status == store.DONE) & (half.status == store.DONE)
        protein, dna = file.array(KIND), half.array(dna_name)
        return Frames(file, protein, dna, file.columns["genes/contig"], done, int(caller["chunk"]))
    except BaseException:
        file.close()
        raise


@dataclass(frozen=True)
class Scored:
    """The n frames that have scores, in order. rows, contig: int64 [n]; chunk: int64 [n], numbers from 1.

    scores: float32 [n, 2], others and virus.
    """

    frames: Frames
    rows: NDArray[np.int64]
    contig: NDArray[np.int64]
    chunk: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def is_virus(self) -> NDArray[np.bool_]:
        """Whether a frame is called virus: equal scores are others. bool [n]."""
        return self.scores[:, 1] > self.scores[:, 0]

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """Where the frames of each chunk begin among the n, int64 [C]."""
        changed = (np.diff(self.contig) != 0) | (np.diff(self.chunk) != 0)
        return np.flatnonzero(np.append(len(self.rows) > 0, changed))

    @cached_property
    def highest(self) -> NDArray[np.float32]:
        """The highest score of others and of virus in each chunk, float32 [C, 2]."""
        if not len(self.first):
            return np.empty((0, 2), np.float32)
        return np.maximum.reduceat(self.scores, self.first, axis=0)

    @property
    def contig_of_chunk(self) -> NDArray[np.int64]:
        return self.contig[self.first]


def chunk_is_virus(highest: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether chunks are called virus, by their highest scores float32 [C, 2]; equal ones are. bool [C]."""
    return highest[:, 1] >= highest[:, 0]


def scored(frames: Frames, head: Head, advance: Callable[[int], None] = lambda rows: None) -> Scored:
    """Score every frame that has both halves. Raises UserError for a head of other features, or odd names."""
    if head.features != frames.features:
        widths = f"{frames.dna.shape[1]:,} + {frames.protein.shape[1]:,} features"
        refusal = f"{head.place} takes {head.features:,} features, and {frames.file.path} has {widths}."
        raise UserError(refusal, "Take the models that the head was trained with.")
    rows = np.flatnonzero(frames.done)
    scores, number = np.empty((len(rows), 2), np.float32), np.empty(len(rows), np.int64)
    for block in store.blocks(len(rows), ROWS):
        part = rows[block]
        features = np.concatenate([frames.dna[part], frames.protein[part]], axis=1, dtype=np.float32)
        scores[block] = head.scores(features)
        advance(len(part))
    at = 0
    for some, names in frames.names():
        number[at : at + len(some)] = [chunk_in(name) for name in names]
        at += len(some)
    found = Scored(frames, rows, frames.contig[rows], number, scores)
    same = np.diff(found.contig) == 0
    if (np.diff(found.contig) < 0).any() or (same & (np.diff(number) < 0)).any():
        raise UserError(f"{frames.file.path} does not have its frames in the order of the contigs.", REMEDY)
    return found


def chunk_in(name: str) -> int:
    """The number of the chunk in a frame's name. Raises UserError."""
    match = _NAME.search(name)
    if match is None:
        raise UserError(f"{name!r} is no name of a frame: CONTIG_chunk_1F1.", REMEDY)
    return int(match[1])
