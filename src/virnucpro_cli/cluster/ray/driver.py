"""The driver's side: a connection to a cluster, its actors, and who has which packs."""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import virnucpro_cli
from virnucpro_cli import stopping
from virnucpro_cli.cluster.ray.actor import AHEAD, Actor
from virnucpro_cli.cluster.ray.messages import Looked, Returned, share_of
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.engine.workers import Lost, idle, undone
from virnucpro_cli.errors import STOP_SIGNALS, UserError, in_a_line, install_command
from virnucpro_cli.kinds import by_residue
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.plan.packing import Plan

LARGEST_SHARE = 16
MOST_RETURNED = 1 << 28
LOOK_SECONDS, PATIENCE_SECONDS = 2.0, 20.0
NOWHERE = "a node"
LIMITED = 0.7
"""Share of a run's time that the driver takes and writes rows, above which it is said that this is the limit."""
MOST_DEATHS = 5
"""Deaths in a row, without a pack done between them, after which the cluster is of no use. Actors that die together, as with
several nodes, count once: a death counts if the actor was started after the one before it was noticed."""


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray.", f"{install_command('ray')}, on every node of the cluster.") from None
    return ray


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


@dataclass
class _Member:
    """An actor as the driver knows it."""

    number: int
    handle: Any
    node: str = NOWHERE
    node_id: str = ""
    packs: list[int] = field(default_factory=list)  # sent to it, and not known to be done
    tokens: int = 0
    last_done: float = 0.0
    used: dict[str, Any] = field(default_factory=dict)
    ready: bool = False
    asked: int = 0  # calls that it has not answered
    ending: bool = False  # it was told that there are no more packs for now

    def __str__(self) -> str:
        return f"actor {self.number} on {self.node}"


