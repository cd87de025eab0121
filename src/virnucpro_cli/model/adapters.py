"""PEFT's LoRA and DoRA adapters: what their files say, and their merge into weights in float32.

Shapes: a matrix [out, in] and its low-rank factors A [r, in] and B [out, r]; the token table [V, D] is the other way.
A matrix of the wrapped model may be several here, one below the other.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from virnucpro_cli.errors import UserError, counted, unread
from virnucpro_cli.model.families import by_name, family_of
from virnucpro_cli.model.locate import ADAPTER_CONFIG, Adapter, Weights, adapter_in
from virnucpro_cli.model.spec import DECODER, INV_FREQ, LM_HEAD, Family, ModelSpec, State, name_in, pieces_of

PLAIN_STARTS = (True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base as it was."""
CHANGED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
HARMLESS = frozenset((
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size",
    "lora_bias", "runtime_config", "ephemeral_gpu_offload", "target_parameters",
))  # fmt: skip
"""Fields that the merge heeds, and fields that change nothing of it. Any other is refused where it is set."""

_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|_orig_mod\.)+")
_PARTS = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?")
_WORD_OF_PEFT = re.compile(r"lora|adapter|ia3|vera|prompt", re.IGNORECASE)
_OF_THE_ENCODER = re.compile(r"(^|\.)(esmc?|encoder|transformer|layers?|blocks|embed\w*)\.")
_PREFIXES = ("esm.", "esmc.")


