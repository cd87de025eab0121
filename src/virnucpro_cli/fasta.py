"""FASTA files to a record table: one vectorised pass over the bytes, which also applies the reader's policies.

A record's number is its identity. Names, and the text of single records, are read lazily by offset.
"""

import hashlib
import itertools
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from xopen import xopen

from virnucpro_cli import alphabet
from virnucpro_cli.errors import UserError

HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 20  # the pass over one chunk stays within the L2 cache
AHEAD, MOST_AHEAD, FEWEST_AHEAD = 1 << 23, 1 << 27, 32  # bytes, bytes, records
BOM = b"\xef\xbb\xbf"
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
NUCLEOTIDE_SHARE = 0.95
NEWLINE = ord("\n")
TOKENS_OR_SPACE = np.frombuffer(
    bytes(
        code if code in (alphabet.SPACE, alphabet.LESS) else token
        for code, token in zip(alphabet.CODES, alphabet.TOKEN_IDS, strict=True)
    ),
    np.uint8,
)


def decoder_errors() -> tuple[type[Exception], ...]:
    """What the decompressors behind xopen raise on damaged data; which of them are installed depends on the platform."""
    errors: list[type[Exception]] = [EOFError, OSError, ValueError, zlib.error, lzma.LZMAError]
    for module, name in (("isal.isal_zlib", "error"), ("zlib_ng.zlib_ng", "error"),
                         ("backports.zstd", "ZstdError"), ("compression.zstd", "ZstdError"),
                         ("zstandard", "ZstdError")):  # fmt: skip
        found = sys.modules.get(module)
        if found is not None and hasattr(found, name):
            errors.append(getattr(found, name))
    return tuple(errors)


