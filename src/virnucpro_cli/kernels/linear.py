"""Linear layers on Hopper whose result is finished before it leaves the chip: GELU, or the rotary embedding of q and k.

One persistent kernel: tiles of x and W come through the tensor memory accelerator, three deep; a tile of the result is
finished in fp32 and stored a column block after the other. Every row is computed in the same order wherever it stands.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""Tile of the result, and how much of the inner dimension is loaded at a time."""
GELU, TURN_BY_TILE, TURN_BY_ROW = 1, 2, 3
TURN_COLUMNS = 64


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
def _finish(
    acc, y, bias, table, positions, row, column, rows, columns, rotated,
    EPILOGUE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = column + tl.arange(0, COLUMNS)
    if EPILOGUE != 2:
        acc += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 1:
        acc = gelu(acc)
    if EPILOGUE == 3 and column < rotated:
        r = row + tl.arange(0, ROWS)
        position = tl.load(positions + r, mask=r < rows, other=0)
        turned = (c < rotated)[None, :]
        turn = tl.load(table + position[:, None] * HEAD_DIM + (c % HEAD_DIM)[None, :], mask=turned, other=0.0)
        turn = tl.where(turned, turn, tl.where((c % 2 == 0)[None, :], 1.0, 0.0))
        cos, sin = tl.split(tl.reshape(turn, (ROWS, COLUMNS // 2, 2)))
        first, second = tl.split(tl.reshape(acc, (ROWS, COLUMNS // 2, 2)))
        acc = tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), (ROWS, COLUMNS))
    y.store([row, column], acc.to(y.dtype))


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _linear(
    x, w, y, bias, table, positions, rows, columns, depth, rotated, programs,
    EPILOGUE: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, TURN_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    in_group = 8 * tiles_across  # eight tiles of rows share the weights that are in the cache
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, programs, flatten=True):
        group = tile // in_group * 8
        size = min(tiles_down - group, 8)
        row = (group + tile % in_group % size) * ROWS
        column = tile % in_group // size * COLUMNS
        if EPILOGUE == 2:  # asked for here, so that it has come when the product is there
            cos, sin = tl.split(tl.reshape(table.load([row, 0]), (ROWS, 1, TURN_COLUMNS // 2, 2)))
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc)
        if EPILOGUE == 2:
            c = column + tl.arange(0, COLUMNS)
            acc += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
            if column < rotated:
                first, second = tl.split(tl.reshape(acc, (ROWS, COLUMNS // TURN_COLUMNS, TURN_COLUMNS // 2, 2)))
                turned = tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), (ROWS, COLUMNS))
                acc = turned if ALIGNED else tl.where((c < rotated)[None, :], turned, acc)  # v may begin in this tile
        quarter: tl.constexpr = COLUMNS // 4
        left, right = _halves(acc, ROWS, COLUMNS)
        a, b = _halves(left, ROWS, COLUMNS // 2)
        c, d = _halves(right, ROWS, COLUMNS // 2)
        _finish(a, y, bias, table, positions, row, column, rows, columns, rotated, EPILOGUE, HEAD_DIM, ROWS, quarter)
        _finish(b, y, bias, table, positions, row, column + quarter, rows, columns, rotated, EPILOGUE, HEAD_DIM, ROWS, quarter)  # fmt: skip
        _finish(c, y, bias, table, positions, row, column + 2 * quarter, rows, columns, rotated, EPILOGUE, HEAD_DIM, ROWS, quarter)  # fmt: skip
        _finish(d, y, bias, table, positions, row, column + 3 * quarter, rows, columns, rotated, EPILOGUE, HEAD_DIM, ROWS, quarter)  # fmt: skip


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As `plain.gelu_linear`, with the GELU on the fp32 accumulators."""
    return _launch(x, weight, bias, GELU, bias, bias, 16, 0)


def rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Interleaved cosines and sines, float32, the positions, and the head dimension.

    Where heads fill blocks of 64 columns, the table is of rows, as a tile wants it: [T, 64]. Else of positions: [L, Dh].
    """
    table = torch.stack((cos, sin), dim=-1).flatten(1)
    head_dim = table.shape[1]
    if TURN_COLUMNS % head_dim == 0:
        table = table.index_select(0, positions).repeat(1, TURN_COLUMNS // head_dim)
    return table, positions, head_dim


def rotary_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor, int]
) -> tuple[torch.Tensor, ...]:
    """As `plain.rotary_linear`, with weight and bias from `fused.arrange`: q and k rotated in fp32, interleaved."""
    table, positions, head_dim = rotary
    rotated = 2 * (len(weight) // 3)
    if TURN_COLUMNS % head_dim == 0:
        blocks = TensorDescriptor.from_tensor(table, [ROWS, TURN_COLUMNS])
        out = _launch(x, weight, bias, TURN_BY_TILE, blocks, positions, head_dim, rotated)
    else:
        out = _launch(x, weight, bias, TURN_BY_ROW, table, positions, head_dim, rotated)
    return out.view(len(x), 3, -1, head_dim).unbind(1)


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epilogue: int,
    table: torch.Tensor | TensorDescriptor, positions: torch.Tensor, head_dim: int, rotated: int,
) -> torch.Tensor:  # fmt: skip
    (rows, depth), columns = x.shape, len(weight)
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    programs = min(_processors(x.device), tiles)
    _linear[(programs,)](
        TensorDescriptor.from_tensor(x, [ROWS, DEPTH]), TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
        TensorDescriptor.from_tensor(y, [ROWS, COLUMNS // 4]), bias, table, positions, rows, columns, depth, rotated, programs,
        epilogue, head_dim, rotated % COLUMNS == 0, TURN_COLUMNS, ROWS, COLUMNS, DEPTH, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
