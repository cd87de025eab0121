"""Packs dealt to workers that may die: who has which, and what becomes of those that a dead one had."""

import resource
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from virnucpro_cli import report
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.engine.runner import DeviceFailed
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.plan.policies import Int64
from virnucpro_cli.store import PENDING

Message = tuple[Any, ...]
"""A word, and what belongs to it; see `Dealer.heed`."""


class Lost(NamedTuple):
    """Why a worker is gone. fatal: the others would fare no better."""

    error: UserError
    fatal: bool


def lost_by(error: BaseException) -> Lost:
    """The words for a worker that an error ended."""
    if isinstance(error, UserError):
        return Lost(error, fatal=not isinstance(error, DeviceFailed))
    return Lost(UserError(in_a_line(error), "Run the same command again."), fatal=False)


@dataclass(eq=False)
class Worker:
    """A worker as the dealer knows it."""

    number: int
    packs: list[int] = field(default_factory=list, init=False)  # dealt to it, and not known to be done
    tokens: int = field(default=0, init=False)
    last_done: float = field(default=0.0, init=False)
    used: dict[str, Any] = field(default_factory=dict, init=False)  # of the host and the device, as it said last
    ready: bool = field(default=False, init=False)  # for packs: it has begun those that it was sent last, or has none
    leaving: bool = field(default=False, init=False)  # it is dealt no more packs


class Dealer(ABC):
    """Deals packs, int64 [P], to workers until all are done. `note` is told of workers that are lost."""

    largest_share: int

    def __init__(self, placer: Placer, packs: Int64, note: Callable[[str], None]):
        self.placer, self.note = placer, note
        self.waiting = deque(packs.tolist())
        self.living: list[Any] = []
        self.began = self.seconds = 0.0

    @abstractmethod
    def wait(self) -> Iterator[tuple[Any, Iterable[Message]]]:
        """Workers that say something, with their messages."""

    @abstractmethod
    def send(self, worker: Any, packs: list[int]) -> None:
        """Send a worker its next packs; none means to finish those that it has."""

    @abstractmethod
    def hopeless(self) -> str | None:
        """Why the run cannot go on after a worker was lost."""

    def run(self) -> None:
        """Have all packs done. Raises UserError when that is hopeless, or a worker meets what would stop others."""
        try:
            with self.placer.clock.stage("start workers"):
                while self.waiting or any(worker.packs for worker in self.living):
                    for worker, messages in self.wait():
                        for message in messages:
                            self.heed(worker, message)
                        self.placer.commit_now_and_then()
                    self.deal()
        finally:
            self.seconds = time.perf_counter() - self.began if self.began else 0.0

    def deal(self) -> None:
        """Send packs to workers that are ready while others are still done, so that nobody waits.

        What is left is dealt so that all workers end together, a pack each at last.
        """
        for worker in self.living:
            more = len(self.waiting) if not worker.leaving else 0
            if worker.ready and (more or worker.packs):
                count = min(-(-more // (3 * len(self.living))), self.largest_share)
                packs = [self.waiting.popleft() for _ in range(count)]
                worker.packs += packs
                worker.ready = False
                self.send(worker, packs)

    def heed(self, worker: Worker, message: Message) -> None:
        """Take in what a worker says."""
        placer = self.placer
        match message:
            case ("begun",):
                worker.ready = True
            case "done", used:
                if not self.began:
                    self.began = placer.started = time.perf_counter()
                    placer.clock.turn(report.stage_name("forward", placer.file.half))
                worker.packs, worker.ready, worker.used, worker.last_done = [], True, used, time.perf_counter()
            case "note", text:
                self.note(f"{worker}: {text}")
            case "lost", lost:
                self.lose(worker, lost)

    def lose(self, worker: Worker, lost: Lost) -> None:
        """Let others do what is not placed of a worker's packs. Raises an error if they would fare no better."""
        self.living.remove(worker)
        if lost.fatal:
            raise lost.error
        placer, decisions, plan = self.placer, self.placer.job.decisions, self.placer.job.plan
        placer.file.commit()
        pending = np.zeros(len(decisions.representative), np.bool_)
        pending[decisions.representative[placer.file.status == PENDING]] = True
        wanted = pending[decisions.segments.record]
        # Last: if it was a pack's fault, the others come first.
        self.waiting.extend(pack for pack in worker.packs if wanted[plan.pack(pack)].any())
        if why := self.hopeless():
            raise UserError(f"{why} The last, {worker}: {lost.error.what}", lost.error.remedy)
        self.note(f"{worker} was lost, and its packs go to the others: {lost.error.what}")

    def idle(self, worker: Worker) -> float:
        """Share of the time in which a worker had nothing to do at the end."""
        if not worker.last_done or not self.seconds:
            return 1.0
        return min(1.0, max(0.0, (self.began + self.seconds - worker.last_done) / self.seconds))


def used_here(device: torch.device) -> dict[str, Any]:
    """Seconds and memory that this process has used so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    used = {"CPU seconds": own.ru_utime + own.ru_stime, "peak host memory": report.size(own.ru_maxrss * 1024)}
    of_gpu = {"peak GPU memory": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return used | {name: report.size(count) for name, count in of_gpu.items()}