class Cluster:
    """A connection to a Ray cluster, and the actors of one run on it."""

    def __init__(self, config: EmbedConfig):
        self.ray, self.config = _ray(), config
        with _own_signals():
            try:
                self.ray.init(
                    address=config.ray_address, namespace="virnucpro", log_to_driver=False, logging_level="ERROR",
                    **({} if config.ray_address else {"include_dashboard": False}),
                )  # fmt: skip
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"--ray-address {config.ray_address}: {in_a_line(error)}.",
                    "ray status says whether a cluster runs.",
                ) from None
        self.leaving: set[str] = set()
        has = self.ray.cluster_resources()
        on_gpus = config.device != "cpu" and (has.get("GPU", 0) >= 1 or config.device != "auto")
        self.kind = "cuda" if on_gpus else "cpu"
        cpus = self._of_nodes("CPU")
        smallest = min((n for n in cpus if n), default=1)
        share = sum(cpus) // config.workers if isinstance(config.workers, int) else smallest
        self.threads = max(1, min(share, smallest, torch.get_num_threads() if not config.ray_address else smallest))
        self.dtype = devices.resolve_dtype(config.dtype, torch.device(self.kind))
        self.members: dict[Any, _Member] = {}  # by the reference of each call that was not answered
        self.all: list[_Member] = []
        self.device: devices.Device | None = None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self.all:
            with suppress(Exception):
                self.ray.kill(member.handle)
        with suppress(Exception), _own_signals():
            self.ray.shutdown()

    def room(self) -> int:
        """How many actors the cluster has room for now; with --workers, how many are asked for."""
        if isinstance(self.config.workers, int):
            return self.config.workers
        if self.kind == "cuda":
            return sum(self._of_nodes("GPU"))
        return sum(count // self.threads for count in self._of_nodes("CPU"))

    def _of_nodes(self, resource: str) -> list[int]:
        """What each node has of it, those left out that are dead or to be taken away."""
        alive = (node for node in self.ray.nodes() if node["Alive"] and node["NodeID"] not in self.leaving)
        return [int(node["Resources"].get(resource, 0)) for node in alive]

    def look_who_leaves(self) -> None:
        """Note the nodes that are to be taken away, as when a cloud pre-empts them. Ray has no public way to ask."""
        with suppress(Exception):
            self.leaving = set(self.ray._private.state.state.get_draining_nodes())

    def of_the_driver(self) -> tuple[torch.device, Backend | None]:
        """What this process has for a second pass: a device like the actors', or a CPU."""
        with suppress(UserError):
            device = devices.resolve_device(self.kind)
            backend = attention_backends.resolve(self.config.attention, device, self.dtype)
            if (
                self.device is not None
                and device.type == "cuda"
                and devices.describe_device(device) == self.device.name
            ):
                return device, backend
        return torch.device("cpu"), None

    def start(self) -> _Member:
        """One more actor; where and when is the cluster's affair."""
        wants = {"num_gpus": 1, "num_cpus": 0} if self.kind == "cuda" else {"num_cpus": self.threads}
        remote = self.ray.remote(**wants, max_concurrency=AHEAD + 1, max_restarts=0)(Actor)
        handle = remote.remote(self.config, self.kind, self.dtype, self.threads)
        member = _Member(len(self.all) + 1, handle)
        self.all.append(member)
        self.call(member, handle.look.remote())
        return member

    def call(self, member: _Member, answer: Any) -> None:
        self.members[answer] = member
        member.asked += 1

    @_stops()
    def first_device(self, say: Callable[[str], None]) -> devices.Device:
        """Where the first actor is. Waits for it, and says so; raises UserError if the cluster has no room for one, or it fails there."""
        what = "GPU" if self.kind == "cuda" else "CPU"
        if not self.room():
            raise UserError(
                f"The Ray cluster has no {what} for an actor.",
                "Add a node that has, choose another --device, or ask for some with --workers N where the cluster grows by itself.",
            )
        member = self.start()
        (answer,) = self.members
        if not self.ray.wait([answer], timeout=PATIENCE_SECONDS)[0]:
            say(f"waiting for a {what} of the Ray cluster; ray status shows what it has, and what is asked for")
        try:
            self.device, member.node_id = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            raise _told_by(error) or UserError(
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
    def run(
        self, packs: NDArray[np.int64], plan: Plan, placer: Placer, weights: locate.Weights, layers: tuple[int, ...],
        note: Callable[[str], None],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Have all packs done; `note` is told of actors that were lost. Returns a row for each node.

        Raises UserError when actors die one after the other with nothing done, or when one meets what would stop every other.
        """
        return _Round(self, packs, plan, placer, weights, layers, note).run()

    def check(self, device: devices.Device) -> None:
        """Raise UserError for a node whose rows would not be like those of the first."""
        assert self.device is not None
        for name, what in (
            ("name", ""),
            ("attention", "--attention "),
            ("torch", "PyTorch "),
            ("virnucpro", "virnucpro "),
        ):
            here, there = getattr(self.device, name), getattr(device, name)
            if here != there:
                raise UserError(
                    f"The nodes of the Ray cluster differ: {what}{here} on {self.device.node}, {what}{there} on {device.node}.",
                    "Values would differ by how they round. Use nodes of one kind, with the same packages.",
                )


class _Round:
    """The packs of a run, and which actor has which. An answer at a time is heeded; then whoever is free gets more."""

    def __init__(
        self, cluster: Cluster, packs: NDArray[np.int64], plan: Plan, placer: Placer, weights: locate.Weights,
        layers: tuple[int, ...], note: Callable[[str], None],
    ):  # fmt: skip
        self.cluster, self.ray, self.note = cluster, cluster.ray, note
        self.plan, self.placer, self.weights, self.layers = plan, placer, weights, layers
        self.waiting = deque(packs.tolist())
        self.largest = max(1, min(LARGEST_SHARE, MOST_RETURNED // max(1, self._bytes_of_a_pack())))
        self.lost: set[int] = set()
        self.retired: set[int] = set()  # their nodes are to be taken away, and they have nothing left to do
        self.alone = False
        self.deaths = 0  # since the last pack was done
        self.known = 0  # actors there were at the last death that counted
        self.asked, self.began, self.looked = time.perf_counter(), 0.0, 0.0
        self.receiving = 0.0  # seconds
        self.shipped: Any = None

    def run(self) -> list[dict[str, Any]]:
        cluster, busy = self.cluster, True
        while busy:
            self._grow()
            self._wait_if_alone()
            answered, _ = self.ray.wait(list(cluster.members), timeout=LOOK_SECONDS)
            for answer in answered:
                member = cluster.members.pop(answer)
                member.asked -= 1
                self._heed(member, self._result(answer))
            for member in self._living():
                if member.ready and not member.ending:
                    self._hand_out(member)
                    self._retire(member)
            self.placer.commit_now_and_then()
            busy = bool(self.waiting) or any(member.packs for member in self._living())
        seconds = time.perf_counter() - self.began
        self.placer.clock.seconds["forward"] = seconds
        if self.receiving > LIMITED * seconds:
            share = self.receiving / seconds
            self.note(
                f"the driver took and wrote rows for {share:.0%} of the time: its network or disk is the limit; --shard has no such limit"
            )
        return _by_node(cluster.all, self.lost, self.began, seconds)

    def _living(self) -> list[_Member]:
        return [member for member in self.cluster.all if member.number not in self.lost | self.retired]

    def _grow(self) -> None:
        """Start actors where there is room for more, and see whose nodes are to be taken away, now and then."""
        if time.perf_counter() - self.looked > LOOK_SECONDS:
            self.looked = time.perf_counter()
            before = self.cluster.leaving
            self.cluster.look_who_leaves()
            for member in self._living():
                if member.node_id in self.cluster.leaving - before:
                    self.note(f"{member} gets no more packs: its node is to be taken away")
            living = len(self._living())
            for _ in range(min(self.cluster.room() - living, len(self.waiting) - living)):
                self.cluster.start()

    def _wait_if_alone(self) -> None:
        """Without any actor, and without room for one, there is nobody whose answer Ray could wait for."""
        if self.cluster.members:
            self.alone = False
            return
        if not self.alone:
            self.note("no actor is left: waiting for a node of the Ray cluster")
        self.alone = True
        time.sleep(LOOK_SECONDS)

    def _result(self, answer: Any) -> Any:
        began = time.perf_counter()
        try:
            result = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            told = _told_by(error)
            unsaid = UserError(in_a_line(error), "Run the same command again.")
            result = Returned(lost=Lost(told or unsaid, fatal=told is not None))
        self.receiving += time.perf_counter() - began
        return result

    def _heed(self, member: _Member, result: Any) -> None:
        """What comes of a call's answer: where the actor is, whether the weights are there, or what was done."""
        call = self.cluster.call
        if isinstance(result, Looked):
            member.node, member.node_id = result.device.node, result.node
            self.cluster.check(result.device)
            call(member, member.handle.load.remote(self.weights, self.layers))
        elif result is False:  # the weights are not on its node
            if self.shipped is None:
                spec, state, notes = model_weights.load(self.weights)
                self.shipped = self.ray.put((spec, {key: each.numpy() for key, each in state.items()}, notes))
            call(member, member.handle.take.remote(self.shipped, self.layers))
        elif result is True:
            member.ready = True
            if not self.began:
                self.began = self.placer.started = time.perf_counter()
                self.placer.clock.seconds["start workers"] += self.began - self.asked
        else:
            self._take(member, result)
            if result.lost is not None and member.number not in self.lost:
                self._lose(member, result.lost)

    def _take(self, member: _Member, result: Returned) -> None:
        began, placer = time.perf_counter(), self.placer
        for rows in result.rows:
            placer(rows, rows)
            member.tokens += rows.used
            self.deaths, member.last_done = 0, time.perf_counter()
        self.receiving += time.perf_counter() - began
        placer.unfit += placer.work.segments.record[result.unfit].tolist()
        member.used = result.used or member.used
        for text in result.notes:
            self.note(f"{member}: {text}")
        if result.ended:
            member.packs, member.ending = [], False

    def _lose(self, member: _Member, lost: Lost) -> None:
        """Its packs go to the others. Raises its error if they would fare no better."""
        self.lost.add(member.number)
        if member.number > self.known:
            self.deaths, self.known = self.deaths + 1, len(self.cluster.all)
        with suppress(Exception):
            self.ray.kill(member.handle)
        if lost.fatal:
            raise lost.error
        if self.deaths == MOST_DEATHS:
            raise UserError(
                f"{self.deaths} actors were lost one after the other. The last, {member}: {lost.error.what}",
                lost.error.remedy,
            )
        self.waiting.extend(undone(member.packs, self.plan, self.placer))
        self.note(f"{member} was lost, and its packs go to the others: {lost.error.what}")

    def _hand_out(self, member: _Member) -> None:
        stays = member.node_id not in self.cluster.leaving
        while self.waiting and member.asked < AHEAD and stays:
            count = min(-(-len(self.waiting) // (3 * AHEAD * max(1, len(self._living())))), self.largest)
            share = [self.waiting.popleft() for _ in range(count)]
            member.packs += share
            self.cluster.call(member, member.handle.work.remote(share_of(share, self.plan, self.placer)))
        if member.packs and not member.asked:  # there is no more for it now: it is to end those it has begun
            member.ending = True
            self.cluster.call(member, member.handle.finish.remote())

    def _retire(self, member: _Member) -> None:
        """Let an actor go whose node is to be taken away, when all that it had is done."""
        if member.node_id in self.cluster.leaving and not member.packs and not member.asked:
            self.retired.add(member.number)
            with suppress(Exception):
                self.ray.kill(member.handle)

    def _bytes_of_a_pack(self) -> int:
        """About what its rows take on their way back."""
        rows = len(self.placer.work.segments) / max(len(self.plan), 1)
        return int(sum(
            place.row_bytes * (self.plan.token_budget if by_residue(*name.partition("/")[::2]) else rows)
            for name, place in self.placer.file.places.items()
        ))  # fmt: skip


def _told_by(error: Exception) -> UserError | None:
    """What an actor's own code had to say, if that is what Ray reports."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError) else None


def _by_node(members: list[_Member], lost: set[int], began: float, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for node in dict.fromkeys(member.node for member in members if member.node != NOWHERE):
        there = [member for member in members if member.node == node]
        gone = sum(member.number in lost for member in there)
        waited = [idle(member.last_done, began, seconds) for member in there]
        rows.append({
            "node": node, "actors": len(there), "tokens": sum(member.tokens for member in there),
            "idle at the end": sum(waited) / len(waited),
            "CPU seconds": sum(member.used.get("CPU seconds", 0.0) for member in there),
            "lost": f"{gone} lost" if gone else "",
        })  # fmt: skip
    return rows
