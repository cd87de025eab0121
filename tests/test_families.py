"""Every family beside ESM-2 against its authors' class: rows of each layer, letters, checkpoints, names."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conftest import loaded, read_fasta, relative_l2, write_model
from packs import embeddings, one_pack, proteins
from test_model import CPU, assert_within_gates, embed, expected, packed_model, same_bits, worst
from virnucpro_cli import validation
from virnucpro_cli.benchmark.bench import bench_model
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.embed import run as embed_run
from virnucpro_cli.errors import UserError
from virnucpro_cli.exchange.extract import extract_files
from virnucpro_cli.explore import inspect
from virnucpro_cli.machine import fetch
from virnucpro_cli.model import esm1, families, locate, plain, weights
from virnucpro_cli.model.packed import Parts
from virnucpro_cli.model.scores import TokenHead
from virnucpro_cli.model.spec import INV_FREQ, ModelSpec
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import oracle_of
from virnucpro_cli.validation.validate import validate_model

State = dict[str, torch.Tensor]
ODD = ["MKUBZOXV", "M.K-V", "MK<mask>VLA", "<mask>" * 4, "M", "MKTVRQERLKSIVRILERSK<mask><mask>EP"]
"""Letters that are rare, gaps, masked residues, and one residue."""


def of(family: str, layers: int = 3, hidden: int = 96, heads: int = 4, name: str = "small") -> ModelSpec:
    return ModelSpec(name, layers, hidden, heads, family, families.TABLE[family].longest)


@pytest.mark.parametrize("key", families.TABLE)
def test_a_row_of_the_table_is_of_the_family_that_its_file_defines(key: str) -> None:
    row, family = families.TABLE[key], families.FAMILIES[key]
    assert {(spec.family, spec.longest) for spec in row.models.values()} == {(key, row.longest)}
    assert all(families.family_of(spec) is family for spec in row.models.values())
    assert set(row.aliases.values()) <= set(row.models) and set(row.sha256) <= {*families.SIZES}
    assert not row.config.keys() & family.CONFIG.keys()


# --- DPLM ----------------------------------------------------------------------------------------------------------


def test_dplm_is_transformers_own_model_with_the_files_frequencies(tmp_path: Path) -> None:
    """Frequencies that are neither exact nor those of ESM-2 are the file's."""
    spec = of("dplm", 4, 640, 20)
    state = weights.random_state(spec, seed=2)
    state[INV_FREQ] = state[INV_FREQ] * 0.97
    sequences, layers = [*proteins(3, 64, 300), *ODD], (0, 1, 2, 4)
    reference = oracle_of(spec)(spec, state)
    wanted = [expected(reference, sequence, layers) for sequence in sequences]
    found = embed(packed_model(spec, state), sequences, tmp_path, layers)
    assert_within_gates(found, wanted)
    state[INV_FREQ] = state[INV_FREQ] / 0.97
    assert worst(embed(packed_model(spec, state), sequences, tmp_path, layers), wanted)["mean"] > 1e-5


def dplm_folder(folder: Path, **changed: Any) -> tuple[Path, Any]:
    """A directory as transformers writes it for the authors' class."""
    from transformers import EsmConfig, EsmForMaskedLM

    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, position_embedding_type="rotary", token_dropout=True, layer_norm_eps=1e-5,
        emb_layer_norm_before=False, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = EsmForMaskedLM(config).eval()
    model.save_pretrained(folder, **changed)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["EsmForDPLM"]}))
    return folder, model


@pytest.mark.parametrize("changed", [{}, {"max_shard_size": "100KB"}], ids=["whole", "sharded"])
def test_a_dplm_directory_loads_with_its_head_and_gives_transformers_rows(
    changed: dict[str, str], tmp_path: Path
) -> None:
    folder, model = dplm_folder(tmp_path / "dplm", **changed)
    spec, state, _ = loaded(folder)
    assert (spec.family, spec.layers, spec.hidden, spec.heads) == ("dplm", 2, 64, 4)
    ids = oracle_of(spec).encode("MKVLAAGW")
    with torch.inference_mode():
        found = model(torch.tensor([ids]), torch.ones(1, len(ids)), output_hidden_states=True)
    (ours,) = embed(packed_model(spec, state), ["MKVLAAGW"], tmp_path, (0, 1, 2))
    for layer in (0, 1, 2):
        assert relative_l2(ours["residue", layer], found.hidden_states[layer][0, 1:-1]) < 2e-5
    logits = TokenHead(state, CPU)(ours["residue", 2])
    assert relative_l2(logits, found.logits[0, 1:-1]) < 2e-5
    assert "lm_head.decoder.weight" in state


