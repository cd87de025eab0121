"""The file that an import makes: a record for each entry of the source, or for each of the FASTA."""

import json
from collections.abc import Iterator
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
from virnucpro_cli.plan.policies import POLICIES, decide
from virnucpro_cli.store import UNKNOWN

UNSAID: dict[str, Any] = {"long": "full", "dedup": False}
"""Policies, where the source names none."""


@dataclass
class ImportPlan:
    """The file to make. entry_of: int64 [N], each record's entry, or NOWHERE; way: how it was found in a FASTA."""

    layout: store.Layout
    entry_of: Int64
    way: Way | None


def plan(
    source: Source, output: str, provenance: dict[str, Any], table: fasta.RecordTable | None, model: str | None,
    notes: list[str],
) -> ImportPlan:  # fmt: skip
    policies: dict[str, Any] = {name: provenance[name] for name in POLICIES if name in provenance}
    config = EmbedConfig(
        tuple(entry.path for entry in table.sources) if table else (), output, layers=source.layers, pool=source.kinds,
        store_dtype="fp16" if source.dtype == np.float16 else "fp32",
        model=model or str(provenance.get("model", UNKNOWN)).split(" (")[0], **(UNSAID | policies),
    )  # fmt: skip
    way, extra = None, store.Extra()
    if table is None:
        n, reason = len(source), source.reasons.copy()
        entry_of, flags, replaced = np.arange(n), np.zeros(n, np.uint16), np.zeros(n, np.int32)
        lengths = np.where(source.lengths >= 0, source.lengths, source.sizes).astype(np.int32)
        if not lengths.any():
            notes.append("lengths are not known, and stand as 0: --fasta FILE tells them")
        names = partial(_next, (entry.name for entry in source.layout.read(Path(source.path))))  # asked for in order
        name_bytes = source.name_bytes
    else:
        full = config.id == "full"
        entry_of, way = joined(source, table, full, notes)
        reason, flags = _decided(source, table, entry_of, config, notes)
        lengths, replaced = table.length, table.replaced
        names, name_bytes = partial(table.names, full=full), table.text_bytes - table.residues
        if table.gaps.any():
            extra = store.Extra({"gaps": table.gaps})
        if provenance.get("input_sha256") and provenance["input_sha256"].split(",") != table.sha256:
            notes.append("the FASTA is not the one that was embedded: its content differs")
    entry_of = np.where(reason > 0, NOWHERE, entry_of)
    status = np.where(reason > 0, store.SKIPPED, store.PENDING).astype(np.uint8)
    sizes = np.where(entry_of >= 0, source.sizes[entry_of], 0)
    offsets = np.append(0, np.cumsum(sizes)) if "residue" in source.kinds else None
    layout = store.Layout(
        source.hidden, source.layers, source.kinds, source.dtype, lengths, replaced, flags, status, reason, offsets,
        names, name_bytes, extra=extra,
    )  # fmt: skip
    layout.attributes.update(_attributes(source, provenance, table, config))
    return ImportPlan(layout, entry_of, way)


def _next(names: Iterator[str], start: int, stop: int) -> list[str]:
    return list(islice(names, stop - start))


def _decided(
    source: Source, table: fasta.RecordTable, entry_of: Int64, config: EmbedConfig, notes: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Why each record of the FASTA has no embedding (0 of one that has), and its flags."""
    decisions = decide(table, config)
    reason, flags = decisions.reason, decisions.flags
    is_kept = reason == 0
    reason[is_kept & (entry_of == NOWHERE)] = store.ABSENT
    reason[is_kept & (entry_of == SEVERAL)] = store.AMBIGUOUS
    has_entry = is_kept & (entry_of >= 0)
    reason[has_entry] = source.reasons[entry_of[has_entry]]
    has_rows = reason == 0
    entry_of = np.where(has_rows, entry_of, NOWHERE)
    lengths, expected = source.lengths[entry_of], table.length
    if "residue" in source.kinds:
        lengths, expected = source.sizes[entry_of], decisions.embedded
        _check_rows(table, lengths, has_rows, config.id == "full")
        flags[has_rows & (lengths < table.length)] |= store.TRUNCATED
    if wrong := int((has_rows & (lengths >= 0) & (lengths != expected)).sum()):
        notes.append(f"{counted(wrong, 'protein')} of another length than in the FASTA: cut, or is it another FASTA?")
    return reason, flags


def _check_rows(table: fasta.RecordTable, rows: Int64, has_rows: NDArray[np.bool_], full: bool) -> None:
    """Raise UserError if a protein has more rows than residues, or one row for many."""
    wrong = np.flatnonzero(has_rows & ((rows > table.length) | ((rows == 1) & (table.length > 1))))
    if len(wrong):
        first = int(wrong[0])
        (name,) = table.names(first, first + 1, full=full)
        example = f"{name!r} has {rows[first]:,} for {table.length[first]:,}"
        raise UserError(
            f"{counted(len(wrong), 'protein')} without a row for each residue: {example}.",
            "Leave out rows of special tokens, and store means as [D]. Or is it another FASTA?",
        )


def _attributes(
    source: Source, provenance: dict[str, Any], table: fasta.RecordTable | None, config: EmbedConfig
) -> dict[str, Any]:
    fingerprint = {
        "imported": source.layout.name,
        "input_sha256": table.sha256 if table else [],
        "weights_sha256": provenance.get("weights_sha256", UNKNOWN),
        "layers": list(source.layers),
        "pool": list(source.kinds),
        "dtype": provenance.get("dtype", UNKNOWN),
        "store_dtype": config.store_dtype,
        **{name: getattr(config, name) for name in POLICIES},
        "attention": UNKNOWN,
        "device": UNKNOWN,
        "unknown": [name for name in ("long",) if name not in provenance],
    }
    tool = f", of {provenance['tool']}" if "tool" in provenance else ""
    return {
        "tool": "virnucpro",
        "tool_version": virnucpro_cli.__version__,
        **store.of_this_command(),
        "imported_from": f"{source.path} ({source.layout.name}{tool})",
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
