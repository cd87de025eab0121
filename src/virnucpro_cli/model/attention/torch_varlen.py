"""PyTorch's built-in variable-length FlashAttention-2. No compiler, no package; the default on sm80 and newer."""

import torch
from torch.nn.attention import current_flash_attention_impl

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.model.attention import sm80_refusal


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if why := sm80_refusal(device, dtype):
        return why
    if (other := current_flash_attention_impl()) not in (None, "FA2"):
        return f"it is FlashAttention-2, and this process has put {other} in its place"
    return None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all float16 or bf16, by the FlashAttention operator itself.

    `torch.nn.attention.varlen.varlen_attn` may take cuDNN instead on Hopper and Blackwell: in PyTorch 2.14 if the
    longest segment of the pack exceeds 128 tokens, in 2.15 whenever it can. Neighbours would then choose the kernel.
    """
    bounds, longest = batch.cu_seqlens, batch.max_seqlen
    dropout, causal, debug = 0.0, False, False
    return torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, dropout, causal, debug, scale=scale
    )[0]
