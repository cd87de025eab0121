"""An embeddings file as a data frame of pandas or polars, or as AnnData (extra `frames`). A row for each record, in order;
a skipped record's is NaN, and the column `status` says so.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from virnucpro_cli.errors import needs
from virnucpro_cli.store.schema import STATUS_NAMES

if TYPE_CHECKING:
    import anndata
    import pandas
    import polars

    from virnucpro_cli.store import EmbeddingFile


def to_pandas(file: "EmbeddingFile", kind: str | None, layer: int | None) -> "pandas.DataFrame":
    needs("pandas", "frames", "to_pandas")
    import pandas as pd

    values = np.array(file.array(kind, layer))
    rows = pd.DataFrame(values, columns=[str(i) for i in range(values.shape[1])])
    return pd.concat([pd.DataFrame(_columns(file)), rows], axis=1).set_index("name")


def to_polars(file: "EmbeddingFile", kind: str | None, layer: int | None) -> "polars.DataFrame":
    needs("polars", "frames", "to_polars")
    import polars as pl

    values = np.array(file.array(kind, layer), np.float32)
    embedding = pl.Series("embedding", values, dtype=pl.Array(pl.Float32, values.shape[1]))
    return pl.DataFrame(_columns(file)).with_columns(embedding)


def to_anndata(file: "EmbeddingFile", kind: str | None, layer: int | None) -> "anndata.AnnData":
    needs("anndata", "frames", "to_anndata")
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(_columns(file))
    obs.index = ad.utils.make_index_unique(pd.Index(obs["name"].astype(str)))
    obs.index.name = None
    values = np.array(file.array(kind, layer), np.float32)
    made_by = {key: str(file.attributes[key]) for key in ("model", "weights_sha256", "dtype", "tool_version")}
    return ad.AnnData(values, obs, pd.DataFrame(index=[str(i) for i in range(values.shape[1])]), uns=made_by)


def _columns(file: "EmbeddingFile") -> dict[str, Any]:
    return {"name": file.names, "length": file.lengths, "status": np.array(STATUS_NAMES)[file.status].tolist()}
