"""The oracle of LucaVirus: its authors' own class."""

import re
from typing import Any, ClassVar

import torch
from lucavirus import LucaVirusConfig, LucaVirusModel, LucaVirusTokenizer

from virnucpro_cli.model.spec import State
from virnucpro_cli.validation.oracle import Oracle, WideRotary
from virnucpro_cli.validation.plain_reader import RESIDUES, Letters

TOKENIZER = LucaVirusTokenizer()
NORMS = {"self_attn_layer_norm": "pre_layer_norm", "final_layer_norm": "post_layer_norm"}
"""fair-esm's names of LayerNorms, and the authors'."""


class Reference(Oracle):
    """The authors' model with the given state (fair-esm's names), on proteins.

    Its rotary tables are computed in fp32 whatever the dtype, and in fp64 for fp64.
    """

    package, pad = "lucavirus", TOKENIZER.padding_idx
    letters = Letters({letter: letter for letter in f"{RESIDUES}J*"})
    seq_type: ClassVar[str] = "prot"

    def made(self, state: State) -> Any:
        spec = self.spec
        model: Any = LucaVirusModel(
            LucaVirusConfig(hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads)
        ).eval()
        tensors = {_name(name): tensor for name, tensor in state.items() if not name.startswith("lm_head.")}
        inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"]
        tensors |= {f"encoder.layers.{i}.self_attn.rot_emb.inv_freq": inv_freq for i in range(spec.layers)}
        model.load_state_dict(tensors)
        model.to(self.device, self.dtype)
        wide = inv_freq.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        for layer in model.encoder.layers:
            layer.self_attn.rot_emb = WideRotary(layer.self_attn.rot_emb, wide)
        return model

    @classmethod
    def encode(cls, text: str, longest: int | None = None) -> list[int]:
        """Token ids of a cleaned sequence, cut after `longest` residues, with `[CLS]` and `[SEP]`."""
        pieces = [TOKENIZER.encode(piece, cls.seq_type, add_special_tokens=False) for piece in text.split("<mask>")]
        ids = pieces[0] + [i for piece in pieces[1:] for i in (TOKENIZER.mask_idx, *piece)]
        return [TOKENIZER.cls_idx, *ids[:longest], TOKENIZER.eos_idx]

    def more(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The kind of each of the tokens, int64 [B, L]."""
        return {"token_type_ids": torch.full_like(tokens, self.seq_type == "prot")}


class OfNucleotides(Reference):
    """The same model on nucleotides."""

    letters = Letters({letter: letter for letter in "ACGTN"} | {"U": "T", "-": "N", ".": "N"}, "N")
    seq_type = "gene"


def _name(name: str) -> str:
    """The authors' name of a tensor of fair-esm."""
    if name.startswith("embed_"):
        return f"embeddings.{name}"
    name = name.replace("emb_layer_norm_after", "last_layer_norm")
    return "encoder." + re.sub("|".join(NORMS), lambda norm: NORMS[norm[0]], name)
