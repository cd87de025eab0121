"""The embed workflow on real files: which row holds what, whatever packing, policy or history."""

import csv
import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from conftest import read_fasta, relative_l2, write_model
from virnucpro_cli import cli, store
from virnucpro_cli.alphabet import TOKENS
from virnucpro_cli.embed import embed_fasta, engines, recipe, summary
from virnucpro_cli.engine import devices, placer, second_pass
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import indexing, reading
from virnucpro_cli.kinds import KINDS, OF_ALL_RESIDUES, POOLED
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.families import build
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan import policies
from virnucpro_cli.plan.packing import in_blocks
from virnucpro_cli.report import Clock, RunReport
from virnucpro_cli.store import layout, read_embeddings, schema, sums
from virnucpro_cli.validation import verify
from virnucpro_cli.validation.fair_esm import Reference

ALL = KINDS
OF_WINDOWS = tuple(kind for kind in KINDS if kind not in OF_ALL_RESIDUES)
Embed = Callable[..., RunReport]
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    """fair-esm's own class with the tiny model's weights, one sequence at a time."""
    spec, state, _ = weights.load(locate.locate(str(tiny_model)))
    return Reference(spec, state)


@pytest.fixture
def embed(tiny_model: Path) -> Embed:
    def run(inputs: Any, output: Path, **options: Any) -> RunReport:
        names = [str(path) for path in inputs] if isinstance(inputs, list) else str(inputs)
        return embed_fasta(names, str(output), **{"model": str(tiny_model), "device": "cpu", **options})

    return run


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def datasets(path: Path) -> dict[str, NDArray[Any]]:
    """Every dataset outside /run."""
    found: dict[str, NDArray[Any]] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("run/"):
            found["mean/2" if name == "embeddings" else name] = item[()]

    with h5py.File(path) as file:
        file.visititems(keep)
    return found


def assert_same(found: NDArray[Any], expected: torch.Tensor | NDArray[Any], tolerance: float = 1e-5) -> None:
    assert found.shape == tuple(expected.shape)
    assert relative_l2(torch.as_tensor(found), torch.as_tensor(expected)) < tolerance


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_callers_arithmetic_is_as_it_was(
    precision: str, make_fasta: Make, tiny_model: Path, tmp_path: Path
) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        matmul.fp32_precision = cudnn.conv.fp32_precision = precision
        matmul.allow_bf16_reduced_precision_reduction = True
        embed_fasta(make_fasta([20]), tmp_path / "out.h5", model=str(tiny_model), device="cpu")
        assert matmul.fp32_precision == cudnn.conv.fp32_precision == precision
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


def test_row_i_is_record_i_and_equals_fair_esm(
    tmp_path: Path, make_fasta: Make, embed: Embed, reference: Reference
) -> None:
    fasta = make_fasta([50, 7, 300, 1, 120, 7, 999, 2, 50, 64] * 3)
    embed(fasta, tmp_path / "out.h5", pool=ALL, layers=(0, 1, -1), store_dtype="fp32", token_budget=1024)
    with read_embeddings(tmp_path / "out.h5") as file:
        records = read_fasta(fasta)
        assert file.names == [name for name, _ in records] and file.layers == [0, 1, 2]
        for row, (_, sequence) in enumerate(records):
            for layer, hidden in reference.embed(sequence, (0, 1, 2)).items():
                assert_same(file.dataset("mean", layer)[row], hidden[1:-1].mean(0))
                assert_same(file.dataset("bos", layer)[row], hidden[0])
                assert_same(file.dataset("eos", layer)[row], hidden[-1])
                assert_same(file.dataset("max", layer)[row], hidden[1:-1].amax(0))
                if len(sequence) > 1:
                    assert_same(file.dataset("std", layer)[row], hidden[1:-1].std(0, correction=0))
                assert_same(file.residues(row, layer), hidden[1:-1])


