"""Sums of rows over each segment of a pack, in float64, read once in 16 bit; PyTorch would make a copy in float64."""

import torch
import triton
import triton.language as tl

from virnucpro_cli.model.kernels import OPTIONS

ROWS, COLUMNS = 32, 64


@triton.jit
def _sums(x, bounds, out, width, skip, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    segment, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    start, stop = tl.load(bounds + segment) + skip, tl.load(bounds + segment + 1) - skip
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = x + row.to(tl.int64) * width + column
        total += tl.load(at, mask=(row < stop) & (column < width), other=0.0).to(tl.float64)
    tl.store(out + segment * width + column, tl.sum(total, 0, keep_dims=True), mask=column < width)


def segment_sums(rows: torch.Tensor, cu_seqlens: torch.Tensor, skip: int) -> torch.Tensor:
    """float64 [n, m]: sums of rows [T, m], float16 or bf16, of each segment without its first and last `skip` rows."""
    count, width = len(cu_seqlens) - 1, rows.shape[1]
    out = torch.empty(count, width, dtype=torch.float64, device=rows.device)
    blocks = (count, triton.cdiv(width, COLUMNS))
    _sums[blocks](rows, cu_seqlens, out, width, skip, ROWS, COLUMNS, num_warps=4, num_stages=4, **OPTIONS)
    return out
