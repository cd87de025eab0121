"""AnnData's .h5ad: X of proteins by dimensions, obs with what is known of each protein, uns with the provenance.

Written block by block in its on-disk format (anndata.readthedocs.io, "On-disk format"), which has no place for a stream in
the anndata package itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from virnucpro_cli.errors import needs
from virnucpro_cli.exchange.layouts import hdf5
from virnucpro_cli.exchange.layouts.layout import Entry, Layout, Selection
from virnucpro_cli.kinds import POOLED
from virnucpro_cli.store import REASONS, STATUS_NAMES

LONGEST_NAME = 1000


def _encoded(item: Any, kind: str, version: str, **attributes: Any) -> Any:
    for name, value in {"encoding-type": kind, "encoding-version": version, **attributes}.items():
        item.attrs[name] = value
    return item


def _strings(group: h5py.Group, name: str, count: int) -> h5py.Dataset:
    return _encoded(group.create_dataset(name, (count,), h5py.string_dtype("utf-8")), "string-array", "0.2.0")


def _frame(file: h5py.File, name: str, columns: list[str]) -> h5py.Group:
    order = np.array(columns, object) if columns else np.array([], "f8")
    return _encoded(
        file.create_group(name), "dataframe", "0.2.0", **{"_index": "_index", "column-order": order.astype(h5py.string_dtype())}
    )  # fmt: skip


def write(selection: Selection, target: Path) -> None:
    """Every protein has a row in fp32, as linear algebra needs; of a skipped one it is NaN. obs_names are unique, obs["id"] is the name as it was."""
    of, n = selection.file, selection.count(skipped=True)
    with hdf5.created(target) as sink:
        file = sink.file
        _encoded(file, "anndata", "0.1.0")
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            _encoded(file.create_group(name), "dict", "0.1.0")
        data = _encoded(file.create_dataset("X", (n, selection.width), np.float32), "array", "0.2.0")
        var = _frame(file, "var", [])
        _strings(var, "_index", selection.width)[:] = [str(i) for i in range(selection.width)]
        obs = _frame(file, "obs", ["id", "length", "status", "reason", "flags", "replaced"])
        index, names = _strings(obs, "_index", n), _strings(obs, "id", n)
        for name, column in (("length", of.lengths), ("flags", of.flags), ("replaced", of.replaced)):
            _encoded(obs.create_dataset(name, data=column), "array", "0.2.0")
        for name, codes, words in (("status", of.status, STATUS_NAMES), ("reason", of.reason, REASONS)):
            group = _encoded(obs.create_group(name), "categorical", "0.2.0", ordered=False)
            _encoded(group.create_dataset("codes", data=codes.astype(np.int8)), "array", "0.2.0")
            _strings(group, "categories", len(words))[:] = list(words)
        said = _encoded(file["uns"].create_group(hdf5.PROVENANCE), "dict", "0.1.0")
        for name, value in selection.provenance.items():
            _encoded(
                said.create_dataset(name, data=value), "string" if isinstance(value, str) else "numeric-scalar", "0.2.0"
            )
        for block in sink.each(selection.blocks(skipped=True)):
            rows = slice(int(block.numbers[0]), int(block.numbers[-1]) + 1)
            data[rows], index[rows], names[rows] = block.rows[selection.what], block.keys, block.names


@contextmanager
def _backed(path: Path) -> Iterator[Any]:
    """The AnnData, with its X on disk, as its package reads it. Raises UserError if that is not installed."""
    needs("anndata", "frames", "Reading .h5ad")
    import anndata

    with h5py.File(path, "r") as file:  # with the flags of anndata, which may have it open already
        hdf5.check_whole(file)
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
        columns = {
            name: data.obs[name].astype(object).where(data.obs[name].notna(), None).tolist()
            if name in data.obs
            else [None] * len(names)
            for name in ("length", "status", "reason")
        }
        each = zip(names.astype(str), hdf5.rows(data.X), *columns.values(), strict=True)
        for name, row, length, status, reason in each:
            yield Entry(
                name, {(kind, None): row}, length=None if length is None else int(length),
                skipped=str(reason or "") if status == "skipped" else "",
            )  # fmt: skip


def _provenance(data: Any) -> dict[str, Any]:
    said = data.uns.get(hdf5.PROVENANCE, {})
    return {name: value.item() if hasattr(value, "item") else value for name, value in said.items()}


def provenance(path: Path) -> dict[str, Any]:
    with _backed(path) as data:
        return _provenance(data)


def recognises(path: Path) -> bool:
    return hdf5.has(path, "X", "obs")


LAYOUT = Layout(
    "anndata", "AnnData's .h5ad", ".h5ad", tuple(POOLED),
    write, read, provenance, recognises, holds_skipped=True, longest=LONGEST_NAME,
)  # fmt: skip
