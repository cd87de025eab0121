"""The driver's side: a connection to a cluster, its actors, and the packs that are dealt to them.

An actor that dies, with its node or without, has its packs done by the others. One is started wherever there is room,
at any time.
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

import virnucpro_cli
from virnucpro_cli import stopping
from virnucpro_cli.cluster.ray.actor import Actor, Share
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.dealing import Dealer, Lost, Message, Worker, lost_by
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import STOP_SIGNALS, UserError, in_a_line, install_command
from virnucpro_cli.kinds import by_residue
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.plan.packing import Int64, Plan, Segments
from virnucpro_cli.store.schema import distinct
from virnucpro_cli.texts import ranges

LARGEST_SHARE = 16
MOST_RETURNED = 1 << 28
LOOK_SECONDS, PATIENCE_SECONDS = 2.0, 20.0
NOWHERE = "a node"
LIMITED = 0.7
"""Share of a run's time that the driver takes and writes rows, above which it is said that this is the limit."""
MOST_DEATHS = 5
"""Deaths in a row, without a pack done between them, after which the cluster is of no use. Actors that die together, as
with several nodes, count once: a death counts if the actor was started after the one before it was noticed."""
ALIKE = {"name": "", "attention": "--attention ", "torch": "PyTorch ", "virnucpro": "virnucpro "}
"""Attributes that devices of a cluster must agree in, and how they are called."""


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would leave without a commit."""
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _stops() -> Iterator[None]:
    """Ray's compiled code turns what a signal handler raises into a SystemError."""
    try:
        yield
    except SystemError as error:
        raise (stopping.stop_in(error) or error) from None


@dataclass(eq=False)
class _Member(Worker):
    """An actor as the driver knows it."""

    handle: Any
    node: str = NOWHERE
    node_id: str = ""
    lost: bool = False

    def __str__(self) -> str:
        return f"actor {self.number} on {self.node}"


