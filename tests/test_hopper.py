"""The kernels of CUDA C++ against their Triton twins and float64 on a Hopper GPU; elsewhere that they compile."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from conftest import relative_l2

triton = pytest.importorskip("triton")

from virnucpro_cli.batch import query_tiles  # noqa: E402
from virnucpro_cli.model.kernels import attention, hopper_attention, linear, nvrtc, pingpong, trial  # noqa: E402

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="no Hopper GPU")]
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
@pytest.mark.parametrize(("element", "head_dim", "shifted"), [("f16", 0, True), ("f16", 64, True), ("bf16", 24, False)])
def test_it_compiles_for_hopper(element: str, head_dim: int, shifted: bool) -> None:
    code = nvrtc.compiled(nvrtc.source(pingpong.SOURCE), pingpong.options(element, head_dim, shifted))
    assert code.startswith(b"\x7fELF") and b".text.pingpong\0" in code


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
@pytest.mark.parametrize(("element", "head_dim", "left"), [("f16", 16, False), ("bf16", 24, False), ("f16", 64, True)])
def test_attention_compiles_for_hopper(element: str, head_dim: int, left: bool) -> None:
    code = nvrtc.compiled(nvrtc.source(hopper_attention.SOURCE), hopper_attention.options(element, head_dim, left))
    assert code.startswith(b"\x7fELF") and b".text.hopper_attention\0" in code


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
def test_it_is_compiled_once_and_kept_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = pingpong.options("f16", 0, True)
    code = nvrtc.machine_code(pingpong.SOURCE, options)
    (file,) = (home / "xdg" / "virnucpro" / "kernels").iterdir()
    assert file.read_bytes() == code
    monkeypatch.setattr(nvrtc, "compiled", lambda source, options: pytest.fail("it is kept"))
    assert nvrtc.machine_code(pingpong.SOURCE, options) == code


def test_a_kernel_is_tried_once_however_many_threads_ask() -> None:
    both, tried = Barrier(2), list[str]()

    @nvrtc.once
    def try_out(name: str) -> str:
        tried.append(name)
        with suppress(BrokenBarrierError):  # another thread is in here as well, unless it waits outside
            both.wait(0.2)
        return name

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(try_out, ["kernel"] * 4)) == ["kernel"] * 4
    assert tried == ["kernel"]


def test_calls_side_by_side_give_their_results_in_order_and_the_first_error() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert trial.side_by_side(device, [partial(pow, 2, n) for n in range(20)]) == [2**n for n in range(20)]
    with pytest.raises(ValueError, match="invalid literal for int"):
        trial.side_by_side(device, [partial(int, "1"), partial(int, "one"), partial(dict, 2)])


def test_what_the_compiler_says_is_the_message() -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION(.|\n)*expected"):
        nvrtc.compiled(b"void pingpong( {", ["--gpu-architecture=sm_90a"])


def test_a_device_that_is_not_hopper_is_refused_in_words() -> None:
    for kernel in (pingpong, hopper_attention):
        assert kernel.refusal(torch.device("cpu"), torch.float16) == "it is written for 16 bit and Hopper"


def made(rows: int, depth: int, columns: int, shifted: bool, dtype: torch.dtype) -> tuple[torch.Tensor, linear.Folded]:
    """A stream and a folded layer after it, on the GPU."""
    torch.manual_seed(rows + depth + columns)
    norm = (torch.rand(depth, device="cuda") + 0.5, torch.randn(depth, device="cuda"))
    layer = (torch.randn(columns, depth, device="cuda") * depth**-0.5, torch.randn(columns, device="cuda"))
    offset = torch.randn(depth, device="cuda") if shifted else torch.zeros(depth, device="cuda")
    folded = linear.fold(norm, layer, offset, dtype)
    return torch.randn(rows, depth, device="cuda").to(dtype), folded if shifted else folded._replace(shift=None)


def exact(x: torch.Tensor, layer: linear.Folded) -> torch.Tensor:
    """The layer of x in float64, of its numbers as they are stored."""
    wide, columns = x.double() + layer.offset, len(layer.weight)
    scale = (wide.var(1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    shift = 0 if layer.shift is None else layer.shift[:columns].double()
    return (x.double() @ layer.weight.double().T + shift) * scale + layer.bias[:columns].double()


# Fewer rows than a tile, one tile, tiles at an end, and several tiles for each group of each block.
SHAPES = [(1, 64, 32), (130, 320, 1280), (777, 136, 480), (3001, 480, 1920), (40000, 320, 960)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
class TestOnHopper:
    pytestmark = on_hopper

    def test_gelu_is_that_of_the_exact_product(
        self, rows: int, depth: int, columns: int, shifted: bool, dtype: torch.dtype
    ) -> None:
        x, layer = made(rows, depth, columns, shifted, dtype)
        assert pingpong.takes(x, layer)
        found = pingpong.gelu_linear(x, layer)
        assert relative_l2(found, torch.nn.functional.gelu(exact(x, layer))) <= ROUNDING[dtype]
        assert relative_l2(found, linear.gelu_linear(x, layer)) <= 2 * ROUNDING[dtype]

    @pytest.mark.parametrize("head_dim", pingpong.HEAD_DIMS)
    def test_q_and_k_are_turned_and_v_is_not(
        self, rows: int, depth: int, columns: int, shifted: bool, dtype: torch.dtype, head_dim: int
    ) -> None:
        x, layer = made(rows, depth, 3 * head_dim * 2 * 4, shifted, dtype)
        angles = torch.outer(torch.arange(100, device="cuda").float(), torch.rand(head_dim // 2, device="cuda"))
        positions = (torch.arange(rows, device="cuda") % 100).int()
        rotary = linear.rotary(angles.cos(), angles.sin(), positions)
        found = torch.cat([each.flatten(1) for each in pingpong.rotary_linear(x, layer, rotary)], 1)
        wide, width = exact(x, layer), len(layer.weight) // 3
        turns = torch.polar(torch.ones_like(angles).double(), angles.double())[positions.long()][:, None]
        turned = torch.view_as_complex(wide[:, : 2 * width].reshape(rows, -1, head_dim // 2, 2)) * turns
        wide[:, : 2 * width] = torch.view_as_real(turned).flatten(1)
        assert relative_l2(found, wide) <= ROUNDING[dtype]
        twin = torch.cat([each.flatten(1) for each in linear.rotary_linear(x, layer, rotary)], 1)
        assert relative_l2(found, twin) <= 2 * ROUNDING[dtype]

    def test_a_row_has_the_same_bits_wherever_it_stands(
        self, rows: int, depth: int, columns: int, shifted: bool, dtype: torch.dtype
    ) -> None:
        x, layer = made(rows, depth, columns, shifted, dtype)
        whole = pingpong.gelu_linear(x, layer)
        for first, last in ((rows // 2, rows), (rows // 3, rows // 3 + 1), (0, rows - rows // 5)):
            assert torch.equal(pingpong.gelu_linear(x[first:last].clone(), layer), whole[first:last])

    def test_what_is_not_a_number_stays_in_its_row(
        self, rows: int, depth: int, columns: int, shifted: bool, dtype: torch.dtype
    ) -> None:
        x, layer = made(rows, depth, columns, shifted, dtype)
        x[rows // 2, depth // 2] = float("nan")
        found = pingpong.gelu_linear(x, layer).isnan()
        assert found[rows // 2].all()
        assert found.sum() == columns


# Around the edges of sixteen keys, of a block of keys, and of a tile of queries; rows of nobody follow.
LENGTHS = [1, 2, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 79, 128, 129, 193, 300, 511, 640]
BOUNDS = np.append(0, np.cumsum(LENGTHS))
ROWS = int(BOUNDS[-1]) + 17


def tiles_of(bounds: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(query_tiles(bounds)).to("cuda", torch.int32)


def qkv(dtype: torch.dtype, head_dim: int, scale: float = 1.0) -> torch.Tensor:
    """Queries, keys and values beside each other, [ROWS, 3, 5, Dh]; rows of nobody are no numbers."""
    torch.manual_seed(head_dim)
    rows = torch.randn(ROWS, 3, 5, head_dim, device="cuda") * scale
    rows[BOUNDS[-1] :] = float("nan")
    return rows.to(dtype)


def attended(
    rows: torch.Tensor, bounds: NDArray[np.int64] = BOUNDS, left: tuple[torch.Tensor, ...] = ()
) -> torch.Tensor:
    """What the kernel makes of the segments, [T, 5, Dh]."""
    q, k, v = rows.unbind(1)
    assert hopper_attention.takes(q)
    return hopper_attention.attention(q, k, v, tiles_of(bounds), q.shape[2] ** -0.5, *left)[: bounds[-1]]


def exactly(rows: torch.Tensor, left: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
    """The same in float64."""
    found = []
    for start, stop in itertools.pairwise(BOUNDS):
        q, k, v = rows[start:stop].double().permute(1, 2, 0, 3)  # [5, L, Dh] each
        if left:
            q, k = q * left[0][start:stop, None], k * left[1][start:stop, None]
        found.append((torch.softmax(q @ k.mT * q.shape[2] ** -0.5, -1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("head_dim", hopper_attention.HEAD_DIMS)
class TestAttentionOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("scale", [1.0, 4.0])
    def test_it_is_that_of_float64(self, head_dim: int, dtype: torch.dtype, scale: float) -> None:
        rows = qkv(dtype, head_dim, scale)
        exact, q, k, v = exactly(rows), *rows.unbind(1)
        assert relative_l2(attended(rows), exact) <= 1.2 * ROUNDING[dtype]
        twin = attention.attention(q, k, v, tiles_of(BOUNDS), head_dim**-0.5)[: BOUNDS[-1]]
        assert relative_l2(attended(rows), exact) <= 1.3 * relative_l2(twin, exact)

    def test_scores_may_grow_along_a_segment(self, head_dim: int, dtype: torch.dtype) -> None:
        """Weights by what the first keys say would not fit 16 bit, so that it is found anew."""
        rows = qkv(torch.float32, head_dim).abs()
        for start, stop in itertools.pairwise(BOUNDS):
            rows[start:stop, 1] *= torch.linspace(0.01, 40, stop - start, device="cuda")[:, None, None]
        rows = rows.to(dtype)
        assert relative_l2(attended(rows), exactly(rows)) <= 1.2 * ROUNDING[dtype]

    def test_rows_of_queries_and_keys_are_multiplied_by_what_is_left(self, head_dim: int, dtype: torch.dtype) -> None:
        rows, left = qkv(dtype, head_dim), tuple(torch.rand(2, ROWS, device="cuda") + 0.5)
        assert relative_l2(attended(rows, left=left), exactly(rows, left)) <= 1.2 * ROUNDING[dtype]

    def test_a_segment_has_the_same_bits_in_any_company(self, head_dim: int, dtype: torch.dtype) -> None:
        rows, left = qkv(dtype, head_dim), tuple(torch.rand(2, ROWS, device="cuda") + 0.5)
        for factors in ((), left):
            whole = attended(rows, left=factors)
            for start, stop in itertools.pairwise(BOUNDS):
                alone = attended(
                    rows[start:stop].clone(),
                    np.array([0, stop - start]),
                    tuple(each[start:stop].clone() for each in factors),
                )
                assert torch.equal(alone, whole[start:stop])

    def test_queries_keys_and_values_may_lie_apart(self, head_dim: int, dtype: torch.dtype) -> None:
        rows = qkv(dtype, head_dim)
        q, k, v = rows.unbind(1)
        found = hopper_attention.attention(q.clone(), k.clone(), v, tiles_of(BOUNDS), head_dim**-0.5)
        assert torch.equal(found[: BOUNDS[-1]], attended(rows))

    def test_what_is_not_a_number_stays_in_its_segment(self, head_dim: int, dtype: torch.dtype) -> None:
        rows = qkv(dtype, head_dim)
        whole, start, stop = attended(rows), BOUNDS[12], BOUNDS[13]
        rows[start + 5] = float("nan")
        found = attended(rows)
        assert found[start:stop].isnan().all()
        assert torch.equal(found[:start], whole[:start]) and torch.equal(found[stop:], whole[stop:])
