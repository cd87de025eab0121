"""Triton's interpreter, with what it lacks (adding through a descriptor) or does wrong (e4m3 without carry and NaN; products
whose bits depend on where a row stands, by the BLAS behind NumPy), and less of what it does again and again."""

import dataclasses
import inspect
import os
from typing import Any

import numpy as np
import torch

OLDEST = "3.9"
"""Triton whose interpreter computes fp8 (3.8 does not)."""
HASTENED = ("3.9.",)
"""Versions whose private names `_hasten` knows. Others take three to four times as long."""


def prepare() -> None:
    """Before the first kernel is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
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

    if triton.__version__.startswith(HASTENED):
        _hasten(interpreter)
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_descriptor_reduce = descriptor_reduce


def _hasten(interpreter: Any) -> None:
    """Leave out what nobody reads, and make once what never changes: three quarters of the time."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # else assertions would read the sums of integers that are made again in int64
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    dtypes, dtype_of = dict[str, np.dtype[Any]](), interpreter._get_np_dtype

    def np_dtype(kind: Any) -> np.dtype[Any]:
        if kind.name not in dtypes:
            dtypes[kind.name] = dtype_of(kind)
        return dtypes[kind.name]

    interpreter._get_np_dtype = np_dtype
    _patch_language_once(interpreter)
    _make_shapes_once(interpreter.tl.core)


def _patch_language_once(interpreter: Any) -> None:
    """A launch does, and functions that its kernel calls need no more than that."""
    core, patch, builtins, modules = interpreter.tl.core, interpreter._patch_lang, dict[Any, list[str]](), set[str]()

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in builtins:
            builtins[package] = [name for name, each in inspect.getmembers(package) if core.is_builtin(each)]
        for name in builtins[package]:
            if core.is_builtin(each := getattr(package, name)):
                interpreter._patch_attr(package, name, each, builder, scope)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.fn.__module__ not in modules:  # as Triton's own, which see the language by another name
            modules.add(self.fn.__module__)
            patch(self.fn)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_builtin = patch_builtin
    interpreter.InterpretedFunction.__call__ = call


def _make_shapes_once(core: Any) -> None:
    """Those of types and tensors; each is kept for ever, so its id stands for it."""
    begin_type, begin_tensor, blocks, tensors = core.block_type.__init__, core.tensor.__init__, {}, {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = id(shape) if id(shape) in blocks else tuple(core._unwrap_shape(shape))
        if key not in blocks:
            begin_type(self, element_ty, shape)
            blocks[key] = blocks[id(self.shape)] = self.shape, self.numel, str(self.shape)
        self.element_ty, (self.shape, self.numel, text) = element_ty, blocks[key]
        self.name = f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = id(type.shape) if type.is_block() else None
        if key not in tensors:
            begin_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel, type
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel, _ = tensors[key]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
