"""What stands between the products of a layer with LayerNorms after its sums, in one pass each."""

import torch
import triton
import triton.language as tl

from virnucpro_cli.model.kernels import OPTIONS
from virnucpro_cli.model.kernels.linear import gelu
from virnucpro_cli.model.kernels.plain import Pair

COLUMNS = 1024


@triton.jit
def _add_norm(x, y, weight, bias, eps, D: tl.constexpr, WIDE: tl.constexpr):
    column = tl.arange(0, WIDE)
    inside, at = column < D, tl.program_id(0).to(tl.int64) * D + column
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0).to(
        tl.float32
    )
    centred = tl.where(inside, row - tl.sum(row) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / D + eps)
    w, b = tl.load(weight + column, mask=inside, other=0.0), tl.load(bias + column, mask=inside, other=0.0)
    tl.store(x + at, (centred * scale * w + b).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, out, width, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = x + row * 2 * width + column, column < width
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gelu(gate) * up).to(out.dtype.element_ty), mask=inside)


def add_norm(x: torch.Tensor, y: torch.Tensor, norm: Pair, eps: float) -> None:
    """x [T, D] = LayerNorm(x + y [T, D]), both float16 or bf16; weight and bias of the norm float32 [D]."""
    width = x.shape[1]
    _add_norm[(len(x),)](x, y, *norm, eps, width, triton.next_power_of_2(width), num_warps=4, **OPTIONS)


def gated(x: torch.Tensor) -> torch.Tensor:
    """gelu(a) b [T, F] of x [T, 2 F], which is a beside b, float16 or bf16."""
    out = x.new_empty(len(x), x.shape[1] // 2)
    blocks = (len(x), triton.cdiv(out.shape[1], COLUMNS))
    _gated[blocks](x, out, out.shape[1], COLUMNS, num_warps=4, **OPTIONS)
    return out
