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
from virnucpro_cli.plan.packing import SPECIAL_TOKENS
from virnucpro_cli.plan.policies import Decisions

MOST = 9999
_TEXT = re.compile(r"(auto0?|[0-9]{1,9})(?:/([0-9]{1,9}))?")
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Shard:
    """number: 1 to count."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


class _Scheduler(NamedTuple):
    """The variables in which a batch system tells an array job's task its index, and the array's first and last index, its step and its number of tasks.

    base: of the index, where the batch system itself decides it; else the user does, who says auto0 for an array from 0.
    none: the index of a job that is no array.
    """

    name: str
    variable: str
    first: str | None = None
    last: str | None = None
    step: str | None = None
    tasks: str | None = None
    base: int | None = None
    none: str = "undefined"


SCHEDULERS = (
    _Scheduler(
        "Slurm",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_MAX",
        "SLURM_ARRAY_TASK_STEP",
        "SLURM_ARRAY_TASK_COUNT",
    ),
    _Scheduler("Grid Engine", "SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    _Scheduler("LSF", "LSB_JOBINDEX", none="0"),
    _Scheduler("PBS", "PBS_ARRAY_INDEX"),
    _Scheduler("Torque", "PBS_ARRAYID"),
    _Scheduler("Kubernetes", "JOB_COMPLETION_INDEX", base=0),
    _Scheduler("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", base=0),
)


def parse(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """`3/40`; `auto/40`, the index of an array job's task, and `auto0/40` where its array counts from 0; `auto`, of an array that
    tells how many tasks it has and was submitted whole.

    Raises UserError.
    """
    match = _TEXT.fullmatch(text)
    if not match or (match[1] != "auto" and not match[2]):
        raise UserError(
            f"--shard is {text!r}.",
            "Give a number and a count such as 3/40, or auto/40 in an array job (auto0/40 if its indices count from 0).",
        )
    if match[1].isdigit():
        shard, of = Shard(int(match[1]), int(match[2])), ""
    elif match[2]:
        shard, of = _of_the_index(match[1], int(match[2]), environment)
    else:
        shard, of = _of_a_whole_array(environment), ""
    if not 1 <= shard.number <= shard.count <= MOST:
        raise UserError(
            f"--shard is {shard}{of}.", f"Shards are numbered from 1 to their count, which is {MOST:,} at most."
        )
    return shard


def _of_the_index(text: str, count: int, environment: Mapping[str, str]) -> tuple[Shard, str]:
    """The shard whose number is the task's index, whichever tasks were submitted, and where the number is from, in words."""
    scheduler = _scheduler_of(environment)
    index = _number(scheduler, scheduler.variable, "the index", environment)
    base = scheduler.base
    if base is None:
        base = 0 if text == "auto0" else 1
        if scheduler.first is not None and scheduler.first in environment:
            first = _number(scheduler, scheduler.first, "the first index", environment)
        else:
            first = index
        if min(index, first) < base:
            raise UserError(
                f"--shard auto/{count}: the array of this job has an index 0.",
                f"If it counts from 0, say --shard auto0/{count} in each of its jobs.",
            )
    return Shard(index + 1 - base, count), f" ({scheduler.variable} is {index})"


def _of_a_whole_array(environment: Mapping[str, str]) -> Shard:
    """The shard of a task that knows of all the others: of an array from 0 or 1, in even steps."""
    scheduler = _scheduler_of(environment)
    say = "Say how many shards there are in all: --shard auto/40 (auto0/40 if the whole array counts from 0)."
    if scheduler.first is None:
        raise UserError(f"--shard auto: {scheduler.name} does not say how many tasks this array job has.", say)

    def number(source: str | None, what: str) -> int:
        return _number(scheduler, source, what, environment)

    index, first = number(scheduler.variable, "the index"), number(scheduler.first, "the first index")
    last, step = number(scheduler.last, "the last index"), number(scheduler.step, "the step")
    if first > 1:
        raise UserError(
            f"--shard auto: the array of this job begins at {first}, as when some tasks are submitted again.", say
        )
    if step < 1 or not first <= index <= last or (index - first) % step:
        raise UserError(f"--shard auto: this is task {index} of an array {first}-{last}:{step}.", say)
    count = (last - first) // step + 1
    if (
        scheduler.tasks is not None
        and scheduler.tasks in environment
        and number(scheduler.tasks, "the number of tasks") != count
    ):
        raise UserError("--shard auto: the array of this job has gaps.", say)
    return Shard((index - first) // step + 1, count)


def _number(scheduler: _Scheduler, variable: str | None, what: str, environment: Mapping[str, str]) -> int:
    text = environment.get(variable or "", "")
    if not _NUMBER.fullmatch(text):
        raise UserError(
            f"--shard auto: {scheduler.name} does not say {what} of this array job ({variable} is {text[:40]!r}).",
            "Say how many shards there are in all, --shard auto/40, or which one it is, --shard 3/40.",
        )
    return int(text)


def _scheduler_of(environment: Mapping[str, str]) -> _Scheduler:
    scheduler = _scheduler(environment)
    if scheduler is None:
        raise UserError(
            "--shard auto: this is not a task of an array job (none of "
            f"{', '.join(s.variable for s in SCHEDULERS)} is set).",
            "Say which one it is, such as --shard 3/40.",
        )
    return scheduler


def _scheduler(environment: Mapping[str, str]) -> _Scheduler | None:
    return next((s for s in SCHEDULERS if environment.get(s.variable, s.none) != s.none), None)


def scheduler_here() -> str | None:
    """The batch system of whose array job this process is a task, if any."""
    found = _scheduler(os.environ)
    return None if found is None else found.name


def check_one_set(text: str, shard: Shard, output: Path) -> None:
    """Raise UserError if `auto` came to a count that is not the count of the shards that are there already."""
    others = sorted(set(files_of(output)) - {shard.count})
    if text == "auto" and others:
        raise UserError(
            f"--shard auto is --shard {shard} here, and beside {output} there are shards of {' and '.join(map(str, others))}.",
            f"If tasks of that array are submitted again, say --shard auto/{others[-1]}; for another set say --shard auto/{shard.count}.",
        )


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


def records_of(shard: Shard, work: Decisions) -> NDArray[np.int64]:
    """The shard's records, rising: representatives in falling order of cost, dealt to and fro, so that no two shards differ by more than
    one representative's; what costs nothing is dealt as well, and copies follow their representative."""
    n = len(work.representative)
    cost = np.bincount(work.segments.record, work.segments.length.astype(np.int64) + SPECIAL_TOKENS, n)
    representatives = np.flatnonzero(work.representative == np.arange(n))
    order = representatives[np.argsort(-cost[representatives], kind="stable")]
    turn, place = np.divmod(np.arange(len(order)), shard.count)
    owner = np.empty(n, np.int64)
    owner[order] = np.where(turn % 2 == 0, place, shard.count - 1 - place)
    return np.flatnonzero(owner[work.representative] == shard.number - 1)
