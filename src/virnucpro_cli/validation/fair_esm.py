"""The oracle of ESM-2: fair-esm's own class."""

from collections.abc import Sequence

import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2
from esm.rotary_embedding import RotaryEmbedding

from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.validation.oracle import Oracle

ALPHABET = Alphabet.from_architecture("ESM-1b")


def encode(text: str, longest: int | None = None) -> list[int]:
    """Token ids of a cleaned sequence, cut after `longest` residues, with `<cls>` and `<eos>`."""
    return [ALPHABET.cls_idx, *ALPHABET.encode(text)[:longest], ALPHABET.eos_idx]


class Reference(Oracle):
    """fair-esm's model with the given state (fair-esm's names).

    In another dtype than fp32 its rotary tables are kept in fp32 (fair-esm's `.half()` would round them) or, for fp64,
    computed in fp64. Raises RuntimeError if its class lacks tensors of the state, or the state lacks its tensors.
    """

    package, pad = "fair-esm", ALPHABET.padding_idx
    encode = staticmethod(encode)

    def __init__(
        self, spec: ModelSpec, state: dict[str, torch.Tensor], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(spec, state, device, dtype)
        with torch.device("meta"):
            self.model = ESM2(spec.layers, spec.hidden, spec.heads, alphabet=ALPHABET).eval()
        self.model.to_empty(device=self.device).to(dtype)
        inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"]
        tables = {f"layers.{i}.self_attn.rot_emb.inv_freq": inv_freq for i in range(spec.layers)}
        missing, unexpected = self.model.load_state_dict(state | tables, strict=False)
        left_over = [name for name in missing if not name.startswith(("lm_head.", "contact_head."))]
        if unexpected or left_over:
            raise RuntimeError(f"tensors that fair-esm's class does not take: {unexpected}, or lacks: {left_over}")
        if dtype != torch.float32:
            wide = inv_freq.to(self.device, torch.float64 if dtype == torch.float64 else torch.float32)
            for layer in self.model.layers:
                layer.self_attn.rot_emb = _WideRotary(wide)

    def hidden(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """tokens: int64 [B, L]; layer -> [B, L, D] in the model's dtype."""
        return self.model(tokens, repr_layers=list(layers))["representations"]


class _WideRotary(RotaryEmbedding):
    """fair-esm's rotary embedding, computed in the dtype of `inv_freq` whatever the model's."""

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__(2 * len(inv_freq))
        self.inv_freq = inv_freq

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k: [..., L, Dh] of any dtype; returns both rotated, in that dtype."""
        wide = super().forward(q.to(self.inv_freq.dtype), k.to(self.inv_freq.dtype))
        return wide[0].to(q.dtype), wide[1].to(k.dtype)
