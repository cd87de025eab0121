"""The pass over the bytes: where records begin, how long they are, what in them is no residue, and which are alike."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli import alphabet, scratch
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import reading
from virnucpro_cli.fasta.lines import invalid_residue, line_number
from virnucpro_cli.fasta.reading import HEAD_BYTES, Source, open_sources
from virnucpro_cli.fasta.table import RecordTable

NUCLEOTIDE_SHARE = 0.95


def index(
    sources: list[Source], *, on_invalid: str = "x", dedup: bool = True, keep_digests: bool = False
) -> RecordTable:
    """Read every byte once and return the record table.

    on_invalid: "x" counts residues outside the alphabet (they will embed as X); "error" raises UserError with file,
    record, line and column of the first. Raises UserError on NUL bytes and on a `>` inside a sequence line.
    """
    offsets, lengths, replaced, digests, shas = [], [], [], [], []
    shares = []
    for source in sources:
        sha = hashlib.sha256()
        nucleotides = residues = 0
        for chunk, at in _chunks(source, sha):
            part = _index_chunk(chunk, source, at)
            if on_invalid == "error" and part.replaced.any():
                raise invalid_residue(source, at + int(part.offset[np.flatnonzero(part.replaced)[0]]))
            offsets.append(part.offset + (source.base + at))
            lengths.append(part.length)
            replaced.append(part.replaced)
            digests.append(part.digests)
            nucleotides += part.nucleotides
            residues += int(part.length.sum())
        shas.append(sha.hexdigest())
        shares.append(nucleotides / residues if residues else 0.0)
        source.check_unchanged()

    length = _joined(lengths, np.int32)
    replaced_counts = _joined(replaced, np.int32)
    unique_of = np.arange(len(length), dtype=np.int64)
    digest = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    if dedup and len(length):
        unique_of = _first_of_equal(digest)
    return RecordTable(
        sources, shas, _joined(offsets, np.int64), length, replaced_counts, unique_of, shares,
        digest if keep_digests else None,
    )  # fmt: skip


def _joined(parts: list[Any], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def _chunks(source: Source, sha: Any) -> Iterator[tuple[bytes, int]]:
    """Whole records, about READ_BYTES at a time, each with its offset in the source. The first byte is a `>`."""
    start, mark = 0, -1
    while mark < 0:  # a BOM or blank lines; that a `>` follows was checked at the opening
        head = source.read(start, min(HEAD_BYTES, source.size - start))
        mark = head.find(b">")
        skipped = head if mark < 0 else head[:mark]
        sha.update(skipped)
        start += len(skipped)
    carried, at, position, want = b"", start, start, reading.READ_BYTES
    while position < source.size:
        fresh = source.read(position, min(want, source.size - position))
        sha.update(fresh)
        position += len(fresh)
        nul = fresh.find(b"\0")
        if nul >= 0:
            line = line_number(source, position - len(fresh) + nul)
            raise UserError(
                f"{source.path} line {line} holds NUL bytes: the file is damaged.", "Copy or fetch it again."
            )
        search_from = max(len(carried) - 1, 0)
        buffer = carried + fresh
        cut = len(buffer) if position == source.size else buffer.rfind(b"\n>", search_from) + 1
        if cut == 0:  # one record longer than all that was read: read on in ever larger pieces
            carried, want = buffer, want * 2
            continue
        yield buffer[:cut], at
        carried, at, want = buffer[cut:], at + cut, reading.READ_BYTES


@dataclass(frozen=True)
class _Part:
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    replaced: NDArray[np.int64]
    digests: bytes
    nucleotides: int


_IS_NUCLEOTIDE = bytes(code in alphabet.NUCLEOTIDE_CODES for code in range(256))


def _index_chunk(chunk: bytes, source: Source, at: int) -> _Part:
    text = np.frombuffer(chunk, np.uint8)
    line_start = np.append(0, np.flatnonzero(text == ord("\n")) + 1)
    if line_start[-1] == len(text):
        line_start = line_start[:-1]
    is_header = text[line_start] == ord(">")
    line_length = np.diff(line_start, append=len(text))
    header = np.flatnonzero(is_header)

    codes = np.frombuffer(chunk.translate(alphabet.CODES), np.uint8)
    keep = np.repeat(~is_header, line_length)
    keep &= codes != alphabet.SPACE
    stream = codes[keep]

    per_line = np.where(is_header, 0, line_length - 1)
    if not (is_header[-1] or text[-1] == ord("\n")):
        per_line[-1] += 1
    length = np.add.reduceat(per_line, header)
    if length.sum() != len(stream):  # white space other than one line feed a line
        kept_before = np.append(0, np.cumsum(keep, dtype=np.int64))
        length = np.diff(kept_before[line_start[header]], append=len(stream))

    begin = np.cumsum(length) - length
    end = begin + length
    replaced = np.zeros(len(header), np.int64)
    marked: dict[int, tuple[bytes, int]] = {}
    special = stream >= alphabet.INVALID
    if special.any():
        where = np.flatnonzero(special)
        record = np.searchsorted(end, where, side="right")
        code = stream[where]
        last_star = (code == alphabet.STAR) & (where == end[record] - 1)
        end[record[last_star]] -= 1
        replaced += np.bincount(record[~last_star], minlength=len(header))
        for number in np.unique(record[code >= alphabet.LESS]).tolist():
            start = int(line_start[header[number]])
            stop = int(line_start[header[number + 1]]) if number + 1 < len(header) else len(chunk)
            marked[number] = _ids_with_masks(chunk[start:stop], source, at + start)
        stream = np.where(special, np.uint8(alphabet.X), stream)

    body = stream.tobytes()
    nucleotides = int(np.count_nonzero(np.frombuffer(body.translate(_IS_NUCLEOTIDE), np.bool_)))
    view = memoryview(body)
    digest = xxhash.xxh3_128_digest
    for number, (ids, _) in marked.items():  # the letters of `<mask>` are none
        nucleotides += ids.translate(_IS_NUCLEOTIDE).count(1) - body[begin[number] : end[number]].translate(
            _IS_NUCLEOTIDE
        ).count(1)
    digests = [digest(view[a:b]) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    length = end - begin
    for number, (ids, count) in marked.items():
        digests[number], length[number], replaced[number] = digest(ids), len(ids), count
    return _Part(line_start[header], length, replaced, b"".join(digests), nucleotides)


def _ids_with_masks(text: bytes, source: Source, at: int) -> tuple[bytes, int]:
    """Token ids and count of replaced residues of a record (header included) whose sequence holds `<` or `>`."""
    raw = text[text.find(b"\n") + 1 :]
    text_only = raw.translate(None, alphabet.WHITE_SPACE).lower().removesuffix(b"*")
    plain = text_only.replace(alphabet.MASK_TEXT, b"")
    if b">" in plain:
        line = line_number(source, at)
        name = text[1:].split(None, 1)[:1]
        raise UserError(
            f"{source.path}: record {b''.join(name).decode('utf-8', 'replace')!r} (line {line}) has a '>' inside a sequence line.",
            "Two files were probably joined without a final newline; put a line break before that '>'.",
        )
    length = len(plain) + text_only.count(alphabet.MASK_TEXT)
    codes = np.frombuffer(plain.translate(alphabet.CODES), np.uint8)
    return alphabet.token_ids(raw, length), int(np.count_nonzero(codes >= alphabet.INVALID))


def _first_of_equal(digest: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each 128-bit digest (two words a row) the first row with the same digest."""
    high, low = np.ascontiguousarray(digest[:, 0]), np.ascontiguousarray(digest[:, 1])
    order = np.argsort(high, kind="stable")
    same_high = high[order[1:]] == high[order[:-1]]
    same_low = low[order[1:]] == low[order[:-1]]
    if (same_high & ~same_low).any():  # a 64-bit collision: sort by both words
        order = np.lexsort((low, high))
        same_high = high[order[1:]] == high[order[:-1]]
        same_low = low[order[1:]] == low[order[:-1]]
    is_first = np.append(True, ~(same_high & same_low))
    first = order[np.flatnonzero(is_first)]
    unique_of = np.empty(len(digest), np.int64)
    unique_of[order] = first[np.cumsum(is_first) - 1]
    return unique_of


def refuse_unreadable(paths: Sequence[str]) -> None:
    """Read FASTA files once by the rules of the index, for its error messages. Raises UserError; pipes are refused."""
    for path in paths:
        if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
            raise UserError(f"{path} can be read only once, and here it is read again.", "Save it to a file first.")
    with scratch.folder() as folder:
        index(open_sources(paths, Path(folder)), dedup=False)
