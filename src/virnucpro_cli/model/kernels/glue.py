"""Passes between the products of a layer in Triton: the gate, and a sum with the LayerNorm that comes after it."""

import torch
import triton
import triton.language as tl

from virnucpro_cli.model.kernels import OPTIONS
from virnucpro_cli.model.kernels.linear import gelu, silu
from virnucpro_cli.model.kernels.norm import launch, place
from virnucpro_cli.model.plain import Pair

COLUMNS = 1024


@triton.jit
def _add_norm(
    x, y, weight, bias, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr
):
    """Rows in parts of WIDE columns, as in `norm`; a row's parts are all loaded before the first is stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    parts, total, square = (), tl.zeros((ROWS, WIDE), tl.float32), tl.zeros((ROWS, WIDE), tl.float32)
    for part in tl.static_range(PARTS):
        _, inside, at = place(part, row, rows, D, WIDE)
        each = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        each += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        parts, total = parts + (each,), total + each  # type: ignore[assignment]  # noqa: RUF005
    mean = tl.sum(total, 1, keep_dims=True) / D
    for part in tl.static_range(PARTS):
        _, inside, _ = place(part, row, rows, D, WIDE)
        each = tl.where(inside, parts[part] - mean, 0.0)
        square += each * each
    scale = 1.0 / tl.sqrt(tl.sum(square, 1, keep_dims=True) / D + eps)
    for part in tl.static_range(PARTS):
        column, inside, at = place(part, row, rows, D, WIDE)
        w = tl.load(weight + column, mask=column < D, other=0.0)
        b = tl.load(bias + column, mask=column < D, other=0.0)
        tl.store(x + at, ((parts[part] - mean) * scale * w + b).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, out, width, BY_GELU: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = x + row * 2 * width + column, column < width
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    gate = gelu(gate) if BY_GELU else silu(gate)
    tl.store(out + row * width + column, (gate * up).to(out.dtype.element_ty), mask=inside)


def add_norm(x: torch.Tensor, y: torch.Tensor, norm: Pair, eps: float) -> None:
    """x [T, D] = LayerNorm(x + y [T, D]), both float16 or bf16; weight and bias of the norm float32 [D]."""
    launch(_add_norm, x, y, *norm, eps=eps)


def gated(x: torch.Tensor, by_gelu: bool = True) -> torch.Tensor:
    """gelu(a) b, or silu(a) b, [T, F] of x [T, 2 F], which is a beside b, float16 or bf16."""
    out = x.new_empty(len(x), x.shape[1] // 2)
    blocks = (len(x), triton.cdiv(out.shape[1], COLUMNS))
    _gated[blocks](x, out, out.shape[1], by_gelu, COLUMNS, num_warps=4, **OPTIONS)
    return out