class Cluster:
    """A connection to a Ray cluster, and the actors of one run on it."""

    def __init__(self, config: EmbedConfig):
        try:
            ray = self.ray = import_module("ray")
        except ImportError:
            remedy = f"{install_command('ray')}, on every node of the cluster."
            raise UserError("--engine ray needs Ray.", remedy) from None
        self.config = config
        with _own_signals():
            try:
                ray.init(
                    address=config.ray_address, namespace="virnucpro", log_to_driver=False, logging_level="ERROR",
                    **({} if config.ray_address else {"include_dashboard": False}),
                )  # fmt: skip
            except (ConnectionError, ValueError, RuntimeError) as error:
                remedy = "ray status says whether a cluster runs."
                raise UserError(f"--ray-address {config.ray_address}: {in_a_line(error)}.", remedy) from None
        self.leaving: set[str] = set()
        has = ray.cluster_resources()
        on_gpus = config.device != "cpu" and (has.get("GPU", 0) >= 1 or config.device != "auto")
        self.kind = "cuda" if on_gpus else "cpu"
        cpus = self._of_nodes("CPU")
        smallest = min((n for n in cpus if n), default=1)
        share = sum(cpus) // config.workers if isinstance(config.workers, int) else smallest
        self.threads = max(1, min(share, smallest, torch.get_num_threads() if not config.ray_address else smallest))
        self.dtype = devices.resolve_dtype(config.dtype, torch.device(self.kind))
        self.members: list[_Member] = []
        self.calls: dict[Any, _Member] = {}  # whose answer has not come, by its reference
        self.device: devices.Device | None = None

    def turn_to(self, config: EmbedConfig, dtype: torch.dtype) -> None:
        """End the actors of another configuration, unless this is theirs; new ones are started as there is room."""
        if (config, dtype) != (self.config, self.dtype):
            for member in self.members:
                self.kill(member)
            self.members.clear()
            self.calls.clear()
            self.config, self.dtype = config, dtype

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self.members:
            self.kill(member)
        with suppress(Exception), _own_signals():
            self.ray.shutdown()

    def kill(self, member: _Member) -> None:
        with suppress(Exception):
            self.ray.kill(member.handle)

    def room(self) -> int:
        """How many actors the cluster has room for now; with --workers, how many are asked for."""
        if isinstance(self.config.workers, int):
            return self.config.workers
        if self.kind == "cuda":
            return sum(self._of_nodes("GPU"))
        return sum(count // self.threads for count in self._of_nodes("CPU"))

    def _of_nodes(self, resource: str) -> list[int]:
        """How much each node has of it, those left out that are dead or to be taken away."""
        alive = (node for node in self.ray.nodes() if node["Alive"] and node["NodeID"] not in self.leaving)
        return [int(node["Resources"].get(resource, 0)) for node in alive]

    def look_who_leaves(self) -> None:
        """Note the nodes that are to be taken away, as when a cloud pre-empts them. Ray has no public way to ask."""
        with suppress(Exception):
            self.leaving = set(self.ray._private.state.state.get_draining_nodes())

    def of_the_driver(self) -> tuple[torch.device, Backend | None]:
        """The device of this process for a second pass: one like the actors', or a CPU."""
        with suppress(UserError):
            device = devices.resolve_device(self.kind)
            backend = attention_backends.resolve(self.config.attention, device, self.dtype, self.config.residual)
            name = self.device.name if self.device is not None else ""
            if device.type == "cuda" and devices.describe_device(device) == name:
                return device, backend
        return torch.device("cpu"), None

    def start(self) -> _Member:
        """One more actor; where and when is the cluster's affair."""
        wants = {"num_gpus": 1, "num_cpus": 0} if self.kind == "cuda" else {"num_cpus": self.threads}
        remote = self.ray.remote(**wants, max_restarts=0)(Actor)
        member = _Member(len(self.members) + 1, remote.remote(self.config, self.kind, self.dtype, self.threads))
        self.members.append(member)
        self.calls[member.handle.look.remote()] = member
        return member

    @_stops()
    def first_device(self, say: Callable[[str], None]) -> devices.Device:
        """The device of the first actor. Waits for it, and says so.

        Raises UserError if the cluster has no room for one, or it fails there.
        """
        kind = "GPU" if self.kind == "cuda" else "CPU"
        if not self.room():
            raise UserError(
                f"The Ray cluster has no {kind} for an actor.",
                "Add a node that has, choose another --device, or ask for some with --workers N where the cluster "
                "grows by itself.",
            )
        member = self.start()
        (answer,) = self.calls
        if not self.ray.wait([answer], timeout=PATIENCE_SECONDS)[0]:
            say(f"waiting for a {kind} of the Ray cluster; ray status shows what it has, and what is asked for")
        try:
            ((_, self.device, member.node_id),) = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            raise _cause_of(error) or UserError(
                f"No actor could be started on the Ray cluster: {in_a_line(error)}", "Look at ray status and its logs."
            ) from None
        assert isinstance(self.device, devices.Device)
        if self.device.virnucpro != virnucpro_cli.__version__:
            raise UserError(
                f"virnucpro is {self.device.virnucpro} on {self.device.node}, and {virnucpro_cli.__version__} here.",
                "Install the same version on every node.",
            )
        member.node = self.device.node
        return self.device

    @_stops()
    def run(self, placer: Placer, packs: Int64, note: Callable[[str], None]) -> list[dict[str, Any]]:
        """Have all packs, int64 [P], done; `note` is told of actors that were lost. Returns a row for each node.

        Raises UserError when actors die one after the other with nothing done, or when one meets what would stop every
        other.
        """
        dealer = _Actors(self, placer, packs, note)
        dealer.run()
        if dealer.receiving > LIMITED * dealer.seconds:
            share = f"the driver took and wrote rows for {dealer.receiving / dealer.seconds:.0%} of the time"
            note(f"{share}: its network or disk is the limit; --shard has no such limit")
        return dealer.by_node()

    def check(self, device: devices.Device) -> None:
        """Raise UserError for a device whose rows would not be like those of the first."""
        first = self.device
        assert first is not None
        for name, word in ALIKE.items():
            here, there = getattr(first, name), getattr(device, name)
            if here != there:
                both = f"{word}{here} on {first.node}, {word}{there} on {device.node}"
                remedy = "Values would differ by how they round. Use nodes of one kind, with the same packages."
                raise UserError(f"The nodes of the Ray cluster differ: {both}.", remedy)


class _Actors(Dealer):
    """Deals packs to the actors of a cluster, each of which has one call to answer, or is ready for one."""

    def __init__(self, cluster: Cluster, placer: Placer, packs: Int64, note: Callable[[str], None]):
        super().__init__(placer, packs, note)
        self.cluster, self.ray = cluster, cluster.ray
        self.living = list(cluster.members)
        plan = placer.job.plan
        rows = len(placer.segments) / max(len(plan), 1)
        pack_bytes = sum(  # about what the rows of a pack take on their way back
            extent.row_bytes * (plan.token_budget if by_residue(*name.partition("/")[::2]) else rows)
            for name, extent in placer.file.places.items()
        )
        self.largest_share = max(1, min(LARGEST_SHARE, MOST_RETURNED // max(1, int(pack_bytes))))
        self.alone = False
        self.deaths = 0  # since the last pack was done
        self.known = 0  # actors there were at the last death that counted
        self.looked = self.receiving = 0.0  # a moment, and seconds
        self.shipped: Any = None

    def wait(self) -> Iterator[tuple[_Member, Iterable[Message]]]:
        self._grow()
        calls = self.cluster.calls
        was_alone, self.alone = self.alone, not calls
        if calls:
            answers, _ = self.ray.wait(list(calls), timeout=LOOK_SECONDS)
            yield from ((calls.pop(answer), self._messages(answer)) for answer in answers)
        else:  # nobody is there whose answer Ray could wait for
            if not was_alone:
                self.note("no actor is left: waiting for a node of the Ray cluster")
            time.sleep(LOOK_SECONDS)

    def _grow(self) -> None:
        """Start actors where there is room for more, and see whose nodes are to be taken away, now and then."""
        if time.perf_counter() - self.looked > LOOK_SECONDS:
            self.looked = time.perf_counter()
            self.cluster.look_who_leaves()
            for member in self.living:
                if member.node_id in self.cluster.leaving and not member.leaving:
                    member.leaving = True
                    self.note(f"{member} gets no more packs: its node is to be taken away")
            living = len(self.living)
            for _ in range(min(self.cluster.room() - living, len(self.waiting) - living)):
                self.living.append(self.cluster.start())

    def _messages(self, answer: Any) -> list[Message]:
        began = time.perf_counter()
        try:
            return self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            return [("lost", lost_by(_cause_of(error) or error))]
        finally:
            self.receiving += time.perf_counter() - began

    def send(self, member: _Member, packs: list[int]) -> None:
        share = share_of(packs, self.placer) if packs else None
        self.cluster.calls[member.handle.work.remote(share)] = member

    def deal(self) -> None:
        super().deal()
        for member in [each for each in self.living if each.leaving and each.ready and not each.packs]:
            self.living.remove(member)
            self.cluster.kill(member)

    def heed(self, member: Any, message: Message) -> None:
        placer, job = self.placer, self.placer.job
        match message:
            case "device", device, node_id:
                member.node, member.node_id = device.node, node_id
                self.cluster.check(device)
                self.cluster.calls[member.handle.load.remote(job.weights, job.layers)] = member
            case ("no weights",):
                if self.shipped is None:
                    spec, state, notes = model_weights.load(job.weights)
                    self.shipped = self.ray.put((spec, {key: each.numpy() for key, each in state.items()}, notes))
                self.cluster.calls[member.handle.take.remote(self.shipped, job.layers)] = member
            case "rows", rows:
                began = time.perf_counter()
                placer.place(rows)
                member.tokens += rows.tokens
                self.deaths, member.last_done = 0, time.perf_counter()
                self.receiving += member.last_done - began
            case "unfit", segment:
                placer.unfit.append(int(placer.segments.record[segment]))
            case _:
                super().heed(member, message)

    def lose(self, member: Any, lost: Lost) -> None:
        member.lost = True
        if member.number > self.known:
            self.deaths, self.known = self.deaths + 1, len(self.cluster.members)
        self.cluster.kill(member)
        super().lose(member, lost)

    def hopeless(self) -> str | None:
        return f"{self.deaths} actors were lost one after the other." if self.deaths == MOST_DEATHS else None

    def by_node(self) -> list[dict[str, Any]]:
        rows = []
        members = [member for member in self.cluster.members if member.node != NOWHERE]
        for node in dict.fromkeys(member.node for member in members):
            there = [member for member in members if member.node == node]
            gone = sum(member.lost for member in there)
            rows.append({
                "node": node, "actors": len(there), "tokens": sum(member.tokens for member in there),
                "idle at the end": sum(self.idle(member) for member in there) / len(there),
                "CPU seconds": sum(member.used.get("CPU seconds", 0.0) for member in there),
                "lost": f"{gone} lost" if gone else "",
            })  # fmt: skip
        return rows


def _cause_of(error: Exception) -> UserError | None:
    """The error of an actor's own code, if Ray reports one."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError) else None


def share_of(packs: Sequence[int], placer: Placer) -> Share:
    """Everything that an actor needs to know of some packs; windows come with those they are blended with."""
    segments, table, plan = placer.segments, placer.job.table, placer.job.plan
    parts = [plan.pack(pack) for pack in packs]
    wanted = np.concatenate(parts)
    records = distinct(segments.record[wanted].astype(np.int64))
    first, last = segments.bounds_of(records)
    counts = last - first
    numbers = ranges(first, counts)
    table.check_unchanged()
    return Share(
        table.tokens(records), table.sizes[records], placer.embedded[records],
        Segments(np.repeat(np.arange(len(records)), counts), segments.start[numbers], segments.length[numbers]),
        Plan(
            np.searchsorted(numbers, wanted), np.append(0, np.cumsum([len(part) for part in parts])),
            plan.bucket[list(packs)], plan.tokens[list(packs)], plan.token_budget,
        ),
        numbers, table.reading,
    )  # fmt: skip
