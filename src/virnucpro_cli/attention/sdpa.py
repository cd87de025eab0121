"""Scaled dot-product attention, one call per run of equally long segments. The CPU path, and any other device's."""

from itertools import groupby

import torch
import torch.nn.functional as F

from virnucpro_cli.collate import PackedBatch


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    out = torch.empty_like(q)
    at = 0
    for length, group in groupby(batch.lengths.tolist()):  # the planner puts equal lengths side by side
        count = sum(1 for _ in group)
        rows = slice(at, at + count * length)
        qs, ks, vs = (
            x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)
        )  # [count, H, length, Dh]
        mixed = F.scaled_dot_product_attention(qs, ks, vs, scale=scale)
        out[rows] = mixed.transpose(1, 2).flatten(0, 1)
        at += count * length
    return out
