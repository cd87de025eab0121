"""The products of CUDA C++ against their Triton twins and float64 on a Hopper GPU; elsewhere that they compile."""

import sys
from pathlib import Path

import pytest
import torch

from conftest import relative_l2

triton = pytest.importorskip("triton")
from virnucpro_cli.model.kernels import linear, pingpong  # noqa: E402

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="no Hopper GPU")]
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3}


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
@pytest.mark.parametrize(("element", "head_dim", "shifted"), [("f16", 0, True), ("f16", 64, True), ("bf16", 24, False)])
def test_it_compiles_for_hopper(element: str, head_dim: int, shifted: bool) -> None:
    code = pingpong.compiled(pingpong.SOURCE.read_bytes(), pingpong.options(element, head_dim, shifted))
    assert code.startswith(b"\x7fELF")


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
def test_it_is_compiled_once_and_kept_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = pingpong.options("f16", 0, True)
    code = pingpong._machine_code(options)
    (file,) = (home / "xdg" / "virnucpro" / "kernels").iterdir()
    assert file.read_bytes() == code
    monkeypatch.setattr(pingpong, "compiled", lambda source, options: pytest.fail("it is kept"))
    assert pingpong._machine_code(options) == code


def test_what_the_compiler_says_is_the_message() -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION(.|\n)*expected"):
        pingpong.compiled(b"void pingpong( {", ["--gpu-architecture=sm_90a"])


def test_a_device_that_is_not_hopper_is_refused_in_words() -> None:
    assert pingpong.refusal(torch.device("cpu"), torch.float16) == "it is written for 16 bit and Hopper"


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
