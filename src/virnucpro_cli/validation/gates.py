"""The gates on values: the fast path in fp32 against fair-esm, and the run's own dtype against its noise floor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import counted
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

SINGLE = ("mean", "bos")
"""Kinds whose rows are held to limits of their own: one of all residues, and one of a single place."""

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
    short, last = devices.short_name(dtype), layers[-1]
    median_limit = MAX_MEDIAN_REL_L2.get(short)
    part = f"Precision: embed in {short} against its noise floor"
    if median_limit is not None:
        part = f"Precision: embed in {short}, approximate, beside the noise floor of fp16"
    floors = {(kind, layer): _floor(exact, plain, sample, kind, layer) for kind in KINDS for layer in layers}
    run = _Run(part, found, exact, plain, sample, floors)
    min_cosine = MIN_COSINE[short] if config.min_cosine is None else config.min_cosine
    max_rel_l2 = MAX_REL_L2[short] if config.max_rel_l2 is None else config.max_rel_l2
    judged = median_limit is None
    checks = [
        run.against_the_floor(kind, layer, judged and len(sample) >= FEWEST) for kind in KINDS for layer in layers
    ]
    checks += [run.bias(layer, dtype, judged) for layer in layers]
    for kind in SINGLE:
        checks += run.within_limits(kind, last, min_cosine, max_rel_l2, median_limit)
    for kind in KINDS:
        checks += run.spread(kind, last)
    return [*checks, *run.neighbours(last), *run.by_length(last)]


@dataclass(frozen=True)
class _Run:
    """A run's rows beside exact ones and those of the plain runs, and what there is to say of them, a check each."""

    part: str
    found: Rows
    exact: Rows
    plain: list[Rows]
    sample: Sample
    floors: dict[tuple[str, int], oracle.Errors]

    def errors(self, kind: str, layer: int) -> oracle.Errors:
        return oracle.errors(self.found, self.exact, self.sample, kind, layer)

    def against_the_floor(self, kind: str, layer: int, judged: bool) -> Check:
        errors, floor = self.errors(kind, layer), self.floors[kind, layer]
        paired = float(np.median(np.maximum(errors.error, ROUNDOFF) / floor.error))
        worst = max(errors.worst, ROUNDOFF) / floor.worst
        return _error_check(
            self.part, f"{kind}, layer {layer}: relative L2", errors, self.sample,
            passed=(paired <= MEDIAN_OF_FLOOR and worst <= WORST_OF_FLOOR) if judged else None,
            floor=f"{floor.median:.1e} / {floor.worst:.1e}", limit=f"{MEDIAN_OF_FLOOR} x / {WORST_OF_FLOOR:.0f} x",
            note=f"{paired:.2f} x / {worst:.2f} x",
        )  # fmt: skip

    def bias(self, layer: int, dtype: torch.dtype, judged: bool) -> Check:
        a, b = self.found["residue", layer], self.exact["residue", layer]
        bias = max(agreement.bias(a, b), ROUNDOFF)
        floor_bias = max(ROUNDOFF, *(agreement.bias(rows["residue", layer], b) for rows in self.plain))
        size = self.floors["residue", layer].median
        by_chance = 2 * size / len(b) ** 0.5  # what is left of unbiased errors in a mean over few residues
        if dtype == torch.float32:
            # fp32 units round with a bias of their own (products of three TF32, fast exponentials: 3e-7 on an H100), so
            # there the mean error is held to the size of the floor's errors. A wrong formula is a hundred times that.
            floor_bias = max(floor_bias, size)
        return Check(
            self.part, f"residue, layer {layer}: mean signed error",
            bias <= BIAS_OF_FLOOR * floor_bias + by_chance if judged else None, worst=bias, floor=f"{floor_bias:.1e}",
            limit=f"{BIAS_OF_FLOOR} x", note=f"{bias / floor_bias:.2f} x",
        )  # fmt: skip

    def within_limits(
        self, kind: str, layer: int, min_cosine: float, max_rel_l2: float, median_limit: float | None
    ) -> Iterator[Check]:
        cosine, errors = agreement.cosine(self.found[kind, layer], self.exact[kind, layer]), self.errors(kind, layer)
        yield Check(
            self.part, f"{kind}, layer {layer}: cosine", bool(cosine.min() >= min_cosine), float(np.median(cosine)),
            worst=float(cosine.min()), record=self.sample.names[int(cosine.argmin())], limit=f">= {min_cosine}",
        )  # fmt: skip
        yield _error_check(
            self.part, f"{kind}, layer {layer}: relative L2", errors, self.sample, passed=errors.worst <= max_rel_l2,
            limit=f"{max_rel_l2:.0e}",
        )  # fmt: skip
        if median_limit is not None:
            yield Check(
                self.part, f"{kind}, layer {layer}: median relative L2", errors.median <= median_limit, errors.median,
                limit=f"{median_limit:.0e}",
            )  # fmt: skip

    def spread(self, kind: str, layer: int) -> Iterator[Check]:
        """Told and not judged."""
        owner = self.sample.owner if kind == "residue" else np.arange(len(self.sample))
        a, b = self.found[kind, layer], self.exact[kind, layer]
        for what, values, worst_of, tail in (
            ("cosine after centring", agreement.cosine(a, b, b.mean(axis=0)), np.argmin, 0.01),
            ("max error / rms", agreement.max_over_rms(a, b), np.argmax, 0.99),
        ):
            at = int(worst_of(values))
            yield Check(
                self.part, f"{kind}, layer {layer}: {what}", median=float(np.median(values)),
                p99=float(np.quantile(values, tail)), worst=float(values[at]), record=self.sample.names[int(owner[at])],
            )  # fmt: skip

    def neighbours(self, layer: int) -> Iterator[Check]:
        if len(self.sample) > NEIGHBOURS:
            kept = agreement.neighbours_kept(self.found["mean", layer], self.exact["mean", layer], NEIGHBOURS)
            yield Check(self.part, f"mean, layer {layer}: {NEIGHBOURS} nearest neighbours kept", note=f"{kept:.1%}")

    def by_length(self, layer: int) -> Iterator[Check]:
        each = [(kind, self.errors(kind, layer), self.floors[kind, layer]) for kind in ("mean", "residue")]
        for low, high in zip(BINS, [*BINS[1:], 1 << 62], strict=True):
            inside = (self.sample.lengths >= low) & (self.sample.lengths < high)
            if not inside.any():
                continue
            label = f"{low}-{high - 1}" if high < 1 << 62 else f"{low} and more"
            for kind, errors, floor in each:
                here = oracle.Errors(errors.error[inside[errors.owner]], errors.owner[inside[errors.owner]])
                below = floor.error[inside[floor.owner]]
                yield _error_check(
                    self.part, f"{kind}, {label} residues ({counted(int(inside.sum()), 'protein')})", here, self.sample,
                    floor=f"{np.median(below):.1e} / {below.max():.1e}",
                )  # fmt: skip


def _floor(exact: Rows, plain: list[Rows], sample: Sample, kind: str, layer: int) -> oracle.Errors:
    """The largest of the plain runs' errors, vector by vector, and never less than fp32's own roundoff."""
    each = [oracle.errors(rows, exact, sample, kind, layer) for rows in plain]
    return oracle.Errors(
        np.maximum.reduce([errors.error for errors in each] + [np.full_like(each[0].error, ROUNDOFF)]), each[0].owner
    )


def of_each_protein(
    found: Rows, exact: Rows, plain: list[Rows], sample: Sample, layers: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Every protein's own numbers at the last layer."""
    last = layers[-1]
    records: list[dict[str, Any]] = [
        {"name": name, "residues": int(length)} for name, length in zip(sample.names, sample.lengths, strict=True)
    ]
    for kind in SINGLE:
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
