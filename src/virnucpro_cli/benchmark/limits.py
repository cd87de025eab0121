"""Limits of the device: rates of the model's own GEMMs, of a large GEMM and of a copy; where a forward's time goes."""

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from virnucpro_cli.benchmark.modes import synchronize
from virnucpro_cli.model.families import products
from virnucpro_cli.model.spec import ModelSpec

WORK = {
    "attention": ("flash", "fmha", "attention", "varlen"),
    "GEMM": ("gemm", "_linear", "nvjet", "xmma", "cutlass_80", "cutlass3x", "addmm", "aten::mm", "linear_pointwise",
             "splitkreduce"),
    "pool": ("segment_reduce",),
}  # fmt: skip
"""Parts of the names of the device's kernels by kind of work; the first kind that fits counts."""


class Limits(NamedTuple):
    """gemm_floor: tokens/s of a forward of nothing but its GEMMs; rates in FLOP/s and bytes/s."""

    gemm_floor: float
    gemm_rate: float
    peak_gemm_rate: float
    copy_rate: float


def measure(spec: ModelSpec, dtype: torch.dtype, device: torch.device, rows: int) -> Limits:
    """Time the four GEMMs of a layer at `rows` rows, a large square one, and a copy."""
    seconds = flops = 0.0
    linear = linear_e4m3 if dtype == torch.float8_e4m3fn else F.linear
    for columns, out in products(spec):
        x = torch.randn(rows, columns, device=device).to(dtype)
        w = (torch.randn(out, columns, device=device) * columns**-0.5).to(dtype)
        b = torch.randn(out, device=device).to(dtype)
        seconds += best_of(lambda x=x, w=w, b=b: linear(x, w, b), device)  # type: ignore[misc]
        flops += 2.0 * rows * columns * out
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    peak = 2.0 * side**3 / best_of(lambda: linear(a, a), device)
    return Limits(rows / (seconds * spec.layers), flops / seconds, peak, copy_rate(device))


def linear_e4m3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product of x, e4m3 [T, C], and weight, e4m3 [D, C], as cuBLAS does it, without a bias: float16 [T, D]."""
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, weight.T, one, one, out_dtype=torch.float16, use_fast_accum=True)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(1 << (29 if device.type == "cuda" else 26), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / best_of(lambda: target.copy_(source), device)


def timed(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds of a call, the mean of `count` in a row, until the device has done them."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / count


def best_of(call: Callable[[], object], device: torch.device, least: float = 0.02, repeats: int = 5) -> float:
    """Seconds of one call: median of a few timed groups, each at least `least` seconds long, after a warm-up."""
    timed(call, device)
    count = max(1, int(least / max(timed(call, device), 1e-6)))
    return statistics.median(timed(call, device, count) for _ in range(repeats))


def breakdown(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of a call by kind of work (device time on CUDA): GEMM, attention, pooling, everything else."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with warnings.catch_warnings(), _no_standard_error():
        warnings.simplefilter("ignore")  # the profiler's talk about cycles
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
            call()
            synchronize(device)
    shares = {"GEMM": 0.0, "attention": 0.0, "pool": 0.0, "the rest": 0.0}
    for event in trace.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in WORK.items() if any(part in name for part in parts)), "the rest")
        shares[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    return shares


@contextmanager
def _no_standard_error() -> Iterator[None]:
    """Hide the lines that the profiler's library writes by itself, past Python."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        before = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
