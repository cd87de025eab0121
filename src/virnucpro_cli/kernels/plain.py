"""The forward's steps in plain PyTorch: the path of every device without fused kernels, and what those are tested against.

Shapes: T rows of a pack, H heads of Dh, D = H * Dh.
"""

import torch
import torch.nn.functional as F

from virnucpro_cli.model.spec import LAYER_NORM_EPS

Rotary = tuple[torch.Tensor, torch.Tensor]


def arrange(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The weight [3D, D] or bias [3D] of the joint projection in the order that `rotary_linear` wants: as it stands."""
    return qkv


def rotary(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Rotary:
    """What every layer needs of the tables [L, Dh/2] (float32) for rows at these positions (int32 [T])."""
    return cos.index_select(0, positions)[:, None, None, :], sin.index_select(0, positions)[:, None, None, :]


def rotary_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rotary: Rotary
) -> tuple[torch.Tensor, ...]:
    """x [T, D] to q, k, v [T, H, Dh] each, with q and k rotated."""
    qkv = F.linear(x, weight, bias).view(len(x), 3, -1, 2 * rotary[0].shape[-1])
    qk = rotate(qkv[:, :2], *rotary)
    return qk[:, 0], qk[:, 1], qkv[:, 2]


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x W^T + b)."""
    return gelu(F.linear(x, weight, bias))


def add_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add delta to the residual stream x [T, D], in place, and return the LayerNorm of the sum (statistics in fp32)."""
    x += delta
    return layer_norm(x, weight, bias)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps=LAYER_NORM_EPS)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by the error function, never the tanh form. May overwrite x."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # F.gelu's own erf is off by 1e-6 there, a bias that adds up.
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
