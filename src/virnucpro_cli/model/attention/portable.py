"""Our own kernels in plain Triton, for NVIDIA GPUs of compute capability 8.0 and newer: attention with short tiles, and
the steps around PyTorch's products."""

import torch

from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.model.attention import Backend, kernels_refusal, sm80_refusal


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if why := sm80_refusal(device, dtype):
        return why

    def try_out() -> None:
        from virnucpro_cli.model.kernels import portable, trial

        trial.try_out(portable, device, dtype)

    return kernels_refusal(try_out)


def gain(device: torch.device, dtype: torch.dtype) -> float:
    """How many times as fast as plain steps it is on this device, by a timed trial."""
    from virnucpro_cli.model import plain
    from virnucpro_cli.model.attention import efficient, torch_varlen
    from virnucpro_cli.model.kernels import portable, timed

    other = efficient if torch_varlen.refusal(device, dtype) else torch_varlen
    ours = Backend("portable", attention, portable)
    return timed.gain(ours, Backend("plain", other.attention, plain), device, dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch, scale: float) -> torch.Tensor:
    """q, k, v [T, H, Dh] to [T, H, Dh], all float16 or bf16."""
    from virnucpro_cli.model.kernels.attention import attention

    return attention(q, k, v, batch.query_tiles, scale)
