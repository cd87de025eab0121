"""DNABERT-S: checkpoints, and the weights of its forward. The network is MosaicBERT, and DNABERT-2's too.

LayerNorm comes after each sum, positions are distances (ALiBi), and tokens are of several bases.
"""

import re
from typing import TYPE_CHECKING

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.model.spec import APACHE, Family, Licence, ModelSpec, Shapes, State

if TYPE_CHECKING:
    import torch

    from virnucpro_cli.model.packed import Parts
    from virnucpro_cli.model.plain import Pair

EPS = 1e-12
VOCABULARY = 4096
TYPES, NORM = "embed_type.weight", "embed_norm"
_LAYER = r"(?:bert\.|model\.)?encoder\.layer\.(\d+)\."
_EMBEDDINGS = r"(?:bert\.|model\.)?embeddings\."


def inner_of(spec: ModelSpec) -> int:
    """Width inside the gated unit, by default four times the model's."""
    return spec.inner or 4 * spec.hidden


class Dnabert(Family):
    """The family. It has no heads, and does not use the `INV_FREQ` that every state has."""

    TITLE = "DNABERT-S"
    TOKENIZER = ("tokenizer.json", "667f5a0e6e9630f7052b004784dda7c7aeba395cc4ca3c01b11b02e6aa29d7b1")
    STEPS = "postnorm"
    NUCLEOTIDES = Reading("ACGTN", 5, 1, 3, 2, 4, "N", (("U", "T"), ("-", "N"), (".", "N")), 4, False, width=VOCABULARY)
    """Letters before they are joined to tokens, with the ids of the first and the last token."""
    NAMES = tuple((re.compile(pattern), template) for pattern, template in (
        (_EMBEDDINGS + r"word_embeddings\.weight", "embed_tokens.weight"),
        (_EMBEDDINGS + r"token_type_embeddings\.weight", TYPES),
        (_EMBEDDINGS + r"(?:LayerNorm|layer_norm)\.(weight|bias)", rf"{NORM}.\1"),
        (_LAYER + r"attention\.self\.Wqkv\.(weight|bias)", r"layers.\1.self_attn.qkv_proj.\2"),
        *((_LAYER + rf"attention\.self\.{word}\.(weight|bias)", rf"layers.\1.self_attn.{word[0]}_proj.\2")
          for word in ("query", "key", "value")),
        (_LAYER + r"attention\.output\.dense\.(weight|bias)", r"layers.\1.self_attn.out_proj.\2"),
        (_LAYER + r"attention\.output\.(?:LayerNorm|layer_norm)\.(weight|bias)", r"layers.\1.self_attn_norm.\2"),
        (_LAYER + r"mlp\.(?:gated_layers|up_proj)\.weight", r"layers.\1.mlp.gate_up_proj.weight"),
        (_LAYER + r"mlp\.(?:wo|down_proj)\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
        (_LAYER + r"mlp\.(?:layernorm|layer_norm)\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
    ))  # fmt: skip
    """Names of the published file, of DNABERT-2's, and of the package multimolecule."""
    LEFT_OUT = re.compile(r"(?:bert\.|model\.)?(pooler|cls|lm_head|classifier)\..*|.*\.position_ids|.*\balibi")
    SETTINGS = {
        "layers": ("num_hidden_layers",),
        "hidden": ("hidden_size",),
        "heads": ("num_attention_heads",),
        "inner": ("intermediate_size",),
    }
    CONFIG = {
        "vocab_size": (VOCABULARY, 30522),
        "alibi_starting_size": (512, None),
        "hidden_act": ("gelu", "gelu"),
        "type_vocab_size": (2, 2),
        "layer_norm_eps": (EPS, EPS),
    }
    """pad_token_id is not read: it is wrong in the published file, and in multimolecule's."""

    def repository(self, spec: ModelSpec) -> str:
        return f"zhihan1996/{spec.name}"

    def licence(self, spec: ModelSpec) -> Licence:
        return APACHE

    def shapes(self, spec: ModelSpec) -> Shapes:
        d, f = spec.hidden, inner_of(spec)
        layer: Shapes = {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
        layer |= {f"self_attn.{x}_proj.weight": (d, d) for x in ("q", "k", "v", "out")}
        vectors = [f"self_attn.{x}_proj.bias" for x in ("q", "k", "v", "out")]
        vectors += [
            "mlp.down_proj.bias",
            *(f"{norm}.{x}" for norm in ("self_attn_norm", "mlp_norm") for x in ("weight", "bias")),
        ]
        layer |= dict.fromkeys(vectors, (d,))
        expected: Shapes = {"embed_tokens.weight": (VOCABULARY, d), TYPES: (2, d)}
        expected |= {f"{NORM}.weight": (d,), f"{NORM}.bias": (d,)}
        return expected | {f"layers.{i}.{part}": shape for i in range(spec.layers) for part, shape in layer.items()}

    def parts(self, spec: ModelSpec, state: State, device: "torch.device") -> "Parts":
        """The weights of the forward, float32 on the device.

        The embedding [V, D] is that of a token and of type 0, after their LayerNorm: a row depends on its token alone.
        """
        import torch
        import torch.nn.functional as F

        from virnucpro_cli.model.packed import Parts
        from virnucpro_cli.model.plain import Layer

        def wide(*names: str) -> torch.Tensor:
            return torch.cat([state[name].to(device, torch.float32) for name in names])

        def pair(*names: str) -> "Pair":
            return wide(*(f"{name}.weight" for name in names)), wide(*(f"{name}.bias" for name in names))

        def layer(i: int) -> Layer:
            attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
            gated = wide(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
            return Layer(
                norm1=pair(f"{attention}_norm"),
                qkv=pair(*(f"{attention}.{x}_proj" for x in "qkv")),
                out=pair(f"{attention}.out_proj"),
                norm2=pair(f"{mlp}_norm"),
                fc1=(gated, torch.zeros(len(gated), device=device)),
                fc2=pair(f"{mlp}.down_proj"),
                gated=True,
            )

        embedding = wide("embed_tokens.weight") + wide(TYPES)[0]
        normed = F.layer_norm(embedding, (spec.hidden,), *pair(NORM), eps=EPS)
        return Parts(normed, map(layer, range(spec.layers)), norm=None, inv_freq=None)


DNABERT = Dnabert()
