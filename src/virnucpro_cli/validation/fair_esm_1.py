"""The oracle of ESM-1b and ESM-1v: fair-esm's own class."""

from argparse import Namespace
from typing import Any

import torch
from esm.model.esm1 import ProteinBertModel

from virnucpro_cli.model.spec import State
from virnucpro_cli.validation import fair_esm
from virnucpro_cli.validation.fair_esm import ALPHABET
from virnucpro_cli.validation.oracle import fill


class Reference(fair_esm.Reference):
    """fair-esm's model with the given state (fair-esm's names). The first LayerNorm is there if the state has it."""

    def made(self, state: State) -> Any:
        args = Namespace(
            arch="roberta_large", layers=self.spec.layers, embed_dim=self.spec.hidden,
            ffn_embed_dim=4 * self.spec.hidden, attention_heads=self.spec.heads, max_positions=1024, token_dropout=True,
            emb_layer_norm_before="emb_layer_norm_before.weight" in state,
        )  # fmt: skip
        with torch.device("meta"):
            model = ProteinBertModel(args, ALPHABET).eval()
        model.to_empty(device=self.device).to(self.dtype)
        tensors = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
        fill(model, tensors, "lm_head.", "contact_head.")
        return model
