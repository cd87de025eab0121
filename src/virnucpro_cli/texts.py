"""Many short texts as bytes, without an object of Python for each; names of records among them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WHITE = b" \t\n\r\v\f"
_IS_WHITE, _IS_END = (bytes(byte in ends for byte in range(256)) for ends in (WHITE, b"\n"))
ASCII = 128
_MIX = np.uint64(0x9E3779B97F4A7C15)
_ENDS = np.array([(1 << 8 * count) - 1 for count in range(8)] + [(1 << 64) - 1], np.uint64)


def ranges(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """`first[i], first[i] + 1, ...`, counts[i] of them, one range behind the other: int64 [sum of counts]."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


class Texts(NamedTuple):
    """n texts in UTF-8, one behind the other. lengths: int64 [n], bytes of each."""

    text: bytes
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """The same texts, packed."""
        each = [text.encode("utf-8", "surrogateescape") for text in texts]
        return cls(b"".join(each), np.fromiter(map(len, each), np.int64, len(each)))

    @classmethod
    def joined(cls, several: "Sequence[Texts]") -> "Texts":
        """The texts of each, one behind the other."""
        lengths = np.concatenate([np.empty(0, np.int64), *(each.lengths for each in several)])
        return cls(b"".join(each.text for each in several), lengths)

    def strings(self) -> list[str]:
        """The same texts, each a string."""
        ends = np.cumsum(self.lengths)
        bounds = zip((ends - self.lengths).tolist(), ends.tolist(), strict=True)
        return [self.text[a:b].decode() for a, b in bounds]

    def hashes(self) -> NDArray[np.uint64]:
        """A hash of 64 bits for each text, uint64 [n]: eight bytes of all texts at a time."""
        words = np.ndarray(len(self.text) + 1, np.uint64, self.text + bytes(8), strides=(1,))  # one begins at each byte
        start, left = np.cumsum(self.lengths) - self.lengths, self.lengths
        hashes, which = self.lengths.astype(np.uint64) * _MIX, np.arange(len(left))
        while len(which):
            mixed = (hashes[which] ^ (words[start] & _ENDS[np.minimum(left, 8)])) * _MIX
            hashes[which] = mixed ^ (mixed >> np.uint64(29))
            longer = left > 8
            start, left, which = start[longer] + 8, left[longer] - 8, which[longer]
        return hashes


def names_in(text: bytes, at: NDArray[np.int64], full: bool) -> Texts:
    """Names of n records by the places of their `>`, int64 [n]: the header up to the first white space, or all of it.

    Bytes that are not UTF-8 come out as backslash escapes.
    """
    stops = np.flatnonzero(np.frombuffer(text.translate(_IS_END if full else _IS_WHITE), np.bool_))
    begin, stops = at + 1, np.append(stops, len(text))
    end = stops[np.searchsorted(stops, begin)]
    letters = np.frombuffer(text, np.uint8)
    found = Texts(letters[ranges(begin, end - begin)].tobytes(), end - begin)
    odd = begin == end
    if full:
        white = np.frombuffer(_IS_WHITE, np.bool_)
        odd |= white[letters[np.minimum(begin, len(text) - 1)]] | white[letters[end - 1]]
    if not found.text.isascii():
        where = np.flatnonzero(np.frombuffer(found.text, np.uint8) >= ASCII)
        odd[np.searchsorted(np.cumsum(found.lengths), where, side="right")] = True
    if not odd.any():
        return found
    names = [text[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    for i in np.flatnonzero(odd).tolist():
        names[i] = _exact(text, int(begin[i]), full)
    return Texts(b"".join(names), np.fromiter(map(len, names), np.int64, len(names)))


def _exact(text: bytes, begin: int, full: bool) -> bytes:
    """The name in a header that may hold white space before or behind it, or bytes that are not UTF-8."""
    newline = text.find(b"\n", begin)
    header = text[begin:] if newline < 0 else text[begin:newline]
    name = header.strip() if full else b"".join(header.split(None, 1)[:1])
    return name.decode("utf-8", "backslashreplace").encode()
