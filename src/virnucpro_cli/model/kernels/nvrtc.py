"""Kernels in CUDA C++ for Hopper: compiled, kept in the cache, loaded, and launched.

NVRTC and `cuda.bindings`, which come with PyTorch for CUDA, compile them. Each file stands behind `hopper.cuh`.
"""

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from virnucpro_cli.model.keeping import keep, kept

COMMON = Path(__file__).with_name("hopper.cuh")
ELEMENTS = {torch.float16: "f16", torch.bfloat16: "bf16"}
POINTER, INT, FLOAT, BOXES = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, None
"""Kinds of arguments of a kernel."""


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel here can be used there, or None."""
    if dtype in ELEMENTS and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return None
    return "it is written for 16 bit and Hopper"


def source(file: Path) -> bytes:
    return COMMON.read_bytes() + file.read_bytes()


def options(macros: dict[str, Any]) -> list[str]:
    """Options of the compiler that define the macros."""
    return ["--gpu-architecture=sm_90a", "-default-device", *(f"-D{name}={value}" for name, value in macros.items())]


def operands(first: int, count: int) -> str:
    """How the text of an instruction names so many operands."""
    return '"' + ", ".join(f"%{first + i}" for i in range(count)) + '"'


def registers(constraint: str, name: str, count: int) -> str:
    """Elements of an array as operands of an instruction."""
    return ", ".join(f'"{constraint}"({name}[{i}])' for i in range(count))


def compiled(source: bytes, options: Sequence[str]) -> bytes:
    """The machine code of CUDA C++ that includes nothing. Raises RuntimeError with what the compiler says."""
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source, b"kernel.cu", 0, [], []))
    given = [option.encode() for option in options]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    if error != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{error.name}: {log.decode(errors='replace')}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def checked(result: tuple[Any, ...]) -> Any:
    """The result of a call of `cuda.bindings`. Raises RuntimeError for the error beside it."""
    error, *found = result
    if error != 0:
        raise RuntimeError(f"{type(error).__name__}: {error.name}")
    return found[0] if found else None


def machine_code(file: Path, options: Sequence[str]) -> bytes:
    """The machine code of a kernel, from the cache if it is there."""
    from cuda.bindings import nvrtc

    text, (_, *version) = source(file), nvrtc.nvrtcVersion()
    about = "|".join([*options, *map(str, version)]).encode() + text
    code = kept("kernels", about)
    if code is None:
        code = compiled(text, options)
        keep("kernels", about, code)
    return code


@cache
def function(device: torch.device, file: Path, options: tuple[str, ...], shared: int) -> Any:
    """The kernel of the file's name on the device, with so many bytes of shared memory."""
    from cuda.bindings import driver

    torch.cuda.synchronize(device)  # the device has a context now, if it had none
    module = checked(driver.cuModuleLoadData(machine_code(file, options)))
    kernel = checked(driver.cuModuleGetFunction(module, file.stem.encode()))
    largest = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(kernel, largest, shared))
    return kernel


@lru_cache(4096)
def boxes(address: int, shape: tuple[int, int], stride: int, box: tuple[int, int], element: str) -> Any:
    """How the tensor memory accelerator reads boxes of a matrix in 16 bit, whose rows are `stride` numbers apart.

    shape and box: rows and columns. Rows of a box are swizzled over 128 bytes.
    """
    from cuda.bindings import driver

    types, wide, one = driver.CUtensorMapDataType, driver.cuuint64_t, driver.cuuint32_t(1)
    return checked(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if element == "f16" else types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2, address, [wide(shape[1]), wide(shape[0])], [wide(2 * stride)],
            [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])], [one, one],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip


def launch(
    kernel: Any, blocks: tuple[int, int, int], threads: int, shared: int, values: tuple[Any, ...],
    kinds: tuple[Any, ...], device: torch.device,
) -> None:  # fmt: skip
    """Start the kernel on the device's current stream. values: numbers, addresses, and what `boxes` says."""
    from cuda.bindings import driver

    stream = torch.cuda.current_stream(device).cuda_stream
    checked(driver.cuLaunchKernel(kernel, *blocks, threads, 1, 1, shared, stream, (values, kinds), 0))
