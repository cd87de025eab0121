"""An embeddings file as a data frame of pandas or polars, or as AnnData (extra `frames`), in float32. A row for each record, in
order: a skipped record's is NaN, and the column `status` says so. Rows of residues are named by protein and position.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError, needs
from virnucpro_cli.store.schema import STATUS_NAMES

if TYPE_CHECKING:
    import anndata
    import pandas
    import polars

    from virnucpro_cli.store import EmbeddingFile, Groups


def to_pandas(file: "EmbeddingFile", kind: str | None, layer: int | None) -> "pandas.DataFrame":
    needs("pandas", "frames", "to_pandas")
    import pandas as pd

    kind, layer = file.what(kind, layer)
    rows = _numbered(file.array(kind, layer))
    if kind == "residue":
        return rows.set_index(pd.MultiIndex.from_arrays(list(_positions(file).values()), names=["name", "position"]))
    return pd.concat([pd.DataFrame(_columns(file)), rows], axis=1).set_index("name")


def groups_to_pandas(groups: "Groups", kind: str, layer: int | None) -> "pandas.DataFrame":
    needs("pandas", "frames", "to_pandas")
    import pandas as pd

    rows = _numbered(groups.rows(kind, layer)[:])
    frame = pd.concat([pd.DataFrame({"name": groups.ids, "members": groups.members}), rows], axis=1)
    return frame[frame["members"] > 0].set_index("name")


def to_polars(file: "EmbeddingFile", kind: str | None, layer: int | None) -> "polars.DataFrame":
    needs("polars", "frames", "to_polars")
    import polars as pl

    kind, layer = file.what(kind, layer)
    values = np.array(file.array(kind, layer), np.float32)
    embedding = pl.Series("embedding", values, dtype=pl.Array(pl.Float32, values.shape[1]))
    return pl.DataFrame(_positions(file) if kind == "residue" else _columns(file)).with_columns(embedding)


def to_anndata(file: "EmbeddingFile", kind: str | None, layer: int | None) -> "anndata.AnnData":
    needs("anndata", "frames", "to_anndata")
    import anndata as ad
    import pandas as pd

    kind, layer = file.what(kind, layer)
    if kind == "residue":
        raise UserError("An AnnData has a row for each protein, not for each residue.", "Use to_pandas('residue').")
    obs = pd.DataFrame(_columns(file))
    obs.index = ad.utils.make_index_unique(pd.Index(obs["name"].astype(str)))
    obs.index.name = None
    values = np.array(file.array(kind, layer), np.float32)
    made_by = {key: str(file.attributes[key]) for key in ("model", "weights_sha256", "dtype", "tool_version")}
    return ad.AnnData(values, obs, pd.DataFrame(index=[str(i) for i in range(values.shape[1])]), uns=made_by)


def _numbered(values: NDArray[Any]) -> "pandas.DataFrame":
    import pandas as pd

    return pd.DataFrame(np.array(values, np.float32), columns=[str(i) for i in range(values.shape[1])])


def _columns(file: "EmbeddingFile") -> dict[str, Any]:
    return {"name": file.names, "length": file.lengths, "status": np.array(STATUS_NAMES)[file.status].tolist()}


def _positions(file: "EmbeddingFile") -> dict[str, Any]:
    """Name and position, from 1, of every row of residues."""
    offsets = file.residue_offsets
    sizes = np.diff(offsets)
    positions = np.arange(1, offsets[-1] + 1) - np.repeat(offsets[:-1], sizes)
    return {"name": np.repeat(np.array(file.names, object), sizes), "position": positions}
