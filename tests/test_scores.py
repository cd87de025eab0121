"""`--emit`: scores of the unmasked pass against fair-esm's logits, in any company, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import forked
from conftest import read_fasta, relative_l2, write_model
from virnucpro_cli import cli, store
from virnucpro_cli.cluster import merge
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.features import groups
from virnucpro_cli.kinds import EMITS
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import verify
from virnucpro_cli.validation.fair_esm import ALPHABET, Reference, encode

Make = Callable[..., Path]
SMALL = ModelSpec("small", 2, 64, 4)
BOTH = ("entropy", "pseudo-perplexity")
ALL = ("logits", *BOTH)
LENGTHS = [50, 7, 300, 1, 120, 300, 64, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model with its head for tokens, whose logits are far from even."""
    folder = write_model(tmp_path_factory.mktemp("with_head") / "model", SMALL)
    heads = weights.random_heads(SMALL)
    heads["lm_head.layer_norm.weight"] += 1
    save_file(load_file(folder / "model.safetensors") | heads, folder / "model.safetensors")
    return folder


def fair_esm(model: Path) -> Reference:
    found = locate.locate(str(model))
    assert found is not None
    spec, state, _ = weights.load(found)
    return Reference(spec, state | {"lm_head.weight": state["embed_tokens.weight"]})


def logits_of(judge: Reference, sequence: str) -> torch.Tensor:
    with torch.no_grad():
        return judge.model(torch.tensor([encode(sequence)]))["logits"][0, 1:-1]


def by_fair_esm(model: Path, sequences: list[str]) -> NDArray[np.float64]:
    """Entropy among the 20 amino acids and pseudo-perplexity of each protein by fair-esm's own logits, [n, 2]."""
    judge, rows = fair_esm(model), []
    for sequence in sequences:
        logits = logits_of(judge, sequence).double()
        known = [ALPHABET.get_idx(letter) for letter in "ACDEFGHIKLMNPQRSTVWY"]
        p = logits[:, known].softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean()
        own = logits.log_softmax(-1)[torch.arange(len(logits)), encode(sequence)[1:-1]]
        rows.append((float(entropy), float(torch.exp(-own.mean()))))
    return np.array(rows)


def scores_of(path: Path) -> NDArray[np.float32]:
    with read_embeddings(path) as file:
        return np.stack([file.dataset("unmasked", name)[:] for name in ("entropy", "pseudo_perplexity")], axis=1)


def embed(fasta: Path, output: Path, model: Path, **options: Any) -> NDArray[np.float32]:
    embed_fasta(str(fasta), str(output), **{"model": str(model), "device": "cpu", "emit": BOTH, **options})
    return scores_of(output)


@pytest.mark.parametrize("layers", [(-1,), (0, 1)])
def test_scores_are_those_of_fair_esms_logits(
    tmp_path: Path, make_fasta: Make, model: Path, layers: tuple[int, ...]
) -> None:
    fasta = make_fasta(LENGTHS)
    fasta.write_text(fasta.read_text() + ">odd\nMKXB<mask>UZVLA\n")
    found = embed(fasta, tmp_path / "out.h5", model, layers=layers)
    sequences = [sequence for _, sequence in read_fasta(fasta)]
    np.testing.assert_allclose(found, by_fair_esm(model, sequences), rtol=2e-5)
    assert (found[:, 0] < np.log(20)).all() and len(np.unique(found[:, 1])) == len(LENGTHS) + 1
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.layers == [layer % 3 for layer in layers] and list(file._file["mean"]) == list(
            map(str, file.layers)
        )


