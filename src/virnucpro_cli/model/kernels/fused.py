"""The forward's steps as fused Triton kernels, for fp16, bf16 and fp8. Same functions as `plain`.

The residual stream is kept without the biases of the linear layers that were added to it; they are constants of the model
(`offset`) that the next LayerNorm takes into account. So cuBLAS adds to it in place, and LayerNorm is folded away.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from virnucpro_cli.model.kernels import plain
from virnucpro_cli.model.kernels.e4m3 import E4M3, quantise, quantise_sum
from virnucpro_cli.model.kernels.linear import (
    Folded,
    Quantised,
    QuantisedSum,
    Rotary,
    add_linear,
    fold,
    gelu_linear,
    rotary,
    rotary_linear,
)
from virnucpro_cli.model.kernels.norm import norm
from virnucpro_cli.model.kernels.plain import Pair

__all__ = [
    "add_attention", "add_inner", "gelu_inner", "last_norm", "prepare", "query_key_value", "residual", "rotary"
]  # fmt: skip


class Layer(NamedTuple):
    """qkv and fc1 with their norms folded in; weights of out and fc2; offset, the biases so far, float32 [D]."""

    qkv: Folded | Quantised
    out: torch.Tensor
    fc1: Folded | Quantised
    fc2: torch.Tensor | QuantisedSum
    offset: torch.Tensor


class LastNorm(NamedTuple):
    offset: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def prepare(
    layers: Iterable[plain.Layer], norm: Pair, head_dim: int, dtype: torch.dtype
) -> tuple[list[Layer], LastNorm]:
    """As `plain.prepare`, folded in float64 and then rounded. In e4m3 all products but `out`, which takes little time."""
    offset, found = torch.zeros_like(norm[0]), list[Layer]()
    for layer in layers:
        (out, out_bias), (fc2, fc2_bias) = layer.out, layer.fc2
        weight, bias = (_interleaved(each, head_dim) for each in layer.qkv)
        after_out = offset + out_bias
        after_fc2 = after_out + fc2_bias
        if dtype == E4M3:
            up = quantise(layer.norm2, layer.fc1, after_out)
            down = quantise_sum(fc2, up.grain)
            found.append(Layer(quantise(layer.norm1, (weight, bias), offset), out.half(), up, down, after_fc2))
        else:
            qkv, fc1 = fold(layer.norm1, (weight, bias), offset, dtype), fold(layer.norm2, layer.fc1, after_out, dtype)
            found.append(Layer(qkv, out.to(dtype), fc1, fc2.to(dtype), after_fc2))
        offset = after_fc2
    return found, LastNorm(offset, *norm)


def _interleaved(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The two halves of every head of q and k interleaved, so that what rotates together is adjacent.

    Scores are sums over a head, so the order within a head does not matter as long as q and k share it.
    """
    turned, kept = qkv.split([2 * (len(qkv) // 3), len(qkv) // 3])
    halves = turned.unflatten(0, (-1, 2, head_dim // 2))  # [2H, 2, Dh/2, ...]
    return torch.cat((halves.transpose(1, 2).flatten(0, 2), kept))


def query_key_value(x: torch.Tensor, layer: Layer, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    return rotary_linear(x, layer.qkv, rotary)


def add_attention(x: torch.Tensor, mixed: torch.Tensor, layer: Layer) -> None:
    x.addmm_(mixed.view(x.shape), layer.out.T)


def gelu_inner(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return gelu_linear(x, layer.fc1)


def add_inner(x: torch.Tensor, inner: torch.Tensor, layer: Layer) -> None:
    if isinstance(layer.fc2, QuantisedSum):
        add_linear(x, inner, layer.fc2)
    else:
        x.addmm_(inner, layer.fc2.T)


def residual(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return (x + layer.offset).to(x.dtype)


def last_norm(x: torch.Tensor, last: LastNorm) -> torch.Tensor:
    return norm(x, *last)
