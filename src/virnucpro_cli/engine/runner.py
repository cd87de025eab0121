"""Runs packs through collation, forward and sink: serially, or overlapped on CUDA with streams and events."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from typing import Any, Protocol

import torch

from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.kinds import unmasked
from virnucpro_cli.model.families import reading
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.pooling import Pooler

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
        self.item, self.asked, self.tokens, self.message = item, asked, tokens, in_a_line(error)


COLLATE_AHEAD = 3
IN_FLIGHT = 2
WRITES_BEHIND = 4


def compute_with(model: PackedModel, layers: tuple[int, ...], config: EmbedConfig) -> Compute:
    """The function that a run applies to a batch: the kinds, layers and scores that it stores."""
    dtype = devices.store_dtype(config.store_dtype)
    if names := unmasked(config.emit):
        from virnucpro_cli.model.scores import Scorer, TokenHead

        how, last = reading(model.spec, config.kind), model.spec.layers
        head = TokenHead(model.head_state, model.device, how.width)
        scorer = Scorer(config.pool, dtype, layers, last, head, names, how)
        return partial(model.embed, wanted=tuple({*layers, last}), pooler=scorer)
    return partial(model.embed, wanted=layers, pooler=Pooler(config.pool, dtype))


def serial(items: Iterator[Item], collate: Collate, compute: Compute, sink: Sink, device: torch.device) -> None:
    """One pack after the other on the calling thread. The reference for `overlapped`, and the path of the CPU."""
    for item in items:
        batch = collate(item)
        try:
            embeddings = _to_host(compute(batch.to(device)), non_blocking=False)
        except (RuntimeError, MemoryError) as error:
            if not devices.is_for_want_of_memory(error):
                raise
            raise _TooLarge(item, (), batch.used, error) from None
        sink(batch, embeddings)


def overlapped(items: Iterator[Item], collate: Collate, compute: Compute, sink: Sink, device: torch.device) -> None:
    """CUDA: collation on a thread, copies in and out on streams of their own, the sink on another thread.

    The calling thread only launches; it waits for nothing but the pack that it retires. Packs reach the sink in order.
    Items are asked for a few packs ahead.
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
                embeddings = compute(moved)
                copy_out.wait_stream(main)
                with torch.cuda.stream(copy_out):
                    host = _to_host(embeddings, non_blocking=True)
                    copied = torch.cuda.Event()
                    copied.record(copy_out)
            except (RuntimeError, MemoryError) as error:
                if not devices.is_for_want_of_memory(error):
                    raise
                too_large = _TooLarge(item, [item for item, _ in asked], batch.used, error)
                break
            in_flight.append((batch, host, copied, (moved, embeddings)))  # device tensors live until they are copied
            if len(in_flight) > IN_FLIGHT:
                retire()
        while in_flight:
            retire()
        while written:
            written.popleft().result()
    if too_large is not None:
        raise too_large


def copied(*found: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Begin to copy tensors [...] of any dtype from one device to the host; what is returned waits, and gives them."""
    device = found[0].device
    if device.type != "cuda":
        return lambda: [each.cpu() for each in found]
    host = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True) for each in found]
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))

    def wait() -> list[torch.Tensor]:
        done.synchronize()
        return host

    return wait


@contextmanager
def _prompt_threads() -> Iterator[None]:
    """Hand Python over between threads after 0.5 ms instead of 5.

    A thread that reads or writes lets go of it many times a pack, and would wait each time for the one that launches.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _to_host(embeddings: Embeddings, non_blocking: bool) -> Embeddings:
    def _moved(tensor: torch.Tensor) -> torch.Tensor:
        if not non_blocking:
            return tensor.cpu()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    assert embeddings.finite is not None
    pooled = {key: _moved(rows) for key, rows in embeddings.pooled.items()}
    residue = {layer: _moved(rows) for layer, rows in embeddings.residue.items()}
    return Embeddings(pooled, residue, _moved(embeddings.finite))


def run_packs(
    packs: Iterable[Item], collate: Collate, compute: Compute, sink: Sink, device: torch.device,
    note: Callable[[str], None] = lambda text: None, unfit: Callable[[Item], None] | None = None,
) -> None:  # fmt: skip
    """The runner that suits the device. Packs already sunk are safe, whatever happens.

    A pack that the device has no memory for is halved, as are all of its size that follow, and `note` is told.
    A single segment goes to `unfit`; without one it is a UserError.
    Raises DeviceFailed when the device is of no use any more.
    """
    devices.keep_freed_memory()
    run = overlapped if device.type == "cuda" else serial
    items, name = iter(packs), devices.describe_device(device)
    while True:
        try:
            return run(items, collate, compute, sink, device)
        except _TooLarge as problem:
            largest = problem.tokens // 2
            parts = collate.parts(problem.item, largest)
            items = chain(problem.asked, items)
            alone = f"out of memory on {name} with a single piece of {problem.tokens:,} tokens"
            if len(parts) > 1:
                smaller = f"packs of at most {largest:,} from here on ({problem.message})"
                note(f"out of memory with {problem.tokens:,} tokens; {smaller}")
                items = chain(parts, chain.from_iterable(map(collate.parts, items, repeat(largest))))
            elif unfit is not None:
                note(f"{alone}; it is left for later ({problem.message})")
                unfit(problem.item)
            else:
                remedy = "Run the same command on a device with more memory; what is done is kept."
                raise UserError(f"{alone}: {problem.message}", remedy) from None
        except RuntimeError as error:
            if not devices.is_of_the_device(error):
                raise
            raise DeviceFailed(
                f"{name} ({device}) failed: {in_a_line(error)}",
                "What was computed before is kept: run the same command again. "
                "If it fails again, look at nvidia-smi and dmesg.",
            ) from None
        if device.type == "cuda":
            torch.cuda.empty_cache()
