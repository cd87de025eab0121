"""A layer of each kind in kernels against its plain twin, on the device at hand, before they are relied on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.model.kernels import plain
from virnucpro_cli.model.kernels.attention import attention
from virnucpro_cli.model.kernels.plain import Pair
from virnucpro_cli.model.spec import stream_dtype

ROWS, SCALE = 48, 0.2
LARGEST_DIFFERENCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 2e-1}
"""Relative L2 of a step against its twin in fp32, after all steps before it; 5e-4, 4e-3 and 1e-1 are usual."""


def try_out(steps: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Compile every kernel of `kernels.fused` or `kernels.portable`, and compare one layer's steps with their twins.

    Raises RuntimeError if a step differs, and any error of the compiler or the driver.
    """
    with torch.cuda.device(device), torch.inference_mode():
        tiles = torch.tensor([[0, 0, ROWS]], device=device, dtype=torch.int32)
        for gated in (False,) if dtype == torch.float8_e4m3fn else (False, True):
            noise = Noise(device)
            layer, inputs = made_up(noise, 64, gated), (noise(ROWS, 64), noise(ROWS, 16, scale=3.0))
            ours = _results(steps, layer, inputs, dtype, lambda q, k, v, *left: attention(q, k, v, tiles, SCALE, *left))
            twins = _results(plain, layer, inputs, torch.float32, _plain_attention)
            for name, twin in twins.items():
                must_agree(ours[name], twin, dtype, f"{name} differs from its plain twin")


def must_agree(ours: torch.Tensor, twin: torch.Tensor, dtype: torch.dtype, otherwise: str) -> None:
    """Raise RuntimeError if ours, computed in the dtype, is further from its twin, float32 [...], than it may be."""
    if not (ours.float() - twin).norm() <= LARGEST_DIFFERENCE[dtype] * twin.norm():
        raise RuntimeError(otherwise)


class Noise:
    """Normal numbers, float32 [*shape], the same each time."""

    def __init__(self, device: torch.device):
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, mean: float = 0.0, scale: float = 0.2) -> torch.Tensor:
        return torch.empty(shape, device=self.device).normal_(mean, scale, generator=self.generator)


def made_up(noise: Noise, width: int, gated: bool) -> plain.Layer:
    """A layer, float32: with norms of q and k and SwiGLU, or with neither."""

    def pair(rows: int, depth: int) -> Pair:
        return noise(rows, depth), noise(rows)

    def norm() -> Pair:
        return noise(width, mean=1.0), noise(width)

    gains = (noise(width, mean=1.0), noise(width, mean=1.0)) if gated else None
    inner = (2 if gated else 4) * width
    return plain.Layer(
        norm(), pair(3 * width, width), pair(width, width), norm(), pair(4 * width, width), pair(width, inner), gains,
        gated,
    )  # fmt: skip


def _results(
    steps: Any,
    layer: plain.Layer,
    inputs: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    attention: Callable[..., torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The result of every step by the kernel to blame. inputs: the stream and angles, float32 [T, 64] and [T, 16]."""
    (prepared,), last = steps.prepare([layer], layer.norm1, 32, dtype)
    x, angles = inputs[0].to(stream_dtype(dtype), copy=True), inputs[1]
    tables = steps.rotary(angles.cos(), angles.sin(), torch.arange(ROWS, device=x.device, dtype=torch.int32))
    mixed = attention(*steps.query_key_value(x, prepared, tables))
    steps.add_attention(x, mixed, prepared)
    inner = steps.inner(x, prepared)
    steps.add_inner(x, inner, prepared)
    wide = "swiglu_linear" if layer.gated else "gelu_linear"
    results = {"rotary_linear or attention": mixed, wide: inner.float(), "norm": steps.last_norm(x, last)}
    if dtype == torch.float8_e4m3fn:
        results[wide] /= prepared.fc1.grain
    return {name: each.float() for name, each in results.items()}


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))  # [H, T, Dh]
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(0, 1)
