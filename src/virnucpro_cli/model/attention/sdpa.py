"""Scaled dot-product attention, the path of the CPU and of any other device.

The CPU makes a call per run of equally long segments. Others make a call per segment, since the number of equally long
neighbours may choose their kernel.
"""

from itertools import groupby

import torch
import torch.nn.functional as F

from virnucpro_cli.batch import PackedBatch


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all of one dtype."""
    out = torch.empty_like(q)
    at = 0
    lengths = batch.seqlens.tolist()  # the planner puts equal lengths side by side
    runs = ((length, sum(1 for _ in group)) for length, group in groupby(lengths))
    for length, count in runs if q.device.type == "cpu" else ((length, 1) for length in lengths):
        rows = slice(at, at + count * length)
        # [count, H, length, Dh]
        qs, ks, vs = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(qs, ks, vs, scale=scale)
        out[rows] = mixed.transpose(1, 2).flatten(0, 1)
        at += count * length
    return out
