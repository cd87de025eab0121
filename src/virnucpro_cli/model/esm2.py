"""ESM-2: checkpoints, and the weights of its forward.

fair-esm is the definition; comments name the mistakes of others.
"""

import re
from typing import TYPE_CHECKING

from virnucpro_cli import alphabet
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.spec import (
    CONTACT_HEAD,
    DEMO,
    INV_FREQ,
    LM_HEAD,
    MIT,
    VOCABULARY,
    Family,
    Licence,
    ModelSpec,
    Shapes,
    State,
)

if TYPE_CHECKING:
    import torch

    from virnucpro_cli.model.packed import Parts
    from virnucpro_cli.model.plain import Pair

EMBED_SCALE = 0.88
"""`1 - 0.15 * 0.8`, the share of tokens not masked in training; applied at inference too (fair-esm esm2.py:86-92)."""
PREFIX = r"(?:encoder\.sentence_encoder\.|encoder\.|esm\.|model\.)?"
LAYER = r"encoder\.layer\.(\d+)"


class Esm2(Family):
    """The family, from which those with its layers take what they share."""

    TITLE = "ESM-2"
    NAMES = tuple((re.compile(PREFIX + pattern), template) for pattern, template in (
        (r"(embed_tokens\.weight|emb_layer_norm_after\.(?:weight|bias)|layers\.\d+\.(?:self_attn\.rot_emb\.inv_freq"
         r"|(?:self_attn\.(?:[qkv]|out)_proj|self_attn_layer_norm|fc1|fc2|final_layer_norm)\.(?:weight|bias)))", r"\1"),
        (r"embeddings\.word_embeddings\.weight", "embed_tokens.weight"),
        *((rf"{LAYER}\.attention\.self\.{word}\.(weight|bias)", rf"layers.\1.self_attn.{word[0]}_proj.\2")
          for word in ("query", "key", "value")),
        (LAYER + r"\.attention\.self\.rotary_embeddings\.inv_freq", r"layers.\1.self_attn.rot_emb.inv_freq"),
        # transformers 5 keeps one for all layers, and saves it with the layer's number as a literal star
        (r"(?:encoder\.layer\.\*\.attention\.self\.)?rotary_embeddings\.inv_freq", INV_FREQ),
        (LAYER + r"\.attention\.output\.dense\.(weight|bias)", r"layers.\1.self_attn.out_proj.\2"),
        (LAYER + r"\.attention\.LayerNorm\.(weight|bias)", r"layers.\1.self_attn_layer_norm.\2"),
        (LAYER + r"\.intermediate\.dense\.(weight|bias)", r"layers.\1.fc1.\2"),
        (LAYER + r"\.output\.dense\.(weight|bias)", r"layers.\1.fc2.\2"),
        (LAYER + r"\.LayerNorm\.(weight|bias)", r"layers.\1.final_layer_norm.\2"),
        (r"encoder\.emb_layer_norm_after\.(weight|bias)", r"emb_layer_norm_after.\1"),
    ))  # fmt: skip
    """Names of fair-esm, which stay, and of HuggingFace, as patterns; and what fair-esm calls each."""
    HEAD_NAMES = ((re.compile(r"(?:esm\.|encoder\.)?(lm_head\..+|contact_head\.regression\..+)"), r"\1"),)
    LEFT_OUT = re.compile(
        r"(esm\.)?(embeddings\.(position_ids|position_embeddings\.weight)|pooler\..*|contact_head\..*)"
        r"|lm_head\..*|classifier\..*|score\..*|qa_outputs\..*|embed_out|encoder\.lm_head\..*"
    )
    JOINT = {}
    SETTINGS = {
        "layers": ("num_hidden_layers", "encoder_layers"),
        "hidden": ("hidden_size", "encoder_embed_dim"),
        "heads": ("num_attention_heads", "encoder_attention_heads"),
    }
    CONFIG = {
        "layer_norm_eps": (1e-5, 1e-12),
        "hidden_act": ("gelu", "gelu"),
        "vocab_size": (VOCABULARY, VOCABULARY),
        "is_decoder": (False, None),
        "mask_token_id": (alphabet.MASK, alphabet.MASK),
    }
    READING = alphabet.ESM
    FP8 = PEERS = True

    def repository(self, spec: ModelSpec) -> str:
        return f"facebook/{spec.name}"

    def url(self, spec: ModelSpec) -> str | None:
        return f"https://dl.fbaipublicfiles.com/fair-esm/models/{spec.name}.pt"

    def licence(self, spec: ModelSpec) -> Licence:
        return Licence("GPL-3.0") if spec == DEMO else MIT

    def parts(self, spec: ModelSpec, state: State, device: "torch.device") -> "Parts":
        """The weights of the forward, float32 on the device. Rows of `<mask>` and `<pad>` are zero, as in fair-esm."""
        import torch

        from virnucpro_cli.model.packed import Parts
        from virnucpro_cli.model.plain import Layer

        def pair(*names: str) -> "Pair":
            weight, bias = (
                torch.cat([state[f"{name}.{part}"].to(device, torch.float32) for name in names])
                for part in ("weight", "bias")
            )
            return weight, bias

        def layer(i: int) -> Layer:
            return Layer(
                norm1=pair(f"layers.{i}.self_attn_layer_norm"),
                qkv=pair(*(f"layers.{i}.self_attn.{x}_proj" for x in "qkv")),
                out=pair(f"layers.{i}.self_attn.out_proj"),
                norm2=pair(f"layers.{i}.final_layer_norm"),
                fc1=pair(f"layers.{i}.fc1"),
                fc2=pair(f"layers.{i}.fc2"),
            )

        embedding = state["embed_tokens.weight"].to(device, torch.float32) * EMBED_SCALE
        embedding[[alphabet.PAD, alphabet.MASK]] = 0
        # The checkpoint's own inv_freq: it is rounded to fp16, as in training, and must not be recomputed.
        inv_freq = state[INV_FREQ].to(device, torch.float32)
        return Parts(embedding, map(layer, range(spec.layers)), pair("emb_layer_norm_after"), inv_freq)

    def settle(self, state: State, spec: ModelSpec) -> list[str]:
        """Make layer 0's inv_freq, float32 [Dh / 2], stand for all. Returns notes; see `settle_inv_freq`."""
        return settle_inv_freq(state, half_rounded_inv_freq(spec), "the fp16-rounded one of ESM-2")

    def told_sizes(self, state: State) -> dict[str, int]:
        """The number of heads, by the width of layer 0's inv_freq, float [Dh / 2]."""
        inv_freq = state.get(INV_FREQ)
        there = inv_freq is not None and len(inv_freq)
        return {"heads": state["embed_tokens.weight"].shape[-1] // (2 * there)} if there else {}

    def shapes(self, spec: ModelSpec) -> Shapes:
        """Every tensor of the encoder under fair-esm's name, with its shape."""
        d = spec.hidden
        layer: Shapes = {f"self_attn.{name}_proj": (d, d) for name in ("q", "k", "v", "out")}
        layer |= {"fc1": (4 * d, d), "fc2": (d, 4 * d), "self_attn_layer_norm": (d,), "final_layer_norm": (d,)}
        parts = {f"layers.{i}.{part}": shape for i in range(spec.layers) for part, shape in layer.items()}
        expected: Shapes = {"embed_tokens.weight": (VOCABULARY, d)}
        for part, shape in {**parts, "emb_layer_norm_after": (d,)}.items():
            expected |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
        return expected

    def head_shapes(self, spec: ModelSpec) -> dict[str, Shapes]:
        """Every tensor of each head, with its shape; lm_head's last matrix is the token embedding."""
        d = spec.hidden
        return {
            LM_HEAD: {
                "dense.weight": (d, d), "dense.bias": (d,), "layer_norm.weight": (d,), "layer_norm.bias": (d,),
                "bias": (VOCABULARY,),
            },
            CONTACT_HEAD: {"weight": (1, spec.layers * spec.heads), "bias": (1,)},
        }  # fmt: skip


ESM2 = Esm2()


def settle_inv_freq(state: State, expected: "torch.Tensor", which: str) -> list[str]:
    """Make layer 0's inv_freq, float32 [Dh / 2], stand for all, or the expected one if there is none. Returns notes.

    which: the expected one in words. Raises UserError if layers disagree.
    """
    import torch

    there = [state.pop(name).float() for name in [*state] if name.endswith("inv_freq")]
    state[INV_FREQ] = first = there[0] if there else expected
    if not there:
        return [f"the checkpoint has no inv_freq; {which} is used"]
    if any(not torch.equal(first, other) for other in there):
        raise UserError("The checkpoint's layers have different inv_freq; the model has one for all.")
    if first.shape == expected.shape and not torch.equal(first, expected):
        return [f"the checkpoint's inv_freq is not {which}; it is used as it stands"]
    return []


def half_rounded_inv_freq(spec: ModelSpec) -> "torch.Tensor":
    """The exact ones rounded to fp16, float32 [head_dim / 2]: the values that ESM-2's checkpoints hold."""
    return spec.exact_inv_freq.half().float()
