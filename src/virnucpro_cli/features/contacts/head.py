"""Contacts as fair-esm predicts them: a logistic regression on the attention maps of every layer and head.

See fair-esm's modules.py, ContactPredictionHead.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.engine.runner import copied
from virnucpro_cli.errors import UserError
from virnucpro_cli.features.contacts import totals
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.families import build
from virnucpro_cli.model.locate import Weights
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.model.spec import CONTACT_HEAD, ModelSpec, State
from virnucpro_cli.model.weights import heads_in, read_tensors
from virnucpro_cli.plan.packing import SPECIAL_TOKENS

ROW_WIDTHS = 20
"""A row of a forward takes so many widths of the model."""


class Contacts:
    """The contact head over a packed forward. state: with the tensors of the contact head."""

    def __init__(
        self,
        spec: ModelSpec,
        state: State,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        store_dtype: torch.dtype = torch.float32,
    ):
        exact_arithmetic()
        self.attention, self.store_dtype = backend.attention, store_dtype
        self.model = build(spec, state, dtype, device, backend).with_attention(self._attention)
        self.weight = state[f"{CONTACT_HEAD}.weight"].to(device, torch.float32).view(spec.layers, spec.heads)
        self.bias = state[f"{CONTACT_HEAD}.bias"].to(device, torch.float32)
        self.is_fused = totals.refusal(device) is None
        self.totals: totals.Totals | None = None

    def start(self, batch: PackedBatch) -> Callable[[], list[tuple[torch.Tensor, bool]]]:
        """Begin a batch. What is returned waits for the probabilities [L, L] of each protein.

        They are in the store dtype, on the host, each with whether all are finite.
        """
        batch = batch.to(self.model.device)
        with torch.inference_mode():
            self.totals = totals.Totals(batch, self.weight, self.is_fused)
            try:
                self.model.forward(batch, (self.model.spec.layers,), lambda layer, hidden: None)
                found, sizes = self.totals.probabilities(self.bias), self.totals.sizes.tolist()
            finally:
                self.totals = None
            squares = [size * size for size in sizes]
            is_finite = torch.stack([each.isfinite().all() for each in found.split(squares)])
            wait = copied(found.to(self.store_dtype), is_finite)

        def finish() -> list[tuple[torch.Tensor, bool]]:
            values, flags = wait()
            maps = [each.view(size, size) for each, size in zip(values.split(squares), sizes, strict=True)]
            return list(zip(maps, flags.tolist(), strict=True))

        return finish

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float, *left: torch.Tensor
    ) -> torch.Tensor:
        assert self.totals is not None and not left  # no family with norms of q and k has a contact regression
        self.totals.add(q, k, scale)
        return self.attention(q, k, v, batch, scale)


def bytes_needed(spec: ModelSpec, sizes: list[int]) -> int:
    """Memory beside the weights, for a batch of proteins of so many residues."""
    rows, longest = sum(sizes) + SPECIAL_TOKENS * len(sizes), max(sizes) + SPECIAL_TOKENS
    kept = 3 * sum(size * size for size in sizes) + rows * spec.layers * spec.heads
    scratch = 4 * min(totals.VALUES_AT_ONCE, spec.heads * longest**2) + 3 * longest**2
    return 4 * (kept + scratch + ROW_WIDTHS * rows * spec.hidden)


def regression_beside(weights: Weights) -> list[Path]:
    """The file in which fair-esm keeps the contact regression of a checkpoint, if it is not in the checkpoint."""
    return [path.with_name(f"{path.stem}-contact-regression.pt") for path in weights.files[:1]]


def with_contact_head(state: State, spec: ModelSpec, weights: Weights) -> State:
    """The state with the contact head, its own or from the file beside it. Raises UserError if neither has it."""
    if f"{CONTACT_HEAD}.weight" in state:
        return state
    beside = regression_beside(weights)
    for path in filter(Path.is_file, beside):
        head = heads_in(read_tensors(path), spec)
        if f"{CONTACT_HEAD}.weight" in head:
            return state | head
        raise UserError(f"{path} is not the contact regression of {spec.name}.", "Fetch or copy it again.")
    looked = ", ".join([f"{CONTACT_HEAD}.* in {weights.place}", *map(str, beside)])
    raise UserError(
        f"The weights of {weights.name} have no contact regression; looked for {looked}.",
        "Put fair-esm's contact regression of this model there, use HuggingFace's weights, or leave contacts out.",
    )
