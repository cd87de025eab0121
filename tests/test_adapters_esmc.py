"""Adapters of ESM C: merged weights are those of PEFT's own merge, on transformers' names and on joint matrices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import relative_l2
from test_adapters import edited, loaded, trained
from test_esmc import SMALL, esm32_state, te_state, transformers_model, written
from virnucpro_cli import embed_fasta, read_embeddings
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.esmc import ESMC
from virnucpro_cli.validation.esmc import Reference
from virnucpro_cli.validation.validate import validate_model

State = dict[str, torch.Tensor]
QKV = ["q_proj", "k_proj", "v_proj"]
SEQUENCE = "MKV|LAARNDCEQGHILKMFPSTWYV"


def model_of(kind: str) -> Any:
    """A class of transformers with the weights of `transformers_model`, a head of its own left as it is made."""
    import transformers

    whole = transformers_model()
    if kind == "EsmcForMaskedLM":
        return whole
    if kind == "EsmcModel":
        return whole.esmc
    torch.manual_seed(0)
    model = getattr(transformers, kind)(whole.config).eval()
    backbone = model.esmc if hasattr(model, "esmc") else model.model
    backbone.load_state_dict(whole.esmc.state_dict())
    return model


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("EsmcModel", {"target_modules": QKV}),
    "every matrix": ("EsmcForMaskedLM", {"target_modules": [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"], "r": 3}),
    "all-linear": ("EsmcForMaskedLM", {"target_modules": "all-linear"}),
    "rslora, patterns": (
        "EsmcModel",
        {"target_modules": QKV, "use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}},
    ),
    "dora": ("EsmcForMaskedLM", {"target_modules": [*QKV, "up_proj"], "use_dora": True}),
    "mica": ("EsmcModel", {"target_modules": QKV, "init_lora_weights": "mica"}),
    "embeddings": ("EsmcForMaskedLM", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings, dora": ("EsmcForMaskedLM", {"target_modules": ["embed_tokens"], "use_dora": True, "r": 3}),
    "bias of all": ("EsmcForMaskedLM", {"target_modules": QKV, "bias": "all"}),
    "a head with its biases": ("EsmcForMaskedLM", {"target_modules": ["dense", "decoder"], "lora_bias": True}),
    "modules_to_save": ("EsmcModel", {"target_modules": QKV, "modules_to_save": ["mlp", "norm"]}),
    "a classifier": ("EsmcForSequenceClassification", {"target_modules": QKV, "task_type": "SEQ_CLS"}),
    "parameters": ("EsmcModel", {"target_modules": [], "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"]}),
}  # fmt: skip


def forward_of(model: Any, layer: int = -1) -> torch.Tensor:
    """Rows of residues [L, D], in the forward of PEFT with its adapters beside the weights."""
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([Reference.encode(SEQUENCE)]), output_hidden_states=True)
    return found.hidden_states[layer][0, 1:-1]


def rows_of(folder: Path, adapter: Path, layer: int = -1) -> torch.Tensor:
    """Rows of residues [L, D] that `embed` computes with the base in a folder and an adapter."""
    (folder / "one.fasta").write_text(f">one\n{SEQUENCE}\n")
    embed_fasta(
        folder / "one.fasta", folder / "rows.h5", model=str(folder / "base"), adapter=str(adapter), pool=("residue",),
        layers=(layer,), store_dtype="fp32", device="cpu", overwrite=True,
    )  # fmt: skip
    with read_embeddings(folder / "rows.h5") as file:
        return torch.from_numpy(file.residues(0, file.layers[0]))


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_weights_are_pefts_own_and_rows_those_of_its_unmerged_forward(name: str, tmp_path: Path) -> None:
    kind, settings = SETTINGS[name]
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    spec, state, notes = loaded(tmp_path / "base", tmp_path / "adapter")
    unmerged = forward_of(wrapped)
    merged = {each.removeprefix("esmc."): tensor for each, tensor in wrapped.merge_and_unload().state_dict().items()}
    assert spec.family == "esmc"
    for key in ESMC.shapes(spec):
        assert torch.equal(state[key], merged[key]), key
    if kind == "EsmcForMaskedLM":
        for part in ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "decoder.weight"):
            assert torch.equal(state[f"lm_head.{part}"], merged[f"lm_head.{part}"]), part
        assert torch.equal(state["lm_head.bias"], merged["lm_head.decoder.bias"])
    assert relative_l2(rows_of(tmp_path, tmp_path / "adapter"), unmerged) < 2e-6
    assert any("merged into" in note for note in notes)
    assert any("a task head is left out" in note for note in notes) == ("classifier" in name)


# --- joint matrices --------------------------------------------------------------------------------------------------


def module_of(names: dict[str, tuple[int, ...]]) -> torch.nn.Module:
    """Modules with parameters of these names and shapes: those of one `weight` are linear layers, and have a bias
    where there is one."""
    root = torch.nn.Module()
    holders: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in names.items():
        path, _, last = name.rpartition(".")
        holders.setdefault(path, {})[last] = shape
    for path, parts in holders.items():
        parent, *place = root, *path.split(".")
        for step in place[:-1]:
            if step not in parent._modules:
                parent.add_module(step, torch.nn.Module())
            parent = parent._modules[step]
        if parts.keys() <= {"weight", "bias"} and len(parts["weight"]) == 2:
            made: torch.nn.Module = torch.nn.Linear(*reversed(parts["weight"]), bias="bias" in parts)
        else:
            made = parent._modules.get(place[-1], torch.nn.Module())
            for last, shape in parts.items():
                made.register_parameter(last, torch.nn.Parameter(torch.empty(shape)))
        parent.add_module(place[-1], made)
    return root


def package_model(layout: Callable[[State], State]) -> torch.nn.Module:
    """A module with the names and weights of a layout of ESM C."""
    tensors = {name: each.detach().clone() for name, each in transformers_model().state_dict().items()}
    state = {name: each for name, each in layout(tensors).items() if not name.endswith("_extra_state")}
    model = module_of({name: tuple(each.shape) for name, each in state.items()})
    model.load_state_dict(state)
    return model


def saved(model: torch.nn.Module, path: Path) -> Path:
    save_file({name: each.detach().clone() for name, each in model.state_dict().items()}, path)
    return path


PARAMETERS = ["attn.layernorm_qkv.weight", "attn.out_proj.weight", "ffn.fc1_weight", "ffn.fc2_weight"]
JOINT: dict[str, tuple[Callable[[State], State], dict[str, Any]]] = {
    "parameters": (te_state, {"target_modules": [], "target_parameters": PARAMETERS}),
    "parameters, out_proj a module": (
        te_state,
        {"target_modules": ["out_proj"], "target_parameters": ["layernorm_qkv.weight", "fc2_weight", "ffn.fc1_weight"]},
    ),
    "fc1 alone": (te_state, {"target_modules": [], "target_parameters": ["fc1_weight"], "r": 5, "use_rslora": True}),
    "alpha_pattern of parameters": (
        te_state,
        {
            "target_modules": [],
            "target_parameters": PARAMETERS,
            "alpha_pattern": {"blocks.1.ffn.fc1_weight": 5, "layernorm_qkv.weight": 3, "ffn": 100},
            "rank_pattern": {"fc2_weight": 2},
        },
    ),
    "esm 3.2": (esm32_state, {"target_modules": ["layernorm_qkv.1", "out_proj", "ffn.1", "ffn.3"]}),
    "esm 3.2, dora": (esm32_state, {"target_modules": ["layernorm_qkv.1", "ffn.1"], "use_dora": True, "r": 3}),
    "esm 3.2, modules_to_save": (
        esm32_state,
        {"target_modules": ["ffn.3"], "modules_to_save": ["layernorm_qkv", "ffn.1"]},
    ),
}


@pytest.mark.parametrize("name", JOINT)
def test_adapters_of_joint_matrices_are_merged_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    layout, settings = JOINT[name]
    model = package_model(layout)
    base = saved(model, tmp_path / "base.safetensors")
    wrapped = trained(model, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    _, state, notes = loaded(base, tmp_path / "adapter")
    expected = loaded(saved(wrapped.merge_and_unload(), tmp_path / "merged.safetensors"))[1]
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    assert any("merged into" in note for note in notes)


def by_hand(folder: Path, names: dict[str, str], **settings: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Write an adapter of rank 2 and alpha 6 in block 1, as the makers' files are: module -> its A and B.

    names: of the file, for qkv, out, fc1 and fc2.
    """
    d, f = SMALL.hidden, SMALL.inner
    assert f is not None
    sizes = {"qkv": (3 * d, d), "out": (d, d), "fc1": (2 * f, d), "fc2": (d, f)}
    generator = torch.Generator().manual_seed(3)
    factors, tensors = {}, State()
    for name, path in names.items():
        out, columns = sizes[name]
        a, b = torch.randn(2, columns, generator=generator) / 10, torch.randn(out, 2, generator=generator) / 10
        factors[name] = a, b
        for part, each in (("A", a), ("B", b)):
            tensors[f"base_model.model.esmc.transformer.blocks.1.{path}.lora_{part}.weight"] = each
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_parameters": PARAMETERS}
    edited(folder, **{**given, **settings})
    return factors


