"""The record table: what is known of every record, and its name, tokens or text when they are asked for."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import alphabet
from virnucpro_cli.fasta import reading
from virnucpro_cli.fasta.reading import Source

AHEAD, MOST_AHEAD, FEWEST_AHEAD = 1 << 23, 1 << 27, 32  # bytes, bytes, records
NEWLINE = ord("\n")


@cache
def _tokens_or_space(letters: alphabet.Letters) -> NDArray[np.uint8]:
    pairs = zip(letters.codes, letters.ids, strict=True)
    return np.frombuffer(
        bytes(code if code in (alphabet.SPACE, alphabet.LESS) else token for code, token in pairs), np.uint8
    )


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
    unique_of: int64 [N], the first record with the same residues (itself if none came before). read_as: how gaps are read;
    gaps: int32 [N], how many there are. nucleotide_like: int64, numbers of records that look like nucleotides; of the whole input only.
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
        """The table of some records (rising numbers), with the first of each set of equal ones among them.

        The first of a set in the whole table may lie outside of `records`.
        """
        _, index, inverse = np.unique(self.unique_of[records], return_index=True, return_inverse=True)
        first = index[inverse]
        return RecordTable(
            self.sources, self.sha256, self.offset[records], self.length[records], self.replaced[records], first,
            self.nucleotide_share, None if self.digest is None else self.digest[records], self._following(records),
            self.read_as, self.gaps[records],
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
        codes = _tokens_or_space(self.read_as)[text]
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
            ids = alphabet.token_ids(text[text.find(b"\n") + 1 :], length, self.read_as) if length else b""
            if len(ids) != length:
                raise source.changed()
            found.append(ids)
        return found

    def letters(self, records: NDArray[np.int64]) -> Iterator[bytes]:
        """The sequence of each record as it stands, but for case: upper; without white space and a trailing `*`."""
        for (source, at, size), length in zip(self._spans(records), self.length[records].tolist(), strict=True):
            text = source.read(at, size)
            yield text[text.find(b"\n") + 1 :].translate(None, self.read_as.dropped).upper()[:length] if length else b""

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

    def examples(self, full: bool) -> str:
        """Its first names, for a message."""
        return ", ".join(map(repr, self.names(0, min(3, len(self)), full)))

    def names(self, start: int, stop: int, full: bool = False) -> list[str]:
        """Names of the records [start, stop): the header up to the first white space, or all of it.

        Bytes that are not UTF-8 come out as backslash escapes.
        """
        names: list[str] = []
        while start < stop:
            ((source, first, _),) = self._spans(np.asarray([start]))
            beyond = int(np.searchsorted(self.offset, source.base + min(first + 4 * reading.READ_BYTES, source.size)))
            upto = max(start + 1, min(stop, beyond))
            ((_, last, size),) = self._spans(np.asarray([upto - 1]))
            text = source.read(first, last + min(size, reading.READ_BYTES) - first)
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
                yield whole[header + 1 : b].translate(None, self.read_as.dropped) if header >= 0 else b""

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
