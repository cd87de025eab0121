"""Attention maps added up over heads without being stored, in Triton for any GPU: whose twin is `add_plain`.

The maps of a segment are softmax(q k^T) of its tokens. What is kept is their sum [L, L] over heads, each with its
weight, and for each head the sums of its rows and columns. Each pass computes the scores anew, which costs less than to
store them. The order of additions depends on the segment alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from virnucpro_cli.batch import QUERY_TILE
from virnucpro_cli.model.kernels import OPTIONS

LOG2_E = 1.4426950408889634
PRECISION = "tf32x3"
"""Precision of products in float32: each number as two of 11 bits, on an H100 4 to 8 times as fast as "ieee"."""


@triton.jit
def _tile(x, first, stop, column, stride, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a head from `first` on, zeros from `stop` on."""
    row, d = first + tl.arange(0, ROWS), tl.arange(0, WIDE)
    at = row.to(tl.int64)[:, None] * stride + column + d[None, :]
    return tl.load(x + at, mask=(row < stop)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _rows(
    q, k, tiles, lse, margins, scale, stride, heads, width, column,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For each query: the logarithm of its sum of exponentials, and the share of it that residues have."""
    head = tl.program_id(0) % heads
    tile = tiles + 3 * (tl.program_id(0) // heads)
    first, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    index = tl.arange(0, ROWS)
    queries = _tile(q, first, stop, head * HEAD_DIM, stride, HEAD_DIM, WIDE, ROWS)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    every, inner = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for at in range(start, stop, ROWS):
        keys = _tile(k, at, stop, head * HEAD_DIM, stride, HEAD_DIM, WIDE, ROWS)
        score = tl.dot(queries, keys.T, input_precision=PRECISION) * scale
        key = at + index
        score = tl.where((key < stop)[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        weight, shrink = tl.exp2(score - new[:, None]), tl.exp2(top - new)
        residues = ((key > start) & (key < stop - 1))[None, :]
        every = every * shrink + tl.sum(weight, 1)
        inner = inner * shrink + tl.sum(tl.where(residues, weight, 0.0), 1)
        top = new
    row = first + index
    tl.store(lse + row.to(tl.int64) * heads + head, top + tl.log2(every), mask=row < stop)
    inside = (row > start) & (row < stop - 1)
    tl.store(margins + row.to(tl.int64) * width + column + head, inner / every, mask=inside)


@triton.jit
def _columns(
    q, k, tiles, lse, margins, scale, stride, heads, width, column,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For each key, to what `_rows` stored: its sum of probabilities over the queries that are residues."""
    head = tl.program_id(0) % heads
    tile = tiles + 3 * (tl.program_id(0) // heads)
    first, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    index = tl.arange(0, ROWS)
    keys = _tile(k, first, stop, head * HEAD_DIM, stride, HEAD_DIM, WIDE, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for at in range(start, stop, ROWS):
        queries = _tile(q, at, stop, head * HEAD_DIM, stride, HEAD_DIM, WIDE, ROWS)
        query = at + index
        below = tl.load(lse + query.to(tl.int64) * heads + head, mask=query < stop, other=0.0)
        weight = tl.exp2(tl.dot(keys, queries.T, input_precision=PRECISION) * scale - below[None, :])
        residues = ((query > start) & (query < stop - 1))[None, :]
        total += tl.sum(tl.where(residues, weight, 0.0), 1)
    row = first + index
    inside = (row > start) & (row < stop - 1)
    to = margins + row.to(tl.int64) * width + column + head
    tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _total(
    q, k, tiles, lse, of_heads, starts, total, scale, stride, heads,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the weighted sum of all heads' maps, added to what other layers left there."""
    tile = tiles + 3 * tl.program_id(0)
    first, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    other = start + tl.program_id(1) * ROWS
    if other < stop:
        index = tl.arange(0, ROWS)
        row, key = first + index, other + index
        acc = tl.zeros((ROWS, ROWS), tl.float32)
        for head in range(heads):
            queries = _tile(q, first, stop, head * HEAD_DIM, stride, HEAD_DIM, WIDE, ROWS)
            keys = _tile(k, other, stop, head * HEAD_DIM, stride, HEAD_DIM, WIDE, ROWS)
            below = tl.load(lse + row.to(tl.int64) * heads + head, mask=row < stop, other=0.0)
            weight = tl.exp2(tl.dot(queries, keys.T, input_precision=PRECISION) * scale - below[:, None])
            acc += weight * tl.load(of_heads + head)
        rows_in, keys_in = (row > start) & (row < stop - 1), (key > start) & (key < stop - 1)
        at = tl.load(starts + tl.program_id(0)) + (row - start - 1).to(tl.int64)[:, None] * (stop - start - 2)
        to = total + at + (key - start - 1)[None, :]
        inside = rows_in[:, None] & keys_in[None, :]
        tl.store(to, tl.load(to, mask=inside, other=0.0) + acc, mask=inside)


class Sums(NamedTuple):
    """Sums that the maps of layers are added to.

    total: float32 [V]; starts: int64 [m], where in it the [L, L] of the segment of each of m tiles begins. margins:
    float32 [T, C]; its columns from `column` on, one for each head, get the sums of rows and columns of residues.
    """

    total: torch.Tensor
    starts: torch.Tensor
    margins: torch.Tensor
    column: int


def add_maps(
    q: torch.Tensor,
    k: torch.Tensor,
    tiles: torch.Tensor,
    max_seqlen: int,
    scale: float,
    of_heads: torch.Tensor,
    sums: Sums,
) -> None:
    """Add the maps of a layer: q, k [T, H, Dh], float32 or 16 bit, rows equally far apart and heads adjacent.

    tiles: int32 [m, 3] of `batch.query_tiles`. max_seqlen: tokens of the longest segment. of_heads: float32 [H], the
    weight of each map.
    """
    rows, heads, head_dim = q.shape
    wide = max(16, triton.next_power_of_2(head_dim))
    lse = torch.empty(rows, heads, device=q.device)
    sizes = {"HEAD_DIM": head_dim, "WIDE": wide, "ROWS": QUERY_TILE, "PRECISION": PRECISION} | OPTIONS
    per_head, stride, scale = (heads * len(tiles),), q.stride(0), scale * LOG2_E
    width, column = sums.margins.stride(0), sums.column
    for kernel in (_rows, _columns):
        kernel[per_head](
            q, k, tiles, lse, sums.margins, scale, stride, heads, width, column, **sizes, num_warps=4
        )  # fmt: skip
    blocks = (len(tiles), triton.cdiv(max_seqlen, QUERY_TILE))
    _total[blocks](q, k, tiles, lse, of_heads, sums.starts, sums.total, scale, stride, heads, **sizes, num_warps=4)