MAKERS = {"qkv": "attn.layernorm_qkv", "out": "attn.out_proj", "fc1": "ffn.base_layer", "fc2": "ffn"}


@pytest.mark.parametrize("names", [MAKERS, MAKERS | {"fc1": "ffn", "fc2": "ffn.base_layer"}], ids=["makers", "turned"])
def test_fused_names_are_merged_by_their_shapes_into_the_rows_that_they_hold(
    names: dict[str, str], tmp_path: Path
) -> None:
    """Each matrix by hand: W + 3 B A, and the rows of q, k, v and of gate and up one below the other."""
    base = written(tmp_path / "base", "transformers", transformers_model())
    factors = by_hand(tmp_path / "adapter", names)
    plain, state = loaded(base)[1], loaded(base, tmp_path / "adapter")[1]
    d, f = SMALL.hidden, SMALL.inner
    rows = {"self_attn.o_proj": ("out", 0, d), "mlp.down_proj": ("fc2", 0, d)}
    rows |= {"mlp.gate_proj": ("fc1", 0, f), "mlp.up_proj": ("fc1", f, f)}
    rows |= {f"self_attn.{x}_proj": ("qkv", i * d, d) for i, x in enumerate("qkv")}
    for word, (name, start, count) in rows.items():
        (a, b), key = factors[name], f"layers.1.{word}.weight"
        expected = plain[key].double() + 3 * (b.double() @ a.double())[start : start + count]
        assert relative_l2(state[key].double(), expected) < 1e-7, word
        assert relative_l2(state[key], plain[key]) > 1e-2
    same = [name for name in plain if not any(name == f"layers.1.{word}.weight" for word in rows)]
    assert all(torch.equal(state[name], plain[name]) for name in same)


