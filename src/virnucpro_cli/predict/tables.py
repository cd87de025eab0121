"""VirNucPro's two tables, in its own format or in that of virnucpro-broad, written block by block.

Both are tab-separated. Only the second one quotes: a name with a quotation mark, which is doubled.
"""

import heapq
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.predict.frames import Scored, chunk_is_virus
from virnucpro_cli.tables import cell

ORIGINAL = "original"
FRAMES, CHUNKS = "prediction_results.txt", "prediction_results_highestscore.csv"
HEADER_OF_FRAMES = b"Sequence_ID\tPrediction\tscore1\tscore2\n"
HEADERS_OF_CHUNKS = {
    "broad": b"Modified_ID\tIs_Virus\tmax_score_0\tmax_score_1\n",
    ORIGINAL: b"Modified_ID\tIs_Virus\n",
}
RUN = 1 << 20
"""Lines that are sorted at once; more are merged from files."""
LABELS = ("others", "virus")


def digits(scores: NDArray[np.float32], format: str) -> list[str]:
    """Scores float32 [n] as text: the shortest of a float32, or in broad's format that of the equal float64."""
    return [str(each) for each in scores] if format == ORIGINAL else [repr(each) for each in scores.tolist()]


def write_frames(file: IO[bytes], scored: Scored, format: str) -> None:
    """A line for each frame, in order: name, call, and the scores of others and of virus."""
    file.write(HEADER_OF_FRAMES)
    at = 0
    for rows, names in scored.frames.names():
        part = slice(at, at := at + len(rows))
        others, virus = (digits(scored.scores[part, column], format) for column in (0, 1))
        calls = [LABELS[each] for each in scored.is_virus[part].tolist()]
        lines = zip(names, calls, others, virus, strict=True)
        file.write("".join(f"{cell(name)}\t{call}\t{o}\t{v}\n" for name, call, o, v in lines).encode())


def write_chunks(file: IO[bytes], scored: Scored, format: str, folder: Path) -> None:
    """A line for each chunk: name, and whether it is a virus; in broad's format its highest scores, too.

    In the original's format lines are sorted by name as text. folder: for temporary files.
    """
    file.write(HEADERS_OF_CHUNKS[format])
    lines = (line for block in _chunk_lines(scored, format) for line in block)
    if format != ORIGINAL:
        file.writelines(text for _, text in lines)
        return
    with ExitStack() as stack:
        file.writelines(_sorted(lines, folder, stack))


def _chunk_lines(scored: Scored, format: str) -> Iterator[list[tuple[bytes, bytes]]]:
    """(name, line) of each chunk, block by block in order."""
    is_first = np.zeros(len(scored.rows), np.bool_)
    is_first[scored.first] = True
    at = chunk = 0
    for rows, names in scored.frames.names():
        new = np.flatnonzero(is_first[at : at + len(rows)])
        at += len(rows)
        highest = scored.highest[chunk : chunk + len(new)]
        chunk += len(new)
        calls = ["True" if each else "False" for each in chunk_is_virus(highest).tolist()]
        ends = [""] * len(new)
        if format != ORIGINAL:
            others, virus = (digits(highest[:, column], format) for column in (0, 1))
            ends = [f"\t{o}\t{v}" for o, v in zip(others, virus, strict=True)]
        chunks = [cell(names[place][:-2]) for place in new.tolist()]
        yield [
            (name.encode(), f"{_quoted(name)}\t{call}{end}\n".encode())
            for name, call, end in zip(chunks, calls, ends, strict=True)
        ]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if '"' in name else name


def _sorted(lines: Iterator[tuple[bytes, bytes]], folder: Path, stack: ExitStack) -> Iterator[bytes]:
    """Lines by their names as text, which is the order of the bytes of UTF-8. Many are sorted by way of files."""
    runs: list[IO[bytes]] = []
    some: list[tuple[bytes, bytes]] = []
    for each in lines:
        some.append(each)
        if len(some) == RUN:
            run = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
            some.sort()
            run.writelines(b"%s\t%s" % pair for pair in some)
            run.seek(0)
            runs.append(run)
            some = []
    some.sort()
    merged = heapq.merge(*(_pairs(run) for run in runs), some)
    return (line for _, line in merged)


def _pairs(run: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for text in run:
        name, _, line = text.partition(b"\t")
        yield name, line
