"""Variable-length attention behind one signature; one small adapter file per backend, each doing exactly its name.

An attention function takes q, k, v [T, H, Dh] (last dimension contiguous), the `batch.PackedBatch` whose segments bound
it, and the softmax scale; it returns [T, H, Dh]. Rows past `cu_seqlens[-1]` of the result are undefined.
That of the fused steps also takes float32 [T, 2], by which rows of q and of k are still to be multiplied.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from virnucpro_cli.errors import UserError

BROKEN = "its kernels do not work here"
Attention = Callable[..., torch.Tensor]

BACKENDS = ("triton", "torch_varlen", "flash_attn", "efficient", "sdpa")


class Backend(NamedTuple):
    """How a forward computes: attention, and `kernels.plain` or `kernels.fused` for the steps around it."""

    name: str
    attention: Attention
    steps: Any
    notes: tuple[str, ...] = ()


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, or with `auto` the first that suits. Raises UserError if a named one cannot run.

    Each adapter module has `refusal(device, dtype) -> str | None` and `attention(q, k, v, batch, scale)`.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"There is no attention backend {name!r}.", f"Choose auto or one of {', '.join(BACKENDS)}.")
    candidates = [each for each in BACKENDS if each != "flash_attn"] if name == "auto" else [name]
    remedy = "Leave --attention at auto, or name another."
    if dtype == torch.float8_e4m3fn:
        remedy = "Use --dtype fp16: fp8 is computed by the fused kernels for Hopper GPUs alone (--attention triton)."
        if name not in ("auto", "triton"):
            raise UserError(f"Attention backend {name} does not know fp8.", remedy)
        candidates = ["triton"]
    refusal, notes = None, tuple[str, ...]()
    for candidate in candidates:
        if candidate != "sdpa" and not is_nvidia(device):
            refusal = f"it needs an NVIDIA GPU, and this run is on {device.type}"
            continue
        adapter = import_module(f"virnucpro_cli.model.attention.{candidate}")
        refusal = adapter.refusal(device, dtype)
        if refusal is None:
            steps = import_module(f"virnucpro_cli.model.kernels.{'fused' if candidate == 'triton' else 'plain'}")
            return Backend(candidate, adapter.attention, steps, notes)
        if BROKEN in refusal:
            notes = (f"attention backend {candidate} would be faster on this device, but {refusal}",)
    raise UserError(f"Attention backend {candidates[-1]} cannot run here: {refusal}.", remedy)


def is_nvidia(device: torch.device) -> bool:
    """A CUDA device that is not ROCm in disguise."""
    return device.type == "cuda" and torch.version.hip is None


def describe(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
