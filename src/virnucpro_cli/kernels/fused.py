"""The forward's steps as fused Triton kernels, for fp16 and bf16. Same functions as `plain`."""

import torch

from virnucpro_cli.kernels.linear import gelu_linear, rotary_linear
from virnucpro_cli.kernels.norm import add_norm
from virnucpro_cli.kernels.plain import layer_norm

__all__ = ["add_norm", "arrange", "gelu_linear", "layer_norm", "rotary", "rotary_linear"]


def arrange(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The joint projection with the two halves of every head of q and k interleaved, so that what rotates together is adjacent.

    Scores are sums over a head, so the order within a head does not matter as long as q and k share it.
    """
    turned, kept = qkv.split([2 * (len(qkv) // 3), len(qkv) // 3])
    halves = turned.unflatten(0, (-1, 2, head_dim // 2))  # [2H, 2, Dh/2, ...]
    return torch.cat((halves.transpose(1, 2).flatten(0, 2), kept))


def rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The table [L, Dh] (float32) of interleaved cosines and sines, and the position of each row."""
    return torch.stack((cos, sin), dim=-1).flatten(1), positions
