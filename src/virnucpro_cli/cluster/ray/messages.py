"""What the driver and its actors say to each other: shares of the plan, and the rows that became of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.engine.devices import Device
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.engine.workers import Lost
from virnucpro_cli.plan.packing import Plan, Segments, ranges


class Looked(NamedTuple):
    """Where an actor is. node: Ray's id of it."""

    device: Device
    node: str


class Share(NamedTuple):
    """Some packs, whole: the plan of them with its own numbers, and the tokens of their records.

    tokens: uint8, one record behind the other, `lengths` int32 of each; numbers: int64, of each segment in the whole plan.
    """

    tokens: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    embedded: NDArray[np.int32]
    segments: Segments
    plan: Plan
    numbers: NDArray[np.int64]


class Rows(NamedTuple):
    """What became of one batch: a `Packed` and a `Found` for the placer, with the numbers of segments in the whole plan."""

    segments: NDArray[np.int64]
    seqlens: NDArray[np.int64]
    pooled: dict[tuple[str, Any], NDArray[Any]]
    residue: dict[Any, NDArray[Any]]
    finite: NDArray[np.bool_]

    @property
    def used(self) -> int:
        return int(self.seqlens.sum())


@dataclass
class Returned:
    """What an actor did since it last said so."""

    rows: list[Rows] = field(default_factory=list)
    unfit: list[int] = field(default_factory=list)  # segments
    notes: list[str] = field(default_factory=list)
    used: dict[str, Any] = field(default_factory=dict)
    ended: bool = False  # nothing of what it was sent is left
    lost: Lost | None = None


def share_of(packs: Sequence[int], plan: Plan, placer: Placer) -> Share:
    """Everything that an actor needs to know of some packs; windows come with those they are blended with."""
    segments, table = placer.work.segments, placer.table
    parts = [plan.pack(pack) for pack in packs]
    wanted = np.concatenate(parts)
    records = np.unique(segments.record[wanted])
    first, last = (np.searchsorted(segments.record, records, side=side) for side in ("left", "right"))
    counts = last - first
    numbers = ranges(first, counts)
    table.check_unchanged()
    return Share(
        table.tokens(records), table.length[records], placer.work.embedded[records],
        Segments(np.repeat(np.arange(len(records)), counts), segments.start[numbers], segments.length[numbers]),
        Plan(
            np.searchsorted(numbers, wanted), np.append(0, np.cumsum([len(part) for part in parts])),
            plan.bucket[list(packs)], plan.tokens[list(packs)], plan.token_budget,
        ),
        numbers,
    )  # fmt: skip
