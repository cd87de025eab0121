"""`virnucpro extract` against fair-esm's own script, file by file: its reader, its batches, its model, its way to cut and pool."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from esm import FastaBatchedDataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from children import program
from conftest import VIRAL, relative_l2
from virnucpro_cli import cli
from virnucpro_cli.errors import Stopped, UserError
from virnucpro_cli.exchange import extract
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.spec import CONTACT_HEAD
from virnucpro_cli.validation.fair_esm import ALPHABET, Reference

Make = Callable[..., Path]
EVERYTHING = ("mean", "per_tok", "bos", "contacts")


def by_fair_esm(
    judge: Reference, fasta: Path, include: tuple[str, ...], layers: tuple[int, ...], longest: int
) -> dict[str, dict[str, Any]]:
    """What scripts/extract.py of fair-esm saves for each label, by its own FASTA reader, batches and model."""
    data = FastaBatchedDataset.from_file(fasta)
    batches = data.get_batch_indices(4096, extra_toks_per_seq=1)
    convert = ALPHABET.get_batch_converter(longest)
    found = {}
    for batch in batches:
        labels, texts, tokens = convert([data[i] for i in batch])
        with torch.no_grad():
            out = judge.model(tokens, repr_layers=layers, return_contacts="contacts" in include)
        for i, (label, text) in enumerate(zip(labels, texts, strict=True)):
            n = min(longest, len(text))
            rows = {layer: hidden[i] for layer, hidden in out["representations"].items()}
            entries = {
                "representations": {layer: each[1 : n + 1] for layer, each in rows.items()},
                "mean_representations": {layer: each[1 : n + 1].mean(0) for layer, each in rows.items()},
                "bos_representations": {layer: each[0] for layer, each in rows.items()},
            }
            kept = dict(zip(("per_tok", "mean", "bos"), entries.items(), strict=True))
            found[label] = {"label": label} | dict(kept[name] for name in kept if name in include)
            if "contacts" in include:
                found[label]["contacts"] = out["contacts"][i, :n, :n]
    return found


def assert_like_fair_esm(folder: Path, expected: dict[str, dict[str, Any]]) -> None:
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.pt")} == {f"{label}.pt" for label in expected}
    for label, entries in expected.items():
        found = torch.load(folder / f"{label}.pt", weights_only=True)
        assert found.keys() == entries.keys() and found["label"] == label
        for key, value in entries.items():
            if key == "label":
                continue
            pairs = [(found[key], value)] if key == "contacts" else []
            if not pairs:
                assert found[key].keys() == value.keys()
                pairs = [(found[key][layer], each) for layer, each in value.items()]
            for mine, theirs in pairs:
                assert mine.dtype == torch.float32 and mine.shape == theirs.shape
                assert mine.untyped_storage().nbytes() == 4 * mine.numel(), "a view of more than the file shows"
                if key == "contacts":
                    assert float((mine - theirs).abs().max()) < 2e-5
                else:
                    assert relative_l2(mine, theirs) < 1e-5, (label, key)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fair-esm .pt of the tiny model, with fair-esm's contact regression beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    found = locate.locate(str(tiny_model))
    assert found is not None
    spec, state, _ = weights.load(found)
    torch.save(
        {"model": {f"encoder.sentence_encoder.{name}": each for name, each in state.items()}}, folder / "tiny.pt"
    )
    head = {name: each for name, each in weights.random_heads(spec).items() if name.startswith(CONTACT_HEAD)}
    torch.save({"model": head}, folder / "tiny-contact-regression.pt")
    return folder / "tiny.pt"


@pytest.fixture(scope="module")
def judge(tiny: Path) -> Reference:
    found = locate.locate(str(tiny))
    assert found is not None
    spec, state, _ = weights.load(found)
    return Reference(spec, state | weights.random_heads(spec))


@pytest.mark.demo
def test_every_file_is_fair_esms_with_real_weights(tmp_path: Path, demo: Any) -> None:
    text = VIRAL.read_text().split(">")[1:9]
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{each}" for each in text))
    arguments = ["extract", "demo", fasta, tmp_path / "out", "--include", *EVERYTHING, "--repr_layers", "-1", "0", "3",
                 "--truncation_seq_length", "300", "--nogpu"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main([str(each) for each in arguments])
    assert stop.value.code == 0
    assert_like_fair_esm(tmp_path / "out", by_fair_esm(Reference(*demo), fasta, EVERYTHING, (6, 0, 3), 300))
    assert not list((tmp_path / "out").glob(".virnucpro*"))


@pytest.mark.parametrize("include", [("mean",), ("per_tok",), ("bos", "mean"), ("contacts",), EVERYTHING])
def test_files_hold_what_was_included_and_nothing_else(
    tmp_path: Path, make_fasta: Make, tiny: Path, judge: Reference, include: tuple[str, ...]
) -> None:
    fasta = make_fasta([50, 7, 130, 1, 50])
    written = extract.extract_files(
        str(tiny), str(fasta), str(tmp_path / "out"), include, layers=(0, -1), longest=100, gpu=False
    )
    assert (written.files, written.skipped) == (5, 0)
    assert_like_fair_esm(tmp_path / "out", by_fair_esm(judge, fasta, include, (0, 2), 100))


def test_headers_are_whole_and_nameless_records_get_fair_esms_name(
    tmp_path: Path, tiny: Path, judge: Reference
) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">sp|P1|X A b=1\nMKV\nLAGG\n>\nMKVLA\n>a/b c/d\nGGTRS\n>\nMKVLL\n")
    extract.extract_files(str(tiny), str(fasta), str(tmp_path / "out"), ("mean",), gpu=False)
    expected = by_fair_esm(judge, fasta, ("mean",), (2,), 1022)
    assert {"seqnum000000003", "a/b c/d"} < expected.keys()
    assert_like_fair_esm(tmp_path / "out", expected)


HOSTILE = [
    "../out",
    "/etc/passwd",
    "a/../../b",
    "..",
    ".",
    "",
    "x" * 300,
    "y/" * 900,
    "a//b",
    "a/b",
    "nul\0byte",
    "é" * 200,
]


def test_no_header_leaves_the_directory(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "deep" / "out"
    labels = [label for label in HOSTILE if label and "\0" not in label]  # a NUL is no FASTA
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{label}\nMKVLA\n" for label in labels))
    extract.extract_files(str(tiny), str(fasta), str(folder), ("bos",), gpu=False)
    found = {torch.load(path, weights_only=True)["label"] for path in folder.rglob("*.pt")}
    assert found == set(labels)
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta", "deep"}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert "changed to be possible and unique" in capsys.readouterr().err


def test_a_label_that_is_anothers_folder_is_a_file_beside_it() -> None:
    first, second, third = extract.paths_of(["a", "a.pt/b", "a_"], Console(quiet=True))
    assert second == "a.pt/b" and "/" not in first and len({"a", first, third}) == 3


def test_a_link_in_the_directory_leads_no_file_out_of_it(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to("../away")
    (tmp_path / "in.fasta").write_text(">a/x\nMKVLA\n")
    with pytest.raises(UserError, match="leads out of"):
        extract.extract_files(str(tiny), str(tmp_path / "in.fasta"), str(tmp_path / "out"), ("mean",), gpu=False)
    assert not list((tmp_path / "away").iterdir())


def test_an_interrupted_tree_is_not_finished_with_other_weights(
    tmp_path: Path, make_fasta: Make, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fasta, folder = tmp_path / "mine.pt", make_fasta([50, 7]), tmp_path / "out"
    model.write_bytes(tiny.read_bytes())
    interrupted(monkeypatch, model, fasta, folder)
    state = torch.load(model, weights_only=True)
    torch.save({"model": {name: 2 * each for name, each in state["model"].items()}}, model)
    with pytest.raises(UserError, match="model's weights differ"):
        extract.extract_files(str(model), str(fasta), str(folder), ("mean",), layers=(1,), gpu=False)
    assert not list(folder.glob("*.pt"))


@given(
    st.lists(
        st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8", exclude_characters="\n"))), unique=True
    )
)
def test_every_label_has_a_path_of_its_own_below_the_directory(labels: list[str]) -> None:
    places = {Path(f"{path}.pt") for path in extract.paths_of(labels, Console(quiet=True))}
    assert len(places) == len(labels)
    for place in places:
        assert not place.is_absolute() and ".." not in place.parts and place.name.endswith(".pt")
        assert all(len(os.fsencode(part)) <= 255 for part in place.parts) and len(os.fsencode(place)) <= 1024


def test_headers_that_occur_twice_are_refused_before_any_work(tmp_path: Path, tiny: Path) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a x\nMKV\n>b\nMKV\n>a x\nMKL\n")
    with pytest.raises(UserError, match="'a x'"):
        extract.extract_files(str(tiny), str(fasta), str(tmp_path / "out"), ("mean",), gpu=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_empty_record_has_no_file_and_exit_3(tmp_path: Path, tiny: Path) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a\nMKV\n>b\n\n>c\nMKL\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["extract", str(tiny), str(fasta), str(tmp_path / "out"), "--include", "contacts", "--nogpu"])
    assert stop.value.code == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.pt", "c.pt"}


def test_an_interrupted_tree_is_finished_by_the_same_command(
    tmp_path: Path, make_fasta: Make, tiny: Path, judge: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta, folder, real, saved = make_fasta([50, 7, 30, 12]), tmp_path / "out", torch.save, 0

    def stopped(content: Any, path: Path) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:
            raise Stopped(15)
        real(content, path)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(torch, "save", stopped)
        extract.extract_files(str(tiny), str(fasta), str(folder), ("mean",), gpu=False)
    assert stop.value.resumable and len(list(folder.glob("*.pt"))) == 2 and list(folder.glob(".virnucpro-*.h5"))
    (folder / "p3.pt").write_text("an older file, which extract.py would replace")
    extract.extract_files(str(tiny), str(fasta), str(folder), ("mean",), gpu=False)
    assert_like_fair_esm(folder, by_fair_esm(judge, fasta, ("mean",), (2,), 1022))
    assert not list(folder.glob(".virnucpro*"))


def interrupted(monkeypatch: pytest.MonkeyPatch, tiny: Path, fasta: Path, folder: Path) -> set[str]:
    """Stop an extract of layer 1 at its first file; return its hidden files."""

    def stopped(content: Any, path: Path) -> None:
        raise Stopped(15)

    before = {path.name for path in folder.glob(".virnucpro*")}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(torch, "save", stopped)
        extract.extract_files(str(tiny), str(fasta), str(folder), ("mean",), layers=(1,), gpu=False)
    return {path.name for path in folder.glob(".virnucpro*")} - before


def test_a_run_clears_away_what_runs_of_its_fasta_left_and_nothing_else(
    tmp_path: Path, make_fasta: Make, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, folder = make_fasta([50, 7]), make_fasta([9, 12], "second.fasta"), tmp_path / "out"
    assert interrupted(monkeypatch, tiny, first, folder)
    others = interrupted(monkeypatch, tiny, second, folder)
    (folder / ".virnucpro-0123.h5").write_bytes(b"no file of extract")
    extract.extract_files(str(tiny), str(first), str(folder), ("mean",), gpu=False)
    assert {path.name for path in folder.iterdir()} == {"p0.pt", "p1.pt", ".virnucpro-0123.h5"} | others


def test_two_extracts_into_one_folder_write_each_its_own_proteins(
    tmp_path: Path, make_fasta: Make, tiny: Path, judge: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second runs whole while the first has written a file that has no name yet."""
    first, folder, real, inner = make_fasta([50, 7]), tmp_path / "out", torch.save, False
    second = tmp_path / "second.fasta"
    second.write_text(make_fasta([31, 12], "other.fasta", seed=7).read_text().replace(">p", ">q"))

    def meanwhile(content: Any, path: Path) -> None:
        nonlocal inner
        real(content, path)
        if not inner:
            inner = True
            extract.extract_files(str(tiny), str(second), str(folder), ("mean",), gpu=False)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", meanwhile)
        extract.extract_files(str(tiny), str(first), str(folder), ("mean",), gpu=False)
    expected = by_fair_esm(judge, first, ("mean",), (2,), 1022) | by_fair_esm(judge, second, ("mean",), (2,), 1022)
    assert_like_fair_esm(folder, expected)


