"""Many short texts as bytes, without an object of Python for each; names of records among them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

WORD, MOST_WORDS = 8, 32
"""Bytes of a word; words of a text that are hashed with those of others, at most."""
WHITE = b" \t\n\r\v\f"
_IS_WHITE = np.isin(np.arange(256), list(WHITE))
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(WORD + 1)], np.uint64)
_NOT_ASCII = np.uint64(0x8080808080808080)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def ranges(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`first[i], first[i] + 1, ...`, counts[i] of them, one range behind the other: int64 [sum of counts]."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


class Texts(NamedTuple):
    """n texts in UTF-8, one behind the other. words: uint64 [W], each text filled up to whole words with zeros.

    lengths: int64 [n], bytes of each.
    """

    words: NDArray[np.uint64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> "Texts":
        """The same texts, packed."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        return cls(np.frombuffer(b"".join(text + bytes(-len(text) % WORD) for text in texts), np.uint64), lengths)

    @classmethod
    def joined(cls, several: "Sequence[Texts]") -> "Texts":
        """The texts of each, one behind the other. several: at least one."""
        words, lengths = zip(*several, strict=True)
        return cls(np.concatenate(words), np.concatenate(lengths))

    def take(self, order: NDArray[np.int64]) -> "Texts":
        """The texts of these numbers (int64 [m]), in their order."""
        return Texts(self.words[ranges(self.starts[order], self.counts[order])], self.lengths[order])

    def padded(self) -> "Texts":
        """The same texts, whose last words may be filled up with anything."""
        part = np.flatnonzero(self.lengths % WORD)
        self.words[(self.starts + self.counts)[part] - 1] &= _FIRST_BYTES[self.lengths[part] % WORD]
        return self

    @property
    def counts(self) -> NDArray[np.int64]:
        """Words of each text, int64 [n]."""
        return -(-self.lengths // WORD)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each text begins, in words, int64 [n]."""
        return np.cumsum(self.counts) - self.counts

    def strings(self) -> list[str]:
        """The same texts, each a string."""
        data, first = self.words.tobytes(), self.starts * WORD
        return [data[a:b].decode() for a, b in zip(first.tolist(), (first + self.lengths).tolist(), strict=True)]

    def hashes(self) -> NDArray[np.uint64]:
        """A hash of 64 bits for each text, uint64 [n]: the first words of all texts, then the second ones, and on."""
        hashes, starts, counts = self.lengths.astype(np.uint64) * _MIX, self.starts, self.counts
        which = np.flatnonzero(counts)
        for k in range(min(MOST_WORDS, int(counts.max(initial=0)))):
            mixed = (hashes[which] ^ self.words[starts[which] + k]) * _MIX
            hashes[which] = mixed ^ (mixed >> np.uint64(29))
            which = which[counts[which] > k + 1]
        for i in which.tolist():
            hashes[i] ^= np.uint64(xxhash.xxh3_64_intdigest(self.words[starts[i] : starts[i] + counts[i]].tobytes()))
        return hashes


def names_in(text: bytes, at: NDArray[np.int64], full: bool) -> Texts:
    """Names of n records by the places of their `>`, int64 [n]: the header up to the first white space, or all of it.

    Bytes that are not UTF-8 come out as backslash escapes.
    """
    letters = np.frombuffer(text, np.uint8)
    stops = np.flatnonzero(letters == ord("\n") if full else letters <= ord(" "))
    stops = stops if full else stops[_IS_WHITE[letters[stops]]]
    begin, stops = at + 1, np.append(stops, len(text))
    end = stops[np.searchsorted(stops, begin)]
    lengths = end - begin
    counts = -(-lengths // WORD)
    within = ranges(np.zeros(len(counts), np.int64), counts) * WORD
    from_each_byte = np.ndarray(len(text) + 1, np.uint64, text + bytes(WORD), strides=(1,))
    words = from_each_byte[np.repeat(begin, counts) + within]
    words &= _FIRST_BYTES[np.minimum(np.repeat(lengths, counts) - within, WORD)]
    odd = lengths == 0
    if full:
        odd |= _IS_WHITE[letters[np.minimum(begin, len(text) - 1)]] | _IS_WHITE[letters[end - 1]]
    odd[np.repeat(np.arange(len(counts)), counts)[(words & _NOT_ASCII) != 0]] = True
    if not odd.any():
        return Texts(words, lengths)
    names = [text[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    for i in np.flatnonzero(odd).tolist():
        names[i] = _exact(text, int(begin[i]), full)
    return Texts.of(names)


def _exact(text: bytes, begin: int, full: bool) -> bytes:
    """The name in a header that may hold white space before or behind it, or bytes that are not UTF-8."""
    newline = text.find(b"\n", begin)
    header = text[begin:] if newline < 0 else text[begin:newline]
    name = header.strip() if full else b"".join(header.split(None, 1)[:1])
    return name.decode("utf-8", "backslashreplace").encode()
