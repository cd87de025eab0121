"""The packed ESM-2 forward in plain PyTorch. fair-esm is the definition; comments name what others got wrong.

Shapes: T rows of a pack, H heads of Dh, D = H * Dh, L layers.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from virnucpro_cli import alphabet
from virnucpro_cli.attention import Attention
from virnucpro_cli.collate import PackedBatch
from virnucpro_cli.model.spec import LAYER_NORM_EPS, ModelSpec
from virnucpro_cli.pooling import Embeddings, Pooler

OnLayer = Callable[[int, torch.Tensor], None]

EMBED_SCALE = 0.88
"""`1 - 0.15 * 0.8`, the share of tokens not masked in training; applied at inference too (fair-esm esm2.py:86-92)."""


@dataclass(frozen=True)
class Layer:
    norm1: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    norm2: tuple[torch.Tensor, torch.Tensor]
    fc1: tuple[torch.Tensor, torch.Tensor]
    fc2: tuple[torch.Tensor, torch.Tensor]


class ESM2:
    """Weights on one device in one dtype, and the forward over packed batches.

    state: tensors under the names of fair-esm's `ESM2.state_dict()`, on any device, in any floating dtype.
    """

    def __init__(
        self,
        spec: ModelSpec,
        state: dict[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
        attention: Attention,
    ):
        self.spec, self.dtype, self.device, self.attention = spec, dtype, device, attention

        def load(*names: str) -> torch.Tensor:
            return torch.cat([state[name].to(device, torch.float32) for name in names]).to(dtype)

        def pair(*names: str) -> tuple[torch.Tensor, torch.Tensor]:
            return load(*(f"{name}.weight" for name in names)), load(*(f"{name}.bias" for name in names))

        # Rows of <mask> and <pad> are zero, as fair-esm zeroes them after the look-up.
        table = state["embed_tokens.weight"].to(device, torch.float32) * EMBED_SCALE
        table[[alphabet.PAD, alphabet.MASK]] = 0
        self.embedding = table.to(dtype)
        self.layers = [
            Layer(
                norm1=pair(f"layers.{i}.self_attn_layer_norm"),
                qkv=pair(*(f"layers.{i}.self_attn.{x}_proj" for x in "qkv")),
                out=pair(f"layers.{i}.self_attn.out_proj"),
                norm2=pair(f"layers.{i}.final_layer_norm"),
                fc1=pair(f"layers.{i}.fc1"),
                fc2=pair(f"layers.{i}.fc2"),
            )
            for i in range(spec.layers)
        ]
        self.norm = pair("emb_layer_norm_after")
        # The checkpoint's own inv_freq: it is rounded to fp16, as in training, and must not be recomputed.
        self.inv_freq = state["layers.0.self_attn.rot_emb.inv_freq"].to(device, torch.float32)
        self.cos = self.sin = torch.empty(0, spec.head_dim // 2, device=device)

    def reserve_positions(self, longest: int) -> None:
        """Make the rotary tables (fp32, whatever the dtype) cover segments of up to `longest` tokens."""
        if longest > len(self.cos):
            angles = torch.outer(torch.arange(longest, device=self.device, dtype=torch.float32), self.inv_freq)
            self.cos, self.sin = angles.cos(), angles.sin()

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, wanted: tuple[int, ...], on_layer: OnLayer) -> None:
        """Run the batch up to the last wanted layer; `on_layer(i, hidden [T, D])` is called for each wanted one, and must
        not keep `hidden`, which the next layer overwrites.

        0 is the scaled embedding, i the residual stream after layer i, and only the last layer has the final LayerNorm.
        """
        self.reserve_positions(batch.max_seqlen)
        x = F.embedding(batch.tokens, self.embedding)  # [T, D]
        if batch.mask_ratio is not None:
            x = (x.float() / batch.mask_ratio[:, None]).to(self.dtype)
        if 0 in wanted:
            on_layer(0, x)
        cos = self.cos.index_select(0, batch.positions)[:, None, None, :]  # [T, 1, 1, Dh/2]
        sin = self.sin.index_select(0, batch.positions)[:, None, None, :]
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            x += self._attend(self._layer_norm(x, layer.norm1), layer, cos, sin, batch)
            x += F.linear(gelu(F.linear(self._layer_norm(x, layer.norm2), *layer.fc1)), *layer.fc2)
            if number in wanted:
                on_layer(number, self._layer_norm(x, self.norm) if number == self.spec.layers else x)

    def embed(self, batch: PackedBatch, wanted: tuple[int, ...], pooler: Pooler) -> Embeddings:
        """What the pooler makes of each wanted layer of the batch."""
        found = Embeddings()
        self.forward(batch, wanted, lambda layer, hidden: pooler.add(found, layer, hidden, batch))
        return found

    def with_attention(self, attention: Attention) -> "ESM2":
        """The same weights with another attention function."""
        other = copy.copy(self)
        other.attention = attention
        return other

    def _layer_norm(self, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, (self.spec.hidden,), *norm, eps=LAYER_NORM_EPS)  # statistics in fp32

    def _attend(
        self, x: torch.Tensor, layer: Layer, cos: torch.Tensor, sin: torch.Tensor, batch: PackedBatch
    ) -> torch.Tensor:
        qkv = F.linear(x, *layer.qkv).view(-1, 3, self.spec.heads, self.spec.head_dim)  # [T, 3, H, Dh]
        qk = rotate(qkv[:, :2], cos, sin)
        mixed = self.attention(qk[:, 0], qk[:, 1], qkv[:, 2], batch, self.spec.head_dim**-0.5)  # [T, H, Dh]
        mixed[batch.used :] = 0  # filler: whatever the kernel left there
        return F.linear(mixed.reshape(-1, self.spec.hidden), *layer.out)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by the error function, never the tanh form. May overwrite x."""
    if (
        x.device.type == "cpu" and x.dtype == torch.float32
    ):  # F.gelu's own erf is off by 1e-6 there, a bias that adds up
        return x.mul_((x * 2**-0.5).erf_().add_(1).mul_(0.5))
    return F.gelu(x)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding by halves, in fp32. x [T, ..., Dh]; cos, sin float32, broadcastable to [T, ..., Dh/2]."""
    first, second = x.float().chunk(2, dim=-1)
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out.to(x.dtype)


def exact_arithmetic() -> None:
    """Turn off every reduced-precision shortcut of the BLAS: TF32, and 16-bit accumulation between split-K parts."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
