"""The gates on values: the fast path in fp32 against the oracle, and the run's own dtype against its noise floor."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli.config import ValidateConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import counted
from virnucpro_cli.kinds import KINDS, POOLED
from virnucpro_cli.validation import agreement
from virnucpro_cli.validation.oracle import Rows, Sample
from virnucpro_cli.validation.verdict import Check

SEMANTICS_GATES = {**dict.fromkeys(POOLED, 1e-5), "residue": 2e-5}
MEDIAN_OF_FLOOR, WORST_OF_FLOOR, BIAS_OF_FLOOR = 1.5, 3.0, 1.5
MAX_REL_L2 = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2, "fp8": 4e-1}
"""Largest relative L2 of a pooled row by compute dtype, from real 8M weights (worst seen: 5.2e-6 and 6.4e-3 of 420
proteins, 3.6e-2 of 60). bf16 on the 3B may need more: --max-rel-l2."""

MIN_COSINE = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.998, "fp8": 0.92}
"""Least cosine of a pooled row. 0.998 is what a relative L2 of 6e-2 comes to, 0.92 what 4e-1 does."""

MAX_MEDIAN_REL_L2 = {"fp8": 1e-1}
"""fp8 is held to a median of its own and not to the noise floor of 16 bit, which it is shown beside."""

FEWEST = 6
"""Proteins from which on medians say something."""

ROUNDOFF = 2.0**-24
"""Half the spacing of fp32 numbers: no floor is taken to be lower."""

NO_FLOOR = "no floor: the reference overflows"
SINGLE = ("mean", "bos")
"""Kinds whose rows are held to limits of their own: one of all residues, and one of a single place."""

SEMANTICS = "Semantics: embed in fp32 against the reference"
BINS = (0, 100, 300, 600, 1023)
NEIGHBOURS = 5


def limits(config: ValidateConfig, short: str) -> tuple[float, float]:
    """Least cosine and largest relative L2 of a pooled row, float scalars: the user's, or else those of the dtype."""
    min_cosine = MIN_COSINE[short] if config.min_cosine is None else config.min_cosine
    return min_cosine, MAX_REL_L2[short] if config.max_rel_l2 is None else config.max_rel_l2


def semantics(ours: Rows, truth: Rows, sample: Sample, layers: tuple[int, ...]) -> Iterator[Check]:
    """The fast path in fp32 against the oracle in fp32: relative L2 of each protein, at most the gate.

    ours, truth: float [n, D] of each kind and layer, for residue [sum of lengths, D], which is one matrix a protein.
    A standard deviation may differ by what its rows owe it besides: they have a gate of their own, that of residue.
    """
    for kind in KINDS:
        for layer in layers:
            pairs = (sample.by_protein(rows[kind, layer], kind) for rows in (ours, truth))
            error = np.array([agreement.relative_l2(a.ravel(), b.ravel()) for a, b in zip(*pairs, strict=True)])
            gate, what = SEMANTICS_GATES[kind], f"{kind}, layer {layer}: relative L2"
            beyond, note = ~(error <= gate), ""
            if kind == "std" and beyond.any():
                owed = beyond & owed_to_rows(ours, truth, sample, layer)
                beyond, note = beyond & ~owed, f"{owed.sum()} owed to rows nearly alike" if owed.any() else ""
            passed = not beyond.any()
            yield Check.of(SEMANTICS, what, error, sample.names, passed=passed, limit=f"{gate:.0e}", note=note)


def owed_to_rows(ours: Rows, truth: Rows, sample: Sample, layer: int) -> NDArray[np.bool_]:
    """Whether each protein's standard deviation is within the gate but for what differences of its rows make, bool [n].

    The deviation of a channel of L rows is |Px| / sqrt(L), where P takes off the mean and makes no vector longer. So
    two of them differ by |P(x - y)| / sqrt(L) at most, hence by |x - y| / sqrt(L), and those of all channels by
    |X - Y| / sqrt(L) of the residue rows X and Y. Where rows are nearly alike, that is much beside the deviation.
    ours, truth: as in `semantics`.
    """
    deviations = (rows["std", layer].astype(np.float64) for rows in (ours, truth))
    residues = (sample.by_protein(rows["residue", layer].astype(np.float64), "residue") for rows in (ours, truth))
    most = np.array([np.linalg.norm(x - y) / len(x) ** 0.5 for x, y in zip(*residues, strict=True)])
    mine, exact = deviations
    return np.linalg.norm(mine - exact, axis=1) <= SEMANTICS_GATES["std"] * np.linalg.norm(exact, axis=1) + most


