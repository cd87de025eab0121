"""Adapters: merged weights are those of PEFT's own merge, bit for bit, and whatever is no plain adapter is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
from conftest import relative_l2
from test_weights import hf_name
from virnucpro_cli import embed_fasta, read_embeddings
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed import run
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import adapters, locate, weights
from virnucpro_cli.model.esm2 import ESM2
from virnucpro_cli.model.spec import DECODER, ModelSpec, State

SPEC = ModelSpec("adapted", 3, 64, 4)
QKV = ["query", "key", "value"]
SIZES = dict(
    vocab_size=33, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
    position_embedding_type="rotary", token_dropout=True, layer_norm_eps=1e-5, pad_token_id=1, mask_token_id=32,
    max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, emb_layer_norm_before=False,
    tie_word_embeddings=True,
)  # fmt: skip


def transformers_model(kind: str, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.EsmConfig(**SIZES, num_labels=3)
    more = {"add_pooling_layer": False} if kind == "EsmModel" else {}
    model = getattr(transformers, kind)(config, **more).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # of a trained model's scale, as random_state has them
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(float("norm" in name.lower() and name.endswith("weight")), 0.1)
    return model


def trained(model: Any, seed: int = 1, **settings: Any) -> Any:
    """The model in PEFT's hands, with an adapter whose every tensor has moved."""
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                moved = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(parameter.abs() + moved.abs() if "magnitude" in name else parameter + moved)
    return wrapped.eval()


def loaded(base: Path, *folders: Path) -> tuple[ModelSpec, State, tuple[str, ...]]:
    found = locate.locate(str(base))
    assert found is not None
    return weights.load(locate.verified(adapters.with_adapters(found, map(str, folders))))


