"""The table of model families. A new family is a file and a row; nothing else knows which family runs."""

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import PROTEIN, UNMASKED
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.dnabert import DNABERT
from virnucpro_cli.model.dplm import DPLM
from virnucpro_cli.model.esm1 import ESM1B, ESM1V
from virnucpro_cli.model.esm2 import DEMO as DEMO
from virnucpro_cli.model.esm2 import ESM2
from virnucpro_cli.model.esmc import ESMC
from virnucpro_cli.model.lucavirus import LUCAVIRUS
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.spec import CONTACT_HEAD, LM_HEAD, Family, ModelSpec, State

FAMILIES: dict[str, Family] = {
    "esm2": ESM2, "dplm": DPLM, "esm1b": ESM1B, "esm1v": ESM1V, "esmc": ESMC, "lucavirus": LUCAVIRUS,
    "dnabert": DNABERT,
}  # fmt: skip
SIZES = {name: spec for family in FAMILIES.values() for name, spec in family.SIZES.items()}
SHORT_NAMES = {short: name for family in FAMILIES.values() for short, name in family.SHORT_NAMES.items()}
PUBLISHED_SHA256 = {name: pins for family in FAMILIES.values() for name, pins in family.PUBLISHED_SHA256.items()}


def by_name(name: str) -> ModelSpec | None:
    """The spec of `esm2_t33_650M_UR50D` (also after `facebook/`), `650M`, `650`, `ESM2-650M` or `demo`, in any case.

    None for anything else.
    """
    plain = name.lower().removeprefix("facebook/")
    full = next((family.ALIASES[plain] for family in FAMILIES.values() if plain in family.ALIASES), plain)
    return {known.lower(): spec for known, spec in SIZES.items()}.get(full.lower())


def short_name(spec: ModelSpec) -> str:
    """The shortest name of a published model; of others, the name that they have."""
    return next((short for short, name in SHORT_NAMES.items() if name == spec.name), spec.name)


def family_of(spec: ModelSpec) -> Family:
    return FAMILIES[spec.family]


def reading(spec: ModelSpec, kind: str = PROTEIN) -> Reading:
    """How a family reads input of a kind. Raises UserError for one that it does not read."""
    found = family_of(spec).READING if kind == PROTEIN else family_of(spec).NUCLEOTIDES
    if found is None and kind == PROTEIN:
        remedy = "Give nucleotides with --kind nucleotide, or name another --model."
        raise UserError(f"{spec.name} reads nucleotides only, no proteins.", remedy)
    if found is None:
        able = [each.TITLE for each in FAMILIES.values() if each.NUCLEOTIDES]
        raise UserError(
            f"{spec.name} reads proteins only, not --kind {kind}.", f"Leave it out, or use {' or '.join(able)}."
        )
    return found


def reading_of(attributes: Mapping[str, Any]) -> Reading:
    """How the family of a file with these attributes reads its input; a file without a known one is ESM-2's."""
    family = FAMILIES.get(str(attributes.get("family")), ESM2)
    nucleotides = family.NUCLEOTIDES if attributes.get("kind", PROTEIN) != PROTEIN else None
    found = nucleotides or family.READING or family.NUCLEOTIDES
    assert found is not None
    return found


def check_dtype(spec: ModelSpec, dtype: torch.dtype) -> None:
    """Raise UserError for fp8 of a family whose largest values are not known beforehand."""
    if dtype == torch.float8_e4m3fn and not family_of(spec).FP8:
        raise UserError(
            f"{spec.name} is not computed in fp8: there are no scales for {family_of(spec).TITLE} yet.",
            "Use --dtype fp16.",
        )


def emitted(spec: ModelSpec) -> list[str]:
    """Kinds of --emit that a model has heads for."""
    heads = family_of(spec).head_shapes(spec)
    return [*(UNMASKED if LM_HEAD in heads else ()), *(["contacts"] if CONTACT_HEAD in heads else [])]


def check_emit(spec: ModelSpec, emit: tuple[str, ...]) -> None:
    """Raise UserError for what --emit names and no weights of the model have a head for."""
    if lacking := [name for name in emit if name not in emitted(spec)]:
        heads = dict.fromkeys("contact regression" if name == "contacts" else "language-model head" for name in lacking)
        raise UserError(f"{spec.name} has no {' and no '.join(heads)}.", f"Leave --emit {','.join(lacking)} out.")


def products(spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Depth and columns of the four products of a layer: q, k and v together, out, what widens, and what narrows."""
    d, shapes = spec.hidden, family_of(spec).shapes(spec).items()
    matrices = [shape for name, shape in shapes if name.startswith("layers.0.") and len(shape) == 2]
    widening = sum(columns for columns, depth in matrices if depth == d) - 4 * d
    return (d, 3 * d), (d, d), (d, widening), (max(depth for _, depth in matrices), d)


def parameters(spec: ModelSpec) -> int:
    """Number of the encoder's parameters (no head)."""
    return sum(map(math.prod, family_of(spec).shapes(spec).values()))


def flops(spec: ModelSpec, tokens: float, attended: float, layers: int) -> float:
    """Floating-point operations of `layers` layers over `tokens` rows; `attended`: sum of squared lengths."""
    return layers * (2.0 * sum(map(math.prod, products(spec))) * tokens + 4.0 * spec.hidden * attended)


def build(spec: ModelSpec, state: State, dtype: torch.dtype, device: torch.device, backend: Backend) -> PackedModel:
    """The packed forward of a spec, with its state (any floating dtype, shapes [...] of the family) on the device."""
    family = family_of(spec)
    check_dtype(spec, dtype)
    if family.STEPS is not None:
        own = import_module(f"virnucpro_cli.model.kernels.{family.STEPS}")
        backend = own.adapted(backend, spec, device, dtype)
    head = {name: each for name, each in state.items() if name.startswith((f"{LM_HEAD}.", "embed_tokens."))}
    model = PackedModel(spec, family.parts(spec, state, device), head, dtype, device, backend)
    model.compile()
    return model
