"""The gates on values: the fast path in fp32 against fair-esm, and the run's own dtype against its noise floor."""

from typing import Any

import numpy as np
import torch

from virnucpro_cli import runner
from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.kinds import KINDS, POOLED
from virnucpro_cli.validation import agreement, oracle
from virnucpro_cli.validation.oracle import Rows, Sample
from virnucpro_cli.validation.verdict import Check

SEMANTICS_GATES = {**dict.fromkeys(POOLED, 1e-5), "residue": 2e-5}
MEDIAN_OF_FLOOR, WORST_OF_FLOOR, BIAS_OF_FLOOR = 1.5, 3.0, 1.5
MAX_REL_L2 = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2, "fp8": 4e-1}
"""Largest relative L2 of a pooled row by compute dtype, from real 8M weights (worst seen: 5.2e-6 and 6.4e-3 of 420 proteins,
3.6e-2 of 60). bf16 on the 3B may need more: --max-rel-l2."""

MIN_COSINE = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.998, "fp8": 0.92}
"""Least cosine of a pooled row. 0.998 is what a relative L2 of 6e-2 comes to, 0.92 what 4e-1 does."""

MAX_MEDIAN_REL_L2 = {"fp8": 1e-1}
"""fp8 is held to a median of its own and not to the noise floor of 16 bit, which it is shown beside."""

FEWEST = 6
"""Proteins from which on medians say something."""

ROUNDOFF = 2.0**-24
"""Half the spacing of fp32 numbers: no floor is taken to be lower."""

BINS = (0, 100, 300, 600, 1023)
NEIGHBOURS = 5


def semantics(found: Rows, truth: Rows, sample: Sample, layers: tuple[int, ...]) -> list[Check]:
    """The fast path in fp32 against fair-esm in fp32, at every layer: relative L2 of each protein, worst within the gate."""
    checks = []
    for kind in KINDS:
        for layer in layers:
            if kind == "residue":
                errors = oracle.record_errors(found, truth, sample, layer)
            else:
                errors = oracle.errors(found, truth, sample, kind, layer)
            gate = SEMANTICS_GATES[kind]
            checks.append(_error_check(
                "Semantics: embed in fp32 against fair-esm", f"{kind}, layer {layer}: relative L2", errors, sample,
                passed=errors.worst <= gate, limit=f"{gate:.0e}",
            ))  # fmt: skip
    return checks


def _error_check(part: str, what: str, errors: oracle.Errors, sample: Sample, **rest: Any) -> Check:
    return Check(
        part, what, median=errors.median, p99=errors.p99, worst=errors.worst,
        record=sample.names[errors.worst_owner], **rest,
    )  # fmt: skip


def precision(
    found: Rows, exact: Rows, plain: list[Rows], sample: Sample, layers: tuple[int, ...], config: ValidateConfig,
    dtype: torch.dtype,
) -> list[Check]:  # fmt: skip
    """The run's own dtype against the noise floor: what the reference itself loses in that dtype, run plainly."""
    short = runner.short_name(dtype)
    part = f"Precision: embed in {short} against its noise floor"
    median_limit = MAX_MEDIAN_REL_L2.get(short)
    if median_limit is not None:
        part = f"Precision: embed in {short}, approximate, beside the noise floor of fp16"
    judged = median_limit is None and len(sample) >= FEWEST
    min_cosine = MIN_COSINE[short] if config.min_cosine is None else config.min_cosine
    max_rel_l2 = config.max_rel_l2 if config.max_rel_l2 is not None else MAX_REL_L2[short]
    checks = []
    floors = {(kind, layer): _floor(exact, plain, sample, kind, layer) for kind in KINDS for layer in layers}
    for kind in KINDS:
        for layer in layers:
            errors = oracle.errors(found, exact, sample, kind, layer)
            floor = floors[kind, layer]
            paired = float(np.median(np.maximum(errors.error, ROUNDOFF) / floor.error))
            worst = max(errors.worst, ROUNDOFF) / floor.worst
            checks.append(_error_check(
                part, f"{kind}, layer {layer}: relative L2", errors, sample,
                passed=(paired <= MEDIAN_OF_FLOOR and worst <= WORST_OF_FLOOR) if judged else None,
                floor=f"{floor.median:.1e} / {floor.worst:.1e}", limit=f"{MEDIAN_OF_FLOOR} x / {WORST_OF_FLOOR:.0f} x",
                note=f"{paired:.2f} x / {worst:.2f} x",
            ))  # fmt: skip
    for layer in layers:
        a, b = found["residue", layer], exact["residue", layer]
        bias = max(agreement.bias(a, b), ROUNDOFF)
        floor_bias = max(ROUNDOFF, *(agreement.bias(rows["residue", layer], b) for rows in plain))
        # What is left of unbiased errors in a mean over few residues.
        by_chance = 2 * floors["residue", layer].median / len(b) ** 0.5
        if dtype == torch.float32:
            # fp32 units round with a bias of their own (products of three TF32, fast exponentials: 3e-7 on an H100), so
            # there the mean error is held to the size of the floor's errors. A wrong formula is a hundred times that.
            floor_bias = max(floor_bias, floors["residue", layer].median)
        unbiased = bias <= BIAS_OF_FLOOR * floor_bias + by_chance
        checks.append(Check(
            part, f"residue, layer {layer}: mean signed error", unbiased if median_limit is None else None, worst=bias,
            floor=f"{floor_bias:.1e}", limit=f"{BIAS_OF_FLOOR} x", note=f"{bias / floor_bias:.2f} x",
        ))  # fmt: skip
    last = layers[-1]
    for kind in ("mean", "bos"):
        a, b = found[kind, last], exact[kind, last]
        cosine = agreement.cosine(a, b)
        errors = oracle.errors(found, exact, sample, kind, last)
        checks.append(Check(
            part, f"{kind}, layer {last}: cosine", bool(cosine.min() >= min_cosine), float(np.median(cosine)),
            worst=float(cosine.min()), record=sample.names[int(cosine.argmin())], limit=f">= {min_cosine}",
        ))  # fmt: skip
        checks.append(_error_check(
            part, f"{kind}, layer {last}: relative L2", errors, sample, passed=errors.worst <= max_rel_l2,
            limit=f"{max_rel_l2:.0e}",
        ))  # fmt: skip
        if median_limit is not None:
            checks.append(Check(
                part, f"{kind}, layer {last}: median relative L2", errors.median <= median_limit, errors.median,
                limit=f"{median_limit:.0e}",
            ))  # fmt: skip
    for kind in KINDS:
        owner = sample.owner if kind == "residue" else np.arange(len(sample))
        a, b = found[kind, last], exact[kind, last]
        for what, values, worst_of in (
            ("cosine after centring", agreement.cosine(a, b, b.mean(axis=0)), np.argmin),
            ("max error / rms", agreement.max_over_rms(a, b), np.argmax),
        ):
            at = int(worst_of(values))
            tail = 0.01 if worst_of is np.argmin else 0.99
            checks.append(Check(
                part, f"{kind}, layer {last}: {what}", median=float(np.median(values)),
                p99=float(np.quantile(values, tail)), worst=float(values[at]), record=sample.names[int(owner[at])],
            ))  # fmt: skip
    if len(sample) > NEIGHBOURS:
        kept = agreement.neighbours_kept(found["mean", last], exact["mean", last], NEIGHBOURS)
        checks.append(Check(part, f"mean, layer {last}: {NEIGHBOURS} nearest neighbours kept", note=f"{kept:.1%}"))
    return [*checks, *_by_length(part, found, exact, floors, sample, last)]