def encoder_of(model: Any) -> State:
    """PEFT's merged tensors, under the names here."""
    theirs = {name.removeprefix("esm."): tensor for name, tensor in model.state_dict().items()}
    return {name: theirs[hf_name(name)] for name in ESM2.shapes(SPEC)}


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("EsmModel", {"target_modules": QKV}),
    "mica": ("EsmModel", {"target_modules": [*QKV, "word_embeddings"], "init_lora_weights": "mica"}),
    "parameters": ("EsmForMaskedLM", {"target_modules": [], "target_parameters": ["query.weight", "dense.weight"]}),
    "gaussian": ("EsmModel", {"target_modules": QKV, "init_lora_weights": "gaussian", "lora_dropout": 0.2}),
    "odd rank": ("EsmModel", {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 7}),
    "a regular expression": ("EsmModel", {"target_modules": r".*\.(query|intermediate\.dense)"}),
    "rslora": ("EsmForMaskedLM", {"target_modules": QKV, "use_rslora": True, "r": 5}),
    "alpha_pattern": (
        "EsmModel", {"target_modules": QKV, "alpha_pattern": {"layer.1.attention.self.query": 32, "value": 3}},
    ),
    "rank_pattern": ("EsmForMaskedLM", {"target_modules": QKV, "rank_pattern": {"key": 2, r"layer\.0\..*\.query": 16}}),
    "both patterns": (
        "EsmModel",
        {"target_modules": QKV, "rank_pattern": {"key": 2}, "alpha_pattern": {"key": 5}, "use_rslora": True},
    ),
    "dora": ("EsmModel", {"target_modules": [*QKV, "dense"], "use_dora": True}),
    "dora, rslora": ("EsmForMaskedLM", {"target_modules": ["query"], "use_dora": True, "use_rslora": True, "r": 6}),
    "lora_bias": ("EsmModel", {"target_modules": [*QKV, "dense"], "lora_bias": True, "lora_alpha": 3}),
    "bias of the layers": ("EsmModel", {"target_modules": QKV, "bias": "lora_only"}),
    "bias of all": ("EsmForMaskedLM", {"target_modules": QKV, "bias": "all"}),
    "dense": ("EsmForMaskedLM", {"target_modules": ["dense"]}),
    "all-linear": ("EsmModel", {"target_modules": "all-linear"}),
    "all-linear, a token head": ("EsmForMaskedLM", {"target_modules": "all-linear"}),
    "embeddings": ("EsmModel", {"target_modules": ["word_embeddings", "query"]}),
    "embeddings, dora": ("EsmModel", {"target_modules": ["word_embeddings"], "use_dora": True}),
    "modules_to_save": (
        "EsmModel", {"target_modules": QKV, "modules_to_save": ["intermediate", "emb_layer_norm_after"]},
    ),
    "a classifier": ("EsmForSequenceClassification", {"target_modules": QKV, "task_type": "SEQ_CLS"}),
    "layers": (
        "EsmForTokenClassification",
        {"target_modules": QKV, "task_type": "TOKEN_CLS", "layers_to_transform": [1]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_weights_are_pefts_own_and_rows_those_of_its_unmerged_forward(name: str, tmp_path: Path) -> None:
    kind, settings = SETTINGS[name]
    model = transformers_model(kind)
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, **settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    spec, state, notes = loaded(tmp_path / "base", tmp_path / "adapter")
    unmerged = forward_of(wrapped)
    merged = wrapped.merge_and_unload()
    for key, expected in encoder_of(merged).items():
        assert torch.equal(state[key], expected), key
    assert relative_l2(rows_of(tmp_path, (tmp_path / "adapter",)), unmerged) < 1e-6
    assert any("merged into" in note for note in notes)
    assert any("a task head is left out" in note for note in notes) == ("classifier" in name or name == "layers")
    if kind == "EsmForMaskedLM":
        theirs = merged.state_dict()
        for part in ("dense.weight", "dense.bias", "layer_norm.weight", "bias"):
            assert torch.equal(state[f"lm_head.{part}"], theirs[f"lm_head.{part}"]), part
    assert spec.layers == 3


SEQUENCE = "MKVLAARNDCEQGHILKMFPSTWYV"


def forward_of(model: Any) -> torch.Tensor:
    """Rows of residues [L, D] of the last layer, in the forward of PEFT with its adapters beside the weights."""
    from virnucpro_cli.alphabet import CLS, EOS
    from virnucpro_cli.validation.fair_esm import ALPHABET

    tokens = torch.tensor([[CLS, *(ALPHABET.get_idx(letter) for letter in SEQUENCE), EOS]])
    with torch.no_grad():
        hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
    return hidden.hidden_states[-1][0, 1:-1]


def rows_of(folder: Path, given: tuple[Path, ...], **options: Any) -> torch.Tensor:
    (folder / "one.fasta").write_text(f">one\n{SEQUENCE}\n")
    out = folder / "rows.h5"
    settings = {"model": str(folder / "base"), "pool": ("residue",), "store_dtype": "fp32", "device": "cpu"}
    embed_fasta(folder / "one.fasta", out, overwrite=True, adapter=tuple(map(str, given)), **{**settings, **options})
    with read_embeddings(out) as file:
        return torch.from_numpy(file.dataset("residue", file.layers[-1])[:])


def made(folder: Path, kind: str = "EsmModel", name: str = "adapter", seed: int = 1, **settings: Any) -> Path:
    """A base and an adapter in a folder, and the adapter's path."""
    model = transformers_model(kind)
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    trained(model, seed, **{"target_modules": QKV, **settings}).save_pretrained(folder / name)
    return folder / name


def test_several_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    import peft

    first = made(tmp_path, name="first", use_dora=True)
    second = made(tmp_path, name="second", seed=2, use_dora=True, r=4)
    model = transformers_model("EsmModel")
    for folder in (first, second):
        model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    expected = encoder_of(model)
    state, other = loaded(tmp_path / "base", first, second)[1], loaded(tmp_path / "base", second, first)[1]
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(other["layers.0.self_attn.q_proj.weight"], state["layers.0.self_attn.q_proj.weight"])


def test_a_half_precision_base_and_adapter_are_merged_in_fp32(tmp_path: Path) -> None:
    adapter = made(tmp_path)
    for file in (tmp_path / "base" / "model.safetensors", adapter / "adapter_model.safetensors"):
        save_file({name: each.half() for name, each in load_file(file).items()}, file, {"format": "pt"})
    halves = load_file(tmp_path / "base" / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    path = "encoder.layer.0.attention.self.query"
    a, b = (halves[1][f"base_model.model.{path}.lora_{part}.weight"].float() for part in "AB")
    found = loaded(tmp_path / "base", adapter)[1]["layers.0.self_attn.q_proj.weight"]
    assert torch.equal(found, halves[0][f"{path}.weight"].float() + b @ a)


def test_an_adapter_in_a_bin_file_and_a_base_of_fair_esms_names_give_the_same(tmp_path: Path) -> None:
    adapter = made(tmp_path)
    expected = loaded(tmp_path / "base", adapter)[1]
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    spec, plain, _ = loaded(tmp_path / "base")
    save_file({name: each for name, each in plain.items() if "head" not in name}, tmp_path / "fair-esm.safetensors")
    found = loaded(tmp_path / "fair-esm.safetensors", adapter)[1]
    assert spec.layers == 3 and all(torch.equal(found[name], expected[name]) for name in ESM2.shapes(SPEC))


def test_an_adapted_embedding_leaves_the_token_heads_matrix_as_pefts_forward_does(tmp_path: Path) -> None:
    adapter = made(tmp_path, "EsmForMaskedLM", target_modules=["word_embeddings"])
    base = loaded(tmp_path / "base")[1]
    state = loaded(tmp_path / "base", adapter)[1]
    assert torch.equal(state[DECODER], base["embed_tokens.weight"])
    assert not torch.equal(state["embed_tokens.weight"], base["embed_tokens.weight"])


# --- an adapter beside the weights of its base -----------------------------------------------------------------------


def both_in(folder: Path, **settings: Any) -> Path:
    """The folder `base`, into which an adapter was saved too, and a copy of each in `plain` and `adapter`."""
    adapter = made(folder, **settings)
    shutil.copytree(folder / "base", folder / "plain")
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, folder / "base")
    return folder / "base"


def test_a_folder_with_weights_and_an_adapter_is_merged_as_transformers_does(tmp_path: Path) -> None:
    import transformers

    folder = both_in(tmp_path, target_modules=[*QKV, "dense"])
    theirs = transformers.EsmModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert relative_l2(rows_of(tmp_path, ()), forward_of(theirs)) < 1e-6
    assert relative_l2(rows_of(tmp_path, (), model=str(tmp_path / "plain")), forward_of(theirs)) > 1e-2
    told = loaded(folder)[2]
    assert any("LoRA merged into" in note for note in told)
    assert any(f"{folder} holds an adapter too, which is merged" in note for note in told)


def test_weights_that_are_named_by_their_file_are_taken_without_the_adapter_beside_them(tmp_path: Path) -> None:
    folder = both_in(tmp_path)
    plain, merged = loaded(tmp_path / "plain")[1], loaded(folder)[1]
    spec, state, notes = loaded(folder / "model.safetensors")
    assert spec.layers == 3 and all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    assert not any("adapter" in note for note in notes)
    assert any(f"--model {folder / 'model.safetensors'} takes them alone" in note for note in loaded(folder)[2])
    assert not torch.equal(merged["layers.0.self_attn.q_proj.weight"], plain["layers.0.self_attn.q_proj.weight"])


def test_a_folder_with_an_adapter_has_the_identity_of_base_and_adapter(
    tmp_path: Path, make_fasta: Callable[..., Path]
) -> None:
    """By its SHA-256, in the file, in its Methods sentence, in a dry run, in the cache, in an audit and in a search."""
    from virnucpro_cli.explore import inspect
    from virnucpro_cli.explore.search import SearchConfig, search_file
    from virnucpro_cli.validation.validate import validate_model

    folder, fasta = both_in(tmp_path), make_fasta([20, 30, 40])
    common = {"device": "cpu", "cache": str(tmp_path / "cache")}
    apart = embed_fasta(
        fasta, tmp_path / "apart.h5", model=str(tmp_path / "plain"), adapter=str(tmp_path / "adapter"), **common
    )
    done = embed_fasta(fasta, tmp_path / "o.h5", model=str(folder), **common)
    assert done.counts["from the cache"] == 3 and apart.counts["from the cache"] == 0
    assert done.environment["adapters"] == str(folder)
    with read_embeddings(tmp_path / "o.h5") as file, read_embeddings(tmp_path / "apart.h5") as other:
        assert json.loads(file.attributes["adapters"])[0]["path"] == str(folder)
        assert file.settings["weights_sha256"] == other.settings["weights_sha256"] != file.attributes["base_sha256"]
        assert f"the adapter {folder} (SHA-256" in " ".join(inspect.methods(file).split())
    alone = embed_fasta(fasta, tmp_path / "alone.h5", model=str(folder / "model.safetensors"), **common)
    assert alone.counts["from the cache"] == 0 and "adapters" not in alone.environment
    assert validate_model(against=str(tmp_path / "o.h5")).passed
    search = SearchConfig(file=str(tmp_path / "o.h5"), query=str(fasta), k=1, raw=True, output=str(tmp_path / "hits"))
    assert search_file(search) == 0


def test_other_adapters_are_merged_behind_the_one_beside_the_weights_and_none_twice(tmp_path: Path) -> None:
    folder, second = both_in(tmp_path), made(tmp_path, name="second", seed=2, use_dora=True)
    expected = loaded(tmp_path / "plain", tmp_path / "adapter", second)[1]
    for folders in ((second,), (folder, second)):
        found = loaded(folder, *folders)[1]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    turned = loaded(folder, second, folder)[1]
    expected = loaded(tmp_path / "plain", second, tmp_path / "adapter")[1]
    assert all(torch.equal(turned[name], tensor) for name, tensor in expected.items())


def test_what_is_wrong_with_an_adapter_beside_the_weights_is_said(tmp_path: Path) -> None:
    folder = both_in(tmp_path)
    edited(folder, init_lora_weights="pissa")
    with pytest.raises(UserError, match="changed the weights of the base too"):
        loaded(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither adapter_model\.safetensors") as error:
        loaded(folder)
    assert "remove adapter_config.json" in str(error.value.remedy)
    (folder / "adapter_config.json").unlink()
    assert not any("adapter" in note for note in loaded(folder)[2])


# --- identity --------------------------------------------------------------------------------------------------------


def test_base_and_adapters_and_their_order_are_the_identity_of_the_model(tmp_path: Path) -> None:
    first, second = made(tmp_path, name="first"), made(tmp_path, name="second", seed=2)
    found = locate.locate(str(tmp_path / "base"))
    assert found is not None
    plain = locate.verified(found)

    def identity(*folders: Path) -> str:
        return locate.verified(adapters.with_adapters(found, map(str, folders))).sha256

    ids = [plain.sha256, identity(first), identity(second), identity(first, second), identity(second, first)]
    settings = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 9}))
    ids.append(identity(first))
    assert len(set(ids)) == 6 and identity() == plain.sha256
    random = locate.locate("random:8M")
    assert random is not None
    adapted = locate.verified(adapters.with_adapters(random, [str(second)]))
    assert adapted.sha256 != random.sha256 and adapted.base_sha256 == random.sha256


