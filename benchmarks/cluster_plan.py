"""A run over 1 to 512 GPUs by arithmetic: what the ways to spread it cost, and what a single writer bears.

    python benchmarks/cluster_plan.py [--fasta tests/data/uniprot_5k.fasta.gz] [--load natural] [--markdown]

The packer and the shards are the real ones, on a sample of real lengths; speeds are those of docs/benchmarks.md (650M,
fp16, H100). 10^10 proteins are not made: sums over that many are their expectations. Only the end of the hand-out is
played through, before which no GPU ever waits.
"""

import argparse
import heapq
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markdown import table
from numpy.typing import NDArray

from virnucpro_cli import fasta, report
from virnucpro_cli.benchmark import workload
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine.workers import LARGEST_SHARE
from virnucpro_cli.plan import shards
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Plan, in_blocks, whole_segments

RATE = {"natural": 359e3, "fragments": 387e3}  # tokens/s of a GPU, whole packs
INDEX = {"natural": 1.7e-6, "fragments": 0.28e-6}  # s a record, 16 cores: 2.8 s for 10^7, 276 MB/s
DEAL, PLAN, REST = 0.04e-6, 0.3e-6, 0.56e-6  # s a record: of all, by each shard; 3.0 s, and 5.6 s for names and the end
START = 15.0  # s: Python, weights, kernels, workers
BUDGET, WIDTH, ROW_BYTES, TABLE_BYTES = 32_768, 1280, 2560, 45
HOST = 8  # GPUs
PACK_SPREAD, GPU_SPREAD = 0.01, 0.02  # relative standard deviations, of packs on a GPU and between GPUs: assumed
ROW_SECONDS = 5e-6  # of a writer's CPU for a row: 243,000 rows/s by pwrite, measured, and a little more
DISK = 1.5e9
DISKS = {"disk 1 GB/s": 1e9, "disk 2 GB/s": 2e9, "10 Gb/s": 1.25e9, "25 Gb/s": 3.1e9, "100 Gb/s": 12.5e9}
PROTEINS, GPUS, PIECE = (10**8, 10**10), (1, 8, 64, 512), 10**7


@dataclass(frozen=True)
class Sample:
    """What the real packer makes of a sample: tokens and residues a protein, and pack sizes in rows."""

    load: str
    lengths: NDArray[np.int64]
    plan: Plan
    table: fasta.RecordTable

    @property
    def tokens(self) -> float:
        return float(self.lengths.mean()) + SPECIAL_TOKENS

    @property
    def proteins_per_second(self) -> float:
        """Of one GPU."""
        return RATE[self.load] * self.plan.density_without_last / self.tokens


def sample(load: str, path: Path | None, count: int, seed: int) -> Sample:
    dice = np.random.default_rng(seed)
    if path is None:
        lengths = getattr(workload, load)(600 * count, dice)[:count]
    else:
        read = fasta.index(fasta.open_sources([str(path)], Path(".")), dedup=False)
        lengths = dice.choice(read.length[read.length > 0], count).astype(np.int64)
    lengths = np.minimum(lengths, 1022)
    segments = whole_segments(np.arange(len(lengths)), lengths)
    numbers, nothing = np.arange(len(lengths)), np.zeros(len(lengths), np.int32)
    table = fasta.RecordTable([], [], numbers, lengths.astype(np.int32), nothing, numbers, [])
    return Sample(load, lengths, in_blocks(segments.length, BUDGET), table)


def shard_tokens(found: Sample, count: int) -> NDArray[np.int64]:
    """Tokens of the first shards and the last of `count`, dealt by the real code."""
    numbers, config = sorted({*range(1, min(count, 4) + 1), count}), EmbedConfig()
    dealt = [shards.records_of(shards.Shard(number, count), found.table, config) for number in numbers]
    return np.asarray([int((found.lengths[records] + SPECIAL_TOKENS).sum()) for records in dealt])


