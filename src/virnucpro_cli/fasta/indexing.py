"""The pass over the bytes: where records begin, how long they are, what in them is no residue, and which are alike."""

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli import alphabet
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import reading
from virnucpro_cli.fasta.reading import BOM, HEAD_BYTES, LONGEST_MAGIC, PROGRAMS, Source, kind_of, open_sources
from virnucpro_cli.fasta.table import NEWLINE, RecordTable
from virnucpro_cli.stopping import cores, threads

NUCLEOTIDE_SHARE, AMBIGUOUS_SHARE = 0.95, 0.5
"""Least share of the letters of nucleotides: ACGTUN, or these and the other codes of IUPAC if ACGTUN are half and C and
T or U are among them."""
FEWEST_LETTERS = 20
NUCLEOTIDES, IUPAC, OTHER, NO_LETTER = range(3), 3, 4, 5
_WEIGHT = bytes([2, 2, 2, 0, 0, 1]).ljust(256, b"\0")
"""Kind of letter -> weight. Weights add up to a sequence's length or more if half of its letters are ACGTUN."""

SPAN_BYTES = 1 << 23
"""Bytes of a span, the work of a helper at a time."""
FEWEST_SPANS = 8
"""Spans of a source that is worth helpers: a smaller one is read before they have begun."""
MOST_HELPERS = 16
"""Helpers at once, at most: each takes some 60 MB."""
WORTH_BYTES = 1 << 25
"""Bytes of the inputs from which on their index is kept: less is read again in a second."""
ROWS_AT_ONCE = 1 << 19

_COMMENTS = np.isin(np.arange(256), list(b";#!"))
_PIR = re.compile(rb"(?:^|\n)>(?:P1|F1|DL|DC|RL|RC|N1|N3|XX);[^\n]*\n([^\n]*)(?=\n)")
_RESIDUES = bytes(byte for byte in range(256) if chr(byte).upper() in alphabet.ESM.letters)
_MASK = re.compile(rb"\s*".join(re.escape(bytes([byte])) for byte in alphabet.MASK_TEXT), re.IGNORECASE)


@cache
def _kind_of(letters: alphabet.Letters) -> bytes:
    """Token id -> kind of letter: AGN, C, TU, other codes of IUPAC, others, and X, gaps and stops."""
    kinds = bytearray([OTHER]) * 256
    for kind, several in enumerate((b"AGN", b"C", b"TU", b"RYSWKMBDHV", b"", b"X-.*")):
        for letter in several:
            kinds[letters.ids[letter]] = kind
    return bytes(kinds)


class How(NamedTuple):
    """How letters are read and what is refused, as `index` is told."""

    on_invalid: str
    gaps: str
    reading: alphabet.Reading


