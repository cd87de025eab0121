"""DNABERT-S: every layer is the published network's, kernels are their twins', bits are those of any company, and mistakes fail."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forked
from conftest import ROOT, loaded, relative_l2
from packs import embeddings, of_segment
from sabotage import without_packing
from test_tokens import trained
from virnucpro_cli import read_embeddings
from virnucpro_cli.batch import PackedBatch, query_tiles
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import inspect
from virnucpro_cli.model import attention, dnabert, families, kernels, locate, pooling, weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.dnabert import DNABERT
from virnucpro_cli.model.kernels import postnorm
from virnucpro_cli.model.packed import PackedModel, Parts, exact_arithmetic
from virnucpro_cli.model.spec import ModelSpec, State
from virnucpro_cli.plan.packing import buckets
from virnucpro_cli.validation import dnabert as oracle
from virnucpro_cli.validation import verify
from virnucpro_cli.validation.validate import validate_model

CPU = torch.device("cpu")
SMALL = ModelSpec("small", 3, 96, 12, "dnabert", inner=384)
LENGTHS = (2, 3, 40, 117, 96, 117, 600)
PUBLISHED = {
    "embed_tokens": "embeddings.word_embeddings", "embed_type": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm", "self_attn.out_proj": "attention.output.dense",
    "self_attn_norm": "attention.output.LayerNorm", "mlp_norm": "mlp.layernorm", "mlp.down_proj": "mlp.wo",
}  # fmt: skip


def state_of(spec: ModelSpec, seed: int = 0) -> State:
    """Random weights, large enough that attention, distances, types and every bias matter."""
    state, generator = weights.random_state(spec, seed), torch.Generator().manual_seed(seed)
    for name, each in state.items():
        if each.ndim == 1 and "inv_freq" not in name:
            state[name] = (1.0 if name.endswith("weight") else 0.0) + 0.3 * torch.randn(each.shape, generator=generator)
    state["embed_tokens.weight"] = 0.3 * torch.randn(state["embed_tokens.weight"].shape, generator=generator)
    state["embed_type.weight"] = 0.3 * torch.randn(state["embed_type.weight"].shape, generator=generator)
    return state


def checkpoint(
    folder: Path, spec: ModelSpec, state: State, prefix: str = "", config: dict[str, Any] | None = None
) -> Path:
    """A folder as it is published: joint matrices, a pooler, configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {f"{prefix}pooler.dense.weight": torch.zeros(spec.hidden, spec.hidden)}
    for name, each in state.items():
        for ours, its in PUBLISHED.items():
            name = name.replace(f"{ours}.", f"{its}.")
        there[prefix + name.replace("layers.", "encoder.layer.")] = each
    for i in range(spec.layers):
        at = f"{prefix}encoder.layer.{i}"
        for kind in ("weight", "bias"):
            thirds = [there.pop(f"{at}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            there[f"{at}.attention.self.Wqkv.{kind}"] = torch.cat(thirds)
        halves = [there.pop(f"{at}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        there[f"{at}.mlp.gated_layers.weight"] = torch.cat(halves)
        there.pop(f"{at}.self_attn.rot_emb.inv_freq", None)
    torch.save(there, folder / "pytorch_model.bin")
    settings = {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 4096, "alibi_starting_size": 512,
        "num_hidden_layers": spec.layers, "hidden_size": spec.hidden, "num_attention_heads": spec.heads,
        "intermediate_size": spec.inner, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    trained(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("dnabert") / "small", SMALL, state_of(SMALL))


def model_of(spec: ModelSpec, state: State, dtype: torch.dtype = torch.float32) -> PackedModel:
    return families.build(spec, dict(state), dtype, CPU, attention.resolve("auto", CPU, dtype))


def pack(lengths: tuple[int, ...], rows: int = 0, seed: int = 1) -> tuple[PackedBatch, list[list[int]]]:
    """Random tokens of segments with so many between their first and last, and filler."""
    dice = np.random.default_rng(seed)
    tokens = [[1, *dice.integers(5, 4096, n).tolist(), 2] for n in lengths]
    return packed(tokens, rows), tokens


def packed(tokens: list[list[int]], rows: int = 0) -> PackedBatch:
    sizes = np.array([len(each) for each in tokens])
    cu_seqlens = np.append(0, np.cumsum(sizes))
    used = int(cu_seqlens[-1])
    ids = torch.full((rows or 1024 * (-(-used // 1024)),), 3, dtype=torch.int32)
    ids[:used] = torch.tensor([i for each in tokens for i in each])
    return PackedBatch(
        ids, torch.zeros_like(ids), torch.tensor(cu_seqlens, dtype=torch.int32), torch.tensor(sizes - 2.0),
        torch.tensor(query_tiles(cu_seqlens), dtype=torch.int32), None, None, np.arange(len(sizes)), sizes, int(sizes.max()),
    )  # fmt: skip


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [12, 8, 6, 3])
def test_every_layer_is_the_published_networks(heads: int) -> None:
    spec = ModelSpec("small", 3, 96, heads, "dnabert", inner=384)
    state, (batch, tokens) = state_of(spec), pack(LENGTHS)
    judge, model = oracle.OfNucleotides(spec, state), model_of(spec, state)
    found: dict[int, torch.Tensor] = {}
    model.forward(batch, (0, 1, 2, 3), lambda layer, hidden: found.update({layer: hidden.clone()}))
    pools = model.embed(batch, (3,), pooling.Pooler(("mean", "mean-all", "bos", "eos"), torch.float32)).pooled
    ends = np.cumsum(batch.seqlens)
    for i, ids in enumerate(tokens):
        exact, rows = judge.embed(ids, (0, 1, 2, 3)), slice(ends[i] - len(ids), ends[i])
        for layer, hidden in exact.items():
            assert relative_l2(found[layer][rows], hidden) <= 2e-6
        last = exact[3].double()
        for kind, expected in (
            ("mean", last[1:-1].mean(0)),
            ("mean-all", last.mean(0)),
            ("bos", last[0]),
            ("eos", last[-1]),
        ):
            assert relative_l2(pools[kind, 3][i], expected) <= 2e-6


def test_slopes_are_those_of_the_paper() -> None:
    assert [round(-np.log2(each), 6) for each in postnorm.slopes(12)] == [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]
    for heads in range(1, 33):
        assert np.allclose(postnorm.slopes(heads), oracle.slopes(heads), rtol=1e-12)


@pytest.mark.slow
def test_the_published_size_is_the_published_networks() -> None:
    spec = families.SIZES["DNABERT-S"]
    state, (batch, tokens) = state_of(spec), pack((3, 117, 96))
    found: dict[int, torch.Tensor] = {}
    model_of(spec, state).forward(batch, (12,), lambda layer, hidden: found.update({layer: hidden.clone()}))
    exact = torch.cat([oracle.OfNucleotides(spec, state).embed(ids, (12,))[12] for ids in tokens])
    assert relative_l2(found[12][: batch.used], exact) <= 2e-6
    assert families.parameters(spec) == 117_068_544 - (768 * 768 + 768) and families.products(spec)[2:] == (
        (768, 6144),
        (3072, 768),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_slice_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    state, (batch, tokens) = state_of(SMALL), pack(LENGTHS)
    model = model_of(SMALL, state, dtype)
    together = embeddings(model, batch, (0, 2, 3))
    for i, ids in enumerate(tokens):
        alone = of_segment(embeddings(model, packed([ids]), (0, 2, 3)), packed([ids]), 0)
        for key, values in of_segment(together, batch, i).items():
            assert torch.equal(values, alone[key]), (i, key)


def test_long_segments_take_little_memory_for_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    state, (batch, _) = state_of(SMALL), pack((600, 40))
    model = model_of(SMALL, state)
    whole = embeddings(model, batch, (3,))
    monkeypatch.setattr(postnorm, "MOST_BIAS", 12 * 600 * 7)
    parts = embeddings(model, batch, (3,))
    assert relative_l2(parts.residue[3][: batch.used], whole.residue[3][: batch.used]) <= 1e-6


# --- kernels ---------------------------------------------------------------------------------------------------------


def by_kernels(spec: ModelSpec, state: State, dtype: torch.dtype) -> PackedModel:
    """The forward with the kernels of a GPU, interpreted."""
    pytest.importorskip("triton")
    fall = torch.tensor(postnorm.slopes(spec.heads))
    model = model_of(spec, state, dtype)
    own = Backend("portable", lambda *x: postnorm.by_kernel(*x, slopes=fall), postnorm.steps(True))
    return model._with(backend=own)


def test_kernels_lose_no_more_than_plain_steps() -> None:
    dtype = torch.float16  # products of bfloat16 are wrong in the interpreter
    spec = ModelSpec("small", 1, 96, 3, "dnabert", inner=384)
    state, (batch, tokens) = state_of(spec), pack((2, 31, 63, 70), 176)
    exact, plain, kernel = (
        embeddings(model, batch, (1,))
        for model in (model_of(spec, state), model_of(spec, state, dtype), by_kernels(spec, state, dtype))
    )
    errors = [relative_l2(each.residue[1][: batch.used], exact.residue[1][: batch.used]) for each in (kernel, plain)]
    assert errors[0] <= 1.5 * errors[1]
    other = packed([tokens[3], tokens[1]], 176)
    found = embeddings(by_kernels(spec, state, dtype), other, (1,))
    for i, at in ((3, 0), (1, 1)):
        there = of_segment(found, other, at)
        assert all(torch.equal(values, there[key]) for key, values in of_segment(kernel, batch, i).items())


def test_the_trial_refuses_a_kernel_that_differs_from_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from contextlib import nullcontext

    from virnucpro_cli.model.kernels import glue

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    postnorm.try_out(CPU, torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(postnorm, "slopes", lambda heads: [0.5, 0.1])
        postnorm.try_out(CPU, torch.float16)
        bias = postnorm._bias
        patch.setattr(postnorm, "_bias", lambda *each: 1.1 * bias(*each))
        with pytest.raises(RuntimeError, match="attention differs"):
            postnorm.try_out(CPU, torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(glue, "gated", lambda x: postnorm.gated(torch.cat(x.chunk(2, 1)[::-1], 1)))
        with pytest.raises(RuntimeError, match="gated differs"):
            postnorm.try_out(CPU, torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(glue, "add_norm", lambda x, y, norm, eps: None)
        with pytest.raises(RuntimeError, match="add_norm differs"):
            postnorm.try_out(CPU, torch.float16)
    assert kernels.OPTIONS


@pytest.mark.parametrize("lengths", [[2], [31, 32, 33], [64, 65, 63], [200, 97, 2]])
def test_the_kernel_takes_distances_off_scores_of_any_segment(lengths: list[int]) -> None:
    pytest.importorskip("triton")
    from virnucpro_cli.model.kernels.attention import attention as by_triton

    batch, dice = packed([[1] * each for each in lengths], 384), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(384, 3, 3, 64, generator=dice).half().unbind(1)
    fall = torch.tensor(postnorm.slopes(3))
    found = by_triton(q, k, v, batch.query_tiles, 0.125, slopes=fall)
    exact = postnorm.by_sdpa(q.double(), k.double(), v.double(), batch, 0.125, slopes=fall.double())
    assert relative_l2(found[: batch.used], exact[: batch.used]) <= 8e-4


@pytest.mark.parametrize(("rows", "width"), [(5, 96), (33, 768), (3, 80), (130, 64)])
def test_a_sum_and_its_norm_in_one_pass_are_those_of_two(rows: int, width: int) -> None:
    pytest.importorskip("triton")
    from virnucpro_cli.model.kernels import glue

    dice = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, width, generator=dice).half() for _ in range(2))
    norm = 1 + torch.randn(width, generator=dice) / 3, torch.randn(width, generator=dice)
    exact = torch.nn.functional.layer_norm(x.double() + y.double(), (width,), *(each.double() for each in norm), 1e-12)
    glue.add_norm(x, y, norm, 1e-12)
    assert relative_l2(x, exact) <= 4e-4


# --- on a GPU --------------------------------------------------------------------------------------------------------

IN_16_BIT = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def on_gpu(spec: ModelSpec, state: State, dtype: torch.dtype, name: str = "auto") -> PackedModel:
    device = torch.device("cuda", 0)
    exact_arithmetic()
    return families.build(spec, dict(state), dtype, device, attention.resolve(name, device, dtype))


def in_plain_steps(model: PackedModel) -> PackedModel:
    fall = torch.tensor(postnorm.slopes(model.spec.heads), device=model.device)
    own = model.backend._replace(attention=partial(postnorm.by_sdpa, slopes=fall), steps=postnorm.steps(False))
    return model._with(backend=own)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_slice_has_the_same_bits_in_every_bucket_of_a_gpu(dtype: torch.dtype) -> None:
    spec, dice, layers = families.SIZES["DNABERT-S"], np.random.default_rng(2), (0, 1, 6, 12)
    model = on_gpu(spec, state_of(spec), dtype)
    probes = pack((1, 29, 30, 62, 63, 84, 114, 300))[1]
    alone = [of_segment(embeddings(model, packed([ids], 1024), layers), packed([ids], 1024), 0) for ids in probes]
    differing = []
    for rows in buckets(32768):
        own, others = list(probes), []
        while sum(map(len, own + others)) + 120 < rows:
            others.append([1, *dice.integers(5, 4096, int(dice.integers(84, 115))).tolist(), 2])
        order = dice.permutation(len(own) + len(others))
        batch = packed([(own + others)[i] for i in order], rows)
        found = embeddings(model, batch, layers)
        for i, wanted in enumerate(alone):
            rows_of_it = of_segment(found, batch, int(np.flatnonzero(order == i)[0]))
            differing += [(rows, i, key) for key, each in rows_of_it.items() if not torch.equal(each, wanted[key])]
    assert not differing, differing


@pytest.mark.gpu
@IN_16_BIT
def test_kernels_of_a_gpu_lose_no_more_than_plain_steps(dtype: torch.dtype) -> None:
    spec = families.SIZES["DNABERT-S"]
    state, (batch, tokens) = state_of(spec), pack((1, 29, 62, 63, *range(84, 115), 300, 1500), 8192)
    exact, errors = embeddings(on_gpu(spec, state, torch.float32), batch, (12,)), []
    ours = on_gpu(spec, state, dtype)
    for model in (ours, in_plain_steps(ours)):
        found = embeddings(model, batch, (12,))
        pairs = [[of_segment(each, batch, i)["residue", 12] for each in (found, exact)] for i in range(len(tokens))]
        errors.append(np.array([relative_l2(*pair) for pair in pairs]))
    print(dtype, "median and worst of kernels and of plain steps", *((np.median(e), e.max()) for e in errors))
    assert np.median(errors[0]) <= 1.5 * np.median(errors[1]) and errors[0].max() <= 3 * errors[1].max()


@pytest.mark.gpu
@IN_16_BIT
def test_a_named_backend_computes_distances_in_our_kernel_and_says_so(dtype: torch.dtype) -> None:
    spec = families.SIZES["DNABERT-S"]
    state, (batch, _) = state_of(spec), pack((30, 100, 114), 1024)
    ours, other = (on_gpu(spec, state, dtype, name) for name in ("portable", "torch_varlen"))
    assert not ours.backend.notes and "since torch_varlen knows no distances" in other.backend.notes[0]
    rows = [embeddings(model, batch, (12,)).residue[12][: batch.used] for model in (ours, other)]
    assert torch.equal(*rows)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_published_files_are_read_with_and_without_prefix_and_configuration(tmp_path: Path, prefix: str) -> None:
    state = state_of(SMALL)
    folder = checkpoint(tmp_path / "m", SMALL, state, prefix)
    spec, found, _ = loaded(folder)
    assert (spec.layers, spec.hidden, spec.heads, spec.family, spec.inner) == (3, 96, 12, "dnabert", 384)
    assert found.keys() == state.keys() and all(torch.equal(each, state[name]) for name, each in found.items())
    wide = ModelSpec("wide", 1, 128, 2, "dnabert", inner=384)
    alone = checkpoint(tmp_path / "alone", wide, state_of(wide), prefix)
    (alone / "config.json").unlink()
    assert loaded(alone / "pytorch_model.bin")[0].heads == 2


@pytest.mark.parametrize("model_type", ["dnaberts", "dnabert2"])
def test_multimolecules_files_are_read_with_their_names(tmp_path: Path, model_type: str) -> None:
    state = state_of(SMALL)
    folder = checkpoint(tmp_path / "m", SMALL, state, config={"model_type": model_type, "architectures": None})
    there = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for i in range(SMALL.layers):
        at = f"encoder.layer.{i}.attention.self"
        for kind in ("weight", "bias"):
            thirds = there.pop(f"{at}.Wqkv.{kind}").chunk(3)
            there |= {f"{at}.{word}.{kind}": each for word, each in zip(("query", "key", "value"), thirds, strict=True)}
    words = {"LayerNorm": "layer_norm", "layernorm": "layer_norm", "gated_layers": "up_proj", "mlp.wo": "mlp.down_proj"}
    for word, its in words.items():
        there = {name.replace(word, its): each for name, each in there.items()}
    torch.save({f"model.{name}": each for name, each in there.items()}, folder / "pytorch_model.bin")
    spec, found, _ = loaded(folder)
    assert spec.heads == 12 and found.keys() == state.keys()
    assert all(torch.equal(each, state[name]) for name, each in found.items())


def test_weights_without_their_tokenizer_are_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "_hf_cache", lambda: tmp_path)
    folder = checkpoint(tmp_path / "models--zhihan1996--DNABERT-S" / "snapshots" / "00e47f96", SMALL, state_of(SMALL))
    found = locate.locate("dnabert-s")
    assert found is not None and found.files == (folder / "pytorch_model.bin",)
    assert folder / "tokenizer.json" in locate.files_read(str(folder / "pytorch_model.bin"))
    (folder / "tokenizer.json").unlink()
    assert locate.locate("dnabert-s") is None


def test_no_table_is_made_for_it_and_nothing_is_emitted() -> None:
    model = model_of(SMALL, state_of(SMALL))
    model.reserve_positions(600)
    assert not len(model.cos) and families.emitted(SMALL) == []


def test_a_plain_bert_is_refused(tmp_path: Path) -> None:
    state = state_of(SMALL)
    for config, what in (
        ({"alibi_starting_size": None}, "alibi_starting_size"), ({"vocab_size": 30522}, "vocab_size"),
        ({"hidden_act": "gelu_new"}, "hidden_act"), ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"not DNABERT-S: {what}"):
            loaded(checkpoint(tmp_path / "m", SMALL, state, config=config))


def test_the_tokenizer_is_needed_and_pinned(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "m", SMALL, state_of(SMALL))
    (folder / "tokenizer.json").unlink()
    (tmp_path / "in.fna").write_text(">a\nACGT\n")
    with pytest.raises(UserError, match=r"tokenizer\.json is not there.*\n?.*667f5a0e"):
        embed_fasta(tmp_path / "in.fna", tmp_path / "out.h5", model=str(folder), device="cpu")
    found = locate.locate(str(small))
    assert found is not None and locate.tokenizer_of(found, SMALL) == small / "tokenizer.json"
    from dataclasses import replace

    with pytest.raises(UserError, match="not the published one"):
        locate.tokenizer_of(replace(found, spec=families.SIZES["DNABERT-S"]), families.SIZES["DNABERT-S"])


def test_proteins_fp8_and_heads_are_refused(tmp_path: Path, small: Path) -> None:
    (tmp_path / "p.faa").write_text(">a\nACGT\n")
    with pytest.raises(UserError, match="reads nucleotides only"):
        families.reading(SMALL)
    with pytest.raises(UserError, match="fp8"):
        families.check_dtype(SMALL, torch.float8_e4m3fn)
    with pytest.raises(UserError, match="has no language-model head"):
        embed_fasta(tmp_path / "p.faa", tmp_path / "o.h5", model=str(small), device="cpu", emit=("entropy",))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"emit": ("entropy",)}, "language-model head"), ({"emit": ("contacts",)}, "contact regression"),
     ({"dtype": "fp8"}, "fp8"), ({"layers": (99,)}, "layer 99")],
)  # fmt: skip
def test_what_a_named_model_cannot_do_is_refused_before_it_is_fetched(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network is asked: a fetch would fail with other words."""
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nucleotides(tmp_path / "n.fasta", 40)
    with pytest.raises(UserError, match=words):
        embed_fasta(tmp_path / "n.fasta", tmp_path / "o.h5", model="dnabert-s", device="cpu", **options)


# --- whole runs ------------------------------------------------------------------------------------------------------


def nucleotides(path: Path, *lengths: int) -> list[str]:
    dice = random.Random(3)
    sequences = ["".join(dice.choices("ACGTacgtNU", [9, 9, 9, 9, 1, 1, 1, 1, 1, 1], k=n)) for n in lengths]
    path.write_text("".join(f">s{i}\n{each}\n" for i, each in enumerate(sequences)))
    return sequences


@pytest.mark.parametrize("options", [{}, {"max_residues": 40}, {"max_residues": 40, "overlap": 10, "long": "window"}])
def test_any_fasta_of_nucleotides_is_embedded(tmp_path: Path, small: Path, options: dict[str, Any]) -> None:
    """Lengths are bases, sizes and cuts are tokens; the rows are the oracle's, and the file is verified with its FASTA."""
    path, output = tmp_path / "in.fna", tmp_path / "out.h5"
    sequences = nucleotides(path, 1, 30, 500, 90, 260, 30)
    pools = ("mean", "mean-all", "residue") if options.get("long") != "window" else ("mean", "residue")
    embed_fasta(path, output, model=str(small), device="cpu", store_dtype="fp32", pool=pools, **options)
    spec, state, _ = loaded(small)
    judge = oracle.OfNucleotides.reading_by(small / "tokenizer.json")(spec, state)
    with read_embeddings(output) as file:
        assert file.words == ("sequence", "base") and file.lengths.tolist() == [len(each) for each in sequences]
        for i, each in enumerate(sequences):
            read = "".join(base if base in "ACGT" else "N" for base in each.upper().replace("U", "T"))
            ids = judge.encode(read)
            assert file.columns["tokens"][i] == len(ids) - 2
            if options.get("long") != "window":
                ids = (
                    [*ids[: options.get("max_residues", 1022) + 1], 2]
                    if len(ids) - 2 > options.get("max_residues", 1022)
                    else ids
                )
                exact = judge.embed(ids, (3,))[3].double()
                assert relative_l2(file.dataset("mean-all")[i], exact.mean(0)) <= 1e-5
                assert relative_l2(file.residues(i), exact[1:-1]) <= 1e-5
    assert verify.verify_file(str(output), (str(path),)).passed
    verdict = validate_model(against=str(output), fasta=str(path), model=str(small))
    assert verdict.passed, verdict.failed_parts


def test_words_and_the_table_count_tokens_where_the_model_does(tmp_path: Path, small: Path) -> None:
    path, output, qc = tmp_path / "in.fna", tmp_path / "out.h5", tmp_path / "qc.tsv"
    nucleotides(path, 500, 60)
    options: dict[str, Any] = {"model": str(small), "device": "cpu", "max_residues": 40}
    told = embed_fasta(path, output, qc=str(qc), pool=("mean-all",), **options)
    with read_embeddings(output) as file:
        tokens = file.columns["tokens"].tolist()
        assert tokens[0] > 40 >= tokens[1]
        assert "1 sequence was truncated to the first 40 tokens." in inspect.methods(file)
    share = f"{(tokens[0] - 40) / sum(tokens):.0%}"
    assert any(f"truncated, {share} of tokens not seen; --long full embeds them whole" in note for note in told.notes)
    rows = [line.split("\t") for line in qc.read_text().splitlines()]
    at = rows[0].index("length"), rows[0].index("embedded")
    assert [[row[i] for i in at] for row in rows[1:]] == [["500", "40"], ["60", str(tokens[1])]]
    embed_fasta(path, tmp_path / "w.h5", qc=str(tmp_path / "w.tsv"), long="window", overlap=10, **options)
    counts = [line.split("\t")[rows[0].index("windows")] for line in (tmp_path / "w.tsv").read_text().splitlines()[1:]]
    assert counts == [str(-(-(tokens[0] - 10) // 30)), "1"]
    with pytest.raises(UserError, match=r"1 sequence longer than 40 tokens; the first is 's0' with"):
        embed_fasta(path, tmp_path / "e.h5", long="error", **options)


def test_proteins_are_no_nucleotides(tmp_path: Path, small: Path) -> None:
    for kind in ({}, {"kind": "nucleotide"}):
        with pytest.raises(UserError, match=r"does not look like nucleotides: 7\d\.\d% of the letters are not A, C"):
            embed_fasta(ROOT / "examples" / "viral_proteins.fasta", tmp_path / "o.h5", model=str(small), **kind)
    assert not list(tmp_path.iterdir())


def test_workers_embed_tokens_too(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "in.fna"
    nucleotides(path, *range(100, 700, 20))
    for name, run in (("one.h5", embed_fasta), ("two.h5", forked.embed)):
        run(path, tmp_path / name, model=str(small), device="cpu", token_budget=1024)
    with read_embeddings(tmp_path / "one.h5") as one, read_embeddings(tmp_path / "two.h5") as two:
        assert (one[:] == two[:]).all() and devices.describe_device(CPU)


# --- mistakes --------------------------------------------------------------------------------------------------------


def gate_and_value_swapped(patch: pytest.MonkeyPatch) -> None:
    whole = postnorm.gated
    patch.setattr(postnorm, "gated", lambda x: whole(torch.cat(x.chunk(2, 1)[::-1], 1)))


def no_type_row(patch: pytest.MonkeyPatch) -> None:
    whole = DNABERT.parts

    def parts(spec: ModelSpec, state: State, device: torch.device) -> Parts:
        return whole(spec, state | {dnabert.TYPES: torch.zeros(2, spec.hidden)}, device)

    patch.setattr(DNABERT, "parts", parts)


def eps_of_esm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(postnorm, "EPS", 1e-5)
    patch.setattr(dnabert, "EPS", 1e-5)


def specials_out_of_the_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(pooling.POOLS, "mean-all", pooling.mean)


def slopes_of_the_wrong_power(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(postnorm, "slopes", lambda heads: [2.0 ** (-8.0 * k / heads) for k in range(1, heads + 1)])


def one_sided(patch: pytest.MonkeyPatch) -> None:
    def bias(slopes: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return -slopes[:, None, None] * (queries[:, None] - keys).clamp(min=0)

    patch.setattr(postnorm, "_bias", bias)


MISTAKES = {
    "gate and value swapped": gate_and_value_swapped, "no type row": no_type_row, "eps 1e-5": eps_of_esm,
    "specials out of the mean": specials_out_of_the_mean, "slopes of the wrong power": slopes_of_the_wrong_power,
    "one-sided distances": one_sided,
}  # fmt: skip


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_validate_passes_an_honest_run_and_fails_every_mistake(
    mistake: str | None, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mistake is not None:
        MISTAKES[mistake](monkeypatch)
        without_packing(monkeypatch)
    sizes: dict[str, Any] = {"sample": 24} if mistake is None else {"sample": 8, "max_residues": 100}
    verdict = validate_model(model=str(small), device="cpu", token_budget=1024, **sizes)
    failed = {part.split(":")[0] for part in verdict.failed_parts}
    assert failed == set() if mistake is None else "Semantics" in failed


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_compiled_kernels_lose_no_more_than_plain_steps_in_any_company(backend: str, dtype: torch.dtype) -> None:
    device, spec = torch.device("cuda"), families.SIZES["DNABERT-S"]
    state, (batch, tokens) = state_of(spec), pack((1, 2, 62, 63, 84, 100, 115, 116, 117, 600), 2048)

    def built(dtype: torch.dtype, plain: bool) -> PackedModel:
        model = families.build(
            spec, dict(state), dtype, device, attention.resolve("auto" if plain else backend, device, dtype)
        )
        if not plain:
            assert model.backend.steps.__name__.endswith("glue")
            return model
        fall = torch.tensor(postnorm.slopes(spec.heads), device=device)
        return model._with(backend=Backend("sdpa", lambda *x: postnorm.by_sdpa(*x, slopes=fall), postnorm.steps(False)))

    layers = (0, 1, 6, 12)
    model = built(dtype, False)
    exact, plain = (embeddings(built(each, True), batch, layers) for each in (torch.float32, dtype))
    found = embeddings(model, batch, layers)
    for layer in layers[1:]:
        rows = [each.residue[layer][: batch.used] for each in (exact, plain, found)]
        assert relative_l2(rows[2], rows[0]) <= 1.5 * relative_l2(rows[1], rows[0])
    whole = [of_segment(found, batch, i) for i in range(len(tokens))]
    dice = np.random.default_rng(5)
    for rows in (1024, 2048, 4096, 16384, 65536):
        room = rows - int(batch.seqlens.sum())
        others = [[1, *dice.integers(5, 4096, n).tolist(), 2] for n in dice.integers(80, 116, max(room, 0) // 118)]
        mixed = [*others[: len(others) // 2], *tokens, *others[len(others) // 2 :]] if room > 0 else [tokens[4]]
        company = packed(mixed, rows)
        there = embeddings(model, company, layers)
        first = len(others) // 2 if room > 0 else 0
        for i, expected in enumerate(whole if room > 0 else whole[4:5]):
            ours = of_segment(there, company, first + i)
            assert all(torch.equal(values, ours[key]) for key, values in expected.items()), (rows, i)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_validate_passes_on_a_gpu(dtype: str) -> None:
    verdict = validate_model(model="random:dnabert-s", dtype=dtype, reference_device="cuda")
    assert verdict.passed, [check for check in verdict.checks if check.passed is False]
