"""ESM C against transformers' own class: rows of each layer, logits, letters, checkpoints, and mistakes made on purpose."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import loaded, randomise, relative_l2
from packs import among_strangers, proteins
from sabotage import without_packing
from test_model import CPU, assert_within_gates, embed, expected, packed_model, same_bits, worst
from virnucpro_cli import alphabet, fasta
from virnucpro_cli.cluster.ray import actor
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import attention, esmc, families, plain, weights
from virnucpro_cli.model.esmc import ESMC
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.scores import TokenHead
from virnucpro_cli.model.spec import INV_FREQ, ModelSpec
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import oracle_of, validate, verify
from virnucpro_cli.validation.esmc import Reference
from virnucpro_cli.validation.validate import validate_model

State = dict[str, torch.Tensor]
SMALL = ModelSpec("small", 4, 128, 2, "esmc", inner=384)
ODD = ["MKUBZOXV", "M.K-V", "MK<mask>VLA", "<mask>" * 4, "M", "MKV|LAAGW|M", "|", "MKTVRQERLKSIVR<mask><mask>EP|K"]
"""Letters that are rare, gaps, masked residues, one residue, and chain breaks."""


def transformers_model(seed: int = 0, spec: ModelSpec = SMALL) -> Any:
    """transformers' own masked language model, its norms and biases random too."""
    from transformers import EsmcConfig, EsmcForMaskedLM

    torch.manual_seed(seed)
    config = EsmcConfig(
        hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
        intermediate_size=spec.inner, attn_implementation="eager",
    )  # fmt: skip
    model = EsmcForMaskedLM(config).eval()
    randomise(model)
    return model


