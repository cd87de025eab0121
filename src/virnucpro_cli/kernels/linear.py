"""Linear layers on Hopper with the LayerNorm before them folded in, whose result is finished before it leaves the chip:
GELU, or the rotary embedding of q and k.

One persistent kernel: tiles of x and W come through the tensor memory accelerator, three deep; a tile of the result is
finished in fp32 and stored a column block after the other. Every row is computed in the same order wherever it stands.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from virnucpro_cli.kernels.norm import row_scale
from virnucpro_cli.kernels.plain import Pair

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""Tile of the result, and how much of the inner dimension is loaded at a time."""
GELU, TURN_BY_TILE, TURN_BY_ROW = 1, 2, 3
TURN_COLUMNS = COLUMNS // 4
Rotary = tuple[torch.Tensor, torch.Tensor, int]


@triton.jit
def gelu(x):
    """x Phi(x) by the error function: the upper tail Phi(-u) is exp(-u^2/2) times a polynomial, within 8e-7 of exact.

    Coefficients: least maximum error of u Phi(-u), absolute above .02 and relative below, on [0, 5.5].
    """
    u = tl.minimum(tl.abs(x), 5.5, propagate_nan=tl.PropagateNan.ALL)  # what is not a number must stay so
    tail = -3.6391029425431043e-06 * u + 8.116065873764455e-05
    tail = tail * u - 0.0008034128113649786
    tail = tail * u + 0.004725824575871229
    tail = tail * u - 0.018815776333212852
    tail = tail * u + 0.05534086376428604
    tail = tail * u - 0.12888199090957642
    tail = tail * u + 0.24870029091835022
    tail = tail * u - 0.3987570106983185
    tail = tail * u + 0.49999263882637024
    return tl.maximum(x, 0.0) - u * (tl.exp2(u * (u * -0.7213475204444817)) * tail)


