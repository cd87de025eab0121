"""Devices of this host: which there are, their memory and dtypes, what their errors mean."""

import ctypes
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import virnucpro_cli
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.model import attention

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def resolve_device(name: str, option: str = "--device") -> torch.device:
    """`auto` (CUDA if there, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`. Raises UserError if absent or too old."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = None
    with suppress(RuntimeError):
        device = torch.device(name)
    if (
        device is None
        or device.type not in ("cuda", "mps", "cpu")
        or (device.type == "cpu" and device.index is not None)
    ):
        raise UserError(f"{option} is {name!r}.", "Choose auto, cpu, cuda, cuda:N or mps.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{option} mps: there is no Apple GPU here.", f"Use {option} cpu.")
    return _gpu(device, option) if device.type == "cuda" else device


def _gpu(device: torch.device, option: str) -> torch.device:
    """The CUDA device with its number. Raises UserError if there is none such, or it is too old."""
    if not torch.cuda.is_available():
        for_cpu = torch.version.cuda is None and torch.version.hip is None
        build = "this PyTorch is a CPU build" if for_cpu else "none is visible"
        remedy = f"Use {option} cpu, or install a CUDA build of PyTorch."
        raise UserError(f"{option} {device}: there is no usable CUDA GPU ({build}).", remedy)
    count, number = torch.cuda.device_count(), device.index if device.index is not None else torch.cuda.current_device()
    if number >= count:
        raise UserError(f"{option} {device}: this host has {counted(count, 'visible GPU')}, numbered from 0.")
    if torch.version.hip is None and torch.cuda.get_device_capability(number) < (5, 0):
        gpu = torch.cuda.get_device_name(number)
        raise UserError(f"{gpu} is older than compute capability 5.0, the oldest supported.")
    return torch.device("cuda", number)


def resolve_devices(name: str, workers: int | str) -> tuple[list[torch.device], list[str]]:
    """The device of every process of a run, and notes. Raises UserError if one is absent, too old, or named twice.

    `auto` and `cuda` are all visible GPUs like the first, `cuda:0,2` those two, anything else one device.
    workers: how many processes share them in turn; `auto`: one for each.
    """
    kind, _, numbers = name.partition(":")
    if kind == "cuda" and "," in numbers:
        devices = [resolve_device(f"cuda:{number.strip()}") for number in numbers.split(",")]
        if len(set(devices)) < len(devices):
            raise UserError(f"--device {name} names a GPU twice.", "Name each once; --workers sets the processes.")
    else:
        devices = [resolve_device(name)]
        if devices[0].type == "cuda" and not numbers:
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    first = describe_device(devices[0])
    like = [device for device in devices if describe_device(device) == first]
    unlike = f"only the {len(like)} of {len(devices)} GPUs that are {first} are used: others round otherwise"
    count = len(like) if workers == "auto" else int(workers)
    return [like[i % len(like)] for i in range(count)], [unlike] if len(like) < len(devices) else []


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is fp16 on CUDA, fp32 elsewhere: fp16 is seven times closer to fp32 than bf16 on the real 8M weights."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return DTYPES[name]


def short_name(dtype: torch.dtype) -> str:
    """fp32, fp16, bf16 or fp8."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def store_dtype(name: str) -> torch.dtype:
    return torch.float16 if name == "fp16" else torch.float32


def describe_dtype(dtype: torch.dtype) -> str:
    """For reports; whoever reads that a result is in fp8 is told what that means."""
    return attention.describe(dtype) + (" (approximate)" if dtype == torch.float8_e4m3fn else "")


def describe_device(device: torch.device, processes: int = 1) -> str:
    """The kind of a device, as far as bits depend on it; processes: that share the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(threads_of(processes), 'thread')}" if device.type == "cpu" else device.type


def threads_of(processes: int) -> int:
    """CPU threads of each of so many processes."""
    return max(1, torch.get_num_threads() // processes)


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take on the device (on a CPU: of the host); infinite if nobody says."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
    return min(free, _left_by_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _left_by_cgroups(own: Path, root: Path) -> float:
    """Bytes that containers and batch systems leave to this process; infinite if they set no limit."""
    left = float("inf")
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        folder = root / controllers / path.lstrip("/")
        for each in (folder, *folder.parents):  # the limits of those around it count as well
            with suppress(OSError, ValueError):  # "max", or no such file
                free = int((each / f"memory.{limit}").read_text()) - int((each / f"memory.{used}").read_text())
                left = min(left, free)
    return left


def check_room(device: torch.device, needed: int, what: str) -> None:
    """Raise UserError if `needed` bytes surely do not fit the device's free memory."""
    free = free_memory(device)
    if needed > free:
        there = f"{free / 1e9:.1f} GB are free on {describe_device(device)}"
        remedy = "Choose a smaller --model, a 16-bit --dtype, or another device."
        raise UserError(f"{what} need {needed / 1e9:.1f} GB of memory, and {there}.", remedy)


