"""Rows onto a plane: principal components (NumPy), and UMAP or t-SNE of the first of them (extra `maps`)."""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError, install_command, needs
from virnucpro_cli.explore.default_rows import Pooled

METHODS = ("pca", "umap", "tsne")
COMPONENTS = 50
"""Principal components that UMAP and t-SNE start from; what follows is mostly noise, and distances come sooner."""
NEIGHBOURS, PERPLEXITY = 15, 30
"""The defaults of umap-learn and of openTSNE."""
FEWEST, FEWEST_NEIGHBOURS = 3, NEIGHBOURS + 1
"""Proteins of which there can be a map, and one by neighbours."""


@dataclass(frozen=True)
class Projection:
    """points: float64 [n, 2]; what: the method in words; axes: what x and y are, for PCA, whose axes mean something."""

    points: NDArray[np.float64]
    what: str
    axes: tuple[str, str] | None = None


def chosen(method: str | None, n: int) -> tuple[str, str]:
    """The method, and a word on why it is not UMAP if nobody chose. Raises UserError if the one named cannot be done."""
    if method is not None:
        if method not in METHODS:
            raise UserError(f"--method is {method!r}.", f"Choose one of {', '.join(METHODS)}.")
        if method != "pca":
            needs("umap" if method == "umap" else "openTSNE", "maps", f"--method {method}")
            if n < FEWEST_NEIGHBOURS:
                raise UserError(f"--method {method} needs {FEWEST_NEIGHBOURS} proteins or more.", "--method pca")
        return method, ""
    if find_spec("umap") is None:
        return "pca", f"PCA, for UMAP is not installed: {install_command('maps')}"
    if n < FEWEST_NEIGHBOURS:
        return "pca", f"PCA, for UMAP needs {FEWEST_NEIGHBOURS} proteins or more"
    return "umap", ""


def project(data: Pooled, method: str, seed: int) -> Projection:
    """The rows of `data` by a method of METHODS; the same points for the same rows, seed and library versions."""
    if method == "pca":
        points, shares = pca(data, 2)
        return Projection(points, "PCA of centred rows", tuple(f"PC{i + 1} ({share:.1%} of the variance)" for i, share in enumerate(shares)))  # type: ignore[arg-type]  # fmt: skip
    near, shares = pca(data, COMPONENTS)
    of = f"of the first {len(shares)} principal components of centred rows ({sum(shares):.0%} of the variance); distances between clusters mean little"
    if method == "umap":
        return Projection(_umap(near, seed), f"UMAP ({NEIGHBOURS} neighbours, Euclidean, seed {seed}) {of}")
    perplexity = min(PERPLEXITY, (len(near) - 1) / 3)
    return Projection(_tsne(near, perplexity, seed), f"t-SNE (perplexity {perplexity:.3g}, seed {seed}) {of}")


def pca(data: Pooled, most: int) -> tuple[NDArray[np.float64], list[float]]:
    """Centred rows on their first `most` principal components (fewer if there are not as many), float64 [n, c], and the
    share of the variance of each. A component's sign is such that its largest loading is positive.
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


def _umap(near: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = umap.UMAP(n_neighbors=NEIGHBOURS, init="pca", random_state=seed, n_jobs=1)
        return np.asarray(made.fit_transform(near.astype(np.float32)), np.float64)


def _tsne(near: NDArray[np.float64], perplexity: float, seed: int) -> NDArray[np.float64]:
    from openTSNE import TSNE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(TSNE(perplexity=perplexity, random_state=seed).fit(near), np.float64)
