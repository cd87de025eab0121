"""Contacts as fair-esm predicts them: a logistic regression on the attention maps of every layer and head.

One protein at a time. Maps are materialised a layer at a time and added up at once, so that memory holds one layer's.
"""

from pathlib import Path

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.families import build, family_of
from virnucpro_cli.model.kernels import plain
from virnucpro_cli.model.locate import Weights
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.model.spec import CONTACT_HEAD, ModelSpec, State
from virnucpro_cli.model.weights import heads_in, read_tensors

MAPS_AT_ONCE = 4


class Contacts:
    """The contact head over an fp32 forward in plain steps. state: with the tensors of the contact head."""

    def __init__(self, spec: ModelSpec, state: State, device: torch.device):
        exact_arithmetic()
        backend = Backend("contacts", self._attention, plain)
        self.model = build(spec, state, torch.float32, device, backend)
        self.weight = state[f"{CONTACT_HEAD}.weight"].to(device, torch.float32).view(spec.layers, spec.heads)
        self.bias = state[f"{CONTACT_HEAD}.bias"].to(device, torch.float32)
        self.logits: list[torch.Tensor] = []

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Probabilities float32 [L, L] of a batch of one protein, on the host."""
        try:
            self.model.forward(batch.to(self.model.device), (self.model.spec.layers,), lambda layer, hidden: None)
            logits = torch.stack(self.logits).sum(dim=0, dtype=torch.float64)
            return (logits + self.bias).sigmoid().float().cpu()
        finally:
            self.logits = []

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float
    ) -> torch.Tensor:
        """Attention of the only segment, float32 [T, H, Dh]; this layer's share of the logits [L, L] is kept.

        See fair-esm's modules.py, ContactPredictionHead.
        """
        (length,) = batch.seqlens.tolist()
        q, k, v = (x[:length].transpose(0, 1) for x in (q, k, v))  # [H, length, Dh]
        maps = torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1)
        out = torch.zeros(len(batch.tokens), *q.shape[::2], device=q.device)
        out[:length] = (maps @ v).transpose(0, 1)
        maps = maps[:, 1:-1, 1:-1]  # of residues
        maps = maps + maps.transpose(1, 2)
        rows = maps.sum(dim=2, keepdim=True)
        maps -= rows * rows.transpose(1, 2) / rows.sum(dim=1, keepdim=True)  # average product correction
        self.logits.append(torch.einsum("h,hij->ij", self.weight[len(self.logits)], maps))
        return out


def bytes_needed(spec: ModelSpec, residues: int) -> int:
    """Memory beside the weights, for a protein of so many residues."""
    return 4 * (residues + 2) ** 2 * (MAPS_AT_ONCE * spec.heads + 3 * spec.layers)


def regression_beside(weights: Weights) -> list[Path]:
    """The file in which fair-esm keeps the contact regression of a checkpoint, if it is not in the checkpoint."""
    return [path.with_name(f"{path.stem}-contact-regression.pt") for path in weights.files[:1]]


def with_contact_head(state: State, spec: ModelSpec, weights: Weights) -> State:
    """The state with the contact head, its own or from the file beside it. Raises UserError if neither has it."""
    if f"{CONTACT_HEAD}.weight" in state:
        return state
    if CONTACT_HEAD not in family_of(spec).head_shapes(spec):
        raise UserError(f"{spec.name} has no contact regression.", "Leave contacts out.")
    beside = regression_beside(weights)
    for path in filter(Path.is_file, beside):
        head = heads_in(read_tensors(path), spec)
        if f"{CONTACT_HEAD}.weight" in head:
            return state | head
        raise UserError(f"{path} is not the contact regression of {spec.name}.", "Fetch or copy it again.")
    looked = ", ".join([f"{CONTACT_HEAD}.* in {weights.place}", *map(str, beside)])
    raise UserError(
        f"The weights of {weights.name} have no contact regression; looked for {looked}.",
        f"Put fair-esm's {spec.name}-contact-regression.pt there, use HuggingFace's weights, or leave contacts out.",
    )
