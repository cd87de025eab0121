"""The packing check: a protein's bits do not depend on what it is packed with."""

import random
from collections.abc import Callable, Iterator, Set
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli import fasta
from virnucpro_cli.alphabet import Reading
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.model.families import family_of, reading
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.plan.packing import SMALLEST_BUCKET, SPECIAL_TOKENS, arranged, buckets, whole_segments
from virnucpro_cli.validation import agreement, gates
from virnucpro_cli.validation.oracle import Oracle, Rows, Sample
from virnucpro_cli.validation.verdict import Check

Tokenizer = Callable[[fasta.RecordTable], fasta.RecordTable] | None
PACKING = "Packing: the same bits in any company"


def packing(
    model: PackedModel, path: Path, base: Rows, sample: Sample, layers: tuple[int, ...], config: ValidateConfig,
    again: Set[int] = frozenset(), tokenizer: Tokenizer = None,
) -> Iterator[Check]:  # fmt: skip
    """Proteins alone, in one pack, first, last and shuffled among strangers, against `base`, as `embed` stored them.

    Those in `again` are not compared with it, which another dtype has computed.
    Then one neighbour's residues are changed. path: the FASTA of the sample; base: float32 [n, D] of each kind and
    layer, for residue [sum of lengths, D].
    """
    sizes = sample.lengths + SPECIAL_TOKENS
    thorough = model.device.type == "cuda"
    dice = random.Random(config.seed)
    probes = np.unique(np.argsort(sizes)[np.linspace(0, len(sample) - 1, 24 if thorough else 6).astype(int)]).tolist()
    largest = int(config.token_budget) if config.token_budget != "auto" else 32768 if thorough else 4096
    largest = max(largest, int(sizes.max()))

    def strangers(room: int, without: int = -1) -> list[int]:
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
        "shuffled, packs of every size": [strangers(bucket) for bucket in buckets(largest)],
    }
    run = partial(in_packs, model, layers, sample.lengths)
    split = {key: sample.by_protein(rows, key[0]) for key, rows in base.items()}
    how = reading(model.spec, config.kind)
    read = partial(indexed, reading=how, tokenizer=tokenizer)
    table = read(path)
    for name, packs in arrangements.items():
        rows = run(table, [pack for pack in packs if pack])
        compared = [(record, mine) for record, mine in rows if record not in again]
        theirs = ({key: each[record] for key, each in split.items()} for record, _ in compared)
        differences = [_difference(mine, other) for (_, mine), other in zip(compared, theirs, strict=True)]
        yield _bitwise(name, differences, model, len(rows) - len(compared))

    pack = strangers(max(largest, int(np.sort(sizes)[-2:].sum())))
    changed = pack[len(pack) // 2]
    texts, length = list(sample.texts), int(sample.lengths[changed])
    usual, rare = (how.letters[i].encode() for i in (0, how.standard - 2))  # L and W
    if family_of(model.spec).TOKENIZER is not None:  # one token each
        usual = rare = how.unknown.encode()
    texts[changed] = (usual if texts[changed].strip() == rare * length else rare) * length
    altered = read(write_texts(path.with_name("changed.fasta"), texts))
    pairs = zip(run(table, [pack]), run(altered, [pack]), strict=True)
    differences = [_difference(after, before) for (record, before), (_, after) in pairs if record != changed]
    yield _bitwise("one neighbour's residues changed", differences, model)


def indexed(path: Path, reading: Reading, tokenizer: Tokenizer = None) -> fasta.RecordTable:
    """The records of a FASTA as `embed` reads them. tokenizer: makes tokens of a table of letters, if it is needed."""
    table = fasta.index(fasta.open_sources([str(path)], path.parent), dedup=False, reading=reading)
    return table if tokenizer is None else tokenizer(table)


def in_packs(
    model: PackedModel,
    layers: tuple[int, ...],
    lengths: NDArray[np.int64],
    table: fasta.RecordTable,
    packs: list[list[int]],
) -> list[tuple[int, Rows]]:
    """Record and rows of every segment of packs made by hand, through the collator, the forward and the pools.

    lengths: int64 [n], residues of each record. Rows are float32, [D] for each kind and layer, [length, D] for residue.
    """
    segments = whole_segments(np.arange(len(lengths)), lengths)
    plan = arranged(packs, segments.length, max(32768, int(lengths.max()) + SPECIAL_TOKENS))
    collate = VarlenCollator(table, segments, lengths.astype(np.int32), plan, pin=model.device.type == "cuda")
    rows_of: list[tuple[int, Rows]] = []

    def compute(batch: PackedBatch) -> Embeddings:
        return model.embed(batch, layers, Pooler(KINDS, torch.float32))

    def sink(batch: PackedBatch, rows: Embeddings) -> None:
        ends = np.cumsum(batch.seqlens)
        for i, record in enumerate(batch.segments.tolist()):
            mine: Rows = {key: values[i].numpy().copy() for key, values in rows.pooled.items()}
            inside = slice(int(ends[i] - batch.seqlens[i]) + 1, int(ends[i]) - 1)
            mine |= {("residue", layer): values[inside].numpy().copy() for layer, values in rows.residue.items()}
            rows_of.append((record, mine))

    runner.run_packs(range(len(plan)), collate, compute, sink, model.device)
    return rows_of


def _difference(ours: Rows, theirs: Rows) -> float:
    """Largest relative L2 between two sets of rows of a record; 0 only if every bit agrees."""
    worst = 0.0
    for key, mine in ours.items():
        other = theirs[key].reshape(mine.shape)
        if not np.array_equal(mine, other, equal_nan=True):
            difference = float(agreement.relative_l2(mine.ravel(), other.ravel()))
            worst = max(worst, difference if np.isfinite(difference) else np.inf, 1e-45)
    return worst


def _bitwise(name: str, differences: list[float], model: PackedModel, overflowed: int = 0) -> Check:
    """Whether all differences are in bounds. overflowed: records that are not among them, for want of rows."""
    bound, worst, compared = bound_of(model), max(differences, default=0.0), len(differences)
    differing = sum(difference > 0 for difference in differences)
    note = f"{differing} of {compared} differ" if differing else f"{compared} compared, all bitwise equal"
    limit = "bitwise" if bound == 0 else f"{bound:.0e}"
    if overflowed and not compared:
        return Check(PACKING, name, note=f"{overflowed} overflow, nothing to compare")
    return Check(PACKING, name, compared > 0 and worst <= bound, worst=worst, limit=limit, note=note)


def bound_of(model: PackedModel) -> float:
    """The largest relative difference that packing may make: 0 on CUDA and CPU, roundoff where that is not promised."""
    promised = model.device.type in ("cuda", "cpu") and model.spec.head_dim >= 16
    return 0.0 if promised else gates.MAX_REL_L2[devices.short_name(model.dtype)]


def padded(judge: Oracle, own: Rows, truth: Rows, sample: Sample, layers: tuple[int, ...]) -> Iterator[Check]:
    """An ordinary padded batch of the oracle, which users call unpacked, beside the oracle alone and the fast path.

    own, truth: float32 [n, D] of kind mean at the last layer.
    """
    chosen = np.argsort(sample.lengths)[np.linspace(0, len(sample) - 1, 8).astype(int)]
    chosen = np.unique(chosen[sample.lengths[chosen] <= 1022])
    if len(chosen) < 2:
        return
    last = layers[-1]
    rows = judge.embed_padded([sample.tokens[i] for i in chosen], (last,))
    means = np.stack([r[last][1:-1].double().mean(0).cpu().numpy() for r in rows])
    names = sample.names_of("mean")[chosen]
    alone, ours = truth["mean", last][chosen], own["mean", last][chosen]
    error = agreement.relative_l2(means, alone)
    yield Check.of(PACKING, "a padded batch of the reference against one at a time", error, names)
    yield Check.of(PACKING, "embed against that padded batch", agreement.relative_l2(ours, means), names)
