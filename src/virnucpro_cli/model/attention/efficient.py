"""PyTorch's memory-efficient attention with `cu_seqlens`: fp32 on any NVIDIA GPU, and fp16 on those before Ampere."""

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.model.attention import describe


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if not (5, 0) <= (major, minor) <= (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"it is built for compute capability 5.0 to 9.0, and {name} has {major}.{minor}"
    if dtype == torch.bfloat16 and major < 8:
        return f"{describe(dtype)} needs compute capability 8.0 or newer; use fp16"
    return None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all float32, float16 or bf16."""
    bounds, longest = batch.cu_seqlens, batch.max_seqlen
    no_mask = 0
    out = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, no_mask, False, scale=scale
    )[0]
    return out[0]
