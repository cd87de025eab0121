"""LayerNorm of the residual stream, and the one number a row that is left of it where it is folded into a linear layer.

The stream is kept without the biases that were added to it: what a row stands for is x + offset.
"""

import torch
import triton
import triton.language as tl

from virnucpro_cli.model.spec import LAYER_NORM_EPS


@triton.jit
def _load(x, offset, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None].to(tl.int64) * D + column[None, :]
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(offset + column, mask=column < D, other=0.0)[None, :]
    centred = tl.where(inside, total - (tl.sum(total, 1) / D)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred, scale, row, column, inside, at


@triton.jit
def _row_scale(x, offset, out, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    _, scale, row, _, _, _ = _load(x, offset, rows, eps, D, WIDE, ROWS)
    tl.store(out + row, scale, mask=row < rows)


@triton.jit
def _norm(x, offset, weight, bias, out, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    centred, scale, _, column, inside, at = _load(x, offset, rows, eps, D, WIDE, ROWS)
    w = tl.load(weight + column, mask=column < D, other=0.0)
    b = tl.load(bias + column, mask=column < D, other=0.0)
    tl.store(out + at, (centred * scale[:, None] * w[None, :] + b[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantised_norm(x, offset, step, out, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    centred, scale, _, _, inside, at = _load(x, offset, rows, eps, D, WIDE, ROWS)
    tl.store(out + at, (centred * (scale * step)[:, None]).to(out.dtype.element_ty), mask=inside)


def row_scale(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """1 / the standard deviation (float32 [T]) of every row of x [T, D] + offset (float32 [D]), as LayerNorm takes it.

    In memory 128 numbers longer than T, so that a tile may be read whole.
    """
    out = torch.empty(len(x) + 128, dtype=torch.float32, device=x.device)[: len(x)]
    _launch(_row_scale, x, offset, out)
    return out


def norm(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm of x [T, D] + offset; offset, weight and bias float32 [D]."""
    out = torch.empty_like(x)
    _launch(_norm, x, offset, weight, bias, out)
    return out


def quantised_norm(x: torch.Tensor, offset: torch.Tensor, step: float) -> torch.Tensor:
    """LayerNorm of x [T, D] + offset without weight and bias, times `step`, in e4m3. It is below step * sqrt(D)."""
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _launch(_quantised_norm, x, offset, step, out)
    return out


def _launch(kernel, x: torch.Tensor, *others: torch.Tensor | float) -> None:  # type: ignore[no-untyped-def]
    rows, d = x.shape
    wide = triton.next_power_of_2(d)
    block = max(1, 4096 // wide)
    kernel[(triton.cdiv(rows, block),)](
        x, *others, rows, LAYER_NORM_EPS, d, wide, block, num_warps=4 if wide <= 4096 else 8
    )
