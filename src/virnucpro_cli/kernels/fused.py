"""The forward's steps as fused Triton kernels, for fp16 and bf16. Same functions as `plain`."""

import torch
import torch.nn.functional as F

from virnucpro_cli.kernels import plain
from virnucpro_cli.kernels.attention import attention
from virnucpro_cli.kernels.linear import gelu_linear, rotary, rotary_linear
from virnucpro_cli.kernels.norm import add_norm
from virnucpro_cli.kernels.plain import layer_norm

__all__ = ["add_norm", "arrange", "gelu_linear", "layer_norm", "rotary", "rotary_linear", "try_out"]


def arrange(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The joint projection with the two halves of every head of q and k interleaved, so that what rotates together is adjacent.

    Scores are sums over a head, so the order within a head does not matter as long as q and k share it.
    """
    turned, kept = qkv.split([2 * (len(qkv) // 3), len(qkv) // 3])
    halves = turned.unflatten(0, (-1, 2, head_dim // 2))  # [2H, 2, Dh/2, ...]
    return torch.cat((halves.transpose(1, 2).flatten(0, 2), kept))


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Compile every kernel on this device and compare it with its plain twin; raises whatever goes wrong."""
    with torch.cuda.device(device), torch.inference_mode():
        x = torch.linspace(-4, 4, 16 * 64, device=device).reshape(16, 64).sin().to(dtype)
        weight = torch.linspace(-9, 9, 192 * 64, device=device).reshape(192, 64).sin().mul(0.2).to(dtype)
        bias, angles = weight[:, 0].contiguous(), torch.linspace(0, 6, 16 * 16, device=device).reshape(16, 16)
        tables = angles.cos(), angles.sin(), torch.arange(16, device=device, dtype=torch.int32)
        turned, kept = arrange(weight, 32), arrange(bias, 32)
        q, k, v = rotary_linear(x, turned, kept, rotary(*tables))
        tiles = torch.tensor([[0, 0, 16]], device=device, dtype=torch.int32)
        twins = plain.rotary_linear(x, weight, bias, plain.rotary(*tables))
        q2, k2, v2 = (twin.transpose(0, 1) for twin in twins)  # [H, T, Dh]
        pairs = {
            "add_norm": (add_norm(x.clone(), x, x[0], x[1]), plain.add_norm(x.clone(), x, x[0], x[1])),
            "gelu_linear": (gelu_linear(x, weight, bias), plain.gelu_linear(x, weight, bias)),
            "rotary_linear and attention": (
                attention(q, k, v, tiles, 0.2),
                F.scaled_dot_product_attention(q2, k2, v2, scale=0.2).transpose(0, 1),
            ),
        }
        for name, (found, twin) in pairs.items():
            if not (found - twin).float().norm() <= 2e-2 * twin.float().norm():
                raise RuntimeError(f"{name} differs from its plain twin")
