"""Runs packs through collation, forward and sink: serially, or overlapped on CUDA. The only place with streams and events."""

import ctypes
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

import virnucpro_cli
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine.collate import PackedBatch
from virnucpro_cli.errors import UserError, counted, in_a_line
from virnucpro_cli.kinds import unmasked
from virnucpro_cli.model import attention
from virnucpro_cli.model.esm2 import ESM2
from virnucpro_cli.model.pooling import Embeddings, Pooler
from virnucpro_cli.model.scores import Scorer, TokenHead

Item = Any


class Collate(Protocol):
    """Makes the batch of an item, which the runner itself never looks into."""

    def __call__(self, item: Item, /) -> PackedBatch: ...
    def parts(self, item: Item, tokens: int, /) -> list[Item]: ...


Compute = Callable[[PackedBatch], Embeddings]
Sink = Callable[[PackedBatch, Embeddings], None]


class DeviceFailed(UserError):
    """The device reported an error after which nothing that it computes can be relied on."""


class _TooLarge(Exception):
    """The device has too little memory for an item; of those after it, `asked` were taken and not begun."""

    def __init__(self, item: Item, asked: Sequence[Item], tokens: int, error: Exception):
        super().__init__(str(error))
        self.item, self.asked, self.tokens, self.told = item, asked, tokens, in_a_line(error)


COLLATE_AHEAD = 3
IN_FLIGHT = 2
WRITES_BEHIND = 4
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
        threads = threads_of(processes)
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
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
class Place:
    """Where packs are computed, on whatever host: what the plan, and the file's words about its values, depend on.

    kind: cuda, cpu or mps; device and attention as reports name them; free: bytes of memory.
    """

    node: str
    kind: str
    device: str
    attention: str
    notes: tuple[str, ...]
    free: float
    torch: str
    virnucpro: str


