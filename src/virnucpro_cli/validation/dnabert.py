"""The oracle of DNABERT-S: multimolecule's class if that is installed, else the published definition as it reads.

multimolecule is under the AGPL, so this program does not bring it along.
"""

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from virnucpro_cli.model.locate import Weights
from virnucpro_cli.model.spec import ModelSpec, State
from virnucpro_cli.validation.oracle import Oracle
from virnucpro_cli.validation.plain_reader import Letters

try:
    version("multimolecule")  # a folder of its code alone has none, and no report could name it
    from multimolecule import DnaBertSConfig, DnaBertSModel
except ImportError:
    DnaBertSModel = None

PAD, EPS = 3, 1e-12
NAMES = {
    "embed_tokens": "embeddings.word_embeddings", "embed_type": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.layer_norm", "layers": "encoder.layer", "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key", "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense", "self_attn_norm": "attention.output.layer_norm",
    "mlp_norm": "mlp.layer_norm",
}  # fmt: skip
"""Names here, and multimolecule's."""


class OfNucleotides(Oracle):
    """The model with the given state (its names here). tokenizer: the file that makes tokens of a sequence."""

    package = "multimolecule" if DnaBertSModel is not None else "torch"
    pad = PAD
    letters = Letters({letter: letter for letter in "ACGTN"} | {"U": "T", "-": "N", ".": "N"}, "N")
    tokenizer: ClassVar[Any] = None

    def made(self, state: State) -> Any:
        state = {name: each.to(self.device, self.dtype) for name, each in state.items() if "inv_freq" not in name}
        if DnaBertSModel is None:
            return _as_published(self.spec, state)
        return _of_multimolecule(self.spec, state, self.device)

    @classmethod
    def reading_by(cls, tokenizer: Path | None) -> "type[OfNucleotides]":
        """The same with a tokenizer's file; None for random weights, which have none."""
        from tokenizers import Tokenizer

        from virnucpro_cli.fasta.tokenised import encoder

        if tokenizer is None:
            return type(cls.__name__, (cls,), {"tokenizer": encoder(None)})
        whole = Tokenizer.from_file(str(tokenizer))
        whole.no_padding()
        whole.no_truncation()
        return type(cls.__name__, (cls,), {"tokenizer": whole})

    @classmethod
    def encode(cls, text: str, longest: int | None = None) -> list[int]:
        """Token ids of a cleaned sequence, cut after `longest` tokens, with `[CLS]` and `[SEP]`."""
        pieces = text.replace("<mask>", "N")
        return [1, *cls.tokenizer.encode(pieces, add_special_tokens=False).ids[:longest], 2]

    def hidden(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """tokens: int64 [B, L]; layer -> [B, L, D] in the model's dtype."""
        found = self.model(tokens, tokens != PAD)
        return {layer: found[layer] for layer in layers}

    @classmethod
    def environment(cls, weights: Weights, device: torch.device) -> dict[str, str]:
        """Versions, weights and the oracle that runs on the device, in words for reports."""
        words = super().environment(weights, device)
        if DnaBertSModel is None:
            words["reference"] = words["reference"].replace("torch in", "the published definition in plain PyTorch in")
            words["reference"] += " (multimolecule, if it is installed, is the judge instead)"
        return words


def _of_multimolecule(spec: ModelSpec, state: dict[str, torch.Tensor], device: torch.device) -> Any:
    config = DnaBertSConfig(
        hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
        intermediate_size=state["layers.0.mlp.down_proj.weight"].shape[1], pad_token_id=PAD,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = DnaBertSModel(config).eval().to(device, state["embed_tokens.weight"].dtype)
    theirs = {}
    for name, each in state.items():
        for ours, its in NAMES.items():
            name = name.replace(f"{ours}.", f"{its}.")
        theirs[name] = each
    for i in range(spec.layers):
        gate, up = (theirs.pop(f"encoder.layer.{i}.mlp.{x}_proj.weight") for x in ("gate", "up"))
        theirs[f"encoder.layer.{i}.mlp.up_proj.weight"] = torch.cat([gate, up])
    lacking = [name for name in model.load_state_dict(theirs, strict=False).missing_keys if "pooler" not in name]
    if lacking:
        raise RuntimeError(f"multimolecule's model has {lacking[0]}, which is not in the state")

    def run(tokens: torch.Tensor, there: torch.Tensor) -> Any:
        return model(tokens, attention_mask=there.long(), output_hidden_states=True).hidden_states

    return run


def _as_published(spec: ModelSpec, state: dict[str, torch.Tensor]) -> Any:
    """The network as the paper and the published code have it, for a padded batch."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (spec.hidden,), state[f"{name}.weight"], state[f"{name}.bias"], EPS)

    def attention(x: torch.Tensor, at: str, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x, f"{at}.self_attn.{each}_proj").unflatten(-1, (spec.heads, -1)) for each in "qkv")
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]) + bias
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return norm(linear(mixed.flatten(2), f"{at}.self_attn.out_proj") + x, f"{at}.self_attn_norm")

    def run(tokens: torch.Tensor, there: torch.Tensor) -> list[torch.Tensor]:
        x = norm(state["embed_tokens.weight"][tokens] + state["embed_type.weight"][0], "embed_norm")
        place = torch.arange(tokens.shape[1], device=x.device)
        fall = torch.tensor(slopes(spec.heads), device=x.device, dtype=torch.float64)[:, None, None]
        bias = (-fall * (place[:, None] - place).abs())[None].masked_fill(~there[:, None, None], -1e4).to(x.dtype)
        every = [x]
        for i in range(spec.layers):
            at = f"layers.{i}"
            x = attention(x, at, bias)
            inner = F.gelu(linear(x, f"{at}.mlp.gate_proj")) * linear(x, f"{at}.mlp.up_proj")
            x = norm(linear(inner, f"{at}.mlp.down_proj") + x, f"{at}.mlp_norm")
            every.append(x)
        return every

    return run


def slopes(heads: int) -> list[float]:
    """Slopes of ALiBi for a number of heads, as Press et al. 2022 choose them."""
    if math.log2(heads).is_integer():
        ratio = 2.0 ** (-(2.0 ** -(math.log2(heads) - 3)))
        return [ratio ** (i + 1) for i in range(heads)]
    nearest = 2 ** math.floor(math.log2(heads))
    return slopes(nearest) + slopes(2 * nearest)[0::2][: heads - nearest]
