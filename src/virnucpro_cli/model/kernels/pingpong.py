"""Linear layers on Hopper that are finished while the next tile is multiplied, by the kernel in `pingpong.cu`.

Functions of `linear`, for folded layers in 16 bit without norms of q and k and without a gate.
"""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.model.kernels import nvrtc
from virnucpro_cli.model.kernels.linear import Folded, Quantised, Rotary, fold
from virnucpro_cli.model.kernels.norm import row_scale
from virnucpro_cli.model.kernels.trial import HEAD_DIM, Noise, must_agree, side_by_side

SOURCE = Path(__file__).with_suffix(".cu")
ROWS, COLUMNS, DEPTH, PIECE, STAGES, THREADS = 128, 160, 64, 32, 5, 384
"""Rows and columns of a tile, how much of the inner dimension is loaded at a time, columns that are finished at a time,
loads in flight, and threads of a block."""
SHARED = STAGES * (ROWS + COLUMNS) * DEPTH * 2 + 16 * 16 * PIECE * 2 + 16 * STAGES + 1024
HEAD_DIMS = (16, 24, 32, 64)


def takes(x: torch.Tensor, layer: Folded | Quantised, head_dim: int | None = None) -> bool:
    """Whether the functions here are for rows [T, K] of that dtype and the layer. head_dim: of its rotary embedding."""
    if not isinstance(layer, Folded) or layer.gain is not None or head_dim not in (None, *HEAD_DIMS):
        return False
    columns, depth = layer.weight.shape
    return columns % PIECE == 0 and depth % 8 == 0 and refusal(x.device, x.dtype) is None


@nvrtc.once
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be used there; None if it can: it was compiled, and is as exact as it should be."""
    return nvrtc.refusal(device, dtype, _try_out)


def gelu_linear(x: torch.Tensor, layer: Folded) -> torch.Tensor:
    """x [T, K] to gelu of the layer [T, M], both float16 or bf16."""
    return _launch(x, layer, 0, 0, None, None)


def rotary_linear(x: torch.Tensor, layer: Folded, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """x [T, K] to q, k, v [T, H, Dh] in its dtype; q and k, the first two thirds of the layer, are rotated in fp32.

    Their halves of every head are interleaved.
    """
    head_dim = rotary.table.shape[1]
    out = _launch(x, layer, head_dim, 2 * (len(layer.weight) // 3), rotary.table, rotary.positions)
    return out.view(len(x), 3, -1, head_dim).unbind(1)


@cache
def options(element: str, head_dim: int, shifted: bool) -> tuple[str, ...]:
    """Options of the compiler: what the kernel is to do, and the operands of a product, which are too many to write."""
    macros = {
        "ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "PIECE": PIECE, "STAGES": STAGES, "ELEMENT": f'"{element}"',
        "OUTPUTS": nvrtc.operands(0, COLUMNS // 2), "ACCUMULATORS": nvrtc.registers("+f", "acc", COLUMNS // 2),
    }  # fmt: skip
    if head_dim:
        macros["HEAD_DIM"] = head_dim
    if shifted:
        macros["SHIFTED"] = 1
    return tuple(nvrtc.options(macros))


@lru_cache(4096)
def _boxes(address: int, rows: int, width: int, box: int, element: str) -> Any:
    """How the tensor memory accelerator reads boxes [box, DEPTH] of a matrix [rows, width] in 16 bit."""
    from cuda.bindings import driver

    types, wide, one = driver.CUtensorMapDataType, driver.cuuint64_t, driver.cuuint32_t(1)
    return nvrtc.checked(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if element == "f16" else types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2, address, [wide(width), wide(rows)], [wide(2 * width)],
            [driver.cuuint32_t(DEPTH), driver.cuuint32_t(box)], [one, one],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


@cache
def _pairs(device: torch.device) -> int:
    """Pairs of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count // 2


KINDS = (nvrtc.DESCRIPTOR,) * 2 + (nvrtc.POINTER,) * 6 + (nvrtc.INT,) * 4


def _launch(
    x: torch.Tensor, layer: Folded, head_dim: int, rotated: int, table: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    (rows, depth), columns, element = x.shape, len(layer.weight), nvrtc.ELEMENTS[x.dtype]
    y, scales = torch.empty(rows, columns, dtype=x.dtype, device=x.device), row_scale(x, layer.offset)
    kernel = nvrtc.function(x.device, SOURCE, options(element, head_dim, layer.shift is not None), SHARED)
    pointers = (y, scales, layer.shift, layer.bias, table, positions)
    values = (
        _boxes(x.data_ptr(), rows, depth, ROWS, element),
        _boxes(layer.weight.data_ptr(), columns, depth, COLUMNS // 2, element),
        *(0 if each is None else each.data_ptr() for each in pointers), rows, columns, depth, rotated,
    )  # fmt: skip
    blocks = 2 * min(_pairs(x.device), -(-rows // (2 * ROWS)) * -(-columns // COLUMNS))
    nvrtc.launch(kernel, (blocks, 1, 1), THREADS, SHARED, values, KINDS, x.device)
    return y


def _try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernel with PyTorch where each of its groups has several tiles. Raises RuntimeError if it differs."""
    noise, heads, depth, width = Noise(device), 10, 136, HEAD_DIM
    rows = 4 * ROWS * _pairs(device) // 3
    norm, x = (noise(depth, mean=1.0), noise(depth)), noise(rows, depth).to(dtype)
    angles, positions = noise(64, width // 2, scale=3.0), torch.arange(rows, device=device, dtype=torch.int32) % 64
    rotary = Rotary(torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1), positions)
    layer = noise(3 * heads * width, depth), noise(3 * heads * width)
    folded, wide = fold(norm, layer, noise(depth), dtype), x.float()
    exact = F.linear(F.layer_norm(wide + folded.offset, (depth,), *norm), *layer)
    turns = torch.polar(torch.ones_like(angles), angles)[positions.long()][:, None]
    turned = torch.view_as_complex(exact[:, : 2 * heads * width].reshape(rows, 2 * heads, width // 2, 2)) * turns
    whole = torch.cat([torch.view_as_real(turned).flatten(1), exact[:, 2 * heads * width :]], dim=1)
    wide, found = side_by_side(device, (lambda: gelu_linear(x, folded), lambda: rotary_linear(x, folded, rotary)))
    for ours, twin in ((wide, F.gelu(exact)), (torch.cat([each.flatten(1) for each in found], dim=1), whole)):
        must_agree(ours, twin, dtype, "it differs from PyTorch")
