"""Checksums of records: a run that goes on from another's rows compares them with these first.

A record's checksum is the sum of digests: of its row in each dataset, and of its status, flags, reason and environment.
Sums are modulo 2^64, so that rows may come in any order. Everything is computed for many rows at once.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cache
from math import gcd
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from virnucpro_cli.store.schema import MOST_ENVIRONMENTS

BLOCK = 1 << 24
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@cache
def _weights(name: str, count: int) -> NDArray[np.uint64]:
    """Odd numbers that nobody chose, the same ones in every run."""
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(8 * count), np.uint64) | np.uint64(1)


def of_rows(name: str, values: NDArray[Any]) -> NDArray[np.uint64]:
    """Digests uint64 [n] of rows [n, ...] of the dataset `name`, of any dtype: each word times an odd number."""
    if not values.nbytes:
        return np.zeros(len(values), np.uint64)
    data = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    words = data.view(f"u{gcd(data.shape[1], 4)}")
    return np.einsum("ij,j->i", words, _weights(name, words.shape[1]))


def of_records(rows: NDArray[np.int64], digests: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Digests uint64 [m] of records of `counts` rows (int64 [m]) each, from those of their rows and where these lie.

    rows: int64 [n]; digests: uint64 [n].
    """
    place = (rows.astype(np.uint64) + np.uint64(1)) * GOLDEN
    whole = np.append(np.uint64(0), np.cumsum(digests * ((place ^ (place >> np.uint64(29))) | np.uint64(1))))
    ends = np.cumsum(counts)
    return whole[ends] - whole[ends - counts]


def of_states(columns: Sequence[NDArray[Any]], environments: list[str]) -> NDArray[np.uint64]:
    """Digests uint64 [n] of status, flags, reason and computed_by, [n] each: the last are numbers of environments."""
    lines = np.zeros(MOST_ENVIRONMENTS + 1, np.uint64)
    digests = [xxhash.xxh3_64_intdigest(line.encode()) for line in environments]
    lines[: len(digests)] = np.array(digests, np.uint64)
    states = np.stack([*(each.astype(np.uint64) for each in columns[:-1]), lines[columns[-1]]])
    return np.einsum("ji,j->i", states, _weights("state", len(states))) ^ GOLDEN


def of_the_rest(fd: int, changing: Iterable[tuple[int, int]]) -> bytes:
    """XXH3, in hex, of a file but for the (offset, bytes) that change while it is filled."""
    hasher, at = xxhash.xxh3_128(), 0
    for start, size in [*sorted(changing), (os.fstat(fd).st_size, 0)]:
        while at < start and (data := os.pread(fd, min(BLOCK, start - at), at)):
            hasher.update(data)
            at += len(data)
        at = start + size
    return hasher.hexdigest().encode()
