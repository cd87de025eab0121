"""Several processes on one host. Packs are dealt from the plan; each worker places its rows in the file by itself.

The parent alone says what is done: it owns the statuses, stitches windows, and gives the packs of a worker that dies to
the others. A worker is a fresh Python that runs `main` here, and is sent the descriptors that it needs with its job: so
it can begin, and read its libraries, before there is a job.
"""

import mmap
import os
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from socket import MSG_CTRUNC, SHUT_WR, recv_fds, send_fds, socket
from threading import Lock, Thread
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from virnucpro_cli import report
from virnucpro_cli.engine import placer, runner
from virnucpro_cli.engine.dealing import Dealer, Lost, Message, Worker, lost_by, used_here
from virnucpro_cli.engine.devices import threads_of
from virnucpro_cli.engine.placer import Job, Placer, Pooled, Residue, Rows
from virnucpro_cli.errors import MORE_FILES, UserError
from virnucpro_cli.fasta import reading
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.families import build
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.plan.policies import Int64
from virnucpro_cli.store import Store
from virnucpro_cli.waking import Begun, begin

LARGEST_SHARE = 256
"""Packs dealt at once, at most."""
STOP_SECONDS = 10.0
MOST_DESCRIPTORS = 64
"""Descriptors that a worker is sent, at most: of the job, of the file, and of plain texts of compressed inputs."""


class Start(NamedTuple):
    """The first message to a worker. sizes: of the job's parts in its file; store: what a Store is made of,
    but for its descriptor.

    Descriptors come before it: of the job's file, of the store, with which a worker has the file's lock as well, and of
    plain texts of compressed inputs, whose numbers in the parent are `spools`.
    """

    spools: list[int]
    sizes: list[int]
    device: str
    attention: str
    threads: int
    store: tuple[Path, Path, bool, str]


@dataclass(eq=False)
class _Process(Worker):
    device: str
    process: "subprocess.Popen[bytes]"
    channel: Connection
    untold: str = field(default="", init=False)  # why it was not given its job

    def __str__(self) -> str:
        return f"worker {self.number} on {self.device}"

    def death(self) -> Lost:
        """The end of a worker whose channel has closed without a word."""
        code = self.process.wait()
        if self.untold:
            return Lost(UserError(f"it could not be given its job: {self.untold}.", MORE_FILES), fatal=False)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (the kernel does that when memory runs out)" if code == -signal.SIGKILL else ""
        remedy = "Run the same command again: what is done is kept. If memory ran out, choose fewer --workers."
        return Lost(UserError(f"{how}{hint}.", remedy), fatal=False)


def compute_in_processes(
    placer: Placer, packs: Int64, devices: Sequence[torch.device], attention: str, note: Callable[[str], None],
    begun: list[Begun],
) -> list[dict[str, Any]]:  # fmt: skip
    """Have all packs, int64 [P], done by one process for each of `devices`; `note` is told of those that were lost.

    attention: the backend's name. begun: processes that wait, of which those that are needed are taken. Returns a row
    for each worker: what it did, how long it had nothing to do at the end, and what it used. Raises UserError when no
    worker is left, or when one meets what would stop every other.
    """
    dealer = _Processes(placer, packs, note)
    file, threads = placer.file, threads_of(len(devices))
    store = file.output, file.path, file.locked, file.half
    workers = dealer.workers
    try:
        with placer.clock.stage("start workers"):
            shared, sizes = _job_file(placer.job)
        with shared, placer.clock.stage("start workers"):
            for number, device in enumerate(devices[: len(packs)], start=1):
                workers.append(_begun(number, device, begun))
            spools = list({each.spool.fileno() for each in placer.job.table.sources if each.spool is not None})
            for worker in workers:
                start = Start(spools, sizes, worker.device, attention, threads, store)
                _tell(worker, [shared.fileno(), file.fd, *spools], start)
        dealer.living = list(workers)
        dealer.run()
    finally:
        with placer.clock.stage("end workers"):
            dealer.stop()
    nothing = dict.fromkeys((key for worker in workers for key in worker.used), "")
    return [
        {
            "worker": str(worker), "tokens": worker.tokens, "idle at the end": dealer.idle(worker),
            **nothing, **worker.used, "lost": "" if worker in dealer.living else "lost",
        }
        for worker in workers
    ]  # fmt: skip


