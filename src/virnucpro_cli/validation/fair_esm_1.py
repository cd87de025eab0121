"""The oracle of ESM-1b and ESM-1v: fair-esm's own class."""

from argparse import Namespace
from collections.abc import Sequence

import torch
from esm.model.esm1 import ProteinBertModel

from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.validation.fair_esm import ALPHABET, encode
from virnucpro_cli.validation.oracle import Oracle


class Reference(Oracle):
    """fair-esm's model with the given state (fair-esm's names). The first LayerNorm is there if the state has it.

    Raises RuntimeError if its class lacks tensors of the state, or the state lacks its tensors.
    """

    package, pad = "fair-esm", ALPHABET.padding_idx
    encode = staticmethod(encode)

    def __init__(
        self, spec: ModelSpec, state: dict[str, torch.Tensor], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(spec, state, device, dtype)
        args = Namespace(
            arch="roberta_large", layers=spec.layers, embed_dim=spec.hidden, ffn_embed_dim=4 * spec.hidden,
            attention_heads=spec.heads, max_positions=1024, token_dropout=True,
            emb_layer_norm_before="emb_layer_norm_before.weight" in state,
        )  # fmt: skip
        with torch.device("meta"):
            self.model = ProteinBertModel(args, ALPHABET).eval()
        self.model.to_empty(device=self.device).to(dtype)
        tensors = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        left_over = [name for name in missing if not name.startswith(("lm_head.", "contact_head."))]
        if unexpected or left_over:
            raise RuntimeError(f"tensors that fair-esm's class does not take: {unexpected}, or lacks: {left_over}")

    def hidden(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """tokens: int64 [B, L]; layer -> [B, L, D] in the model's dtype."""
        return self.model(tokens, repr_layers=list(layers))["representations"]
