"""Parquet: a row for each protein, its embedding as a list of fixed size, a row group for each chunk of records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from virnucpro_cli.errors import needs
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection, begins, entry_of
from virnucpro_cli.store import REASONS, STATUS_NAMES

PROVENANCE = b"virnucpro"
BATCH = 4096


def _pyarrow() -> Any:
    needs("pyarrow", "parquet", "The layout parquet")
    import pyarrow
    import pyarrow.parquet

    return pyarrow


def write(selection: Selection, target: Path) -> None:
    """Columns id, length, status, reason, flags, embedding; the embedding of a skipped protein is NaN.

    It is not null, since pyarrow before 26 cannot read, and before 25 cannot write, lists of fixed size that are.
    """
    pa = _pyarrow()
    file, width = selection.file, selection.width
    schema = pa.schema(
        [("id", pa.string()), ("length", pa.int32()), ("status", pa.string()), ("reason", pa.string()),
         ("flags", pa.uint16()), ("embedding", pa.list_(pa.from_numpy_dtype(selection.dtype), width))],
        {PROVENANCE: json.dumps(selection.provenance)},
    )  # fmt: skip
    with pa.parquet.ParquetWriter(target, schema) as out:
        for block in selection.blocks(skipped=True):
            rows, values = slice(int(block.numbers[0]), int(block.numbers[-1]) + 1), block.rows[selection.what]
            columns = (
                block.names, file.lengths[rows], [STATUS_NAMES[s] for s in file.status[rows]],
                [REASONS[r] for r in file.reason[rows]], file.flags[rows],
            )  # fmt: skip
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
            out.write_table(pa.table([*map(pa.array, columns), embedding], schema=schema))


def read(path: Path) -> Iterator[Entry]:
    """Needs the columns id and embedding (a list); length, status and reason are taken where they are."""
    pa = _pyarrow()
    kind = provenance(path).get("kind", "mean")
    with pa.parquet.ParquetFile(path) as file:
        there = set(file.schema_arrow.names)
        if not {"id", "embedding"} <= there:
            raise ValueError(f"it has the columns {', '.join(sorted(there))}, and id and embedding are needed")
        known = sorted(there & {"id", "length", "status", "reason"})
        width = 0
        for batch in file.iter_batches(BATCH, columns=[*known, "embedding"]):
            column = batch.column("embedding")
            values = column.drop_null().flatten().to_numpy(zero_copy_only=False)
            given = np.asarray(column.is_valid())
            width = len(values) // given.sum() if given.any() else width
            rows = np.full((len(given), width), np.nan, values.dtype)
            rows[given] = values.reshape(-1, width) if given.any() else 0
            for row, *facts in zip(rows, *(batch.column(name).to_pylist() for name in known), strict=True):
                yield entry_of({**dict(zip(known, facts, strict=True)), "kind": kind}, row)


def provenance(path: Path) -> dict[str, Any]:
    return json.loads((_pyarrow().parquet.read_schema(path).metadata or {}).get(PROVENANCE, b"{}"))


LAYOUT = Format(
    "parquet", "Parquet, a list of fixed size for each protein", ".parquet", write, read, begins(b"PAR1"),
    provenance=provenance, holds_skipped=True,
)  # fmt: skip
