"""Our own kernels in plain Triton, for NVIDIA GPUs of compute capability 8.0 and newer: attention with short tiles, and
the steps around PyTorch's products."""

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.model.attention import Backend, describe, kernels_refusal


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 or bf16, not {describe(dtype)}"

    def try_out() -> None:
        from virnucpro_cli.model.kernels import portable, trial

        trial.try_out(portable, device, dtype)

    return kernels_refusal(try_out)


def gain(device: torch.device, dtype: torch.dtype) -> float:
    """How many times as fast as plain steps it is on this device, by a timed trial."""
    from virnucpro_cli.model.attention import efficient, torch_varlen
    from virnucpro_cli.model.kernels import plain, portable, timed

    other = efficient if torch_varlen.refusal(device, dtype) else torch_varlen
    ours = Backend("portable", attention, portable)
    return timed.gain(ours, Backend("plain", other.attention, plain), device, dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all float16 or bf16."""
    from virnucpro_cli.model.kernels.attention import attention

    if not q.stride(0) == k.stride(0) == v.stride(0):  # of the plain steps; the kernel takes one distance between rows
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return attention(q, k, v, batch.query_tiles, scale, with_descriptors=False)