def test_dplm_is_validated_against_transformers(tmp_path: Path) -> None:
    verdict = validate_model(
        model=str(dplm_folder(tmp_path / "dplm")[0]), device="cpu", sample=4, max_residues=120, token_budget=1024
    )
    assert verdict.passed, verdict.failed_parts
    assert verdict.environment["reference"].startswith("transformers ")


@pytest.mark.parametrize(
    ("name", "full", "sizes"),
    [("dplm-150m", "dplm_150m", (30, 640, 20)), ("DPLM-650M", "dplm_650m", (33, 1280, 20)),
     ("airkingbd/dplm_3b", "dplm_3b", (36, 2560, 40))],
)  # fmt: skip
def test_the_names_of_dplm_lead_to_their_sizes_and_repository(name: str, full: str, sizes: tuple[int, ...]) -> None:
    spec = families.by_name(name)
    assert spec is not None and spec.name == full and (spec.layers, spec.hidden, spec.heads) == sizes
    family = families.family_of(spec)
    assert family.repository(spec) == f"airkingbd/{full}" and family.url(spec) is None


# --- ESM-1b and ESM-1v -----------------------------------------------------------------------------------------------

ESM1 = pytest.mark.parametrize("family", ["esm1b", "esm1v"])


@ESM1
def test_esm1_is_fair_esms_own_model_up_to_its_longest_protein(family: str, tmp_path: Path) -> None:
    spec = of(family, 4, 320, 5)
    state = weights.random_state(spec, seed=2)
    sequences, layers = [*proteins(3, 64, 300, 1022), *ODD], (0, 1, 2, 4)
    reference = oracle_of(spec)(spec, state)
    wanted = [expected(reference, sequence, layers) for sequence in sequences]
    assert_within_gates(embed(packed_model(spec, state), sequences, tmp_path, layers), wanted)
    assert ("emb_layer_norm_before.weight" in state) == (family == "esm1b")


