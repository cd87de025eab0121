"""Variable-length attention behind one signature; one small adapter file per backend, each doing exactly its name.

An attention function takes q, k, v [T, H, Dh] (last dimension contiguous), the `batch.PackedBatch` whose segments bound
it, and the softmax scale; it returns [T, H, Dh]. Rows past `cu_seqlens[-1]` of the result are undefined.
That of the fused steps also takes two float32 [T], by which rows of q and of k are still to be multiplied.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from virnucpro_cli.errors import UserError, in_a_line

BROKEN = "its kernels do not work here"
Attention = Callable[..., torch.Tensor]

BACKENDS = ("triton", "portable", "torch_varlen", "flash_attn", "efficient", "sdpa")
STEPS = {"triton": "fused", "portable": "portable"}
"""Backends with steps of their own in `kernels`; the others have plain ones."""


class Backend(NamedTuple):
    """How a forward computes: attention, and the steps around it: `plain`, or `fused` or `portable` of `kernels`.

    wide: whether the residual stream is in float32 whatever the dtype, which plain steps alone can do.
    """

    name: str
    attention: Attention
    steps: Any
    notes: tuple[str, ...] = ()
    wide: bool = False


def resolve(name: str, device: torch.device, dtype: torch.dtype, residual: str = "same") -> Backend:
    """The backend of that name, or with `auto` the first that suits. Raises UserError if a named one cannot run.

    residual: fp32 for a residual stream in float32.

    Each adapter module has `refusal(device, dtype) -> str | None` and `attention(q, k, v, batch, scale)`. One whose
    speed is not known on every GPU has `gain(device, dtype) -> float`: it is taken unasked where that is above 1.
    One with more to tell has `notes(device, dtype) -> tuple[str, ...]`.
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
    refusal, notes, wide = None, tuple[str, ...](), is_wide(residual, dtype)
    if wide:
        if dtype == torch.float8_e4m3fn:
            raise UserError("fp8 keeps its residual stream in fp16.", "Use --dtype fp16 with --residual fp32.")
        notes = (
            f"residual stream in float32, everything else in {describe(dtype)} and plain PyTorch around attention",
        )
    for candidate in candidates:
        if candidate != "sdpa" and not is_nvidia(device):
            refusal = f"it needs an NVIDIA GPU, and this run is on {device.type}"
            continue
        adapter = import_module(f"virnucpro_cli.model.attention.{candidate}")
        refusal = adapter.refusal(device, dtype)
        if refusal is None and name == "auto" and hasattr(adapter, "gain"):
            gain = adapter.gain(device, dtype)
            notes += (f"attention backend {candidate} is {gain:.2f} times as fast as plain steps here, by a trial",)
            refusal = None if gain > 1 else "plain steps are faster here"
        if refusal is None:
            notes += adapter.notes(device, dtype) if hasattr(adapter, "notes") else ()
            home = "plain" if wide or candidate not in STEPS else f"kernels.{STEPS[candidate]}"
            steps = import_module(f"virnucpro_cli.model.{home}")
            return Backend(candidate, adapter.attention, steps, notes, wide)
        if BROKEN in refusal:
            notes += (f"attention backend {candidate} would be faster on this device, but {refusal}",)
    raise UserError(f"Attention backend {candidates[-1]} cannot run here: {refusal}.", remedy)


def is_wide(residual: str, dtype: torch.dtype) -> bool:
    """Whether the residual stream of a forward in this dtype is wider than the rest."""
    return residual == "fp32" and dtype != torch.float32


def sm80_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why what needs compute capability 8.0 and 16 bit cannot run; None if it can."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 or bf16, not {describe(dtype)}"
    return None


def kernels_refusal(try_out: Callable[[], None]) -> str | None:
    """Why Triton kernels cannot be used here, None if they can. try_out: their trial, which raises where they fail."""
    if find_spec("triton") is None:
        return "the triton package, which comes with PyTorch for CUDA, is not there"
    try:
        try_out()
    except Exception as error:  # no C compiler, no room for the cache, another Triton ...
        return f"{BROKEN} ({in_a_line(error)[:200]})"
    return None


def is_nvidia(device: torch.device) -> bool:
    """A CUDA device that is not ROCm in disguise."""
    return device.type == "cuda" and torch.version.hip is None


def describe(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