def speeds(gpus: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(1, GPU_SPREAD, gpus).clip(0.5)


def tail_of_shards(seconds: float, speed: NDArray[np.float64]) -> float:
    """Equal work on unequal hosts: how much longer the slowest takes than all would if they shared, in s."""
    hosts = np.asarray([part.mean() for part in np.array_split(speed, -(-len(speed) // HOST))])
    return float(seconds * (hosts.mean() / hosts.min() - 1))


def tail_of_hand_out(found: Sample, packs: int, speed: NDArray[np.float64], seed: int) -> float:
    """Seconds between the moment when all GPUs would have ended together and the end of the last.

    The rule is that of engine/dealing.py: a GPU that begins its last pack gets a third of its share of the rest.
    Longest packs first. speed: float64 [GPUs].
    """
    dice, gpus = np.random.default_rng(seed), len(speed)
    played = min(packs, 2 * 3 * gpus * LARGEST_SHARE)
    rows = np.sort(dice.choice(found.plan.bucket, played))[::-1]
    seconds = rows / RATE[found.load] * dice.normal(1, PACK_SPREAD, played).clip(0.5)
    before = np.append(0.0, np.cumsum(seconds))
    ends, at = np.zeros(gpus), 0
    free = [(0.0, gpu) for gpu in range(gpus)]
    while at < played:
        _, gpu = heapq.heappop(free)
        share = min(-(-(played - at) // (3 * gpus)), LARGEST_SHARE)
        ends[gpu] += (before[at + share] - before[at]) / speed[gpu]
        heapq.heappush(free, (float(ends[gpu] - seconds[at + share - 1] / speed[gpu]), gpu))
        at += share
    return float(ends.max() - before[-1] / speed.sum())


def writer_bears(found: Sample, residues: bool) -> dict[str, float]:
    """How many GPUs' rows one writer takes, by what limits it."""
    rows = found.proteins_per_second
    stored = rows * ROW_BYTES * (found.tokens - SPECIAL_TOKENS if residues else 1)
    return {name: limit / stored for name, limit in DISKS.items()} | {"CPU": 1 / (ROW_SECONDS * rows)}


def gpus_of_one_index(found: Sample, share: float = 0.1) -> float:
    """Number of GPUs at which the index of the whole input, for which all wait, takes this share of the forward's time.

    The number of proteins plays no part.
    """
    return share / ((INDEX[found.load] + DEAL) * found.proteins_per_second)


def row(found: Sample, proteins: int, gpus: int, seed: int) -> dict[str, float]:
    """One line of the plan, in numbers. Means are stored; efficiencies: the forward alone over the whole wall time."""
    speed, each = speeds(gpus, seed), proteins / found.proteins_per_second
    hosts, forward, index = -(-gpus // HOST), each / gpus, proteins * INDEX[found.load]
    packs = round(proteins * found.tokens / (BUDGET * found.plan.density_without_last))
    shard_tail, hand_tail = tail_of_shards(forward, speed), tail_of_hand_out(found, packs, speed, seed)
    bytes_, rest = proteins * ROW_BYTES, proteins * (PLAN + REST)
    shard = START + index + proteins * DEAL + forward + shard_tail + rest / hosts
    driver = START + index + rest + max(forward + hand_tail, bytes_ / DISK, proteins * ROW_SECONDS)
    pieces = -(-proteins // (hosts * PIECE))  # of each host, of equal size
    files = START * pieces + (index + rest) / hosts + forward + shard_tail
    merge = 2 * bytes_ / DISK
    return {
        "proteins": proteins, "GPUs": gpus, "forward": forward, "index": index, "index file": proteins * TABLE_BYTES,
        "shard tail": shard_tail, "hand-out tail": hand_tail, "merge": merge, "shards": forward / shard,
        "shards, merged": forward / (shard + merge), "driver": forward / driver, "files": forward / files,
        "tokens out": gpus * RATE[found.load],
        "mean rows in": gpus * found.proteins_per_second * ROW_BYTES,
        "residue rows in": gpus * found.proteins_per_second * ROW_BYTES * (found.tokens - SPECIAL_TOKENS),
    }  # fmt: skip


SHARES = ("shards", "shards, merged", "driver", "files")
SECONDS = ("forward", "index", "shard tail", "hand-out tail", "merge")


def words(name: str, value: float) -> str:
    if name in SHARES:
        return f"{value:.0%}" if value >= 0.01 else "under 1%"
    if name in SECONDS:
        return (
            f"{value:.2g} s" if value < 100 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:,.0f} h"
        )
    if name in ("proteins", "GPUs"):
        return f"10^{len(str(value)) - 1}" if name == "proteins" else str(value)
    return report.size(value) + ("/s" if name != "index file" else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fasta", type=Path)
    parser.add_argument("--load", choices=list(RATE), default="natural")
    parser.add_argument("--sample", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    found = sample(options.load, options.fasta, options.sample, options.seed)
    dealt = shard_tokens(found, 512)
    plan = [row(found, proteins, gpus, options.seed) for proteins in PROTEINS for gpus in GPUS]
    tables = {
        "Plan": [{name: words(name, value) for name, value in each.items()} for each in plan],
        "GPUs that one writer bears": [
            {"rows": kind} | {name: f"{gpus:,.2g}" if gpus < 10 else f"{gpus:,.0f}" for name, gpus in bears.items()}
            for kind, bears in (("mean", writer_bears(found, False)), ("residue", writer_bears(found, True)))
        ],
    }
    print(
        f"{options.load}: {found.tokens:.1f} tokens a protein, density {found.plan.density_without_last:.4f}, "
        f"{found.proteins_per_second:,.0f} proteins/s a GPU; of 512 shards of {options.sample:,} proteins the largest "
        f"and the least differ by {int(np.ptp(dealt)):,} tokens; index and dealing of the whole input take a tenth of "
        f"the forward's time at "
        f"{gpus_of_one_index(found):.0f} GPUs\n"
    )
    for title, rows in tables.items():
        if options.markdown:
            print(f"{title}:\n", *table(rows), sep="\n")
        else:
            report.stdout().print(report.rows_table(title, rows), crop=False)
    if not options.markdown:
        print(json.dumps(plan))


if __name__ == "__main__":
    sys.exit(main())
