"""AnnData's .h5ad: X of proteins by dimensions, obs with what is known of each protein, uns with the provenance."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from virnucpro_cli.errors import needs
from virnucpro_cli.exchange.layouts import hdf5
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection, entry_of
from virnucpro_cli.store import REASONS, STATUS_NAMES


def write(selection: Selection, target: Path) -> None:
    """Every protein has a row in fp32, as linear algebra needs; a skipped one's is NaN.

    obs_names are unique, obs["id"] is the name as it was. X is written block by block, and never whole in memory.
    """
    needs("anndata", "frames", "Writing .h5ad")
    import anndata as ad
    import pandas as pd

    file, n = selection.file, len(selection.file)
    status, reason = (
        pd.Categorical.from_codes(codes.astype(np.int8), list(words))
        for codes, words in ((file.status, STATUS_NAMES), (file.reason, REASONS))
    )
    obs = pd.DataFrame({
        "id": file.names_of(0, n), "length": file.lengths, "status": status, "reason": reason, "flags": file.flags,
        "replaced": file.replaced,
    }, index=selection.keys(0, n))  # fmt: skip
    var = pd.DataFrame(index=[str(i) for i in range(selection.width)])
    with hdf5.created(target) as sink:
        ad.io.write_elem(sink.file, "/", ad.AnnData(None, obs, var, uns={hdf5.PROVENANCE: selection.provenance}))
        data = sink.file.create_dataset("X", (n, selection.width), np.float32)
        data.attrs["encoding-type"], data.attrs["encoding-version"] = "array", "0.2.0"
        for block in sink.each(selection.blocks(skipped=True)):
            data[block.numbers[0] : block.numbers[-1] + 1] = block.rows[selection.what]


@contextmanager
def _backed(path: Path) -> Iterator[Any]:
    """The AnnData, with its X on disk, as its package reads it. Raises UserError if that is not installed."""
    needs("anndata", "frames", "Reading .h5ad")
    import anndata

    with h5py.File(path, "r") as file:  # with the flags of anndata, which may have it open already
        for _ in hdf5.datasets(file):
            pass  # none has its values elsewhere
    data = anndata.read_h5ad(path, backed="r")
    try:
        yield data
    finally:
        data.file.close()


def read(path: Path) -> Iterator[Entry]:
    """Names are obs["id"], or the index; length, status and reason are taken where they are. X is dense."""
    with _backed(path) as data:
        kind = _provenance(data).get("kind", "mean")
        if not isinstance(data.X, h5py.Dataset):
            raise ValueError("its X is sparse, or there is none")
        names = data.obs["id"] if "id" in data.obs else data.obs_names.to_series()
        if names.isna().any():
            raise ValueError(f"row {int(names.isna().to_numpy().argmax())} of obs has no id")
        known = [name for name in ("length", "status", "reason") if name in data.obs]
        columns = [data.obs[name].astype(object).where(data.obs[name].notna(), None).tolist() for name in known]
        for name, row, *facts in zip(names.astype(str), hdf5.rows(data.X), *columns, strict=True):
            yield entry_of({"id": name, "kind": kind, **dict(zip(known, facts, strict=True))}, row)


def _provenance(data: Any) -> dict[str, Any]:
    facts = data.uns.get(hdf5.PROVENANCE, {})
    return {name: value.item() if hasattr(value, "item") else value for name, value in facts.items()}


def provenance(path: Path) -> dict[str, Any]:
    with _backed(path) as data:
        return _provenance(data)


LAYOUT = Format(
    "anndata", "AnnData's .h5ad", ".h5ad", write, read, hdf5.has("X", "obs"), provenance=provenance, holds_skipped=True,
    longest=1000,
)  # fmt: skip
