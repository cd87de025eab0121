"""DNABERT-S: sizes, checkpoints, and the weights of its forward. The network is MosaicBERT, and DNABERT-2's too.

LayerNorm comes after each sum, positions are distances (ALiBi), and tokens are of several bases. A new size is a row.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.model.kernels.plain import Layer, Pair
from virnucpro_cli.model.packed import Parts
from virnucpro_cli.model.spec import APACHE, INV_FREQ, Licence, ModelSpec, Names, Shapes, State, pieces_of

TITLE = "DNABERT-S"
SIZES = {"DNABERT-S": ModelSpec("DNABERT-S", 12, 768, 12, "dnabert", inner=3072)}
SHORT_NAMES = {"dnabert-s": "DNABERT-S"}
ALIASES = SHORT_NAMES | {"dnaberts": "DNABERT-S", "zhihan1996/dnabert-s": "DNABERT-S"}
PUBLISHED_SHA256 = {
    "DNABERT-S": {"pytorch_model.bin": "f3cfc3d0541859df64759e758cc4bc40fe1d5760799a7d098a9f9f09501c1e5f"}
}
TOKENIZER: tuple[str, str] | None = (
    "tokenizer.json", "667f5a0e6e9630f7052b004784dda7c7aeba395cc4ca3c01b11b02e6aa29d7b1"
)  # fmt: skip
STEPS: str | None = "postnorm"
HUB_FILES: dict[str, str] = {}

EPS = 1e-12
HEAD_DIM = 64
"""Width of a head in the published size; a file without configuration does not say it."""
VOCABULARY = 4096
READING: Reading | None = None
NUCLEOTIDES: Reading | None = Reading(
    "ACGTN", 5, 1, 3, 2, 4, "N", (("U", "T"), ("-", "N"), (".", "N")), 4, False, width=VOCABULARY
)
"""Letters before they are joined to tokens, with the ids of the first and the last token."""

TYPES, NORM = "embed_type.weight", "embed_norm"
_LAYER = r"(?:bert\.|model\.)?encoder\.layer\.(\d+)\."
_EMBEDDINGS = r"(?:bert\.|model\.)?embeddings\."
NAMES: Names = tuple((re.compile(pattern), template) for pattern, template in (
    (_EMBEDDINGS + r"word_embeddings\.weight", "embed_tokens.weight"),
    (_EMBEDDINGS + r"token_type_embeddings\.weight", TYPES),
    (_EMBEDDINGS + r"(?:LayerNorm|layer_norm)\.(weight|bias)", rf"{NORM}.\1"),
    (_LAYER + r"attention\.self\.Wqkv\.(weight|bias)", r"layers.\1.self_attn.qkv_proj.\2"),
    (_LAYER + r"attention\.self\.(q)uery\.(weight|bias)", r"layers.\1.self_attn.\2_proj.\3"),
    (_LAYER + r"attention\.self\.(k)ey\.(weight|bias)", r"layers.\1.self_attn.\2_proj.\3"),
    (_LAYER + r"attention\.self\.(v)alue\.(weight|bias)", r"layers.\1.self_attn.\2_proj.\3"),
    (_LAYER + r"attention\.output\.dense\.(weight|bias)", r"layers.\1.self_attn.out_proj.\2"),
    (_LAYER + r"attention\.output\.(?:LayerNorm|layer_norm)\.(weight|bias)", r"layers.\1.self_attn_norm.\2"),
    (_LAYER + r"mlp\.(?:gated_layers|up_proj)\.weight", r"layers.\1.mlp.gate_up_proj.weight"),
    (_LAYER + r"mlp\.(?:wo|down_proj)\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    (_LAYER + r"mlp\.(?:layernorm|layer_norm)\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
))  # fmt: skip
"""Names of the published file, of DNABERT-2's, and of the package multimolecule."""
HEAD_NAMES: Names = ()
LEFT_OUT = re.compile(r"(?:bert\.|model\.)?(pooler|cls|lm_head|classifier)\..*|.*\.position_ids|.*\balibi")
SETTINGS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "inner": ("intermediate_size",),
}
CONFIG: dict[str, tuple[Any, Any]] = {
    "model_type": (frozenset({"bert", "dnaberts", "dnabert2"}), None),
    "vocab_size": (VOCABULARY, 30522),
    "alibi_starting_size": (512, None),
    "hidden_act": ("gelu", "gelu"),
    "type_vocab_size": (2, 2),
    "layer_norm_eps": (EPS, EPS),
}
"""Model types are of the published file, and of multimolecule's. pad_token_id is not read: it is wrong in both."""
ARCHITECTURES: tuple[str, ...] = ()
JOINT: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
LONGEST: int | None = None
FP8 = PEERS = False
_OWN = re.compile(r".*encoder\.layer\.\d+\.mlp\.(gated_layers|up_proj)\.weight")


def repository(spec: ModelSpec) -> str:
    return f"zhihan1996/{spec.name}"


def url(spec: ModelSpec) -> str | None:
    return None


def licence(spec: ModelSpec) -> Licence:
    return APACHE


def told_by(names: set[str]) -> bool:
    """Whether there are gated layers of a BERT."""
    return any(_OWN.fullmatch(name) for name in names)


def told_sizes(state: State) -> dict[str, int]:
    """Heads by the width of the embedding [V, D], and the inner width by layer 0's last matrix [D, F]."""
    sizes = {"heads": state["embed_tokens.weight"].shape[-1] // HEAD_DIM}
    if (down := state.get("layers.0.mlp.down_proj.weight")) is not None:
        sizes["inner"] = down.shape[-1]
    return sizes


def settle(state: State, spec: ModelSpec) -> list[str]:
    """Split joint matrices [n D, D] and biases into those here. Returns no notes.

    Every family has an `INV_FREQ`; this one does not use it.
    """
    for name in [*state]:
        pieces = pieces_of(name, JOINT)
        if len(pieces) > 1:
            state |= zip(pieces, state.pop(name).chunk(len(pieces)), strict=True)
    state[INV_FREQ] = spec.exact_inv_freq
    return []


def inner_of(spec: ModelSpec) -> int:
    """Width inside the gated unit, by default four times the model's."""
    return spec.inner or 4 * spec.hidden


def shapes(spec: ModelSpec) -> Shapes:
    """Every tensor of the encoder, with its shape."""
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


def head_shapes(spec: ModelSpec) -> dict[str, Shapes]:
    """No head is used."""
    return {}


def parts(spec: ModelSpec, state: State, device: torch.device) -> Parts:
    """The weights of the forward, float32 on the device.

    The embedding [V, D] is that of a token and of type 0, after their LayerNorm: a row depends on its token alone.
    """

    def wide(*names: str) -> torch.Tensor:
        return torch.cat([state[name].to(device, torch.float32) for name in names])

    def pair(*names: str) -> Pair:
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
