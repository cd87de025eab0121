"""Our own fused kernels on NVIDIA Hopper: attention with short tiles, and the steps around it."""

from importlib.util import find_spec

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.errors import in_a_line
from virnucpro_cli.model.attention import BROKEN, describe


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"it is written for Hopper (compute capability 9.0), not for {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        return f"it computes in fp16, bf16 or fp8, not {describe(dtype)}"
    if find_spec("triton") is None:
        return "the triton package, which comes with PyTorch for CUDA, is not there"
    try:
        from virnucpro_cli.model.kernels import fused
        from virnucpro_cli.model.kernels.trial import try_out

        try_out(fused, device, dtype)
    except Exception as error:  # no C compiler, no room for the cache, another Triton ...
        return f"{BROKEN} ({in_a_line(error)[:200]})"
    return None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: PackedBatch,
    scale: float,
    *left: torch.Tensor,
) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all float16 or bf16; left: q_scale and k_scale of the kernel, or none."""
    from virnucpro_cli.model.kernels.attention import attention

    if not q.stride(0) == k.stride(0) == v.stride(0):  # of the plain steps; the kernel takes one distance between rows
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return attention(q, k, v, batch.query_tiles, scale, *left)