class _Base(NamedTuple):
    """The model that is adapted: its tensors [...] by the names here."""

    spec: ModelSpec
    state: State
    heads: State

    def pieces(self, name: str) -> tuple[str, ...]:
        """Names here of the tensors that are the one of this name in the wrapped model; none if a piece is absent."""
        family = family_of(self.spec)
        here = name_here(name, family, self.spec)
        found = pieces_of(here, family.JOINT) if here else ()
        return found if all(each in self.state or each in self.heads for each in found) else ()

    def of(self, piece: str) -> State:
        """The tensors among which that of a name here is, or belongs."""
        return self.state if piece in self.state else self.heads

    def joined(self, pieces: tuple[str, ...]) -> torch.Tensor:
        """The matrix [out, in] or table [V, D] of these pieces, or a vector [out], float32."""
        parts = [self.of(each)[each].float() for each in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class _Change:
    """Tensors of an adapter, by their parts, for one matrix of the base, which is in `pieces` here.

    path: of its module, or its own if `target_parameters` names it; the keys of alpha_pattern are compared with it.
    """

    path: str
    pieces: tuple[str, ...]
    parts: State = field(default_factory=dict)


def with_adapters(weights: Weights, folders: Iterable[str]) -> Weights:
    """The weights with the adapters of these folders, in order, behind one that lies beside the weights.

    One of the folders may be that one. Raises UserError for an adapter that cannot be merged.
    """
    adapters = []
    for folder in map(Path, folders):
        _settings(folder)
        adapters.append(adapter_in(folder))
    named = {each.folder.resolve() for each in adapters}
    if len(named) < len(adapters):
        raise UserError("--adapter names the same folder twice.", "Give it once.")
    beside = tuple(each for each in weights.adapters if each.folder.resolve() not in named)
    return replace(weights, adapters=(*beside, *adapters))


def _settings(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError, with the reason, if no merge gives this adapter's rows."""
    path = folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"The adapter {unread(str(path), error)}.", "Give a folder that PEFT saved.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.", "Copy the folder again.") from None
    if not isinstance(settings, dict) or not _is_readable(settings):
        raise UserError(f"{path} is not the configuration of an adapter.", "Copy the folder again.")
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{folder} is an adapter of type {kind!r}; LoRA and DoRA can be merged.", _MERGE_FIRST)
    start = settings.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if str(start).startswith(CHANGED_STARTS):
        raise UserError(
            f"{folder} began as {start}, which changed the weights of the base too: its factors fit no other base.",
            "Save it with PEFT's path_initial_model_for_weight_conversion, or merge it into its own base.",
        )
    if start not in PLAIN_STARTS:
        raise UserError(f"{folder} began in an unknown way: init_lora_weights is {start!r}.", _MERGE_FIRST)
    if unknown := sorted(name for name, value in settings.items() if value and name not in HARMLESS):
        raise UserError(f"{folder} uses {', '.join(unknown)}, of which no merge is known here.", _MERGE_FIRST)
    return settings


def _is_readable(settings: dict[str, Any]) -> bool:
    patterns, targets = settings.get("alpha_pattern") or {}, settings.get("target_parameters") or []
    return isinstance(patterns, dict) and isinstance(targets, list) and all(isinstance(each, str) for each in targets)


_MERGE_FIRST = "Merge it with PEFT (merge_and_unload), save the model, and give that with --model."


def merge(state: State, heads: State, adapter: Adapter, tensors: State, spec: ModelSpec) -> list[str]:
    """Merge an adapter's tensors into a model's, in float32. Returns notes.

    state, heads: the model's tensors [out, in], [out] and [V, D], under the names here; changed tensors are new ones.
    tensors: of the adapter's file, as they are named there. Raises UserError for what the base does not have.
    """
    settings, base = _settings(adapter.folder), _Base(spec, state, heads)
    table = state["embed_tokens.weight"]
    is_tied = f"{LM_HEAD}.bias" in heads and DECODER not in heads
    if is_tied:  # PEFT's forward adapts the embedding alone, or the last matrix alone
        heads[DECODER] = table
    kept, changes, left_out = _sorted(tensors, base, settings, adapter)
    for name, tensor in kept.items():
        there = base.joined((name,))
        if there.shape != tensor.shape:
            raise _other_shape(adapter, settings, name, tuple(tensor.shape), tuple(there.shape))
        if name == INV_FREQ and not torch.equal(there, tensor.float()):
            raise UserError(f"{adapter.folder} has another inv_freq than its base.", _MERGE_FIRST)
        base.of(name)[name] = tensor.float()
    for change in changes:
        _merge_one(base, change, settings, adapter)
    if is_tied and heads[DECODER] is state["embed_tokens.weight"]:
        del heads[DECODER]
    if not kept and not changes:
        made_for = f"Give an adapter that was made for {family_of(spec).TITLE}."
        raise UserError(f"{adapter.folder} holds nothing that the encoder has.", made_for)
    return [*_told(adapter, settings, len(changes), len(kept), spec), *_told_left_out(adapter, left_out)]


def _sorted(
    tensors: State, base: _Base, settings: dict[str, Any], adapter: Adapter
) -> tuple[State, list[_Change], list[str]]:
    """Tensors that replace one, by its name here; changes; and names of tensors of a head that is not here."""
    kept, left_out, changes = State(), list[str](), dict[tuple[str, ...], _Change]()
    modules: dict[str, State] = {}
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        match = _PARTS.fullmatch(name)
        path, part = (match[1], match[2]) if match else (name, "")
        modules.setdefault(path, State())[part] = tensor
    has_prefix = any(name.startswith(_PREFIXES) for name in plain)
    for path, parts in modules.items():
        whole, own = path.replace(".base_layer.", ".").replace(".modules_to_save.", "."), path
        if "" not in parts:
            whole, own = _matrix(path, parts, settings.get("target_parameters") or [], base, adapter)
        if pieces := base.pieces(whole):
            if "" in parts:
                kept |= zip(pieces, parts[""].chunk(len(pieces)), strict=False)
            elif changes.setdefault(pieces, change := _Change(own, pieces, parts)) is not change:
                raise UserError(f"{adapter.folder} adapts {whole} twice.", _MERGE_FIRST)
        elif _is_of_a_head(whole, has_prefix, family_of(base.spec)):
            left_out += [name for name in plain if name == path or name.startswith(f"{path}.lora_")]
        elif not whole.endswith("inv_freq"):
            missing = f"{adapter.folder} changes {whole}, which {base.spec.name} does not have."
            raise UserError(missing, "Give the base it was made for.")
    return kept, list(changes.values()), left_out


def _matrix(path: str, parts: State, targets: list[str], base: _Base, adapter: Adapter) -> tuple[str, str]:
    """The name in the wrapped model of the matrix that a module's factors change, and the path of its `_Change`.

    Files name the module alone where `target_parameters` names a matrix. If it has several, adapters stand around it
    one in the other, in any order, and the shapes of the factors tell which matrix is whose.
    """
    module = re.sub(r"(\.base_layer)+$", "", path)
    named = [f"{module}.{target.rpartition('.')[2]}" for target in targets]
    named = [name for name, target in zip(named, targets, strict=True) if f".{name}".endswith(f".{target}")]
    if named := [name for name in named if base.pieces(name)]:
        factors = [tuple(parts[key].shape) for key in ("lora_B.weight", "lora_A.weight") if key in parts]
        shape = (*factors[0][:1], *factors[-1][-1:]) if factors else ()
        name = next((name for name in named if base.joined(base.pieces(name)).shape == shape), named[0])
        return name, name
    if base.pieces(f"{path}.layer_norm_weight"):
        raise UserError(
            f"{adapter.folder} adapts {path} before its LayerNorm, which no merge into its weights can do.",
            "Train it with target_parameters, or on the model of transformers.",
        )
    return f"{path}.weight", path


def name_here(name: str, family: Family, spec: ModelSpec) -> str | None:
    """The name here of a tensor of the wrapped model, in the encoder or in a head; None if there is none."""
    plain = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if (here := name_in(family.NAMES, plain)) is not None:
        return here
    short = name_in(family.HEAD_NAMES, plain)
    heads = {f"{head}.{part}" for head, parts in family.head_shapes(spec).items() for part in parts}
    return short if short in heads or short == DECODER else None


def _is_of_a_head(name: str, has_prefix: bool, family: Family) -> bool:
    if family.LEFT_OUT.fullmatch(name):
        return True
    outside = not name.startswith(_PREFIXES) if has_prefix else not _OF_THE_ENCODER.search(name)
    return outside and not _WORD_OF_PEFT.search(name)


def _merge_one(base: _Base, change: _Change, settings: dict[str, Any], adapter: Adapter) -> None:
    """Merge the parts of one module: its matrix [out, in], or the token table [V, D], and its bias [out]."""
    parts, weight = {part: tensor.float() for part, tensor in change.parts.items()}, base.joined(change.pieces)
    is_table = "lora_embedding_A" in parts
    keys = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
    magnitude, has_dora = parts.get("lora_magnitude_vector"), bool(settings.get("use_dora"))
    if any(key not in parts for key in keys) or (magnitude is None) == has_dora:
        raise UserError(f"{adapter.folder} has no whole adapter for {change.path}.", "Copy the folder again.")
    a, b = (parts[key] for key in keys)
    needed = tuple(reversed(weight.shape)) if is_table else tuple(weight.shape)
    out, columns = needed[0], needed[-1]
    if len(needed) != 2 or a.ndim != 2 or a.shape[1] != columns or b.shape != (out, len(a)) or not len(a):
        found = (*b.shape[:1], *a.shape[1:])
        raise _other_shape(adapter, settings, change.path, found, needed)
    ranks = {settings.get("r", len(a)), *(settings.get("rank_pattern") or {}).values()}
    if len(a) not in ranks:
        of_config = ", ".join(map(str, sorted(ranks, key=str)))
        refusal = (
            f"{adapter.folder} contradicts itself: {change.path} has rank {len(a)}, its configuration {of_config}."
        )
        raise UserError(refusal, "Copy the folder again.")
    scale = _scale(len(a), change.path, settings, adapter)
    delta = (b @ a).T * scale if is_table else b @ a * scale
    merged = weight + delta
    if magnitude is not None:
        if magnitude.shape != (out,):
            raise _other_shape(adapter, settings, f"{change.path}.lora_magnitude_vector", (*magnitude.shape,), (out,))
        norm = torch.linalg.norm(merged, dim=0 if is_table else 1)
        factor = magnitude / norm
        merged = (factor if is_table else factor[:, None]) * merged
    base.of(change.pieces[0]).update(zip(change.pieces, merged.chunk(len(change.pieces)), strict=True))
    if (bias := parts.get("lora_B.bias")) is not None:
        name = f"{change.pieces[0].removesuffix('.weight')}.bias".replace("decoder.bias", "bias")
        into = base.of(name)
        if name not in into or into[name].shape != bias.shape:
            raise _other_shape(adapter, settings, f"{change.path}.bias", tuple(bias.shape), (out,))
        into[name] = into[name].float() + bias * scale


def _scale(rank: int, path: str, settings: dict[str, Any], adapter: Adapter) -> float:
    """Factor of B A: alpha / r, or alpha / sqrt(r). alpha is of the first pattern that fits the module's path."""
    patterns, alpha = settings.get("alpha_pattern") or {}, settings.get("lora_alpha", 8)
    try:
        fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
        alpha = next(fitting, alpha)
    except re.error as error:
        raise UserError(f"{adapter.folder}: alpha_pattern has no regular expression: {error}.") from None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{adapter.folder}: lora_alpha is {alpha!r}, and must be a number.")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _other_shape(
    adapter: Adapter, settings: dict[str, Any], name: str, found: tuple[int, ...], needed: tuple[int, ...]
) -> UserError:
    base = settings.get("base_model_name_or_path")
    return UserError(
        f"{adapter.folder} does not fit the model: {name} has shape {found}, and the model needs {needed}.",
        f"It was made for {base}: give that with --model." if base else "Give the base that it was made for.",
    )


def _told(adapter: Adapter, settings: dict[str, Any], changed: int, kept: int, spec: ModelSpec) -> list[str]:
    kind = "DoRA" if settings.get("use_dora") else "LoRA"
    replaced = f", {counted(kept, 'tensor')} replaced" if kept else ""
    notes = [f"adapter {adapter.folder}: {kind} merged into {counted(changed, 'module')}{replaced}"]
    base = settings.get("base_model_name_or_path")
    known = by_name(base) if isinstance(base, str) else None
    if known is not None and known.name != spec.name:
        notes.append(f"adapter {adapter.folder} was made for {known.name}, and is merged into {spec.name}")
    return notes


def _told_left_out(adapter: Adapter, names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    words = f"adapter {adapter.folder}: a task head is left out: {', '.join(names[:3])}{more}"
    return [words] if names else []
