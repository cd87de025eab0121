"""The oracle of DPLM: transformers' own class, from which its authors' class takes the encoder."""

import re
from typing import Any

import torch
from transformers import EsmConfig, EsmModel

from virnucpro_cli.model.spec import ModelSpec, State
from virnucpro_cli.validation.fair_esm import ALPHABET, encode
from virnucpro_cli.validation.oracle import Oracle, fill

PARTS = {
    "self_attn.q_proj": "attention.self.query", "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value", "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}  # fmt: skip
"""fair-esm's name of each part of a layer, and HuggingFace's."""
FIRST_WRONG, FIRST_RIGHT = (4, 56), (5, 3)
"""Releases from the first to before the second scale beside `<mask>` by the padded length of a batch."""


class Reference(Oracle):
    """transformers' model with the given state (fair-esm's names), with eager attention.

    Its rotary tables are computed in fp32 whatever the dtype.
    """

    package, pad = "transformers", ALPHABET.padding_idx
    encode = staticmethod(encode)

    def made(self, state: State) -> Any:
        model: Any = EsmModel(config_of(self.spec, "eager"), add_pooling_layer=False).eval()
        tensors = {_name(name): tensor for name, tensor in state.items() if "_head." not in name}
        fill(model, tensors, "contact_head.")
        model.to(self.device, self.dtype)
        model.rotary_embeddings.inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"].to(self.device, torch.float32)
        return model

    @classmethod
    def fault_of(cls, release: str) -> str:
        """A release between FIRST_WRONG and FIRST_RIGHT is no judge."""
        is_wrong = FIRST_WRONG <= tuple(map(int, re.findall(r"\d+", release)[:2])) < FIRST_RIGHT
        return "scales padded proteins with `<mask>` by a wrong length" if is_wrong else ""


def config_of(spec: ModelSpec, attention: str) -> Any:
    """HuggingFace's configuration of ESM-2, and the way in which it computes attention."""
    config = EsmConfig(
        vocab_size=len(ALPHABET), mask_token_id=ALPHABET.mask_idx, pad_token_id=ALPHABET.padding_idx,
        hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
        intermediate_size=4 * spec.hidden, position_embedding_type="rotary", token_dropout=True,
        layer_norm_eps=1e-5, emb_layer_norm_before=False,
    )  # fmt: skip
    config._attn_implementation = attention
    return config


def _name(name: str) -> str:
    """HuggingFace's name of a tensor of fair-esm."""
    if name.endswith("inv_freq"):
        return "rotary_embeddings.inv_freq"
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"encoder.layer.{match[1]}.{PARTS[match[2]]}.{match[3]}"
    return name.replace("embed_tokens", "embeddings.word_embeddings").replace(
        "emb_layer_norm_after", "encoder.emb_layer_norm_after"
    )