class Precision:
    """A run's rows beside exact ones, and its errors beside the noise floor: those of plain runs of the oracle.

    ours, exact, each of plain: float [n, D] of each kind and layer, for residue [sum of lengths, D]. Where the oracle
    overflows in the dtype there is no floor: it is NaN, and nothing is judged by it.
    """

    def __init__(
        self, dtype: torch.dtype, ours: Rows, exact: Rows, plain: list[Rows], sample: Sample, layers: tuple[int, ...]
    ):
        self.dtype, self.ours, self.exact, self.plain = dtype, ours, exact, plain
        self.sample, self.layers = sample, layers
        self.short = devices.short_name(dtype)
        self.median_limit = MAX_MEDIAN_REL_L2.get(self.short)
        self.part = f"Precision: embed in {self.short} against its noise floor"
        if self.median_limit is not None:
            self.part = f"Precision: embed in {self.short}, approximate, beside the noise floor of fp16"
        self.errors, self.floors = {}, {}
        for key in [(kind, layer) for kind in KINDS for layer in layers]:
            self.errors[key] = agreement.relative_l2(ours[key], exact[key])
            floor = np.max([agreement.relative_l2(rows[key], exact[key]) for rows in plain], axis=0)
            self.floors[key] = np.where(np.isfinite(floor), np.maximum(floor, ROUNDOFF), np.nan)
        self.overflows = int(np.isnan([self.floors["mean", layer] for layer in layers]).any(axis=0).sum())
        self.note = (
            f"{counted(self.overflows, 'protein')} without a noise floor: the reference overflows in {self.short}"
        )

    def checks(self, config: ValidateConfig) -> Iterator[Check]:
        """Errors and bias against the floor, rows of the last layer against the limits, and numbers to look at."""
        for key in self.errors:
            yield self._against_the_floor(*key)
        for layer in self.layers:
            yield self._bias(layer)
        yield from self._within_limits(*limits(config, self.short))
        yield from self._shown()

    def _check(self, what: str, values: agreement.Float64, kind: str, lowest: bool = False, **rest: Any) -> Check:
        return Check.of(self.part, what, values, self.sample.names_of(kind), lowest, **rest)

    def _against_the_floor(self, kind: str, layer: int) -> Check:
        error, floor, what = self.errors[kind, layer], self.floors[kind, layer], f"{kind}, layer {layer}: relative L2"
        there = np.isfinite(floor)
        if not there.any():
            return self._check(what, error, kind, note=NO_FLOOR)
        paired = float(np.median(np.maximum(error, ROUNDOFF)[there] / floor[there]))
        worst = float(max(error[there].max(), ROUNDOFF) / floor[there].max())
        judged = self.median_limit is None and len(self.sample) - self.overflows >= FEWEST
        return self._check(
            what, error, kind,
            passed=(paired <= MEDIAN_OF_FLOOR and worst <= WORST_OF_FLOOR) if judged else None, floor=_said(floor),
            limit=f"{MEDIAN_OF_FLOOR} x / {WORST_OF_FLOOR:.0f} x", note=f"{paired:.2f} x / {worst:.2f} x",
        )  # fmt: skip

    def _bias(self, layer: int) -> Check:
        key, what = ("residue", layer), f"residue, layer {layer}: mean signed error"
        there = np.isfinite(self.floors[key])
        if not there.any():
            return Check(self.part, what, note=NO_FLOOR)
        ours, exact, *plain = (rows[key] for rows in (self.ours, self.exact, *self.plain))
        if not there.all():
            ours, exact, *plain = (rows[there] for rows in (ours, exact, *plain))
        bias = max(agreement.bias(ours, exact), ROUNDOFF)
        floor = max(ROUNDOFF, *(agreement.bias(rows, exact) for rows in plain))
        size = float(np.median(self.floors[key][there]))
        by_chance = 2 * size / len(exact) ** 0.5  # what is left of unbiased errors in a mean over few residues
        if self.dtype == torch.float32:
            # fp32 units round with a bias of their own (products of three TF32, fast exponentials: 3e-7 on an H100), so
            # there the mean error is held to the size of the floor's errors. A wrong formula is a hundred times that.
            floor = max(floor, size)
        passed = bias <= BIAS_OF_FLOOR * floor + by_chance if self.median_limit is None else None
        return Check(
            self.part, what, passed, worst=bias, floor=f"{floor:.1e}",
            limit=f"{BIAS_OF_FLOOR} x", note=f"{bias / floor:.2f} x",
        )  # fmt: skip

    def _within_limits(self, min_cosine: float, max_rel_l2: float) -> Iterator[Check]:
        for key in ((kind, self.layers[-1]) for kind in SINGLE):
            what, kind = "{}, layer {}".format(*key), key[0]
            cosine, error = agreement.cosine(self.ours[key], self.exact[key]), self.errors[key]
            passed = bool(cosine.min() >= min_cosine)
            yield self._check(f"{what}: cosine", cosine, kind, True, passed=passed, limit=f">= {min_cosine}")
            passed = bool(error.max() <= max_rel_l2)
            yield self._check(f"{what}: relative L2", error, kind, passed=passed, limit=f"{max_rel_l2:.0e}")
            if self.median_limit is not None:
                median, limit = float(np.median(error)), self.median_limit
                yield Check(self.part, f"{what}: median relative L2", median <= limit, median, limit=f"{limit:.0e}")

    def _centred_and_rms(self, kind: str) -> tuple[agreement.Float64, agreement.Float64]:
        a, b = (rows[kind, self.layers[-1]] for rows in (self.ours, self.exact))
        return agreement.cosine(a, b, b.mean(axis=0)), agreement.max_over_rms(a, b)

    def _shown(self) -> Iterator[Check]:
        last, lengths = self.layers[-1], self.sample.lengths
        for kind in KINDS:
            centred, over_rms = self._centred_and_rms(kind)
            yield self._check(f"{kind}, layer {last}: cosine after centring", centred, kind, lowest=True)
            yield self._check(f"{kind}, layer {last}: max error / rms", over_rms, kind)
        if len(lengths) > NEIGHBOURS:
            kept = agreement.neighbours_kept(self.ours["mean", last], self.exact["mean", last], NEIGHBOURS)
            yield Check(self.part, f"mean, layer {last}: {NEIGHBOURS} nearest neighbours kept", note=f"{kept:.1%}")
        for low, high in zip(BINS, [*BINS[1:], 1 << 62], strict=True):
            inside = (lengths >= low) & (lengths < high)
            label = f"{low}-{high - 1}" if high < 1 << 62 else f"{low} and more"
            for kind in ("mean", "residue") if inside.any() else ():
                here = np.repeat(inside, lengths) if kind == "residue" else inside
                yield Check.of(
                    self.part, f"{kind}, {label} residues ({counted(int(inside.sum()), 'protein')})",
                    self.errors[kind, last][here], self.sample.names_of(kind)[here],
                    floor=_said(self.floors[kind, last][here]),
                )  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """Numbers of each protein at the last layer."""
        last = self.layers[-1]
        columns: dict[str, list[Any]] = {"name": self.sample.names, "residues": self.sample.lengths.tolist()}
        for kind in SINGLE:
            centred, over_rms = self._centred_and_rms(kind)
            values = {
                "relative L2": self.errors[kind, last],
                "relative L2 floor": self.floors[kind, last],
                "cosine": agreement.cosine(self.ours[kind, last], self.exact[kind, last]),
                "cosine after centring": centred,
                "max error / rms": over_rms,
            }
            columns |= {f"{kind} {name}": each.tolist() for name, each in values.items()}
        for error in self.sample.by_protein(self.errors["residue", last], "residue"):
            for name, value in (
                ("median", float(np.median(error))), ("99 %", float(np.quantile(error, 0.99))),
                ("worst", float(error.max())), ("worst at", int(error.argmax()) + 1),
            ):  # fmt: skip
                columns.setdefault(f"residue relative L2 {name}", []).append(value)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _said(floor: agreement.Float64) -> str:
    floor = floor[np.isfinite(floor)]
    if not len(floor):
        return ""
    return f"{np.median(floor):.1e} / {floor.max():.1e}"
