"""FlashAttention-2 from the flash-attn package (extra `flash`), for those who have it."""

from importlib.util import find_spec

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.errors import install_command
from virnucpro_cli.model.attention import torch_varlen


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("flash_attn") is None:
        return f"the flash-attn package is not installed ({install_command('flash')} builds it, and needs nvcc)"
    return torch_varlen.refusal(device, dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all float16 or bf16."""
    from flash_attn import flash_attn_varlen_func

    bounds, longest = batch.cu_seqlens, batch.max_seqlen
    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=scale)
