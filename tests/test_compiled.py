"""Kernels in Triton, compiled ahead of time for GPUs that are not there: of every kind that they are promised for."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", "3.6")
pytestmark = pytest.mark.slow

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from virnucpro_cli.model.kernels import OPTIONS, attention, contacts, glue, linear, norm, portable, sums

SIZES = {"HEAD_DIM": 64, "WIDE": 64, "ROWS": 64, "PRECISION": contacts.PRECISION}
KERNELS = (
    (attention._attention, {"HEAD_DIM": 64, "WIDE": 64, "QUERIES": 64, "KEYS": 32}, ("q_scale", "k_scale")),
    (attention._attention, {"HEAD_DIM": 128, "WIDE": 128, "QUERIES": 64, "KEYS": 32}, ("q_scale", "k_scale", "slopes")),
    (portable._turn, {"HALF": 64, "WIDE": 64, "HEADS": 64}, ("gain",)), (norm._norm, {"D": 5120, "WIDE": 1024, "PARTS": 5, "ROWS": 1}, ()),
    (portable._turn, {"HALF": 32, "WIDE": 32, "HEADS": 32}, ()), (portable._turn, {"HALF": 12, "WIDE": 16, "HEADS": 32}, ("gain",)),
    (glue._gated, {"BY_GELU": False, "COLUMNS": glue.COLUMNS}, ()), (norm._norm, {"D": 1280, "WIDE": 256, "PARTS": 5, "ROWS": 1}, ()),
    (sums._sums, {"ROWS": sums.ROWS, "COLUMNS": sums.COLUMNS}, ()), (contacts._rows, SIZES, ()), (contacts._columns, SIZES, ()),
    (contacts._total, SIZES, ()),
)
DATA = {"q", "k", "v", "x", "out", "qkv"}
WHOLE = {"stride", "heads", "rows", "width", "column", "skip", "columns", "depth", "rotated", "programs"}
GPU = GPUTarget("cuda", int(sys.argv[1]), 32)
if sys.argv[2:] == ["hopper"]:
    for epilogue, element, absent in (
        (linear.GELU, "fp16", ()), (linear.GELU, "fp8e4nv", ("scales",)), (linear.SWIGLU, "bf16", ("shift",)),
        (linear.TURN_BY_TILE, "fp16", ("gain", "sums")), (linear.TURN_BY_ROW, "fp16", ()), (linear.ADD, "fp8e4nv", ("shift", "scales")),
    ):
        block = linear.DEPTH_BYTES // (1 if element == "fp8e4nv" else 2)
        wide = "fp16" if epilogue == linear.ADD else element
        constant = {"EPILOGUE": epilogue, "FOLDED": element != "fp8e4nv", "HEAD_DIM": 64, "ALIGNED": True, "ROWS": linear.ROWS,
                    "COLUMNS": linear.COLUMNS, "DEPTH": block, **dict.fromkeys(absent)}
        types = {
            "x": f"tensordesc<{element}[{linear.ROWS}, {block}]>", "w": f"tensordesc<{element}[{linear.COLUMNS}, {block}]>",
            "y": f"tensordesc<{wide}[{linear.ROWS}, {linear.COLUMNS // 4}]>",
        }
        if epilogue == linear.TURN_BY_TILE:
            types["table"] = f"tensordesc<fp32[{linear.ROWS}, {linear.COLUMNS // 4}]>"
        for name in linear._linear.arg_names:
            types.setdefault(name, "i32" if name in WHOLE else "fp32" if name == "unit" else
                             "*i32" if name == "positions" else "*fp32")
        types = {name: "constexpr" if name in constant else types[name] for name in linear._linear.arg_names}
        made = compile(ASTSource(linear._linear, types, constant), GPU, {"num_warps": 8, "num_stages": 3} | OPTIONS)
        assert made.metadata.shared <= 227 << 10, (epilogue, made.metadata.shared)
    sys.exit()
for kernel, sizes, absent in KERNELS:
    constant = sizes | dict.fromkeys(absent)
    for element in ("fp16", "bf16"):
        types = {
            name: "constexpr" if name in constant else "*" + element if name in DATA else "i32" if name in WHOLE
            else "fp32" if name in ("scale", "eps") else "*i32" if name in ("tiles", "positions", "bounds")
            else "*i64" if name == "starts" else "*fp32"
            for name in kernel.arg_names
        }
        made = compile(ASTSource(kernel, types, constant), GPU, {"num_warps": 4} | OPTIONS)
        assert made.metadata.shared <= 100 << 10, (kernel, made.metadata.shared)
"""


@pytest.mark.parametrize("capability", [["80"], ["90"], ["90", "hopper"], ["100"], ["120"]], ids=" ".join)
def test_kernels_compile_for_every_promised_gpu(capability: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", COMPILE, *capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
