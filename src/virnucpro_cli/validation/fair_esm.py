"""The oracle of ESM-2: fair-esm's own class."""

from collections.abc import Sequence
from typing import Any

import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2

from virnucpro_cli.model.spec import State
from virnucpro_cli.validation.oracle import Oracle, WideRotary, fill

ALPHABET = Alphabet.from_architecture("ESM-1b")


def encode(text: str, longest: int | None = None) -> list[int]:
    """Token ids of a cleaned sequence, cut after `longest` residues, with `<cls>` and `<eos>`."""
    return [ALPHABET.cls_idx, *ALPHABET.encode(text)[:longest], ALPHABET.eos_idx]


class Reference(Oracle):
    """fair-esm's model with the given state (fair-esm's names).

    In another dtype than fp32 its rotary tables are kept in fp32 (fair-esm's `.half()` would round them) or, for fp64,
    computed in fp64.
    """

    package, pad = "fair-esm", ALPHABET.padding_idx
    encode = staticmethod(encode)

    def made(self, state: State) -> Any:
        with torch.device("meta"):
            model = ESM2(self.spec.layers, self.spec.hidden, self.spec.heads, alphabet=ALPHABET).eval()
        model.to_empty(device=self.device).to(self.dtype)
        inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"]
        tables = {f"layers.{i}.self_attn.rot_emb.inv_freq": inv_freq for i in range(self.spec.layers)}
        fill(model, state | tables, "lm_head.", "contact_head.")
        if self.dtype != torch.float32:
            wide = inv_freq.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)
            for layer in model.layers:
                layer.self_attn.rot_emb = WideRotary(layer.self_attn.rot_emb, wide)
        return model

    def hidden(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """tokens: int64 [B, L]; layer -> [B, L, D] in the model's dtype."""
        return self.model(tokens, repr_layers=list(layers))["representations"]
