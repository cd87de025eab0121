"""Several processes on one host. Packs are handed out from the plan; each worker places its rows in the file by itself.

The parent alone says what is done: it owns the statuses, stitches windows, and gives the packs of a worker that dies to the
others. A worker is a fresh Python that runs `main` here and inherits the descriptors that it needs.
"""

import mmap
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from socket import SHUT_WR, socket, socketpair
from threading import Lock, Thread
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli import report
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import runner
from virnucpro_cli.engine.collate import Item
from virnucpro_cli.engine.placer import HostEmbeddings, Packed, Placer, Window
from virnucpro_cli.errors import STOP_SIGNALS, UserError, in_a_line
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.plan.packing import Plan
from virnucpro_cli.plan.policies import Decisions
from virnucpro_cli.store import PENDING, Store

LARGEST_SHARE = 256
"""Packs handed out at once, at most: what is left is dealt so that all end together, a pack each at last."""
STOP_SECONDS = 10.0
BOUND = """
import ctypes, os, threading, time
try:
    ctypes.CDLL(None).prctl(1, 9)
except AttributeError:
    pass
def end_with_parent():
    while os.getppid() == {parent}:
        time.sleep(0.5)
    os.kill(os.getpid(), 9)
threading.Thread(target=end_with_parent, daemon=True).start()
"""
"""A worker must not outlive its parent, however that ends: another run may soon hold the file. First of all, for PyTorch takes
seconds to import; by the kernel where it can (PR_SET_PDEATHSIG, SIGKILL), by a look at the parent elsewhere."""


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; arrays are shared, not copied."""

    config: EmbedConfig
    weights: locate.Weights
    layers: tuple[int, ...]
    dtype: torch.dtype
    attention: str
    table: RecordTable
    work: Decisions
    plan: Plan
    todo: NDArray[np.bool_]
    output: Path
    partial: Path
    fd: int  # of the partial file, inherited: with it a worker holds the file's lock as well
    threads: int


class Lost(NamedTuple):
    """Why a worker is gone. fatal: the others would fare no better."""

    error: UserError
    fatal: bool


@dataclass
class _Worker:
    number: int
    device: torch.device
    process: "subprocess.Popen[bytes]"
    channel: Connection
    share: list[int] = field(default_factory=list)  # packs handed out since it last said that all are done
    tokens: int = 0
    last_done: float = 0.0
    used: dict[str, Any] = field(default_factory=dict)  # of the host and the device, as it said last
    ready: bool = False  # for packs: it has begun the last of those that it was sent, or has none
    ending: bool = False  # it was told that there are no more for now

    def __str__(self) -> str:
        return f"worker {self.number} on {self.device}"


def idle(last_done: float, began: float, seconds: float) -> float:
    """What share of the time since `began` somebody had nothing to do at the end; last_done: 0 for never."""
    if not last_done or not seconds:
        return 1.0
    return min(1.0, max(0.0, (began + seconds - last_done) / seconds))


def compute_in_processes(
    job: Job, packs: NDArray[np.int64], devices: Sequence[torch.device], placer: Placer, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Have all packs done by one process for each of `devices`; `note` is told of those that were lost.

    Returns a row for each worker: what it did, how long it had nothing to do at the end, and what it used. The clock's stage
    "forward" begins with the first worker that is ready. Raises UserError when no worker is left, or when one meets what
    would stop every other.
    """
    waiting = deque(packs.tolist())
    asked, began = time.perf_counter(), 0.0
    workers: list[_Worker] = []
    try:
        with _job_file(job) as (shared, sizes):
            for number, device in enumerate(devices, start=1):
                workers.append(_start(number, device, job, shared, sizes))
        by_channel = {worker.channel: worker for worker in workers}
        while by_channel:
            for channel in wait(list(by_channel)):
                assert isinstance(channel, Connection)
                worker = by_channel[channel]
                try:
                    message = channel.recv()
                except (EOFError, OSError):
                    message = ("lost", _death_of(worker))
                lost = _heed(message, worker, placer)
                placer.commit_now_and_then()
                if lost is not None:
                    if lost.fatal:
                        raise lost.error
                    del by_channel[channel]
                    # Last: if it was a pack's fault, the others come first.
                    waiting.extend(undone(worker.share, job.plan, placer))
                    if waiting and not by_channel:
                        raise UserError(f"No worker is left. The last, {worker}: {lost.error.what}", lost.error.remedy)
                    note(f"{worker} was lost, and its packs go to the others: {lost.error.what}")
                elif message[0] == "note":
                    note(f"{worker}: {message[1]}")
                elif message[0] == "begun":
                    worker.ready = True
                elif message[0] == "done":
                    worker.share, worker.ready, worker.ending = [], True, False
                    worker.last_done, worker.used = time.perf_counter(), message[1]
                    if not began:
                        began = placer.started = worker.last_done
                        placer.clock.seconds["start workers"] = began - asked
            for worker in by_channel.values():
                if worker.ready and not worker.ending and (waiting or worker.share):
                    _hand_out(worker, waiting, len(by_channel))
            if not waiting and not any(worker.share for worker in by_channel.values()):
                break
    finally:
        seconds = time.perf_counter() - began if began else 0.0
        placer.clock.seconds["forward"] = seconds
        _end(workers, placer)
    nothing = dict.fromkeys((key for worker in workers for key in worker.used), "")
    return [
        {
            "worker": str(worker), "tokens": worker.tokens, "idle at the end": idle(worker.last_done, began, seconds),
            **nothing, **worker.used, "lost": "" if worker in by_channel.values() else "lost",
        }
        for worker in workers
    ]  # fmt: skip


