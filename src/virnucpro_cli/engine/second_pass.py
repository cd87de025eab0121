"""The second pass: what the device had no memory for, and what was not finite, once more in the ways that are left.

Too large: in the same dtype with the layers' work in parts, then in fp32 on the CPU. Not finite: in fp32, on the CPU where the device
has no room for that. What is left is skipped.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli import store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices, runner
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import counted, in_a_line
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.esm2 import ESM2
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import SMALLEST_BUCKET, Plan, first_fit_decreasing
from virnucpro_cli.plan.policies import Int64

PART = 4096
"""Rows of a part: a multiple of the smallest bucket, so that products have the bits that they have in a whole pack."""

CPU = torch.device("cpu")


def second_pass(
    placer: Placer, found: locate.Weights, layers: tuple[int, ...], config: EmbedConfig, dtype: torch.dtype,
    device: torch.device, backend: Backend | None, environment_of: Callable[[torch.device, torch.dtype, Backend], str], note: Callable[[str], None],
) -> None:  # fmt: skip
    """Embed or skip what the placer has in `unfit` and `broken`. `note` is told; environment_of(device, dtype, backend): as the file records it.

    backend: None where the run's own device is on another host, so that what it has no memory for is for the CPU here.
    """
    unfit, broken = _taken(placer)
    spec, state, _ = model_weights.load(found)
    wide = torch.float32

    def again(records: Int64, make: Callable[[], ESM2]) -> tuple[Int64, Int64]:
        """What is still unfit, and still broken."""
        try:
            model = make()
        except torch.cuda.OutOfMemoryError as error:  # of a device that others fill
            note(f"no room for the weights: {in_a_line(error)}")
            torch.cuda.empty_cache()
            return records, np.empty(0, np.int64)
        _run(placer, records, runner.compute_with(model, layers, config), model.device)
        return _taken(placer)

    if len(unfit) and backend is not None:
        own = backend
        note(
            f"{counted(len(unfit), 'protein')} too large for {devices.describe_device(device)}: once more in parts of {PART:,} rows"
        )
        unfit, overflowed = again(unfit, lambda: ESM2(spec, state, dtype, device, own).in_parts(PART))
        broken = np.union1d(broken, overflowed)
    if len(broken) and dtype != wide:
        name = attention_backends.describe(dtype)
        note(f"{counted(len(broken), 'protein')} had values that are not finite in {name}: once more in float32")
        exact = attention_backends.resolve("auto", device, wide)
        placer.flag = store.RECOMPUTED
        placer.file.compute_in(environment_of(device, wide, exact))
        too_large, broken = again(broken, lambda: ESM2(spec, state, wide, device, exact))
        unfit = np.union1d(unfit, too_large)
    fits = _fit_the_host(unfit, placer, spec)
    if fits.any() and (device, dtype) != (CPU, wide):
        note(f"{counted(len(unfit[fits]), 'protein')} once more in float32 on the CPU, which takes its time")
        there = attention_backends.resolve("auto", CPU, wide)
        placer.flag = store.RECOMPUTED
        placer.file.compute_in(environment_of(CPU, wide, there))
        still, overflowed = again(unfit[fits], lambda: ESM2(spec, state, wide, CPU, there))
        unfit, broken = np.union1d(unfit[~fits], still), np.union1d(broken, overflowed)
    if len(unfit):
        note(
            f"{counted(len(unfit), 'protein')} skipped: out of memory; the same command where there is more tries them again"
        )
        placer.give_up(unfit, store.NO_MEMORY)
    if len(broken):
        note(f"{counted(len(broken), 'protein')} skipped: not finite in float32 or in what is stored")
        placer.give_up(broken, store.NOT_FINITE)


def _fit_the_host(records: Int64, placer: Placer, spec: ModelSpec) -> NDArray[np.bool_]:
    """Which records the host's memory surely has room for in fp32: a row takes some 20 times its width at most."""
    room = devices.free_memory(CPU) - 4 * spec.parameters
    return 24 * 4 * spec.hidden * placer.work.embedded[records].astype(np.int64) < room


def _run(placer: Placer, records: Int64, compute: runner.Compute, device: torch.device) -> None:
    work = placer.work
    placer.todo = np.zeros(len(work.representative), np.bool_)
    placer.todo[records] = True
    placer.forget_windows()
    chosen = np.flatnonzero(placer.todo[work.segments.record])
    part = first_fit_decreasing(work.segments.length[chosen], SMALLEST_BUCKET)
    plan = Plan(chosen[part.segments], part.offsets, part.bucket, part.tokens, part.token_budget)
    placer.collator = VarlenCollator(placer.table, work.segments, work.embedded, plan, pin=device.type == "cuda")
    placer.tracker = None
    runner.run_packs(range(len(plan)), placer.collator, compute, placer, device, unfit=placer.note_unfit)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _taken(placer: Placer) -> tuple[Int64, Int64]:
    """What is unfit and what is broken, less what another worker has done meanwhile."""
    placer.file.commit()
    pending = placer.file.status == store.PENDING
    unfit, broken = (np.unique(np.asarray(each, np.int64)) for each in (placer.unfit, placer.broken))
    placer.unfit, placer.broken = [], []
    return unfit[pending[unfit]], broken[pending[broken]]
