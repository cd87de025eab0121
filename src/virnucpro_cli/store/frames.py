"""Rows with their labels as a data frame of pandas or polars, or as AnnData (extra `frames`), in float32.

labels: a list or array of n values for each column, with a `position` for rows of residues.
values: float16 or float32 [n, D].
All raise UserError if the package is not installed.
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
    """Labels of n rows and values, float16 or float32 [n, D]; name (and position) are the index."""
    needs("pandas", "frames", "to_pandas")
    import pandas as pd

    rows = pd.DataFrame(np.array(values, np.float32), columns=[str(i) for i in range(values.shape[1])])
    if "position" in labels:
        return rows.set_index(pd.MultiIndex.from_arrays(list(labels.values()), names=list(labels)))
    return pd.concat([pd.DataFrame(labels), rows], axis=1).set_index("name")


def to_polars(labels: Labels, values: NDArray[Any]) -> "polars.DataFrame":
    """Labels of n rows, and a column `embedding` of the values, float16 or float32 [n, D]."""
    needs("polars", "frames", "to_polars")
    import polars as pl

    wide = np.array(values, np.float32)
    return pl.DataFrame(labels).with_columns(pl.Series("embedding", wide, dtype=pl.Array(pl.Float32, wide.shape[1])))


def to_anndata(labels: Labels, values: NDArray[Any], made_by: dict[str, str]) -> "anndata.AnnData":
    """Labels of n rows as obs, and the values, float16 or float32 [n, D], as X."""
    needs("anndata", "frames", "to_anndata")
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(labels)
    obs.index = ad.utils.make_index_unique(pd.Index(obs["name"].astype(str)))
    obs.index.name = None
    var = pd.DataFrame(index=[str(i) for i in range(values.shape[1])])
    return ad.AnnData(np.array(values, np.float32), obs, var, uns=made_by)