def place_of(device: torch.device, backend: attention.Backend) -> Place:
    """A device of this host."""
    return Place(
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


def compute_with(model: ESM2, layers: tuple[int, ...], config: EmbedConfig) -> Compute:
    """What a run computes of a batch: the kinds, layers and scores that it stores."""
    if names := unmasked(config.emit):
        last, head = model.spec.layers, TokenHead(model.head_state, model.device)
        scorer = Scorer(config.pool, store_dtype(config.store_dtype), layers, last, head, names)
        return partial(model.embed, wanted=tuple({*layers, last}), pooler=scorer)
    return partial(model.embed, wanted=layers, pooler=Pooler(config.pool, store_dtype(config.store_dtype)))


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


def serial(items: Iterator[Item], collate: Collate, compute: Compute, sink: Sink, device: torch.device) -> None:
    """One pack after the other on the calling thread. The reference for `overlapped`, and the path of the CPU."""
    if device.type == "cpu":
        keep_freed_memory()
    for item in items:
        batch = collate(item)
        try:
            found = _to_host(compute(batch.to(device)), non_blocking=False)
        except (RuntimeError, MemoryError) as error:
            if not is_for_want_of_memory(error):
                raise
            raise _TooLarge(item, (), batch.used, error) from None
        sink(batch, found)


def overlapped(items: Iterator[Item], collate: Collate, compute: Compute, sink: Sink, device: torch.device) -> None:
    """CUDA: collation on a thread, copies in and out on streams of their own, the sink on another thread.

    The calling thread only launches; it waits for nothing but the pack that it retires. Packs reach the sink in order. Items
    are asked for a few packs ahead.
    """
    copy_in, copy_out = torch.cuda.Stream(device), torch.cuda.Stream(device)
    main = torch.cuda.current_stream(device)
    asked: deque[tuple[Item, Future[PackedBatch]]] = deque()
    in_flight: deque[tuple[PackedBatch, Embeddings, torch.cuda.Event, Any]] = deque()
    written: deque[Future[None]] = deque()
    too_large: _TooLarge | None = None

    def retire() -> None:
        batch, host, copied, _ = in_flight.popleft()
        copied.synchronize()
        written.append(writer.submit(sink, batch, host))
        while len(written) > WRITES_BEHIND:
            written.popleft().result()

    with (
        _prompt_threads(),
        ThreadPoolExecutor(1, "collate") as reader,
        ThreadPoolExecutor(1, "write") as writer,
        torch.cuda.device(device),
    ):
        while True:
            while len(asked) < COLLATE_AHEAD and (item := next(items, None)) is not None:
                asked.append((item, reader.submit(collate, item)))
            if not asked:
                break
            item, collated = asked.popleft()
            batch = collated.result()
            try:
                with torch.cuda.stream(copy_in):
                    moved = batch.to(device)
                main.wait_stream(copy_in)
                found = compute(moved)
                copy_out.wait_stream(main)
                with torch.cuda.stream(copy_out):
                    host = _to_host(found, non_blocking=True)
                    copied = torch.cuda.Event()
                    copied.record(copy_out)
            except (RuntimeError, MemoryError) as error:
                if not is_for_want_of_memory(error):
                    raise
                too_large = _TooLarge(item, [item for item, _ in asked], batch.used, error)
                break
            in_flight.append((batch, host, copied, (moved, found)))  # the device tensors live until they are copied
            if len(in_flight) > IN_FLIGHT:
                retire()
        while in_flight:
            retire()
        while written:
            written.popleft().result()
    if too_large is not None:
        raise too_large


@contextmanager
def _prompt_threads() -> Iterator[None]:
    """Hand Python over between threads after 0.5 ms instead of 5: a thread that reads or writes lets go of it many times a pack,
    and each time would wait that long for the one that launches."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _to_host(found: Embeddings, non_blocking: bool) -> Embeddings:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        if not non_blocking:
            return tensor.cpu()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    assert found.finite is not None
    return Embeddings(
        {key: move(rows) for key, rows in found.pooled.items()},
        {layer: move(rows) for layer, rows in found.residue.items()},
        move(found.finite),
    )


def run(
    packs: Iterable[Item], collate: Collate, compute: Compute, sink: Sink, device: torch.device,
    note: Callable[[str], None] = lambda text: None, unfit: Callable[[Item], None] | None = None,
) -> None:  # fmt: skip
    """The runner that suits the device. A pack that the device has no memory for is halved, as are all of its size that follow,
    and `note` is told; a single segment goes to `unfit`, or is an error without one. Packs already sunk are safe.

    Raises DeviceFailed when the device is of no use any more.
    """
    chosen = overlapped if device.type == "cuda" else serial
    items = iter(packs)
    while True:
        try:
            return chosen(items, collate, compute, sink, device)
        except _TooLarge as problem:
            largest = problem.tokens // 2
            parts = collate.parts(problem.item, largest)
            if len(parts) == 1:
                what = f"out of memory on {describe_device(device)} with a single piece of {problem.tokens:,} tokens"
                if unfit is None:
                    remedy = "Run the same command on a device with more memory; what is done is kept."
                    raise UserError(f"{what}: {problem.told}", remedy) from None
                note(f"{what}; it is left for later ({problem.told})")
                unfit(problem.item)
                items = chain(problem.asked, items)
            else:
                note(
                    f"out of memory with {problem.tokens:,} tokens; packs of at most {largest:,} from here on ({problem.told})"
                )
                items = chain(parts, _in_parts(chain(problem.asked, items), collate, largest))
        except RuntimeError as error:
            if not _is_of_the_device(error):
                raise
            raise DeviceFailed(
                f"{describe_device(device)} ({device}) failed: {in_a_line(error)}",
                "What was computed before is kept: run the same command again. If it fails again, look at nvidia-smi and dmesg.",
            ) from None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def is_for_want_of_memory(error: Exception) -> bool:
    """PyTorch has a type for a GPU's memory, and only words for the host's, pinned or not."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(each in str(error) for each in words)


def _is_of_the_device(error: RuntimeError) -> bool:
    """PyTorch gives errors of the CUDA runtime a type of their own, but not those of cuBLAS and Triton."""
    return isinstance(error, torch.AcceleratorError) or any(w in str(error) for w in ("CUDA error", "Triton Error"))


def _in_parts(items: Iterator[Item], collate: Collate, tokens: int) -> Iterator[Item]:
    for item in items:
        yield from collate.parts(item, tokens)
