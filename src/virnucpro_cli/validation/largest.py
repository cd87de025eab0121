"""The largest absolute value of the residual stream in each layer, beside the largest number of fp16."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.plan.packing import first_fit_decreasing, whole_segments
from virnucpro_cli.validation.invariance import Tokenizer, indexed
from virnucpro_cli.validation.verdict import Check

FP16_MAX = torch.finfo(torch.float16).max
LINES = 9
TOKEN_BUDGET = 4096


def by_layer(
    model: PackedModel, path: Path, lengths: NDArray[np.int64], reading: Reading, tokenizer: Tokenizer = None
) -> NDArray[np.float64]:
    """The largest absolute value of the stream after each layer over the proteins of a FASTA, float64 [L + 1].

    lengths: int64 [n], tokens of each; reading, tokenizer: how they are read. Layer 0 is the embedding, the last is
    before its LayerNorm. Values that are not finite are infinity.
    """
    table, segments = indexed(path, reading, tokenizer), whole_segments(np.arange(len(lengths)), lengths)
    plan = first_fit_decreasing(segments.length, TOKEN_BUDGET)
    collate = VarlenCollator(table, segments, lengths.astype(np.int32), plan, pin=False)
    bare, every = model.without_last_norm(), tuple(range(model.spec.layers + 1))
    largest = torch.zeros(len(every), device=model.device)
    for pack in range(len(plan)):
        batch = collate(pack).to(model.device)

        def look(layer: int, hidden: torch.Tensor, used: int = batch.used) -> None:
            largest[layer] = torch.maximum(largest[layer], hidden[:used].abs().amax().float())

        bare.forward(batch, every, look)
    return np.nan_to_num(largest.double().cpu().numpy(), nan=np.inf, posinf=np.inf)


def checks(values: NDArray[np.float64], stream: torch.dtype) -> Iterator[Check]:
    """Lines to look at, of a few layers each; values: float64 [L + 1]. Nothing is judged.

    stream: dtype of the residual stream.
    """
    part = f"Range: largest value of the residual stream in {devices.short_name(stream)}"
    for layers in np.array_split(np.arange(len(values)), min(LINES, len(values))):
        first, last, worst = int(layers[0]), int(layers[-1]), float(values[layers].max())
        share = f"{100 * worst / FP16_MAX:.3g}% of fp16's" if np.isfinite(worst) else "more than"
        what = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield Check(part, what, worst=worst, note=f"{share} {FP16_MAX:,.0f}")
