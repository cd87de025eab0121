"""PyTorch's built-in variable-length FlashAttention-2. No compiler, no package; the default on sm80 and newer."""

import torch

from virnucpro_cli.attention import describe, is_nvidia
from virnucpro_cli.collate import PackedBatch


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if not is_nvidia(device):
        return f"it needs an NVIDIA GPU, and this run is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 or bf16, not {describe(dtype)}"
    return None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = batch.cu_seqlens, batch.max_seqlen
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale)
    assert isinstance(out, torch.Tensor)
    return out
