"""Checkpoints of every layout to one dict with the keys of fair-esm's `ESM2.state_dict()`, checked against the spec."""

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

from virnucpro_cli import alphabet, stopping
from virnucpro_cli.errors import UserError
from virnucpro_cli.model.locate import Weights, check_unchanged
from virnucpro_cli.model.spec import SIZES, VOCABULARY, ModelSpec

_HF_NAMES = (
    (r"embeddings\.word_embeddings\.weight", "embed_tokens.weight"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(weight|bias)", r"layers.\1.self_attn.\2_proj.\3"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.rotary_embeddings\.inv_freq", r"layers.\1.self_attn.rot_emb.inv_freq"),
    # transformers 5 keeps one for all layers, and saves it with the layer's number as a literal star
    (r"(encoder\.layer\.\*\.attention\.self\.)?rotary_embeddings\.inv_freq", "layers.0.self_attn.rot_emb.inv_freq"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"layers.\1.self_attn.out_proj.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.LayerNorm\.(weight|bias)", r"layers.\1.self_attn_layer_norm.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"layers.\1.fc1.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)", r"layers.\1.fc2.\2"),
    (r"encoder\.layer\.(\d+)\.LayerNorm\.(weight|bias)", r"layers.\1.final_layer_norm.\2"),
    (r"encoder\.emb_layer_norm_after\.(weight|bias)", r"emb_layer_norm_after.\1"),
)
_PROJECTIONS = {"query": "q", "key": "k", "value": "v"}
_EXTRA = re.compile(
    r"(esm\.)?(embeddings\.(position_ids|position_embeddings\.weight)|pooler\..*|contact_head\..*)"
    r"|lm_head\..*|classifier\..*|score\..*|qa_outputs\..*|embed_out|encoder\.lm_head\..*"
)
_OLD_NORM_NAME = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
State = dict[str, Any]
"""Tensors under the names of fair-esm's `ESM2.state_dict()`."""