class _Processes(Dealer):
    """The parent. Workers place their rows by themselves; it marks them, and stitches windows."""

    largest_share = LARGEST_SHARE

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.workers: list[_Process] = []

    def wait(self) -> Iterator[tuple[_Process, Iterable[Message]]]:
        by_channel: dict[Any, _Process] = {worker.channel: worker for worker in self.living}
        for channel in wait(list(by_channel)):
            worker = by_channel[channel]
            try:
                message = worker.channel.recv()
            except (EOFError, OSError):
                message = "lost", worker.death()
            yield worker, [message]

    def send(self, worker: _Process, packs: list[int]) -> None:
        with suppress(OSError):  # it has died; its channel will say so
            worker.channel.send(packs)

    def hopeless(self) -> str | None:
        return "No worker is left." if self.waiting and not self.living else None

    def heed(self, worker: Worker, message: Message) -> None:
        match message:
            case "used", tokens:
                worker.tokens += tokens
                self.placer.advance(tokens)
            case "window", segment, pooled, residue:
                self.placer.keep(segment, pooled, residue)
            case "placed", marks, broken, unfit:
                for mark in marks:
                    self.placer.file.mark(*mark)
                self.placer.broken += broken
                self.placer.unfit += unfit
            case _:
                super().heed(worker, message)

    def stop(self) -> None:
        """Stop every worker, and take note of what they place until they are gone. One that has not begun just ends."""
        for worker in self.workers:
            if not worker.used:
                worker.process.kill()
            with suppress(OSError), socket(fileno=os.dup(worker.channel.fileno())) as end:
                end.shutdown(SHUT_WR)
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self.workers:
            with suppress(Exception):  # a message that a signal cut in two, say: what it told is done again
                while worker.channel.poll(max(0.0, deadline - time.monotonic())):
                    if (message := worker.channel.recv())[0] != "lost":
                        self.heed(worker, message)
            worker.channel.close()
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


# --- starting one ----------------------------------------------------------------------------------------------------


def _job_file(job: Job) -> tuple[IO[bytes], list[int]]:
    """The job in a nameless file, for workers to map; see `_dump`. Raises UserError if there is no room for it."""
    try:
        shared = tempfile.TemporaryFile()  # noqa: SIM115
        return shared, _dump(job, shared)
    except OSError as error:
        raise UserError(
            f"What the workers are to know cannot be written to a temporary file: {error}.",
            "Make room there, set TMPDIR to another folder, or use --workers 1.",
        ) from None


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
    """The job, whose arrays are not copied: all workers have the same memory."""
    whole = np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), np.uint8)  # its offset is that of all workers
    at, parts = 0, []
    for size in sizes:
        parts.append(whole[at : at + size])
        at += size + -size % 64
    job = pickle.loads(parts[0].tobytes(), buffers=parts[1:])
    assert isinstance(job, Job)
    return job


def _begun(number: int, device: torch.device, begun: list[Begun]) -> _Process:
    """A process for the device, of those that wait if there is one. Raises UserError if the system has none to give."""
    waiting = next((each for each in begun if each.device == str(device)), None)
    try:
        own = waiting or begin(str(device))
    except OSError as error:
        raise UserError(f"Worker {number} cannot be started: {error.strerror}.", "Use fewer --workers.") from None
    if waiting is not None:
        begun.remove(waiting)
    return _Process(number, own.device, own.process, Connection(own.channel.detach()))


def _tell(worker: _Process, descriptors: list[int], start: Start) -> None:
    """Give a process its job, after the descriptors of it. One that cannot have it ends; its channel will say so."""
    try:
        with socket(fileno=os.dup(worker.channel.fileno())) as channel:
            send_fds(channel, [b"."], descriptors)
            worker.channel.send(start)
    except (BrokenPipeError, ConnectionResetError):  # it has died
        pass
    except OSError as error:  # it would wait for ever
        worker.untold = str(error.strerror)
        worker.process.kill()


