"""Who computes the packs of a run: this process, worker processes of this host, or the actors of a Ray cluster."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from virnucpro_cli import report
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import counted
from virnucpro_cli.features.feature import Run
from virnucpro_cli.model import attention
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.esm2 import ESM2
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.policies import Int64

if TYPE_CHECKING:
    from virnucpro_cli.cluster.ray import Cluster


@dataclass(frozen=True)
class Computing(ABC):
    """Where packs are computed, and by whom.

    device: what packs are computed on; devices: of each process, or of each actor that there is room for; local_device and
    backend: of this process, for all that it computes itself.
    """

    device: devices.Device
    devices: list[torch.device]
    local_device: torch.device
    backend: Backend | None
    dtype: torch.dtype
    notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def gpus(self) -> int:
        """Devices that compute at the same time."""

    @property
    @abstractmethod
    def sharing(self) -> int:
        """Processes that share a device's memory."""

    @property
    @abstractmethod
    def pins(self) -> bool:
        """Whether batches are collated into pinned memory of this process."""

    @abstractmethod
    def described(self) -> str:
        """Processes or actors, for reports."""

    @abstractmethod
    def check_room(self, spec: ModelSpec) -> None:
        """Raises UserError if the weights surely do not fit."""

    @abstractmethod
    def computed_by(self, several: bool) -> str:
        """What the bits of a row depend on besides its input, in a line of JSON. several: whether there is work for all processes."""

    @abstractmethod
    def compute(self, run: Run, packs: Int64, placer: Placer) -> None:
        """Have all packs computed and placed."""


class OnThisHost(Computing):
    """In this process if it has one device, or one pack; else in a process for each device."""

    @property
    def gpus(self) -> int:
        return len(set(self.devices))

    @property
    def sharing(self) -> int:
        return self.devices.count(self.local_device)

    @property
    def pins(self) -> bool:
        return self.local_device.type == "cuda"

    def described(self) -> str:
        on = ", ".join(map(str, dict.fromkeys(self.devices)))
        return f"{counted(len(self.devices), 'process', 'processes')} on {on}"

    def check_room(self, spec: ModelSpec) -> None:
        devices.check_room(self.local_device, spec.parameters * self.dtype.itemsize, f"The weights of {spec.name}")

    def computed_by(self, several: bool) -> str:
        return computed_by(self.device, self.dtype, self.local_device, len(self.devices) if several else 1)

    def compute(self, run: Run, packs: Int64, placer: Placer) -> None:
        if len(packs) > 1 and len(self.devices) > 1:
            self._in_processes(run, packs, placer)
        else:
            self._here(run, packs, placer)

    def _here(self, run: Run, packs: Int64, placer: Placer) -> None:
        compute = self._model(run)
        run.loaded = None
        with _tracked(run, packs, placer), run.clock.stage("forward"):
            placer.started = time.perf_counter()
            runner.run_packs(packs, placer.collator, compute, placer, self.local_device, run.tell, placer.note_unfit)

    def _model(self, run: Run) -> runner.Compute:
        """What this process computes of a batch."""
        with run.clock.stage("load model"):
            _, state, notes = run.loaded or model_weights.load(run.found)
            assert self.backend is not None
            model = ESM2(run.spec, state, self.dtype, self.local_device, self.backend)
        for note in notes:
            run.tell(note)
        return runner.compute_with(model, run.layers, run.config)

    def _in_processes(self, run: Run, packs: Int64, placer: Placer) -> None:
        from virnucpro_cli.engine import workers

        run.loaded = None
        job = workers.Job(
            run.config, run.found, run.layers, self.dtype, self.device.attention, run.table, run.work, run.plan,
            placer.todo, run.file.output, run.file.path, run.file.fd, devices.threads_of(len(self.devices)),
        )  # fmt: skip
        with _tracked(run, packs, placer):
            run.summary.tables["Workers"] = workers.compute_in_processes(
                job, packs, self.devices[: len(packs)], placer, run.tell
            )


@dataclass(frozen=True)
class OnRay(Computing):
    """By the actors of a Ray cluster; this process writes their rows."""

    cluster: "Cluster" = field(kw_only=True)

    @property
    def gpus(self) -> int:
        return len(self.devices)

    @property
    def sharing(self) -> int:
        return 1

    @property
    def pins(self) -> bool:
        return False

    def described(self) -> str:
        return f"{counted(len(self.devices), 'actor')} of Ray at the start"

    def check_room(self, spec: ModelSpec) -> None:
        """Each actor checks its own device."""

    def computed_by(self, several: bool) -> str:
        return computed_by(self.device, self.dtype, self.local_device)

    def compute(self, run: Run, packs: Int64, placer: Placer) -> None:
        run.loaded = None
        with _tracked(run, packs, placer):
            run.summary.tables["Nodes"] = self.cluster.run(packs, run.plan, placer, run.found, run.layers, run.tell)


@contextmanager
def chosen(config: EmbedConfig, alone: bool, out: Console, clock: report.Clock) -> Iterator[Computing]:
    """The engine of a run; alone: in this process, whatever is asked for. Raises UserError for what is not to be had."""
    if config.engine == "local":
        yield _on_this_host(config, alone)
        return
    from virnucpro_cli.cluster.ray import Cluster

    with Cluster(config) as cluster:
        with clock.stage("start workers"):
            device = cluster.first_device(out.print)
        local_device, backend = cluster.of_the_driver()
        yield OnRay(device, [local_device] * cluster.room(), local_device, backend, cluster.dtype, cluster=cluster)


def _on_this_host(config: EmbedConfig, alone: bool) -> OnThisHost:
    each, notes = devices.resolve_devices(config.device, config.workers)
    each = each[:1] if alone else each
    dtype = devices.resolve_dtype(config.dtype, each[0])
    backend = attention.resolve(config.attention, each[0], dtype)
    return OnThisHost(devices.device_here(each[0], backend), each, each[0], backend, dtype, tuple(notes))


def _tracked(run: Run, packs: Int64, placer: Placer) -> report.Tracker:
    placer.tracker = report.Tracker(run.out, int(run.plan.tokens[packs].sum()))
    return placer.tracker


def computed_by(device: devices.Device, dtype: torch.dtype, local_device: torch.device, processes: int = 1) -> str:
    """What the bits of a row depend on besides its input, in a line of JSON. processes: that share a device of this host."""
    return json.dumps({
        "device": device.name if processes == 1 else devices.describe_device(local_device, processes),
        "dtype": attention.describe(dtype),
        "attention": device.attention,
        "torch": device.torch,
        "virnucpro": device.virnucpro,
    })  # fmt: skip


def computed_at(device: torch.device, dtype: torch.dtype, backend: Backend) -> str:
    """The same of a device of this host."""
    return computed_by(devices.device_here(device, backend), dtype, device)
