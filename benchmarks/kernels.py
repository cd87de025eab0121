"""Every fused kernel against its limit and its plain twin, then whole forwards against the GEMM floor, on this GPU.

    python benchmarks/kernels.py [--models 8M,150M,650M,3B,esmc-600m] [--dtype fp16] [--seconds 2]

The limit of a kernel is the larger of its bytes over the measured copy rate and, for linear layers, the time of cuBLAS
for the product alone ("out, residual" adds in place: over and over here, which changes no time). Forwards: packs of one
budget, mean pooling, random weights, interleaved rounds, median.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from virnucpro_cli import report
from virnucpro_cli.batch import query_tiles
from virnucpro_cli.benchmark import limits, modes, workload
from virnucpro_cli.engine import devices
from virnucpro_cli.model import attention, families, plain, weights
from virnucpro_cli.model.attention.triton import attention as short_attention
from virnucpro_cli.model.families import build
from virnucpro_cli.model.kernels import fused
from virnucpro_cli.model.kernels.norm import quantised_norm, row_scale
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.model.spec import stream_dtype

DEVICE = torch.device("cuda")


def rows_of(name):
    """The token budget that a run would choose."""
    return devices.auto_token_budget(DEVICE.type, devices.free_memory(DEVICE), families.by_name(name).hidden, 0)


def microseconds(call):
    return limits.best_of(call, DEVICE, least=0.004, repeats=3) * 1e6


def random(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def kernels(spec, dtype, rows, copy_rate):
    """dtype fp8: against the plain steps in fp16, limits are of products in e4m3 ("out" aside)."""
    d, heads, head_dim = spec.hidden, spec.heads, spec.head_dim
    compute, dtype = dtype, stream_dtype(dtype)
    linear = limits.linear_e4m3 if compute != dtype else F.linear
    one = dataclasses.replace(spec, layers=1)
    _, layers, norm, *_ = families.family_of(spec).parts(one, weights.random_state(one, 0, DEVICE), DEVICE)
    parts = next(iter(layers))
    x = random(rows, d, dtype=dtype)
    stream, inner = x.clone(), random(rows, parts.fc2[0].shape[1], dtype=dtype, scale=1e-3)
    inners = {fused: inner.to(compute), plain: inner}
    positions = (torch.arange(rows, device=DEVICE) % 400).int()
    angles = torch.outer(
        torch.arange(400, device=DEVICE), 10000 ** (-torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    )
    tables = angles.cos(), angles.sin()
    found = []

    def row(name, ours, twin, limit):
        found.append(
            {
                "width": d,
                "kernel": name,
                "us": ours,
                "plain PyTorch us": twin,
                "limit us": limit,
                "of the limit": limit / ours,
            }
        )

    norms, products, prepared, extra = {}, {}, {}, {}
    for steps in (fused, plain):
        (prepared[steps],), norms[steps] = steps.prepare([parts], norm, head_dim, compute if steps is fused else dtype)
        extra[steps] = steps.rotary(*tables, positions)
    for name in ("qkv", "out", "fc1", "fc2"):
        a, w = inner if name == "fc2" else x, getattr(parts, name)[0].to(dtype)
        if name != "out":
            a, w = a.to(compute), w.to(compute)
        products[name] = microseconds(lambda a=a, w=w, call=F.linear if name == "out" else linear: call(a, w))

    def both(call):
        return [microseconds(lambda s=steps: call(s, prepared[s])) for steps in (fused, plain)]

    offset = prepared[fused].offset
    if compute == dtype:
        row("row_scale", microseconds(lambda: row_scale(x, offset)), "-", 2 * rows * d / copy_rate * 1e6)
    else:
        row("quantised_norm", microseconds(lambda: quantised_norm(x, offset, 4)), "-", 3 * rows * d / copy_rate * 1e6)
    row("last norm", *both(lambda s, layer: s.last_norm(x, norms[s])), 4 * rows * d / copy_rate * 1e6)
    row("norm, qkv, rotary", *both(lambda s, layer: s.query_key_value(x, layer, extra[s])), products["qkv"])
    mixed = x.view(rows, heads, head_dim)
    row("out, residual", *both(lambda s, layer: s.add_attention(stream, mixed, layer)), products["out"])
    row(
        "norm, fc1, SwiGLU" if parts.gated else "norm, fc1, GELU",
        *both(lambda s, layer: s.inner(x, layer)),
        products["fc1"],
    )
    row("fc2, residual", *both(lambda s, layer: s.add_inner(stream, inners[s], layer)), products["fc2"])
    for load in ("fragments", "natural"):
        lengths = getattr(workload, load)(rows, np.random.default_rng(0))
        lengths = np.minimum(np.asarray(lengths), 1022) + 2
        lengths = np.sort(lengths[np.cumsum(lengths) <= rows])[::-1]
        bounds = np.append(0, np.cumsum(lengths))
        tiles = torch.from_numpy(query_tiles(bounds)).int().to(DEVICE)
        cu = torch.from_numpy(bounds).int().to(DEVICE)
        q, k, v = random(rows, 3, heads, head_dim, dtype=dtype).unbind(1)
        left = () if parts.qk_norm is None else (torch.ones(rows, device=DEVICE),) * 2
        batch = SimpleNamespace(query_tiles=tiles)
        ours = microseconds(lambda a=(q, k, v, batch), left=left: short_attention(*a, head_dim**-0.5, *left))
        from torch.nn.attention.varlen import varlen_attn

        longest = int(lengths.max())
        flash = microseconds(lambda a=(q, k, v, cu, cu, longest, longest): varlen_attn(*a, scale=head_dim**-0.5))
        row(f"attention, {load}", ours, flash, 8 * rows * d / copy_rate * 1e6)
    return found


def forwards(spec, dtype, rows, seconds):
    state = weights.random_state(spec, 0, DEVICE)
    models = {}
    for name in ("triton", "torch_varlen"):
        own = dtype if name == "triton" else stream_dtype(dtype)
        models[name] = build(spec, state, own, DEVICE, attention.resolve(name, DEVICE, own))
    del state
    dice, found = np.random.default_rng(0), []
    for load in ("fragments", "natural"):
        with tempfile.TemporaryDirectory() as folder:
            work = workload.made_up(load, getattr(workload, load)(4 * rows, dice), Path(folder), 1022)
            ways = {}
            for name, model in models.items():
                mode, _, _, host = modes.packed(model, work, rows)
                batch = host[0].to(DEVICE)
                ways[name] = mode.run
            for call in ways.values():
                call()
            floor = limits.measure(spec, dtype, DEVICE, rows).gemm_floor
            times = {key: [] for key in ways}
            for _ in range(max(3, int(seconds / 4 / seconds_of(ways["triton"])))):
                for key, call in ways.items():
                    times[key].append(seconds_of(call))
            for name, each in times.items():
                rate = mode.used / float(np.median(each))
                found.append(
                    {
                        "model": spec.name,
                        "load": load,
                        "backend": name,
                        "tokens/s": rate,
                        "GEMM floor": floor,
                        "of the floor": rate / floor,
                    }
                )
            split = limits.breakdown(ways["triton"], DEVICE)
            print(
                spec.name,
                load,
                {kind: f"{spent * 1e3:.2f} ms" for kind, spent in split.items()},
                "launching one pack:",
                f"{launch_time(models['triton'], batch) * 1e3:.2f} ms",
                flush=True,
            )
    return found


def launch_time(model, batch):
    torch.cuda.synchronize()
    started = time.perf_counter()
    modes.mean_of_last(model, batch)
    took = time.perf_counter() - started
    torch.cuda.synchronize()
    return took


def seconds_of(call):
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="8M,150M,650M,3B")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--seconds", type=float, default=2)
    options = parser.parse_args()
    exact_arithmetic()
    dtype, out = devices.DTYPES[options.dtype], report.console(False)
    copy_rate = limits.copy_rate(DEVICE)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}, copy {copy_rate / 1e12:.2f} TB/s"
    )
    rows = [
        row
        for name in options.models.split(",")
        for row in kernels(families.by_name(name), dtype, rows_of(name), copy_rate)
    ]
    out.print(report.rows_table("Kernels", rows))
    torch.cuda.empty_cache()
    rows = []
    for name in options.models.split(","):
        rows += forwards(families.by_name(name), dtype, rows_of(name), options.seconds)
        torch.cuda.empty_cache()
    out.print(report.rows_table("Forwards", rows))


if __name__ == "__main__":
    main()
