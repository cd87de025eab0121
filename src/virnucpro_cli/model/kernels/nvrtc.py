"""Kernels in CUDA C++ for Hopper: compiled, kept in the cache, loaded, and launched.

NVRTC and `cuda.bindings`, which come with PyTorch for CUDA, compile them. Each file stands behind `hopper.cuh`.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from virnucpro_cli.errors import in_a_line
from virnucpro_cli.model.keeping import keep, kept

COMMON = Path(__file__).with_name("hopper.cuh")
ELEMENTS = {torch.float16: "f16", torch.bfloat16: "bf16"}
POINTER, INT, FLOAT, DESCRIPTOR = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, None
"""Kinds of arguments of a kernel."""


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose results are kept, as `functools.cache` does; a thread waits while another computes."""
    lock, cached = Lock(), cache(function)

    @wraps(function)
    def waiting(*arguments: Any) -> Any:
        with lock:
            return cached(*arguments)

    return waiting


def refusal(
    device: torch.device, dtype: torch.dtype, try_out: Callable[[torch.device, torch.dtype], None]
) -> str | None:
    """Why a kernel here cannot be used there; None if it can: it was compiled, and is as exact as it should be.

    try_out: compares it with PyTorch, and raises if it differs.
    """
    if dtype not in ELEMENTS or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it is written for 16 bit and Hopper"
    try:
        with torch.cuda.device(device), torch.inference_mode():
            try_out(device, dtype)
    except Exception as error:  # no NVRTC, no cuda.bindings, another driver ...
        return in_a_line(error)[:200]
    return None


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


def launch(
    kernel: Any, blocks: tuple[int, int, int], threads: int, shared: int, values: tuple[Any, ...],
    kinds: tuple[Any, ...], device: torch.device,
) -> None:  # fmt: skip
    """Start the kernel on the device's current stream.

    values: numbers, addresses, and descriptors of the tensor memory accelerator; kinds: of each.
    """
    from cuda.bindings import driver

    stream = torch.cuda.current_stream(device).cuda_stream
    checked(driver.cuLaunchKernel(kernel, *blocks, threads, 1, 1, shared, stream, (values, kinds), 0))
