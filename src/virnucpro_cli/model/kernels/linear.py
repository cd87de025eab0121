"""Linear layers on Hopper, in 16 bit or e4m3, whose result is finished before it leaves the chip: by the rest of the
LayerNorm before them, and GELU or SwiGLU, or the rotary embedding of q and k, or by adding it to the residual stream.

One persistent kernel: tiles of x and W come through the tensor memory accelerator, three deep; a tile of the result is
finished in fp32 and stored a column block after the other. Every row is computed in the same order wherever it stands.
"""

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from virnucpro_cli.model.kernels import OPTIONS
from virnucpro_cli.model.kernels.norm import qk_scale, quantised_norm, row_scale
from virnucpro_cli.model.plain import Pair

ROWS, COLUMNS, DEPTH_BYTES = 128, 256, 128
"""Tile of the result, and how much of the inner dimension is loaded at a time."""
GELU, TURN_BY_TILE, TURN_BY_ROW, ADD, SWIGLU = 1, 2, 3, 4, 5
TURN_COLUMNS = COLUMNS // 4
GATED = COLUMNS // 2
"""Rows of the gate, and after them as many of what it multiplies, in the weight of a SwiGLU: they meet in one tile."""


class Rotary:
    """Interleaved cosines and sines of every position, float32 [L, Dh], and the positions of the rows, int32 [T]."""

    def __init__(self, table: torch.Tensor, positions: torch.Tensor):
        self.table, self.positions = table, positions

    @cached_property
    def of_rows(self) -> torch.Tensor:
        """The table as a tile wants it where heads fill blocks of 64 columns, float32 [T, 64]."""
        return self.table.index_select(0, self.positions).repeat(1, TURN_COLUMNS // self.table.shape[1])


@triton.jit
def gelu(x):
    """x Phi(x), within 7e-7 of exact: max(x, 0) - u Phi(-u) of u = |x|, and log2 Phi(-u) is a polynomial.

    Coefficients: least maximum error of u Phi(-u) on [0, 5.6]. Relative to it: 7e-5 up to u = 3, where fp16 has 5e-4.
    """
    u = tl.minimum(tl.abs(x), 5.5, propagate_nan=tl.PropagateNan.ALL)  # what is not a number must stay so
    tail = -0.0004732940529956741 * u + 0.0070844615818969605
    tail = tail * u - 0.051827169923294815
    tail = tail * u - 0.45999264343102614
    tail = tail * u - 1.150787771152698
    tail = tail * u - 1.0000376321483986
    return tl.maximum(x, 0.0) - u * tl.exp2(tail)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _turn(acc, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first, second = tl.split(tl.reshape(acc, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(first * cos - second * sin, second * cos + first * sin), (ROWS, COLUMNS))


@triton.jit
def _vectors(shift, bias, column, COLUMNS: tl.constexpr):
    c = column + tl.arange(0, COLUMNS)
    if shift is None:
        own = tl.load(bias + c)
        return own, own
    else:
        return tl.load(shift + c), tl.load(bias + c)  # not masked: they are as long as the tiles are wide


@triton.jit
def _normed(acc, vectors, scale, SHIFTED: tl.constexpr):
    shift, bias = vectors
    if SHIFTED:
        acc = acc + shift[None, :]
    return acc * scale[:, None] + bias[None, :]


@triton.jit
def _add_up_squares(
    acc, sums, row, column, rows, rotated, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums over these columns of q, and of k. A block that has both has two places, so k is one further."""
    r, width, to = row + tl.arange(0, ROWS), rotated // 2, column // COLUMNS
    if ALIGNED:
        tl.store(sums + (to + (column >= width).to(tl.int32)) * rows + r, tl.sum(acc * acc, 1), mask=r < rows)
    else:
        c = (column + tl.arange(0, COLUMNS))[None, :]
        if column < width:
            own = tl.where(c < width, acc * acc, 0.0)
            tl.store(sums + to * rows + r, tl.sum(own, 1), mask=r < rows)
        if column + COLUMNS > width:
            own = tl.where((c >= width) & (c < rotated), acc * acc, 0.0)
            tl.store(sums + (to + 1) * rows + r, tl.sum(own, 1), mask=r < rows)


@triton.jit
def _finish(
    acc, vectors, y, scale, unit, cos, sin, table, positions, gain, sums, row, column, rows, rotated,
    EPILOGUE: tl.constexpr, FOLDED: tl.constexpr, SHIFTED: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    shift, bias = vectors
    if FOLDED:
        acc = _normed(acc, vectors, scale, SHIFTED)
    elif EPILOGUE == 4:
        acc = acc * unit
    else:
        acc = acc * unit + bias[None, :]
    if EPILOGUE == 1:
        acc = gelu(acc)
        if not FOLDED:
            acc = acc * shift[None, :]
    elif EPILOGUE != 4 and column < rotated:
        c = column + tl.arange(0, COLUMNS)
        turned = (c < rotated)[None, :]  # v may begin among these columns
        if gain is not None:
            _add_up_squares(acc, sums, row, column, rows, rotated, ALIGNED, ROWS, COLUMNS)
            acc = acc * tl.load(gain + c)[None, :]
        if EPILOGUE == 2:
            found = _turn(acc, cos, sin, ROWS, COLUMNS)
            acc = found if ALIGNED else tl.where(turned, found, acc)
        else:
            r = row + tl.arange(0, ROWS)
            position = tl.load(positions + r, mask=r < rows, other=0)
            turn = tl.load(table + position[:, None] * HEAD_DIM + (c % HEAD_DIM)[None, :], mask=turned, other=0.0)
            own_cos, own_sin = tl.split(tl.reshape(turn, (ROWS, COLUMNS // 2, 2)))
            acc = tl.where(turned, _turn(acc, own_cos, own_sin, ROWS, COLUMNS), acc)
    if EPILOGUE == 4:
        y.atomic_add([row, column], acc.to(y.dtype))
    else:
        y.store([row, column], acc.to(y.dtype))


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _linear(
    x, w, y, scales, shift, bias, table, positions, gain, sums, rows, columns, depth, rotated, unit, programs,
    EPILOGUE: tl.constexpr, FOLDED: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    in_group = 8 * tiles_across  # eight tiles of rows share the weights that are in the cache
    quarter: tl.constexpr = COLUMNS // 4
    # There are registers to load the next vectors early; the rotary tables leave none.
    ahead: tl.constexpr = EPILOGUE == 1
    shifted: tl.constexpr = shift is not None
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_across, programs, flatten=True):
        group = tile // in_group * 8
        size = min(tiles_down - group, 8)
        row = (group + tile % in_group % size) * ROWS
        column = tile % in_group // size * COLUMNS
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, DEPTH):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc)
        scale = row + tl.arange(0, ROWS)
        if FOLDED:
            scale = tl.load(scales + scale)
        if EPILOGUE == 2:  # not before the product, which would lack their registers
            cos, sin = tl.split(tl.reshape(table.load([row, 0]), (ROWS, quarter // 2, 2)))
        else:
            cos, sin = scale, scale
        left, right = _halves(acc, ROWS, COLUMNS)
        quarters = _halves(left, ROWS, COLUMNS // 2) + _halves(right, ROWS, COLUMNS // 2)
        vectors = _vectors(shift, bias, column, quarter)
        if EPILOGUE == 5:
            second = _vectors(shift, bias, column + quarter, quarter)
            third = _vectors(shift, bias, column + 2 * quarter, quarter)
            fourth = _vectors(shift, bias, column + 3 * quarter, quarter)
            acc = silu(_normed(quarters[0], vectors, scale, shifted)) * _normed(quarters[2], third, scale, shifted)
            y.store([row, column // 2], acc.to(y.dtype))
            acc = silu(_normed(quarters[1], second, scale, shifted)) * _normed(quarters[3], fourth, scale, shifted)
            y.store([row, column // 2 + quarter], acc.to(y.dtype))
        else:
            for part in tl.static_range(4):
                if ahead and part < 3:
                    following = _vectors(shift, bias, column + (part + 1) * quarter, quarter)
                _finish(
                    quarters[part], vectors, y, scale, unit, cos, sin, table, positions, gain, sums,
                    row, column + part * quarter, rows, rotated, EPILOGUE, FOLDED, shifted, HEAD_DIM, ALIGNED,
                    ROWS, quarter,
                )  # fmt: skip
                if part < 3:
                    vectors = following if ahead else _vectors(shift, bias, column + (part + 1) * quarter, quarter)


class Folded(NamedTuple):
    """LayerNorm of x + offset and the linear layer after it as one product: (x weight^T + shift) row_scale + bias.

    weight [M, K] in 16 bit: W diag(gamma), each row less its mean, which takes the mean out of x; shift = weight offset
    and bias = b + W beta, float32, `whole_tiles` of [M]; offset float32 [K]. No shift: the offset is zero.
    gain: weights of the norms of q and k, and ones for v, `whole_tiles` of [M]; None if q and k have no norms.
    """

    offset: torch.Tensor
    weight: torch.Tensor
    shift: torch.Tensor | None
    bias: torch.Tensor
    gain: torch.Tensor | None = None


class Quantised(NamedTuple):
    """The same in e4m3: (quantised LayerNorm weight^T) unit + bias; a GELU of it, quantised as well, times grain.

    LayerNorm(x + offset) is quantised without its weight and bias, times `step`. weight [M, K] in e4m3:
    W diag(gamma) / (step unit); bias and grain float32, `whole_tiles` of [M]. See `e4m3` for how the scales are chosen.
    """

    offset: torch.Tensor
    weight: torch.Tensor
    grain: torch.Tensor
    bias: torch.Tensor
    step: float
    unit: float


class QuantisedSum(NamedTuple):
    """A linear layer without bias, added to the residual stream: x weight^T unit. weight [M, K] in e4m3."""

    weight: torch.Tensor
    unit: float


class Turn(NamedTuple):
    """The rotary part of a launch: table, positions of the rows, head dimension, and number of turned columns.

    gain: as in `Folded`; sums: float32, where sums of squares of q and k go, as `qk_scale` wants them; None or both.
    """

    table: torch.Tensor | TensorDescriptor
    positions: torch.Tensor
    head_dim: int = 16
    rotated: int = 0
    gain: torch.Tensor | None = None
    sums: torch.Tensor | None = None


def fold(norm: Pair, linear: Pair, offset: torch.Tensor, dtype: torch.dtype) -> Folded:
    """LayerNorm of x + offset [K] and the linear layer [M, K] after it, all float32, folded in float64, then rounded.

    A mean of the offset, which LayerNorm would remove, goes here.
    """
    (gamma, beta), (weight, bias) = norm, linear
    offset, wide = offset.double() - offset.double().mean(), weight.double()
    scaled = wide * gamma
    rounded = (scaled - scaled.mean(1, keepdim=True)).to(dtype)
    shift, bias = rounded.double() @ offset, bias + wide @ beta.double()
    return Folded(offset.float(), rounded, whole_tiles(shift), whole_tiles(bias))


def whole_tiles(columns: torch.Tensor) -> torch.Tensor:
    """Numbers [M], one a column, as float32 with zeros up to the end of the last tile."""
    return F.pad(columns.float(), (0, -len(columns) % COLUMNS))


def gelu_linear(x: torch.Tensor, layer: Folded | Quantised) -> torch.Tensor:
    """x [T, K] to gelu of the layer [T, M]: in the dtype of x, or in e4m3 if the layer is."""
    return _of_norm(x, layer, GELU, layer.weight.dtype, Turn(layer.bias, layer.bias))


def swiglu_linear(x: torch.Tensor, layer: Folded) -> torch.Tensor:
    """x [T, K] to silu(a) b [T, M / 2] of the layer, in its dtype; rows of a and b alternate, `GATED` of each."""
    return _of_norm(x, layer, SWIGLU, x.dtype, Turn(layer.bias, layer.bias))


def rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Rotary:
    """The rotary embedding of a batch, of cosines and sines [L, Dh/2], float32, and the positions, int32 [T]."""
    return Rotary(torch.stack((cos, sin), dim=-1).flatten(1), positions)


def rotary_linear(x: torch.Tensor, layer: Folded | Quantised, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """x [T, K] to q, k, v [T, H, Dh] in its dtype; q and k, the first two thirds of the layer, are rotated in fp32.

    Their halves of every head are interleaved. If the layer has a gain, two more come of `qk_scale`, each [T].
    """
    head_dim = rotary.table.shape[1]
    width, gain, sums = len(layer.weight) // 3, getattr(layer, "gain", None), None
    if gain is not None:
        sums = torch.empty(triton.cdiv(2 * width, TURN_COLUMNS) + 1, len(x), device=x.device)
    by_tile = TURN_COLUMNS % head_dim == 0
    source = TensorDescriptor.from_tensor(rotary.of_rows, [ROWS, TURN_COLUMNS]) if by_tile else rotary.table
    turn = Turn(source, rotary.positions, head_dim, 2 * width, gain, sums)
    out = _of_norm(x, layer, TURN_BY_TILE if by_tile else TURN_BY_ROW, x.dtype, turn)
    thirds = out.view(len(x), 3, -1, head_dim).unbind(1)
    return thirds if sums is None else (*thirds, *qk_scale(sums, width, TURN_COLUMNS))


def add_linear(x: torch.Tensor, inner: torch.Tensor, layer: QuantisedSum) -> None:
    """x [T, M], dtype float16, += the layer of inner [T, K], which is in e4m3."""
    unused = _vector(x.device)
    _launch(ADD, inner, layer.weight, x, None, (unused, unused), layer.unit, Turn(unused, unused))


@lru_cache
def _vector(device: torch.device) -> torch.Tensor:
    return torch.zeros(COLUMNS, device=device)


def _of_norm(x: torch.Tensor, layer: Folded | Quantised, epilogue: int, dtype: torch.dtype, turn: Turn) -> torch.Tensor:
    width = len(layer.weight) // 2 if epilogue == SWIGLU else len(layer.weight)
    y = torch.empty(len(x), width, dtype=dtype, device=x.device)
    if isinstance(layer, Folded):
        scales, source, shift, unit = row_scale(x, layer.offset), x, layer.shift, 1.0
    else:
        scales, source, shift, unit = None, quantised_norm(x, layer.offset, layer.step), layer.grain, layer.unit
    _launch(epilogue, source, layer.weight, y, scales, (shift, layer.bias), unit, turn)
    return y


def _launch(
    epilogue: int, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, scales: torch.Tensor | None,
    vectors: tuple[torch.Tensor | None, torch.Tensor], unit: float, turn: Turn,
) -> None:  # fmt: skip
    shift, bias = vectors
    (rows, depth), columns, block = x.shape, len(weight), DEPTH_BYTES // x.itemsize
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    programs = min(_processors(x.device), tiles)
    _linear[(programs,)](
        TensorDescriptor.from_tensor(x, [ROWS, block]), TensorDescriptor.from_tensor(weight, [COLUMNS, block]),
        TensorDescriptor.from_tensor(y, [ROWS, COLUMNS // 4]), bias if scales is None else scales, shift, bias,
        turn.table, turn.positions, turn.gain, turn.sums, rows, columns, depth, turn.rotated, unit, programs,
        epilogue, scales is not None, turn.head_dim, turn.rotated % (COLUMNS // 2) == 0, ROWS, COLUMNS, block,
        num_warps=8, num_stages=3, **OPTIONS,
    )  # fmt: skip


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
