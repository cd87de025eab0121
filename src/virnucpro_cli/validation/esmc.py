"""The oracle of ESM C: transformers' own class."""

from typing import Any

import torch
from transformers import EsmcConfig, EsmcModel
from transformers.models.esmc.tokenization_esmc import SEQUENCE_VOCAB

from virnucpro_cli.model.spec import State
from virnucpro_cli.validation.oracle import Oracle
from virnucpro_cli.validation.plain_reader import RESIDUES, Letters

IDS = {token: i for i, token in enumerate(SEQUENCE_VOCAB)}


class Reference(Oracle):
    """transformers' model with the given state (its own names), with eager attention.

    Its rotary frequencies are its own, in fp32 whatever the dtype, and its tables in fp64 for fp64.
    """

    package, pad = "transformers", IDS["<pad>"]
    letters = Letters({letter: letter for letter in f"{RESIDUES}|"})

    def made(self, state: State) -> Any:
        tensors = {name: each for name, each in state.items() if not name.startswith("lm_head.")}
        tensors = {name: each for name, each in tensors.items() if not name.endswith("inv_freq")}
        config = EsmcConfig(
            vocab_size=len(state["embed_tokens.weight"]), hidden_size=self.spec.hidden,
            num_hidden_layers=self.spec.layers, num_attention_heads=self.spec.heads,
            intermediate_size=len(state["layers.0.mlp.gate_proj.weight"]),
        )  # fmt: skip
        config._attn_implementation = "eager"
        model: Any = EsmcModel(config).eval()
        model.load_state_dict(tensors)
        inv_freq = model.rotary_emb.inv_freq.to(self.device, torch.float32, copy=True)
        model.to(self.device, self.dtype)
        model.rotary_emb = _WideRotary(inv_freq.double() if self.dtype == torch.float64 else inv_freq)
        return model

    @staticmethod
    def encode(text: str, longest: int | None = None) -> list[int]:
        """Token ids of a cleaned sequence, cut after `longest` residues, with `<cls>` and `<eos>`."""
        pieces = [[IDS[letter] for letter in piece] for piece in text.split("<mask>")]
        ids = pieces[0] + [i for piece in pieces[1:] for i in (IDS["<mask>"], *piece)]
        return [IDS["<cls>"], *ids[:longest], IDS["<eos>"]]


class _WideRotary(torch.nn.Module):
    """transformers' rotary tables, computed in the dtype of `inv_freq` whatever the model's."""

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__()
        self.inv_freq = inv_freq

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: of any dtype; position_ids: int64 [1, L]; returns cosines and sines [1, L, Dh] in the dtype of x."""
        angles = position_ids[..., None].to(self.inv_freq.dtype) * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)
