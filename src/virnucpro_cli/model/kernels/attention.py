"""Variable-length attention for short sequences: tiles of 64 queries of one segment, where FlashAttention-2 takes 128.

A program owns 64 queries of one segment and one head. The segment's last, partly filled block of keys comes first, by
plain masked loads that are all in flight at once; the full blocks follow. The order of keys depends on the segment's
length alone, so a result is the same anywhere.
"""

import torch
import triton
import triton.language as tl

from virnucpro_cli.batch import QUERY_TILE
from virnucpro_cli.model.kernels import OPTIONS

KEYS = 32
LOG2_E = 1.4426950408889634


@triton.jit
def _attention(
    q, k, v, out, tiles, q_scale, k_scale, slopes, scale, stride, heads,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    tile = tiles + 3 * (tl.program_id(0) // heads)
    first, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    d, query, key = tl.arange(0, WIDE), tl.arange(0, QUERIES), tl.arange(0, KEYS)
    tail = start + (stop - start - 1) // KEYS * KEYS
    valid = (query < stop - first)[:, None] & (d < HEAD_DIM)[None, :]
    there = (key < stop - tail)[:, None] & (d < HEAD_DIM)[None, :]
    column = head * HEAD_DIM
    if slopes is not None:  # of scores that are still to be scaled; places count from the segment's first row
        slope = tl.load(slopes + head) * (1.4426950408889634 / scale)
        place, other = (first - start + query).to(tl.float32), key.to(tl.float32)
    at = tail.to(tl.int64) * stride + column + key[:, None] * stride + d[None, :]
    q_tile = tl.load(
        q + first.to(tl.int64) * stride + column + query[:, None] * stride + d[None, :], mask=valid, other=0.0
    )
    k_tile = tl.load(k + at, mask=there, other=0.0)
    v_tile = tl.load(v + at, mask=there, other=0.0)
    score = tl.dot(q_tile, k_tile.T)
    each = scale
    if q_scale is not None:
        scale = scale * tl.load(q_scale + first + query, mask=query < stop - first, other=0.0)
        each = scale[:, None]
        score *= tl.load(k_scale + tail + key, mask=key < stop - tail, other=0.0)[None, :]
        following = tl.load(k_scale + start + key, mask=key < tail - start, other=0.0)
    if slopes is not None:
        score -= slope * tl.abs(place[:, None] - (other + (tail - start))[None, :])
    score = tl.where((key < stop - tail)[None, :], score, float("-inf"))
    top = tl.max(score, 1) * scale
    weight = tl.exp2(score * each - top[:, None])
    sums = weight  # added up over the keys at the end
    acc = tl.dot(weight.to(v_tile.dtype), v_tile)
    for row in range(start, tail, KEYS):
        at = (row + key).to(tl.int64)[:, None] * stride + column + d[None, :]
        k_tile = tl.load(k + at, mask=d[None, :] < HEAD_DIM, other=0.0)
        v_tile = tl.load(v + at, mask=d[None, :] < HEAD_DIM, other=0.0)
        score = tl.dot(q_tile, k_tile.T)
        if q_scale is not None:
            score *= following[None, :]
            following = tl.load(k_scale + min(row + KEYS, tail - KEYS) + key)
        if slopes is not None:
            score -= slope * tl.abs(place[:, None] - (other + (row - start))[None, :])
        new = tl.maximum(top, tl.max(score, 1) * scale)
        weight = tl.exp2(score * each - new[:, None])
        shrink = tl.exp2(top - new)
        sums = sums * shrink[:, None] + weight
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        top = new
    width = heads * HEAD_DIM
    to = out + first.to(tl.int64) * width + column + query[:, None] * width + d[None, :]
    tl.store(to, (acc / tl.sum(sums, 1)[:, None]).to(out.dtype.element_ty), mask=valid)


def equally_apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v [T, H, Dh] of any dtype, copied unless their rows are equally far apart: those of plain steps are not."""
    if q.stride(0) == k.stride(0) == v.stride(0):
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    *left: torch.Tensor,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], float16 or bf16; tiles int32 [n, 3] of `batch.query_tiles`.

    Heads of q, k and v are adjacent; they are copied unless their rows are equally far apart. left: float32 [T] twice,
    by which rows of q and of k are still to be multiplied, or nothing. slopes: float32 [H], by which scores fall with
    each row of distance, or None.
    """
    q, k, v = equally_apart(q, k, v)
    q_scale, k_scale = left or (None, None)
    rows, heads, head_dim = q.shape
    wide = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    registers = 96 if q_scale is not None and wide <= 64 else None  # five programs at a time on a multiprocessor
    _attention[(heads * len(tiles),)](
        q, k, v, out, tiles, q_scale, k_scale, slopes, scale * LOG2_E, q.stride(0), heads,
        head_dim, wide, QUERY_TILE, KEYS, num_warps=4, num_stages=3, maxnreg=registers, **OPTIONS,
    )  # fmt: skip
    return out