@ESM1
def test_the_rotation_of_esm1_is_an_exact_identity(family: str) -> None:
    spec = of(family)
    model = packed_model(spec, weights.random_state(spec))
    model.reserve_positions(1024)
    rotary = model.backend.steps.rotary(model.cos, model.sin, torch.arange(1024, dtype=torch.int32))
    q = torch.randn(1024, 4, 24, dtype=torch.float16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(plain.rotate(q.to(dtype)[:, None], *rotary)[:, 0], q.to(dtype))


@pytest.mark.parametrize("mistake", ["positions off by one", "no first LayerNorm", "no scale", "LayerNorm of layer 1"])
def test_the_gates_catch_each_mistake_of_esm1(mistake: str, tmp_path: Path) -> None:
    spec = of("esm1b")
    state = weights.random_state(spec)
    sequences = [*proteins(5, 64), "MK<mask>VLA"]
    wanted = [expected(oracle_of(spec)(spec, state), sequence, (0, 1, 3)) for sequence in sequences]
    model = packed_model(spec, state)
    assert_within_gates(embed(model, sequences, tmp_path, (0, 1, 3)), wanted)
    assert model.positions is not None and model.first_norm is not None
    if mistake == "positions off by one":
        model.positions = model.positions.roll(1, 0)
    elif mistake == "no first LayerNorm":
        model.first_norm = None
    elif mistake == "no scale":
        model.embedding = model.embedding / 0.88
    else:
        model.first_norm = model.layers[0].norm1
    assert worst(embed(model, sequences, tmp_path, (0, 1, 3)), wanted)["mean"] > 1e-5


@ESM1
def test_a_protein_of_esm1_has_the_same_bits_in_any_company(family: str, tmp_path: Path) -> None:
    spec = of(family, 2, 64, 4)
    model = packed_model(spec, weights.random_state(spec))
    sequences = proteins(5, 200, 61, 61, 150)
    together = embed(model, sequences, tmp_path, (0, 2), rows=1024)
    for i, sequence in enumerate(sequences):
        assert same_bits(together[i], embed(model, [sequence], tmp_path, (0, 2), rows=1024)[0])


def fair_esm_1(family: str, path: Path, seed: int = 0) -> Any:
    """fair-esm's own model with random weights, saved in the layout of the published .pt files."""
    from esm.model.esm1 import ProteinBertModel

    from virnucpro_cli.validation.fair_esm import ALPHABET

    sizes = {"layers": 2, "embed_dim": 64, "ffn_embed_dim": 256, "attention_heads": 4}
    args = argparse.Namespace(**{f"encoder_{name}": size for name, size in sizes.items()})
    args.arch, args.max_positions, args.token_dropout = "roberta_large", 1024, True
    torch.manual_seed(seed)
    inner = argparse.Namespace(**sizes, **vars(args), emb_layer_norm_before=family == "esm1b")
    model = ProteinBertModel(inner, ALPHABET).eval()
    tensors = {
        f"encoder.{'' if name.startswith('lm_head') else 'sentence_encoder.'}{name}": each.clone()
        for name, each in model.state_dict().items()
        if not name.startswith("contact_head")
    }
    torch.save({"args": args, "model": tensors}, path)
    with torch.no_grad():
        model.embed_tokens.weight[ALPHABET.mask_idx].zero_()  # as fair-esm does when it loads
    return model


@ESM1
def test_a_fair_esm_file_of_esm1_gives_the_rows_and_logits_of_fair_esm(family: str, tmp_path: Path) -> None:
    model = fair_esm_1(family, tmp_path / "model.pt")
    spec, state, notes = loaded(tmp_path / "model.pt")
    assert (spec.family, spec.layers, spec.heads, spec.longest, notes) == (family, 2, 4, 1022, ())
    ids = oracle_of(spec).encode("MKVLAAGW")
    with torch.inference_mode():
        found = model(torch.tensor([ids]), repr_layers=[0, 1, 2])
    (ours,) = embed(packed_model(spec, state), ["MKVLAAGW"], tmp_path, (0, 1, 2))
    for layer in (0, 1, 2):
        assert relative_l2(ours["residue", layer], found["representations"][layer][0, 1:-1]) < 2e-5
    assert relative_l2(TokenHead(state, CPU)(ours["residue", 2]), found["logits"][0, 1:-1]) < 2e-5


def transformers_1(folder: Path, family: str, **options: Any) -> Any:
    from transformers import EsmConfig, EsmForMaskedLM

    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, position_embedding_type="absolute", max_position_embeddings=1026, token_dropout=True,
        layer_norm_eps=1e-5, emb_layer_norm_before=family == "esm1b",
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = EsmForMaskedLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(tensor.half().float() if "norm" in name.lower() else (torch.randn_like(tensor) / 8).half())
    half = options.pop("half", False)
    (model.half() if half else model).save_pretrained(folder, **options)
    return model.float()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}, {"half": True}], ids=["whole", "shards", "fp16"])
