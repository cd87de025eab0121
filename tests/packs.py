"""Packs made by hand for tests: named proteins among strangers, through the real collator."""

import random
from pathlib import Path

import numpy as np
import torch

from virnucpro_cli import fasta
from virnucpro_cli.alphabet import ESM, Reading
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.plan.packing import Plan, Segments

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def random_protein(length: int, generator: random.Random) -> str:
    return "".join(generator.choices(RESIDUES, k=length))


def proteins(*lengths: int) -> list[str]:
    """Random proteins, the same each time."""
    generator = random.Random(1)
    return [random_protein(length, generator) for length in lengths]


def one_pack(folder: Path, sequences: list[str], rows: int, reading: Reading = ESM) -> PackedBatch:
    """All sequences, in the order given, in one pack of `rows` rows."""
    path = folder / "pack.fasta"
    path.write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    table = fasta.index(fasta.open_sources([str(path)], folder), dedup=False, reading=reading)
    n = np.arange(len(table))
    segments = Segments(n, np.zeros(len(n), np.int32), table.length)
    tokens = int(table.length.sum()) + 2 * len(n)
    assert tokens <= rows
    plan = Plan(n, np.array([0, len(n)]), np.array([rows]), np.array([tokens]), rows)
    return VarlenCollator(table, segments, table.length, plan)(0)


def embeddings(model: PackedModel, batch: PackedBatch, layers: tuple[int, ...]) -> Embeddings:
    """All three pools of every layer, stored in fp32."""
    return model.embed(batch.to(model.device), layers, Pooler(("mean", "bos", "residue"), torch.float32))


def of_segment(found: Embeddings, batch: PackedBatch, i: int) -> dict[tuple[str, int], torch.Tensor]:
    """Everything that was computed of the i-th segment: (kind, layer) -> [D] or [residues, D]."""
    end = int(batch.seqlens[: i + 1].sum())
    inside = slice(end - int(batch.seqlens[i]) + 1, end - 1)
    pooled = {key: rows[i] for key, rows in found.pooled.items()}
    return pooled | {("residue", layer): rows[inside] for layer, rows in found.residue.items()}


def among_strangers(probes: list[str], rows: int, generator: random.Random) -> tuple[list[str], list[int]]:
    """The probes at random places among random proteins that fill `rows` rows, and where each probe stands."""
    left = rows - sum(len(p) + 2 for p in probes)
    others = []
    while left > 12:
        length = min(generator.randint(10, 700), left - 2)
        others.append(random_protein(length, generator))
        left -= length + 2
    slots = [(generator.random(), None, other) for other in others] + [
        (generator.random(), i, p) for i, p in enumerate(probes)
    ]
    slots.sort(key=lambda slot: slot[0])
    order = {i: at for at, (_, i, _) in enumerate(slots) if i is not None}
    return [sequence for *_, sequence in slots], [order[i] for i in range(len(probes))]
