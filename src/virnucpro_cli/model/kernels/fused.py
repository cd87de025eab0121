"""The forward's steps as fused Triton kernels, for fp16, bf16 and fp8. Same functions as `plain`.

The residual stream is kept without the biases of the linear layers that were added to it. They are constants of the
model (`offset`); the next LayerNorm takes them into account. So cuBLAS adds in place, and LayerNorm is folded away.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from virnucpro_cli.model import plain
from virnucpro_cli.model.kernels import linear, pingpong
from virnucpro_cli.model.kernels.e4m3 import E4M3, quantise, quantise_sum
from virnucpro_cli.model.kernels.linear import (
    GATED,
    Folded,
    Quantised,
    QuantisedSum,
    Rotary,
    add_linear,
    fold,
    rotary,
    swiglu_linear,
    whole_tiles,
)
from virnucpro_cli.model.kernels.norm import norm
from virnucpro_cli.model.plain import Pair

__all__ = [
    "add_attention", "add_inner", "inner", "last_norm", "prepare", "query_key_value", "residual", "rotary"
]  # fmt: skip


class Layer(NamedTuple):
    """qkv and fc1 with their norms folded in; weights of out and fc2; offset, the biases so far, float32 [D].

    gated: whether fc1 is of a SwiGLU.
    """

    qkv: Folded | Quantised
    out: torch.Tensor
    fc1: Folded | Quantised
    fc2: torch.Tensor | QuantisedSum
    offset: torch.Tensor
    gated: bool = False


class LastNorm(NamedTuple):
    offset: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def prepare(
    layers: Iterable[plain.Layer], norm: Pair, head_dim: int, dtype: torch.dtype
) -> tuple[list[Layer], LastNorm]:
    """Layers and the last norm, float32, folded in float64 and then rounded; as `plain.prepare`.

    With e4m3 all products but `out`, which takes little time, are in it.
    """
    offset, prepared = torch.zeros_like(norm[0]), list[Layer]()
    for layer in layers:
        (out, out_bias), (fc2, fc2_bias) = layer.out, layer.fc2
        (weight, bias), gain = _query_key_value(layer, head_dim)
        after_out = offset + out_bias
        after_fc2 = after_out + fc2_bias
        if dtype == E4M3:
            up = quantise(layer.norm2, layer.fc1, after_out)
            down = quantise_sum(fc2, up.grain)
            prepared.append(Layer(quantise(layer.norm1, (weight, bias), offset), out.half(), up, down, after_fc2))
        else:
            wide, fc2 = _gated(layer.fc1, fc2) if layer.gated else (layer.fc1, fc2)
            qkv, fc1 = fold(layer.norm1, (weight, bias), offset, dtype), fold(layer.norm2, wide, after_out, dtype)
            if not (offset.any() or after_out.any()):
                qkv, fc1 = qkv._replace(shift=None), fc1._replace(shift=None)
            prepared.append(Layer(qkv._replace(gain=gain), out.to(dtype), fc1, fc2.to(dtype), after_fc2, layer.gated))
        offset = after_fc2
    return prepared, LastNorm(offset, *norm)


def _query_key_value(layer: plain.Layer, head_dim: int) -> tuple[Pair, torch.Tensor | None]:
    """The joint projection, `_interleaved`, and the gain of `Folded`.

    The norms of q and k subtract a row's mean from it: here it is subtracted from the weights.
    """
    (weight, bias), gain = layer.qkv, None
    if layer.qk_norm is not None:
        weight, bias = _centred(weight), _centred(bias)
        gain = torch.cat((*layer.qk_norm, torch.ones_like(layer.qk_norm[0])))
        gain = whole_tiles(_interleaved(gain, head_dim))
    return (_interleaved(weight, head_dim), _interleaved(bias, head_dim)), gain


def _centred(qkv: torch.Tensor) -> torch.Tensor:
    """Rows of q and of k [3 D, ...] less their means, in float64."""
    thirds = qkv.double().unflatten(0, (3, -1))
    thirds[:2] -= thirds[:2].mean(1, keepdim=True)
    return thirds.flatten(0, 1)


def _gated(linear: Pair, after: torch.Tensor) -> tuple[Pair, torch.Tensor]:
    """fc1 [2 F, D] with `GATED` rows of a by those of b, and fc2 [D, F] after it; zeros fill the last of them."""
    inner = after.shape[1]
    more = -inner % GATED

    def alternating(rows: torch.Tensor) -> torch.Tensor:
        """Rows of a above those of b, [2 F, ...], as [2 F and zeros, ...]."""
        halves = rows.unflatten(0, (2, inner))
        halves = torch.cat((halves, halves.new_zeros(2, more, *rows.shape[1:])), 1)
        return halves.unflatten(1, (-1, GATED)).transpose(0, 1).flatten(0, 2)

    weight, bias = linear
    return (alternating(weight), alternating(bias)), F.pad(after, (0, more))


def _interleaved(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The two halves of every head of q and k interleaved, so that what rotates together is adjacent.

    Scores are sums over a head, so the order within a head does not matter as long as q and k share it.
    """
    turned, kept = qkv.split([2 * (len(qkv) // 3), len(qkv) // 3])
    halves = turned.unflatten(0, (-1, 2, head_dim // 2))  # [2H, 2, Dh/2, ...]
    return torch.cat((halves.transpose(1, 2).flatten(0, 2), kept))


def query_key_value(x: torch.Tensor, layer: Layer, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """The stream x [T, D], float16 or bf16, to q, k, v [T, H, Dh] of its LayerNorm, with q and k rotated.

    Where q and k have norms, two more, float32 [T] each, are what rows of q and of k are still to be multiplied by.
    """
    way = pingpong if pingpong.takes(x, layer.qkv, rotary.table.shape[1]) else linear
    return way.rotary_linear(x, layer.qkv, rotary)


def add_attention(x: torch.Tensor, mixed: torch.Tensor, layer: Layer) -> None:
    """x [T, D] += the output projection of attention's result [T, H, Dh], float16 or bf16; no bias."""
    x.addmm_(mixed.view(x.shape), layer.out.T)


def inner(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """x [T, D], float16 or bf16, to gelu(fc1(LayerNorm(x))) [T, 4 D] in the dtype of x, or in e4m3 times a grain.

    Gated: to SwiGLU's silu(a) b [T, F], F rounded up to a multiple of `GATED` with zeros.
    """
    if layer.gated:
        assert isinstance(layer.fc1, Folded)  # fp8 is refused
        return swiglu_linear(x, layer.fc1)
    return (pingpong if pingpong.takes(x, layer.fc1) else linear).gelu_linear(x, layer.fc1)


def add_inner(x: torch.Tensor, inner: torch.Tensor, layer: Layer) -> None:
    """x [T, D] += fc2(inner [T, 4 D], or [T, F]) in the dtype of x, no bias."""
    if isinstance(layer.fc2, QuantisedSum):
        add_linear(x, inner, layer.fc2)
    else:
        x.addmm_(inner, layer.fc2.T)


def residual(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The residual stream after the layer, of its x [T, D] and in the dtype of x, with all biases so far."""
    return (x + layer.offset).to(x.dtype)


def last_norm(x: torch.Tensor, last: LastNorm) -> torch.Tensor:
    """The final LayerNorm of the stream x [T, D] of the last layer, in the dtype of x."""
    return norm(x, *last)