@ESM1
def test_what_transformers_writes_of_esm1_gives_its_rows(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = transformers_1(tmp_path / "hf", family, **options)
    spec, state, _ = loaded(tmp_path / "hf")
    assert (spec.family, spec.layers, spec.heads, spec.longest) == (family, 2, 4, 1022)
    ids = oracle_of(spec).encode("MKVLAAGW")
    with torch.inference_mode():
        found = model(torch.tensor([ids]), torch.ones(1, len(ids)), output_hidden_states=True).hidden_states
    (ours,) = embed(packed_model(spec, state), ["MKVLAAGW"], tmp_path, (0, 1, 2))
    for layer in (0, 1, 2):
        assert relative_l2(ours["residue", layer], found[layer][0, 1:-1]) < 2e-5
    assert "lm_head.bias" in state and ("contact_head.regression.weight" in state) == (family == "esm1b")


# --- longest protein -------------------------------------------------------------------------------------------------


@pytest.fixture
def esm1b(tmp_path: Path) -> Path:
    fair_esm_1("esm1b", tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_longer_proteins_of_esm1b_go_by_windows_and_the_first_screen_says_so(
    esm1b: Path, make_fasta: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta, options = make_fasta([30, 1022, 1500]), {"model": str(esm1b), "device": "cpu", "store_dtype": "fp32"}
    config = resolve(EmbedConfig, None, {"inputs": (str(fasta),), "output": str(tmp_path / "out.h5"), **options})
    embed_run(config)
    assert "1 of 3 proteins embedded by windows of 1,022 residues" in " ".join(capsys.readouterr().err.split())
    embed_fasta(fasta, tmp_path / "named.h5", long="window", **options)
    embed_fasta(fasta, tmp_path / "cut.h5", long="truncate", **options)
    with (
        read_embeddings(tmp_path / "out.h5") as one,
        read_embeddings(tmp_path / "named.h5") as other,
        read_embeddings(tmp_path / "cut.h5") as cut,
    ):
        assert one.settings == other.settings and one.settings["long"] == "window"
        assert (one.dataset("mean", 2)[:] == other.dataset("mean", 2)[:]).all()
        assert (one.dataset("mean", 2)[:2] == cut.dataset("mean", 2)[:2]).all()
        assert (one.dataset("mean", 2)[2] != cut.dataset("mean", 2)[2]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_residues": 1023}, "takes at most 1,022 residues, and --max-residues is 1,023"),
     ({"long": "full"}, "takes at most 1,022 residues, so not --long full"),
     ({"emit": ("entropy",)}, "Say --long truncate"), ({"pool": ("max",)}, "Say --long truncate")],
)  # fmt: skip
def test_what_esm1b_cannot_do_is_refused_in_one_sentence(
    options: dict[str, Any], words: str, esm1b: Path, make_fasta: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        embed_fasta(make_fasta([30]), tmp_path / "out.h5", model=str(esm1b), device="cpu", **options)


def test_validate_and_bench_refuse_what_is_longer_than_esm1b_takes(esm1b: Path, tmp_path: Path) -> None:
    for workflow in (validate_model, bench_model):
        with pytest.raises(UserError, match="at most 1,022"):
            workflow(model=str(esm1b), device="cpu", max_residues=1500)


@ESM1
def test_esm1_is_validated_against_fair_esm(family: str, tmp_path: Path) -> None:
    fair_esm_1(family, tmp_path / "model.pt")
    verdict = validate_model(model=str(tmp_path / "model.pt"), device="cpu", sample=12, token_budget=1024)
    assert verdict.passed, verdict.failed_parts


@pytest.mark.parametrize("mistake", ["positions", "norm"])
def test_validate_fails_if_positions_are_off_by_one_or_the_first_norm_is_left_out(
    mistake: str, esm1b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = esm1.Esm1.parts

    def wrong(family: esm1.Esm1, spec: ModelSpec, state: State, device: torch.device) -> Parts:
        parts = make(family, spec, state, device)
        assert parts.positions is not None
        return (
            parts._replace(first_norm=None)
            if mistake == "norm"
            else parts._replace(positions=parts.positions.roll(-1, 0))
        )

    monkeypatch.setattr(esm1.Esm1, "parts", wrong)
    verdict = validate_model(model=str(esm1b), device="cpu", sample=4, max_residues=100, token_budget=1024)
    assert any(part.startswith("Semantics") for part in verdict.failed_parts)


# --- contacts and scores ---------------------------------------------------------------------------------------------


def test_contacts_of_esm1b_are_fair_esms_and_esm1v_has_none(make_fasta: Callable[..., Path], tmp_path: Path) -> None:
    fasta, layouts = make_fasta([40]), {}
    ((_, sequence),) = read_fasta(fasta)
    for family in ("esm1b", "esm1v"):
        layouts[family] = fair_esm_1(family, tmp_path / f"{family}.pt")
        head = {f"contact_head.{name}": each for name, each in layouts[family].contact_head.state_dict().items()}
        torch.save({"model": head}, tmp_path / f"{family}-contact-regression.pt")
    options: dict[str, Any] = {"device": "cpu", "emit": ("contacts",), "long": "truncate", "store_dtype": "fp32"}
    embed_fasta(fasta, tmp_path / "out.h5", model=str(tmp_path / "esm1b.pt"), **options)
    ids = torch.tensor([oracle_of(of("esm1b")).encode(sequence)])
    with torch.inference_mode():
        wanted = layouts["esm1b"](ids, return_contacts=True)["contacts"][0]
    with read_embeddings(tmp_path / "out.h5") as file:
        assert relative_l2(file.contacts(0), wanted) < 1e-5
    with pytest.raises(UserError, match="has no contact regression"):
        embed_fasta(fasta, tmp_path / "none.h5", model=str(tmp_path / "esm1v.pt"), **options)


# --- refusals and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("encoder.sentence_encoder.layers.0.row_self_attention.layer.k_proj.weight", "is an MSA Transformer"),
     ("decoder.layers.0.self_attn.bias_k", "is an ESM-1"),
     ("encoder.sentence_encoder.layers.0.self_attn.rot_emb.inv_freq", "not an ESM-1b|ESM-2 does not have: .*positions")],
)  # fmt: skip
def test_a_file_of_another_family_is_refused_by_name(name: str, words: str, esm1b: Path, tmp_path: Path) -> None:
    content = torch.load(esm1b, weights_only=False)
    content["model"][name] = torch.ones(8)
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=words):
        loaded(tmp_path / "other.pt")


def test_an_esm2_whose_configuration_is_that_of_esm1b_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for first_norm, title in ((True, "ESM-1b"), (False, "ESM-1v")):
        changed = {**config, "position_embedding_type": "absolute", "emb_layer_norm_before": first_norm}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"is not {title}: it has rotary frequencies"):
            loaded(folder)


