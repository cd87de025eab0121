"""The file that an import makes: a record for each entry of the source, or for each of the FASTA."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import virnucpro_cli
from virnucpro_cli import fasta, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.exchange.imports.joining import NOWHERE, SEVERAL, Way, joined
from virnucpro_cli.exchange.imports.source import Int64, Source
from virnucpro_cli.exchange.layouts.layout import Format
from virnucpro_cli.plan.policies import POLICIES, decide
from virnucpro_cli.store import UNKNOWN

UNSAID: dict[str, Any] = {"long": "full", "dedup": False}
"""Policies, where the source names none."""


@dataclass
class ImportPlan:
    """The file to make. entry_of: int64 [N], which entry's rows each record gets, or NOWHERE; way: how that was found, with a FASTA."""

    layout: store.Layout
    entry_of: Int64
    way: Way | None


@dataclass
class _Records:
    """The N records of the file. entry_of: as in Plan; reason: uint8, why a record has no embedding, 0 for one that has."""

    entry_of: Int64
    lengths: NDArray[np.int32]
    replaced: NDArray[np.int32]
    flags: NDArray[np.uint16]
    reason: NDArray[np.uint8]
    names: Callable[[int, int], list[str]]
    name_bytes: int
    way: Way | None = None


def plan(
    source: str, output: str, layout: Format, found: Source, said: dict[str, Any], table: fasta.RecordTable | None,
    model: str | None, notes: list[str],
) -> ImportPlan:  # fmt: skip
    policies: dict[str, Any] = {name: said[name] for name in POLICIES if name in said}
    config = EmbedConfig(
        tuple(entry.path for entry in table.sources) if table else (), output, layers=found.layers, pool=found.kinds,
        store_dtype="fp16" if found.dtype == np.float16 else "fp32",
        model=model or str(said.get("model", UNKNOWN)).split(" (")[0], **(UNSAID | policies),
    )  # fmt: skip
    if table is None:
        records = _of_the_source(source, layout, found, notes)
    else:
        records = _of_the_fasta(source, layout, found, table, config, notes)
        if said.get("input_sha256") and said["input_sha256"].split(",") != table.sha256:
            notes.append("the FASTA is not the one that was embedded: its content differs")
    offsets = np.append(0, np.cumsum(_rows_of(found, records.entry_of))) if "residue" in found.kinds else None
    columns = {"gaps": table.gaps} if table is not None and table.gaps.any() else {}
    made = store.Layout(
        found.hidden, found.layers, found.kinds, found.dtype, records.lengths, records.replaced, records.flags,
        np.where(records.reason > 0, store.SKIPPED, store.PENDING).astype(np.uint8), records.reason, offsets,
        records.names, records.name_bytes, extra=store.Extra(columns),
    )  # fmt: skip
    made.attributes.update(_attributes(source, layout, found, said, table, config))
    return ImportPlan(made, records.entry_of, records.way)


def _of_the_source(source: str, layout: Format, found: Source, notes: list[str]) -> _Records:
    """A record for each entry, in their order."""
    n = len(found)
    lengths = np.where(found.lengths >= 0, found.lengths, found.sizes).astype(np.int32)
    if not lengths.any():
        notes.append("lengths are not known, and stand as 0: --fasta FILE tells them")
    reading = (entry.name for entry in layout.read(Path(source)))
    names = partial(_next_names, reading)  # asked for once, in order
    return _Records(
        np.where(found.reasons > 0, NOWHERE, np.arange(n)), lengths, np.zeros(n, np.int32), np.zeros(n, np.uint16),
        found.reasons.copy(), names, found.name_bytes,
    )  # fmt: skip


def _next_names(names: Iterator[str], start: int, stop: int) -> list[str]:
    return list(islice(names, stop - start))


def _of_the_fasta(
    source: str, layout: Format, found: Source, table: fasta.RecordTable, config: EmbedConfig, notes: list[str]
) -> _Records:  # fmt: skip
    """Its records, and for each the entry that is its."""
    full = config.id == "full"
    entry_of, way = joined(source, layout, found, table, full, notes)
    work = decide(table, config)
    reason, flags = work.reason, work.flags
    kept = reason == 0
    reason[kept & (entry_of == NOWHERE)] = store.ABSENT
    reason[kept & (entry_of == SEVERAL)] = store.AMBIGUOUS
    there = kept & (entry_of >= 0)
    reason[there] = found.reasons[entry_of[there]]
    entry_of[reason > 0] = NOWHERE
    told, expected = found.lengths[entry_of], table.length
    if "residue" in found.kinds:
        told, expected = _rows_of(found, entry_of), work.embedded
        _check_rows(table, entry_of, told, full)
        flags[(entry_of >= 0) & (told < table.length)] |= store.TRUNCATED
    if wrong := int(((entry_of >= 0) & (told >= 0) & (told != expected)).sum()):
        notes.append(f"{counted(wrong, 'protein')} of another length than in the FASTA: cut, or is it another FASTA?")
    return _Records(
        entry_of, table.length, table.replaced, flags, reason, partial(table.names, full=full),
        table.text_bytes - table.residues, way,
    )  # fmt: skip


def _check_rows(table: fasta.RecordTable, entry_of: Int64, rows: Int64, full: bool) -> None:
    """Raise UserError if a protein has more rows than residues, or one row for many: they are not a row for each residue."""
    wrong = np.flatnonzero((entry_of >= 0) & ((rows > table.length) | ((rows == 1) & (table.length > 1))))
    if len(wrong):
        (name,) = table.names(int(wrong[0]), int(wrong[0]) + 1, full=full)
        raise UserError(
            f"{counted(len(wrong), 'protein')} without a row for each residue: {name!r} has {rows[wrong[0]]:,} for {table.length[wrong[0]]:,}.",
            "Leave out rows of special tokens, and store means as [D]. Or is it another FASTA?",
        )


def _rows_of(found: Source, entry_of: Int64) -> Int64:
    """Rows of residues of each record."""
    return np.where(entry_of >= 0, found.sizes[entry_of], 0)


def _attributes(
    source: str, layout: Format, found: Source, said: dict[str, Any], table: fasta.RecordTable | None,
    config: EmbedConfig,
) -> dict[str, Any]:  # fmt: skip
    fingerprint = {
        "imported": layout.name,
        "input_sha256": table.sha256 if table else [],
        "weights_sha256": said.get("weights_sha256", UNKNOWN),
        "layers": list(found.layers),
        "pool": list(found.kinds),
        "dtype": said.get("dtype", UNKNOWN),
        "store_dtype": config.store_dtype,
        **{name: getattr(config, name) for name in POLICIES},
        "attention": UNKNOWN,
        "device": UNKNOWN,
        "unknown": [name for name in ("long",) if name not in said],
    }
    return {
        "tool": "virnucpro",
        "tool_version": virnucpro_cli.__version__,
        **store.of_this_command(),
        "imported_from": f"{source} ({layout.name}{', of ' + said['tool'] if 'tool' in said else ''})",
        "config": json.dumps(asdict(config)),
        "environment": "{}",
        "model": config.model,
        "weights": UNKNOWN,
        "weights_origin": UNKNOWN,
        "approximate": False,
        **{name: fingerprint[name] for name in ("weights_sha256", "dtype", "store_dtype", "attention", "device")},
        **{name: json.dumps(fingerprint[name]) for name in ("layers", "pool")},
        "inputs": json.dumps(table.inputs if table else []),
        "fingerprint": json.dumps(fingerprint),
    }