def test_scores_change_no_bit_with_the_company(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    fasta = make_fasta(LENGTHS * 4)
    first, *others = (
        embed(fasta, tmp_path / f"{budget}.h5", model, token_budget=budget) for budget in (1024, 3000, 16384)
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("pool", [("mean",), ("residue", "mean")])
def test_logits_are_fair_esms_row_by_row(tmp_path: Path, make_fasta: Make, model: Path, pool: tuple[str, ...]) -> None:
    fasta = make_fasta([50, 0, 7, 300, 1, 50])
    embed(fasta, tmp_path / "out.h5", model, emit=ALL, pool=pool, store_dtype="fp32")
    embed(fasta, tmp_path / "half.h5", model, emit=ALL, pool=pool, token_budget=1024)
    judge = fair_esm(model)
    with read_embeddings(tmp_path / "out.h5") as file, read_embeddings(tmp_path / "half.h5") as half:
        assert file.dataset("unmasked", "logits").shape == (408, 33) and half.logits(0).dtype == np.float16
        for row, (_, sequence) in enumerate(read_fasta(fasta)):
            if not sequence:
                assert file.logits(row).shape == (0, 33)
                continue
            assert relative_l2(file.logits(row), logits_of(judge, sequence)) < 1e-5
            np.testing.assert_array_equal(half.logits(row), file.logits(row).astype(np.float16))
        assert "residue/2" in file._file or pool == ("mean",)
    assert verify.verify_file(str(tmp_path / "half.h5"), (str(fasta),), None).passed


def test_embeddings_keep_their_bits_beside_scores(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    fasta = make_fasta(LENGTHS)
    for emit in ((), BOTH):
        embed_fasta(
            str(fasta), str(tmp_path / f"{len(emit)}.h5"), model=str(model), device="cpu", emit=emit, layers=(1,)
        )
    with read_embeddings(tmp_path / "0.h5") as without, read_embeddings(tmp_path / "2.h5") as beside:
        np.testing.assert_array_equal(without[:], beside[:])


def test_skipped_proteins_have_nan_copies_their_originals_and_verify_agrees(
    tmp_path: Path, make_fasta: Make, model: Path
) -> None:
    fasta = make_fasta([30, 0, 40])
    fasta.write_text(fasta.read_text() + fasta.read_text())
    found = embed(fasta, tmp_path / "out.h5", model)
    assert np.isnan(found[[1, 4]]).all() and np.isfinite(found[[0, 2]]).all()
    np.testing.assert_array_equal(found[:3], found[3:])
    assert verify.verify_file(str(tmp_path / "out.h5"), (str(fasta),), None).passed


def test_workers_give_the_same_scores_and_groups_and_shards_and_a_merge_the_same_scores(
    tmp_path: Path, make_fasta: Make, model: Path
) -> None:
    fasta, grouped = make_fasta(LENGTHS * 4), {"emit": ALL, "group_regex": "^(p[12])."}
    expected = embed(fasta, tmp_path / "one.h5", model, **grouped)
    for part in ("1/2", "2/2"):
        embed_fasta(str(fasta), str(tmp_path / "all.h5"), model=str(model), device="cpu", emit=ALL, shard=part)
    merge.merge_shards(str(tmp_path / "all.h5"))
    np.testing.assert_array_equal(scores_of(tmp_path / "all.h5"), expected)
    with read_embeddings(tmp_path / "one.h5") as one, read_embeddings(tmp_path / "all.h5") as merged:
        np.testing.assert_array_equal(*(file.dataset("unmasked", "logits")[:] for file in (one, merged)))
    assert verify.verify_file(str(tmp_path / "all.h5"), (str(fasta),), None).passed
    forked.embed(fasta, tmp_path / "two.h5", model=str(model), device="cpu", token_budget=1024, **grouped)
    np.testing.assert_allclose(scores_of(tmp_path / "two.h5"), expected, rtol=1e-6)
    with read_embeddings(tmp_path / "one.h5") as one, read_embeddings(tmp_path / "two.h5") as other:
        assert one.groups is not None and other.groups is not None
        assert one.groups.ids == other.groups.ids == ["p1", "p2"] and np.array_equal(one.groups.of, other.groups.of)
        for kind in groups.KINDS:
            np.testing.assert_array_equal(one.groups.rows(kind)[:], other.groups.rows(kind)[:])


def test_a_score_that_is_not_finite_ends_as_skipped(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    state = load_file(model / "model.safetensors")
    state["lm_head.bias"][5] = torch.inf
    save_file(state, broken / "model.safetensors")
    embed_fasta(str(make_fasta([30])), str(tmp_path / "out.h5"), model=str(broken), device="cpu", emit=ALL)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert np.isnan(file.logits(0)).all()
        assert (file.status[0], file.reason[0]) == (store.SKIPPED, store.NOT_FINITE)
        assert np.isnan(file[0]).all()
    assert np.isnan(scores_of(tmp_path / "out.h5")).all()


def test_weights_without_the_head_are_refused_before_the_layout(
    tmp_path: Path, make_fasta: Make, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match=r"lm_head\.\* in .*tiny"):
        embed(make_fasta([30]), tmp_path / "out.h5", tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


@pytest.mark.parametrize("kind", EMITS)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_missing_head_is_the_first_thing_that_is_told(
    tmp_path: Path, make_fasta: Make, tiny_model: Path, kind: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the input is read, which is refused, too: it looks like nucleotides."""
    fasta = make_fasta([])
    fasta.write_text(">a\nACGTACGTACGTACGTACGT\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["embed", str(fasta), "-o", str(tmp_path / "out.h5"), "--model", str(tiny_model), "--device", "cpu",
                  "--emit", kind, *more])  # fmt: skip
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == "" and told.err.startswith("error: The weights of")
    assert ("no contact regression" if kind == "contacts" else "no language-model head") in told.err


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--emit", "perplexity"], "pseudo-perplexity"), (["--emit", "entropy", "--long", "window"], "full")],
)
def test_what_cannot_be_emitted_is_refused(
    tmp_path: Path, make_fasta: Make, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["embed", str(make_fasta([9])), "-o", str(tmp_path / "out.h5"), *options])
    assert stop.value.code == 2 and words in capsys.readouterr().err
