"""Checkpoints of every layout to one dict with the names of their family here, checked against the spec."""

import argparse
import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from virnucpro_cli import stopping
from virnucpro_cli.errors import UserError, too_many_open
from virnucpro_cli.model.families import DEFAULT, DEMO, FAMILIES, SIZES, TABLE, Row, by_tensors, family_of
from virnucpro_cli.model.locate import Weights, check_unchanged
from virnucpro_cli.model.spec import DECODER, INV_FREQ, LM_HEAD, Family, ModelSpec, State, name_in

OTHERS = {
    "MSA Transformer": re.compile("row_self_attention|msa_position_embedding"),
    "ESM-1": re.compile(r"self_attn\.bias_[kv]$|embed_out_bias"),
    "ESM C of multimolecule, whose tokens have other numbers": re.compile(r"\.self\.query_layer_norm\.|^EsmC[A-Z]"),
}
"""Models that are known and not served, and a tensor or a class in config.json that only they have."""
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.)+")
"""Put before every name by data parallelism, torch.compile and PEFT."""
_OF_THE_ENCODER = re.compile(r"emb(ed|_)|encoder|layer|norm|position|rotary|lora|adapter|ia3", re.IGNORECASE)


def load(weights: Weights) -> tuple[ModelSpec, State, tuple[str, ...]]:
    """Read the files: spec, state under the family's names (checked, on the CPU), and notes for the report.

    The state is in the dtypes of the file and has the shapes [rows, columns] of the family. Of the heads for tokens and
    contacts, those that are whole are in it. Raises UserError naming the first tensors that are missing, mis-shaped or
    unknown inside the encoder.
    """
    if weights.seed is not None:
        assert weights.spec is not None
        state, heads = random_state(weights.spec, weights.seed), random_heads(weights.spec, weights.seed)
        notes = ["random weights: the embeddings mean nothing", *_merge_adapters(state, heads, weights.spec, weights)]
        return weights.spec, state | heads, tuple(notes)
    config = _read_config(weights.config, weights.spec) if weights.config else {}
    raw: State = {}
    for file in weights.files:
        tensors, settings = _read_file(file)
        config = settings | config
        for name, tensor in tensors.items():
            _put(raw, _WRAPPERS.sub("", name), tensor, weights)
    check_unchanged(weights)
    _refuse_others(raw, weights.place)
    key = weights.spec.family if weights.spec else config.get("family") or by_tensors(raw) or DEFAULT
    family = FAMILIES[key]
    state, left_out = _renamed(raw, family, weights)
    spec = _spec_of(state, config, key, weights)
    heads = heads_in(raw, spec)
    of_decoder = _settle_decoder(heads, _of_heads(raw, spec), state["embed_tokens.weight"], config.get("tied", True))
    notes = [*weights.notes, *family.settle(state, spec)]
    if left_out:
        notes.append(f"a head of its own in the checkpoint is left out: {_some(left_out)}")
    _check_shapes(state, spec, weights)
    notes = [*notes, *of_decoder, *_merge_adapters(state, heads, spec, weights)]
    return spec, state | heads, tuple(notes)


def _merge_adapters(state: State, heads: State, spec: ModelSpec, weights: Weights) -> list[str]:
    """Merge each adapter in its order, in float32, into tensors [...] under the names here. Returns notes."""
    if not weights.adapters:
        return []
    from virnucpro_cli.model.adapters import merge

    notes = []
    for adapter in weights.adapters:
        notes += merge(state, heads, adapter, read_tensors(adapter.files[1]), spec)
    check_unchanged(weights)
    return notes


def _refuse_others(names: Iterable[str], place: str) -> None:
    """Raise UserError for tensors or classes of a model that is none of the families here."""
    for name in names:
        for title, pattern in OTHERS.items():
            if pattern.search(name):
                raise UserError(
                    f"{place} is an {title}: it has {name}.",
                    f"It is another model. Use one of {', '.join(each.TITLE for each in FAMILIES.values())}.",
                )


def spec_of(weights: Weights) -> ModelSpec:
    """The architecture, reading as little as possible: known by name, from config.json, or from the tensors."""
    return weights.spec or load(weights)[0]


