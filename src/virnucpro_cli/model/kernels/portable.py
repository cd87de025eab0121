"""The forward's steps for any GPU with Triton: what PyTorch does in many passes around its products, in one each.

Same functions as `plain`, for fp16 and bf16. The products are PyTorch's own. The residual stream is kept without the
biases that were added to it, as in `fused`; the weight and bias of a LayerNorm are folded into the product after it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from virnucpro_cli.model import plain
from virnucpro_cli.model.kernels import OPTIONS
from virnucpro_cli.model.kernels.fused import LastNorm, add_attention, last_norm, residual
from virnucpro_cli.model.kernels.glue import gated
from virnucpro_cli.model.kernels.norm import norm
from virnucpro_cli.model.plain import Pair
from virnucpro_cli.model.spec import LAYER_NORM_EPS

__all__ = [
    "add_attention", "add_inner", "inner", "last_norm", "prepare", "query_key_value", "residual", "rotary"
]  # fmt: skip
Rotary = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Normed(NamedTuple):
    """A linear layer after a LayerNorm of x + offset: weight [M, K] and bias [M]; offset, one, zero: float32 [K]."""

    weight: torch.Tensor
    bias: torch.Tensor
    offset: torch.Tensor
    one: torch.Tensor
    zero: torch.Tensor


class Layer(NamedTuple):
    """qkv and fc1 with their norms; weights of out and fc2; offset, the biases so far, float32 [D].

    gain: float32 [2, D], weights of the norms of queries and of keys, or None. gated: whether fc1 is of a SwiGLU.
    """

    qkv: Normed
    out: torch.Tensor
    fc1: Normed
    fc2: torch.Tensor
    offset: torch.Tensor
    gain: torch.Tensor | None
    gated: bool


def prepare(
    layers: Iterable[plain.Layer], last: Pair, head_dim: int, dtype: torch.dtype
) -> tuple[list[Layer], LastNorm]:
    """Layers and the last norm, float32, folded in float64 and then rounded; as `plain.prepare`."""
    offset, prepared = torch.zeros_like(last[0]), list[Layer]()
    one, zero = torch.ones_like(offset), torch.zeros_like(offset)

    def normed(norm: Pair, linear: Pair) -> Normed:
        (gamma, beta), (weight, bias) = norm, linear
        wide = weight.double()
        bias = bias + wide @ beta.double()
        return Normed((wide * gamma).to(dtype), bias.to(dtype), offset, one, zero)

    for layer in layers:
        qkv, gain = normed(layer.norm1, layer.qkv), None
        if layer.qk_norm is not None:
            gain = torch.stack(layer.qk_norm)
        offset = offset + layer.out[1]
        fc1 = normed(layer.norm2, layer.fc1)
        offset = offset + layer.fc2[1]
        prepared.append(Layer(qkv, layer.out[0].to(dtype), fc1, layer.fc2[0].to(dtype), offset, gain, layer.gated))
    return prepared, LastNorm(offset, *last)


def rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Rotary:
    """The tables [L, Dh/2] (float32) and the positions (int32 [T]) at which `query_key_value` reads them."""
    return cos, sin, positions


@triton.jit
def _turn(
    qkv, gain, cos, sin, positions, eps, stride, heads,
    HALF: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The queries of a row, or its keys: normed if there is a gain, and rotated, in place."""
    row, kind = tl.program_id(0), tl.program_id(1)
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDE)[None, :]
    inside = (head < heads) & (d < HALF)
    column = head * (2 * HALF) + d
    at = qkv + row.to(tl.int64) * stride + kind * (heads * 2 * HALF) + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if gain is not None:
        width = heads * 2 * HALF
        mean = tl.sum(first + second) / width
        first, second = tl.where(inside, first - mean, 0.0), tl.where(inside, second - mean, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(first * first + second * second) / width + eps)
        own = gain + kind * width + column
        first *= scale * tl.load(own, mask=inside, other=0.0)
        second *= scale * tl.load(own + HALF, mask=inside, other=0.0)
    angle = tl.load(positions + row).to(tl.int64) * HALF + d
    c, s = tl.load(cos + angle, mask=d < HALF, other=0.0), tl.load(sin + angle, mask=d < HALF, other=0.0)
    tl.store(at, (first * c - second * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * c + first * s).to(qkv.dtype.element_ty), mask=inside)


def query_key_value(x: torch.Tensor, layer: Layer, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """The stream x [T, D], float16 or bf16, to q, k, v [T, H, Dh] of its LayerNorm, with q and k rotated.

    Where q and k have norms, they are normed before.
    """
    cos, sin, positions = rotary
    qkv = _linear(x, layer.qkv)
    half, width = cos.shape[1], x.shape[1]
    heads = width // (2 * half)
    sizes = {"HALF": half, "WIDE": triton.next_power_of_2(half), "HEADS": triton.next_power_of_2(heads)}
    _turn[(len(x), 2)](
        qkv, layer.gain, cos, sin, positions, LAYER_NORM_EPS, qkv.stride(0), heads, **sizes, num_warps=4, **OPTIONS
    )  # fmt: skip
    return tuple(each.unflatten(1, (heads, 2 * half)) for each in qkv.chunk(3, dim=1))


def inner(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """x [T, D], float16 or bf16, to gelu(fc1(LayerNorm(x))) [T, 4 D], or gated to SwiGLU's silu(a) b [T, F]."""
    wide = _linear(x, layer.fc1)
    return gated(wide, by_gelu=False) if layer.gated else F.gelu(wide)


def add_inner(x: torch.Tensor, inner: torch.Tensor, layer: Layer) -> None:
    """x [T, D], float16 or bf16, += fc2(inner [T, 4 D], or [T, F]), no bias."""
    x.addmm_(inner, layer.fc2.T)


def _linear(x: torch.Tensor, layer: Normed) -> torch.Tensor:
    return F.linear(norm(x, layer.offset, layer.one, layer.zero), layer.weight, layer.bias)
