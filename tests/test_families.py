"""Every family beside ESM-2 against its authors' class: rows of each layer, letters, checkpoints, names."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import relative_l2
from packs import random_protein
from test_model import CPU, assert_within_gates, embed, expected, packed_model, worst
from virnucpro_cli.model import families, locate, weights
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
