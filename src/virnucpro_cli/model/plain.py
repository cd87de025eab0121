"""The forward's steps in plain PyTorch: the path of every device without fused kernels, and the twin those must match.

Steps are these functions: `prepare` the weights, `rotary` for a batch, and for each layer `query_key_value`,
`add_attention`, `inner`, `add_inner`; `residual` or `last_norm` for wanted layers.
Shapes: T rows of a pack, H heads of Dh, D = H * Dh.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from virnucpro_cli.model.spec import LAYER_NORM_EPS

Rotary = tuple[torch.Tensor, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]


class Layer(NamedTuple):
    """Weight and bias of every part; qkv is the joint projection [3D, D].

    qk_norm: weights [D] of LayerNorms without bias of queries and of keys, before they are split into heads, or None.
    gated: whether fc1 is [2F, D], the gate above what it multiplies (SwiGLU), and not [4D, D] before a GELU.
    """

    norm1: Pair
    qkv: Pair
    out: Pair
    norm2: Pair
    fc1: Pair
    fc2: Pair
    qk_norm: Pair | None = None
    gated: bool = False


def prepare(layers: Iterable[Layer], norm: Pair, head_dim: int, dtype: torch.dtype) -> tuple[list[Layer], Pair]:
    """Layers and the last norm, float32, in the form that the other functions take."""

    def cast(part: Pair | bool | None) -> Any:
        return (part[0].to(dtype), part[1].to(dtype)) if isinstance(part, tuple) else part

    return [Layer(*map(cast, layer)) for layer in layers], cast(norm)


def rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Rotary:
    """Rows of the tables [L, Dh/2] (float32) at these positions (int32 [T]), for every layer: [T, 1, 1, Dh/2] each."""
    return cos.index_select(0, positions)[:, None, None, :], sin.index_select(0, positions)[:, None, None, :]


def query_key_value(x: torch.Tensor, layer: Layer, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """The stream x [T, D] to q, k, v [T, H, Dh] of its LayerNorm in the layer's dtype, with q and k rotated."""
    qkv = F.linear(layer_norm(x, *layer.norm1), *layer.qkv)
    if layer.qk_norm is not None:
        for each, weight in zip(qkv.chunk(3, dim=-1), layer.qk_norm, strict=False):
            each.copy_(layer_norm(each, weight))
    return rotated(qkv, rotary)


def rotated(qkv: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """The joint projection [T, 3 D] as q, k, v [T, H, Dh] of the same dtype, with q and k rotated."""
    qkv = qkv.view(len(qkv), 3, -1, 2 * rotary[0].shape[-1])
    qk = rotate(qkv[:, :2], *rotary)
    return qk[:, 0], qk[:, 1], qkv[:, 2]


def add_attention(x: torch.Tensor, mixed: torch.Tensor, layer: Layer) -> None:
    """x [T, D] += the output projection of attention's result [T, H, Dh], in the layer's dtype; x may be wider."""
    x += F.linear(mixed.reshape(x.shape), *layer.out)


def inner(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """x [T, D] to gelu(fc1(LayerNorm(x))) [T, 4 D] in the layer's dtype, or gated to SwiGLU's silu(a) b [T, F]."""
    wide = F.linear(layer_norm(x, *layer.norm2), *layer.fc1)
    return swiglu(wide) if layer.gated else gelu(wide)


def add_inner(x: torch.Tensor, inner: torch.Tensor, layer: Layer) -> None:
    """x [T, D] += fc2(inner [T, 4 D], or [T, F]), in the layer's dtype; x may be wider."""
    x += F.linear(inner, *layer.fc2)


def residual(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The residual stream after the layer, of its x [T, D] of any dtype: the same."""
    return x


def last_norm(x: torch.Tensor, norm: Pair) -> torch.Tensor:
    """The final LayerNorm of the stream x [T, D] of the last layer, in the dtype of the norm."""
    return layer_norm(x, *norm)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """LayerNorm of x [T, D] with weight and bias [D] or None, in the dtype of x, and rounded to that of the weight."""
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps=LAYER_NORM_EPS)
    wide = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), wide, eps=LAYER_NORM_EPS).to(weight.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(a) b [T, F] of x [T, 2 F], which is a beside b, in its dtype. May overwrite x."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU of x [T, M] in its dtype, by the error function, never the tanh form. May overwrite x."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # F.gelu's own erf is off by 1e-6 there, a bias that adds up.
        return x.mul_((x * 2**-0.5).erf_().add_(1).mul_(0.5))
    return F.gelu(x)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding by halves, in fp32. x [T, ..., Dh]; cos, sin float32, broadcastable to [T, ..., Dh/2]."""
    first, second = x.float().chunk(2, dim=-1)
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out.to(x.dtype)
