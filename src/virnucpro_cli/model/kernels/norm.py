"""LayerNorm of the residual stream, and the number a row that is left of it where it is folded into a linear layer.

The stream is kept without the biases that were added to it: a row stands for x + offset.
"""

import torch
import triton
import triton.language as tl

from virnucpro_cli.model.kernels import OPTIONS
from virnucpro_cli.model.spec import LAYER_NORM_EPS


@triton.jit
def place(part, row, rows, D: tl.constexpr, WIDE: tl.constexpr):
    column = part * WIDE + tl.arange(0, WIDE)[None, :]
    return column, (row < rows) & (column < D), row.to(tl.int64) * D + column


@triton.jit
def _centred(x, offset, row, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr):
    """The rows in parts of WIDE columns, less their means, and 1 / their standard deviations."""
    parts, centred, total, square = (), (), tl.zeros((row.shape[0], WIDE), tl.float32), 0.0
    for part in tl.static_range(PARTS):
        column, inside, at = place(part, row, rows, D, WIDE)
        each = tl.load(x + at, mask=inside, other=0.0) + tl.load(offset + column, mask=column < D, other=0.0)
        parts, total = parts + (each,), total + each  # type: ignore[assignment]  # noqa: RUF005
    mean = tl.sum(total, 1, keep_dims=True) / D
    for part in tl.static_range(PARTS):
        _, inside, _ = place(part, row, rows, D, WIDE)
        each = tl.where(inside, parts[part] - mean, 0.0)
        centred, square = centred + (each,), square + each * each  # type: ignore[assignment]  # noqa: RUF005
    return centred, 1.0 / tl.sqrt(tl.sum(square, 1, keep_dims=True) / D + eps)


@triton.jit
def _row_scale(x, offset, out, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    # The last rows come first: the product before wrote them last, so they are still in the cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)[:, None]
    _, scale = _centred(x, offset, row, rows, eps, D, WIDE, PARTS)
    tl.store(out + row, scale, mask=row < rows)


@triton.jit
def _norm(
    x, offset, weight, bias, out, rows, eps,
    D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    centred, scale = _centred(x, offset, row, rows, eps, D, WIDE, PARTS)
    for part in tl.static_range(PARTS):
        column, inside, at = place(part, row, rows, D, WIDE)
        w = tl.load(weight + column, mask=column < D, other=0.0)
        b = tl.load(bias + column, mask=column < D, other=0.0)
        tl.store(out + at, (centred[part] * scale * w + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantised_norm(
    x, offset, step, out, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    centred, scale = _centred(x, offset, row, rows, eps, D, WIDE, PARTS)
    for part in tl.static_range(PARTS):
        _, inside, at = place(part, row, rows, D, WIDE)
        tl.store(out + at, (centred[part] * (scale * step)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _qk_scale(sums, out, rows, width, eps, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, kind = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    total = tl.zeros((ROWS,), tl.float32)
    for block in range(kind * (width // COLUMNS + 1), tl.cdiv((kind + 1) * width, COLUMNS) + kind):
        total += tl.load(sums + block * rows + row, mask=row < rows, other=0.0)
    tl.store(out + kind * rows + row, 1.0 / tl.sqrt(total / width + eps), mask=row < rows)


def qk_scale(sums: torch.Tensor, width: int, columns: int) -> tuple[torch.Tensor, ...]:
    """1 / the root mean square of q and of k of a row, float32 [T] each, as the norms before the split take it.

    sums: float32 [n, T], sums of squares over blocks of columns of q [T, width] beside k. A block that holds the end of
    q and the beginning of k is there twice, so blocks of k are one further.
    """
    rows = sums.shape[1]
    out = torch.empty(2, rows, device=sums.device)
    _qk_scale[(triton.cdiv(rows, 128), 2)](sums, out, rows, width, LAYER_NORM_EPS, columns, 128, num_warps=4, **OPTIONS)
    return out.unbind(0)


def row_scale(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """1 / the standard deviation (float32 [T]) of every row of x [T, D] + offset (float32 [D]), as LayerNorm takes it.

    The memory holds 128 numbers more than T, so that a tile may be read whole.
    """
    out = torch.empty(len(x) + 128, dtype=torch.float32, device=x.device)[: len(x)]
    launch(_row_scale, x, offset, out)
    return out


def norm(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm of x [T, D] + offset in the dtype of x; offset, weight and bias float32 [D]."""
    out = torch.empty_like(x)
    launch(_norm, x, offset, weight, bias, out)
    return out


def quantised_norm(x: torch.Tensor, offset: torch.Tensor, step: float) -> torch.Tensor:
    """LayerNorm of x [T, D] + offset (float32 [D]) without weight and bias, times `step`: e4m3, below step sqrt(D)."""
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    launch(_quantised_norm, x, offset, step, out)
    return out


def launch(kernel, x: torch.Tensor, *others: torch.Tensor | float, eps: float = LAYER_NORM_EPS) -> None:  # type: ignore[no-untyped-def]
    """Run a kernel of LayerNorm on the rows of x [T, D], float16 or bf16; others: its further arguments before T."""
    rows, d = x.shape
    wide = d & -d  # the largest power of two that divides it: 5 parts for all sizes of ESM-2 but one
    block = max(1, 256 // wide)  # a warp holds 16 bytes a thread; rows spread over several would change their layout
    if d // wide > 9:
        wide = triton.next_power_of_2(d) // 4
        block = max(1, 512 // wide)
    kernel[(triton.cdiv(rows, block),)](
        x, *others, rows, eps, d, wide, triton.cdiv(d, wide), block, num_warps=max(1, wide // 256), **OPTIONS
    )  # fmt: skip
