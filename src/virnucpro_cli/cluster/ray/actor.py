"""An actor: a model on a device of some node. It takes shares of the plan, and answers with messages to the dealer."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.engine.dealing import Message, lost_by, used_here
from virnucpro_cli.engine.placer import rows_of
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.families import build, parameters
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import Int64, Plan, Segments
from virnucpro_cli.texts import ranges


class Share(NamedTuple):
    """Some packs, whole: the plan of them with its own numbers, and the tokens of their records.

    tokens: uint8 or uint16, one record behind the other, `sizes` int32 of each; numbers: int64, segments in the whole
    plan.
    """

    tokens: NDArray[Any]
    sizes: NDArray[np.int32]
    embedded: NDArray[np.int32]
    segments: Segments
    plan: Plan
    numbers: Int64
    reading: Reading


class Texts:
    """The tokens of a share's records, as a collator wants them."""

    def __init__(self, share: Share):
        self.sizes, self._tokens, self.reading = share.sizes, share.tokens, share.reading
        self._ends = np.cumsum(share.sizes, dtype=np.int64)

    def check_unchanged(self) -> None:
        """Nothing: a share came whole, and no file can change beneath it."""

    def tokens(self, records: Int64) -> NDArray[Any]:
        """Tokens of records int64 [n], one behind the other, uint8 or uint16 [tokens of all]."""
        size = self.sizes[records].astype(np.int64)
        return self._tokens[ranges(self._ends[records] - size, size)]


Part = tuple[VarlenCollator, Int64, Any]
"""A pack of a share: the share's collator, the numbers of its segments in the whole plan, and the collator's item."""


class Collate:
    """The collator of items of many shares."""

    def __call__(self, part: Part) -> PackedBatch:
        collator, numbers, item = part
        batch = collator(item)
        return replace(batch, segments=numbers[batch.segments])

    def parts(self, part: Part, tokens: int) -> list[Part]:
        collator, numbers, item = part
        return [(collator, numbers, each) for each in collator.parts(item, tokens)]


class Actor:
    """A model on a device. One thread computes while there are shares; calls hand them in and take messages out."""

    def __init__(self, config: EmbedConfig, device: str, dtype: torch.dtype, threads: int):
        self.config, self.name, self.dtype, self.threads = config, device, dtype, threads
        self._shares: SimpleQueue[Share | None] = SimpleQueue()
        self._answers: SimpleQueue[None] = SimpleQueue()
        self._messages: list[Message] = []
        self._lock = Lock()

    def look(self) -> list[Message]:
        """Say where it is. Raises UserError for a device or backend that is not to be had here."""
        import ray

        torch.set_num_threads(self.threads)
        exact_arithmetic()
        self.device = devices.resolve_device(self.name)
        config = self.config
        self.backend = attention_backends.resolve(config.attention, self.device, self.dtype, config.residual)
        node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        return [("device", devices.device_here(self.device, self.backend), node_id)]

    def load(self, weights: locate.Weights, layers: tuple[int, ...]) -> list[Message]:
        """Begin with the weights that are on this node, if the same are there."""
        here = None
        if all(Path(file).is_file() for file in weights.files):
            random = weights.base_sha256 if weights.seed is not None else ""
            with suppress(UserError, OSError):
                here = locate.verified(replace(weights, sha256=random, base_sha256="", states=()))
        if here is None or here.sha256 != weights.sha256:
            return [("no weights",)]
        return self.take(model_weights.load(here), layers)

    def take(self, loaded: tuple[ModelSpec, dict[str, Any], tuple[str, ...]], layers: tuple[int, ...]) -> list[Message]:
        """Begin with weights that were sent. Raises UserError if they do not fit the device."""
        spec, state, _ = loaded
        with warnings.catch_warnings(action="ignore"):  # that those in Ray's store cannot be written
            state = {key: torch.as_tensor(each) for key, each in state.items()}
        devices.check_room(self.device, parameters(spec) * self.dtype.itemsize, f"The weights of {spec.name}")
        model = build(spec, state, self.dtype, self.device, self.backend)
        Thread(target=self._compute, args=(runner.compute_with(model, layers, self.config),), daemon=True).start()
        return [("done", used_here(self.device))]

    def work(self, share: Share | None) -> list[Message]:
        """Take a share on, answered when it is begun, with what was done by then; None: answered when all is done."""
        self._shares.put(share)
        self._answers.get()
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def _say(self, *message: Any) -> None:
        with self._lock:
            self._messages.append(message)

    def _compute(self, compute: runner.Compute) -> None:
        torch.set_num_threads(self.threads)  # of this thread
        note = partial(self._say, "note")
        try:
            while True:
                runner.run_packs(self._parts(), Collate(), compute, self._sink, self.device, note, self._unfit)
                self._say("done", used_here(self.device))
                self._answers.put(None)
        except Exception as error:
            self._say("lost", lost_by(error))
        while True:  # nothing is computed any more
            self._answers.put(None)
            self._shares.get()

    def _parts(self) -> Iterator[Part]:
        pin = self.device.type == "cuda"
        while (share := self._shares.get()) is not None:
            self._say("begun")
            self._answers.put(None)
            collator = VarlenCollator(Texts(share), share.segments, share.embedded, share.plan, pin)
            yield from ((collator, share.numbers, pack) for pack in range(len(share.plan)))

    def _unfit(self, part: Part) -> None:
        collator, numbers, item = part
        self._say("unfit", int(numbers[collator.segments_of(item)[0]]))

    def _sink(self, batch: PackedBatch, embeddings: Embeddings) -> None:
        dtype = devices.store_dtype(self.config.store_dtype)
        if batch.weights is None:  # whole proteins leave as they are stored
            pooled = embeddings.pooled.items()
            embeddings.pooled = {key: rows if key[0] == "unmasked" else rows.to(dtype) for key, rows in pooled}
        self._say("rows", rows_of(batch, embeddings))
