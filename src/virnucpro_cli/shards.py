"""Shards: the same input dealt to many jobs that never talk to each other. Which records, which file; nothing is read here.

A shard is a set of records, a pure function of the input, the policies and the number of shards: no token budget, device or worker
changes it. Duplicates go where the first of them goes.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError
from virnucpro_cli.packing import SPECIAL_TOKENS
from virnucpro_cli.policies import Work

MOST = 9999
_NUMBERS = re.compile(r"(auto|[0-9]+)(?:/([0-9]+))?")


@dataclass(frozen=True)
class Shard:
    """number: 1 to count."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


class _Scheduler(NamedTuple):
    """The variables in which a batch system tells an array job's task its index. first, last and step: variables or numbers."""

    name: str
    variable: str
    first: str | int = 1
    last: str | None = None
    step: str | int = 1


SCHEDULERS = (
    _Scheduler("Slurm", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"),
    _Scheduler("Grid Engine", "SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    _Scheduler("LSF", "LSB_JOBINDEX", 1, "LSB_JOBINDEX_END", "LSB_JOBINDEX_STEP"),
    _Scheduler("PBS", "PBS_ARRAY_INDEX"),
    _Scheduler("Torque", "PBS_ARRAYID"),
    _Scheduler("Kubernetes", "JOB_COMPLETION_INDEX", 0),
    _Scheduler("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", 0),
)


def parse(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """`3/40`; `auto`, the task of an array job; `auto/40` where the batch system does not tell how many there are.

    Raises UserError.
    """
    match = _NUMBERS.fullmatch(text)
    if not match or (match[1] != "auto" and not match[2]):
        raise UserError(f"--shard is {text!r}.", "Give a number and a count such as 3/40, or auto in an array job.")
    if match[1] != "auto":
        shard = Shard(int(match[1]), int(match[2]))
    else:
        shard = _of_the_task(int(match[2]) if match[2] else None, environment)
    if not 1 <= shard.number <= shard.count <= MOST:
        raise UserError(
            f"--shard is {shard}.", f"Shards are numbered from 1 to their count, which is {MOST:,} at most."
        )
    return shard


def _of_the_task(count: int | None, environment: Mapping[str, str]) -> Shard:
    def number(source: str | int | None, what: str) -> int:
        try:
            return source if isinstance(source, int) else int(environment[source or ""])
        except (KeyError, ValueError):
            assert scheduler is not None
            raise UserError(
                f"--shard auto: {scheduler.name} does not say {what} of this array job ({source or 'no variable'}).",
                "Give the count: --shard auto/40.",
            ) from None

    scheduler = _scheduler(environment)
    if scheduler is None:
        raise UserError(
            "--shard auto: this is not a task of an array job (none of "
            f"{', '.join(s.variable for s in SCHEDULERS)} is set).",
            "Say which one it is, such as --shard 3/40.",
        )
    index, first = number(scheduler.variable, "the index"), number(scheduler.first, "the first index")
    step = number(scheduler.step, "the step")
    if count is None:
        count = (number(scheduler.last, "the last index") - first) // step + 1
        if scheduler.name == "Slurm" and int(environment.get("SLURM_ARRAY_TASK_COUNT", count)) != count:
            raise UserError(
                "--shard auto: the array of this job has gaps.",
                "Submit it as --array=1-40, or give --shard K/N yourself.",
            )
    return Shard((index - first) // step + 1, count)


def _scheduler(environment: Mapping[str, str]) -> _Scheduler | None:
    # Grid Engine sets its variable to "undefined" outside of array jobs
    return next((s for s in SCHEDULERS if environment.get(s.variable, "undefined") != "undefined"), None)


def scheduler_here() -> str | None:
    """The batch system of whose array job this process is a task, if any."""
    found = _scheduler(os.environ)
    return None if found is None else found.name


def path(output: Path, shard: Shard) -> Path:
    """`out.h5` to `out.shard-0003-of-0040.h5`, beside it."""
    return output.with_name(f"{output.stem}.shard-{shard.number:04d}-of-{shard.count:04d}{output.suffix}")


def files_of(output: Path) -> dict[int, dict[int, Path]]:
    """Shards of an output that are there, finished or partial: count -> number -> file. A finished one hides its partial."""
    found: dict[int, dict[int, Path]] = {}
    name = re.compile(
        rf"{re.escape(output.stem)}\.shard-([0-9]{{4}})-of-([0-9]{{4}}){re.escape(output.suffix)}(\.partial)?"
    )
    for file in sorted(output.parent.glob("*.shard-*"), reverse=True):  # .partial sorts after the name itself
        match = name.fullmatch(file.name)
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = file
    return found


def records_of(shard: Shard, work: Work) -> NDArray[np.int64]:
    """The shard's records, rising: units in falling order of cost, dealt to and fro, so that no two shards differ by more than
    one unit's; what costs nothing is dealt as well, and copies follow their unit."""
    n = len(work.unit)
    cost = np.bincount(work.segments.record, work.segments.length.astype(np.int64) + SPECIAL_TOKENS, n)
    units = np.flatnonzero(work.unit == np.arange(n))
    order = units[np.argsort(-cost[units], kind="stable")]
    turn, place = np.divmod(np.arange(len(order)), shard.count)
    owner = np.empty(n, np.int64)
    owner[order] = np.where(turn % 2 == 0, place, shard.count - 1 - place)
    return np.flatnonzero(owner[work.unit] == shard.number - 1)