def test_the_token_budget_changes_no_bit(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    # Heads of 16, as the real 8M has: with heads of 8 the CPU's attention depends on how many equal lengths it is given.
    model = write_model(tmp_path / "model", ModelSpec("small", 2, 64, 4))
    fasta = make_fasta([50, 7, 300, 1, 120, 999, 64] * 10)
    for budget in (1024, 3000, 16384):
        embed(fasta, tmp_path / f"{budget}.h5", model=str(model), pool=ALL, token_budget=budget, store_dtype="fp32")
    first, *others = (datasets(tmp_path / f"{budget}.h5") for budget in (1024, 3000, 16384))
    for other in others:
        for name, values in first.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_several_inputs_follow_one_another(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    a, b = make_fasta([30, 40], "a.fasta", seed=1), make_fasta([50, 20, 60], "b.fasta", seed=2)
    joined = write(tmp_path / "joined.fasta", a.read_text() + b.read_text())
    embed([a, b], tmp_path / "two.h5")
    embed(joined, tmp_path / "one.h5")
    two, one = datasets(tmp_path / "two.h5"), datasets(tmp_path / "one.h5")
    assert two["lengths"].tolist() == [30, 40, 50, 20, 60]
    assert two["sequence_ids"].tolist() == [b"p0", b"p1", b"p0", b"p1", b"p2"]
    np.testing.assert_array_equal(two["mean/2"], one["mean/2"])


def test_compressed_input_gives_the_same_rows_and_leaves_nothing_behind(
    tmp_path: Path, make_fasta: Make, embed: Embed
) -> None:
    fasta = make_fasta([30, 40, 50])
    packed = tmp_path / "in.fasta.gz"
    packed.write_bytes(gzip.compress(fasta.read_bytes()))
    embed(fasta, tmp_path / "plain.h5")
    embed(packed, tmp_path / "gz.h5")
    np.testing.assert_array_equal(datasets(tmp_path / "gz.h5")["mean/2"], datasets(tmp_path / "plain.h5")["mean/2"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gz.h5", "in.fasta", "in.fasta.gz", "plain.h5"]


def test_duplicates_each_keep_their_row(tmp_path: Path, embed: Embed) -> None:
    fasta = write(tmp_path / "in.fasta", ">a one\nMKVLA\n>b\nGGTRS\n>a two\nMKV\nLA*\n>c\nmkvla\n>b\nWWWWW\n")
    report = embed(fasta, tmp_path / "out.h5", pool=ALL)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.names == ["a", "b", "a", "c", "b"]
        assert (file.flags & store.COPIED > 0).tolist() == [False, False, True, True, False]
        assert (file.status == store.DONE).all()
        for kind in POOLED:
            rows = file.dataset(kind)[:]
            np.testing.assert_array_equal(rows[[0, 0]], rows[[2, 3]])
        np.testing.assert_array_equal(file.residues(0), file.residues(3))
        assert not np.array_equal(file[1], file[4])
    assert report.counts["distinct proteins"] == 3
    assert any("name" in note for note in report.notes)

    embed(fasta, tmp_path / "each.h5", pool=ALL, dedup=False)
    found, each = datasets(tmp_path / "out.h5"), datasets(tmp_path / "each.h5")
    assert not (each.pop("flags") & store.COPIED).any()
    for name, values in each.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_names_are_the_first_word_or_the_full_header(tmp_path: Path, embed: Embed) -> None:
    fasta = write(tmp_path / "in.fasta", ">sp|P1 a protein\nMKVLA\n>\nMKV\n")
    for choice, names in (("first", ["sp|P1", ""]), ("full", ["sp|P1 a protein", ""])):
        embed(fasta, tmp_path / f"{choice}.h5", id=choice)
        with read_embeddings(tmp_path / f"{choice}.h5") as file:
            assert file.names == names


# --- long proteins -------------------------------------------------------------------------------------------------


def test_truncate_embeds_the_first_residues_and_says_so(
    tmp_path: Path, make_fasta: Make, embed: Embed, reference: Reference
) -> None:
    fasta = make_fasta([50, 130, 100])
    report = embed(fasta, tmp_path / "out.h5", pool=ALL, store_dtype="fp32", max_residues=100)
    sequence = read_fasta(fasta)[1][1]
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.flags.tolist() == [0, store.TRUNCATED, 0]
        assert file.lengths.tolist() == [50, 130, 100]
        expected = reference.embed(sequence[:100], (2,))[2]
        assert_same(file[1], expected[1:-1].mean(0))
        assert_same(file.residues(1), expected[1:-1])
    assert any("1 of 3 proteins truncated" in note for note in report.notes)


def test_full_embeds_long_proteins_whole(tmp_path: Path, make_fasta: Make, embed: Embed, reference: Reference) -> None:
    fasta = make_fasta([50, 1500, 100])
    embed(fasta, tmp_path / "out.h5", pool=ALL, store_dtype="fp32", long="full", token_budget=1024)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert not file.flags.any()
        assert_same(file.residues(1), reference.embed(read_fasta(fasta)[1][1], (2,))[2][1:-1])


def test_long_proteins_may_be_skipped_or_refused(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta = make_fasta([50, 130, 100])
    report = embed(fasta, tmp_path / "out.h5", pool=ALL, long="skip", max_residues=100)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.status.tolist() == [1, 2, 1] and file.reason.tolist() == [0, store.TOO_LONG, 0]
        assert np.isnan(file[1]).all() and np.isfinite(file[2]).all()
        assert file.residues(1).shape == (0, 32)
    assert report.counts["skipped"] == 1
    with pytest.raises(UserError, match=r"'p1' with 130"):
        embed(fasta, tmp_path / "none.h5", long="error", max_residues=100)
    assert not list(tmp_path.glob("none*"))


def test_a_window_longer_than_every_protein_changes_no_bit(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta = make_fasta([50, 130, 100, 1, 40])
    for long in ("window", "full"):
        embed(fasta, tmp_path / f"{long}.h5", pool=OF_WINDOWS, long=long, max_residues=130, overlap=20)
    found, expected = datasets(tmp_path / "window.h5"), datasets(tmp_path / "full.h5")
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_short_proteins_among_windowed_ones_keep_their_bits(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta = make_fasta([50, 700, 100, 650, 40])
    for long in ("window", "full"):
        embed(fasta, tmp_path / f"{long}.h5", pool=OF_WINDOWS, long=long, max_residues=200, overlap=20)
    with read_embeddings(tmp_path / "window.h5") as found, read_embeddings(tmp_path / "full.h5") as expected:
        assert found.flags.tolist() == [0, store.WINDOWED, 0, store.WINDOWED, 0]
        for row in (0, 2, 4):
            np.testing.assert_array_equal(found[row], expected[row])
            np.testing.assert_array_equal(found.dataset("bos")[row], expected.dataset("bos")[row])
            np.testing.assert_array_equal(found.residues(row), expected.residues(row))


@pytest.mark.parametrize("budget", [1024, 4096])
def test_windows_are_blended_as_written_down(
    tmp_path: Path, make_fasta: Make, embed: Embed, reference: Reference, budget: int
) -> None:
    """Evenly spread windows, triangular weights, one at every residue; mean and bos follow from the same weights."""
    total, window, overlap = 1000, 300, 100
    fasta = make_fasta([60, total, 200])
    options = {"pool": OF_WINDOWS, "store_dtype": "fp32", "long": "window", "max_residues": window, "overlap": overlap}
    embed(fasta, tmp_path / "out.h5", token_budget=budget, **options)

    sequence = read_fasta(fasta)[1][1]
    count = -(-(total - overlap) // (window - overlap))
    starts = [k * (total - window) // (count - 1) for k in range(count)]
    ramp = np.minimum(np.arange(window) + 1, np.arange(window)[::-1] + 1).astype(np.float64)
    rows, norm, first = np.zeros((total, 32)), np.zeros(total), np.zeros(32)
    parts = []
    for start in starts:
        hidden = reference.embed(sequence[start : start + window], (2,))[2].double().numpy()
        rows[start : start + window] += ramp[:, None] * hidden[1:-1]
        norm[start : start + window] += ramp
        parts.append((start, hidden[0]))
    rows /= norm[:, None]
    for start, bos in parts:
        first += bos * (ramp / norm[start : start + window]).sum() / total

    with read_embeddings(tmp_path / "out.h5") as file:
        assert_same(file.residues(1), rows)
        assert_same(file[1], rows.mean(0))
        assert_same(file.dataset("bos")[1], first)
        assert_same(file.dataset("eos")[1], hidden[-1])  # of the last window
        assert file.flags[1] == store.WINDOWED and file.residues(1).shape == (total, 32)


def test_max_and_std_of_windows_are_refused_with_a_way_out(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    with pytest.raises(UserError, match="--long full"):
        embed(make_fasta([30]), tmp_path / "out.h5", pool=("mean", "std"), long="window")


@pytest.mark.parametrize(
    ("pool", "default"), [(("std", "eos"), "eos/2"), (("max", "bos"), "bos/2"), (("std",), "std/2")]
)
def test_the_default_embedding_is_the_first_of_the_table(
    tmp_path: Path, make_fasta: Make, embed: Embed, pool: tuple[str, ...], default: str
) -> None:
    embed(make_fasta([30, 40]), tmp_path / "out.h5", pool=pool)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.default == default and np.isfinite(file[:]).all()
        np.testing.assert_array_equal(file[:], file.dataset(default[:3])[:])


def test_a_commit_may_come_while_every_protein_still_waits_for_windows(
    tmp_path: Path, make_fasta: Make, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta = make_fasta([3000])
    options = {"long": "window", "max_residues": 200, "overlap": 50, "token_budget": 1024}
    embed(fasta, tmp_path / "seldom.h5", **options)
    monkeypatch.setattr(placer, "COMMIT_SECONDS", 0.0)
    embed(fasta, tmp_path / "often.h5", **options)
    np.testing.assert_array_equal(datasets(tmp_path / "often.h5")["mean/2"], datasets(tmp_path / "seldom.h5")["mean/2"])


def test_copies_of_a_windowed_protein_get_its_rows(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta = make_fasta([400])
    fasta = write(tmp_path / "twice.fasta", fasta.read_text() + fasta.read_text())
    embed(fasta, tmp_path / "out.h5", pool=OF_WINDOWS, long="window", max_residues=150, overlap=50)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.flags.tolist() == [store.WINDOWED, store.WINDOWED | store.COPIED]
        np.testing.assert_array_equal(file[0], file[1])
        np.testing.assert_array_equal(file.residues(0), file.residues(1))
        assert np.isfinite(file[1]).all()


# --- odd residues, empty records -----------------------------------------------------------------------------------


def test_invalid_residues_become_x_by_default(tmp_path: Path, embed: Embed, reference: Reference) -> None:
    fasta = write(tmp_path / "in.fasta", ">a\nMKJVL\n>b\nM*K\n>c\nmkxvl\n>d\nMKVUB*\n")
    report = embed(fasta, tmp_path / "out.h5", store_dtype="fp32")
    with read_embeddings(tmp_path / "out.h5") as file:
        for row, sequence in enumerate(["MKXVL", "MXK", "MKXVL", "MKVUB"]):
            assert_same(file[row], reference.embed(sequence, (2,))[2][1:-1].mean(0))
        assert file.flags.tolist() == [store.REPLACED, store.REPLACED, store.COPIED, 0]
    assert datasets(tmp_path / "out.h5")["replaced"].tolist() == [1, 1, 0, 0]
    assert report.counts["with replaced residues"] == 2


def test_invalid_residues_may_be_an_error_that_says_where(tmp_path: Path, embed: Embed) -> None:
    fasta = write(tmp_path / "in.fasta", ">a\nMKVL\n>b\nMK\nVJL\n")
    with pytest.raises(UserError, match=r"in\.fasta: record 'b', line 5, column 2: 'J'"):
        embed(fasta, tmp_path / "out.h5", invalid="error")
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta"]


def test_a_skipped_record_lends_its_tokens_to_nobody(tmp_path: Path, embed: Embed, reference: Reference) -> None:
    """MKJVL is skipped; MKXVL has the same tokens, is valid, and must be embedded."""
    fasta = write(tmp_path / "in.fasta", ">bad\nMKJVL\n>good\nMKXVL\n>bad2\nMKJVL\n>same\nMKXVL\n")
    embed(fasta, tmp_path / "out.h5", invalid="skip", store_dtype="fp32")
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.status.tolist() == [2, 1, 2, 1]
        assert file.reason.tolist() == [store.INVALID, 0, store.INVALID, 0]
        assert (file.flags & store.COPIED > 0).tolist() == [False, False, False, True]
        expected = reference.embed("MKXVL", (2,))[2][1:-1].mean(0)
        assert_same(file[1], expected)
        assert_same(file[3], expected)
        assert np.isnan(file[0]).all() and np.isnan(file[2]).all()


def test_empty_records_are_skipped_with_nan(tmp_path: Path, embed: Embed) -> None:
    fasta = write(tmp_path / "in.fasta", ">a\n>b\nMKVL\n>c\n*\n>d\n\n")
    report = embed(fasta, tmp_path / "out.h5", pool=ALL)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.status.tolist() == [2, 1, 2, 2]
        assert file.reason.tolist() == [store.EMPTY, 0, store.EMPTY, store.EMPTY]
        assert np.isnan(file.dataset("mean")[[0, 2, 3]]).all() and np.isnan(file.dataset("bos")[[0, 2, 3]]).all()
        assert np.isfinite(file[1]).all() and len(file.residues(1)) == 4 and len(file.residues(3)) == 0
    assert report.counts["skipped"] == 3


@pytest.mark.parametrize("text", [">a\n>b\n", ">a\nMKJ\n"], ids=["no residues", "all skipped"])
def test_an_input_that_leaves_nothing_to_embed_is_refused(tmp_path: Path, embed: Embed, text: str) -> None:
    with pytest.raises(UserError, match="input"):
        embed(write(tmp_path / "in.fasta", text), tmp_path / "out.h5", invalid="skip")
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta"]


# --- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_dtype", ["fp16", "fp32"])
def test_only_what_was_asked_is_stored(tmp_path: Path, make_fasta: Make, embed: Embed, store_dtype: str) -> None:
    embed(make_fasta([10, 20]), tmp_path / "out.h5", pool=("bos",), layers=(-1, 0, 2, -3), store_dtype=store_dtype)
    with h5py.File(tmp_path / "out.h5") as file:
        assert "mean" not in file and "residue" not in file and sorted(file["bos"]) == ["0", "2"]
        assert file["embeddings"] == file["bos/0"], "the last requested layer"
        assert file["bos/2"].dtype == (np.float16 if store_dtype == "fp16" else np.float32)
        assert json.loads(file.attrs["layers"]) == [2, 0]


def test_the_file_tells_where_it_came_from(tmp_path: Path, make_fasta: Make, tiny_model: Path, embed: Embed) -> None:
    fasta = make_fasta([10, 20])
    embed(fasta, tmp_path / "out.h5", report=str(tmp_path / "report.json"))
    with read_embeddings(tmp_path / "out.h5") as file:
        known = file.attributes
        assert json.loads(known["inputs"])[0]["path"] == str(fasta)
        assert json.loads(known["inputs"])[0]["bytes"] == fasta.stat().st_size
        assert known["weights_sha256"] == locate.sha256_of([tiny_model / "model.safetensors"])
        assert (known["dtype"], known["store_dtype"], known["attention"]) == ("float32", "fp16", "sdpa")
        assert json.loads(known["config"])["max_residues"] == 1022
        inside = file.report
    outside = json.loads((tmp_path / "report.json").read_text())
    assert outside.pop("checksum") and not inside.pop("checksum"), "the checksum is of the report inside as well"
    for name in ("finish", "rest"):
        assert outside["seconds"].pop(name) >= inside["seconds"].pop(name) > 0, "the file is finished with its report"
    assert outside == inside
    assert outside["counts"]["proteins"] == 2 and outside["counts"]["residues"] == 30
    assert outside["packing"]["packs"] == 1 and outside["rates"]["tokens/s"] > 0 and outside["seconds"]["forward"] > 0


WALL = """
import json, sys, time
began = time.perf_counter()
from virnucpro_cli.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code
print(time.perf_counter() - began)
"""
"""The program, and the seconds from its first line to its last."""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_stages_of_a_run_sum_to_its_wall_time(
    workers: str, tmp_path: Path, make_fasta: Make, tiny_model: Path
) -> None:
    fasta, written = make_fasta([30] * 2000), tmp_path / "report.json"
    command = [
        "embed",
        str(fasta),
        "-o",
        str(tmp_path / "out.h5"),
        "--model",
        str(tiny_model),
        "--report",
        str(written),
    ]
    program = [sys.executable, "-c", WALL, *command, "--device", "cpu", "--workers", workers, "--quiet"]
    wall = float(subprocess.check_output(program, text=True))
    report = json.loads(written.read_text())
    stages = {name: seconds for name, seconds in report["seconds"].items() if name not in report["meanwhile"]}
    assert sum(stages.values()) == pytest.approx(wall, rel=0.02)
    assert stages["rest"] < 0.02 * wall
    expected = {"start", "devices", "index", "plan", "names", "load model", "lay out", "forward", "finish", "rest"}
    assert stages.keys() == expected | ({"start workers", "end workers"} if workers == "2" else set())
    assert set(report["meanwhile"]) == {"first pack", "write"} - ({"write"} if workers == "2" else set())


def test_a_stage_takes_its_seconds_from_the_one_around_it() -> None:
    clock = Clock(since=time.perf_counter() - 1)
    with clock.stage("outer"):
        with clock.stage("inner"), clock.beside("reading"):
            inner = sum(range(100_000))
        clock.turn("second half")
    spent = clock.spent()
    assert inner and spent.keys() == {"start", "outer", "inner", "second half", "rest"} and spent["start"] >= 1
    assert all(seconds >= 0 for seconds in spent.values()), "the rest is below zero if a second is counted twice"
    assert sum(spent.values()) == pytest.approx(clock.so_far(), abs=0.1)
    assert 0 < clock.meanwhile["reading"] <= spent["inner"]


def test_values_that_do_not_fit_the_store_end_as_skipped_nan(tmp_path: Path, tiny_model: Path, embed: Embed) -> None:
    """Layer 0 of this model holds 1e6 at every tryptophan, more than fp16 can; fp32 can."""
    model = spoiled(tmp_path / "model", tiny_model, "W", 1e6)
    fasta = write(tmp_path / "in.fasta", ">a\nMKVLA\n>b\nMKWLA\n>c\nGGTRS\n>d\nMKWLA\n")
    report = embed(fasta, tmp_path / "out.h5", model=str(model), layers=(0, 2), pool=ALL)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.status.tolist() == [1, 2, 1, 2] and file.reason.tolist() == [0, 4, 0, 4]
        for layer in (0, 2):
            for kind in POOLED:
                assert np.isnan(file.dataset(kind, layer)[:]).all(axis=1).tolist() == [False, True, False, True]
            assert np.isnan(file.residues(1, layer)).all() and np.isfinite(file.residues(2, layer)).all()
    assert report.counts["skipped"] == 2
    embed(fasta, tmp_path / "fp32.h5", model=str(model), layers=(0, 2), pool=ALL, store_dtype="fp32")
    with read_embeddings(tmp_path / "fp32.h5") as file:
        assert (file.status == store.DONE).all() and np.isfinite(file.dataset("mean", 0)[:]).all()


def test_windows_that_do_not_fit_the_store_end_as_skipped_nan(tmp_path: Path, tiny_model: Path, embed: Embed) -> None:
    model = spoiled(tmp_path / "model", tiny_model, "W", 1e6)
    fasta = write(tmp_path / "in.fasta", f">a\n{'MKVLA' * 40}\n>b\n{'MKVLA' * 39}MKWLA\n>c\nMKV\n")
    embed(
        fasta,
        tmp_path / "out.h5",
        model=str(model),
        layers=(0,),
        pool=OF_WINDOWS,
        long="window",
        max_residues=50,
        overlap=9,
    )
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.status.tolist() == [1, 2, 1] and file.reason.tolist() == [0, 4, 0]
        assert np.isnan(file[1]).all() and np.isnan(file.residues(1)).all() and np.isfinite(file.residues(0)).all()


@pytest.mark.parametrize("long", ["truncate", "window"])
def test_what_overflows_in_fp16_is_computed_again_in_fp32(
    tmp_path: Path, tiny_model: Path, embed: Embed, long: str
) -> None:
    """A tryptophan of 1e6 overflows an fp16 forward; the last layer of the fp32 one is ordinary."""
    model = spoiled(tmp_path / "model", tiny_model, "W", 1e6)
    fasta = write(tmp_path / "in.fasta", f">a\nMKVLA\n>b\nMKWLA\n>c\n{'MKVLA' * 30}W\n>d\nMKWLA\n>e\nMKV\n")
    options = {"model": str(model), "pool": OF_WINDOWS if long == "window" else ALL, "long": long, "overlap": 30}
    options |= {"max_residues": 100 if long == "window" else 200}
    report = embed(fasta, tmp_path / "half.h5", dtype="fp16", **options)
    embed(fasta, tmp_path / "single.h5", dtype="fp32", **options)
    with read_embeddings(tmp_path / "half.h5") as half, read_embeddings(tmp_path / "single.h5") as single:
        assert (half.status == store.DONE).all()
        assert (half.flags & store.RECOMPUTED > 0).tolist() == [False, True, True, True, False]
        assert not (single.flags & store.RECOMPUTED).any()
        for row in (1, 2, 3):
            assert_same(half[row], single[row], 2e-3)
            assert_same(half.residues(row), single.residues(row), 2e-3)
        assert_same(half[0], single[0], 2e-2)
    assert report.counts["recomputed in fp32"] == 3 and report.counts["skipped"] == 0


def test_what_overflows_is_computed_on_the_cpu_where_the_device_has_no_room_for_fp32(
    tmp_path: Path, tiny_model: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[torch.dtype] = []

    def crowded(spec: ModelSpec, state: Any, dtype: torch.dtype, *on: Any) -> PackedModel:
        if not refused:
            refused.append(dtype)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return build(spec, state, dtype, *on)

    monkeypatch.setattr(second_pass, "build", crowded)
    model = str(spoiled(tmp_path / "model", tiny_model, "W", 1e6))
    fasta = write(tmp_path / "in.fasta", ">a\nMKVLA\n>b\nMKWLA\n")
    report = embed(fasta, tmp_path / "half.h5", dtype="fp16", model=model)
    embed(fasta, tmp_path / "single.h5", dtype="fp32", model=model)
    assert refused == [torch.float32] and any("on the CPU" in note for note in report.notes)
    with read_embeddings(tmp_path / "half.h5") as half, read_embeddings(tmp_path / "single.h5") as single:
        assert half.status.tolist() == [store.DONE] * 2 and half.flags[1] & store.RECOMPUTED
        np.testing.assert_array_equal(half[1], single[1])


def spoiled(folder: Path, tiny_model: Path, residue: str, size: float) -> Path:
    """A copy of the tiny model in which one residue's embedding is enormous."""
    write_model(folder)
    state = load_file(tiny_model / "model.safetensors")
    state["embed_tokens.weight"][TOKENS.index(residue)] = size
    save_file(state, folder / "model.safetensors")
    return folder


# --- runs that meet an earlier one ---------------------------------------------------------------------------------


def test_dry_run_writes_nothing(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta = make_fasta([10, 20, 2000])
    report = embed(fasta, tmp_path / "out.h5", dry_run=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta"]
    assert report.counts["proteins"] == 3 and report.counts["truncated"] == 1 and report.packing["packs"] == 1


def test_a_complete_file_is_left_as_it_is(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta, output = make_fasta([10, 20]), tmp_path / "out.h5"
    embed(fasta, output)
    before = (output.stat().st_mtime_ns, output.stat().st_ino, output.read_bytes())
    report = embed(fasta, output, token_budget=4096, report=str(tmp_path / "report.json"))
    assert (output.stat().st_mtime_ns, output.stat().st_ino, output.read_bytes()) == before
    assert "forward" not in report.seconds and (tmp_path / "report.json").exists()


CHANGES = [
    ("layers", {"layers": (1,)}),
    ("pool", {"pool": ("bos",)}),
    ("store_dtype", {"store_dtype": "fp32"}),
    ("dtype", {"dtype": "bf16"}),
    ("max_residues", {"max_residues": 15}),
    ("long", {"long": "full"}),
    ("invalid", {"invalid": "skip"}),
    ("id", {"id": "full"}),
    ("dedup", {"dedup": False}),
]


@pytest.mark.parametrize(("key", "change"), CHANGES, ids=[key for key, _ in CHANGES])
def test_other_settings_on_a_complete_file_are_refused_by_name(
    tmp_path: Path, make_fasta: Make, embed: Embed, key: str, change: dict[str, Any]
) -> None:
    fasta, output = make_fasta([10, 20]), tmp_path / "out.h5"
    embed(fasta, output)
    before = output.read_bytes()
    with pytest.raises(UserError, match=rf"another run: {key}: "):
        embed(fasta, output, **change)
    assert output.read_bytes() == before and not store.partial_path(output).exists()


def test_other_input_or_weights_on_a_complete_file_are_refused_by_name(
    tmp_path: Path, make_fasta: Make, embed: Embed
) -> None:
    fasta, output = make_fasta([10, 20]), tmp_path / "out.h5"
    embed(fasta, output)
    with pytest.raises(UserError, match="the content of the input differs"):
        embed(make_fasta([10, 20], "other.fasta", seed=1), output)
    with pytest.raises(UserError, match="the model's weights differ"):
        embed(fasta, output, model=str(write_model(tmp_path / "model", seed=1)))


def test_weights_that_do_not_fit_the_memory_are_refused() -> None:
    devices.check_room(torch.device("cpu"), 1, "The weights")
    with pytest.raises(UserError, match="GB are free on CPU"):
        devices.check_room(torch.device("cpu"), 1 << 60, "The weights")


def test_overwrite_replaces_a_complete_file(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta, output = make_fasta([10, 20]), tmp_path / "out.h5"
    embed(fasta, output)
    embed(fasta, output, layers=(1,), overwrite=True)
    with read_embeddings(output) as file:
        assert file.layers == [1] and file.complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.fasta", "out.h5"]


def test_a_foreign_file_is_replaced_only_when_told(tmp_path: Path, make_fasta: Make, embed: Embed) -> None:
    fasta, output = make_fasta([10, 20]), write(tmp_path / "out.h5", "precious")
    with pytest.raises(UserError, match="not written by virnucpro"):
        embed(fasta, output)
    assert output.read_text() == "precious"
    embed(fasta, output, overwrite=True)
    with read_embeddings(output) as file:
        assert file.complete


@pytest.fixture
def interrupted(tmp_path: Path, make_fasta: Make, embed: Embed, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(input, output) of a run that was stopped when it was about to finish."""
    fasta, output = make_fasta([10, 20, 30]), tmp_path / "out.h5"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(fasta, output)
    assert store.partial_path(output).exists() and not output.exists()
    return fasta, output


def test_the_same_command_resumes(interrupted: tuple[Path, Path], embed: Embed) -> None:
    fasta, output = interrupted
    report = embed(fasta, output, token_budget=4096)
    assert report.counts["resumed proteins"] == 3 and "forward" not in report.seconds
    with read_embeddings(output) as file:
        assert file.complete and np.isfinite(file[:]).all()
    assert not store.partial_path(output).exists()


@pytest.mark.parametrize(("key", "change"), CHANGES[:5], ids=[key for key, _ in CHANGES[:5]])
def test_a_partial_file_of_other_settings_is_refused_by_name(
    interrupted: tuple[Path, Path], embed: Embed, key: str, change: dict[str, Any]
) -> None:
    fasta, output = interrupted
    before = store.partial_path(output).read_bytes()
    with pytest.raises(UserError, match=rf"another run: {key}: ") as refused:
        embed(fasta, output, **change)
    assert "--restart" in refused.value.remedy
    assert store.partial_path(output).read_bytes() == before


def test_restart_discards_a_partial_file(interrupted: tuple[Path, Path], embed: Embed) -> None:
    fasta, output = interrupted
    report = embed(fasta, output, layers=(1,), restart=True)
    assert "resumed proteins" not in report.counts
    with read_embeddings(output) as file:
        assert file.complete and file.layers == [1]
    assert not store.partial_path(output).exists()


def test_a_partial_file_that_is_no_such_thing_is_discarded_only_when_told(
    tmp_path: Path, make_fasta: Make, embed: Embed
) -> None:
    fasta, output = make_fasta([10, 20]), tmp_path / "out.h5"
    partial = write(store.partial_path(output), "not HDF5 at all")
    with pytest.raises(UserError, match="not a partial output"):
        embed(fasta, output)
    assert partial.read_text() == "not HDF5 at all"
    embed(fasta, output, restart=True)
    assert output.exists() and not partial.exists()


def test_a_run_refuses_the_output_that_another_run_is_writing(
    interrupted: tuple[Path, Path], embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.disk, "LINGER", 0.0)
    fasta, output = interrupted
    theirs = store.Store.resume(output)
    for options in ({}, {"restart": True}):
        with pytest.raises(UserError, match="Another run"):
            embed(fasta, output, **options)
    assert os.path.samestat(os.fstat(theirs.fd), os.stat(store.partial_path(output)))
    theirs.close()


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("moment", ["fingerprint_tried", "check_free_space", "Store.create", "Store.resume"])
def test_a_run_that_another_overtakes_sees_what_that_one_made(
    interrupted: tuple[Path, Path], embed: Embed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    moment: str, begun: bool,
) -> None:  # fmt: skip
    """The other run does all of it at a moment when this one believes that there is a partial file, or none."""
    fasta, output = interrupted
    if not begun:
        store.partial_path(output).unlink()
    owner, name = (store.Store, moment[6:]) if moment.startswith("Store.") else (store, moment)
    real = getattr(owner, name)

    def late(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        embed(fasta, output)
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, late)
    embed(fasta, output, quiet=False)
    met = getattr(owner, name) is real
    assert met == (begun == (moment in ("fingerprint_tried", "Store.resume")))
    assert not met or "is already complete" in capsys.readouterr().err
    assert output.exists() and not [path for path in output.parent.glob("*out.h5*") if path != output]


def test_gaps_and_nucleotides_among_proteins_are_told_counted_and_in_the_table(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(
        ">a\nMK-VL-AGE\n>b\nMKVLAGE\n>gene\n" + "ACGT" * 10 + "\n>c\nMKVLAGEF.\n>d\n" + "MKVLAGEFIPQ" * 9 + "\n"
    )
    command = ["embed", str(fasta), "-o", str(tmp_path / "o.h5"), "--model", str(tiny_model), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--qc", str(tmp_path / "qc.tsv"), "--report", str(tmp_path / "r.json")])
    said = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 0
    assert "1 of 5 proteins with gaps, 2 letters - or ., embedded as tokens, as fair-esm does; --gaps strip" in said
    assert "1 of 5 records like nucleotides, and embedded as proteins: 'gene'" in said
    with open(tmp_path / "qc.tsv", newline="") as table:
        assert [row["gaps"] for row in csv.DictReader(table, delimiter="\t")] == ["2", "0", "0", "0", "0"]
    assert json.loads((tmp_path / "r.json").read_text())["counts"]["with gaps"] == 1
    with read_embeddings(tmp_path / "o.h5") as file:
        assert file.columns["gaps"].tolist() == [2, 0, 0, 0, 0] and file.lengths.tolist() == [9, 7, 40, 8, 99]
        kept = file[0]
    with pytest.raises(SystemExit):
        cli.main([*command, "--gaps", "strip"])
    assert "gaps: keep there, strip now" in capsys.readouterr().err.replace("None", "keep")
    embed_fasta(fasta, tmp_path / "s.h5", model=str(tiny_model), device="cpu", gaps="strip")
    with read_embeddings(tmp_path / "s.h5") as file:
        assert np.array_equal(file[0], file[1]) and not np.array_equal(file[0], kept)
        assert file.lengths[0] == 7 and file.flags[1] & store.COPIED
    assert verify.verify_file(str(tmp_path / "s.h5")).passed and verify.verify_file(str(tmp_path / "o.h5")).passed


def test_a_second_reader_of_verify_finds_what_the_index_would_not(
    make_fasta: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that joins two records, in embed and in verify alike, does not vouch for itself."""
    real = reading.Source.read_raw

    def joining(self: Any, start: int, size: int) -> bytes:
        return real(self, start, size).replace(b"\n>p2\n", b"\nAAAA")

    fasta = make_fasta([20, 30, 40, 50])
    with monkeypatch.context() as patch:
        patch.setattr(reading.Source, "read_raw", joining)
        embed_fasta(fasta, tmp_path / "out.h5", model=str(tiny_model), device="cpu")
        verdict = verify.verify_file(str(tmp_path / "out.h5"))
    failed = {check.what for check in verdict.checks if not check.passed}
    assert "records, by a second reader" in failed and not any("second" not in what for what in failed)


@pytest.mark.parametrize(
    ("writing", "seconds", "beside", "limit"),
    [
        (95, 100, True, True),
        (80, 100, True, False),
        (60, 100, False, True),
        (40, 100, False, False),
        (9, 9, True, False),
    ],
)
def test_writing_is_named_as_the_limit_where_it_held_the_forward_up(
    writing: float, seconds: float, beside: bool, limit: bool
) -> None:
    assert placer.is_limit(writing, seconds, beside) is limit


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.integers(1, 5))
def test_rows_are_rounded_to_float16_as_numpy_rounds_them(values: list[float], rows: int) -> None:
    block = np.tile(np.array(values, np.float32), (rows, 1))
    with np.errstate(over="ignore"):
        expected = block.astype(np.float16)
    found = placer.rounded(block, np.dtype(np.float16))
    finite = ~np.isnan(block)
    assert np.array_equal(found.view(np.uint16)[finite], expected.view(np.uint16)[finite])
    assert np.isnan(found[~finite]).all()


class _Begun(Exception):
    pass


def test_a_record_takes_few_bytes_of_memory_until_the_first_pack(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^7 records in under 3 GB: each takes so much at the peak, where one in four is a copy."""
    letters = str.maketrans("0123456789", "ACDEFGHIKL")

    def begin(*_: Any) -> None:
        raise _Begun

    def peak(count: int) -> int:
        proteins = (f"{i - (i % 4 == 3):07d}".translate(letters) for i in range(count))
        fasta = write(tmp_path / f"{count}.fasta", "".join(f">{i}\n{text}\n" for i, text in enumerate(proteins)))
        tracemalloc.start()
        try:
            with pytest.raises(_Begun):
                embed(fasta, tmp_path / f"{count}.h5", token_budget=1 << 14)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(recipe, "_check_protein", lambda *_: tracemalloc.reset_peak())  # the index is read
    monkeypatch.setattr(engines.OnThisHost, "compute", begin)
    monkeypatch.setattr(indexing, "WORTH_BYTES", 0)  # the index is mapped, as that of a large input
    for owner, name, value in (
        (policies, "AT_ONCE", 1 << 12), (layout, "MOST_PACKING", 1), (summary, "MOST_THREADS", 1),
        (in_blocks, "__defaults__", (1 << 12,)), (schema.blocks, "__defaults__", (1 << 12,)), (sums, "BLOCK", 1 << 16),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, value)  # what is worked out at once is the same for few and many
    few, many = 50_000, 100_000
    _, of_few, of_many = peak(1000), peak(few), peak(many)  # the first one imports
    assert (of_many - of_few) / (many - few) < 40