def test_an_adapter_that_changes_between_hash_and_use_is_refused(tmp_path: Path) -> None:
    adapter, found = made(tmp_path), locate.locate(str(tmp_path / "base"))
    assert found is not None
    weights_then = locate.verified(adapters.with_adapters(found, [str(adapter)]))
    made(tmp_path, seed=3)
    with pytest.raises(UserError, match="changed after it was looked at"):
        weights.load(weights_then)


def stopped_after_one_pack(monkeypatch: pytest.MonkeyPatch, config: EmbedConfig) -> None:
    """A run that is interrupted before its first row; a partial file stays."""
    from virnucpro_cli.engine import runner

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(BaseException):  # noqa: B017
        patch.setattr(runner, "run_packs", interrupted)
        run(config)


def test_runs_with_different_adapters_never_resume_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_fasta: Callable[..., Path]
) -> None:
    first, second = made(tmp_path, name="first"), made(tmp_path, name="second", seed=2)
    fasta = make_fasta([20, 30])
    config = EmbedConfig(
        inputs=(str(fasta),), output=str(tmp_path / "o.h5"), model=str(tmp_path / "base"), device="cpu",
        adapter=(str(first),), quiet=True,
    )  # fmt: skip
    stopped_after_one_pack(monkeypatch, config)
    for other in ((str(second),), (), (str(first), str(second))):
        with pytest.raises(UserError, match="the model's weights differ"):
            run(replace(config, adapter=other))
    run(config)
    assert run(config).already_complete
    with pytest.raises(UserError, match="the model's weights differ"):
        run(replace(config, adapter=(str(second),)))


