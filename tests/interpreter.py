"""Triton's interpreter, with what it lacks (adding through a descriptor) or does wrong (e4m3 without carry and NaN; products
whose bits depend on where a row stands, by the BLAS behind NumPy)."""

import os
from typing import Any

import numpy as np
import torch

OLDEST = "3.9"
"""Triton whose interpreter computes fp8 (3.8 does not)."""


def prepare() -> None:
    """Before the first kernel is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if target == tl.float8e4nv:
            return torch.from_numpy(np.asarray(values)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float8e4nv:
            wide = torch.from_numpy(np.asarray(values).view(np.uint8)).view(torch.float8_e4m3fn)
            return wide.to({16: torch.float16, 32: torch.float32}[target.primitive_bitwidth]).numpy()
        return convert(values, source, target, rounding)

    def descriptor_reduce(builder: Any, kind: Any, target: Any, value: Any, at: Any) -> None:
        there = builder.create_descriptor_load(target, at, None)
        builder.create_descriptor_store(target, type(value)(there.data + value.data, value.dtype), at)

    def dot(builder: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        def wide(x: Any) -> np.ndarray:
            narrow = x.dtype.primitive_bitwidth == 8 and x.dtype.is_floating()
            data = convert_float(x.data, x.dtype, tl.float16, None).view(np.float16) if narrow else x.data
            return data.astype(np.float64)

        return type(d)((wide(a) @ wide(b) + d.data).astype(d.data.dtype), d.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_descriptor_reduce = descriptor_reduce
