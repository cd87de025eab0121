"""Portable kernels, compiled ahead of time for GPUs that are not there: of every kind that they are promised for."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", "3.9")
pytestmark = pytest.mark.slow

COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from virnucpro_cli.model.kernels import OPTIONS, attention, contacts, glue, norm, portable

SIZES = {"HEAD_DIM": 64, "WIDE": 64, "ROWS": 64, "PRECISION": contacts.PRECISION}
KERNELS = (
    (attention._attention, {"HEAD_DIM": 64, "WIDE": 64, "QUERIES": 64, "KEYS": 32}, ("keys", "values", "q_scale", "k_scale")),
    (portable._turn, {"HALF": 32, "WIDE": 32, "HEADS": 32}, ()), (portable._turn, {"HALF": 12, "WIDE": 16, "HEADS": 32}, ("gain",)),
    (glue._gated, {"BY_GELU": False, "COLUMNS": glue.COLUMNS}, ()), (norm._norm, {"D": 1280, "WIDE": 256, "PARTS": 5, "ROWS": 1}, ()),
    (contacts._rows, SIZES, ()), (contacts._columns, SIZES, ()), (contacts._total, SIZES, ()),
)
DATA = {"q", "k", "v", "x", "out", "qkv"}
WHOLE = {"stride", "heads", "rows", "width", "column"}
for kernel, sizes, absent in KERNELS:
    constant = sizes | dict.fromkeys(absent)
    for element in ("fp16", "bf16"):
        types = {
            name: "constexpr" if name in constant else "*" + element if name in DATA else "i32" if name in WHOLE
            else "fp32" if name in ("scale", "eps") else "*i32" if name in ("tiles", "positions")
            else "*i64" if name == "starts" else "*fp32"
            for name in kernel.arg_names
        }
        made = compile(ASTSource(kernel, types, constant), GPUTarget("cuda", int(sys.argv[1]), 32), {"num_warps": 4} | OPTIONS)
        assert made.metadata.shared <= 100 << 10, (kernel, made.metadata.shared)
"""


@pytest.mark.parametrize("capability", ["80", "90", "100", "120"])
def test_portable_kernels_compile_for_every_promised_gpu(capability: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", COMPILE, capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
