"""The plan for a cluster obeys the bounds that no plan can break."""

import sys
from types import ModuleType

import numpy as np
import pytest

from conftest import ROOT

UNIPROT = ROOT / "tests" / "data" / "uniprot_5k.fasta.gz"


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import cluster_plan
    finally:
        sys.path.pop(0)
    return cluster_plan


@pytest.fixture(scope="module", params=["uniprot", "fragments"])
def found(request: pytest.FixtureRequest, plan: ModuleType) -> object:
    natural = request.param == "uniprot"
    return plan.sample("natural" if natural else "fragments", UNIPROT if natural else None, 20_000, 1)


def test_shards_differ_by_one_block_at_most_and_make_the_whole(plan: ModuleType, found: object) -> None:
    block = 20_000 // (64 * plan.shards.BLOCKS)
    assert np.ptp(plan.shard_tokens(found, 64)) <= block * (found.lengths.max() + 2)
    assert plan.shard_tokens(found, 4).sum() == (found.lengths + 2).sum() == found.plan.tokens.sum()


def test_a_hand_out_ends_within_two_packs_and_shards_with_their_slowest_host(plan: ModuleType, found: object) -> None:
    for gpus in (1, 8, 64):
        speed = plan.speeds(gpus, 0)
        longest = plan.BUDGET / plan.RATE[found.load] * (1 + 6 * plan.PACK_SPREAD) / speed.min()
        assert -1e-6 < plan.tail_of_hand_out(found, 10**6, speed, 0) <= 2 * longest
        assert 0 <= plan.tail_of_shards(100, speed) <= 100 * (1 / speed.min() * speed.mean() - 1) + 1e-9
    assert plan.tail_of_hand_out(found, 10**6, np.ones(1), 0) == pytest.approx(0, abs=1e-6)


def test_no_way_beats_the_forward_and_each_gpu_more_costs_efficiency(plan: ModuleType, found: object) -> None:
    for proteins in plan.PROTEINS:
        rows = [plan.row(found, proteins, gpus, 0) for gpus in plan.GPUS]
        for name in plan.SHARES:
            shares = [row[name] for row in rows]
            assert all(0 < share < 1 for share in shares)
            assert name == "files" or shares == sorted(shares, reverse=True)
        for row in rows:
            assert row["shards, merged"] < row["shards"]
            assert row["forward"] * row["GPUs"] == pytest.approx(rows[0]["forward"])
            assert row["residue rows in"] > row["mean rows in"] > row["tokens out"]


def test_one_writer_bears_what_its_disk_its_network_and_its_cpu_bear(plan: ModuleType, found: object) -> None:
    mean, residue = plan.writer_bears(found, False), plan.writer_bears(found, True)
    assert mean["disk 2 GB/s"] == pytest.approx(2 * mean["disk 1 GB/s"]) and mean["CPU"] == residue["CPU"]
    assert all(mean[name] == pytest.approx(residue[name] * found.lengths.mean()) for name in plan.DISKS)


def test_the_same_seed_gives_the_same_plan(plan: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def said(seed: str) -> str:
        plan.main(["--load", "fragments", "--sample", "20000", "--seed", seed, "--markdown"])
        return capsys.readouterr().out

    assert said("1") == said("1") != said("2")