def test_the_cache_keeps_rows_of_each_adapter_apart(tmp_path: Path, make_fasta: Callable[..., Path]) -> None:
    first, second = made(tmp_path, name="first"), made(tmp_path, name="second", seed=2)
    fasta = make_fasta([20, 30])
    taken = []
    for number, adapter in enumerate((first, second, first)):
        done = embed_fasta(
            fasta, tmp_path / f"{number}.h5", model=str(tmp_path / "base"), adapter=str(adapter), device="cpu",
            cache=str(tmp_path / "cache"),
        )  # fmt: skip
        taken.append(done.counts["from the cache"])
    assert taken == [0, 0, 2]


def test_the_file_and_its_methods_sentence_name_base_and_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from virnucpro_cli.explore import inspect

    adapter = made(tmp_path)
    rows_of(tmp_path, (adapter,))
    base = locate.locate(str(tmp_path / "base"))
    assert base is not None
    with read_embeddings(tmp_path / "rows.h5") as file:
        sentence, attributes = inspect.methods(file), dict(file.attributes)
    entry = json.loads(attributes["adapters"])[0]
    assert attributes["base_sha256"] == locate.verified(base).sha256 != attributes["weights_sha256"]
    assert entry == {"path": str(adapter), "sha256": locate.sha256_of(sorted(adapter.glob("adapter_*")))}
    assert f"the adapter {adapter} (SHA-256 {entry['sha256'][:16]}) was merged" in " ".join(sentence.split())
    assert attributes["base_sha256"][:16] in sentence


