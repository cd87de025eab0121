"""`virnucpro bench`: fair baselines that compute the same thing, gates that bite, files that can be used."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import TINY
from virnucpro_cli import cli
from virnucpro_cli.benchmark import bench, limits, modes, workload
from virnucpro_cli.benchmark.bench import bench_model
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import attention, weights
from virnucpro_cli.model.families import build
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.report import RunReport
from virnucpro_cli.validation.agreement import relative_l2

Bench = Callable[..., RunReport]


@pytest.fixture
def run(tiny_model: Path, make_fasta: Callable[..., Path]) -> Bench:
    """A few proteins through a tiny model."""
    few = make_fasta([5, 300, 41, 41, 90, 7, 120, 64] * 2)
    return lambda **options: bench_model(
        **{"model": tiny_model, "device": "cpu", "seconds": 0.01, "token_budget": 1024, "fasta": few, **options}
    )


def test_a_model_of_nucleotides_is_refused_before_it_is_loaded(run: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"bench times proteins, and DNABERT-S reads nucleotides\."):
        run(model="dnabert-s", quiet=False)
    assert "loading" not in capsys.readouterr().err


def test_the_tables_compare_both_workloads_in_all_ways(run: Bench) -> None:
    found = run(token_budget=2048, fasta=())
    rows = found.tables["Throughput"]
    assert [(row["workload"], row["mode"].split(",")[0]) for row in rows] == [
        (name, kind) for name in ("natural", "fragments") for kind in ("packed", "padded", "padded")
    ]
    assert all(row["tokens/s"] > 0 and 0 < row["density"] <= 1 for row in rows)
    assert rows[0]["density"] > rows[1]["density"] and rows[0]["packed is faster by"] == 1
    assert found.tables["Limit"][0]["GEMM floor tokens/s"] > 0
    stages = found.tables["Stages (s)"][0]
    assert {"index", "plan", "collate", "copy in", "forward: GEMM", "forward: attention", "copy out", "write"} <= set(
        stages
    )
    assert found.tables["Whole embed"][0]["tokens/s"] > 0
    assert found.tables["Attention backends"][0]["backend"] == "sdpa"


def test_a_sweep_has_a_row_for_every_budget_and_recommends_one_of_them(run: Bench) -> None:
    found = run(token_budget=(1024, 2048, 4096), packed=True)
    assert [row["mode"] for row in found.tables["Throughput"]] == [
        "packed, budget 1,024",
        "packed, budget 2,048",
        "packed, budget 4,096",
    ]
    assert found.environment["recommended"]["token_budget"] in (1024, 2048, 4096)


def test_the_users_own_file_is_timed_and_skipped_records_are_left_out(
    run: Bench, make_fasta: Callable[..., Path]
) -> None:
    path = make_fasta([30, 0, 200, 80, 5])
    rows = run(fasta=path).tables["Throughput"]
    assert {row["workload"] for row in rows} == {"input"}
    assert rows[0]["records/batch"] == 4


def model_of(folder: Path) -> tuple[PackedModel, workload.Workload]:
    model = build(
        TINY,
        weights.random_state(TINY),
        torch.float32,
        torch.device("cpu"),
        attention.resolve("sdpa", torch.device("cpu"), torch.float32),
    )
    return model, workload.made_up("x", np.asarray([5, 300, 41, 41, 90, 7, 1022, 64]), folder, 1022)


def test_padded_and_packed_batches_compute_the_same_means_in_record_order(tmp_path: Path) -> None:
    model, load = model_of(tmp_path)
    rows = modes.packed(model, load, 1024)[0].run()
    for by_length in (False, True):
        other = modes.padded(model, load, 2048, by_length).run()
        assert relative_l2(other.numpy(), rows.numpy()).max() < 1e-5


def test_a_baseline_that_computes_something_else_is_refused(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = modes._PaddedBatch.attention

    def unmasked(batch: Any, *arguments: Any) -> torch.Tensor:
        object.__setattr__(batch, "mask", None)
        return exact(batch, *arguments)

    monkeypatch.setattr(modes._PaddedBatch, "attention", unmasked)
    with pytest.raises(RuntimeError, match="disagree"):
        run()


sizes = st.lists(st.integers(3, 1024), min_size=1, max_size=60).map(lambda x: np.asarray(x, np.int64))


@given(sizes, st.integers(1024, 8192))
@example(np.asarray([342] * 4), 1024)  # three in a batch are 1,026, and the fourth makes up for it
def test_file_order_batches_are_the_largest_whose_padded_tokens_average_within_the_budget(
    sizes: np.ndarray, budget: int
) -> None:
    def average(groups: list[np.ndarray]) -> float:
        return float(np.mean([len(group) * sizes[group].max() for group in groups]))

    groups = modes.file_order_groups(sizes, budget)
    assert np.array_equal(np.concatenate(groups), np.arange(len(sizes)))
    assert average(groups) <= budget
    count = len(groups[0])
    if count < len(sizes):
        bigger = np.split(np.arange(len(sizes)), np.arange(count + 1, len(sizes), count + 1))
        assert average(bigger) > budget


@given(sizes, st.integers(1024, 8192))
def test_sorted_batches_hold_every_record_once_within_the_budget(sizes: np.ndarray, budget: int) -> None:
    groups = modes.sorted_groups(sizes, budget)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(sizes)))
    assert all(len(group) * sizes[group].max() <= budget for group in groups)


def test_gates_fail_by_name_and_with_exit_code_1(
    run: Bench, tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from virnucpro_cli.config import BenchConfig

    found = run()
    assert bench.failed_gates(found, BenchConfig(min_speedup=0.001, min_density=0.1)) == []
    assert len(bench.failed_gates(found, BenchConfig(min_speedup=1e9, min_density=1.0))) == 2
    fasta = str(tmp_path / "in.fasta")
    command = ["bench", "--model", str(tiny_model), "--device", "cpu", "--seconds", "0.01", "--fasta", fasta]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--min-speedup", "1e9", "--json"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 1 and "speed-up" in err
    assert json.loads(out.splitlines()[-1])["tables"]["Throughput"]


def test_the_saved_config_is_one_that_embed_takes(run: Bench, tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    run(save_config=path)
    found = resolve(EmbedConfig, str(path), {})
    assert found.token_budget == 1024 and found.attention == "sdpa"


def test_the_plot_is_a_picture(run: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    run(plot=path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_peers_are_timed_and_absent_ones_named(run: Bench) -> None:
    found = run(peers=("fair-esm", "transformers", "esm-efficient", "faesm"))
    rows = [row["peer"] for row in found.tables["Peers"]]
    assert rows == ["fair-esm extract, fp32", "transformers sdpa, sorted, fp32"]
    assert {note.split(":")[0] for note in found.notes} >= {"esm-efficient", "faesm"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"peers": ("bionemo",)}, "bionemo"), ({"seconds": 0}, "seconds"), ({"token_budget": 100}, "token-budget"),
        ({"packed": True, "min_speedup": 2.0}, "unpacked"), ({"unpacked": True, "min_density": 0.9}, "packed"),
        ({"plot": "a.xyz"}, "a.xyz"), ({"plot": "/nowhere/a.png"}, "/nowhere"),
        ({"model": "7B"}, "7B"), ({"fasta": "absent.fasta"}, "absent.fasta"),
    ],
)  # fmt: skip
def test_what_the_user_gets_wrong_is_named(run: Bench, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(**options)


def test_the_profilers_own_lines_do_not_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(64, 64)
    assert sum(limits.breakdown(lambda: x @ x, torch.device("cpu")).values()) > 0
    os.write(2, b"heard again\n")
    assert capfd.readouterr().err == "heard again\n"
