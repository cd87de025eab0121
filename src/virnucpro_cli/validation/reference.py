"""The oracle: fair-esm's own ESM2 class, one unpadded sequence at a time.

Shares no code with the fast path, so that it can judge it.
"""

from collections.abc import Sequence
from functools import cache

import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2 as FairESM2
from esm.rotary_embedding import RotaryEmbedding

from virnucpro_cli.model.spec import ModelSpec


class Reference:
    """fair-esm's model with the given state (fair-esm's names) on one device.

    dtype: fp32 is the definition. In another dtype the model is run plainly, but its rotary tables are kept in fp32
    (fair-esm's `.half()` would round them) or, for fp64, computed in fp64; that is the noise floor of the dtype.
    """

    def __init__(
        self,
        spec: ModelSpec,
        state: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.spec, self.device = spec, torch.device(device)
        self.alphabet = _alphabet()
        with torch.device("meta"):
            self.model = FairESM2(spec.layers, spec.hidden, spec.heads, alphabet=self.alphabet).eval()
        self.model.to_empty(device=self.device).to(dtype)
        inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"]
        full = dict(state)
        for i in range(spec.layers):
            full[f"layers.{i}.self_attn.rot_emb.inv_freq"] = inv_freq
        missing, unexpected = self.model.load_state_dict(full, strict=False)
        left_over = [name for name in missing if not name.startswith(("lm_head.", "contact_head."))]
        if unexpected or left_over:
            raise RuntimeError(f"tensors that fair-esm's class does not take: {unexpected}, or lacks: {left_over}")
        if dtype != torch.float32:
            tables = torch.float64 if dtype == torch.float64 else torch.float32
            for layer in self.model.layers:
                layer.self_attn.rot_emb = _WideRotary(inv_freq.to(self.device, tables))

    def embed(self, sequence: str | list[int], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden rows of one sequence, with `<cls>` and `<eos>`: layer -> [length + 2, D] on the device."""
        ids = encode(sequence) if isinstance(sequence, str) else sequence
        return {layer: rows[0] for layer, rows in self._run(torch.tensor([ids]), layers).items()}

    def embed_padded(self, encoded: list[list[int]], layers: Sequence[int]) -> list[dict[int, torch.Tensor]]:
        """The same for several sequences as one ordinary padded batch."""
        tokens = torch.full((len(encoded), max(map(len, encoded))), self.alphabet.padding_idx)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        found = self._run(tokens, layers)
        return [{layer: found[layer][i, : len(ids)] for layer in layers} for i, ids in enumerate(encoded)]

    @torch.inference_mode()
    def _run(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        return self.model(tokens.to(self.device), repr_layers=list(layers))["representations"]


def described(device: str) -> str:
    """The reference in words, for reports."""
    return f"fair-esm in float32 on {device}, eager, one at a time"


@cache
def _alphabet() -> Alphabet:
    return Alphabet.from_architecture("ESM-1b")


def encode(text: str, longest: int | None = None) -> list[int]:
    """Token ids of a cleaned sequence (`clean`), cut after `longest` residues, with `<cls>` and `<eos>`."""
    return [_alphabet().cls_idx, *_alphabet().encode(text)[:longest], _alphabet().eos_idx]


class _WideRotary(RotaryEmbedding):
    """fair-esm's rotary embedding, computed in the dtype of `inv_freq` whatever the model's."""

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__(2 * len(inv_freq))
        self.inv_freq = inv_freq

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = super().forward(q.to(self.inv_freq.dtype), k.to(self.inv_freq.dtype))
        return wide[0].to(q.dtype), wide[1].to(k.dtype)
