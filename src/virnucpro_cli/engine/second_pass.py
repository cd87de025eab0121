"""The second pass: what the device had no memory for, and what was not finite, once more in the ways that are left.

Too large: in the same dtype with the layers' work in parts, then in fp32 on the CPU.
Not finite: in fp32, on the CPU where the device has no room for that. What is left is skipped.
"""

from collections.abc import Callable

import numpy as np
import torch

from virnucpro_cli import store
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import counted, in_a_line
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.families import build, parameters
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.plan.packing import SMALLEST_BUCKET, Plan, first_fit_decreasing
from virnucpro_cli.plan.policies import Int64

PART = 4096
"""Rows of a part: a multiple of the smallest bucket, so that products have the bits that they have in a whole pack."""

CPU, WIDE = torch.device("cpu"), torch.float32


def second_pass(placer: Placer, device: torch.device, backend: Backend | None, note: Callable[[str], None]) -> None:
    """Embed or skip what the placer has in `unfit` and `broken`; `note` is told.

    backend: None where the run's device is on another host, so that what it has no memory for is for the CPU here.
    """
    job, word = placer.job, placer.job.config.words[0]
    spec, state, _ = model_weights.load(job.weights)

    def again(records: Int64, model_of: Callable[[], PackedModel]) -> tuple[Int64, Int64]:
        """Embed records once more, and return what is still unfit, and still broken."""
        try:
            model = model_of()
        except torch.cuda.OutOfMemoryError as error:  # of a device that others fill
            note(f"no room for the weights: {in_a_line(error)}")
            torch.cuda.empty_cache()
            return records, np.empty(0, np.int64)
        _run(placer, records, runner.compute_with(model, job.layers, job.config), model.device)
        return _taken(placer)

    def in_fp32(records: Int64, on: torch.device) -> tuple[Int64, Int64]:
        exact = attention_backends.resolve("auto", on, WIDE)
        placer.flag = store.RECOMPUTED
        placer.file.compute_in(devices.computed_at(on, WIDE, exact))
        return again(records, lambda: build(spec, state, WIDE, on, exact))

    unfit, broken = _taken(placer)
    if len(unfit) and backend is not None:
        too_large = f"{counted(len(unfit), word)} too large for {devices.describe_device(device)}"
        note(f"{too_large}: once more in parts of {PART:,} rows")
        unfit, overflowed = again(unfit, lambda: build(spec, state, job.dtype, device, backend).in_parts(PART))
        broken = np.union1d(broken, overflowed)
    if len(broken) and job.dtype != WIDE:
        name = attention_backends.describe(job.dtype)
        note(f"{counted(len(broken), word)} had values that are not finite in {name}: once more in float32")
        still_unfit, broken = in_fp32(broken, device)
        unfit = np.union1d(unfit, still_unfit)
    room = devices.free_memory(CPU) - 4 * parameters(spec)
    row_bytes = 24 * 4 * spec.hidden  # in fp32 a row takes some 20 times its width at most
    fits = row_bytes * placer.embedded[unfit].astype(np.int64) < room
    if fits.any() and (device, job.dtype) != (CPU, WIDE):
        note(f"{counted(int(fits.sum()), word)} once more in float32 on the CPU, which takes its time")
        still_unfit, overflowed = in_fp32(unfit[fits], CPU)
        unfit, broken = np.union1d(unfit[~fits], still_unfit), np.union1d(broken, overflowed)
    for records, reason, why in (
        (unfit, store.NO_MEMORY, "out of memory; the same command where there is more tries them again"),
        (broken, store.NOT_FINITE, "not finite in float32 or in what is stored"),
    ):
        if len(records):
            note(f"{counted(len(records), word)} skipped: {why}")
            placer.give_up(records, reason)


def _run(placer: Placer, records: Int64, compute: runner.Compute, device: torch.device) -> None:
    segments, embedded = placer.segments, placer.embedded
    placer.pending = np.zeros(len(embedded), np.bool_)
    placer.pending[records] = True
    placer.forget_windows()
    chosen = np.flatnonzero(placer.pending[segments.record])
    part = first_fit_decreasing(segments.length[chosen], SMALLEST_BUCKET)
    plan = Plan(chosen[part.segments], part.offsets, part.bucket, part.tokens, part.token_budget)
    placer.collator = VarlenCollator(placer.job.table, segments, embedded, plan, pin=device.type == "cuda")
    placer.tracker = None
    runner.run_packs(range(len(plan)), placer.collator, compute, placer, device, unfit=placer.note_unfit)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _taken(placer: Placer) -> tuple[Int64, Int64]:
    """Records that are unfit and that are broken, int64 [n] each, less those that another worker has done meanwhile."""
    placer.file.commit()
    pending = placer.file.status == store.PENDING
    unfit, broken = (np.unique(np.asarray(each, np.int64)) for each in (placer.unfit, placer.broken))
    placer.unfit, placer.broken = [], []
    return unfit[pending[unfit]], broken[pending[broken]]