def _hand_out(worker: _Worker, waiting: "deque[int]", workers: int) -> None:
    """Send a worker its next packs while it still does others, so that it never waits; none means to finish those it has."""
    count = min(-(-len(waiting) // (3 * workers)), LARGEST_SHARE)
    packs = [waiting.popleft() for _ in range(count)]
    worker.share += packs
    worker.ready, worker.ending = False, not packs
    with suppress(OSError):  # it has died; its channel will say so
        worker.channel.send(packs)


def undone(share: list[int], plan: Plan, placer: Placer) -> list[int]:
    """Those packs of a share that hold what nobody has placed."""
    placer.file.commit()
    work = placer.work
    pending = np.zeros(len(work.representative), np.bool_)
    pending[work.representative[placer.file.status == PENDING]] = True
    wanted = pending[work.segments.record]
    return [pack for pack in share if wanted[plan.pack(pack)].any()]


def _heed(message: tuple[Any, ...], worker: _Worker, placer: Placer) -> Lost | None:
    kind, *rest = message
    if kind == "lost":
        return rest[0]
    if kind == "used":
        worker.tokens += rest[0]
        placer.advance(rest[0])
    elif kind == "window":
        placer.keep(*rest)
    elif kind == "unfit":
        placer.unfit += rest
    elif kind == "placed":
        marks, broken = rest
        for mark in marks:
            placer.file.mark(*mark)
        placer.broken += broken
    return None


def _death_of(worker: _Worker) -> Lost:
    """What became of a worker whose channel has closed without a word."""
    code = worker.process.wait()
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (the kernel does that when memory runs out)" if code == -signal.SIGKILL else ""
    remedy = "Run the same command again: what is done is kept. If memory ran out, choose fewer --workers."
    return Lost(UserError(f"{how}{hint}.", remedy), fatal=False)


def _end(workers: list[_Worker], placer: Placer) -> None:
    """Stop every worker, and take note of what they place until they are gone."""
    for worker in workers:
        with suppress(OSError), socket(fileno=os.dup(worker.channel.fileno())) as end:
            end.shutdown(SHUT_WR)
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        with suppress(Exception):  # a message that a signal cut in two, say: what it told is done again
            while worker.channel.poll(max(0.0, deadline - time.monotonic())):
                _heed(worker.channel.recv(), worker, placer)
        worker.channel.close()
        try:
            worker.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


# --- starting one ----------------------------------------------------------------------------------------------------


@contextmanager
def _job_file(job: Job) -> Iterator[tuple[IO[bytes], list[int]]]:
    """The job in a nameless file, for workers to map; see `_dump`. Raises UserError if there is no room for it."""
    try:
        shared = tempfile.TemporaryFile()  # noqa: SIM115
        sizes = _dump(job, shared)
    except OSError as error:
        raise UserError(
            f"What the workers are to know cannot be written to a temporary file: {error}.",
            "Make room there, set TMPDIR to another folder, or use --workers 1.",
        ) from None
    with shared:
        yield shared, sizes


def _dump(job: Job, shared: IO[bytes]) -> list[int]:
    """Write the job with its arrays behind one another, and return their sizes, that of the rest first."""
    buffers: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(job, protocol=5, buffer_callback=buffers.append))]
    parts += [buffer.raw() for buffer in buffers]
    for part in parts:
        shared.write(part)
        shared.write(bytes(-part.nbytes % 64))
    shared.flush()
    return [part.nbytes for part in parts]


def _load(fd: int, sizes: list[int]) -> Job:
    whole = np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), np.uint8)  # its offset is that of all workers
    at, parts = 0, []
    for size in sizes:
        parts.append(whole[at : at + size])
        at += size + -size % 64
    job = pickle.loads(parts[0].tobytes(), buffers=parts[1:])
    assert isinstance(job, Job)
    return job


