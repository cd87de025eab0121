"""Mistakes that ESM-2 implementations have made, to be made here on purpose: a gate that no mistake trips proves nothing."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.model import esm2, plain, pooling
from virnucpro_cli.model.attention import sdpa
from virnucpro_cli.model.packed import OnLayer, PackedModel
from virnucpro_cli.store import Store
from virnucpro_cli.validation import invariance

Mistake = Callable[[pytest.MonkeyPatch], None]


def tanh_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plain, "gelu", lambda x: F.gelu(x, approximate="tanh"))


def rotary_tables_in(dtype: torch.dtype) -> Mistake:
    def sabotage(patch: pytest.MonkeyPatch) -> None:
        reserve = PackedModel.reserve_positions

        def rounded(model: PackedModel, longest: int) -> None:
            reserve(model, longest)
            model.cos, model.sin = model.cos.to(dtype).float(), model.sin.to(dtype).float()

        patch.setattr(PackedModel, "reserve_positions", rounded)

    return sabotage


def recomputed_inv_freq(patch: pytest.MonkeyPatch) -> None:
    reserve = PackedModel.reserve_positions

    def exact(model: PackedModel, longest: int) -> None:
        width = model.spec.head_dim
        model.inv_freq = 1.0 / 10000.0 ** (torch.arange(0, width, 2) / width)
        reserve(model, longest)

    patch.setattr(PackedModel, "reserve_positions", exact)


def interleaved_rotary(patch: pytest.MonkeyPatch) -> None:
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    patch.setattr(plain, "rotate", rotate)


def every_norm_final(patch: pytest.MonkeyPatch) -> None:
    forward = PackedModel.forward

    def normed(model: PackedModel, batch: PackedBatch, wanted: tuple[int, ...], on_layer: OnLayer) -> None:
        def call(layer: int, hidden: torch.Tensor) -> None:
            last = layer == model.spec.layers
            on_layer(layer, hidden if last else plain.layer_norm(hidden, *model.norm))

        forward(model, batch, wanted, call)

    patch.setattr(PackedModel, "forward", normed)


def no_final_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plain, "last_norm", lambda x, norm: x.clone())


def layer_off_by_one(patch: pytest.MonkeyPatch) -> None:
    forward = PackedModel.forward

    def earlier(model: PackedModel, batch: PackedBatch, wanted: tuple[int, ...], on_layer: OnLayer) -> None:
        forward(model, batch, tuple(max(n - 1, 0) for n in wanted), lambda n, x: [on_layer(w, x) for w in wanted if max(w - 1, 0) == n])  # fmt: skip

    patch.setattr(PackedModel, "forward", earlier)


def mean_with_cls_and_eos(patch: pytest.MonkeyPatch) -> None:
    def mean(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        bounds = batch.cu_seqlens.tolist()
        return torch.stack([hidden[a:b].mean(0) for a, b in pairwise(bounds)])

    patch.setitem(pooling.POOLS, "mean", mean)


def mean_with_eos(patch: pytest.MonkeyPatch) -> None:
    def mean(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        bounds = batch.cu_seqlens.tolist()
        return torch.stack([hidden[a + 1 : b].mean(0) for a, b in pairwise(bounds)])

    patch.setitem(pooling.POOLS, "mean", mean)


def in_attention(change: Callable[[PackedBatch, int], PackedBatch], power: int = 1) -> Mistake:
    def sabotage(patch: pytest.MonkeyPatch) -> None:
        attend = sdpa.attention

        def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
            return attend(q, k, v, change(batch, len(q)), scale**power)

        patch.setattr(sdpa, "attention", wrong)

    return sabotage


def one_row_into_the_neighbour(batch: PackedBatch, rows: int) -> PackedBatch:
    seqlens = batch.seqlens.copy()
    if len(seqlens) > 1:
        seqlens[0] += 1
        seqlens[1] -= 1
    return replace(batch, seqlens=seqlens)


def filler_attended(batch: PackedBatch, rows: int) -> PackedBatch:
    seqlens = batch.seqlens.copy()
    seqlens[-1] += rows - batch.used
    return replace(batch, seqlens=seqlens)


def in_collation(change: Callable[[PackedBatch], PackedBatch]) -> Mistake:
    def sabotage(patch: pytest.MonkeyPatch) -> None:
        collate = VarlenCollator.__call__
        patch.setattr(VarlenCollator, "__call__", lambda collator, pack: change(collate(collator, pack)))

    return sabotage


def positions_run_on(batch: PackedBatch) -> PackedBatch:
    return replace(
        batch, positions=torch.arange(len(batch.positions), dtype=torch.int32), max_seqlen=len(batch.positions)
    )


def bounds_off_by_one(batch: PackedBatch) -> PackedBatch:
    bounds = batch.cu_seqlens.clone()
    bounds[1:-1] += 1
    return replace(batch, cu_seqlens=bounds)


def rows_shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    place = Store.place

    def shifted(file: Store, kind: str, layer: int, rows: np.ndarray, values: np.ndarray) -> None:
        place(file, kind, layer, rows if kind == "residue" else (rows + 1) % len(file.status), values)

    patch.setattr(Store, "place", shifted)


def wrong_constant_in_16_bit(patch: pytest.MonkeyPatch) -> None:
    def gelu(x: torch.Tensor) -> torch.Tensor:
        return (
            exact(x) if x.dtype == torch.float32 else (x.float() * 0.5 * (1 + torch.erf(x.float() * 0.70))).to(x.dtype)
        )

    exact = plain.gelu
    patch.setattr(plain, "gelu", gelu)


def tanh_gelu_in_16_bit(patch: pytest.MonkeyPatch) -> None:
    exact = plain.gelu
    patch.setattr(plain, "gelu", lambda x: exact(x) if x.dtype == torch.float32 else F.gelu(x, approximate="tanh"))


def without_packing(patch: pytest.MonkeyPatch) -> None:
    """The packing check takes most of the time, and is not asked where semantics are."""
    patch.setattr(invariance, "packing", lambda *_: iter(()))


MISTAKES: dict[str, Mistake] = {
    "no-0.88-scale": lambda patch: patch.setattr(esm2, "EMBED_SCALE", 1.0),
    "tanh-gelu": tanh_gelu,
    "layer-norm-eps-1e-12": lambda patch: patch.setattr(plain, "LAYER_NORM_EPS", 1e-12),
    "inv-freq-recomputed": recomputed_inv_freq,
    "rotary-tables-in-bf16": rotary_tables_in(torch.bfloat16),
    "rotary-tables-in-fp16": rotary_tables_in(torch.float16),
    "rotary-interleaved": interleaved_rotary,
    "final-norm-on-every-layer": every_norm_final,
    "mean-with-cls-and-eos": mean_with_cls_and_eos,
    "attention-one-row-into-the-neighbour": in_attention(one_row_into_the_neighbour),
}
"""Seen by comparing single packs with fair-esm."""

MORE_MISTAKES: dict[str, Mistake] = {
    "no-final-norm": no_final_norm,
    "layer-off-by-one": layer_off_by_one,
    "mean-with-eos": mean_with_eos,
    "softmax-scale-twice": in_attention(lambda batch, rows: batch, power=2),
    "filler-attended": in_attention(filler_attended),
    "cu-seqlens-off-by-one": in_collation(bounds_off_by_one),
    "rows-shifted-by-one": rows_shifted_by_one,
}
"""Seen by comparing what is stored with fair-esm."""