class Inputs:
    """Inputs of a run, opened and indexed. A subclass keeps the index, for which the context of the run matters."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def sources(self, inputs: Sequence[str], folder: Path) -> list[Source]:
        """Open the inputs as `open_sources` does."""
        return open_sources(inputs, folder)

    def table(self, sources: list[Source], how: How, dedup: bool = True, keep_digests: bool = False) -> RecordTable:
        """The record table of the sources, as `index` gives it."""
        return index(
            sources, on_invalid=how.on_invalid, gaps=how.gaps, dedup=dedup, keep_digests=keep_digests,
            reading=how.reading,
        )  # fmt: skip


def is_large(files: Sequence[str], times: int = 1) -> bool:
    """Whether the files are so large that their index is worth keeping, or so many times as large."""
    return sum(os.path.getsize(name) for name in files if os.path.isfile(name)) >= times * WORTH_BYTES


def index_of(output: Path) -> Path:
    """The file that holds the index of the inputs of an output, and of all its shards, while they run."""
    return output.with_name(f"{output.name}.index")


def tokens_of(output: Path, half: str = "") -> Path:
    """The file that holds the tokens of several letters of an output, or of its half, while it is partial."""
    return output.with_name(".".join(filter(None, (output.name, half, "tokens"))))


class Part(NamedTuple):
    """Columns of some records, as in a RecordTable. digest: uint64 [n, 2]; nucleotide_like: bool [n]."""

    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    replaced: NDArray[np.int32]
    gaps: NDArray[np.int32]
    digest: NDArray[np.uint64]
    nucleotide_like: NDArray[np.bool_]


_NONE = np.empty(0, np.int32)
_NOTHING = Part(np.empty(0, np.int64), _NONE, _NONE, _NONE, np.empty((0, 2), np.uint64), np.empty(0, np.bool_))


def index(
    sources: list[Source],
    *,
    on_invalid: str = "x",
    gaps: str = "keep",
    dedup: bool = True,
    keep_digests: bool = False,
    reading: alphabet.Reading = alphabet.ESM,
    helpers: int | None = None,
) -> RecordTable:
    """Read every byte once and return the record table.

    on_invalid: "x" counts residues outside the alphabet (they will embed as X); "error" refuses the first of them.
    gaps: see `alphabet.letters`. They are counted; "error" refuses the first, and so does on_invalid "error" if they
    are kept. reading: of the model family. helpers: processes that read large sources, a span each; by default one for
    each core up to 16. One, or a small source: this process reads.
    Raises UserError, with file and line, on what is refused, and on NUL bytes, comment lines, PIR, and a `>` inside a
    sequence line.
    """
    parts = list[Part]()
    sha256, shares = read_all(sources, How(on_invalid, gaps, reading), parts.append, helpers)
    offset, length, replaced, gap_counts, digest, like = _joined(parts)
    return RecordTable(
        sources, sha256, offset, length, replaced, first_of_equal(digest) if dedup else np.arange(len(offset)),
        shares, digest if keep_digests else None,
        read_as=alphabet.letters(gaps, reading), gaps=gap_counts, nucleotide_like=np.flatnonzero(like),
    )  # fmt: skip


def read_all(
    sources: list[Source], how: How, take: Callable[[Part], None], helpers: int | None = None
) -> tuple[list[str], list[float]]:
    """Read every byte once, and give the columns of all records to `take`, in their order.

    Returns the SHA-256 of each source, and its share of letters of nucleotides. Raises UserError as `index` does.
    """
    sha256, kinds = list[str](), np.zeros((len(sources), NO_LETTER + 1), np.int64)
    for source, its_kinds in zip(sources, kinds, strict=True):
        given_up = Event()
        with ThreadPoolExecutor(1, "sha256") as thread:
            hashed = thread.submit(source.sha256, given_up)
            try:
                for part, kinds_here in _by_span(source, how, helpers):
                    take(part)
                    its_kinds += kinds_here
                sha256.append(hashed.result())
            except BaseException:
                given_up.set()  # or a refusal would wait until a large file is read to its end
                raise
        source.check_unchanged(sha256[-1])
    return sha256, _nucleotide_share(kinds).tolist()


def _by_span(source: Source, how: How, helpers: int | None) -> Iterator[tuple[Part, NDArray[np.int64]]]:
    """Results of `index_span` for each span of a source, in order; of helpers, if the source is large."""
    begins = range(0, source.size, SPAN_BYTES)
    spans = [(source, how, begin, min(begin + SPAN_BYTES, source.size)) for begin in begins]
    if helpers == 1 or (helpers is None and len(spans) < FEWEST_SPANS):
        yield from (index_span(*span) for span in spans)
        return
    from virnucpro_cli.processes import in_order  # not for most files

    spool = [] if source.spool is None else [source.spool.fileno()]
    yield from in_order(index_span, spans, min(helpers or min(cores(), MOST_HELPERS), len(spans)), spool)


def _joined(parts: list[Part]) -> Part:
    return Part(*map(np.concatenate, zip(*parts, strict=True)))


def index_span(source: Source, how: How, begin: int, end: int) -> tuple[Part, NDArray[np.int64]]:
    """Columns of the records that begin in [begin, end), and how many letters of each kind they have, int64 [6]."""
    letters = alphabet.letters(how.gaps, how.reading)
    kinds, parts = np.zeros(NO_LETTER + 1, np.int64), [_NOTHING]
    for chunk, at in _chunks(source, begin, end):
        _refuse_pir(chunk, source, at)
        part = _index_chunk(chunk, source, at, how.gaps, letters, kinds)
        refuse(part, how, [source])
        parts.append(part)
    return _joined(parts), kinds


def _chunks(source: Source, begin: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Whole records that begin in [begin, end), about READ_BYTES at a time, each with its offset in the source.

    The first byte of a chunk is a `>`.
    """
    at = position = _first_record(source, begin, end)
    text, size = b"", reading.READ_BYTES
    while at < end:
        raw = source.read_raw(position, min(size, source.size - position))
        if (nul := raw.find(b"\0")) >= 0:
            raise _refused(source, position + nul, "holds NUL bytes: the file is damaged", "Copy or fetch it again.")
        text += raw.replace(b"\r", b"\n")
        position += len(raw)
        upto = len(text) if position == source.size else text.rfind(b"\n>") + 1
        if at + upto > end and (beyond := text.find(b"\n>", end - 1 - at)) >= 0:
            upto = beyond + 1
        if upto:
            yield text[:upto], at
            text, at, size = text[upto:], at + upto, reading.READ_BYTES
        else:  # one record longer than all that was read: read on in ever larger pieces
            size *= 2


