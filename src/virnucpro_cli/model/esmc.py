"""ESM C: checkpoints, and the weights of its forward. transformers' `EsmcModel` is the definition.

Tensors have transformers' names here, without prefix.
"""

import math
import re
from typing import TYPE_CHECKING

from virnucpro_cli import alphabet
from virnucpro_cli.model.spec import INV_FREQ, LM_HEAD, MIT, Family, Licence, ModelSpec, Shapes, State

if TYPE_CHECKING:
    import torch

    from virnucpro_cli.model.packed import Parts
    from virnucpro_cli.model.plain import Pair

_TERMS = "https://www.evolutionaryscale.ai/policies/cambrian-{}-license-agreement"
FIRST_LICENCES = {
    "esmc-300m-2024-12": Licence("Cambrian Open", _TERMS.format("open"), to_accept=True),
    "esmc-600m-2024-12": Licence("Cambrian Non-Commercial", _TERMS.format("non-commercial"), to_accept=True),
}
VOCABULARY = 64
"""Rows of the embedding and of the token head. The first 33 are tokens."""
_PREFIX = r"(?:esmc\.)?"
_BLOCK = r"transformer\.blocks\.(\d+)"
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def _owner(name: str) -> str:
    return "EvolutionaryScale" if name in FIRST_LICENCES else "biohub"


def inner_of(spec: ModelSpec) -> int:
    """Width inside SwiGLU, by default 8 / 3 of the model's, rounded up to 256."""
    return spec.inner or 256 * math.ceil(spec.hidden * 8 / 3 / 256)


