"""Shards: the same input dealt to many jobs that never talk to each other. Which records, which file.

A shard is a set of records, a pure function of the input, the policies and the number of shards: no token budget,
device or worker changes it. Duplicates go where the first of them goes.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.plan.policies import costs, representatives

MOST = 9999
BLOCKS = 64
"""Blocks of neighbours that a shard is made of, about."""
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
    """The variables in which a batch system tells an array job's task its index, and facts of the array.

    first, last, step, tasks: variables of the array's first and last index, its step and its number of tasks.
    base: the first index, where the batch system itself decides it; else the user says auto0 for an array from 0.
    none: the index of a job that is no array.
    """

    name: str
    variable: str
    first: str = ""
    last: str = ""
    step: str = ""
    tasks: str = ""
    base: int | None = None
    none: str = "undefined"


SCHEDULERS = (
    _Scheduler("Slurm", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX",
               "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"),
    _Scheduler("Grid Engine", "SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    _Scheduler("LSF", "LSB_JOBINDEX", none="0"),
    _Scheduler("PBS", "PBS_ARRAY_INDEX"),
    _Scheduler("Torque", "PBS_ARRAYID"),
    _Scheduler("Kubernetes", "JOB_COMPLETION_INDEX", base=0),
    _Scheduler("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", base=0),
)  # fmt: skip


def parse(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """The shard that --shard names, by itself or by the variables of a batch system. Raises UserError.

    `3/40`; `auto/40`, the index of an array job's task, and `auto0/40` where its array counts from 0; `auto`, of an
    array that tells how many tasks it has and was submitted whole.
    """
    match = _TEXT.fullmatch(text)
    if not match or (match[1] != "auto" and not match[2]):
        remedy = (
            "Give a number and a count such as 3/40, or auto/40 in an array job (auto0/40 if its indices count from 0)."
        )
        raise UserError(f"--shard is {text!r}.", remedy)
    index = ""
    if match[1].isdigit():
        shard = Shard(int(match[1]), int(match[2]))
    elif match[2]:
        task = _Task(environment)
        shard = task.shard_of(int(match[2]), 0 if match[1] == "auto0" else 1)
        index = f" ({task.names.variable} is {task.index})"
    else:
        shard = _Task(environment).shard_of_all()
    if not 1 <= shard.number <= shard.count <= MOST:
        remedy = f"Shards are numbered from 1 to their count, which is {MOST:,} at most."
        raise UserError(f"--shard is {shard}{index}.", remedy)
    return shard


class _Task:
    """A task of an array job, by its environment. Raises UserError if this is none."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment
        if (names := _scheduler(environment)) is None:
            variables = ", ".join(scheduler.variable for scheduler in SCHEDULERS)
            raise UserError(
                f"--shard auto: this is not a task of an array job (none of {variables} is set).",
                "Say which one it is, such as --shard 3/40.",
            )
        self.names = names

    @property
    def index(self) -> int:
        return self.number(self.names.variable)

    def number(self, variable: str) -> int:
        """The value of a variable. Raises UserError if it is no number."""
        text = self.environment.get(variable, "")
        if not _NUMBER.fullmatch(text):
            raise UserError(
                f"--shard auto: {variable} of {self.names.name} is {text[:40]!r}, which is no number.",
                "Say how many shards there are in all, --shard auto/40, or which one it is, --shard 3/40.",
            )
        return int(text)

    def shard_of(self, count: int, base: int) -> Shard:
        """The shard whose number is the task's index, whichever tasks were submitted."""
        names, index = self.names, self.index
        if names.base is not None:
            return Shard(index + 1 - names.base, count)
        first = self.number(names.first) if names.first in self.environment else index
        if min(index, first) < base:
            raise UserError(
                f"--shard auto/{count}: the array of this job has an index 0.",
                f"If it counts from 0, say --shard auto0/{count} in each of its jobs.",
            )
        return Shard(index + 1 - base, count)

    def shard_of_all(self) -> Shard:
        """The shard of a task that knows of all the others: of an array from 0 or 1, in even steps."""
        names = self.names
        if not names.first:
            wrong = f"{names.name} does not say how many tasks this array job has"
        else:
            index, first, last, step = map(self.number, (names.variable, names.first, names.last, names.step))
            if first > 1:
                wrong = f"the array of this job begins at {first}, as when some tasks are submitted again"
            elif step < 1 or not first <= index <= last or (index - first) % step:
                wrong = f"this is task {index} of an array {first}-{last}:{step}"
            else:
                shard = Shard((index - first) // step + 1, (last - first) // step + 1)
                if names.tasks not in self.environment or self.number(names.tasks) == shard.count:
                    return shard
                wrong = "the array of this job has gaps"
        remedy = "Say how many shards there are in all: --shard auto/40 (auto0/40 if the whole array counts from 0)."
        raise UserError(f"--shard auto: {wrong}.", remedy)


def _scheduler(environment: Mapping[str, str]) -> _Scheduler | None:
    return next((s for s in SCHEDULERS if environment.get(s.variable, s.none) != s.none), None)


def scheduler_here() -> str | None:
    """The batch system of whose array job this process is a task, if any."""
    scheduler = _scheduler(os.environ)
    return scheduler and scheduler.name


def check_one_set(text: str, shard: Shard, output: Path) -> None:
    """Raise UserError if `auto` came to a count that is not the count of the shards that are there already."""
    others = sorted(set(files_of(output)) - {shard.count})
    if text == "auto" and others:
        counts = " and ".join(map(str, others))
        raise UserError(
            f"--shard auto is --shard {shard} here, and beside {output} there are shards of {counts}.",
            f"If tasks of that array are submitted again, say --shard auto/{others[-1]}; "
            f"for another set say --shard auto/{shard.count}.",
        )


def path(output: Path, shard: Shard) -> Path:
    """`out.h5` to `out.shard-0003-of-0040.h5`, beside it."""
    return output.with_name(f"{output.stem}.shard-{shard.number:04d}-of-{shard.count:04d}{output.suffix}")


def files_of(output: Path) -> dict[int, dict[int, Path]]:
    """Shards of an output that are there, finished or partial: count -> number -> file.

    A finished one hides its partial.
    """
    files: dict[int, dict[int, Path]] = {}
    stem, suffix = re.escape(output.stem), re.escape(output.suffix)
    name = re.compile(rf"{stem}\.shard-([0-9]{{4}})-of-([0-9]{{4}}){suffix}(\.partial)?")
    for file in sorted(output.parent.glob("*.shard-*"), reverse=True):  # .partial sorts after the name itself
        if match := name.fullmatch(file.name):
            files.setdefault(int(match[2]), {})[int(match[1])] = file
    return files


def records_of(shard: Shard, table: RecordTable, config: EmbedConfig) -> NDArray[np.int64]:
    """The shard's records, rising: int64 [n].

    Neighbours stay together: blocks of them, in falling order of cost, are dealt to and fro, so that no two shards
    differ by more than one block's cost, and copies go with their representative. A block of few records is one.
    Raises UserError as `decide` does for the whole input.
    """
    n = len(table)
    size = max(1, n // (BLOCKS * shard.count))
    cost = np.zeros(-(-n // size), np.int64)
    for rows, those in representatives(table, config):
        block = np.arange(rows.start, rows.stop) // size - rows.start // size
        sums = np.bincount(block, costs(table, rows, those, config))
        cost[rows.start // size :][: len(sums)] += sums.astype(np.int64)
    turn, seat = np.divmod(np.arange(len(cost)), shard.count)
    owner = np.empty(len(cost), np.int64)
    owner[np.argsort(-cost, kind="stable")] = np.where(turn % 2 == 0, seat, shard.count - 1 - seat)
    own = [
        rows.start + np.flatnonzero(owner[those // size] == shard.number - 1)
        for rows, those in representatives(table, config)
    ]
    return np.concatenate(own)
