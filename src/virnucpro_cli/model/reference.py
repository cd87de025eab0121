"""The oracle: fair-esm's own ESM2 class in fp32, one unpadded sequence at a time. Shares no code with the fast path."""

from collections.abc import Sequence

import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2 as FairESM2

from virnucpro_cli.model.spec import ModelSpec


class Reference:
    """fair-esm's model with the given state (fair-esm's names) on one device, in fp32 unless said otherwise."""

    def __init__(
        self,
        spec: ModelSpec,
        state: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.spec, self.device = spec, torch.device(device)
        self.alphabet = Alphabet.from_architecture("ESM-1b")
        self.model = FairESM2(spec.layers, spec.hidden, spec.heads, alphabet=self.alphabet).eval()
        inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"]
        full = dict(state)
        for i in range(spec.layers):
            full[f"layers.{i}.self_attn.rot_emb.inv_freq"] = inv_freq
        missing, unexpected = self.model.load_state_dict(full, strict=False)
        left_over = [name for name in missing if not name.startswith(("lm_head.", "contact_head."))]
        assert not unexpected and not left_over, (unexpected, left_over)
        self.model.to(self.device, dtype)

    @torch.inference_mode()
    def embed(self, sequence: str, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden rows of one sequence, with `<cls>` and `<eos>`: layer -> [length + 2, D] on the device."""
        ids = [self.alphabet.cls_idx, *self.alphabet.encode(sequence), self.alphabet.eos_idx]
        tokens = torch.tensor([ids], device=self.device)
        out = self.model(tokens, repr_layers=list(layers))
        return {layer: out["representations"][layer][0] for layer in layers}