@pytest.mark.parametrize(("said", "written"), [(True, "esm1v"), (False, "esm1b")])
def test_a_first_norm_that_contradicts_the_configuration_is_refused(said: bool, written: str, tmp_path: Path) -> None:
    transformers_1(tmp_path / "hf", written)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "emb_layer_norm_before": said}))
    with pytest.raises(UserError, match="emb_layer_norm_before"):
        loaded(tmp_path / "hf")


def test_a_fair_esm_file_without_token_dropout_is_refused(esm1b: Path) -> None:
    content = torch.load(esm1b, weights_only=False)
    content["args"].token_dropout = False
    torch.save(content, esm1b)
    with pytest.raises(UserError, match="without token dropout"):
        loaded(esm1b)


def test_the_names_of_esm1_lead_to_their_models() -> None:
    names = {"esm1b": "esm1b_t33_650M_UR50S", "ESM-1b": "esm1b_t33_650M_UR50S", "esm1v-3": "esm1v_t33_650M_UR90S_3",
             "facebook/esm1v_t33_650M_UR90S_5": "esm1v_t33_650M_UR90S_5"}  # fmt: skip
    for name, full in names.items():
        spec = families.by_name(name)
        assert spec is not None and spec.name == full and spec.longest == 1022
        assert families.family_of(spec).repository(spec) == f"facebook/{full}"
        assert str(families.family_of(spec).url(spec)).endswith(f"/{full}.pt")
    assert families.by_name("esm1v-6") is None and families.by_name("esm1v") is None


def test_the_methods_sentence_names_the_family(esm1b: Path, make_fasta: Callable[..., Path], tmp_path: Path) -> None:
    embed_fasta(make_fasta([30]), tmp_path / "out.h5", model=str(esm1b), device="cpu")
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.attributes["family"] == "esm1b"
        words = inspect._model(file)
    assert words.startswith("ESM-1b ") and "ESM-2" not in words


