"""Packs on the GPUs (or CPUs) of a Ray cluster. Tokens travel to actors and rows travel back; the driver alone writes the file.

An actor that dies, with its node or without, has its packs done by the others; one is started wherever there is room, also later.
"""

import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import virnucpro_cli
from virnucpro_cli import attention as attention_backends
from virnucpro_cli import runner
from virnucpro_cli.attention import Backend
from virnucpro_cli.collate import PackedBatch, VarlenCollator
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import STOP_SIGNALS, Stopped, UserError, in_a_line
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.packing import Plan, Segments, ranges
from virnucpro_cli.placer import Placer
from virnucpro_cli.pooling import Embeddings
from virnucpro_cli.workers import Lost, idle, undone, used_here

AHEAD = 2
"""Shares that an actor has at a time: it computes one while the other travels."""
LARGEST_SHARE = 16
MOST_RETURNED = 1 << 28
LOOK_SECONDS, PATIENCE_SECONDS = 2.0, 20.0
MOST_DEATHS = 5
"""Deaths in a row, without a pack done between them, after which the cluster is of no use. Actors that die together, as with
several nodes, count once: a death counts if the actor was started after the one before it was noticed."""


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(
            "--engine ray needs Ray.", "pip install 'virnucpro[ray]', on every node of the cluster."
        ) from None
    return ray


class Share(NamedTuple):
    """Some packs, whole: the plan of them with its own numbers, and the tokens of their records.

    tokens: uint8, one record behind the other, `lengths` int32 of each; numbers: int64, of each segment in the whole plan.
    """

    tokens: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    embedded: NDArray[np.int32]
    segments: Segments
    plan: Plan
    numbers: NDArray[np.int64]


class Rows(NamedTuple):
    """What became of one batch: a `Packed` and a `Found` for the placer, with the numbers of segments in the whole plan."""

    segments: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pooled: dict[tuple[str, Any], NDArray[Any]]
    residue: dict[Any, NDArray[Any]]
    finite: NDArray[np.bool_]

    @property
    def used(self) -> int:
        return int(self.lengths.sum())


@dataclass
class Returned:
    """What an actor did since it last said so."""

    rows: list[Rows] = field(default_factory=list)
    unfit: list[int] = field(default_factory=list)  # segments
    notes: list[str] = field(default_factory=list)
    used: dict[str, Any] = field(default_factory=dict)
    ended: bool = False  # nothing of what it was sent is left
    lost: Lost | None = None


def share_of(packs: Sequence[int], plan: Plan, placer: Placer) -> Share:
    """Everything that an actor needs to know of some packs; windows come with those they are blended with."""
    segments, table = placer.work.segments, placer.table
    parts = [plan.pack(pack) for pack in packs]
    wanted = np.concatenate(parts)
    records = np.unique(segments.record[wanted])
    first, last = (np.searchsorted(segments.record, records, side=side) for side in ("left", "right"))
    counts = last - first
    numbers = ranges(first, counts)
    table.check_unchanged()
    return Share(
        table.tokens(records), table.length[records], placer.work.embedded[records],
        Segments(np.repeat(np.arange(len(records)), counts), segments.start[numbers], segments.length[numbers]),
        Plan(
            np.searchsorted(numbers, wanted), np.append(0, np.cumsum([len(part) for part in parts])),
            plan.rung[list(packs)], plan.tokens[list(packs)], plan.token_budget,
        ),
        numbers,
    )  # fmt: skip


# --- the driver ------------------------------------------------------------------------------------------------------


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
        raise (error.__cause__ if isinstance(error.__cause__, Stopped) else error) from None


