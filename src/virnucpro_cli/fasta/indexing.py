"""The pass over the bytes: where records begin, how long they are, what in them is no residue, and which are alike."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from virnucpro_cli import alphabet, scratch
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import reading
from virnucpro_cli.fasta.compressed import LONGEST_MAGIC, PROGRAMS, kind_of
from virnucpro_cli.fasta.lines import invalid_residue, line_number
from virnucpro_cli.fasta.reading import HEAD_BYTES, Source, open_sources
from virnucpro_cli.fasta.table import RecordTable

NUCLEOTIDE_SHARE, AMBIGUOUS_SHARE = 0.95, 0.5
"""Least share of the letters of nucleotides: ACGTUN, or these and the other codes of IUPAC if ACGTUN are half and C and T or U are among them."""
FEWEST_LETTERS, LOOKED_AT = 20, 32
_PIR = re.compile(rb"(?:^|\n)>(?:P1|F1|DL|DC|RL|RC|N1|N3|XX);[^\n]*\n([^\n]*)(?=\n)")


def index(
    sources: list[Source], *, on_invalid: str = "x", gaps: str = "keep", dedup: bool = True, keep_digests: bool = False
) -> RecordTable:
    """Read every byte once and return the record table.

    on_invalid: "x" counts residues outside the alphabet (they will embed as X); "error" raises UserError with file,
    record, line and column of the first. gaps: see `alphabet.letters`; they are counted, and "error" refuses the first, as
    on_invalid "error" does if they are kept. Raises UserError on NUL bytes, comment lines, PIR, and on a `>` inside a
    sequence line.
    """
    offsets, lengths, replaced, gap_counts, digests, shas = [], [], [], [], [], []
    shares, nucleotide_like, records = [], [], 0
    letters = alphabet.letters(gaps)
    no_gaps = gaps == "error" or (on_invalid == "error" and gaps == "keep")
    for source in sources:
        sha = hashlib.sha256()
        nucleotides = count = 0
        for chunk, at in _chunks(source, sha):
            _refuse_pir(chunk, source, at)
            part = _index_chunk(chunk, source, at, gaps, letters)
            if no_gaps and part.gaps.any():
                first = at + int(part.offset[np.flatnonzero(part.gaps)[0]])
                raise invalid_residue(source, first, alphabet.NO_GAPS, kept=gaps == "keep")
            if on_invalid == "error" and part.replaced.any():
                first = at + int(part.offset[np.flatnonzero(part.replaced)[0]])
                raise invalid_residue(source, first, letters.codes)
            offsets.append(part.offset + (source.base + at))
            lengths.append(part.length)
            replaced.append(part.replaced)
            gap_counts.append(part.gaps)
            digests.append(part.digests)
            nucleotides += part.nucleotides
            count += part.letters
            nucleotide_like.append(part.nucleotide_like + records)
            records += len(part.length)
        shas.append(sha.hexdigest())
        share = nucleotides / count if count else 0.0
        if AMBIGUOUS_SHARE <= share < NUCLEOTIDE_SHARE:
            share = max(share, _ambiguous_share(source, count))
        shares.append(share)
        source.check_unchanged(shas[-1])

    length = _joined(lengths, np.int32)
    replaced_counts = _joined(replaced, np.int32)
    unique_of = np.arange(len(length), dtype=np.int64)
    digest = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    if dedup and len(length):
        unique_of = _first_of_equal(digest)
    return RecordTable(
        sources, shas, _joined(offsets, np.int64), length, replaced_counts, unique_of, shares,
        digest if keep_digests else None, read_as=letters, gaps=_joined(gap_counts, np.int32),
        nucleotide_like=_joined(nucleotide_like, np.int64),
    )  # fmt: skip


def _joined(parts: list[Any], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def _chunks(source: Source, sha: Any) -> Iterator[tuple[bytes, int]]:
    """Whole records, about READ_BYTES at a time, each with its offset in the source. The first byte is a `>`."""
    start, mark = 0, -1
    while mark < 0:  # a BOM or blank lines; that a `>` follows was checked at the opening
        head = source.read_raw(start, min(HEAD_BYTES, source.size - start))
        mark = head.find(b">")
        skipped = head if mark < 0 else head[:mark]
        sha.update(skipped)
        start += len(skipped)
    carried, at, position, want = b"", start, start, reading.READ_BYTES
    while position < source.size:
        raw = source.read_raw(position, min(want, source.size - position))
        sha.update(raw)
        fresh = raw.replace(b"\r", b"\n")
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
    gaps: NDArray[np.int64]
    digests: bytes
    nucleotides: int
    letters: int  # that are no gap and no X
    nucleotide_like: NDArray[np.int64]


_IS_COMMENT = np.isin(np.arange(256), list(b";#!"))


def _comment(source: Source, offset: int, mark: str) -> UserError:
    return UserError(
        f"{source.path} line {line_number(source, offset):,} is a comment: it begins with {mark!r}.",
        f"Take such lines out: {_lines_of(source)}grep -v '^{mark}' > without-comments.fasta",
    )


def _lines_of(source: Source) -> str:
    """The start of a command that takes lines out of a source, whatever compresses the file and ends its lines."""
    try:
        with open(source.path, "rb") as file:
            program = PROGRAMS.get(kind_of(file.read(LONGEST_MAGIC)) or "")
    except OSError:  # a pipe
        return ""
    shown = f"{program} -dc {shlex.quote(source.path)} | " if program else f"< {shlex.quote(source.path)} "
    return shown + ("tr '\\r' '\\n' | " if b"\r" in source.read_raw(0, min(HEAD_BYTES, source.size)) else "")


def _refuse_pir(chunk: bytes, source: Source, at: int) -> None:
    """Raise UserError for the title of a PIR record, which is no sequence."""
    if b";" not in chunk:
        return
    for found in _PIR.finditer(chunk):
        end = chunk.find(b"\n>", found.end())
        text = chunk[found.end() : end if end >= 0 else len(chunk)].rstrip()
        if text.endswith(b"*") or found[1].strip(b"-.*").translate(alphabet.CODES).strip(
            bytes(range(len(alphabet.TOKENS)))
        ):
            raise UserError(
                f"{source.path} line {line_number(source, at + found.start(1)):,} is the title of a PIR record, and no sequence.",
                "Convert the file to FASTA, with Biopython for instance: SeqIO.convert('in.pir', 'pir', 'out.fasta', 'fasta').",
            )


_IS_IUPAC = bytes(code in alphabet.IUPAC_CODES for code in range(256))
_IS_NO_LETTER = bytes(code in (alphabet.X, alphabet.DASH, alphabet.DOT) for code in range(256))


def _ambiguous_share(source: Source, letters: int) -> float:
    """Share of the codes of IUPAC among the letters of a source; 0 if it has no C, or no T and U."""
    iupac, seen = 0, b""
    for chunk, _ in _chunks(source, hashlib.sha256()):
        body = re.sub(rb"(?:^|(?<=\n))>[^\n]*\n?", b"", chunk).translate(alphabet.CODES)
        iupac += body.translate(_IS_IUPAC).count(1)
        seen = bytes(set(seen) | set(body))
    has = set(seen)
    there = alphabet.CODES[ord("C")] in has and has & {alphabet.CODES[ord("T")], alphabet.CODES[ord("U")]}
    return iupac / letters if there else 0.0


def _nucleotide_like(stream: NDArray[np.uint8], begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which records look like nucleotides, by all of their letters; a look at the first ones leaves out most proteins."""
    if not len(stream):
        return np.empty(0, np.int64)
    windows = sliding_window_view(np.append(stream, np.zeros(LOOKED_AT, np.uint8)), LOOKED_AT)
    first = _WEIGHT[windows[begin]]
    length = end - begin
    if (short := length < LOOKED_AT).any():
        first[short] *= np.arange(LOOKED_AT) < length[short, None]
    counts = first.sum(axis=1, dtype=np.uint32)
    core, odd, letters = counts & 63, counts >> 6 & 63, counts >> 12
    likely = (8 * odd <= LOOKED_AT) & (5 * core >= 2 * letters) & (length >= FEWEST_LETTERS)
    found = []
    for record in np.flatnonzero(likely).tolist():
        body = stream[begin[record] : end[record]].tobytes()
        letters = len(body) - body.translate(_IS_NO_LETTER).count(1)
        core, iupac = (body.translate(table).count(1) for table in (_IS_NUCLEOTIDE, _IS_IUPAC))
        mixed = (
            core >= AMBIGUOUS_SHARE * letters
            and iupac >= NUCLEOTIDE_SHARE * letters
            and _C in body
            and (_T in body or _U in body)
        )
        if letters >= FEWEST_LETTERS and (core >= NUCLEOTIDE_SHARE * letters or mixed):
            found.append(record)
    return np.asarray(found, np.int64)