class EsmC(Family):
    TITLE = "ESM C"
    HUB_FILES = {name: f"data/weights/{name.replace('-', '_')}_v0.pth" for name in FIRST_LICENCES}
    """The makers' first files, in the layout of the package esm 3.2."""
    NAMES = tuple((re.compile(_PREFIX + pattern), template) for pattern, template in (
        (r"(embed_tokens\.weight|norm\.weight|layers\.\d+\.(?:self_attn\.(?:(?:[qkvo]_proj)|[qk]_norm)\.weight"
         r"|mlp\.(?:gate|up|down)_proj\.weight|(?:input|post_attention)_layernorm\.(?:weight|bias)))", r"\1"),
        (r"embed\.weight", "embed_tokens.weight"),
        (r"transformer\.norm\.weight", "norm.weight"),
        (_BLOCK + r"\.attn\.layernorm_qkv\.(?:layer_norm_|0\.)(weight|bias)", r"layers.\1.input_layernorm.\2"),
        (_BLOCK + r"\.attn\.layernorm_qkv\.(?:1\.)?weight", r"layers.\1.self_attn.qkv_proj.weight"),
        (_BLOCK + r"\.attn\.([qk])_ln\.weight", r"layers.\1.self_attn.\2_norm.weight"),
        (_BLOCK + r"\.attn\.out_proj\.weight", r"layers.\1.self_attn.o_proj.weight"),
        (_BLOCK + r"\.ffn\.(?:layer_norm_|0\.)(weight|bias)", r"layers.\1.post_attention_layernorm.\2"),
        (_BLOCK + r"\.ffn\.(?:fc1_|1\.)weight", r"layers.\1.mlp.gate_up_proj.weight"),
        (_BLOCK + r"\.ffn\.(?:fc2_|3\.)weight", r"layers.\1.mlp.down_proj.weight"),
    ))  # fmt: skip
    """Names of transformers, of the Transformer Engine layout and of the package esm 3.2, and what is the name here."""
    HEAD_NAMES = tuple((re.compile(_PREFIX + pattern), template) for pattern, template in (
        (r"lm_head\.decoder\.bias", f"{LM_HEAD}.bias"),
        (r"lm_head\.((?:dense|layer_norm)\.(?:weight|bias)|decoder\.weight)", rf"{LM_HEAD}.\1"),
        (r"(?:lm|sequence)_head\.0\.(weight|bias)", rf"{LM_HEAD}.dense.\1"),
        (r"(?:lm|sequence)_head\.2\.(weight|bias)", rf"{LM_HEAD}.layer_norm.\1"),
        (r"(?:lm|sequence)_head\.3\.weight", f"{LM_HEAD}.decoder.weight"),
        (r"(?:lm|sequence)_head\.3\.bias", f"{LM_HEAD}.bias"),
    ))  # fmt: skip
    LEFT_OUT = re.compile(
        r".*\._extra_state|.*\brotary(_emb)?\.(original_)?inv_freq"
        r"|(esmc\.)?(lm|sequence)_head\..*|classifier\..*|score\..*"
    )
    SETTINGS = {
        "layers": ("num_hidden_layers", "n_layers"),
        "hidden": ("hidden_size", "d_model"),
        "heads": ("num_attention_heads", "n_heads"),
        "inner": ("intermediate_size",),
    }
    CONFIG = {
        "hidden_act": ("silu", "silu"),
        "vocab_size": (VOCABULARY, VOCABULARY),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
        "rope_parameters": (_ROPE, _ROPE),
        "mask_token_id": (alphabet.MASK, alphabet.MASK),
    }
    READING = alphabet.ESM._replace(letters=f"{alphabet.ESM.letters}|", scales_masks=False)

    def repository(self, spec: ModelSpec) -> str:
        return f"{_owner(spec.name)}/{spec.name}"

    def licence(self, spec: ModelSpec) -> Licence:
        return FIRST_LICENCES.get(spec.name, MIT)

    def shapes(self, spec: ModelSpec) -> Shapes:
        """Every tensor of the encoder under transformers' name, with its shape."""
        d, f = spec.hidden, inner_of(spec)
        layer: Shapes = {f"self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        layer |= {f"self_attn.{x}_norm.weight": (d,) for x in "qk"}
        layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
        expected: Shapes = {"embed_tokens.weight": (VOCABULARY, d), "norm.weight": (d,)}
        return expected | {f"layers.{i}.{part}": shape for i in range(spec.layers) for part, shape in layer.items()}

    def head_shapes(self, spec: ModelSpec) -> dict[str, Shapes]:
        """Every tensor of the token head, with its shape. Its last matrix is its own."""
        d = spec.hidden
        return {
            LM_HEAD: {
                "dense.weight": (d, d), "dense.bias": (d,), "layer_norm.weight": (d,), "layer_norm.bias": (d,),
                "decoder.weight": (VOCABULARY, d), "bias": (VOCABULARY,),
            },
        }  # fmt: skip

    def parts(self, spec: ModelSpec, state: State, device: "torch.device") -> "Parts":
        """The weights of the forward, float32 on the device. Biases that the network does not have are zero.

        Both sums into the residual stream are divided by sqrt(layers / 36): out and fc2 are.
        """
        import torch

        from virnucpro_cli.model.packed import Parts
        from virnucpro_cli.model.plain import Layer

        divisor = math.sqrt(spec.layers / 36)

        def wide(*names: str) -> torch.Tensor:
            return torch.cat([state[name].to(device, torch.float32) for name in names])

        def no_bias(weight: torch.Tensor) -> "Pair":
            return weight, torch.zeros(len(weight), device=device)

        def layer(i: int) -> Layer:
            attn, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
            norm1, norm2 = (f"layers.{i}.{each}_layernorm" for each in ("input", "post_attention"))
            return Layer(
                norm1=(wide(f"{norm1}.weight"), wide(f"{norm1}.bias")),
                qkv=no_bias(wide(*(f"{attn}.{x}_proj.weight" for x in "qkv"))),
                out=no_bias(wide(f"{attn}.o_proj.weight") / divisor),
                norm2=(wide(f"{norm2}.weight"), wide(f"{norm2}.bias")),
                fc1=no_bias(wide(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")),
                fc2=no_bias(wide(f"{mlp}.down_proj.weight") / divisor),
                qk_norm=(wide(f"{attn}.q_norm.weight"), wide(f"{attn}.k_norm.weight")),
                gated=True,
            )

        embedding, inv_freq = wide("embed_tokens.weight"), state[INV_FREQ].to(device, torch.float32)
        return Parts(embedding, map(layer, range(spec.layers)), no_bias(wide("norm.weight")), inv_freq)


ESMC = EsmC()
