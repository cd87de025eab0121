"""An actor: a model on a device of some node."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.cluster.ray.messages import Looked, Returned, Rows, Share
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.engine.workers import Lost, used_here
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import ranges

AHEAD = 2
"""Shares that an actor has at a time: it computes one while the other travels."""


class Texts:
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


class Collate:
    """The collator of items of many shares."""

    def __call__(self, part: Part) -> PackedBatch:
        collator, numbers, item = part
        batch = collator(item)
        return replace(batch, segments=numbers[batch.segments])

    def parts(self, part: Part, tokens: int) -> list[Part]:
        collator, numbers, item = part
        return [(collator, numbers, each) for each in collator.parts(item, tokens)]


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


class Actor:
    """A model on a device of some node. One thread computes for as long as there are shares; calls hand them in and take rows out."""

    def __init__(self, config: EmbedConfig, device: str, dtype: torch.dtype, threads: int):
        self.config, self.name, self.dtype, self.threads = config, device, dtype, threads
        self._shares: SimpleQueue[tuple[Share, Event] | Event] = SimpleQueue()
        self._done, self._lock = Returned(), Lock()

    def look(self) -> Looked:
        """Raises UserError for a device or backend that is not to be had here."""
        torch.set_num_threads(self.threads)
        exact_arithmetic()
        self.device = devices.resolve_device(self.name)
        self.backend = attention_backends.resolve(self.config.attention, self.device, self.dtype)
        return Looked(devices.device_here(self.device, self.backend), _node_id())

    def load(self, weights: locate.Weights, layers: tuple[int, ...]) -> bool:
        """Begin with the weights that are on this node; False if the same are not there."""
        try:
            there = all(Path(file).is_file() for file in weights.files)
            here = locate.verified(replace(weights, sha256="", states=())) if there else None
            if here is None or here.sha256 != weights.sha256:
                return False
        except (UserError, OSError):
            return False
        return self.take(model_weights.load(here), layers)

    def take(self, loaded: tuple[ModelSpec, dict[str, Any], tuple[str, ...]], layers: tuple[int, ...]) -> bool:
        """Begin with weights that were sent."""
        spec, state, _ = loaded
        with warnings.catch_warnings(action="ignore"):  # that those in Ray's store cannot be written
            state = {key: torch.as_tensor(each) for key, each in state.items()}
        devices.check_room(self.device, spec.parameters * self.dtype.itemsize, f"The weights of {spec.name}")
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
                runner.run_packs(
                    self._parts(waiting), Collate(), compute, self._sink, self.device, self._note, self._unfit
                )
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
            collator = VarlenCollator(Texts(share), share.segments, share.embedded, share.plan, pin)
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
        store_dtype = devices.store_dtype(self.config.store_dtype)
        if batch.weights is None:  # whole proteins leave as they are stored
            found.pooled = {
                key: rows if key[0] == "unmasked" else rows.to(store_dtype) for key, rows in found.pooled.items()
            }
        assert found.finite is not None
        rows = Rows(
            batch.segments, batch.seqlens, {key: each.numpy() for key, each in found.pooled.items()},
            {layer: each[: batch.used].numpy() for layer, each in found.residue.items()}, found.finite.numpy(),
        )  # fmt: skip
        with self._lock:
            self._done.rows.append(rows)
