"""The record table: what is known of every record, and its name, tokens or text when they are asked for."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import alphabet
from virnucpro_cli.fasta import reading
from virnucpro_cli.fasta.reading import Source
from virnucpro_cli.texts import Texts, names_in, ranges

AHEAD, MOST_AHEAD, FEWEST_AHEAD = 1 << 23, 1 << 27, 32  # bytes, bytes, records
AT_ONCE = 1024
NEWLINE = ord("\n")


def let_go(mapped: mmap.mmap) -> None:
    """Have pages of a file no longer count as memory of this process. They are mapped again where they are read."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


@dataclass
class RecordTable:
    """The facts of N records, in input order.

    offset: int64 [N], of each `>` in the concatenated sources; length: int32 [N], residues after white space and one
    trailing `*` are dropped; replaced: int32 [N], residues outside the alphabet; gaps: int32 [N]; unique_of: int64 [N],
    the first record with the same residues (itself if none came before). read_as: how gaps are read.
    nucleotide_like: int64, numbers of records that look like nucleotides; of the whole input only.
    """

    sources: list[Source]
    sha256: list[str]  # of each source's text
    offset: NDArray[np.int64]
    length: NDArray[np.int32]
    replaced: NDArray[np.int32]
    unique_of: NDArray[np.int64]
    nucleotide_share: list[float]  # of each source's letters, without gaps and X
    digest: NDArray[np.uint64] | None = None  # [N, 2], hash of the residues, if it was asked for
    following: NDArray[np.int64] | None = None  # of a part of the input: offset of what comes after each record
    read_as: alphabet.Letters = alphabet.KEEP
    gaps: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    nucleotide_like: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _near: tuple[Source | None, int, bytes] = field(default=(None, 0, b""), init=False, repr=False)

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def residues(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Tokens of each record, without the first and the last: int32 [N]. A letter is a token here."""
        return self.length

    def unit(self, letter: str) -> str:
        """The word for what `sizes` and --max-residues count: that for a letter, or token."""
        return letter

    @property
    def reading(self) -> alphabet.Reading:
        return self.read_as.reading

    @property
    def text_bytes(self) -> int:
        """The facts of all these records together."""
        if self.following is not None:
            return int((self.following - self.offset).sum())
        return sum(source.size for source in self.sources)

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Path, bytes and sha256 of each source, as a file records them."""
        return [
            {"path": source.path, "bytes": source.size, "sha256": sha256}
            for source, sha256 in zip(self.sources, self.sha256, strict=True)
        ]

    def check_unchanged(self) -> None:
        for source, sha256 in zip(self.sources, self.sha256, strict=True):
            source.check_unchanged(sha256)

    def let_go(self) -> None:
        """Have columns that a kept index holds no longer count as memory of this process, until they are read again."""
        base: Any = self.offset
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap) and base.readonly:
            let_go(base.obj)

    def part(self, records: NDArray[np.int64]) -> "RecordTable":
        """The table of some records (rising numbers, int64 [n]), with the first of each set of equal ones among them.

        The first of a set in the whole table may lie outside of `records`.
        """
        _, index, inverse = np.unique(self.unique_of[records], return_index=True, return_inverse=True)
        return RecordTable(
            self.sources, self.sha256, self.offset[records], self.length[records], self.replaced[records],
            index[inverse], self.nucleotide_share, None if self.digest is None else self.digest[records],
            self._following(records), self.read_as, self.gaps[records],
        )  # fmt: skip

    def tokens(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Token ids of all residues of int64 [n] records, one record behind the other: uint8 [sum of their lengths].

        There is no `<cls>` and no `<eos>`. Raises UserError if the file has changed.
        """
        text, sizes = self._joined(records)
        end = np.cumsum(sizes)
        start = end - sizes
        newline = np.append(np.flatnonzero(text == NEWLINE), len(text))
        header = np.minimum(newline[np.searchsorted(newline, start)], end) - start
        codes = np.frombuffer(text.tobytes().translate(self.read_as.text), np.uint8)
        kept = np.repeat(np.tile([False, True], len(sizes)), np.stack((header, sizes - header), axis=1).ravel())
        kept &= codes != alphabet.SPACE
        if (codes == alphabet.LESS).any() and (codes[kept] == alphabet.LESS).any():
            # a `<mask>`, perhaps: many bytes for one token
            return np.frombuffer(b"".join(self.token_ids(records)), np.uint8)
        count = np.cumsum(kept, dtype=np.int32)
        before, after = count[start] - kept[start], count[end - 1]
        length = self.length[records]
        if (after - before < length).any():
            raise self._spans(records[after - before < length])[0][0].changed()
        if (after - before > length).any():  # a trailing `*`
            kept &= count <= np.repeat(before + length, end - start)
        return codes[kept]

    def token_ids(self, records: NDArray[np.int64]) -> list[bytes]:
        """The same, uint8 bytes of each of int64 [n] records."""
        lengths = self.length[records].tolist()
        ids = [
            alphabet.token_ids(body, length, self.read_as)
            for body, length in zip(self._bodies(records), lengths, strict=True)
        ]
        for (source, *_), each, length in zip(self._spans(records), ids, lengths, strict=True):
            if len(each) != length:
                raise source.changed()
        return ids

    def letters(self, records: NDArray[np.int64]) -> Iterator[bytes]:
        """Upper-case sequences of int64 [n] records, uint8 bytes, without white space and a trailing `*`."""
        for body, length in zip(self._bodies(records), self.length[records].tolist(), strict=True):
            yield body.translate(None, self.read_as.dropped).upper()[:length]

    def sequences(self, start: int, stop: int) -> Iterator[bytes]:
        """The residues of the records [start, stop) as they stand in the file, without white space."""
        for first in range(start, stop, AT_ONCE):
            for body in self._bodies(np.arange(first, min(first + AT_ONCE, stop))):
                yield body.translate(None, self.read_as.dropped)

    def _bodies(self, records: NDArray[np.int64]) -> Iterator[bytes]:
        """The text of each record behind its header."""
        return (text.partition(b"\n")[2] for text in self._texts(records))

    def _texts(self, records: NDArray[np.int64]) -> Iterator[bytes]:
        """The text of each record, header included."""
        if (near := self._near_to(records)) is None:
            yield from (source.read(at, size) for source, at, size in self._spans(records))
            return
        text, start, sizes = near
        yield from (text[at : at + size] for at, size in zip(start.tolist(), sizes.tolist(), strict=True))

    def _joined(self, records: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The same, one behind the other, uint8 [bytes of all], and the bytes of each, int64 [n]."""
        if (near := self._near_to(records)) is None:
            texts = list(self._texts(records))
            return np.frombuffer(b"".join(texts), np.uint8), np.array(list(map(len, texts)), np.int64)
        text, start, sizes = near
        return np.frombuffer(text, np.uint8).take(ranges(start, sizes), mode="clip"), sizes

    def _near_to(self, records: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64]] | None:
        """A text that holds those of many records that lie near each other, with start and size of each, int64 [n].

        Between the first and the last of a pack's records lie those of packs to come: one read is cheaper than many.
        """
        if len(records) < FEWEST_AHEAD:
            return None
        which, start, sizes = self._places(records)
        first, last = records.argmin(), records.argmax()
        begin, end = int(start[first]), int(start[last] + sizes[last])
        if which[first] != which[last] or end - begin > MOST_AHEAD:
            return None
        near, text = self._around(self.sources[which[first]], begin, end)
        return text, start - near, sizes

    def _around(self, source: Source, start: int, stop: int) -> tuple[int, bytes]:
        """Bytes [start, stop) of a source and some more, and where they begin."""
        near, begin, text = self._near
        if source is not near or start < begin or stop > begin + len(text):
            begin, stop = start // AHEAD * AHEAD, min(-(-stop // AHEAD) * AHEAD, source.size)
            self._near = (None, 0, text := b"")  # let go of the old before the new is read
            text = source.read(begin, stop - begin)
            self._near = (source, begin, text)
        return begin, text

    def _following(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the text of each record ends, in the concatenated sources; not past the end of its own."""
        if self.following is not None:
            return self.following[records]
        last = len(self) - 1
        end = self.sources[-1].base + self.sources[-1].size
        return np.where(records < last, self.offset[np.minimum(records + 1, last)], end)

    def _spans(self, records: NDArray[np.int64]) -> list[tuple[Source, int, int]]:
        """Source, offset in it and size of the text (header included) of each record."""
        which, start, sizes = self._places(records)
        sources = map(self.sources.__getitem__, which.tolist())
        return list(zip(sources, start.tolist(), sizes.tolist(), strict=True))

    def _places(self, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The same with the number of the source, int64 [n] each."""
        bases = np.array([source.base for source in self.sources], np.int64)
        start = self.offset[records]
        which = np.searchsorted(bases, start, side="right") - 1
        ends = bases + [source.size for source in self.sources]
        return which, start - bases[which], np.minimum(self._following(records), ends[which]) - start

    def names(self, start: int, stop: int, full: bool = False) -> list[str]:
        """Names of the records [start, stop): the header up to the first white space, or all of it.

        Bytes that are not UTF-8 come out as backslash escapes.
        """
        return self.name_texts(start, stop, full).strings()

    def name_texts(self, start: int, stop: int, full: bool = False) -> Texts:
        """The same, packed."""
        names: list[Texts] = []
        while start < stop:
            ((source, first, _),) = self._spans(np.array([start]))
            beyond = int(np.searchsorted(self.offset, source.base + min(first + 4 * reading.READ_BYTES, source.size)))
            upto = max(start + 1, min(stop, beyond))
            ((_, last, size),) = self._spans(np.array([upto - 1]))
            text = source.read(first, last + min(size, reading.READ_BYTES) - first)
            if text.find(b"\n", last - first) < 0:  # the last header is longer than what was read of its record
                text = source.read(first, last + size - first)
            names.append(names_in(text, self.offset[start:upto] - (source.base + first), full))
            start = upto
        return Texts.joined(names or [Texts.of([])])

    def examples(self, full: bool) -> str:
        """The first names of the records, for a message."""
        return ", ".join(map(repr, self.names(0, min(3, len(self)), full)))
