"""The packing check: a protein's bits do not depend on what it is packed with."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli import fasta
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.model.esm2 import ESM2
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.plan.packing import SMALLEST_BUCKET, SPECIAL_TOKENS, arranged, buckets, whole_segments
from virnucpro_cli.validation import agreement, gates
from virnucpro_cli.validation.oracle import Rows, Sample
from virnucpro_cli.validation.reference import Reference
from virnucpro_cli.validation.verdict import Check

PACKING = "Packing: the same bits in any company"


def packing(
    model: ESM2, path: Path, base: Rows, sample: Sample, layers: tuple[int, ...], config: ValidateConfig
) -> list[Check]:
    """Proteins alone, in one pack, first, last and shuffled among strangers, against what `embed` stored of them; then
    with one neighbour's residues changed.
    """
    table = fasta.index(fasta.open_sources([str(path)], path.parent), dedup=False)
    sizes = sample.lengths + SPECIAL_TOKENS
    thorough = model.device.type == "cuda"
    dice = random.Random(config.seed)
    probes = np.unique(np.argsort(sizes)[np.linspace(0, len(sample) - 1, 24 if thorough else 6).astype(int)]).tolist()
    largest = int(config.token_budget) if config.token_budget != "auto" else 32768 if thorough else 4096
    largest = max(largest, int(sizes.max()))

    def strangers(room: int, without: int) -> list[int]:
        chosen = []
        for i in dice.sample(range(len(sample)), len(sample)):
            if i != without and sizes[i] <= room:
                chosen.append(i)
                room -= int(sizes[i])
        return chosen

    def beside(probe: int) -> list[int]:
        bucket = SMALLEST_BUCKET if sizes[probe] <= SMALLEST_BUCKET // 2 else 2 * SMALLEST_BUCKET
        return strangers(max(bucket - int(sizes[probe]), 0), probe)

    arrangements = {
        "alone": [[probe] for probe in probes],
        "in one pack": [probes],
        "first of a pack": [[probe, *beside(probe)] for probe in probes],
        "last of a pack": [[*beside(probe), probe] for probe in probes],
        "shuffled, packs of every size": [strangers(bucket, -1) for bucket in buckets(largest)],
    }
    layout = partial(in_packs, model, layers, sample.lengths)
    checks = []
    for name, packs in arrangements.items():
        differing, worst = 0, 0.0
        compared = 0
        for record, rows in layout(table, [pack for pack in packs if pack]):
            difference = _difference(rows, base, sample, record)
            compared += 1
            differing += difference > 0
            worst = max(worst, difference)
        checks.append(_bitwise(name, differing, compared, worst, model))
    return [*checks, _contamination(model, path, layout, table, sample, dice, largest)]


Found = dict[tuple[str, int], NDArray[np.floating]]


def in_packs(
    model: ESM2, layers: tuple[int, ...], lengths: NDArray[np.int64], table: fasta.RecordTable, packs: list[list[int]]
) -> list[tuple[int, Found]]:
    """(record, its rows) of every segment of packs made by hand, through the collator, the forward and the pools."""
    records = np.arange(len(lengths))
    segments = whole_segments(records, lengths)
    plan = arranged(packs, segments.length, max(32768, int(lengths.max()) + SPECIAL_TOKENS))
    collate = VarlenCollator(table, segments, lengths.astype(np.int32), plan, pin=model.device.type == "cuda")
    found: list[tuple[int, Found]] = []

    def compute(batch: PackedBatch) -> Embeddings:
        return model.embed(batch, layers, Pooler(KINDS, torch.float32))

    def sink(batch: PackedBatch, rows: Embeddings) -> None:
        ends = np.cumsum(batch.seqlens)
        for i, record in enumerate(batch.segments.tolist()):
            mine: Found = {key: values[i].numpy().copy() for key, values in rows.pooled.items()}
            inside = slice(int(ends[i] - batch.seqlens[i]) + 1, int(ends[i]) - 1)
            mine |= {("residue", layer): values[inside].numpy().copy() for layer, values in rows.residue.items()}
            found.append((record, mine))

    runner.run_packs(range(len(plan)), collate, compute, sink, model.device)
    return found


def _difference(rows: Found, base: Rows, sample: Sample, record: int) -> float:
    """Largest relative L2 between two sets of rows of a record; 0 only if every bit agrees."""
    first = int(sample.lengths[:record].sum())
    worst = 0.0
    for (kind, layer), mine in rows.items():
        there = base[kind, layer]
        theirs = there[record] if kind != "residue" else there[first : first + int(sample.lengths[record])]
        if not np.array_equal(mine, theirs, equal_nan=True):
            difference = float(agreement.relative_l2(mine.ravel(), theirs.ravel()))
            worst = max(worst, difference if np.isfinite(difference) else np.inf, 1e-45)
    return worst


def _bitwise(name: str, differing: int, compared: int, worst: float, model: ESM2) -> Check:
    bound = bound_of(model)
    passed = compared > 0 and (worst <= bound if bound else differing == 0)
    note = f"{compared} compared, all bitwise equal" if not differing else f"{differing} of {compared} differ"
    limit = "bitwise" if bound == 0 else f"{bound:.0e}"
    return Check(PACKING, name, passed, worst=worst, limit=limit, note=note)


def bound_of(model: ESM2) -> float:
    """The largest relative difference that packing may make: none on CUDA and CPU, roundoff where that is not promised."""
    promised = model.device.type in ("cuda", "cpu") and model.spec.head_dim >= 16
    return 0.0 if promised else gates.MAX_REL_L2[devices.short_name(model.dtype)]


def _contamination(
    model: ESM2, path: Path, layout: Callable[..., list[tuple[int, Found]]], table: fasta.RecordTable, sample: Sample,
    dice: random.Random, largest: int,
) -> Check:  # fmt: skip
    """One neighbour's residues are changed; no row of any other may change by one bit."""
    pack, room = [], max(largest, int(np.sort(sample.lengths)[-2:].sum()) + 2 * SPECIAL_TOKENS)
    for i in dice.sample(range(len(sample)), len(sample)):
        if sample.lengths[i] + SPECIAL_TOKENS <= room:
            pack.append(i)
            room -= int(sample.lengths[i]) + SPECIAL_TOKENS
    changed = pack[len(pack) // 2]
    texts = list(sample.texts)
    texts[changed] = b"W" * int(sample.lengths[changed])
    if texts[changed] == sample.texts[changed].strip():
        texts[changed] = b"L" * int(sample.lengths[changed])
    other = write_texts(path.with_name("changed.fasta"), texts)
    altered = fasta.index(fasta.open_sources([str(other)], path.parent), dedup=False)
    differing = worst = 0.0
    for (record, before), (_, after) in zip(layout(table, [pack]), layout(altered, [pack]), strict=True):
        if record != changed:
            same = all(np.array_equal(before[key], after[key], equal_nan=True) for key in before)
            differing += not same
            differences = [agreement.relative_l2(after[k].ravel(), before[k].ravel()) for k in before]
            worst = max([worst, *(float(d) if np.isfinite(d) else np.inf for d in differences)])
    return _bitwise("one neighbour's residues changed", int(differing), len(pack) - 1, worst, model)


def padded(judge: Reference, own: Rows, truth: Rows, sample: Sample, layers: tuple[int, ...]) -> list[Check]:
    """What users call unpacked: one ordinary padded batch of the reference, beside the reference alone and the fast path."""
    chosen = np.argsort(sample.lengths)[np.linspace(0, len(sample) - 1, 8).astype(int)]
    chosen = np.unique(chosen[sample.lengths[chosen] <= 1022])
    if len(chosen) < 2:
        return []
    last = layers[-1]
    rows = judge.embed_padded([sample.tokens[i] for i in chosen], (last,))
    means = np.stack([r[last][1:-1].double().mean(0).cpu().numpy() for r in rows])
    against_alone = agreement.relative_l2(means, truth["mean", last][chosen])
    against_own = agreement.relative_l2(own["mean", last][chosen], means)
    return [
        Check(
            PACKING,
            what,
            median=float(np.median(e)),
            worst=float(e.max()),
            record=sample.names[int(chosen[e.argmax()])],
        )
        for what, e in (
            ("a padded batch of the reference against one at a time", against_alone),
            ("embed against that padded batch", against_own),
        )
    ]