CONTACT_HEAD, LM_HEAD = "contact_head.regression", "lm_head"
_PREFIXES = ("encoder.sentence_encoder.", "encoder.", "esm.", "model.")
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""Put before every name by data parallelism, torch.compile and PEFT."""
_OF_THE_ENCODER = re.compile(r"emb(ed|_)|encoder|layer|norm|position|rotary|lora|adapter|ia3", re.IGNORECASE)


def load(weights: Weights) -> tuple[ModelSpec, dict[str, Any], tuple[str, ...]]:
    """Read the files: spec, state under fair-esm's names (checked, on the CPU), and notes for the report. Of the heads for
    tokens and contacts, those that are whole; others are left out.

    Raises UserError naming the first tensors that are missing, mis-shaped or unknown inside the encoder.
    """
    if weights.seed is not None:
        assert weights.spec is not None
        state = random_state(weights.spec, weights.seed) | random_heads(weights.spec, weights.seed)
        return weights.spec, state, ("random weights: the embeddings mean nothing",)
    config = _read_config(weights.config) if weights.config else {}
    raw: dict[str, Any] = {}
    for file in weights.files:
        tensors, file_config = _read_file(file)
        raw.update(tensors)
        config = {**file_config, **config}
    check_unchanged(weights)
    raw = _unwrapped(raw, weights)
    state, unknown = _canonical(raw, weights)
    own = [
        name for name in unknown if any(each.startswith("esm.") for each in raw) and not _OF_THE_ENCODER.search(name)
    ]
    if unknown != own:
        raise UserError(
            f"{weights.place} holds tensors that ESM-2 does not have: {_some([x for x in unknown if x not in own])}.",
            "Adapters (LoRA and the like) must be merged into the weights first; other architectures are not supported.",
        )
    if (
        not config
        and any("position_embeddings" in name for name in raw)
        and not any("inv_freq" in name for name in raw)
    ):
        raise UserError(
            f"{weights.place} has learned positions and no inv_freq: it may be an ESM-1, which computes something else.",
            "If it is an ESM-2, give its HuggingFace directory with config.json.",
        )
    spec = _spec_of(state, config, weights)
    notes = [*weights.notes, *_settle_inv_freq(state, spec)]
    if own:
        notes.append(f"a head of its own in the checkpoint is left out: {_some(own)}")
    _check_shapes(state, spec, weights)
    heads = heads_in(raw, spec)
    notes += _settle_decoder(heads, raw, state, config)
    state |= heads
    return spec, state, tuple(notes)


def spec_of(weights: Weights) -> ModelSpec:
    """The architecture, reading as little as possible: known by name, from config.json, or from the tensors."""
    if weights.spec is not None:
        return weights.spec
    return load(weights)[0]


_HF_CONFIG: dict[str, tuple[Any, Any]] = {
    "model_type": ("esm", None),
    "position_embedding_type": ("rotary", "absolute"),
    "token_dropout": (True, False),
    "emb_layer_norm_before": (False, None),
    "layer_norm_eps": (1e-5, 1e-12),
    "hidden_act": ("gelu", "gelu"),
    "vocab_size": (VOCABULARY, VOCABULARY),
    "is_decoder": (False, None),
    "mask_token_id": (alphabet.MASK, alphabet.MASK),
}
"""What config.json must say, and what HuggingFace means where it says nothing: it leaves its defaults out."""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    if not isinstance(config, dict) or not all(isinstance(config.get(key, 1), int) for key in sizes):
        raise UserError(f"{path} is not a model's configuration.", "Fetch or copy the model directory again.")
    for key, (value, default) in _HF_CONFIG.items():
        found = config.get(key, default)
        if found != value and not (value is False and found is None):
            raise UserError(f"{path} is not an ESM-2: {key} is {found!r}, and ESM-2 has {value!r}.")
    return {
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "tied": config.get("tie_word_embeddings", True),
    }


def read_tensors(path: Path) -> State:
    """The tensors of one file, as they are named there. Raises UserError."""
    return _read_file(path)[0]


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch
    from safetensors.torch import load_file

    try:
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
        first = (str(error).strip() or "it ends early").splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path} cannot be loaded safely: it holds more than tensors, or is damaged.",
                "Only tensors are read from pickles; convert the file to safetensors.",
            ) from None
        raise UserError(f"{path} is not a readable checkpoint: {first}.", "Fetch or copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    settings = content.get("cfg", {}).get("model") if isinstance(content.get("cfg"), dict) else content.get("args")
    tensors = content.get("model", content)
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__} under 'model', not a dict of tensors.")
    config = {} if settings is None else {
        "layers": getattr(settings, "encoder_layers", None),
        "hidden": getattr(settings, "encoder_embed_dim", None),
        "heads": getattr(settings, "encoder_attention_heads", None),
    }  # fmt: skip
    return {k: v for k, v in tensors.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}, config


def _unwrapped(raw: State, weights: Weights) -> State:
    """The tensors without the prefixes that wrappers put before their names."""
    found: State = {}
    for name, tensor in raw.items():
        rest = name
        while prefix := next((each for each in _WRAPPERS if rest.startswith(each)), None):
            rest = rest.removeprefix(prefix)
        _put(found, rest, tensor, weights)
    return found


def _put(into: State, name: str, tensor: Any, weights: Weights) -> None:
    """Raise UserError if the name is taken by other values."""
    import torch

    if name in into and not torch.equal(into[name], tensor):
        raise UserError(
            f"{weights.place} holds two different tensors that are {name}.",
            "Save one model alone: an average of weights or a second copy is in the file too.",
        )
    into[name] = tensor


def _canonical(raw: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], list[str]]:
    state: State = {}
    unknown = []
    for name, tensor in raw.items():
        known = _canonical_name(_OLD_NORM_NAME.sub(lambda m: {"gamma": "weight", "beta": "bias"}[m.group()], name))
        if known is not None:
            _put(state, known, tensor, weights)
        elif not _EXTRA.fullmatch(name):
            unknown.append(name)
    return state, unknown


_FAIR_ESM_NAME = re.compile(
    r"embed_tokens\.weight|emb_layer_norm_after\.(weight|bias)|layers\.\d+\.(self_attn\.rot_emb\.inv_freq"
    r"|(self_attn\.[qkv]_proj|self_attn\.out_proj|self_attn_layer_norm|fc1|fc2|final_layer_norm)\.(weight|bias))"
)


def _canonical_name(name: str) -> str | None:
    for prefix in ("", *_PREFIXES):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            if _FAIR_ESM_NAME.fullmatch(rest):
                return rest
            for pattern, template in _HF_NAMES:
                match = re.fullmatch(pattern, rest)
                if match:
                    return re.sub("query|key|value", lambda m: _PROJECTIONS[m.group()], match.expand(template))
    return None


def _spec_of(state: dict[str, Any], config: dict[str, Any], weights: Weights) -> ModelSpec:
    if "embed_tokens.weight" not in state:
        raise UserError(f"{weights.place} has no token embedding: it is not an ESM-2 checkpoint.")
    numbers = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
    layers = config.get("layers") or (max(numbers) + 1 if numbers else 0)
    hidden = config.get("hidden") or state["embed_tokens.weight"].shape[-1]
    known = next((spec for spec in SIZES.values() if (spec.layers, spec.hidden) == (layers, hidden)), None)
    inv_freq = state.get("layers.0.self_attn.rot_emb.inv_freq")
    heads = (
        config.get("heads")
        or (hidden // (2 * len(inv_freq)) if inv_freq is not None and len(inv_freq) else None)
        or (weights.spec.heads if weights.spec is not None else None)
    )
    if not heads or hidden % heads or (hidden // heads) % 2:
        raise UserError(
            f"{weights.place} does not say how many attention heads it has.",
            "Put its config.json beside it, or give a HuggingFace directory with it.",
        )
    if weights.spec is not None and (weights.spec.layers, weights.spec.hidden, weights.spec.heads) != (
        layers,
        hidden,
        heads,
    ):
        raise UserError(
            f"{weights.place} is not {weights.spec.name}: it has {layers} layers of {hidden} with {heads} heads.",
            "Remove it from the cache and fetch again.",
        )
    return weights.spec or ModelSpec(
        known.name if known and known.heads == heads else weights.name, layers, hidden, heads
    )


def _settle_inv_freq(state: dict[str, Any], spec: ModelSpec) -> list[str]:
    """Make layer 0's inv_freq stand for all, checking that they agree. Returns notes."""
    import torch

    names = [name for name in state if name.endswith("inv_freq")]
    expected = half_rounded_inv_freq(spec)
    if not names:
        state["layers.0.self_attn.rot_emb.inv_freq"] = expected
        return ["the checkpoint has no inv_freq; the fp16-rounded exact values are used, as ESM-2 was trained"]
    found = [state.pop(name).float() for name in names]
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise UserError("The checkpoint's layers have different inv_freq; ESM-2 has one for all.")
    state["layers.0.self_attn.rot_emb.inv_freq"] = found[0]
    if found[0].shape == expected.shape and not torch.equal(found[0], expected):
        return ["the checkpoint's inv_freq is not the fp16-rounded one of ESM-2; it is used as it stands"]
    return []


