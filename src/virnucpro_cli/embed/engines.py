"""Who computes the packs of a run: this process, worker processes of this host, or the actors of a Ray cluster."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from virnucpro_cli import report
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import counted
from virnucpro_cli.features import Run
from virnucpro_cli.model import attention
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.families import build, parameters
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.policies import Int64

if TYPE_CHECKING:
    from virnucpro_cli.cluster.ray.driver import Cluster
    from virnucpro_cli.waking import Begun


Here = tuple[devices.Device, Backend | None]
LEAST_OPERATIONS = 2e15
"""Floating-point operations of each process, at least, unless their number is asked for: about six seconds of an H100,
in which another process has only begun."""


@dataclass(frozen=True)
class Computing(ABC):
    """Where packs are computed, and by whom.

    here: gives what packs are computed on, and the backend of this process; it waits while kernels are tried.
    local_device: of this process, for all that it computes itself; gpus: devices that compute at the same time;
    workers: processes or actors in words, empty if this process is alone; processes: of this host, that place rows;
    sharing: those of them on a device; pins: whether this process collates batches into pinned memory.
    """

    here: Callable[[], Here]
    local_device: torch.device
    dtype: torch.dtype
    gpus: int
    workers: str
    processes: int = 1
    sharing: int = 1
    pins: bool = False
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> devices.Device:
        return self.here()[0]

    @property
    def backend(self) -> Backend | None:
        return self.here()[1]

    def check_room(self, spec: ModelSpec) -> None:
        """Raises UserError if the weights surely do not fit."""
        devices.check_room(self.local_device, parameters(spec) * self.dtype.itemsize, f"The weights of {spec.name}")

    def computed_by(self, several: bool, dtype: torch.dtype) -> str:
        """The environment of a row, in a line of JSON. several: whether there are packs for all processes."""
        return devices.computed_by(self.device, dtype, self.local_device, self.processes if several else 1)

    def worth(self, operations: float) -> "Computing":
        """This, or as much of it as a run of so many floating-point operations is worth."""
        return self

    @abstractmethod
    def compute(self, run: Run, packs: Int64, placer: Placer) -> None:
        """Have all packs, int64 [P], computed and placed."""


@dataclass(frozen=True)
class OnThisHost(Computing):
    """This process if it has one device, or one pack; else a process for each of `devices`.

    asked: whether their number was asked for; begun: processes that wait.
    """

    devices: list[torch.device] = field(kw_only=True)
    asked: bool = field(kw_only=True)
    begun: "list[Begun]" = field(kw_only=True)

    def worth(self, operations: float) -> "Computing":
        n = max(1, int(operations / LEAST_OPERATIONS))
        if self.asked or n >= self.processes:
            return self
        every, used = counted(self.processes, "GPU"), self.devices[:n]
        note = f"{n} of {every}: more would begin for longer than they compute; --workers {self.processes} takes all"
        return replace(self, gpus=n, workers=_in_words(used), processes=n, notes=(*self.notes, note), devices=used)

    def compute(self, run: Run, packs: Int64, placer: Placer) -> None:
        if len(packs) > 1 and self.processes > 1:
            self._in_processes(run, packs, placer)
            return
        compute = self._model(run)
        with run.clock.stage("forward", run.half):
            placer.started = time.perf_counter()
            runner.run_packs(packs, placer.collator, compute, placer, self.local_device, run.tell, placer.note_unfit)
        if limit := placer.limit(time.perf_counter() - placer.started):
            run.tell(limit)

    def _model(self, run: Run) -> runner.Compute:
        """The model of this process, as a function of a batch."""
        assert self.backend is not None
        with run.clock.stage("load model"):
            _, state, notes = run.take_weights()
            model = build(run.spec, state, run.dtype, self.local_device, self.backend)
        of_the_family = model.backend.notes if model.backend is not self.backend else ()
        for note in (*notes, *of_the_family):
            run.tell(note)
        return runner.compute_with(model, run.layers, run.config)

    def _in_processes(self, run: Run, packs: Int64, placer: Placer) -> None:
        from virnucpro_cli.engine import workers

        run.loaded = None
        rows = workers.compute_in_processes(placer, packs, self.devices, self.device.attention, run.tell, self.begun)
        run.summary.tables[f"Workers {run.half}".rstrip()] = rows


@dataclass(frozen=True)
class OnRay(Computing):
    """The actors of a Ray cluster; this process writes their rows."""

    cluster: "Cluster" = field(kw_only=True)

    def check_room(self, spec: ModelSpec) -> None:
        """Each actor checks its own device."""

    def compute(self, run: Run, packs: Int64, placer: Placer) -> None:
        run.loaded = None
        self.cluster.turn_to(run.config, run.dtype)
        rows = self.cluster.run(placer, packs, run.tell)
        run.summary.tables[f"Nodes {run.half}".rstrip()] = rows


@contextmanager
def chosen(
    config: EmbedConfig, alone: bool, out: Console, clock: report.Clock, begun: "list[Begun]"
) -> Iterator[Computing]:
    """The engine of a run. Raises UserError for one that is absent.

    alone: in this process, whatever is asked for; begun: processes that wait for a job, which are taken if they suit.
    """
    with ExitStack() as stack:
        if config.engine == "local":
            with clock.stage("devices"):
                here = _on_this_host(config, alone, stack, begun)
            yield here
            return
        with clock.stage("start workers"):
            from virnucpro_cli.cluster.ray.driver import Cluster

            cluster = stack.enter_context(Cluster(config))
            device = cluster.first_device(out.print)
            local_device, backend = cluster.of_the_driver()
            actors = cluster.room()
        workers = f"{counted(actors, 'actor')} of Ray at the start"
        yield OnRay(_known((device, backend)), local_device, cluster.dtype, actors, workers, cluster=cluster)


def _known(here: Here) -> Callable[[], Here]:
    return lambda: here


def _on_this_host(config: EmbedConfig, alone: bool, stack: ExitStack, begun: "list[Begun]") -> OnThisHost:
    """Raises UserError for devices and backends that cannot be had. stack: ends what is begun here."""
    each, notes = devices.resolve_devices(config.device, config.workers)
    each = each[:1] if alone else each
    first = each[0]
    dtype = devices.resolve_dtype(config.dtype, first)

    def here() -> Here:
        backend = attention.resolve(config.attention, first, dtype, config.residual)
        return devices.device_here(first, backend), backend

    if first.type == "cuda" and config.attention == "auto" and dtype != torch.float8_e4m3fn:
        # Kernels are tried while the input is read: whatever comes of it, some backend is left.
        tried: Callable[[], Here] = stack.enter_context(ThreadPoolExecutor(1, "trial")).submit(here).result
    else:
        tried = _known(here())
    return OnThisHost(
        tried, first, dtype, len(set(each)), _in_words(each), len(each), each.count(first), first.type == "cuda",
        tuple(notes), devices=each, asked=config.asks_for_processes, begun=begun,
    )  # fmt: skip


def _in_words(each: list[torch.device]) -> str:
    """The processes of several devices; empty for one."""
    names = ", ".join(dict.fromkeys(map(str, each)))
    return f"{counted(len(each), 'process', 'processes')} on {names}" if len(each) > 1 else ""