def _first_record(source: Source, begin: int, end: int) -> int:
    """The offset of the first record that begins in [begin, end); end if none does.

    It begins behind a line end, for which the byte before is read too; the first of all may have a BOM before it.
    """
    mark = b"\n>" if begin else b">"
    position, last = max(begin - 1, 0), b""
    while position < end:
        text = last + source.read(position, min(reading.READ_BYTES, end - position))
        if (found := text.find(mark)) >= 0:
            return position - len(last) + found + len(mark) - 1
        position += len(text) - len(last)
        last = text[-1:]
    return end


@dataclass
class _Stream:
    """Codes of the residues of a chunk. Those of record r are codes[begin[r]:end[r]]; a stop may follow them."""

    codes: NDArray[np.uint8]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]

    def record_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The record of each position in the stream, int64 [n] both."""
        return np.searchsorted(self.end, positions, side="right")

    def count(self, records: NDArray[np.int64]) -> NDArray[np.int32]:
        """How often each record occurs, int32 [records of the chunk], in records, int64 [n]."""
        return np.bincount(records, minlength=len(self.begin)).astype(np.int32)

    def drop(self, positions: NDArray[np.int64]) -> None:
        """Take codes out of the stream. positions: int64 [n], rising."""
        self.codes = np.delete(self.codes, positions)
        self.begin = self.begin - np.searchsorted(positions, self.begin)
        self.end = self.end - np.searchsorted(positions, self.end)

    def read_masks(self, letters: alphabet.Letters) -> None:
        """Put one token for each `<mask>`."""
        mask_codes = re.compile(re.escape(alphabet.MASK_TEXT.translate(letters.codes)))
        first = np.array([mask.start() for mask in mask_codes.finditer(self.codes.tobytes())], np.int64)
        first = first[first + len(alphabet.MASK_TEXT) <= self.end[self.record_of(first)]]  # not across records
        self.codes[first] = letters.reading.mask
        self.drop((first[:, None] + np.arange(1, len(alphabet.MASK_TEXT))).ravel())

    def settle(self, at: NDArray[np.int64], letters: alphabet.Letters) -> None:
        """Put tokens for the codes at these positions, int64 [n]."""
        self.codes[at] = np.frombuffer(letters.settled, np.uint8)[self.codes[at]]

    def read_gaps(self, policy: str, letters: alphabet.Letters) -> NDArray[np.int32]:
        """Count the gaps of each record, int32 [n], and apply the policy to them.

        One `.` at the end that follows a residue is a stop, and falls off.
        """
        is_gap = (self.codes == alphabet.DASH) | (self.codes == alphabet.DOT)
        at = np.flatnonzero(is_gap)
        record = self.record_of(at)
        last = (at == self.end[record] - 1) & ~(is_gap[at - 1] & (at > self.begin[record]))
        stop = last & (self.codes[at] == alphabet.DOT)
        self.end[record[stop]] -= 1
        self.settle(at, letters)
        at, record = at[~stop], record[~stop]
        if policy == "strip":
            self.drop(at)
        return self.count(record)


def _index_chunk(
    chunk: bytes, source: Source, at: int, gaps: str, letters: alphabet.Letters, kinds: NDArray[np.int64]
) -> Part:
    """Columns of the records of a chunk, which begins at `at`. Adds its letters of each kind to `kinds`, int64 [6]."""
    text = np.frombuffer(chunk, np.uint8)
    line = np.append(0, np.flatnonzero(text == NEWLINE) + 1)
    line = line[: np.searchsorted(line, len(text))]
    first = text[line]
    if (comment := _COMMENTS[first]).any():
        raise _comment(source, at + int(line[comment.argmax()]))
    is_header = first == ord(">")
    offset = line[is_header]

    codes = np.frombuffer(chunk.translate(letters.codes), np.uint8)
    kept = np.repeat(~is_header, np.diff(line, append=len(text)))
    kept &= codes != alphabet.SPACE
    end = np.cumsum(np.add.reduceat(kept, offset, dtype=np.int64))
    stream = _Stream(codes[kept], np.append(0, end[:-1]), end)
    gap_counts = stream.read_gaps(gaps, letters)
    if b"<" in chunk:
        stream.read_masks(letters)
    where = np.flatnonzero(stream.codes >= alphabet.INVALID)
    record, code = stream.record_of(where), stream.codes[where]
    if (mark := code == alphabet.GREATER).any():
        raise _mark_inside(source, at + int(offset[record[mark.argmax()]]))
    is_star = code == alphabet.STAR
    stop = is_star & (where == stream.end[record] - 1)
    stream.end[record[stop]] -= 1
    wrong = ~is_star if "*" in letters.reading.letters else ~stop
    stream.settle(where, letters)

    body = stream.codes.tobytes()
    kind = body.translate(_kind_of(letters))
    kinds += [np.count_nonzero(np.frombuffer(kind, np.uint8) == each) for each in range(len(kinds))]
    digest, view = xxhash.xxh3_128_digest, memoryview(body)
    digests = [digest(view[a:b]) for a, b in zip(stream.begin.tolist(), stream.end.tolist(), strict=True)]
    return Part(
        offset + (source.base + at), (stream.end - stream.begin).astype(np.int32), stream.count(record[wrong]),
        gap_counts, np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2), _nucleotide_like(kind, stream),
    )  # fmt: skip


def _nucleotide_like(kind: bytes, stream: _Stream) -> NDArray[np.bool_]:
    """Which records look like nucleotides, by all of their letters; most proteins have too few of ACGTUN."""
    weight = np.frombuffer(kind.translate(_WEIGHT) + b"\0", np.uint8)
    length = stream.end - stream.begin
    like = (np.add.reduceat(weight, stream.begin, dtype=np.int64) >= length) & (length >= FEWEST_LETTERS)
    likely = np.flatnonzero(like)
    bounds = zip(stream.begin[likely].tolist(), stream.end[likely].tolist(), strict=True)
    counts = np.array([[kind.count(each, a, b) for each in range(NO_LETTER + 1)] for a, b in bounds]).reshape(-1, 6)
    letters = counts[:, :NO_LETTER].sum(axis=1)
    like[likely] = (letters >= FEWEST_LETTERS) & (_nucleotide_share(counts) >= NUCLEOTIDE_SHARE)
    return like


def _nucleotide_share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of the letters of nucleotides, float64 [n], by counts of each kind of letter, int64 [n, 6]."""
    core, iupac, letters = (counts[:, :several].sum(axis=1) for several in (IUPAC, OTHER, NO_LETTER))
    mixed = (core >= AMBIGUOUS_SHARE * letters) & counts[:, 1:IUPAC].all(axis=1)
    return np.where(mixed, iupac, core) / np.maximum(letters, 1)