def half_rounded_inv_freq(spec: ModelSpec) -> Any:
    """`1 / 10000^(2i / head_dim)` rounded to fp16, float32 [head_dim / 2]: the values that ESM-2's checkpoints hold."""
    import torch

    exact = 1.0 / 10000.0 ** (torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim)
    return exact.half().float()


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the encoder under fair-esm's name, with its shape."""
    d = spec.hidden
    expected: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, d)}
    for i in range(spec.layers):
        linear = {f"self_attn.{p}_proj": (d, d) for p in ("q", "k", "v", "out")} | {
            "fc1": (4 * d, d),
            "fc2": (d, 4 * d),
        }
        for name, (rows, columns) in linear.items():
            expected[f"layers.{i}.{name}.weight"] = (rows, columns)
            expected[f"layers.{i}.{name}.bias"] = (rows,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            expected[f"layers.{i}.{name}.weight"] = expected[f"layers.{i}.{name}.bias"] = (d,)
    expected["emb_layer_norm_after.weight"] = expected["emb_layer_norm_after.bias"] = (d,)
    return expected


def head_shapes(spec: ModelSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Every tensor of each head under fair-esm's name, with its shape; the token embedding is the last matrix of lm_head."""
    d = spec.hidden
    return {
        LM_HEAD: {
            "dense.weight": (d, d), "dense.bias": (d,), "layer_norm.weight": (d,), "layer_norm.bias": (d,), "bias": (VOCABULARY,),
        },
        CONTACT_HEAD: {"weight": (1, spec.layers * spec.heads), "bias": (1,)},
    }  # fmt: skip


def heads_in(raw: State, spec: ModelSpec) -> State:
    """The heads of which all tensors are in a file, in their shapes."""
    found: State = {}
    for head, tensors in head_shapes(spec).items():
        there = {name: raw.get(name, raw.get(f"esm.{name}", raw.get(f"encoder.{name}")))
                 for name in (f"{head}.{part}" for part in tensors)}  # fmt: skip
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in there.values()]
        if shapes == list(tensors.values()):
            found |= there
    return found


DECODER = f"{LM_HEAD}.decoder.weight"


def _settle_decoder(heads: State, raw: State, state: State, config: dict[str, Any]) -> list[str]:
    """Add the last matrix [33, D] of the token head if it is one of its own, not the token embedding. Returns notes.

    The head is left out if the file and its configuration contradict each other (`tie_word_embeddings`).
    """
    import torch

    if f"{LM_HEAD}.bias" not in heads:
        return []
    names = (DECODER, f"{LM_HEAD}.weight")
    there = [
        raw[f"{prefix}{name}"] for name in names for prefix in ("", "esm.", "encoder.") if f"{prefix}{name}" in raw
    ]
    table, tied = state["embed_tokens.weight"], config.get("tied", True)
    apart = [each for each in there if each.shape != table.shape or not torch.equal(each.to(table.dtype), table)]
    if not apart and (tied or there):
        return []
    if len(apart) == 1 and not tied and apart[0].shape == table.shape:
        heads[DECODER] = apart[0]
        return ["the token head has a last matrix of its own (tie_word_embeddings is false)"]
    for name in [name for name in heads if name.startswith(f"{LM_HEAD}.")]:
        del heads[name]
    return [f"the token head is left out: its last matrix ({DECODER}) and tie_word_embeddings contradict each other"]


def random_heads(spec: ModelSpec, seed: int = 0) -> State:
    """Random heads of trained-like scale, as `random_state`."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    found = {}
    for head, tensors in head_shapes(spec).items():
        for part, shape in tensors.items():
            found[f"{head}.{part}"] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    return found


def _check_shapes(state: dict[str, Any], spec: ModelSpec, weights: Weights) -> None:
    expected = {**shapes(spec), "layers.0.self_attn.rot_emb.inv_freq": (spec.head_dim // 2,)}
    missing = [name for name in expected if name not in state]
    if missing:
        raise UserError(f"{weights.place} lacks {len(missing)} tensors of {spec.name}: {_some(missing)}.")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UserError(
                f"{weights.place}: {name} has shape {tuple(state[name].shape)}, and {spec.name} needs {shape}."
            )
    surplus = [name for name in state if name not in expected]
    if surplus:
        raise UserError(f"{weights.place} has more layers than its configuration says: {_some(surplus)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def random_state(spec: ModelSpec, seed: int = 0, device: Any = "cpu") -> dict[str, Any]:
    """Random weights of trained-like scale, for benchmarks and tests, the same each time on the same kind of device.

    fair-esm's names, float32.
    """
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, shape in shapes(spec).items():
        tensor = torch.empty(shape, device=device)
        if name.endswith("layer_norm.weight") or name == "emb_layer_norm_after.weight":
            tensor.normal_(1.0, 0.1, generator=generator)
        elif len(shape) == 1:
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.normal_(0.0, shape[-1] ** -0.5, generator=generator)
        state[name] = tensor
    state["layers.0.self_attn.rot_emb.inv_freq"] = half_rounded_inv_freq(spec)
    return state