@triton.jit
def _turn(acc, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first, second = tl.split(tl.reshape(acc, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), (ROWS, COLUMNS))


@triton.jit
def _finish(
    acc, y, scale, shift, bias, cos, sin, table, positions, row, column, rows, columns, rotated,
    EPILOGUE: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = column + tl.arange(0, COLUMNS)
    inside = c < columns
    acc += tl.load(shift + c, mask=inside, other=0.0)[None, :]
    acc = acc * scale[:, None] + tl.load(bias + c, mask=inside, other=0.0)[None, :]
    if EPILOGUE == 1:
        acc = gelu(acc)
    elif column < rotated:
        turned = (c < rotated)[None, :]  # v may begin among these columns
        if EPILOGUE == 2:
            found = _turn(acc, cos, sin, ROWS, COLUMNS)
            acc = found if ALIGNED else tl.where(turned, found, acc)
        else:
            r = row + tl.arange(0, ROWS)
            position = tl.load(positions + r, mask=r < rows, other=0)
            turn = tl.load(table + position[:, None] * HEAD_DIM + (c % HEAD_DIM)[None, :], mask=turned, other=0.0)
            own_cos, own_sin = tl.split(tl.reshape(turn, (ROWS, COLUMNS // 2, 2)))
            acc = tl.where(turned, _turn(acc, own_cos, own_sin, ROWS, COLUMNS), acc)
    y.store([row, column], acc.to(y.dtype))


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _linear(
    x, w, y, scales, shift, bias, table, positions, rows, columns, depth, rotated, programs,
    EPILOGUE: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    in_group = 8 * tiles_across  # eight tiles of rows share the weights that are in the cache
    quarter: tl.constexpr = COLUMNS // 4
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, programs, flatten=True):
        group = tile // in_group * 8
        size = min(tiles_down - group, 8)
        row = (group + tile % in_group % size) * ROWS
        column = tile % in_group // size * COLUMNS
        r = row + tl.arange(0, ROWS)
        scale = tl.load(scales + r, mask=r < rows, other=0.0)  # asked for here, to have come when the product is there
        cos, sin = scale, scale
        if EPILOGUE == 2:
            cos, sin = tl.split(tl.reshape(table.load([row, 0]), (ROWS, quarter // 2, 2)))
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc)
        left, right = _halves(acc, ROWS, COLUMNS)
        a, b = _halves(left, ROWS, COLUMNS // 2)
        c, d = _halves(right, ROWS, COLUMNS // 2)
        _finish(a, y, scale, shift, bias, cos, sin, table, positions, row, column, rows, columns, rotated, EPILOGUE, HEAD_DIM, ALIGNED, ROWS, quarter)  # fmt: skip
        _finish(b, y, scale, shift, bias, cos, sin, table, positions, row, column + quarter, rows, columns, rotated, EPILOGUE, HEAD_DIM, ALIGNED, ROWS, quarter)  # fmt: skip
        _finish(c, y, scale, shift, bias, cos, sin, table, positions, row, column + 2 * quarter, rows, columns, rotated, EPILOGUE, HEAD_DIM, ALIGNED, ROWS, quarter)  # fmt: skip
        _finish(d, y, scale, shift, bias, cos, sin, table, positions, row, column + 3 * quarter, rows, columns, rotated, EPILOGUE, HEAD_DIM, ALIGNED, ROWS, quarter)  # fmt: skip


class Folded(NamedTuple):
    """LayerNorm of x + offset and the linear layer after it as one product: (x weight^T + shift) row_scale + bias.

    weight [M, K] in 16 bit: W diag(gamma), each row less its mean, which takes the mean out of x; shift = weight offset and
    bias = b + W beta, float32 [M]; offset float32 [K].
    """

    offset: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor
    bias: torch.Tensor


def fold(norm: Pair, linear: Pair, offset: torch.Tensor, dtype: torch.dtype) -> Folded:
    """All float32; folded in float64, then rounded. A mean of the offset, which LayerNorm would remove, goes here."""
    (gamma, beta), (weight, bias) = norm, linear
    offset, wide = offset.double() - offset.double().mean(), weight.double()
    scaled = wide * gamma
    rounded = (scaled - scaled.mean(1, keepdim=True)).to(dtype)
    shift, bias = rounded.double() @ offset, bias + wide @ beta.double()
    return Folded(offset.float(), rounded, shift.float(), bias.float())


def gelu_linear(x: torch.Tensor, layer: Folded) -> torch.Tensor:
    """x [T, K] to gelu of the folded layer [T, M]."""
    return _launch(x, layer, GELU, layer.bias, layer.bias, 16, 0)


def rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Rotary:
    """Interleaved cosines and sines, float32, the positions, and the head dimension.

    Where heads fill blocks of 64 columns, the table is of rows, as a tile wants it: [T, 64]. Else of positions: [L, Dh].
    """
    table = torch.stack((cos, sin), dim=-1).flatten(1)
    head_dim = table.shape[1]
    if TURN_COLUMNS % head_dim == 0:
        table = table.index_select(0, positions).repeat(1, TURN_COLUMNS // head_dim)
    return table, positions, head_dim


def rotary_linear(x: torch.Tensor, layer: Folded, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """x [T, K] to q, k, v [T, H, Dh]; q and k, the first two thirds of the layer, rotated in fp32 and interleaved."""
    table, positions, head_dim = rotary
    rotated = 2 * (len(layer.weight) // 3)
    if TURN_COLUMNS % head_dim == 0:
        blocks = TensorDescriptor.from_tensor(table, [ROWS, TURN_COLUMNS])
        out = _launch(x, layer, TURN_BY_TILE, blocks, positions, head_dim, rotated)
    else:
        out = _launch(x, layer, TURN_BY_ROW, table, positions, head_dim, rotated)
    return out.view(len(x), 3, -1, head_dim).unbind(1)


def _launch(
    x: torch.Tensor, layer: Folded, epilogue: int,
    table: torch.Tensor | TensorDescriptor, positions: torch.Tensor, head_dim: int, rotated: int,
) -> torch.Tensor:  # fmt: skip
    (rows, depth), columns = x.shape, len(layer.weight)
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    programs = min(_processors(x.device), tiles)
    _linear[(programs,)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH]), TensorDescriptor.from_tensor(layer.weight, [COLUMNS, DEPTH]),
        TensorDescriptor.from_tensor(y, [ROWS, COLUMNS // 4]), row_scale(x, layer.offset), layer.shift, layer.bias,
        table, positions, rows, columns, depth, rotated, programs,
        epilogue, head_dim, rotated % (COLUMNS // 4) == 0, ROWS, COLUMNS, DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
