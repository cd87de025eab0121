"""Devices of this host: which there are, their memory and dtypes, what their errors mean."""

import ctypes
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
    """`auto` (CUDA if there, else CPU), `cpu`, `cuda`, `cuda:N` or `mps`. Raises UserError if it is absent or too old."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{option} is {name!r}.", "Choose auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = (
                "this PyTorch is a CPU build"
                if torch.version.cuda is None and torch.version.hip is None
                else "none is visible"
            )
            raise UserError(
                f"{option} {name}: there is no usable CUDA GPU ({build}).",
                f"Use {option} cpu, or install a CUDA build of PyTorch.",
            )
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"{option} {name}: this host has {counted(torch.cuda.device_count(), 'visible GPU')}, numbered from 0."
            )
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (5, 0):
            raise UserError(
                f"{torch.cuda.get_device_name(device)} is older than compute capability 5.0, the oldest supported."
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"{option} mps: there is no Apple GPU here.", f"Use {option} cpu.")
    elif device.type != "cpu" or device.index is not None:
        raise UserError(f"{option} is {name!r}.", "Choose auto, cpu, cuda, cuda:N or mps.")
    return device


def resolve_devices(name: str, workers: int | str) -> tuple[list[torch.device], list[str]]:
    """The device of every process of a run, and notes: `auto` and `cuda` are all visible GPUs like the first, `cuda:0,2` those
    two, anything else one device. workers, unless `auto`, is how many processes share them in turn."""
    kind, _, numbers = name.partition(":")
    notes = []
    if kind == "cuda" and "," in numbers:
        devices = [resolve_device(f"cuda:{number.strip()}") for number in numbers.split(",")]
        if len(set(devices)) < len(devices):
            raise UserError(f"--device {name} names a GPU twice.", "Name each once; --workers sets the processes.")
    else:
        devices = [resolve_device(name)]
        if devices[0].type == "cuda" and not numbers:
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    like = [d for d in devices if describe_device(d) == describe_device(devices[0])]
    if len(like) < len(devices):
        notes.append(
            f"only the {len(like)} of {len(devices)} GPUs that are {describe_device(devices[0])} are used: others round otherwise"
        )
    count = len(like) if workers == "auto" else int(workers)
    return [like[i % len(like)] for i in range(count)], notes


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
    """Its kind, as far as bits depend on it; processes: that share the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {counted(threads_of(processes), 'thread')}"
    return device.type


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
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return left
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        base, limit, used = (
            (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (root, "memory.max", "memory.current")
        )
        folder = base / path.lstrip("/")
        for each in (folder, *folder.parents):  # the limits of those around it count as well
            if each == root.parent:
                break
            with suppress(OSError, ValueError):  # "max", or no such file
                left = min(left, int((each / limit).read_text()) - int((each / used).read_text()))
    return left


def check_room(device: torch.device, needed: int, what: str) -> None:
    """Raise UserError if `needed` bytes surely do not fit the device's free memory."""
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"{what} need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free on {describe_device(device)}.",
            "Choose a smaller --model, a 16-bit --dtype, or another device.",
        )


@dataclass(frozen=True)
class Device:
    """Where packs are computed, on whatever host: what the plan, and the file's words about its values, depend on.

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


def auto_token_budget(kind: str, free: float, hidden: int, weight_bytes: int, stored: int = 0, sharing: int = 1) -> int:
    """A power of two of tokens that surely fits: on a large GPU 32768, and for small models up to 131072, so that a pack
    takes the device longer than launching it takes the host; 2048 on a CPU, where larger packs gain nothing.

    stored: bytes that each token leaves to be copied out (per-residue rows), which three packs hold at a time;
    sharing: processes of this run on the device, of whose memory `free` bytes are free.
    """
    if kind == "cpu":
        return 2048
    budget = 32768
    if kind == "cuda":
        while not stored and budget < 131072 and budget * hidden < 32768 * 1280:
            budget *= 2
        free = free // sharing - weight_bytes
        # fp32 copies for rotary and pooling, fc1 and its GELU, the residual stream
        per_token = 64 * hidden + 512 + 3 * stored
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
    """Let glibc keep what a pack frees for the next pack, instead of giving it back page by page (a tenth of CPU time)."""
    _mallopt(1 << 30, (1 << 31) - 1)


@contextmanager
def as_before() -> Iterator[None]:
    """Put back, for a caller's own process, what a run changes in it: precision of the BLAS, and glibc's thresholds."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    names = [(matmul, "fp32_precision"), (cudnn.conv, "fp32_precision"), (cudnn.rnn, "fp32_precision"),
             (matmul, "allow_fp16_reduced_precision_reduction"), (matmul, "allow_bf16_reduced_precision_reduction")]  # fmt: skip
    before = [getattr(place, name) for place, name in names]
    try:
        yield
    finally:
        for (place, name), value in zip(names, before, strict=True):
            setattr(place, name, value)
        _mallopt(GLIBC_THRESHOLD, GLIBC_THRESHOLD)


def is_for_want_of_memory(error: Exception) -> bool:
    """PyTorch has a type for a GPU's memory, and only words for the host's, pinned or not."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(each in str(error) for each in words)


def _is_of_the_device(error: RuntimeError) -> bool:
    """PyTorch gives errors of the CUDA runtime a type of their own, but not those of cuBLAS and Triton."""
    return isinstance(error, torch.AcceleratorError) or any(w in str(error) for w in ("CUDA error", "Triton Error"))
