"""The oracle of DPLM: transformers' own class, from which its authors' class takes the encoder."""

import re
from collections.abc import Sequence

import torch
from transformers import EsmConfig, EsmModel

from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.validation.fair_esm import ALPHABET, encode
from virnucpro_cli.validation.oracle import Oracle

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

    Its rotary tables are computed in fp32 whatever the dtype. Raises RuntimeError if tensors are missing or left over.
    """

    package, pad = "transformers", ALPHABET.padding_idx
    encode = staticmethod(encode)

    def __init__(
        self, spec: ModelSpec, state: dict[str, torch.Tensor], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(spec, state, device, dtype)
        config = EsmConfig(
            vocab_size=len(ALPHABET), mask_token_id=ALPHABET.mask_idx, pad_token_id=ALPHABET.padding_idx,
            hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
            intermediate_size=4 * spec.hidden, position_embedding_type="rotary", token_dropout=True,
            layer_norm_eps=1e-5, emb_layer_norm_before=False,
        )  # fmt: skip
        config._attn_implementation = "eager"
        self.model = EsmModel(config, add_pooling_layer=False).eval()
        tensors = {_name(name): tensor for name, tensor in state.items() if "_head." not in name}
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        if unexpected or [name for name in missing if not name.startswith("contact_head.")]:
            raise RuntimeError(f"tensors that transformers' class does not take: {unexpected}, or lacks: {missing}")
        self.model.to(self.device, dtype)
        rotary = self.model.rotary_embeddings
        assert rotary is not None
        rotary.inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"].to(self.device, torch.float32)

    @classmethod
    def fault_of(cls, release: str) -> str:
        """A release between FIRST_WRONG and FIRST_RIGHT is no judge."""
        is_wrong = FIRST_WRONG <= tuple(map(int, re.findall(r"\d+", release)[:2])) < FIRST_RIGHT
        return "scales padded proteins with `<mask>` by a wrong length" if is_wrong else ""

    def hidden(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """tokens: int64 [B, L]; layer -> [B, L, D] in the model's dtype."""
        found = self.model(input_ids=tokens, attention_mask=(tokens != self.pad).long(), output_hidden_states=True)
        return {layer: found.hidden_states[layer] for layer in layers}


def _name(name: str) -> str:
    """HuggingFace's name of a tensor of fair-esm."""
    if name.endswith("inv_freq"):
        return "rotary_embeddings.inv_freq"
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        return f"encoder.layer.{match[1]}.{PARTS[match[2]]}.{match[3]}"
    return name.replace("embed_tokens", "embeddings.word_embeddings").replace(
        "emb_layer_norm_after", "encoder.emb_layer_norm_after"
    )