def _start(number: int, device: torch.device, job: Job, shared: IO[bytes], sizes: list[int]) -> _Worker:
    ours, theirs = socketpair()
    copy = os.dup(shared.fileno())
    spools = {source.spool.fileno() for source in job.table.sources if source.spool is not None}
    inherited = [theirs.fileno(), copy, job.fd, *spools]
    command = f"{BOUND.format(parent=os.getpid())}from {__name__} import main; main({theirs.fileno()}, {copy})"
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", command], pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            process_group=0,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"Worker {number} cannot be started: {error.strerror}.", "Use fewer --workers.") from None
    os.close(copy)
    theirs.close()
    worker = _Worker(number, device, process, Connection(ours.detach()))
    with suppress(OSError):  # it has died; its channel will say so
        worker.channel.send((sizes, str(device)))
    return worker


# --- the worker ------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """The parent has ended the channel."""


class _Post:
    """The worker's end of its channel. Packs are received by a thread, so that its end is noticed at once."""

    def __init__(self, channel: Connection):
        self.channel = channel
        self.ended = False
        self._received: SimpleQueue[list[int] | None] = SimpleQueue()
        self._sending = Lock()
        Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._received.put(self.channel.recv())
        self.ended = True
        self._received.put(None)

    def send(self, *message: Any) -> None:
        with self._sending:  # the main thread and the one that writes
            self.channel.send(message)

    def packs(self, first: list[int]) -> Iterator[int]:
        """`first` and what is handed out while those are done, until the parent says that there are no more for now."""
        packs = first
        while packs:
            self.send("begun")
            yield from packs
            packs = self.next()

    def next(self) -> list[int]:
        packs = self._received.get()
        if packs is None:
            raise _Enough
        return packs


class _SharedStore(Store):
    """A store whose rows another process vouches for: commit means that they are written, and that it is told."""

    def __init__(self, job: Job, post: _Post):
        super().__init__(job.output, job.partial, job.fd)
        self._vouched = []  # the parent vouches, for what it reads in the file
        self.post = post
        self.broken: list[int] = []

    def commit(self) -> None:
        with self._lock:
            self._write_staged()
            self.post.send("placed", self._uncommitted, self.broken)
            self._uncommitted.clear()
            self.broken.clear()


class _WorkerPlacer(Placer):
    """Sends windows, which may be of a record that another worker has windows of, to the parent."""

    file: _SharedStore

    def __call__(self, batch: Packed, found: HostEmbeddings) -> None:
        super().__call__(batch, found)
        if self.file.post.ended:
            raise _Enough

    def note_unfit(self, item: Item) -> None:
        self.file.post.send("unfit", self.record_of(item))

    def keep(self, record: int, window: Window) -> None:
        self.file.post.send("window", record, window)

    def advance(self, tokens: int) -> None:
        self.file.post.send("used", tokens)


def main(channel_fd: int, job_fd: int) -> None:
    """Do the packs that come through the channel until it closes."""
    for signum in STOP_SIGNALS:  # whoever sends them to all means the parent, which ends the channel
        signal.signal(signum, signal.SIG_IGN)
    channel = Connection(channel_fd)
    with suppress(_Enough, EOFError, BrokenPipeError, ConnectionResetError):  # the parent has had enough, or is gone
        try:
            sizes, device = channel.recv()
            _work(_load(job_fd, sizes), torch.device(device), channel)
        except UserError as error:
            channel.send(("lost", Lost(error, fatal=not isinstance(error, runner.DeviceFailed))))
        except Exception as error:
            if not isinstance(error, _Enough | EOFError | BrokenPipeError | ConnectionResetError):
                channel.send(("lost", Lost(UserError(in_a_line(error), "Run the same command again."), fatal=False)))
            raise


def _work(job: Job, device: torch.device, channel: Connection) -> None:
    torch.set_num_threads(job.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or pinned memory makes a context on the first GPU in every worker
    exact_arithmetic()
    backend = attention_backends.resolve(job.attention, device, job.dtype)
    spec, state, _ = model_weights.load(job.weights)
    model = ESM2(spec, state, job.dtype, device, backend)
    del state
    post = _Post(channel)
    file = _SharedStore(job, post)
    placer = _WorkerPlacer(
        file, job.table, job.work, job.plan, job.config, job.todo, report.Clock(), pin=device.type == "cuda"
    )
    placer.broken = file.broken
    compute = runner.compute_with(model, job.layers, job.config)

    try:
        while True:
            post.send("done", used_here(device))
            packs = post.packs(post.next())
            runner.run_packs(
                packs, placer.collator, compute, placer, device, partial(post.send, "note"), placer.note_unfit
            )
            file.commit()
    except BaseException:
        file.commit()
        raise


def used_here(device: torch.device) -> dict[str, Any]:
    """What this process has used so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    used: dict[str, Any] = {
        "CPU seconds": own.ru_utime + own.ru_stime,
        "peak host memory": report.size(own.ru_maxrss * 1024),
    }
    if device.type == "cuda":
        used["peak GPU memory"] = report.size(torch.cuda.max_memory_allocated(device))
    return used
