"""How well two sets of vectors agree. Plain NumPy in float64; a row is compared with the row of the same number."""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating]
Float64 = NDArray[np.float64]


def relative_l2(ours: Rows, expected: Rows) -> Float64:
    """`|ours - expected| / |expected|` of rows [n, D], float64 [n]; over zeros, 0 for zeros, else infinity."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return _or_zero(np.linalg.norm(ours - expected, axis=-1), np.linalg.norm(expected, axis=-1))


def cosine(ours: Rows, expected: Rows, centre: Rows | float = 0.0) -> Float64:
    """Cosine of each pair of rows [n, D], float64 [n], after `centre` is taken from both; 1 where both are zero."""
    a, b = np.asarray(ours, np.float64) - centre, np.asarray(expected, np.float64) - centre
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norms == 0, (a == b).all(axis=-1).astype(np.float64), (a * b).sum(axis=-1) / norms)


def max_over_rms(ours: Rows, expected: Rows) -> Float64:
    """Largest absolute error of each row [n, D] over the root mean square of the expected row, float64 [n]."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return _or_zero(np.abs(ours - expected).max(axis=-1), np.sqrt((expected**2).mean(axis=-1)))


def _or_zero(error: Float64, size: Float64) -> Float64:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / size)


def bias(ours: Rows, expected: Rows) -> float:
    """Norm of the mean error vector over the root mean square norm of the expected rows, float32 [n, D].

    Rounding errors cancel in the mean over many rows; a wrong formula leaves its mark.
    """
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    error = (ours - expected).mean(axis=0)
    return float(np.linalg.norm(error) / np.sqrt((expected**2).sum(axis=-1).mean()))


def neighbours_kept(ours: Rows, expected: Rows, k: int) -> float:
    """Share of the k nearest neighbours by cosine of each expected row, float32 [n, D], that `ours` keeps."""

    def nearest(rows: Rows) -> NDArray[np.int64]:
        unit = np.asarray(rows, np.float64)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        return np.argsort(-similarity, axis=1, kind="stable")[:, :k]

    pairs = zip(nearest(ours), nearest(expected), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in pairs]))