def _floor(exact: Rows, plain: list[Rows], sample: Sample, kind: str, layer: int) -> oracle.Errors:
    """The largest of the plain runs' errors, vector by vector, and never less than fp32's own roundoff."""
    each = [oracle.errors(rows, exact, sample, kind, layer) for rows in plain]
    return oracle.Errors(
        np.maximum.reduce([errors.error for errors in each] + [np.full_like(each[0].error, ROUNDOFF)]), each[0].owner
    )


def _by_length(
    part: str, found: Rows, exact: Rows, floors: dict[tuple[str, int], oracle.Errors], sample: Sample, layer: int
) -> list[Check]:
    checks = []
    for low, high in zip(BINS, [*BINS[1:], 1 << 62], strict=True):
        inside = (sample.lengths >= low) & (sample.lengths < high)
        if not inside.any():
            continue
        label = f"{low}-{high - 1}" if high < 1 << 62 else f"{low} and more"
        for kind in ("mean", "residue"):
            errors = oracle.errors(found, exact, sample, kind, layer)
            floor = floors[kind, layer]
            here = oracle.Errors(errors.error[inside[errors.owner]], errors.owner[inside[errors.owner]])
            below = floor.error[inside[floor.owner]]
            checks.append(_error_check(
                part, f"{kind}, {label} residues ({int(inside.sum())} proteins)", here, sample,
                floor=f"{np.median(below):.1e} / {below.max():.1e}",
            ))  # fmt: skip
    return checks


def of_each_protein(
    found: Rows, exact: Rows, plain: list[Rows], sample: Sample, layers: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Every protein's own numbers at the last layer."""
    last = layers[-1]
    records: list[dict[str, Any]] = [
        {"name": name, "residues": int(length)} for name, length in zip(sample.names, sample.lengths, strict=True)
    ]
    for kind in ("mean", "bos"):
        a, b = found[kind, last], exact[kind, last]
        columns = {
            "relative L2": agreement.relative_l2(a, b),
            "relative L2 floor": _floor(exact, plain, sample, kind, last).error,
            "cosine": agreement.cosine(a, b),
            "cosine after centring": agreement.cosine(a, b, b.mean(axis=0)),
            "max error / rms": agreement.max_over_rms(a, b),
        }
        for name, values in columns.items():
            for record, value in zip(records, values.tolist(), strict=True):
                record[f"{kind} {name}"] = value
    residue = oracle.errors(found, exact, sample, "residue", last)
    for i, record in enumerate(records):
        error = residue.error[residue.owner == i]
        record |= {
            "residue relative L2 median": float(np.median(error)),
            "residue relative L2 99 %": float(np.quantile(error, 0.99)),
            "residue relative L2 worst": float(error.max()),
            "residue relative L2 worst at": int(error.argmax()) + 1,
        }
    return records