# --- the worker ------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """The parent has ended the channel."""


PARENT_ENDED = (_Enough, EOFError, BrokenPipeError, ConnectionResetError)


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

    def packs(self) -> Iterator[int]:
        """Packs that are dealt while others are done, until the parent says that there are no more for now."""
        while packs := self._next():
            self.send("begun")
            yield from packs

    def _next(self) -> list[int]:
        packs = self._received.get()
        if packs is None:
            raise _Enough
        return packs


class _SharedStore(Store):
    """A store whose rows another process vouches for: commit means that they are written, and that it is told."""

    def __init__(self, post: _Post, *of: Any):
        super().__init__(*of)
        self.post = post
        self.broken: list[int] = []
        self.unfit: list[int] = []

    def commit(self) -> None:
        with self._lock:
            self._write_staged()
            self.post.send("placed", self._uncommitted, self.broken, self.unfit)
            for items in (self._uncommitted, self.broken, self.unfit):
                items.clear()


class _WorkerPlacer(Placer):
    """Sends windows, which may be of a record that another worker has windows of, to the parent."""

    file: _SharedStore

    def place(self, rows: Rows) -> None:
        """Place rows, float32 [n, D] and residues, unless the parent has ended the channel."""
        super().place(rows)
        if self.file.post.ended:
            raise _Enough

    def commit_now_and_then(self) -> None:
        """Commit every few seconds, at once: nothing waits for a disk here."""
        if time.perf_counter() - self.last_commit > placer.COMMIT_SECONDS:
            self.file.commit()
            self.last_commit = time.perf_counter()

    def keep(self, segment: int, pooled: Pooled, residue: Residue) -> None:
        """Send a window: pooled float32 [D], residue float32 [length, D]."""
        self.file.post.send("window", segment, pooled, residue)

    def advance(self, tokens: int) -> None:
        self.file.post.send("used", tokens)


def main(channel_fd: int) -> None:
    """Do the packs that come through the channel until it closes."""
    channel = Connection(channel_fd)
    with suppress(*PARENT_ENDED):
        try:
            job, file, *spools = _descriptors(channel_fd)
            start = channel.recv()
            reading.INHERITED.update(zip(start.spools, spools, strict=True))
            _work(_load(job, start.sizes), file, start, channel)
        except PARENT_ENDED:
            raise
        except Exception as error:
            channel.send(("lost", lost_by(error)))
            if not isinstance(error, UserError):
                raise


def _descriptors(channel_fd: int) -> list[int]:
    """Descriptors that the parent sends before its first message, under their numbers here."""
    with socket(fileno=os.dup(channel_fd)) as channel:
        word, descriptors, flags, _ = recv_fds(channel, 1, MOST_DESCRIPTORS)
    if not word:
        raise _Enough
    if flags & MSG_CTRUNC:
        raise UserError("It cannot have as many files open as its job needs.", MORE_FILES)
    return descriptors


def _work(job: Job, fd: int, start: Start, channel: Connection) -> None:
    device = torch.device(start.device)
    torch.set_num_threads(start.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or pinned memory makes a context on the first GPU in every worker
    exact_arithmetic()
    backend = attention_backends.resolve(start.attention, device, job.dtype, job.config.residual)
    spec, state, _ = model_weights.load(job.weights)
    model = build(spec, state, job.dtype, device, backend)
    del state
    post = _Post(channel)
    output, path, *more = start.store
    file = _SharedStore(post, output, path, fd, *more)
    placer = _WorkerPlacer(file, job, report.Clock(), pin=device.type == "cuda")
    placer.broken, placer.unfit = file.broken, file.unfit
    compute = runner.compute_with(model, job.layers, job.config)
    note = partial(post.send, "note")
    try:
        with placer:
            while True:
                post.send("done", used_here(device))
                runner.run_packs(post.packs(), placer.collator, compute, placer, device, note, placer.note_unfit)
                file.commit()
    except BaseException:
        file.commit()
        raise