def test_shards_and_searches_use_the_adapters(tmp_path: Path, make_fasta: Callable[..., Path]) -> None:
    from virnucpro_cli.cluster.merge import merge_shards
    from virnucpro_cli.explore.search import SearchConfig, search_file

    adapter, fasta = made(tmp_path), make_fasta([20, 30, 40, 50])
    common = {"model": str(tmp_path / "base"), "adapter": str(adapter), "device": "cpu"}
    for k in (1, 2):
        embed_fasta(fasta, tmp_path / "o.h5", shard=f"{k}/2", **common)
    merge_shards(tmp_path / "o.h5")
    with read_embeddings(tmp_path / "o.h5") as file:
        assert json.loads(file.attributes["adapters"])[0]["path"] == str(adapter)
    search = SearchConfig(
        file=str(tmp_path / "o.h5"), query=str(fasta), k=1, raw=True, output=str(tmp_path / "hits.tsv")
    )
    assert search_file(search) == 0
    hits = [line.split("\t") for line in (tmp_path / "hits.tsv").read_text().splitlines()[1:]]
    assert len(hits) == 4 and all(hit[0] == hit[1] for hit in hits)


@pytest.mark.parametrize("options", [{"workers": 2}, {"dtype": "bf16"}])
def test_workers_merge_the_adapters_too(
    options: dict[str, Any], tmp_path: Path, make_fasta: Callable[..., Path]
) -> None:
    adapter, fasta = made(tmp_path), make_fasta([300] * 12)
    common = {"model": str(tmp_path / "base"), "adapter": str(adapter), "token_budget": 1024, "device": "cpu"}
    embed_fasta(fasta, tmp_path / "one.h5", **common)
    run = forked.embed if "workers" in options else embed_fasta
    run(fasta, tmp_path / "two.h5", **common, **options)
    embed_fasta(fasta, tmp_path / "plain.h5", **{**common, "adapter": ()})
    one, two, plain = (
        torch.from_numpy(read_embeddings(tmp_path / f"{name}.h5").dataset("mean", 3)[:])
        for name in ("one", "two", "plain")
    )
    assert relative_l2(two.float(), one.float()) < 2e-2 < relative_l2(plain.float(), one.float())


def test_the_second_pass_in_fp32_merges_the_adapters_too(tmp_path: Path) -> None:
    from virnucpro_cli.store import RECOMPUTED

    adapter, file = made(tmp_path), tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    table = next(tensor for name, tensor in tensors.items() if name.endswith("word_embeddings.weight"))
    table[22] = 1e6  # W, which overflows in fp16
    save_file(tensors, file, {"format": "pt"})
    half = rows_of(tmp_path, (adapter,), dtype="fp16")
    with read_embeddings(tmp_path / "rows.h5") as rows:
        assert rows.flags[0] & RECOMPUTED
    assert relative_l2(half, rows_of(tmp_path, (adapter,), dtype="fp32")) < 1e-6
    assert relative_l2(half, rows_of(tmp_path, (), dtype="fp32")) > 1e-2


