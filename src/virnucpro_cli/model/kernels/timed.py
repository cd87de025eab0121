"""A backend beside another on the device at hand, timed once and remembered: nobody knows every GPU."""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
import torch
import triton

import virnucpro_cli
from virnucpro_cli.batch import PackedBatch, query_tiles
from virnucpro_cli.model import plain
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.keeping import keep, kept
from virnucpro_cli.model.kernels.trial import Noise, made_up

WIDTH, HEAD_DIM = 640, 64
ROWS, TOKENS = 8192, 128
"""Rows of the pack, and tokens of each of its segments."""
ROUNDS = 7


@cache
def gain(ours: Backend, other: Backend, device: torch.device, dtype: torch.dtype) -> float:
    """How many times as fast as another backend ours computes a layer, of 640 on 8,192 rows.

    Measured in a fraction of a second, and kept in the cache for the same GPU and versions: a run that is resumed
    chooses as before.
    """
    about = (
        ours.name, other.name, torch.cuda.get_device_name(device), str(dtype), torch.__version__, triton.__version__,
        virnucpro_cli.__version__,
    )  # fmt: skip
    key = "|".join(about).encode()
    with suppress(ValueError, TypeError, KeyError):
        return float(json.loads(kept("timed", key, ".json") or b"null")["gain"])
    found = _measured(ours, other, device, dtype)
    keep("timed", key, json.dumps({"about": about, "gain": found}).encode(), ".json")
    return found


def _measured(ours: Backend, other: Backend, device: torch.device, dtype: torch.dtype) -> float:
    with torch.cuda.device(device), torch.inference_mode():
        layer = made_up(Noise(device), WIDTH, gated=False)
        forwards = [_forward(each, layer, device, dtype) for each in (ours, other)]
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for forward, each in zip(forwards, seconds, strict=True):
                each.append(_seconds_of(forward))
    own, others = (statistics.median(each[2:]) for each in seconds)
    return others / own


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
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - started
