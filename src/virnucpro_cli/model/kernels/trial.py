"""One layer of every fused kernel against its plain twin, on the device at hand, before any of them is relied on."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.model.kernels import fused, plain
from virnucpro_cli.model.kernels.attention import attention
from virnucpro_cli.model.kernels.linear import Quantised
from virnucpro_cli.model.kernels.plain import Pair
from virnucpro_cli.model.spec import stream_dtype

LARGEST_DIFFERENCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 2e-1}
"""Relative L2 of a step against its twin in fp32, after all steps before it; 5e-4, 4e-3 and 1e-1 are usual."""


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compile every kernel on this device and compare one layer's steps with their plain twins.

    Raises RuntimeError if a step differs, and any error of the compiler or the driver.
    """
    with torch.cuda.device(device), torch.inference_mode():
        tiles = torch.tensor([[0, 0, 16]], device=device, dtype=torch.int32)
        results = _one_layer(fused, dtype, device, lambda q, k, v: attention(q, k, v, tiles, 0.2))
        twins = _one_layer(plain, torch.float32, device, _plain_attention)
        for name, twin in twins.items():
            if not (results[name] - twin).norm() <= LARGEST_DIFFERENCE[dtype] * twin.norm():
                raise RuntimeError(f"{name} differs from its plain twin")


def _one_layer(
    steps: Any, dtype: torch.dtype, device: torch.device, attention: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The result of every step for the same 16 rows of 2 heads of 32 in a layer of sines, by the kernel to blame."""

    def waves(*shape: int, scale: float = 0.2) -> torch.Tensor:
        """Sines, float32 [*shape]."""
        return torch.linspace(-9, 9 + len(shape), math.prod(shape), device=device).sin().mul(scale).reshape(shape)

    def pair(*shape: int) -> Pair:
        return waves(*shape), waves(shape[0])

    norm = waves(64) + 1, waves(64)
    layers = [plain.Layer(norm, pair(192, 64), pair(64, 64), norm, pair(256, 64), pair(64, 256))]
    (layer,), last = steps.prepare(layers, norm, 32, dtype)
    x, angles = waves(16, 64, scale=1.0).to(stream_dtype(dtype)), waves(16, 16, scale=3.0)
    tables = steps.rotary(angles.cos(), angles.sin(), torch.arange(16, device=device, dtype=torch.int32))
    mixed = attention(*steps.query_key_value(x, layer, tables))
    steps.add_attention(x, mixed, layer)
    inner = steps.inner(x, layer)
    steps.add_inner(x, inner, layer)
    results = {"rotary_linear or attention": mixed, "gelu_linear": inner.float(), "norm": steps.last_norm(x, last)}
    if isinstance(layer.fc1, Quantised):
        results["gelu_linear"] /= layer.fc1.grain
    return {name: each.float() for name, each in results.items()}


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))  # [H, T, Dh]
    return F.scaled_dot_product_attention(q, k, v, scale=0.2).transpose(0, 1)
