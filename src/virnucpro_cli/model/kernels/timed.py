"""Portable kernels against plain steps on the device at hand, timed once and remembered: nobody knows every GPU."""

import hashlib
import json
import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
import torch
import triton

import virnucpro_cli
from virnucpro_cli.batch import PackedBatch, query_tiles
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import locate
from virnucpro_cli.model.attention import Backend, efficient, portable, torch_varlen
from virnucpro_cli.model.kernels import plain
from virnucpro_cli.model.kernels import portable as steps
from virnucpro_cli.model.kernels.trial import Noise, made_up

WIDTH, HEAD_DIM = 640, 64
ROWS, TOKENS = 8192, 128
"""Rows of the pack, and tokens of each of its segments."""
ROUNDS = 7


@cache
def gain(device: torch.device, dtype: torch.dtype) -> float:
    """How many times as fast as plain steps the portable kernels compute a layer, of 640 on 8,192 rows.

    Measured in a fraction of a second, and kept in the cache for the same GPU and versions: a run that is resumed
    chooses as before.
    """
    about = (
        torch.cuda.get_device_name(device), str(dtype), torch.__version__, triton.__version__, virnucpro_cli.__version__
    )  # fmt: skip
    with suppress(OSError, UserError, ValueError, TypeError):
        path = locate.cache_dir() / "timed" / f"{hashlib.sha256('|'.join(about).encode()).hexdigest()}.json"
        return float(json.loads(path.read_text())["gain"])
    found = _measured(device, dtype)
    with suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "gain": found}))
    return found


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    with torch.cuda.device(device), torch.inference_mode():
        layer = made_up(Noise(device), WIDTH, gated=False)
        other = efficient if torch_varlen.refusal(device, dtype) else torch_varlen
        backends = Backend("portable", portable.attention, steps), Backend("plain", other.attention, plain)
        forwards = [_forward(each, layer, device, dtype) for each in backends]
        ours, theirs = list[float](), list[float]()
        for _ in range(ROUNDS):
            for forward, seconds in zip(forwards, (ours, theirs), strict=True):
                seconds.append(_seconds_of(forward))
    return statistics.median(theirs[2:]) / statistics.median(ours[2:])


def _forward(backend: Backend, layer: plain.Layer, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    (prepared,), _ = backend.steps.prepare([layer], layer.norm1, HEAD_DIM, dtype)
    cu_seqlens = np.arange(0, ROWS + 1, TOKENS)
    tiles = torch.from_numpy(query_tiles(cu_seqlens)).int().to(device)
    bounds = torch.from_numpy(cu_seqlens).int().to(device)
    positions = torch.arange(ROWS, device=device, dtype=torch.int32) % TOKENS
    batch = PackedBatch(
        positions, positions, bounds, bounds, tiles, None, None, np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens),
        TOKENS,
    )  # fmt: skip
    angles = torch.outer(torch.arange(TOKENS, device=device).float(), torch.rand(HEAD_DIM // 2, device=device))
    x = torch.randn(ROWS, WIDTH, device=device).to(dtype)

    def forward() -> None:
        stream, steps = x.clone(), backend.steps
        rotary = steps.rotary(angles.cos(), angles.sin(), batch.positions)
        q, k, v = steps.query_key_value(stream, prepared, rotary)
        steps.add_attention(stream, backend.attention(q, k, v, batch, HEAD_DIM**-0.5), prepared)
        steps.add_inner(stream, steps.inner(stream, prepared), prepared)

    return forward


def _seconds_of(call: Callable[[], None], times: int = 5) -> float:
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(times):
        call()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended)