def test_a_file_of_the_makers_gives_the_rows_of_transformers_merged(tmp_path: Path) -> None:
    model = transformers_model()
    base = written(tmp_path / "base", "transformers", model)
    factors = by_hand(tmp_path / "adapter", MAKERS)
    block = model.esmc.layers[1]
    with torch.no_grad():
        for name, words in (("qkv", "qkv"), ("fc1", ("gate", "up")), ("out", "o"), ("fc2", ("down",))):
            a, b = factors[name]
            part = block.self_attn if name in ("qkv", "out") else block.mlp
            for word, rows in zip(words, b.chunk(len(words)), strict=True):
                getattr(part, f"{word}_proj").weight += 3 * rows @ a
    for layer in (1, 2, 4):
        assert relative_l2(rows_of(tmp_path, tmp_path / "adapter", layer), forward_of(model, layer)) < 2e-6
    assert base.is_dir()


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(UserError) as error:
        loaded(base, adapter)
    return str(error.value.what)


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (MAKERS, {"target_parameters": None}, "before its LayerNorm"),
        (MAKERS, {"target_parameters": ["ffn.fc1_weight"]}, "before its LayerNorm"),
        (
            {"fc1": "ffn"},
            {"target_parameters": ["ffn.fc2_weight"]},
            "has shape (768, 128), and the model needs (128, 384)",
        ),
        ({"fc1": "ffn"}, {"target_parameters": ["ffn.fc3_weight"]}, "ffn before its LayerNorm"),
        ({"qkv": "ffn"}, {}, "has shape (384, 128)"),
        ({"fc1": "ffn", "qkv": "ffn.base_layer"}, {}, "fc1_weight twice"),
        ({"qkv": "attn.layernorm_qkv", "fc1": "attn.layernorm_qkv.base_layer"}, {}, "layernorm_qkv.weight twice"),
        (MAKERS, {"target_parameters": "fc1_weight"}, "is not the configuration"),
        (MAKERS, {"target_parameters": [1]}, "is not the configuration"),
        ({"out": "attn.gate"}, {"target_parameters": None}, "attn.gate.weight, which"),
    ],
)
def test_joint_adapters_that_fit_nothing_are_refused(
    names: dict[str, str], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = written(tmp_path / "base", "transformers", transformers_model())
    by_hand(tmp_path / "adapter", names, **settings)
    assert words in refusal(base, tmp_path / "adapter")


def test_a_module_of_a_block_that_is_not_known_is_never_taken_for_a_head(tmp_path: Path) -> None:
    """Without a prefix before the names, as files of the package esm 3.2 have none."""
    base = written(tmp_path / "base", "transformers", transformers_model())
    by_hand(tmp_path / "adapter", {"out": "attn.out_proj"}, target_parameters=None)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name.replace("esmc.", ""): each for name, each in load_file(file).items()}
    save_file(tensors, file)
    loaded(base, tmp_path / "adapter")
    other = "base_model.model.transformer.blocks.0.attn.geometry.weight"
    save_file(tensors | {other: torch.ones(3, 3)}, file)
    assert "attn.geometry.weight, which" in refusal(base, tmp_path / "adapter")


def test_validate_merges_an_adapter_of_esmc(tmp_path: Path, make_fasta: Callable[..., Path]) -> None:
    base = written(tmp_path / "base", "transformers", transformers_model())
    by_hand(tmp_path / "adapter", MAKERS)
    fasta = make_fasta([20, 30, 50, 80])
    verdict = validate_model(
        model=str(base), adapter=str(tmp_path / "adapter"), fasta=str(fasta), device="cpu", token_budget=1024
    )
    assert verdict.passed and any("LoRA merged into 4 modules" in note for note in verdict.notes)


SABOTAGE: dict[str, tuple[str, Any]] = {
    "gate and up turned": ("JOINT", {**ESMC.JOINT, "gate_up_proj": ("up_proj", "gate_proj")}),
    "q and k turned": ("JOINT", {**ESMC.JOINT, "qkv_proj": ("k_proj", "q_proj", "v_proj")}),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_joint_rows_that_are_taken_in_another_order_are_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    word, value = SABOTAGE[name]
    monkeypatch.setattr(ESMC, word, value)
    with pytest.raises(AssertionError):
        test_fused_names_are_merged_by_their_shapes_into_the_rows_that_they_hold(MAKERS, tmp_path)