def _read_config(path: Path, spec: ModelSpec | None = None) -> dict[str, Any]:
    """Fields of the spec, its family (the one of a spec that is known), and whether the token head is tied."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    said = config if isinstance(config, dict) else {}
    classes = said.get("architectures")
    _refuse_others((each for each in classes if isinstance(each, str)) if isinstance(classes, list) else (), str(path))
    alike = [key for key, row in TABLE.items() if _is(said.get("model_type"), row.config["model_type"][0])]
    key = spec.family if spec else min(alike or [DEFAULT], key=lambda key: _distance(said, TABLE[key]))
    family = FAMILIES[key]
    sizes = {field: _first_of(said, words) for field, words in family.SETTINGS.items()}
    if not isinstance(config, dict) or not all(isinstance(size, int | None) for size in sizes.values()):
        raise UserError(f"{path} is not a model's configuration.", "Fetch or copy the model directory again.")
    for there, found, value in _contradictions(config, TABLE[key].config | family.CONFIG):
        wanted = " or ".join(map(repr, sorted(value))) if isinstance(value, frozenset) else repr(value)
        raise UserError(f"{path} is not {family.TITLE}: {there} is {found!r}, and {family.TITLE} has {wanted}.")
    return {**sizes, "family": key, "tied": config.get("tie_word_embeddings", True)}


def _first_of(config: dict[str, Any], words: tuple[str, ...]) -> Any:
    return next((config[word] for word in words if word in config), None)


def _contradictions(config: dict[str, Any], wanted: dict[str, tuple[Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Words of a configuration that are not a family's: the word, its value, and the family's; wanted: as in a row."""
    found = [(word, config.get(word, default), value) for word, (value, default) in wanted.items()]
    return [each for each in found if not _is(each[1], each[2]) and not (each[2] is False and each[1] is None)]


def _is(found: Any, value: Any) -> bool:
    """Whether a value of a configuration is the family's, or one of a family's set."""
    return found == value or (isinstance(value, frozenset) and isinstance(found, str) and found in value)


def _distance(config: dict[str, Any], row: Row) -> tuple[int, bool]:
    """How far a configuration is from a family's; the classes that it names decide between equals."""
    classes = config.get("architectures")
    named = isinstance(classes, list) and any(each in row.architectures for each in classes)
    return len(_contradictions(config, row.config)), not named


def read_tensors(path: Path) -> State:
    """The tensors of one file, as they are named there, in its own shapes [...] and dtypes. Raises UserError."""
    return _read_file(path)[0]


def _read_file(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        path.open("rb").close()  # says why it cannot be opened: safetensors calls it absent, whatever the reason
        if path.suffix == ".safetensors":
            return load_file(path), {}
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before zip archives cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise KeyError, TypeError, AssertionError and more
        if stop := stopping.stop_in(error):
            raise stop from None
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path} cannot be loaded safely: it holds more than tensors, or is damaged.",
                "Only tensors are read from pickles; convert the file to safetensors.",
            ) from None
        first = (str(error).strip() or "it ends early").splitlines()[0]
        unreadable = UserError(f"{path} is not a readable checkpoint: {first}.", "Fetch or copy it again.")
        raise too_many_open(path, error) or unreadable from None
    tensors = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(tensors, dict):
        under = " under 'model'" if isinstance(content, dict) else ""
        raise UserError(f"{path} holds a {type(tensors).__name__}{under}, not a dict of tensors.")
    settings = content.get("cfg", {}).get("model") if isinstance(content.get("cfg"), dict) else content.get("args")
    if getattr(settings, "token_dropout", True) is False:
        raise UserError(f"{path} is of a model without token dropout: its embeddings are scaled in another way.")
    words = FAMILIES[DEFAULT].SETTINGS if settings is not None else {}
    said = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    sizes = {field: _first_of(said, each) for field, each in words.items()}
    return {k: v for k, v in tensors.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}, sizes


def _put(into: State, name: str, tensor: torch.Tensor, weights: Weights) -> None:
    """Raise UserError if the name is taken by other values."""
    if name in into and not torch.equal(into[name], tensor):
        raise UserError(
            f"{weights.place} holds two different tensors that are {name}.",
            "Save one model alone: an average of weights or a second copy is in the file too.",
        )
    into[name] = tensor


def _renamed(raw: State, family: Family, weights: Weights) -> tuple[State, list[str]]:
    """The encoder's tensors, and the names that are of a head of the checkpoint's own."""
    state: State = {}
    unknown = []
    for name, tensor in raw.items():
        plain = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if (match := name_in(family.NAMES, plain)) is not None:
            _put(state, match, tensor, weights)
        elif not family.LEFT_OUT.fullmatch(name):
            unknown.append(name)
    within_esm = any(name.startswith(("esm.", "esmc.")) for name in raw)
    refused = [name for name in unknown if not within_esm or _OF_THE_ENCODER.search(name)]
    if refused:
        raise UserError(
            f"{weights.place} holds tensors that {family.TITLE} does not have: {_some(refused)}.",
            "An adapter (LoRA) is given by --adapter, or merged beforehand. Other architectures are not supported.",
        )
    return state, unknown


