"""A layer of each kind in kernels against its plain twin, on the device at hand, before they are relied on."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.model import plain
from virnucpro_cli.model.kernels.attention import attention
from virnucpro_cli.model.plain import Pair
from virnucpro_cli.model.spec import stream_dtype
from virnucpro_cli.stopping import threads

ROWS, HEAD_DIM, SCALE = 48, 32, 0.2
LARGEST_DIFFERENCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 2e-1}
"""Relative L2 of a step against its twin in fp32, after all steps before it; 5e-4, 4e-3 and 1e-1 are usual."""
MOST_COMPILERS = 16


def try_out(steps: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Compile every kernel of `kernels.fused` or `kernels.portable`, and compare one layer's steps with their twins.

    Raises RuntimeError if a step differs, and any error of the compiler or the driver.
    """
    with torch.cuda.device(device), torch.inference_mode():
        tiles = torch.tensor([[0, 0, ROWS]], device=device, dtype=torch.int32)

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *left: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, tiles, SCALE, *left)

        noise, pairs = Noise(device), list[tuple[_Steps, _Steps]]()
        for gated in (False,) if dtype == torch.float8_e4m3fn else (False, True):
            layer, inputs = made_up(noise, 64, gated), (noise(ROWS, 64), noise(ROWS, HEAD_DIM // 2, scale=3.0))
            twin = _Steps(plain, layer, inputs, torch.float32, _plain_attention)
            pairs.append((_Steps(steps, layer, inputs, dtype, ours), twin))
        if device.type == "cuda":
            side_by_side(device, [call for each, _ in pairs for call in each.alone(noise)])
        for each, twin in pairs:
            found = each.results()
            for name, exact in twin.results().items():
                must_agree(found[name], exact, dtype, f"{name} differs from its plain twin")


def side_by_side(device: torch.device, calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Results of calls, each in a thread: compilers of kernels, which take a second each, work beside each other.

    Raises the error of the first call that has one. Without a GPU, where nothing is compiled: one after the other.
    """
    if device.type != "cuda":
        return [each() for each in calls]

    def call(each: Callable[[], Any]) -> Any:
        with torch.cuda.device(device), torch.inference_mode():
            return each()

    with threads(MOST_COMPILERS) as pool:
        return list(pool.map(call, calls))


def alone(steps: Any, x: torch.Tensor, layer: Any, tables: Any, last: Any) -> list[Callable[[], Any]]:
    """Calls of the steps with kernels, none of which needs what another gives. x: the stream [T, D], in its dtype.

    layer, tables, last: a prepared layer, the rotary embedding of the rows, and the prepared last norm.
    """
    return [
        partial(steps.query_key_value, x, layer, tables), partial(steps.inner, x, layer),
        partial(steps.last_norm, x, last),
    ]  # fmt: skip


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


class _Steps:
    """A layer's steps in one of their ways. inputs: the stream and angles, float32 [T, 64] and [T, 16]."""

    def __init__(
        self, steps: Any, layer: plain.Layer, inputs: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype,
        attention: Callable[..., torch.Tensor],
    ):  # fmt: skip
        (self.prepared,), self.last = steps.prepare([layer], layer.norm1, HEAD_DIM, dtype)
        self.steps, self.gated, self.dtype, self.attention = steps, layer.gated, dtype, attention
        self.x, angles = inputs
        self.tables = steps.rotary(
            angles.cos(), angles.sin(), torch.arange(ROWS, device=self.x.device, dtype=torch.int32)
        )

    def alone(self, noise: "Noise") -> list[Callable[[], Any]]:
        """The calls of `alone`, and one of attention."""
        x = self.x.to(stream_dtype(self.dtype))
        q, k, v = noise(ROWS, 3, 64 // HEAD_DIM, HEAD_DIM).to(x.dtype).unbind(1)
        left = (noise(ROWS), noise(ROWS)) if self.gated else ()
        calls = alone(self.steps, x, self.prepared, self.tables, self.last)
        return [*calls, partial(self.attention, q, k, v, *left)]

    def results(self) -> dict[str, torch.Tensor]:
        """The result of every step, float32, by the kernel to blame."""
        steps, prepared, x = self.steps, self.prepared, self.x.to(stream_dtype(self.dtype), copy=True)
        mixed = self.attention(*steps.query_key_value(x, prepared, self.tables))
        steps.add_attention(x, mixed, prepared)
        inner = steps.inner(x, prepared)
        steps.add_inner(x, inner, prepared)
        wide = "swiglu_linear" if self.gated else "gelu_linear"
        results = {"rotary_linear or attention": mixed, wide: inner.float(), "norm": steps.last_norm(x, self.last)}
        if self.dtype == torch.float8_e4m3fn:
            results[wide] /= prepared.fc1.grain
        return {name: each.float() for name, each in results.items()}


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))  # [H, T, Dh]
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(0, 1)