@dataclass(frozen=True)
class Source:
    """One FASTA text open for reading: the user's file, or a nameless spooled copy of compressed or piped input."""

    path: str
    file: IO[bytes]
    size: int
    mtime_ns: int
    base: int  # offset of this text in the concatenation of all sources

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that inherits the descriptor, under its number."""
        return _inherited, (self.path, self.file.fileno(), self.size, self.mtime_ns, self.base)

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size) of this text. Raises UserError if the file has shrunk meanwhile."""
        data = os.pread(self.file.fileno(), size, start)
        while len(data) < size:
            more = os.pread(self.file.fileno(), size - len(data), start + len(data))
            if not more:
                raise self.changed()
            data += more
        return data

    def check_unchanged(self) -> None:
        now = os.fstat(self.file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.changed()

    def changed(self) -> UserError:
        return UserError(
            f"{self.path} was changed while it was being read.",
            "Run again on a file that nothing else writes to; results of the old content are not mixed with the new.",
        )


def _inherited(path: str, fd: int, size: int, mtime_ns: int, base: int) -> Source:
    return Source(path, os.fdopen(fd, "rb"), size, mtime_ns, base)


class _Stretch(NamedTuple):
    """Bytes [start, stop) of a source, in memory."""

    source: Source | None
    start: int
    stop: int
    text: bytes


NOTHING = _Stretch(None, 0, 0, b"")


@dataclass
class RecordTable:
    """What is known of N records, in input order.

    offset: int64 [N], of each `>` in the concatenated sources; length: int32 [N], residues after white space and one
    trailing `*` are dropped; replaced: int32 [N], residues outside the alphabet;
    unique_of: int64 [N], the first record with the same residues (itself if none came before).
    """

    sources: list[Source]
    sha256: list[str]  # of each source's text
    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    replaced: NDArray[np.int32]
    unique_of: NDArray[np.int64]
    nucleotide_share: list[float]  # of each source's residues, how many are A, C, G, T, U or N
    digest: NDArray[np.uint64] | None = None  # [N, 2], hash of the residues, if it was asked for
    following: NDArray[np.int64] | None = None  # of a part of the input: offset of what comes after each record
    _near: _Stretch = field(default=NOTHING, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def residues(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    @property
    def text_bytes(self) -> int:
        """Of all these records."""
        if self.following is not None:
            return int((self.following - self.offset).sum())
        return sum(source.size for source in self.sources)

    def part(self, records: NDArray[np.int64]) -> "RecordTable":
        """The table of some records (rising numbers), with the first of each set of equal ones among them."""
        first = np.searchsorted(records, self.unique_of[records])
        return RecordTable(
            self.sources, self.sha256, self.offset[records], self.length[records], self.replaced[records], first,
            self.nucleotide_share, None if self.digest is None else self.digest[records], self._following(records),
        )  # fmt: skip

    def _following(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the text of each record ends, in the concatenated sources; not past the end of its own."""
        if self.following is not None:
            return self.following[records]
        last = len(self) - 1
        return np.where(
            records < last, self.offset[np.minimum(records + 1, last)], self.sources[-1].base + self.sources[-1].size
        )

    def _spans(self, records: NDArray[np.int64]) -> list[tuple[Source, int, int]]:
        """Source, offset in it and size of the text (header included) of each record."""
        bases = np.asarray([source.base for source in self.sources], np.int64)
        ends = np.asarray([source.base + source.size for source in self.sources], np.int64)
        which = np.searchsorted(bases, self.offset[records], side="right") - 1
        start = self.offset[records]
        size = np.minimum(self._following(records), ends[which]) - start
        return [
            (self.sources[w], at, n)
            for w, at, n in zip(which.tolist(), (start - bases[which]).tolist(), size.tolist(), strict=True)
        ]

    def tokens(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Token ids of all residues, one record behind the other, without `<cls>` and `<eos>`: `length` of each."""
        text, start = self._text(records)
        end = np.append(start[1:], len(text))
        newline = np.append(np.flatnonzero(text == NEWLINE), len(text))
        step = np.zeros(len(text) + 1, np.int8)
        step[start] += 1
        step[np.minimum(newline[np.searchsorted(newline, start)], end)] -= 1  # where the header ends
        codes = TOKENS_OR_SPACE[text]
        codes[np.cumsum(step[:-1], dtype=np.int8) > 0] = alphabet.SPACE
        if (codes == alphabet.LESS).any():  # a `<mask>`, perhaps: many bytes for one token
            return np.frombuffer(b"".join(self.token_ids(records)), np.uint8)
        kept = codes != alphabet.SPACE
        count = np.cumsum(kept, dtype=np.int32)
        before, after = count[start] - kept[start], count[end - 1]
        length = self.length[records]
        if (after - before < length).any():
            raise self._spans(records[after - before < length][:1])[0][0].changed()
        if (after - before > length).any():  # a trailing `*`
            kept &= count <= np.repeat(before + length, end - start)
        return codes[kept]

    def token_ids(self, records: NDArray[np.int64]) -> list[bytes]:
        """The same, of each record."""
        found = []
        for (source, at, size), length in zip(self._spans(records), self.length[records].tolist(), strict=True):
            text = source.read(at, size)
            ids = alphabet.token_ids(text[text.find(b"\n") + 1 :], length) if length else b""
            if len(ids) != length:
                raise source.changed()
            found.append(ids)
        return found

    def letters(self, records: NDArray[np.int64]) -> Iterator[bytes]:
        """The sequence of each record as it stands, but for case: upper; without white space and a trailing `*`."""
        for (source, at, size), length in zip(self._spans(records), self.length[records].tolist(), strict=True):
            text = source.read(at, size)
            yield text[text.find(b"\n") + 1 :].translate(None, alphabet.WHITE_SPACE).upper()[:length] if length else b""

    def _text(self, records: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The text of the records, headers included, one behind the other, and where each begins."""
        spans, near = self._spans(records), self._around(records)
        if near.source is not None:
            pieces = [near.text[at - near.start : at - near.start + size] for _, at, size in spans]
        else:
            pieces = [source.read(at, size) for source, at, size in spans]
        sizes = [size for _, _, size in spans]
        return np.frombuffer(b"".join(pieces), np.uint8), np.append(0, np.cumsum(sizes[:-1], dtype=np.int64))

    def _around(self, records: NDArray[np.int64]) -> _Stretch:
        """The text from the first to the last of these records, if that is not too much: between them lie those of the packs
        to come, and one read for all of them is cheaper than one for each."""
        if len(records) < FEWEST_AHEAD:
            return NOTHING
        (source, start, _), (other, last, size) = self._spans(np.asarray([records.min(), records.max()]))
        stop = last + size
        if source is not other or stop - start > MOST_AHEAD:
            return NOTHING
        if source is not self._near.source or start < self._near.start or stop > self._near.stop:
            start, stop = start // AHEAD * AHEAD, min(-(-stop // AHEAD) * AHEAD, source.size)
            self._near = NOTHING  # let go of the old before the new is read
            self._near = _Stretch(source, start, stop, source.read(start, stop - start))
        return self._near

    def names(self, start: int, stop: int, full: bool = False) -> list[str]:
        """Names of the records [start, stop): the header up to the first white space, or all of it.

        Bytes that are not UTF-8 come out as backslash escapes.
        """
        names: list[str] = []
        while start < stop:
            ((source, first, _),) = self._spans(np.asarray([start]))
            beyond = int(np.searchsorted(self.offset, source.base + min(first + 4 * READ_BYTES, source.size)))
            upto = max(start + 1, min(stop, beyond))
            ((_, last, size),) = self._spans(np.asarray([upto - 1]))
            text = source.read(first, last + min(size, READ_BYTES) - first)
            for at in (self.offset[start:upto] - (source.base + first)).tolist():
                newline = text.find(b"\n", at)
                if newline < 0:  # the last header is longer than what was read of its record
                    text = source.read(first, last + size - first)
                    newline = text.find(b"\n", at)
                header = text[at + 1 : newline] if newline >= 0 else text[at + 1 :]
                word = header.strip() if full else b"".join(header.split(None, 1)[:1])
                names.append(word.decode("utf-8", "backslashreplace"))
            start = upto
        return names

    def sequences(self, start: int, stop: int) -> Iterator[bytes]:
        """The residues of the records [start, stop) as they stand in the file, without white space."""
        step = 1024
        for first in range(start, stop, step):
            text, begin = self._text(np.arange(first, min(first + step, stop)))
            whole = text.tobytes()
            for a, b in itertools.pairwise([*begin.tolist(), len(whole)]):
                header = whole.find(b"\n", a, b)
                yield whole[header + 1 : b].translate(None, alphabet.WHITE_SPACE) if header >= 0 else b""

    def check_unchanged(self) -> None:
        for source in self.sources:
            source.check_unchanged()


def open_sources(inputs: Sequence[str], spool_dir: Path) -> list[Source]:
    """Open FASTA files, plain or compressed (gz, bz2, xz, zst; by content), or `-` for standard input.

    What is not a plain file is first spooled to a nameless file in `spool_dir`, which vanishes with the process.
    """
    sources: list[Source] = []
    base = 0
    for name in inputs:
        file = _open_plain(name, spool_dir)
        status = os.fstat(file.fileno())
        source = Source("standard input" if name == "-" else name, file, status.st_size, status.st_mtime_ns, base)
        _check_is_fasta(source)
        sources.append(source)
        base += source.size
    return sources


def refuse_unreadable(paths: Sequence[str]) -> None:
    """Read FASTA files once by the rules of the index, for its error messages. Raises UserError; pipes are refused."""
    for path in paths:
        if path == "-" or (os.path.exists(path) and not os.path.isfile(path)):
            raise UserError(f"{path} can be read only once, and here it is read again.", "Save it to a file first.")
    with tempfile.TemporaryDirectory() as folder:
        index(open_sources(paths, Path(folder)), dedup=False)


def _open_plain(name: str, spool_dir: Path) -> IO[bytes]:
    try:
        if name == "-" and sys.stdin is None:
            raise UserError("Standard input is closed.", "Pipe a FASTA into it, or name a file.")
        file: IO[bytes] = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115 (the table reads it later)
    except IsADirectoryError:
        raise UserError(
            f"{name} is a directory.", "Name the FASTA files in it, for example with a shell wildcard."
        ) from None
    except FileNotFoundError:
        raise UserError(f"There is no file {name}.", f"Paths are relative to {Path.cwd()}.") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None
    if name == "-" or not os.path.isfile(name):  # pipes, process substitution
        file = _spool(file, name, spool_dir)
    magic = file.read(6)
    file.seek(0)
    return _spool(_decompressed(file), name, spool_dir) if magic.startswith(COMPRESSED_MAGIC) else file


def _decompressed(file: IO[bytes]) -> Any:
    return xopen(file, "rb", threads=0)


def _spool(stream: Any, name: str, spool_dir: Path) -> IO[bytes]:
    spool: Any = tempfile.TemporaryFile(dir=spool_dir)  # noqa: SIM115
    try:
        shutil.copyfileobj(stream, spool, READ_BYTES)
        spool.flush()
    except decoder_errors() as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(
                f"{name} cannot be spooled to {spool_dir}: {error.strerror}.",
                "Compressed and piped input needs room for its plain text beside the output.",
            ) from None
        raise UserError(
            f"{name} is damaged: its compressed data ends early or does not decode ({error}).",
            "Fetch or copy the file again and compare its checksum.",
        ) from None
    spool.seek(0)
    return spool


def _check_is_fasta(source: Source) -> None:
    head = os.pread(source.file.fileno(), HEAD_BYTES, 0)
    text = head.removeprefix(BOM).lstrip()
    at = len(head)
    while not text and at < source.size:
        more = source.read(at, min(1 << 16, source.size - at))
        at, text = at + len(more), more.lstrip()
    if text.startswith(b">") and b"\0" not in head:
        if b"\n" not in head and b"\r" in head:
            raise UserError(
                f"{source.path} has old Macintosh line ends (CR only).", "Convert it: tr '\\r' '\\n' < in > out"
            )
        return
    if source.size == 0 or not text:
        raise UserError(f"{source.path} is empty: it holds no FASTA record.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind, remedy = "UTF-16 text", "Save it as plain text or UTF-8."
    elif b"\0" in head:
        kind, remedy = "a binary file", "Give a FASTA text file; gz, bz2, xz and zst compression are recognised."
    elif text.startswith(b"@"):
        kind, remedy = (
            "FASTQ (it starts with '@')",
            "Reads must be translated to proteins first, e.g. with Prodigal or FragGeneScan.",
        )
    elif text[:1] == b"<":
        kind, remedy = (
            "an HTML or XML page, perhaps a failed download",
            "Look at its first lines and download the file again.",
        )
    else:
        shown = text.splitlines()[0][:40].decode("utf-8", "replace")
        kind, remedy = f"not FASTA (it starts with {shown!r})", "The first record must start with a '>' line."
    raise UserError(f"{source.path} is {kind}.", remedy)


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
                raise _invalid_residue(source, at + int(part.offset[np.flatnonzero(part.replaced)[0]]))
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
    carried, at, position, want = b"", start, start, READ_BYTES
    while position < source.size:
        fresh = source.read(position, min(want, source.size - position))
        sha.update(fresh)
        position += len(fresh)
        nul = fresh.find(b"\0")
        if nul >= 0:
            line = _line_number(source, position - len(fresh) + nul)
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
        carried, at, want = buffer[cut:], at + cut, READ_BYTES


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
        line = _line_number(source, at)
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


def _line_number(source: Source, offset: int) -> int:
    """1-based number of the line that holds the byte at `offset`."""
    line, at = 1, 0
    while at < offset:
        size = min(READ_BYTES, offset - at)
        line += source.read(at, size).count(b"\n")
        at += size
    return line


_MASK_IN_TEXT = re.compile(rb"\s*".join(re.escape(bytes([c])) for c in b"<mask>"), re.IGNORECASE)


def _invalid_residue(source: Source, offset: int) -> UserError:
    line = _line_number(source, offset)
    source.file.seek(offset)
    header = source.file.readline()
    name = b"".join(header[1:].split(None, 1)[:1]).decode("utf-8", "backslashreplace")
    pending_star = None
    lines = itertools.takewhile(lambda text: not text.startswith(b">"), iter(source.file.readline, b""))
    record = _MASK_IN_TEXT.sub(lambda mask: re.sub(rb"\S", b"X", mask[0]), b"".join(lines))
    for text in record.split(b"\n"):
        line += 1
        for column, code in enumerate(text.translate(alphabet.CODES), start=1):
            if code == alphabet.SPACE:
                continue
            if pending_star is not None:  # a star that turned out not to be the last residue
                line, column, shown = pending_star
                return _not_a_residue(source, name, line, column, shown)
            if code == alphabet.STAR:
                pending_star = (line, column, "*")
            elif code >= alphabet.INVALID:
                return _not_a_residue(source, name, line, column, text[column - 1 :][:1].decode("latin-1"))
    raise AssertionError("an invalid residue was counted but not found; this is a bug")


def _not_a_residue(source: Source, name: str, line: int, column: int, shown: str) -> UserError:
    return UserError(
        f"{source.path}: record {name!r}, line {line}, column {column}: {shown!r} is not a residue.",
        "Correct the file, or use --invalid x (embed such residues as X) or --invalid skip.",
    )


def by_name(path: str | Path) -> Any:
    """Random access by name to a plain FASTA file: a `pyfaidx.Fasta` (which writes an index beside the file)."""
    import pyfaidx

    return pyfaidx.Fasta(str(path), as_raw=True, sequence_always_upper=True, duplicate_action="first")


def write_texts(path: Path, texts: list[bytes]) -> Path:
    """A FASTA of sequence texts as they stand, named by their numbers."""
    with open(path, "wb") as file:
        for number, text in enumerate(texts):
            file.write(b">%d\n%s\n" % (number, text.rstrip(b"\r\n")))
    return path