# --- the fused kernels -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@ESM1
def test_the_fused_steps_of_esm1_are_the_plain_ones_and_turn_nothing(family: str, tmp_path: Path) -> None:
    """Interpreted where there is no GPU. Zeros among inv_freq make q and k those of the product, bit for bit."""
    pytest.importorskip("triton")
    from virnucpro_cli.model.attention import Backend, sdpa, triton
    from virnucpro_cli.model.kernels import fused

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = of(family, 1, 128, 2)
    state = weights.random_state(spec, seed=4)
    batch = one_pack(tmp_path, ["MKVLAAGW", "MK<mask>VLA", *proteins(40)], 128)
    rows = {}
    for name, dtype, backend in (
        ("exact", torch.float32, Backend("sdpa", sdpa.attention, plain)),
        ("plain", torch.float16, Backend("sdpa", sdpa.attention, plain)),
        ("fused", torch.float16, Backend("triton", triton.attention, fused)),
    ):
        model = families.build(spec, state, dtype, device, backend)
        rows[name] = embeddings(model, batch, (0, 1)).residue
    for layer in (0, 1):
        exact = rows["exact"][layer][: batch.used]
        floor = relative_l2(rows["plain"][layer][: batch.used], exact)
        assert relative_l2(rows["fused"][layer][: batch.used], exact) <= 1.5 * floor
    x = torch.randn(64, spec.hidden, device=device).half()
    positions = torch.arange(64, dtype=torch.int32, device=device)
    model.reserve_positions(64)
    still = fused.query_key_value(x, model.layers[0], fused.rotary(model.cos, model.sin, positions))
    first = fused.query_key_value(x, model.layers[0], fused.rotary(model.cos, model.sin, positions * 0))
    assert all(torch.equal(a, b) for a, b in zip(still, first, strict=True))


# --- other commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dplm-150m", "dplm-650m", "dplm-3b", "esm1b", *(f"esm1v-{n}" for n in range(1, 6))])
def test_fetch_lists_every_model_by_name(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    spec = families.by_name(name)
    assert spec is not None and locate.locate(name) is None
    fetch.show()
    assert f"{spec.name} " in capsys.readouterr().out
    found = locate.locate(f"random:{name}")
    assert found is not None and found.spec == spec


def test_extract_writes_the_rows_of_esm1b_cut_as_fair_esm_does(
    esm1b: Path, make_fasta: Callable[..., Path], tmp_path: Path
) -> None:
    fasta = make_fasta([30, 1100])
    extract_files(str(esm1b), str(fasta), str(tmp_path / "out"), ["mean"], gpu=False)
    spec, state, _ = loaded(esm1b)
    for name, sequence in read_fasta(fasta):
        content = torch.load(tmp_path / "out" / f"{name}.pt")
        wanted = oracle_of(spec)(spec, state).embed(sequence[:1022], (2,))[2][1:-1].double().mean(0)
        assert relative_l2(content["mean_representations"][2], wanted) < 1e-5


@pytest.mark.slow
def test_bench_times_esm1b_without_peers(esm1b: Path) -> None:
    report = bench_model(model=str(esm1b), device="cpu", seconds=1, packed=True, peers=("fair-esm",))
    assert any("no peers are timed" in note for note in report.notes)


@pytest.mark.parametrize("model", ["dplm", "esm1b", "esm1v"])
def test_an_oracle_whose_package_is_missing_says_how_to_get_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"dplm": "transformers"}.get(model, "esm")
    for name in [name for name in sys.modules if name.startswith("virnucpro_cli.validation.") and "esm" in name]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="is not installed") as caught:
        oracle_of(of(model))
    assert "virnucpro[test]" in caught.value.remedy


RELEASES = {
    "4.48.0": False, "4.55.4": False, "4.56.0": True, "4.57.6": True, "5.0.0rc1": True, "5.2.0": True, "5.3.0": False,
    "5.24.0": False, "10.0": False,
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_of_transformers_that_scales_masks_wrongly_is_no_judge(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases 4.56.0 to 5.2.0 divide by the padded length of a batch."""
    monkeypatch.setattr(validation, "version", lambda package: release if package == "transformers" else "1")
    if not RELEASES[release]:
        assert oracle_of(of("dplm")).package == "transformers"
        return
    with pytest.raises(UserError, match=rf"transformers {release} scales padded proteins") as caught:
        validate_model(model=str(dplm_folder(tmp_path / "dplm")[0]), device="cpu")
    assert "virnucpro[test]" in caught.value.remedy
    assert oracle_of(of("esm1b")).package == "fair-esm"


def test_a_release_without_the_class_of_the_oracle_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "virnucpro_cli.validation.esmc", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    with pytest.raises(UserError, match="transformers is too old"):
        oracle_of(ModelSpec("any", 2, 64, 1, "esmc"))