def te_state(state: State) -> State:
    """The Transformer Engine style layout of transformers' state."""
    found: State = {}
    for name, tensor in state.items():
        if name.startswith("lm_head."):
            part, kind = name.split(".")[1:]
            found[f"lm_head.{dict(dense=0, layer_norm=2, decoder=3)[part]}.{kind}"] = tensor
    found |= {
        "esmc.embed.weight": state["esmc.embed_tokens.weight"],
        "esmc.transformer.norm.weight": state["esmc.norm.weight"],
    }
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("esmc.layers."))
    for i in range(layers):
        old, new = f"esmc.layers.{i}", f"esmc.transformer.blocks.{i}"
        found[f"{new}.attn.layernorm_qkv.weight"] = torch.cat(
            [state[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv"]
        )
        found[f"{new}.ffn.fc1_weight"] = torch.cat([state[f"{old}.mlp.{x}_proj.weight"] for x in ("gate", "up")])
        found[f"{new}.ffn.fc2_weight"] = state[f"{old}.mlp.down_proj.weight"]
        found[f"{new}.attn.out_proj.weight"] = state[f"{old}.self_attn.o_proj.weight"]
        for kind in ("weight", "bias"):
            found[f"{new}.attn.layernorm_qkv.layer_norm_{kind}"] = state[f"{old}.input_layernorm.{kind}"]
            found[f"{new}.ffn.layer_norm_{kind}"] = state[f"{old}.post_attention_layernorm.{kind}"]
        for x in "qk":
            found[f"{new}.attn.{x}_ln.weight"] = state[f"{old}.self_attn.{x}_norm.weight"]
        found[f"{new}.attn.layernorm_qkv._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    return found


def esm32_state(state: State) -> State:
    """The layout of the package esm 3.2."""
    found: State = {}
    for name, tensor in te_state(state).items():
        if not name.endswith("_extra_state"):
            name = name.removeprefix("esmc.").replace("lm_head.", "sequence_head.")
            name = name.replace("layernorm_qkv.layer_norm_", "layernorm_qkv.0.").replace("ffn.layer_norm_", "ffn.0.")
            name = name.replace("layernorm_qkv.weight", "layernorm_qkv.1.weight")
            found[name.replace("fc1_weight", "1.weight").replace("fc2_weight", "3.weight")] = tensor
    return found


def written(folder: Path, layout: str, model: Any) -> Path:
    """A checkpoint of the model in a layout."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout in ("transformers", "sharded", "encoder"):
        saved = model.esmc if layout == "encoder" else model
        saved.save_pretrained(folder, **{"max_shard_size": "500KB"} if layout == "sharded" else {})
        return folder
    state = {name: each.detach().clone() for name, each in model.state_dict().items()}
    if layout == "engine":
        save_file(te_state(state), folder / "model.safetensors")
        old = {"model_type": "esmc", "d_model": SMALL.hidden, "n_layers": SMALL.layers, "n_heads": SMALL.heads}
        (folder / "config.json").write_text(json.dumps(old))
        return folder
    if layout == "esm 3.2":
        torch.save(esm32_state(state), folder / "esmc.pth")
        return folder / "esmc.pth"
    save_file(esm32_state(state), folder / "lone.safetensors")
    return folder / "lone.safetensors"


LAYOUTS = ["transformers", "sharded", "encoder", "engine", "esm 3.2", "esm 3.2 in safetensors"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("esmc") / "hf", "transformers", transformers_model())


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((4, 960, 15), id="300M"),
        pytest.param((3, 1152, 18), id="600M", marks=pytest.mark.slow),
        pytest.param((2, 2560, 40), id="6B", marks=pytest.mark.slow),
    ],
)
def test_esmc_is_transformers_own_model(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """Layers 0, first, middle and last, with mixed lengths in one pack."""
    spec = ModelSpec("wide", *sizes, "esmc")
    state = weights.random_state(spec, seed=2)
    sequences, layers = [*proteins(3, 130), *ODD], tuple(dict.fromkeys((0, 1, sizes[0] // 2, sizes[0])))
    judge = Reference(spec, state)
    wanted = [expected(judge, sequence, layers) for sequence in sequences]
    assert_within_gates(embed(packed_model(spec, state), sequences, tmp_path, layers), wanted)


def test_a_long_protein_has_transformers_rows(tmp_path: Path) -> None:
    state = weights.random_state(SMALL, seed=2)
    sequences, judge = proteins(1022, 2500), Reference(SMALL, state)
    wanted = [expected(judge, sequence, (1, 2, 4)) for sequence in sequences]
    assert_within_gates(embed(packed_model(SMALL, state), sequences, tmp_path, (1, 2, 4)), wanted)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_protein_of_esmc_has_the_same_bits_in_any_company(threads: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = packed_model(SMALL, weights.random_state(SMALL))
        probes = [*proteins(5, 200, 61, 61, 150), *ODD]
        alone = [embed(model, [probe], tmp_path, (0, 1, 4), rows=1024)[0] for probe in probes]
        for rows in (1024, 2048, 4096):
            sequences, at = among_strangers(probes, rows, random.Random(rows))
            found = embed(model, sequences, tmp_path, (0, 1, 4), rows=rows)
            assert all(same_bits(found[i], one) for i, one in zip(at, alone, strict=True))
        in_parts = embed(model.in_parts(100), probes, tmp_path, (0, 1, 4), rows=1024)
        assert all(map(same_bits, in_parts, alone))
    finally:
        torch.set_num_threads(before)


def test_sixteen_bits_are_as_near_as_transformers_own(tmp_path: Path) -> None:
    """fp16 within 3e-3, and bf16 within 2e-2."""
    state, sequences = weights.random_state(SMALL, seed=2), proteins(60, 300)
    wanted = [expected(Reference(SMALL, state), sequence, (4,)) for sequence in sequences]
    for dtype, limit in ((torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        model = families.build(SMALL, state, dtype, CPU, attention.resolve("sdpa", CPU, dtype))
        assert worst(embed(model, sequences, tmp_path, (4,)), wanted)["residue"] < limit


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_transformers_rows_and_logits(layout: str, tmp_path: Path) -> None:
    model = transformers_model()
    spec, state, notes = loaded(written(tmp_path / "there", layout, model))
    assert (spec.family, spec.layers, spec.hidden, spec.heads, spec.inner) == ("esmc", 4, 128, 2, 384)
    assert notes == ()
    sequence = "MKVLAAGW|M<mask>X"
    with torch.inference_mode():
        found = model(torch.tensor([Reference.encode(sequence)]), output_hidden_states=True)
    (ours,) = embed(packed_model(spec, state), [sequence], tmp_path, (0, 1, 2, 4))
    for layer in (0, 1, 2, 4):
        assert relative_l2(ours["residue", layer], found.hidden_states[layer][0, 1:-1]) < 2e-5
    if layout == "encoder":
        assert not any(name.startswith("lm_head") for name in state)
    else:
        logits = TokenHead(state, CPU)(ours["residue", 4])
        assert logits.shape == (12, 33) and relative_l2(logits, found.logits[0, 1:-1, :33]) < 2e-5


def test_every_layout_gives_the_same_bits(tmp_path: Path) -> None:
    model = transformers_model()
    first, *others = (loaded(written(tmp_path / layout, layout, model))[1] for layout in LAYOUTS if layout != "encoder")
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def test_frequencies_are_exact_whatever_a_file_holds(tmp_path: Path) -> None:
    folder = written(tmp_path / "hf", "transformers", transformers_model())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"esmc.rotary_emb.inv_freq": torch.ones(32)}, folder / "model.safetensors")
    exact = 1 / 10000.0 ** (torch.arange(0, 64, 2).float() / 64)
    found = loaded(folder)[1][INV_FREQ]
    assert torch.equal(found, exact) and not torch.equal(found, found.half().float())


def test_sizes_are_of_the_files_and_never_of_the_name(tmp_path: Path) -> None:
    """A directory called as the 6B that holds other sizes."""
    spec, _, _ = loaded(written(tmp_path / "ESMC-6B", "esm 3.2", transformers_model()).rename(tmp_path / "ESMC-6B.pth"))
    assert (spec.layers, spec.hidden, spec.heads, spec.inner) == (4, 128, 2, 384)


@pytest.mark.parametrize(
    ("name", "full", "sizes"),
    [("esmc-300m", "ESMC-300M", (30, 960, 15, 2560)), ("ESMC_600M", "ESMC-600M", (36, 1152, 18, 3072)),
     ("biohub/ESMC-6B", "ESMC-6B", (80, 2560, 40, 6912))],
)  # fmt: skip
def test_the_names_of_esmc_lead_to_their_sizes_and_repository(name: str, full: str, sizes: tuple[int, ...]) -> None:
    spec = families.by_name(name)
    assert spec is not None and spec.name == full
    assert (spec.layers, spec.hidden, spec.heads, spec.inner) == sizes
    assert esmc.inner_of(spec) == esmc.inner_of(ModelSpec("no inner width", *sizes[:3], "esmc"))
    assert ESMC.repository(spec) == f"biohub/{full}" and ESMC.url(spec) is None


@pytest.mark.parametrize(("size", "parameters"), [("esmc-300m", 333e6), ("esmc-600m", 575e6), ("esmc-6b", 6.35e9)])
def test_parameters_and_operations_are_of_this_network(size: str, parameters: float) -> None:
    """Published numbers of parameters include the token head."""
    spec = families.by_name(size)
    assert spec is not None
    head = sum(int(np.prod(shape)) for shape in ESMC.head_shapes(spec)["lm_head"].values())
    assert families.parameters(spec) + head == pytest.approx(parameters, rel=3e-3)
    f = esmc.inner_of(spec)
    assert families.flops(spec, 10, 0, 2) == 2 * 10 * 2 * (4 * spec.hidden**2 + 3 * spec.hidden * f)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        loaded(path)
    return f"{error.value.what} {error.value.remedy or ''}"


def test_the_permuted_vocabulary_of_multimolecule_is_refused_by_name(tmp_path: Path) -> None:
    """By its config.json, and by its tensors."""
    tensors = {
        "model.embeddings.word_embeddings.weight": torch.zeros(37, 8),
        "model.encoder.layer.0.attention.self.query_layer_norm.weight": torch.ones(8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert "ESM C of multimolecule" in refused(tmp_path / "model.safetensors")
    config = {"model_type": "esmc", "architectures": ["EsmCForPreTraining"], "vocab_size": 37, "hidden_act": "swiglu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "ESM C of multimolecule" in refused(tmp_path)


@pytest.mark.parametrize(
    ("word", "value"),
    [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("vocab_size", 33), ("mask_token_id", 4),
     ("rope_parameters", {"rope_theta": 500000.0, "rope_type": "default"})],
)  # fmt: skip
def test_a_configuration_of_another_network_is_refused(word: str, value: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "hf", "transformers", transformers_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {word: value}))
    assert f"is not ESM C: {word}" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda tensors: tensors.pop("esmc.layers.1.self_attn.q_norm.weight"), "lacks 1 tensors"),
     (lambda tensors: tensors.update({"esmc.layers.1.self_attn.q_norm.weight": torch.ones(64)}), "has shape"),
     (lambda tensors: tensors.update({"esmc.layers.1.self_attn.q_proj.bias": torch.ones(128)}), "does not have"),
     (lambda tensors: tensors.update({"esmc.geom_embed.weight": torch.ones(128)}), "does not have")],
    ids=["missing", "norm of one head", "a bias", "ESM3"],
)  # fmt: skip
def test_tensors_that_are_not_esmcs_are_refused(change: Callable[[State], Any], message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "hf", "transformers", transformers_model())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert message in refused(folder)


# --- letters ---------------------------------------------------------------------------------------------------------


def test_letters_are_those_of_transformers_tokenizer() -> None:
    from transformers import EsmcTokenizer

    tokenizer = EsmcTokenizer()
    for text in (*ODD, "ACDEFGHIKLMNPQRSTVWY"):
        ids = tokenizer(text)["input_ids"]
        assert Reference.encode(text) == ids
        ours = alphabet.token_ids(text.encode(), len(ids) - 2, alphabet.letters("keep", ESMC.READING))
        assert list(ours) == ids[1:-1]


def test_a_chain_break_is_a_letter_of_esmc_and_x_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMK|VL\n>b\nMKXVL\n")
    sources = fasta.open_sources([str(tmp_path / "in.fasta")], tmp_path)
    own, others = fasta.index(sources, reading=ESMC.READING), fasta.index(sources)
    assert own.tokens(np.array([0])).tolist() == [20, 15, 31, 7, 4] and own.replaced.tolist() == [0, 0]
    assert others.tokens(np.array([0])).tolist() == [20, 15, 24, 7, 4] and others.replaced.tolist() == [1, 0]
    assert own.unique_of.tolist() == [0, 1] and others.unique_of.tolist() == [0, 0]
    fasta.index(sources, reading=ESMC.READING, on_invalid="error")
    with pytest.raises(UserError, match="is not a residue"):
        fasta.index(sources, on_invalid="error")


def test_a_file_of_esmc_has_transformers_rows_and_scores_and_is_verified(tmp_path: Path) -> None:
    """Masks and chain breaks go through index, collation, workers' format, storage, verify and an audit."""
    model = transformers_model()
    folder = written(tmp_path / "hf", "transformers", model)
    sequences = ["MKV|LAAGW", "MK<mask>VLA", "M", *proteins(80)]
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    same: dict[str, Any] = {"model": str(folder), "device": "cpu", "store_dtype": "fp32"}
    embed_fasta(
        path, tmp_path / "out.h5", pool=("mean", "residue"), layers=(0, 2, 4),
        emit=("logits", "entropy", "pseudo-perplexity"), **same,
    )  # fmt: skip
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.attributes["family"] == "esmc" and file.replaced.tolist() == [0, 0, 0, 0]
        for row, sequence in enumerate(sequences):
            ids = torch.tensor([Reference.encode(sequence)])
            with torch.inference_mode():
                found = model(ids, output_hidden_states=True)
            for layer in (0, 2, 4):
                assert relative_l2(file.residues(row, layer), found.hidden_states[layer][0, 1:-1]) < 2e-5
            logits = found.logits[0, 1:-1, :33]
            assert relative_l2(file.logits(row), logits) < 2e-5
            own = logits.double().log_softmax(-1).gather(1, ids[0, 1:-1, None])
            perplexity = file.dataset("unmasked", "pseudo_perplexity")[row]
            assert perplexity == pytest.approx(float(torch.exp(-own.mean())), rel=1e-4)
    assert verify.verify_file(str(tmp_path / "out.h5"), (str(path),), None).passed
    verdict = validate_model(against=str(tmp_path / "out.h5"), reference_device="cpu")
    assert verdict.passed, verdict.failed_parts


def test_texts_of_a_share_say_how_their_family_reads(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMK<mask>VL\n")
    table = fasta.index(fasta.open_sources([str(tmp_path / "in.fasta")], tmp_path), reading=ESMC.READING)
    share: Any = actor.Share(*[None] * (len(actor.Share._fields) - 1), table.reading)
    texts = actor.Texts(share._replace(sizes=table.length, tokens=table.tokens(np.array([0]))))
    assert not texts.reading.scales_masks and table.part(np.array([0])).reading == ESMC.READING


# --- what is refused -------------------------------------------------------------------------------------------------


def test_contacts_and_fp8_are_refused_in_a_sentence(small: Path, tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKVL\n")
    with pytest.raises(UserError, match="has no contact regression"):
        embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(small), device="cpu", emit=("contacts",))
    backend = attention.resolve("sdpa", CPU, torch.float32)
    with pytest.raises(UserError, match="is not computed in fp8: there are no scales for ESM C yet"):
        families.build(SMALL, weights.random_state(SMALL), torch.float8_e4m3fn, CPU, backend)


# --- mistakes --------------------------------------------------------------------------------------------------------


def norms_per_head(patch: pytest.MonkeyPatch) -> None:
    norm = plain.layer_norm

    def each(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None:
            return norm(x, weight, bias)
        heads = x.unflatten(-1, (-1, 64))
        return (norm(heads, torch.ones(64)).flatten(-2)) * weight

    patch.setattr(plain, "layer_norm", each)


def no_norm_weights(patch: pytest.MonkeyPatch) -> None:
    norm = plain.layer_norm
    patch.setattr(plain, "layer_norm", lambda x, weight, bias=None: norm(x, torch.ones_like(weight) if bias is None else weight, bias))  # fmt: skip


def no_divisor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(esmc, "math", SimpleNamespace(sqrt=lambda x: 1.0))


def halves_swapped(patch: pytest.MonkeyPatch) -> None:
    def swapped(x: torch.Tensor) -> torch.Tensor:
        up, gate = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    patch.setattr(plain, "swiglu", swapped)


def adjacent_pairs(patch: pytest.MonkeyPatch) -> None:
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    patch.setattr(plain, "rotate", rotate)


def frequencies_in_fp16(patch: pytest.MonkeyPatch) -> None:
    settle = ESMC.settle

    def rounded(state: State, spec: ModelSpec) -> list[str]:
        notes = settle(state, spec)
        state[INV_FREQ] = state[INV_FREQ].half().float()
        return notes

    patch.setattr(ESMC, "settle", rounded)


def masks_scaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ESMC, "READING", ESMC.READING._replace(scales_masks=True))


def mask_row_zeroed(patch: pytest.MonkeyPatch) -> None:
    init = PackedModel.__init__

    def zeroed(model: PackedModel, *args: Any) -> None:
        init(model, *args)
        model.embedding[alphabet.MASK] = 0

    patch.setattr(PackedModel, "__init__", zeroed)


def chain_break_as_x(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ESMC, "READING", ESMC.READING._replace(letters=alphabet.ESM.letters))


MISTAKES = {
    "q/k norm per head": norms_per_head, "q/k norm without weights": no_norm_weights, "no divisor": no_divisor,
    "SwiGLU halves swapped": halves_swapped, "rotary on adjacent pairs": adjacent_pairs,
    "inv_freq in fp16": frequencies_in_fp16, "masks scaled": masks_scaled, "<mask> zeroed": mask_row_zeroed,
    "| read as X": chain_break_as_x,
}  # fmt: skip


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_validate_passes_an_honest_run_of_esmc_and_fails_every_mistake(
    mistake: str | None, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, lengths = tmp_path / "in.fasta", (40, 150, 250, 90) if mistake is None else (90,)
    path.write_text("".join(f">{i}\n{each}\n" for i, each in enumerate([*proteins(*lengths), *ODD[:6]])))
    if mistake is not None:
        MISTAKES[mistake](monkeypatch)
        without_packing(monkeypatch)
    verdict = validate_model(model=str(small), fasta=str(path), device="cpu", token_budget=1024)
    assert verdict.environment["reference"].startswith("transformers ")
    failed = {part.split(":")[0] for part in verdict.failed_parts}
    assert failed == set() if mistake is None else "Semantics" in failed


def test_validate_passes_esmc_in_fp16_and_its_bits_are_those_of_any_company(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{i}\n{each}\n" for i, each in enumerate([*proteins(40, 190), *ODD[-2:]])))
    verdict = validate_model(model=str(small), fasta=str(path), device="cpu", dtype="fp16", token_budget=1024)
    assert verdict.passed, verdict.failed_parts
    packing = [check for check in verdict.checks if check.part.startswith("Packing") and check.limit]
    assert len(packing) == 6 and all(check.limit == "bitwise" and check.worst == 0 for check in packing)


def test_the_oracle_takes_nothing_but_weights_from_the_state() -> None:
    """Frequencies in the state would hide a mistake in them."""
    state = weights.random_state(SMALL)
    changed = state | {INV_FREQ: state[INV_FREQ] * 0.5}
    one, other = (Reference(SMALL, each).embed("MKVLAAGW", (4,))[4] for each in (state, changed))
    assert torch.equal(one, other) and oracle_of(SMALL) is Reference
    assert validate.plain_reader.clean(b"mk|v", letters=Reference.letters) == ("MK|V", 4, 0)
