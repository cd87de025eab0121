"""The forward's steps as fused Triton kernels, for fp16 and bf16. Same functions as `plain`.

The residual stream is kept without the biases of the linear layers that were added to it; they are constants of the model
(`offset`) that the next LayerNorm takes into account. So cuBLAS adds to it in place, and LayerNorm is folded away.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from virnucpro_cli.kernels import plain
from virnucpro_cli.kernels.attention import attention
from virnucpro_cli.kernels.linear import Folded, Rotary, fold, gelu_linear, rotary, rotary_linear
from virnucpro_cli.kernels.norm import norm
from virnucpro_cli.kernels.plain import Pair

__all__ = [
    "add_attention", "add_inner", "gelu_inner", "last_norm", "prepare", "query_key_value", "residual", "rotary", "try_out"
]  # fmt: skip


class Layer(NamedTuple):
    """qkv and fc1 with their norms folded in; weights of out and fc2; offset, the biases so far, float32 [D]."""

    qkv: Folded
    out: torch.Tensor
    fc1: Folded
    fc2: torch.Tensor
    offset: torch.Tensor


class LastNorm(NamedTuple):
    offset: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def prepare(
    layers: Iterable[plain.Layer], norm: Pair, head_dim: int, dtype: torch.dtype
) -> tuple[list[Layer], LastNorm]:
    """As `plain.prepare`, folded in float64 and then rounded."""
    offset, found = torch.zeros_like(norm[0]), []
    for layer in layers:
        (out, out_bias), (fc2, fc2_bias) = layer.out, layer.fc2
        weight, bias = (_interleaved(each, head_dim) for each in layer.qkv)
        qkv = fold(layer.norm1, (weight, bias), offset, dtype)
        offset = offset + out_bias
        fc1 = fold(layer.norm2, layer.fc1, offset, dtype)
        offset = offset + fc2_bias
        found.append(Layer(qkv, out.to(dtype), fc1, fc2.to(dtype), offset))
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
    x.addmm_(inner, layer.fc2.T)


def residual(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return (x + layer.offset).to(x.dtype)


def last_norm(x: torch.Tensor, last: LastNorm) -> torch.Tensor:
    return norm(x, *last)


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compile every kernel on this device and compare one layer's steps with their plain twins; raises whatever goes wrong."""
    with torch.cuda.device(device), torch.inference_mode():
        tiles = torch.tensor([[0, 0, 16]], device=device, dtype=torch.int32)
        found = _one_layer(sys.modules[__name__], dtype, device, lambda q, k, v: attention(q, k, v, tiles, 0.2))
        twins = _one_layer(plain, torch.float32, device, _plain_attention)
        for name, twin in twins.items():
            if not (found[name] - twin).norm() <= 2e-2 * twin.norm():
                raise RuntimeError(f"{name} differs from its plain twin")


def _one_layer(
    steps: Any, dtype: torch.dtype, device: torch.device, attention: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What every step makes of the same 16 rows of 2 heads of 32 in a layer of sines, by the kernel to blame."""

    def waves(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return torch.linspace(-9, 9 + len(shape), math.prod(shape), device=device).sin().mul(scale).reshape(shape)

    def pair(*shape: int) -> Pair:
        return waves(*shape), waves(shape[0])

    norm = waves(64) + 1, waves(64)
    layers = [plain.Layer(norm, pair(192, 64), pair(64, 64), norm, pair(256, 64), pair(64, 256))]
    (layer,), last = steps.prepare(layers, norm, 32, dtype)
    x, angles = waves(16, 64, scale=1.0).to(dtype), waves(16, 16, scale=3.0)
    tables = steps.rotary(angles.cos(), angles.sin(), torch.arange(16, device=device, dtype=torch.int32))
    mixed = attention(*steps.query_key_value(x, layer, tables))
    steps.add_attention(x, mixed, layer)
    inner = steps.gelu_inner(x, layer)
    steps.add_inner(x, inner, layer)
    found = {"rotary_linear or attention": mixed, "gelu_linear": inner, "norm": steps.last_norm(x, last)}
    return {name: each.float() for name, each in found.items()}


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))  # [H, T, Dh]
    return F.scaled_dot_product_attention(q, k, v, scale=0.2).transpose(0, 1)