def test_the_same_extract_twice_at_once_is_refused(
    tmp_path: Path, make_fasta: Make, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta, folder, real, refused = make_fasta([50, 7]), tmp_path / "out", torch.save, []

    def again(content: Any, path: Path) -> None:
        with pytest.raises(UserError, match="Another extract of") as error:
            extract.extract_files(str(tiny), str(fasta), str(folder), ("mean",), gpu=False)
        refused.append(error)
        real(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", again)
        extract.extract_files(str(tiny), str(fasta), str(folder), ("mean",), gpu=False)
    assert len(refused) == 2 and sorted(path.name for path in folder.iterdir()) == ["p0.pt", "p1.pt"]


def test_no_file_replaces_the_weights_or_the_fasta(tmp_path: Path, tiny: Path) -> None:
    weights_file, fasta = tmp_path / "mine.pt", tmp_path / "in.pt"
    weights_file.write_bytes(tiny.read_bytes())
    for name, text in (("mine", ">mine\nMKV\n"), ("in", ">in\nMKV\n")):
        fasta.write_text(text)
        before = weights_file.read_bytes()
        with pytest.raises(UserError, match=f"{name}.pt would be replaced"):
            extract.extract_files(str(weights_file), str(fasta), str(tmp_path), ("mean",), gpu=False)
        assert weights_file.read_bytes() == before and fasta.read_text() == text


def test_standard_input_is_taken_as_by_embed(tmp_path: Path, tiny: Path, judge: Reference) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a b\nMKVLA\n>\nGGTRS\n")
    run = program("extract", tiny, "-", tmp_path / "out", "--include", "mean", "--nogpu", stdin=fasta.read_bytes())
    assert run.wait() == 0, run.err
    assert_like_fair_esm(tmp_path / "out", by_fair_esm(judge, fasta, ("mean",), (2,), 1022))


def test_without_a_contact_regression_the_error_says_where_it_was_looked_for(
    tmp_path: Path, make_fasta: Make, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=r"contact_head\.regression\.\* in .*, .*model-contact-regression\.pt"):
        extract.extract_files(str(tiny_model), str(make_fasta([9])), str(tmp_path / "out"), ("contacts",), gpu=False)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--include", "max"],
        ["--include"],
        ["--include", "mean", "--truncation_seq_length", "0"],
        ["--include", "mean", "--nope"],
    ],
)
def test_what_fair_esms_script_does_not_know_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["extract", "demo", "in.fasta", "out", *arguments])
    assert stop.value.code == 2 and "Usage: virnucpro extract" in capsys.readouterr().err
