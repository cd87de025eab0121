"""Every family beside ESM-2 against its authors' class: rows of each layer, letters, checkpoints, names."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import relative_l2
from packs import random_protein
from test_model import CPU, assert_within_gates, embed, expected, packed_model, same_bits, worst
from virnucpro_cli.model import families, locate, weights
from virnucpro_cli.model.kernels import plain
from virnucpro_cli.model.scores import TokenHead
from virnucpro_cli.model.spec import INV_FREQ, ModelSpec
from virnucpro_cli.validation import oracle_of
from virnucpro_cli.validation.validate import validate_model

State = dict[str, torch.Tensor]
ODD = ["MKUBZOXV", "M.K-V", "MK<mask>VLA", "<mask>" * 4, "M", "MKTVRQERLKSIVRILERSK<mask><mask>EP"]
"""Letters that are rare, gaps, masked residues, and one residue."""


def of(family: str, layers: int = 3, hidden: int = 96, heads: int = 4, name: str = "small") -> ModelSpec:
    return ModelSpec(name, layers, hidden, heads, family, families.FAMILIES[family].LONGEST)


def loaded(path: Path) -> tuple[ModelSpec, State, tuple[str, ...]]:
    found = locate.locate(str(path))
    assert found is not None
    return weights.load(found)


def proteins(*lengths: int) -> list[str]:
    generator = random.Random(1)
    return [random_protein(length, generator) for length in lengths]


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
    verdict = validate_model(model=str(dplm_folder(tmp_path / "dplm")[0]), device="cpu", sample=4, max_residues=120)
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
