"""The nearest rows are the nearest: against every pair in fp64, whatever the blocks, the ties and the gaps; and real homologs."""

import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from children import no_reader, program
from conftest import VIRAL, read_fasta, write_model
from virnucpro_cli import cli, store
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import SearchConfig, search
from virnucpro_cli.explore.default_rows import Pooled

Make = Callable[..., Path]
CPU = torch.device("cpu")


def hits(path: Path, query: Path | str, k: int = 10, **options: Any) -> list[tuple[str, str, int, float, int, int]]:
    """The lines that a search writes, read back."""
    output = path.with_suffix(".tsv")
    search.search_file(SearchConfig(str(path), str(query), k, output=str(output), overwrite=True, **options))
    header, *lines = [line.split("\t") for line in output.read_text().splitlines()]
    assert tuple(header) == search.COLUMNS
    return [(q, hit, int(rank), float(cosine), int(a), int(b)) for q, hit, rank, cosine, a, b in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Thirty proteins, one of them empty, and two alike."""
    folder = tmp_path_factory.mktemp("search")
    dice = random.Random(1)
    texts = ["".join(dice.choices("ACDEFGHIKLMNPQRSTVWY", k=5 + i)) for i in range(30)]
    texts[7], texts[20] = "", texts[3]
    (folder / "in.fasta").write_text("".join(f">p/{i}\n{text}\n" for i, text in enumerate(texts)))
    embed_fasta(folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu")
    return folder / "out.h5"


# --- the nearest ---------------------------------------------------------------------------------------------------


def by_brute_force(
    data: Pooled, queries: Any, own: Any, k: int, mean: Any
) -> tuple[list[list[int]], list[list[float]]]:
    rows, cosines = [], []
    every = search.directions(data.array[data.rows].astype(np.float64), mean)
    for query, itself in zip(queries, own, strict=True):
        cosine = np.einsum("ij,ij->i", np.broadcast_to(query, every.shape), every)
        order = [i for i in np.lexsort((data.rows, -cosine)) if data.rows[i] != itself][:k]
        rows.append(data.rows[order].tolist() + [-1] * (k - len(order)))
        cosines.append(cosine[order].tolist() + [-np.inf] * (k - len(order)))
    return rows, cosines


@settings(max_examples=150)
@given(st.data())
def test_the_nearest_are_those_of_every_pair_in_fp64_with_ties_by_row(data: st.DataObject) -> None:
    n, dimensions = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    dice = np.random.default_rng(data.draw(st.integers(0, 1000)))
    few_values = data.draw(st.booleans())  # many rows alike
    array = (dice.integers(-1, 2, (n, dimensions)) if few_values else dice.normal(size=(n, dimensions))).astype("f2")
    done = np.flatnonzero(dice.random(n) < 0.8)
    array[np.setdiff1d(np.arange(n), done)] = np.nan
    if not len(done):
        return
    pooled = Pooled(None, "mean", 0, array, done, size=data.draw(st.integers(1, 50)))  # type: ignore[arg-type]
    mean = pooled.mean() if data.draw(st.booleans()) else np.zeros(dimensions)
    own = dice.choice(done, 3)
    queries = search.directions(array[own].astype(np.float64), mean)
    k = data.draw(st.integers(1, 12))
    rows, cosines = search.nearest(pooled, queries, own, k, mean, CPU)
    expected = by_brute_force(pooled, queries, own, k, mean)
    assert rows.tolist() == expected[0]
    np.testing.assert_allclose(cosines, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rising", [1, -1])
def test_the_nearest_are_found_whatever_the_order_of_rows_and_the_room_for_likely_ones(
    rising: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TILE", "MANY", "MOST_LIKELY"):
        monkeypatch.setattr(search, name, 2)
    dice = np.random.default_rng(0)
    query, noise = dice.normal(size=24), dice.normal(size=(400, 24))
    array = (query + noise * np.linspace(3, 0.1, 400)[::rising, None]).astype(np.float32)
    pooled = Pooled(None, "mean", 0, array, np.arange(400), size=16)  # type: ignore[arg-type]
    queries, own = search.directions(array[[0, 1, 200, 398, 399]].astype(np.float64), np.zeros(24)), np.full(5, -1)
    rows, _ = search.nearest(pooled, queries, own, 7, np.zeros(24), CPU)
    assert rows.tolist() == by_brute_force(pooled, queries, own, 7, np.zeros(24))[0]


def test_rows_alike_to_seven_digits_are_told_apart() -> None:
    """Differences that an fp32 product loses."""
    dice = np.random.default_rng(0)
    base = dice.normal(size=320)
    array = (base + 1e-5 * dice.normal(size=(500, 320))).astype(np.float32)
    pooled = Pooled(None, "mean", 0, array, np.arange(500), size=64)  # type: ignore[arg-type]
    queries, own, mean = search.directions(array[:5].astype(np.float64), np.zeros(320)), np.arange(5), np.zeros(320)
    rows, _ = search.nearest(pooled, queries, own, 10, mean, CPU)
    assert rows.tolist() == by_brute_force(pooled, queries, own, 10, mean)[0]


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_finds() -> None:
    dice = np.random.default_rng(0)
    array = dice.normal(size=(10_000, 320)).astype(np.float16)
    array[5000:5040] = array[17]
    pooled = Pooled(None, "mean", 0, array, np.flatnonzero(dice.random(10_000) < 0.9))  # type: ignore[arg-type]
    own, mean = pooled.rows[:300], pooled.mean()
    queries = search.directions(array[own].astype(np.float64), mean)
    there, here = (search.nearest(pooled, queries, own, 20, mean, torch.device(name)) for name in ("cuda", "cpu"))
    assert np.array_equal(there[0], here[0]) and np.array_equal(there[1], here[1])


# --- the three kinds of queries --------------------------------------------------------------------------------------


def test_a_name_is_no_hit_of_itself_and_its_copy_is_the_first(made: Path) -> None:
    found = hits(made, "p/3", 100)
    assert [hit[1] for hit in found if hit[0] == hit[1]] == []
    assert found[0][:3] == ("p/3", "p/20", 1) and found[0][3] == 1 and found[0][4:] == (8, 8)
    assert [hit[2] for hit in found] == list(range(1, 29)), "28 others are there, and the empty one is no hit"
    assert [hit[3] for hit in found] == sorted((hit[3] for hit in found), reverse=True)


def test_a_fasta_a_file_of_it_and_the_database_itself_say_the_same(
    made: Path, tmp_path: Path, tiny_model: Path
) -> None:
    fasta = made.parent / "in.fasta"
    embed_fasta(fasta, tmp_path / "other.h5", model=str(tiny_model), device="cpu")
    by_fasta, by_file, by_itself = (hits(made, query, 29) for query in (fasta, tmp_path / "other.h5", made))
    assert by_fasta == by_file
    assert [hit[:2] for hit in by_fasta if hit[0] == hit[1] and hit[2] == 1] != []
    without = [hit for hit in by_fasta if hit[0] != hit[1]]
    assert [hit[:2] for hit in without] == [hit[:2] for hit in by_itself]


def test_a_name_of_several_proteins_asks_for_each(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKVLA\n>b\nMKWWA\n>a\nGGGGHIK\n")
    embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(tiny_model), device="cpu")
    found = hits(tmp_path / "out.h5", "a", 1)
    assert [(hit[0], hit[4]) for hit in found] == [("a", 5), ("a", 7)]


def test_a_query_that_is_skipped_has_no_hits_and_the_exit_code_says_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.fasta").write_text(">one\nMKVLAGW\n>none\n\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["search", str(made), "--query", str(tmp_path / "q.fasta"), "-k", "1"])
    told = capsys.readouterr()
    assert ended.value.code == 3 and "1 protein of the query skipped" in told.err
    assert [line.split("\t")[0] for line in told.out.splitlines()] == ["query", "one"]


@pytest.mark.demo
def test_mutated_copies_are_found_first_and_far_from_all_others_when_centred(tmp_path: Path) -> None:
    """One residue in twenty of each protein exchanged. Raw cosines find them as well, but strangers are at .86 by them."""
    dice = random.Random(0)
    proteins = [(name, text) for name, text in read_fasta(VIRAL) if 100 <= len(text) <= 200][:20]
    with open(tmp_path / "db.fasta", "w") as file, open(tmp_path / "q.fasta", "w") as queries:
        for name, text in proteins:
            mutated = "".join(dice.choice("ACDEFGHIKLMNPQRSTVWY") if dice.random() < 0.05 else c for c in text)
            print(f">{name}\n{text}", file=file)
            print(f">{name}\n{mutated}", file=queries)
    embed_fasta(tmp_path / "db.fasta", tmp_path / "db.h5", model="demo", device="cpu")
    found = hits(tmp_path / "db.h5", tmp_path / "q.fasta", 20)
    assert sum(hit[0] == hit[1] for hit in found if hit[2] == 1) >= 18, "19 of 20 when this was written"
    strangers = float(np.median([hit[3] for hit in found if hit[0] != hit[1]]))
    raw = hits(tmp_path / "db.h5", tmp_path / "db.h5", 19, raw=True)
    assert abs(strangers) < 0.2 and float(np.median([hit[3] for hit in raw])) > 0.8


def test_another_kind_and_layer_is_searched_where_it_is_asked_for(tmp_path: Path, tiny_model: Path, made: Path) -> None:
    settings = {"model": str(tiny_model), "device": "cpu", "layers": (1, 2)}
    embed_fasta(made.parent / "in.fasta", tmp_path / "both.h5", pool=("mean", "bos"), **settings)
    embed_fasta(made.parent / "in.fasta", tmp_path / "bos.h5", pool=("bos",), **(settings | {"layers": (1,)}))
    for query in ("p/3", made.parent / "in.fasta"):
        assert hits(tmp_path / "both.h5", query, kind="bos", layer=1) == hits(tmp_path / "bos.h5", query)
    with pytest.raises(UserError, match=r"no eos of layer 2"):
        hits(tmp_path / "both.h5", "p/3", kind="eos")


def test_a_search_says_which_proteins_it_does_not_see(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "out.h5.partial"
    unfinished.write_bytes(made.read_bytes())
    with h5py.File(unfinished, "r+") as file:
        file["status"][10:] = store.PENDING
        file["run/complete"][()] = 0
    search.search_file(SearchConfig(str(unfinished), "p/3", 3))
    assert "not searched: 1 skipped, 20 not computed yet of 30 proteins" in capsys.readouterr().err


def test_contigs_as_a_query_are_told_what_finds_their_proteins(made: Path, tmp_path: Path) -> None:
    (tmp_path / "contigs.fna").write_text(">c\n" + "ACGTTGCA" * 100 + "\n")
    with pytest.raises(UserError, match=r"nucleotides.*\n.*virnucpro embed --from contigs"):
        hits(made, tmp_path / "contigs.fna")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_queries_of_another_number_of_heads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n>b\nMKTLLVAG\n")
    folder = write_model(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "inv_freq" not in k}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    embed_fasta(tmp_path / "in.fasta", tmp_path / "four.h5", model=str(folder), device="cpu")
    (folder / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 2}))
    embed_fasta(tmp_path / "in.fasta", tmp_path / "two.h5", model=str(folder), device="cpu")
    for query in ("two.h5", "in.fasta"):
        with pytest.raises(UserError, match="other weights"):
            hits(tmp_path / "four.h5", tmp_path / query)


def test_queries_of_other_weights_are_refused(made: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=5)
    embed_fasta(made.parent / "in.fasta", tmp_path / "other.h5", model=str(other), device="cpu")
    with pytest.raises(UserError, match="other weights"):
        hits(made, tmp_path / "other.h5")
    with pytest.raises(UserError, match="other weights"):
        hits(made, made.parent / "in.fasta", model=str(other))


def test_another_file_must_hold_what_is_searched(made: Path, tmp_path: Path, tiny_model: Path) -> None:
    embed_fasta(made.parent / "in.fasta", tmp_path / "other.h5", model=str(tiny_model), device="cpu", layers=(1,))
    with pytest.raises(UserError, match=r"has no mean/2"):
        hits(made, tmp_path / "other.h5")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("nobody", "neither a file nor a protein"),
        ("n" * 300, "neither a file"),
        ("p/7", "skipped"),
        (".", "Is a directory"),
    ],
)
def test_a_query_that_is_nothing_is_one_message(made: Path, query: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        hits(made, query)


@pytest.mark.parametrize("k", [0, -1, 10_001])
def test_k_has_bounds(made: Path, k: int) -> None:
    with pytest.raises(UserError, match="-k is"):
        hits(made, "p/3", k)


def test_a_file_without_rows_is_one_message(tmp_path: Path, tiny_model: Path, make_fasta: Make) -> None:
    embed_fasta(make_fasta([20, 30]), tmp_path / "residues.h5", model=str(tiny_model), device="cpu", pool=("residue",))
    with pytest.raises(UserError, match="per-residue rows only"):
        hits(tmp_path / "residues.h5", "p0")
    embed_fasta(make_fasta([20, 30]), tmp_path / "none.h5", model=str(tiny_model), device="cpu")
    with h5py.File(tmp_path / "none.h5", "r+") as file:
        file["status"][:] = store.SKIPPED
    with pytest.raises(UserError, match="holds no embedded protein"):
        hits(tmp_path / "none.h5", "p0")


def test_neither_an_output_nor_an_input_is_overwritten(made: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.tsv"
    there.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        search.search_file(SearchConfig(str(made), "p/3", output=str(there)))
    with pytest.raises(UserError, match="would overwrite"):
        search.search_file(SearchConfig(str(made), "p/3", output=str(made), overwrite=True))
    assert there.read_text() == "mine"
    search.search_file(SearchConfig(str(made), "p/3", output=str(there), overwrite=True))
    assert there.read_text().startswith("query\t") and [path.name for path in tmp_path.iterdir()] == ["there.tsv"]


def test_nothing_is_left_of_a_search_that_fails(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(search, "nearest", lambda *_: 1 / 0)
    with pytest.raises(Exception, match="division"):
        search.search_file(SearchConfig(str(made), str(made.parent / "in.fasta"), output=str(tmp_path / "hits.tsv")))
    assert list(tmp_path.iterdir()) == []


def test_a_query_like_nucleotides_is_refused_unless_it_is_said_to_be_a_protein(made: Path, tmp_path: Path) -> None:
    (tmp_path / "q.fasta").write_text(">x\n" + "ACGT" * 10 + "\n")
    with pytest.raises(UserError, match="--force-protein"):
        hits(made, tmp_path / "q.fasta")
    assert len(hits(made, tmp_path / "q.fasta", force_protein=True)) == 10


def test_a_reader_that_goes_early_is_no_fault(made: Path) -> None:
    run = program("search", made, "--query", made, "-k", 29, before=partial(no_reader, 1))
    assert run.wait() == 0 and "error" not in run.err, run.err