def _spec_of(state: State, config: dict[str, Any], family: str, weights: Weights) -> ModelSpec:
    if "embed_tokens.weight" not in state:
        raise UserError(f"{weights.place} has no token embedding: it is no checkpoint of {FAMILIES[family].TITLE}.")
    named, told = weights.spec, FAMILIES[family].told_sizes(state)
    numbers = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
    layers = config.get("layers") or max(numbers, default=-1) + 1
    hidden = config.get("hidden") or state["embed_tokens.weight"].shape[-1]
    heads = config.get("heads") or told.get("heads") or (named.heads if named else 0)
    if not heads or hidden % heads or (hidden // heads) % 2:
        raise UserError(
            f"{weights.place} does not say how many attention heads it has.",
            "Put its config.json beside it, or give a HuggingFace directory with it.",
        )
    name = named.name if named else _published_name(layers, hidden, heads, family) or weights.name
    inner = config.get("inner") or told.get("inner")
    spec = ModelSpec(name, layers, hidden, heads, family, TABLE[family].longest, inner)
    if named not in (None, spec):
        raise UserError(
            f"{weights.place} is not {name}: it has {layers} layers of {hidden} with {heads} heads.",
            "Remove it from the cache and fetch again.",
        )
    return spec


def _published_name(layers: int, hidden: int, heads: int, family: str) -> str | None:
    """The only published model of a family with these sizes, if there is one.

    The demo and weights whose licence has to be accepted are what they are by their own names only.
    """
    sizes = (layers, hidden, heads, family)
    known = [each for each in SIZES.values() if (each.layers, each.hidden, each.heads, each.family) == sizes]
    names = [each.name for each in known if each != DEMO and not family_of(each).licence(each).to_accept]
    return names[0] if len(names) == 1 else None


def _of_heads(raw: State, spec: ModelSpec) -> State:
    """Tensors of heads in a file, [...] as there, under the names here."""
    names = {name: name_in(family_of(spec).HEAD_NAMES, name) for name in raw}
    return {here: raw[name] for name, here in names.items() if here is not None}


def heads_in(raw: State, spec: ModelSpec) -> State:
    """The heads of which all tensors are in a file, in the shapes [...] of `head_shapes` and the dtypes of the file."""
    heads: State = {}
    named = _of_heads(raw, spec)
    for head, tensors in family_of(spec).head_shapes(spec).items():
        there = {f"{head}.{part}": named.get(f"{head}.{part}") for part in tensors}
        if [None if each is None else tuple(each.shape) for each in there.values()] == list(tensors.values()):
            heads |= there  # type: ignore[arg-type]
    return heads


def _settle_decoder(heads: State, named: State, table: torch.Tensor, tied: bool) -> list[str]:
    """Add the last matrix [V, D] of the token head if it is one of its own, not the token embedding. Returns notes.

    named: every tensor of a head in the file. A family whose head always has a matrix of its own has it already.

    The head is left out if the file and its configuration contradict each other (`tie_word_embeddings`).
    """
    if f"{LM_HEAD}.bias" not in heads or DECODER in heads:
        return []
    there = [named[name] for name in (DECODER, f"{LM_HEAD}.weight") if name in named]
    apart = [each for each in there if each.shape != table.shape or not torch.equal(each.to(table.dtype), table)]
    if not apart and (tied or there):
        return []
    if len(apart) == 1 and not tied and apart[0].shape == table.shape:
        heads[DECODER] = apart[0]
        return ["the token head has a last matrix of its own (tie_word_embeddings is false)"]
    for name in [name for name in heads if name.startswith(f"{LM_HEAD}.")]:
        del heads[name]
    return [f"the token head is left out: its last matrix ({DECODER}) and tie_word_embeddings contradict each other"]


def _check_shapes(state: State, spec: ModelSpec, weights: Weights) -> None:
    expected = {**family_of(spec).shapes(spec), INV_FREQ: (spec.head_dim // 2,)}
    if missing := [name for name in expected if name not in state]:
        raise UserError(f"{weights.place} lacks {len(missing)} tensors of {spec.name}: {_some(missing)}.")
    for name, shape in expected.items():
        if (found := tuple(state[name].shape)) != shape:
            raise UserError(f"{weights.place}: {name} has shape {found}, and {spec.name} needs {shape}.")
    surplus = [name for name in state if name not in expected]
    if foreign := [name for name in surplus if not name.startswith("layers.")]:
        title = family_of(spec).TITLE
        raise UserError(f"{weights.place} holds tensors that {title} does not have: {_some(foreign)}.")
    if surplus:
        raise UserError(f"{weights.place} has more layers than its configuration says: {_some(surplus)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def random_state(spec: ModelSpec, seed: int = 0, device: torch.device | str = "cpu") -> State:
    """Random weights of trained-like scale, for benchmarks and tests, the same each time on the same kind of device.

    The family's names, float32 in its shapes [...].
    """
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, shape in family_of(spec).shapes(spec).items():
        mean, deviation = (1.0, 0.1) if name.endswith("weight") else (0.0, 0.02)  # of a LayerNorm, and of biases
        if len(shape) > 1:
            mean, deviation = 0.0, shape[-1] ** -0.5
        state[name] = torch.empty(shape, device=device).normal_(mean, deviation, generator=generator)
    family_of(spec).settle(state, spec)
    return state


def random_heads(spec: ModelSpec, seed: int = 0) -> State:
    """Random heads of trained-like scale, float32 in the shapes [...] of `head_shapes`, as `random_state`."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        f"{head}.{part}": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for head, tensors in family_of(spec).head_shapes(spec).items()
        for part, shape in tensors.items()
    }