@dataclass
class _Member:
    """An actor as the driver knows it."""

    number: int
    handle: Any
    node: str = "a node"
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
        has = self.ray.cluster_resources()
        on_gpus = config.device != "cpu" and (has.get("GPU", 0) >= 1 or config.device != "auto")
        self.device = "cuda" if on_gpus else "cpu"
        cpus = [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]
        smallest = min((n for n in cpus if n), default=1)
        share = sum(cpus) // config.workers if isinstance(config.workers, int) else smallest
        self.threads = max(1, min(share, smallest, torch.get_num_threads() if not config.ray_address else smallest))
        self.dtype = runner.resolve_dtype(config.dtype, torch.device(self.device))
        self.members: dict[Any, _Member] = {}  # by the reference of each call that was not answered
        self.all: list[_Member] = []
        self.place: runner.Place | None = None

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
        if self.device == "cuda":
            return int(self.ray.cluster_resources().get("GPU", 0))
        return sum(int(node["Resources"].get("CPU", 0)) // self.threads for node in self.ray.nodes() if node["Alive"])

    def of_the_driver(self) -> tuple[torch.device, Backend | None]:
        """What this process has for a second pass: a device like the actors', or a CPU."""
        with suppress(UserError):
            device = runner.resolve_device(self.device)
            backend = attention_backends.resolve(self.config.attention, device, self.dtype)
            if self.place is not None and device.type == "cuda" and runner.describe_device(device) == self.place.device:
                return device, backend
        return torch.device("cpu"), None

    def start(self) -> _Member:
        """One more actor; where and when is the cluster's affair."""
        wants = {"num_gpus": 1, "num_cpus": 0} if self.device == "cuda" else {"num_cpus": self.threads}
        remote = self.ray.remote(**wants, max_concurrency=AHEAD + 1, max_restarts=0)(_Actor)
        handle = remote.remote(self.config, self.device, self.dtype, self.threads)
        member = _Member(len(self.all) + 1, handle)
        self.all.append(member)
        self.call(member, handle.look.remote())
        return member

    def call(self, member: _Member, answer: Any) -> None:
        self.members[answer] = member
        member.asked += 1

    @_stops()
    def first_place(self, say: Callable[[str], None]) -> runner.Place:
        """Where the first actor is. Waits for it, and says so; raises UserError if the cluster has no room for one, or it fails there."""
        what = "GPU" if self.device == "cuda" else "CPU"
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
            self.place = self.ray.get(answer)
        except self.ray.exceptions.RayError as error:
            raise _told_by(error) or UserError(
                f"No actor could be started on the Ray cluster: {in_a_line(error)}", "Look at ray status and its logs."
            ) from None
        assert isinstance(self.place, runner.Place)
        if self.place.virnucpro != virnucpro_cli.__version__:
            raise UserError(
                f"virnucpro is {self.place.virnucpro} on {self.place.node}, and {virnucpro_cli.__version__} here.",
                "Install the same version on every node.",
            )
        member.node = self.place.node
        return self.place

    @_stops()
    def run(
        self, packs: NDArray[np.int64], plan: Plan, placer: Placer, weights: locate.Weights, layers: tuple[int, ...],
        note: Callable[[str], None],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Have all packs done; `note` is told of actors that were lost. Returns a row for each node.

        Raises UserError when actors die one after the other with nothing done, or when one meets what would stop every other.
        """
        ray, waiting = self.ray, deque(packs.tolist())
        largest = max(1, min(LARGEST_SHARE, MOST_RETURNED // max(1, _returned_bytes(plan, placer))))
        asked, began, looked = time.perf_counter(), 0.0, 0.0
        deaths = known = 0  # known: actors there were at the last death that counted
        shipped: Any = None
        lost: set[int] = set()
        busy = True
        while busy:
            if time.perf_counter() - looked > LOOK_SECONDS:
                looked = time.perf_counter()
                living = len(self.all) - len(lost)
                for _ in range(min(self.room() - living, len(waiting) - living)):
                    self.start()
            if not self.members:  # all are lost, and there is no room for others: Ray would not wait for nothing
                time.sleep(LOOK_SECONDS)
            answered, _ = ray.wait(list(self.members), timeout=LOOK_SECONDS)
            for answer in answered:
                member = self.members.pop(answer)
                member.asked -= 1
                try:
                    result = ray.get(answer)
                except ray.exceptions.RayError as error:
                    told = _told_by(error)
                    unsaid = UserError(in_a_line(error), "Run the same command again.")
                    result = Returned(lost=Lost(told or unsaid, fatal=told is not None))
                if isinstance(result, runner.Place):
                    member.node = result.node
                    self._check(result)
                    self.call(member, member.handle.load.remote(weights, layers))
                elif result is False:  # the weights are not on its node
                    if shipped is None:
                        spec, state, notes = model_weights.load(weights)
                        shipped = ray.put((spec, {key: each.numpy() for key, each in state.items()}, notes))
                        del state
                    self.call(member, member.handle.take.remote(shipped, layers))
                elif result is True:
                    member.ready = True
                    if not began:
                        began = placer.started = time.perf_counter()
                        placer.clock.seconds["start workers"] += began - asked
                else:
                    deaths = 0 if result.rows else deaths
                    self._heed(result, member, placer, note)
                    if result.lost is not None and member.number not in lost:
                        lost.add(member.number)
                        if member.number > known:
                            deaths, known = deaths + 1, len(self.all)
                        with suppress(Exception):
                            ray.kill(member.handle)
                        if result.lost.fatal:
                            raise result.lost.error
                        if deaths == MOST_DEATHS:
                            raise UserError(
                                f"{deaths} actors were lost one after the other. The last, {member}: {result.lost.error.what}",
                                result.lost.error.remedy,
                            )
                        waiting.extend(undone(member.packs, plan, placer))
                        note(f"{member} was lost, and its packs go to the others: {result.lost.error.what}")
            for member in self.all:
                if not member.ready or member.ending or member.number in lost:
                    continue
                while waiting and member.asked < AHEAD:
                    count = min(-(-len(waiting) // (3 * AHEAD * max(1, len(self.all) - len(lost)))), largest)
                    share = [waiting.popleft() for _ in range(count)]
                    member.packs += share
                    self.call(member, member.handle.work.remote(share_of(share, plan, placer)))
                if member.packs and not member.asked:  # there is no more for it now: it is to end those it has begun
                    member.ending = True
                    self.call(member, member.handle.finish.remote())
            placer.commit_now_and_then()
            busy = bool(waiting) or any(member.packs for member in self.all if member.number not in lost)
        seconds = time.perf_counter() - began
        placer.clock.seconds["forward"] = seconds
        return _by_node(self.all, lost, began, seconds)

    def _check(self, place: runner.Place) -> None:
        """Raise UserError for a node whose rows would not be like those of the first."""
        assert self.place is not None
        for name, what in (
            ("device", ""),
            ("attention", "--attention "),
            ("torch", "PyTorch "),
            ("virnucpro", "virnucpro "),
        ):
            here, there = getattr(self.place, name), getattr(place, name)
            if here != there:
                raise UserError(
                    f"The nodes of the Ray cluster differ: {what}{here} on {self.place.node}, {what}{there} on {place.node}.",
                    "Values would differ by how they round. Use nodes of one kind, with the same packages.",
                )

    def _heed(self, result: Returned, member: _Member, placer: Placer, note: Callable[[str], None]) -> None:
        for rows in result.rows:
            placer(rows, rows)
            member.tokens += rows.used
            member.last_done = time.perf_counter()
        placer.unfit += placer.work.segments.record[result.unfit].tolist()
        member.used = result.used or member.used
        for text in result.notes:
            note(f"{member}: {text}")
        if result.ended:
            member.packs, member.ending = [], False


def _told_by(error: Exception) -> UserError | None:
    """What an actor's own code had to say, if that is what Ray reports."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError) else None


def _returned_bytes(plan: Plan, placer: Placer) -> int:
    """About what a pack's rows take on their way back."""
    rows = len(placer.work.segments) / max(len(plan), 1)
    by_residue = {name for name in placer.file.places if name.startswith("residue/") or name.endswith("logits")}
    return int(sum(
        place.row_bytes * (plan.token_budget if name in by_residue else rows)
        for name, place in placer.file.places.items()
    ))  # fmt: skip


def _by_node(members: list[_Member], lost: set[int], began: float, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for node in dict.fromkeys(member.node for member in members):
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


# --- the actor -------------------------------------------------------------------------------------------------------


class _Texts:
    """The tokens of a share's records, as a collator wants them."""

    def __init__(self, share: Share):
        self.length, self._tokens = share.lengths, share.tokens
        self._ends = np.cumsum(share.lengths, dtype=np.int64)

    def check_unchanged(self) -> None:
        """They came whole."""

    def tokens(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        size = self.length[records].astype(np.int64)
        return self._tokens[ranges(self._ends[records] - size, size)]


Part = tuple[VarlenCollator, NDArray[np.int64], Any]
"""Of a share: its collator, the numbers of its segments in the whole plan, and the item."""


class _Collate:
    """The collator of items of many shares."""

    def __call__(self, part: Part) -> PackedBatch:
        collator, numbers, item = part
        batch = collator(item)
        return replace(batch, segments=numbers[batch.segments])

    def parts(self, part: Part, tokens: int) -> list[Part]:
        collator, numbers, item = part
        return [(collator, numbers, each) for each in collator.parts(item, tokens)]


class _Actor:
    """A model on a device of some node. One thread computes for as long as there are shares; calls hand them in and take rows out."""

    def __init__(self, config: EmbedConfig, device: str, dtype: torch.dtype, threads: int):
        self.config, self.name, self.dtype, self.threads = config, device, dtype, threads
        self._shares: SimpleQueue[tuple[Share, Event] | Event] = SimpleQueue()
        self._done, self._lock = Returned(), Lock()

    def look(self) -> runner.Place:
        torch.set_num_threads(self.threads)
        exact_arithmetic()
        self.device = runner.resolve_device(self.name)
        self.backend = attention_backends.resolve(self.config.attention, self.device, self.dtype)
        return runner.place_of(self.device, self.backend)

    def load(self, weights: locate.Weights, layers: tuple[int, ...]) -> bool:
        """Begin with the weights that are on this node; False if the same are not there."""
        try:
            there = all(Path(file).is_file() for file in weights.files)
            if not there or locate.verified(replace(weights, sha256="")).sha256 != weights.sha256:
                return False
        except (UserError, OSError):
            return False
        return self.take(model_weights.load(weights), layers)

    def take(self, loaded: tuple[ModelSpec, dict[str, Any], tuple[str, ...]], layers: tuple[int, ...]) -> bool:
        """Begin with weights that were sent."""
        spec, state, _ = loaded
        with warnings.catch_warnings(action="ignore"):  # that those in Ray's store cannot be written
            state = {key: torch.as_tensor(each) for key, each in state.items()}
        runner.check_room(self.device, spec.parameters * self.dtype.itemsize, f"The weights of {spec.name}")
        model = ESM2(spec, state, self.dtype, self.device, self.backend)
        Thread(target=self._compute, args=(runner.compute_with(model, layers, self.config),), daemon=True).start()
        return True

    def work(self, share: Share) -> Returned:
        """Take a share on; answered when all of it is begun, with what was done by then."""
        begun = Event()
        self._shares.put((share, begun))
        begun.wait()
        return self._taken()

    def finish(self) -> Returned:
        """End what is begun; answered when it is."""
        ended = Event()
        self._shares.put(ended)
        ended.wait()
        done = self._taken()
        done.ended = done.lost is None
        return done

    def _taken(self) -> Returned:
        with self._lock:
            done = self._done
            self._done = Returned(lost=done.lost)
        done.used = used_here(self.device)
        return done

    def _compute(self, compute: runner.Compute) -> None:
        torch.set_num_threads(self.threads)  # of this thread
        waiting: list[Event] = []
        try:
            while True:
                runner.run(self._parts(waiting), _Collate(), compute, self._sink, self.device, self._note, self._unfit)
                waiting.pop().set()
        except UserError as error:
            self._lose(Lost(error, fatal=not isinstance(error, runner.DeviceFailed)))
        except Exception as error:
            self._lose(Lost(UserError(in_a_line(error), "Run the same command again."), fatal=False))
        while True:  # nothing is computed any more
            for event in waiting:
                event.set()
            got = self._shares.get()
            waiting = [got if isinstance(got, Event) else got[1]]

    def _parts(self, waiting: list[Event]) -> Iterator[Part]:
        while not isinstance(got := self._shares.get(), Event):
            share, begun = got
            waiting.append(begun)
            pin = self.device.type == "cuda"
            collator = VarlenCollator(_Texts(share), share.segments, share.embedded, share.plan, pin)
            for pack in range(len(share.plan)):
                yield collator, share.numbers, pack
            waiting.pop().set()
        waiting.append(got)

    def _lose(self, lost: Lost) -> None:
        with self._lock:
            self._done.lost = lost

    def _note(self, text: str) -> None:
        with self._lock:
            self._done.notes.append(text)

    def _unfit(self, part: Part) -> None:
        collator, numbers, item = part
        with self._lock:
            self._done.unfit.append(int(numbers[collator.segments_of(item)[0]]))

    def _sink(self, batch: PackedBatch, found: Embeddings) -> None:
        store_dtype = runner.store_dtype(self.config.store_dtype)
        if batch.weights is None:  # whole proteins leave as they are stored
            found.pooled = {
                key: rows if key[0] == "unmasked" else rows.to(store_dtype) for key, rows in found.pooled.items()
            }
        assert found.finite is not None
        rows = Rows(
            batch.segments, batch.lengths, {key: each.numpy() for key, each in found.pooled.items()},
            {layer: each[: batch.used].numpy() for layer, each in found.residue.items()}, found.finite.numpy(),
        )  # fmt: skip
        with self._lock:
            self._done.rows.append(rows)