def first_of_equal(digest: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each 128-bit digest (two words a row) the first row with the same digest, int64 [n].

    Threads part the rows by their first byte, and sort what has the same one.
    """
    unique_of = np.empty(len(digest), np.int64)

    def parted(start: int) -> tuple[int, NDArray[np.uint32], NDArray[np.int64]]:
        """The rows from `start` on by their first byte, as offsets, and where those of each byte begin, int64 [257]."""
        byte = (digest[start : start + ROWS_AT_ONCE, 0] >> np.uint64(56)).astype(np.uint8)
        order = np.argsort(byte, kind="stable").astype(np.uint32)
        return start, order, np.append(0, np.cumsum(np.bincount(byte, minlength=256)))

    def settle(byte: int) -> None:
        rows = [order[at[byte] : at[byte + 1]].astype(np.int64) + start for start, order, at in chunks]
        own = np.concatenate(rows)
        unique_of[own] = own[_first_of_part(digest, own)]

    with threads(MOST_HELPERS) as pool:
        chunks = list(pool.map(parted, range(0, len(digest), ROWS_AT_ONCE)))
        counts = np.sum([np.diff(at) for _, _, at in chunks], axis=0)
        list(pool.map(settle, np.flatnonzero(counts).tolist()))
    return unique_of


def _first_of_part(digest: NDArray[np.uint64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of the rows, int64 [n] and rising, the first place in it of a row with the same digest, int64 [n]."""
    high = digest[rows, 0]
    order = np.argsort(high)
    again = high[order[1:]] == high[order[:-1]]
    if again.any():
        low = digest[rows, 1]
        if (low[order[1:]][again] != low[order[:-1]][again]).any():  # a 64-bit collision: sort by both words
            order = np.lexsort((low, high))
            again = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    begin = np.flatnonzero(np.append(True, ~again))
    first = np.empty(len(order), np.int64)
    first[order] = np.repeat(np.minimum.reduceat(order, begin), np.diff(begin, append=len(order)))
    return first


# --- refusals --------------------------------------------------------------------------------------------------------


def refuse(of: "Part | RecordTable", how: How, sources: list[Source]) -> None:
    """Raise UserError for the first letter that is refused in records of the sources, by their counts."""
    strict = how.on_invalid == "error"
    no_gaps = how.gaps == "error" or (how.gaps == "keep" and strict)
    if no_gaps or strict:
        wrong = np.flatnonzero(of.gaps * no_gaps + of.replaced * strict)
        if len(wrong):
            at = int(of.offset[wrong[0]])
            source = next(source for source in reversed(sources) if source.base <= at)
            refused = alphabet.GAPS * no_gaps + alphabet.letters(how.gaps, how.reading).outside * strict
            raise _no_residue(source, at - source.base, refused, how.gaps == "keep", how.reading)


def _refused(source: Source, offset: int, what: str, remedy: str) -> UserError:
    return UserError(f"{source.path} line {source.line_number(offset)} {what}.", remedy)


def _comment(source: Source, offset: int) -> UserError:
    mark = source.read(offset, 1).decode()
    remedy = f"Take such lines out: {_lines_of(source)}grep -v '^{mark}' > without-comments.fasta"
    return _refused(source, offset, f"is a comment: it begins with {mark!r}", remedy)


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
    for title in _PIR.finditer(chunk) if b";" in chunk else ():
        end = chunk.find(b"\n>", title.end())
        text = chunk[title.end() : end if end >= 0 else len(chunk)].rstrip()
        if text.endswith(b"*") or title[1].strip(b"*").translate(None, _RESIDUES):
            raise _refused(
                source, at + title.start(1), "is the title of a PIR record, and no sequence",
                "Convert the file to FASTA, with Biopython for instance: "
                "SeqIO.convert('in.pir', 'pir', 'out.fasta', 'fasta').",
            )  # fmt: skip


def _named(text: bytes) -> str:
    """The name of a record, by its text, as messages show it."""
    return repr(b"".join(text[1:].partition(b"\n")[0].split(None, 1)[:1]).decode("utf-8", "backslashreplace"))


def _mark_inside(source: Source, offset: int) -> UserError:
    text = source.record_text(offset)
    return UserError(
        f"{source.path}: record {_named(text)} (line {source.line_number(offset)}) has a '>' inside a sequence line.",
        "A byte order mark stands before that '>', at the start of a file that was joined to another; take it out."
        if BOM + b">" in text
        else "Two files were probably joined without a final newline; put a line break before that '>'.",
    )


def _no_residue(source: Source, offset: int, refused: bytes, kept: bool, reading: alphabet.Reading) -> UserError:
    """The first letter that is refused in the record at `offset`. kept: gaps are kept, and refused by on_invalid."""
    text = source.record_text(offset)
    header = text.find(b"\n")
    letters = _MASK.sub(lambda mask: reading.unknown.encode() * len(mask[0]), text[header:])
    word = "residue" if reading.standard == alphabet.ESM.standard else "base"
    at = header + next(i for i, byte in enumerate(letters) if byte in refused)
    shown = text[at : at + 1].decode("latin-1")
    remedy = f"Correct the file, or use --invalid x (embed such {word}s as {reading.unknown}) or --invalid skip."
    if shown in "-.":
        remedy = f"Use --gaps strip (leave gaps out) or x (embed them as {reading.unknown})" + (
            "; --invalid error refuses those that are kept." if kept else ", or keep (embed them as fair-esm does)."
        )
    return UserError(
        f"{source.path}: record {_named(text)}, line {source.line_number(offset + at)}, "
        f"column {at - text.rfind(NEWLINE, 0, at)}: {shown!r} is not a {word}.",
        remedy,
    )
