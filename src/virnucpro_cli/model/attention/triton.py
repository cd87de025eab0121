"""Our own fused kernels on NVIDIA Hopper: attention with short tiles, and the steps around it."""

from functools import partial

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.model.attention import describe, kernels_refusal
from virnucpro_cli.model.spec import stream_dtype


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"it is written for Hopper (compute capability 9.0), not for {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        return f"it computes in fp16, bf16 or fp8, not {describe(dtype)}"

    def try_out() -> None:
        from virnucpro_cli.model.kernels import fused, trial

        trials = partial(trial.try_out, fused, device, dtype), partial(notes, device, dtype)
        trial.side_by_side(device, trials)

    return kernels_refusal(try_out)


def notes(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Notes for the user on how this backend computes here; none where all is as it should be."""
    from virnucpro_cli.model.kernels import hopper_attention, pingpong

    products = None if dtype == torch.float8_e4m3fn else pingpong.refusal(device, dtype)
    attending = hopper_attention.refusal(device, stream_dtype(dtype))
    return tuple(
        f"{what} slower than could be: {refusal}"
        for what, refusal in (("products are up to a third", products), ("attention is up to a fifth", attending))
        if refusal is not None
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: PackedBatch,
    scale: float,
    *left: torch.Tensor,
) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all float16 or bf16; left: q_scale and k_scale of the kernel, or none."""
    from virnucpro_cli.model.kernels import attention, hopper_attention

    way = hopper_attention if hopper_attention.takes(q) else attention
    return way.attention(q, k, v, batch.query_tiles, scale, *left)
