"""Rows with their labels as a data frame of pandas or polars, or as AnnData (extra `frames`), in float32.

labels: a list or array of n values for each column; values: [n, D]. Labels with a `position` are of rows of residues.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import needs

if TYPE_CHECKING:
    import anndata
    import pandas
    import polars

Labels = dict[str, Any]


def to_pandas(labels: Labels, values: NDArray[Any]) -> "pandas.DataFrame":
    needs("pandas", "frames", "to_pandas")
    import pandas as pd

    rows = pd.DataFrame(np.array(values, np.float32), columns=[str(i) for i in range(values.shape[1])])
    if "position" in labels:
        return rows.set_index(pd.MultiIndex.from_arrays(list(labels.values()), names=list(labels)))
    return pd.concat([pd.DataFrame(labels), rows], axis=1).set_index("name")


def to_polars(labels: Labels, values: NDArray[Any]) -> "polars.DataFrame":
    needs("polars", "frames", "to_polars")
    import polars as pl

    wide = np.array(values, np.float32)
    return pl.DataFrame(labels).with_columns(pl.Series("embedding", wide, dtype=pl.Array(pl.Float32, wide.shape[1])))


def to_anndata(labels: Labels, values: NDArray[Any], made_by: dict[str, str]) -> "anndata.AnnData":
    needs("anndata", "frames", "to_anndata")
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(labels)
    obs.index = ad.utils.make_index_unique(pd.Index(obs["name"].astype(str)))
    obs.index.name = None
    var = pd.DataFrame(index=[str(i) for i in range(values.shape[1])])
    return ad.AnnData(np.array(values, np.float32), obs, var, uns=made_by)


def positions(names: list[str], offsets: NDArray[np.int64]) -> Labels:
    """Name and position, from 1, of every row of residues; offsets: int64 [N + 1]."""
    sizes = np.diff(offsets)
    position = np.arange(1, offsets[-1] + 1) - np.repeat(offsets[:-1], sizes)
    return {"name": np.repeat(np.array(names, object), sizes), "position": position}