def test_validate_and_an_audit_merge_the_adapters(tmp_path: Path, make_fasta: Callable[..., Path]) -> None:
    from virnucpro_cli.validation.validate import validate_model

    adapter, fasta = made(tmp_path), make_fasta([20, 30, 50, 80])
    verdict = validate_model(
        model=str(tmp_path / "base"), adapter=str(adapter), fasta=str(fasta), device="cpu", token_budget=1024
    )
    assert verdict.passed and any("merged into" in note for note in verdict.notes)
    embed_fasta(fasta, tmp_path / "o.h5", model=str(tmp_path / "base"), adapter=str(adapter), device="cpu")
    assert validate_model(against=str(tmp_path / "o.h5")).passed
    other = made(tmp_path, name="other", seed=5)
    assert not validate_model(against=str(tmp_path / "o.h5"), adapter=str(other)).passed


def test_extract_takes_base_and_adapter_in_one_folder_and_refuses_the_option_with_the_way(
    tmp_path: Path, make_fasta: Callable[..., Path]
) -> None:
    from virnucpro_cli.cli import extract as command
    from virnucpro_cli.exchange.extract import extract_files

    folder, fasta = both_in(tmp_path), make_fasta([20])
    written = extract_files(str(folder), str(fasta), str(tmp_path / "out"), ("mean",), gpu=False)
    assert written.files == 1
    (file,) = (tmp_path / "out").glob("*.pt")
    found = torch.load(file, weights_only=True)["mean_representations"][3]
    options = {"model": str(tmp_path / "plain"), "adapter": str(tmp_path / "adapter"), "device": "cpu"}
    embed_fasta(fasta, tmp_path / "o.h5", **options, store_dtype="fp32")
    with read_embeddings(tmp_path / "o.h5") as rows:
        assert torch.equal(found, torch.from_numpy(rows.dataset("mean", 3)[0]))
    with pytest.raises(UserError, match="no --adapter") as error:
        command.parser().parse_args(["m", "f", "o", "--include", "mean", "--adapter", "x"])
    assert "export --to fair-esm" in str(error.value.remedy)


# --- refusals --------------------------------------------------------------------------------------------------------


def edited(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    made(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "copy")
    return tmp_path / "copy"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        loaded(folder / "base", folder / "adapter")
    return str(error.value.what)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_adapter_that_changed_its_base_is_refused(start: str, folder: Path) -> None:
    edited(folder / "adapter", init_lora_weights=start)
    assert "changed the weights of the base too" in refusal(folder)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_left_the_base_alone_is_taken(start: object, folder: Path) -> None:
    expected = loaded(folder / "base", folder / "adapter")[1]
    edited(folder / "adapter", init_lora_weights=start)
    found = loaded(folder / "base", folder / "adapter")[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "something new"}, "began in an unknown way"),
        ({"init_lora_weights": None}, "began in an unknown way"),
        ({"peft_type": "ADALORA"}, "of type 'ADALORA'"),
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"velora_config": {"x": 1}}, "velora_config"),
        ({"monteclora_config": {"x": 1}}, "monteclora_config"),
        ({"arrow_config": {"x": 1}}, "arrow_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"use_something_new": True}, "use_something_new"),
        ({"use_dora": True}, "no whole adapter"),
        ({"lora_alpha": "8"}, "must be a number"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
    ],
)
def test_what_no_merge_is_known_of_is_refused_with_its_name(settings: dict[str, Any], words: str, folder: Path) -> None:
    edited(folder / "adapter", **settings)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "lora_ga", "lora_ga_config": "LoraGAConfig"}, "changed the weights of the base too"),
        ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "uses alora_invocation_tokens"),
        ({"ensure_weight_tying": True, "modules_to_save": ["word_embeddings"]}, "uses ensure_weight_tying"),
        ({"kasa_config": "KasaConfig"}, "uses kasa_config"),
        ({"monteclora_config": "MontecloraConfig"}, "uses monteclora_config"),
        ({"velora_config": "VeloraConfig"}, "uses velora_config"),
        ({"arrow_config": "ArrowConfig"}, "uses arrow_config"),
        ({"use_bdlora": "BdLoraConfig"}, "uses use_bdlora"),
        ({"loftq_config": "LoftQConfig", "init_lora_weights": "loftq"}, "changed the weights of the base too"),
        ({"eva_config": "EvaConfig", "init_lora_weights": "eva"}, ""),
    ],
)
def test_variants_are_refused_as_peft_itself_writes_them(settings: dict[str, Any], words: str, folder: Path) -> None:
    from peft.tuners.lora import config as of_peft

    made = {
        name: getattr(of_peft, value)() if isinstance(value, str) and hasattr(of_peft, value) else value
        for name, value in settings.items()
    }
    of_peft.LoraConfig(target_modules=QKV, **made).save_pretrained(folder / "adapter")
    if words:
        assert words in refusal(folder)
    else:
        loaded(folder / "base", folder / "adapter")