@dataclass(frozen=True)
class Device:
    """A device that computes packs, on whatever host: what the plan, and the file's words about its values, depend on.

    kind: cuda, cpu or mps; name and attention as reports have them; free: bytes of memory.
    """

    node: str
    kind: str
    name: str
    attention: str
    notes: tuple[str, ...]
    free: float
    torch: str
    virnucpro: str


def device_here(device: torch.device, backend: attention.Backend) -> Device:
    """A device of this host."""
    return Device(
        platform.node(), device.type, describe_device(device), backend.name, tuple(backend.notes),
        free_memory(device), torch.__version__, virnucpro_cli.__version__,
    )  # fmt: skip


def computed_by(device: Device, dtype: torch.dtype, local_device: torch.device, processes: int = 1) -> str:
    """A line of JSON on which the bits of a row depend, besides its input. processes: that share a local device."""
    return json.dumps({
        "device": device.name if processes == 1 else describe_device(local_device, processes),
        "dtype": attention.describe(dtype), "attention": device.attention,
        "torch": device.torch, "virnucpro": device.virnucpro,
    })  # fmt: skip


def computed_at(device: torch.device, dtype: torch.dtype, backend: attention.Backend) -> str:
    """The same of a device of this host."""
    return computed_by(device_here(device, backend), dtype, device)


def auto_token_budget(kind: str, free: float, hidden: int, weight_bytes: int, stored: int = 0, sharing: int = 1) -> int:
    """A power of two of tokens that surely fits.

    It is 32768 on a large GPU, and up to 262144 for small models, so that a pack's products are as many as the 650M's,
    and take the device longer than launching takes the host: 0.1 ms a kernel on slow cores. On a CPU it is 2048: larger
    packs gain nothing there.
    stored: bytes that each token leaves to be copied out (per-residue rows), which three packs hold at a time;
    sharing: processes of this run on the device, of whose memory `free` bytes are free.
    """
    if kind == "cpu":
        return 2048
    budget = 32768
    if kind == "cuda":
        while not stored and budget < 262144 and budget * hidden**2 < 32768 * 1280**2:
            budget *= 2
        free = free // sharing - weight_bytes
        per_token = 64 * hidden + 512 + 3 * stored  # fp32 copies for rotary and pooling, fc1 and its GELU, the stream
        while budget > 1024 and budget * per_token > free // 2:
            budget //= 2
    return budget


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
GLIBC_THRESHOLD = 128 << 10


def _mallopt(mmap: int, trim: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, mmap)
        mallopt(TRIM_THRESHOLD, trim)


def keep_freed_memory() -> None:
    """Let glibc keep memory that a pack frees for the next one. Giving it back takes a tenth of the CPU time."""
    _mallopt(1 << 30, (1 << 31) - 1)


@contextmanager
def as_before() -> Iterator[None]:
    """Put back, for a caller's own process, what a run changes in it: precision of the BLAS, and glibc's thresholds."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    sixteen_bit = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    switches = [(owner, "fp32_precision") for owner in (matmul, cudnn.conv, cudnn.rnn)]
    switches += [(matmul, name) for name in sixteen_bit]
    before = [getattr(owner, name) for owner, name in switches]
    try:
        yield
    finally:
        for (owner, name), value in zip(switches, before, strict=True):
            setattr(owner, name, value)
        _mallopt(GLIBC_THRESHOLD, GLIBC_THRESHOLD)


def is_for_want_of_memory(error: Exception) -> bool:
    """PyTorch has a type for a GPU's memory, and only words for the host's, pinned or not."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(each in str(error) for each in words)


def is_of_the_device(error: RuntimeError) -> bool:
    """PyTorch gives errors of the CUDA runtime a type of their own, but not those of cuBLAS and Triton."""
    return isinstance(error, torch.AcceleratorError) or any(w in str(error) for w in ("CUDA error", "Triton Error"))
