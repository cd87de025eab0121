"""Attention of each segment to itself on Hopper, by the kernel in `hopper_attention.cu`; as `attention.attention`."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import torch

from virnucpro_cli.batch import QUERY_TILE, query_tiles
from virnucpro_cli.model.kernels import nvrtc
from virnucpro_cli.model.kernels.attention import LOG2_E, equally_apart
from virnucpro_cli.model.kernels.trial import Noise, must_agree

SOURCE = Path(__file__).with_suffix(".cu")
HEAD_DIMS = (16, 24, 32, 64)
KEYS, HEADS, THREADS, LARGEST_GRID = QUERY_TILE, 4, 128, 32768
"""Keys of a block, as many as queries of a tile; heads and threads of a block; blocks in one direction of a grid."""
TUNED = {16: (2, 5), 24: (2, 5), 32: (2, 5), 64: (1, 4)}
"""By size of head: blocks of keys that are loaded early, and blocks of threads on a multiprocessor."""
KINDS = (nvrtc.POINTER,) * 7 + (nvrtc.FLOAT,) + (nvrtc.INT,) * 3


def takes(q: torch.Tensor) -> bool:
    """Whether the kernel is for such heads [T, H, Dh] and their dtype."""
    return q.shape[2] in HEAD_DIMS and refusal(q.device, q.dtype) is None


@nvrtc.once
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be used there; None if it can: it was compiled, and is as exact as it should be."""
    return nvrtc.refusal(device, dtype, _try_out)


@cache
def options(element: str, head_dim: int, left: bool) -> tuple[str, ...]:
    """Options of the compiler: what the kernel is to do, and the operands of products, which are too many to write."""
    count, (ahead, blocks) = head_dim // 2, TUNED[head_dim]
    macros = {
        "HEAD_DIM": head_dim, "HEAD_TEXT": f'"{head_dim}"', "ELEMENT": f'"{element}"', "AHEAD": ahead,
        "BLOCKS": blocks, "HEADS": HEADS, "S_OUTPUTS": nvrtc.operands(0, 32),
        "S_RESULTS": nvrtc.registers("=f", "s", 32), "S_ACCUMULATORS": nvrtc.registers("+f", "s", 32),
        "O_OUTPUTS": nvrtc.operands(0, count), "O_ACCUMULATORS": nvrtc.registers("+f", "o", count),
        "P_INPUTS": nvrtc.operands(count, 4), "V_INPUT": nvrtc.operands(count + 4, 1),
    }  # fmt: skip
    if left:
        macros["LEFT"] = 1
    return tuple(nvrtc.options(macros))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor, scale: float, *left: torch.Tensor
) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], float16 or bf16; tiles int32 [n, 3] of `batch.query_tiles`.

    Heads of q, k and v are adjacent; they are copied unless their rows are equally far apart. left: float32 [T] twice,
    by which rows of q and of k are still to be multiplied, or nothing.
    """
    q, k, v = equally_apart(q, k, v)
    rows, heads, head_dim = q.shape
    element, count = nvrtc.ELEMENTS[q.dtype], len(tiles)
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    shared = (3 * TUNED[head_dim][0] + 4) * KEYS * max(16, 1 << (head_dim - 1).bit_length()) * 2
    kernel = nvrtc.function(q.device, SOURCE, options(element, head_dim, bool(left)), shared)
    tensors = (q, k, v, out, tiles, *(left or (None, None)))
    values = (*(0 if each is None else each.data_ptr() for each in tensors), scale * LOG2_E, q.stride(0), heads, count)
    blocks = -(-heads // HEADS), min(count, LARGEST_GRID), -(-count // LARGEST_GRID)
    nvrtc.launch(kernel, blocks, THREADS, shared, values, KINDS, q.device)
    return out


def _try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernel with float32, for the narrowest and the widest heads. Raises RuntimeError if it differs."""
    noise, bounds = Noise(device), np.array([0, 3, 67, 200])
    tiles = torch.from_numpy(query_tiles(bounds)).to(device, torch.int32)
    for head_dim in (16, 64):
        q, k, v = noise(200, 3, 2, head_dim, scale=2.0).to(dtype).unbind(1)
        found = attention(q, k, v, tiles, 1.0)
        for start, stop in itertools.pairwise(bounds):
            ours, *wide = (each[start:stop].float().transpose(0, 1) for each in (found, q, k, v))
            twin = torch.softmax(wide[0] @ wide[1].mT, -1) @ wide[2]
            must_agree(ours, twin, dtype, "it differs from PyTorch")