_C, _T, _U = (alphabet.CODES[byte : byte + 1] for byte in b"CTU")
_IS_NUCLEOTIDE = bytes(code in alphabet.NUCLEOTIDE_CODES for code in range(256))


_WEIGHT = np.array(
    [0 if gap else 0x1001 if core else 0x1000 if iupac else 0x1040
     for gap, core, iupac in zip(_IS_NO_LETTER, _IS_NUCLEOTIDE, _IS_IUPAC, strict=True)], np.uint32,
)  # fmt: skip
"""Token id -> what adds up to counts of six bits: ACGTUN, letters that are no code of IUPAC, letters that are no gap and no X."""


def _index_chunk(chunk: bytes, source: Source, at: int, gaps: str, letters: alphabet.Letters) -> _Part:
    text = np.frombuffer(chunk, np.uint8)
    line_start = np.append(0, np.flatnonzero(text == ord("\n")) + 1)
    if line_start[-1] == len(text):
        line_start = line_start[:-1]
    first = text[line_start]
    if _IS_COMMENT[first].any():
        line = int(np.flatnonzero(_IS_COMMENT[first])[0])
        raise _comment(source, at + int(line_start[line]), chr(first[line]))
    is_header = first == ord(">")
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
    stream, begin, end, gap_counts = _gaps(stream, begin, end, gaps)
    replaced = np.zeros(len(header), np.int64)
    marked: dict[int, tuple[bytes, int, int]] = {}
    special, stops = stream >= alphabet.INVALID, 0
    if special.any():
        where = np.flatnonzero(special)
        record = np.searchsorted(end, where, side="right")
        code = stream[where]
        last_star = (code == alphabet.STAR) & (where == end[record] - 1)
        end[record[last_star]] -= 1
        stops = int(last_star.sum())
        replaced += np.bincount(record[~last_star], minlength=len(header))
        for number in np.unique(record[code >= alphabet.LESS]).tolist():
            start = int(line_start[header[number]])
            stop = int(line_start[header[number + 1]]) if number + 1 < len(header) else len(chunk)
            marked[number] = _ids_with_masks(chunk[start:stop], source, at + start, letters)
        stream = np.where(special, np.uint8(alphabet.X), stream)

    body = stream.tobytes()
    nucleotides = int(np.count_nonzero(np.frombuffer(body.translate(_IS_NUCLEOTIDE), np.bool_)))
    view = memoryview(body)
    digest = xxhash.xxh3_128_digest
    for number, (ids, *_) in marked.items():  # the letters of `<mask>` are none
        nucleotides += ids.translate(_IS_NUCLEOTIDE).count(1) - body[begin[number] : end[number]].translate(
            _IS_NUCLEOTIDE
        ).count(1)
    digests = [digest(view[a:b]) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    like = _nucleotide_like(np.frombuffer(body, np.uint8), begin, end)
    length = end - begin
    for number, (ids, count, gap_count) in marked.items():
        digests[number], length[number], replaced[number], gap_counts[number] = digest(ids), len(ids), count, gap_count
    odd = sum(
        body.count(alphabet.X, begin[number], end[number]) - ids.count(alphabet.X)
        for number, (ids, *_) in marked.items()
    )
    kept_gaps = 0 if gaps in ("strip", "x") else int(gap_counts.sum())
    letter_count = int(length.sum()) - kept_gaps - body.count(alphabet.X) + stops + odd
    return _Part(line_start[header], length, replaced, gap_counts, b"".join(digests), nucleotides, letter_count, like)


def _gaps(
    stream: NDArray[np.uint8], begin: NDArray[np.int64], end: NDArray[np.int64], policy: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Count the gaps of each record, and apply the policy to them: the stream, where records begin and end in it, and counts.

    One `.` at the end that follows a residue is a stop, and falls off.
    """
    counts = np.zeros(len(begin), np.int64)
    is_gap = (stream == alphabet.DASH) | (stream == alphabet.DOT)
    if not is_gap.any():
        return stream, begin, end, counts
    where = np.flatnonzero(is_gap)
    record = np.searchsorted(end, where, side="right")
    stop = (stream[where] == alphabet.DOT) & (where == end[record] - 1) & ~(is_gap[where - 1] & (where > begin[record]))
    ends = end.copy()
    ends[record[stop]] -= 1
    where, record = where[~stop], record[~stop]
    counts += np.bincount(record, minlength=len(begin))
    if policy == "strip":
        kept = np.ones(len(stream), np.bool_)
        kept[where] = False
        begin, ends = begin - np.searchsorted(where, begin), ends - np.searchsorted(where, ends)
        return stream[kept], begin, ends, counts
    if policy == "x":
        stream = stream.copy()
        stream[where] = alphabet.X
    return stream, begin, ends, counts


def _ids_with_masks(text: bytes, source: Source, at: int, letters: alphabet.Letters) -> tuple[bytes, int, int]:
    """Token ids, and counts of replaced residues and of gaps, of a record (header included) whose sequence holds `<` or `>`."""
    raw = text[text.find(b"\n") + 1 :]
    gaps = alphabet.without_stop(raw.translate(None, alphabet.WHITE_SPACE)).translate(None, alphabet.LETTERS_BUT_GAPS)
    text_only = alphabet.without_stop(raw.translate(None, letters.dropped).lower())
    plain = text_only.replace(alphabet.MASK_TEXT, b"")
    if b">" in plain:
        line = line_number(source, at)
        name = text[1:].split(None, 1)[:1]
        raise UserError(
            f"{source.path}: record {b''.join(name).decode('utf-8', 'replace')!r} (line {line}) has a '>' inside a sequence line.",
            "A byte order mark stands before that '>', at the start of a file that was joined to another; take it out."
            if reading.BOM + b">" in text
            else "Two files were probably joined without a final newline; put a line break before that '>'.",
        )
    length = len(plain) + text_only.count(alphabet.MASK_TEXT)
    codes = np.frombuffer(plain.translate(letters.codes), np.uint8)
    return alphabet.token_ids(raw, length, letters), int(np.count_nonzero(codes >= alphabet.INVALID)), len(gaps)


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