def test_fields_that_old_files_lack_mean_their_defaults(folder: Path) -> None:
    expected = loaded(folder / "base", folder / "adapter")[1]
    old = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": QKV}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(old))
    found = loaded(folder / "base", folder / "adapter")[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


QUERY = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        (f"{QUERY.replace('layer.0', 'layer.7')}.lora_A.weight", torch.ones(8, 64), "which adapted does not have"),
        ("base_model.model.encoder.layer.0.gate.lora_A.weight", torch.ones(8, 64), "does not have"),
        (f"{QUERY}.lora_E", torch.ones(8, 64), "does not have"),
        (f"{QUERY}.lora_A.weight", torch.ones(8, 32), "has shape (64, 32), and the model needs (64, 64)"),
        (f"{QUERY}.lora_B.weight", torch.ones(64, 4), "has shape"),
        (f"{QUERY}.lora_magnitude_vector", torch.ones(64), "no whole adapter"),
        (f"{QUERY}.weight", torch.ones(64, 32), "has shape (64, 32)"),
        (f"{QUERY}.lora_B.bias", torch.ones(3), "has shape (3,)"),
    ],
)
def test_a_module_or_a_shape_that_the_base_lacks_is_refused(
    name: str, tensor: torch.Tensor, words: str, folder: Path
) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), name: tensor}, file)
    assert words.replace("adapted", "") in refusal(folder).replace(str(folder / "base"), "")


def test_a_rank_that_is_not_that_of_the_configuration_is_refused(tmp_path: Path) -> None:
    adapter = made(tmp_path)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    with pytest.raises(UserError, match=r"contradicts itself: .* has rank \d+, its configuration 5"):
        loaded(tmp_path / "base", adapter)


def test_half_an_adapter_of_a_module_is_refused(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"{QUERY}.lora_B.weight"]
    save_file(tensors, file)
    assert "no whole adapter" in refusal(folder)


def test_an_adapter_of_a_head_alone_is_refused(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({"base_model.model.classifier.dense.weight": torch.ones(3, 3)}, file)
    assert "nothing that the encoder has" in refusal(folder)


def test_an_adapter_in_the_place_of_a_model_says_what_to_give(folder: Path) -> None:
    edited(folder / "adapter", base_model_name_or_path="facebook/esm2_t6_8M_UR50D")
    with pytest.raises(UserError) as error:
        locate.locate(str(folder / "adapter"))
    assert error.value.remedy == f"Give --model facebook/esm2_t6_8M_UR50D --adapter {folder / 'adapter'}."


def test_the_tensors_of_an_adapter_in_the_place_of_a_model_say_what_to_give(folder: Path) -> None:
    edited(folder / "adapter", base_model_name_or_path="facebook/esm2_t6_8M_UR50D")
    with pytest.raises(UserError, match="is an adapter, and holds no model") as error:
        locate.locate(str(folder / "adapter" / "adapter_model.safetensors"))
    assert error.value.remedy == f"Give --model facebook/esm2_t6_8M_UR50D --adapter {folder / 'adapter'}."


def test_a_folder_that_is_no_adapter_is_refused_before_the_input_is_read(folder: Path) -> None:
    for name, words in (("base", "adapter_config.json"), ("nothing", "adapter_config.json")):
        with pytest.raises(UserError, match=words):
            loaded(folder / "base", folder / name)
    with pytest.raises(UserError, match="same folder twice"):
        loaded(folder / "base", folder / "adapter", folder / "adapter")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    assert "neither adapter_model.safetensors nor adapter_model.bin" in refusal(folder)


def test_another_base_than_the_adapters_own_is_told(folder: Path) -> None:
    edited(folder / "adapter", base_model_name_or_path="facebook/esm2_t33_650M_UR50D")
    assert any("was made for esm2_t33_650M_UR50D" in note for note in loaded(folder / "base", folder / "adapter")[2])
