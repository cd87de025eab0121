"""Rows onto a plane: principal components (NumPy), and UMAP or t-SNE of the first of them (extra `maps`)."""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError, install_command, needs
from virnucpro_cli.explore.default_rows import Pooled

COMPONENTS = 50
"""Principal components that UMAP and t-SNE start from; what follows is mostly noise, and distances come sooner."""
NEIGHBOURS, PERPLEXITY = 15, 30
"""The defaults of umap-learn and of openTSNE."""
FEWEST_NEIGHBOURS = NEIGHBOURS + 1
"""Proteins of which there can be a map by neighbours."""


@dataclass(frozen=True)
class Projection:
    """points: float64 [n, 2]; what: the method in words; axes: what x and y are, for PCA, whose axes mean something."""

    points: NDArray[np.float64]
    what: str
    axes: tuple[str, ...] = ()


def chosen(method: str | None, n: int) -> tuple[str, str]:
    """The method, and why it is not UMAP if nobody chose. Raises UserError if the one named cannot be done."""
    if method in ("umap", "tsne"):
        needs("umap" if method == "umap" else "openTSNE", "maps", f"--method {method}")
        if n < FEWEST_NEIGHBOURS:
            raise UserError(f"--method {method} needs {FEWEST_NEIGHBOURS} proteins or more.", "--method pca")
    if method is not None:
        return method, ""
    if find_spec("umap") is None:
        return "pca", f"PCA, for UMAP is not installed: {install_command('maps')}"
    if n < FEWEST_NEIGHBOURS:
        return "pca", f"PCA, for UMAP needs {FEWEST_NEIGHBOURS} proteins or more"
    return "umap", ""


def project(data: Pooled, method: str, seed: int) -> Projection:
    """The rows of `data` by pca, umap or tsne; the same points for the same rows, seed and library versions."""
    if method == "pca":
        points, shares = pca(data, 2)
        axes = (f"PC{i} ({share:.1%} of the variance)" for i, share in enumerate(shares, start=1))
        return Projection(points, "PCA of centred rows", tuple(axes))
    near, shares = pca(data, COMPONENTS)
    perplexity = min(PERPLEXITY, (len(near) - 1) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "umap":
            import umap

            how = f"UMAP ({NEIGHBOURS} neighbours, Euclidean, seed {seed})"
            reducer = umap.UMAP(n_neighbors=NEIGHBOURS, init="pca", random_state=seed, n_jobs=1)
            points = reducer.fit_transform(near.astype(np.float32))
        else:
            from openTSNE import TSNE

            how = f"t-SNE (perplexity {perplexity:.3g}, seed {seed})"
            points = TSNE(perplexity=perplexity, random_state=seed).fit(near)
    what = (
        f"{how} of the first {len(shares)} principal components of centred rows ({sum(shares):.0%} of the variance); "
        "distances between clusters mean little"
    )
    return Projection(np.asarray(points, np.float64), what)


def pca(data: Pooled, most: int) -> tuple[NDArray[np.float64], list[float]]:
    """Centred rows on their first c <= `most` principal components, float64 [n, c], and the variance share of each.

    A component's sign is such that its largest loading is positive.
    """
    mean = data.mean()
    covariance = np.zeros((len(mean), len(mean)))
    for _, values in data.blocks():
        centred = values - mean
        covariance += centred.T @ centred
    variances, loadings = np.linalg.eigh(covariance)
    variances, loadings = np.maximum(variances[::-1], 0), loadings[:, ::-1]
    count = max(2, min(most, len(data) - 1, len(mean)))
    loadings = loadings[:, :count]
    loadings = loadings * np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(count)])
    points = np.concatenate([(values - mean) @ loadings for _, values in data.blocks()])
    return points, (variances[:count] / max(variances.sum(), np.finfo(float).tiny)).tolist()
