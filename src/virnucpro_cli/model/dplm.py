"""DPLM: ESM-2's network and names, trained further to remove noise. Its files have rotary frequencies of their own."""

from virnucpro_cli.model.esm2 import (
    CONFIG,
    FP8,
    HEAD_NAMES,
    HUB_FILES,
    JOINT,
    LEFT_OUT,
    LONGEST,
    NAMES,
    NUCLEOTIDES,
    PEERS,
    READING,
    SETTINGS,
    STEPS,
    TOKENIZER,
    head_shapes,
    parts,
    settle,
    shapes,
    told_sizes,
)
from virnucpro_cli.model.spec import APACHE, Licence, ModelSpec

__all__ = [
    "ALIASES", "ARCHITECTURES", "CONFIG", "FP8", "HEAD_NAMES", "HUB_FILES", "JOINT", "LEFT_OUT", "LONGEST", "NAMES",
    "NUCLEOTIDES", "PEERS", "PUBLISHED_SHA256", "READING", "SETTINGS", "SHORT_NAMES", "SIZES", "STEPS", "TITLE",
    "TOKENIZER", "head_shapes", "licence", "parts", "repository", "settle", "shapes", "told_by", "told_sizes", "url",
]  # fmt: skip

TITLE = "DPLM"
SIZES = {
    spec.name: spec
    for spec in (
        ModelSpec("dplm_150m", 30, 640, 20, "dplm"),
        ModelSpec("dplm_650m", 33, 1280, 20, "dplm"),
        ModelSpec("dplm_3b", 36, 2560, 40, "dplm"),
    )
}
SHORT_NAMES = {name.replace("_", "-"): name for name in SIZES}
ALIASES = SHORT_NAMES | {f"airkingbd/{name}": name for name in SIZES}
PUBLISHED_SHA256: dict[str, dict[str, str]] = {}
"""No source was found for the SHA-256 of the published files."""
ARCHITECTURES: tuple[str, ...] = ("EsmForDPLM",)


def repository(spec: ModelSpec) -> str:
    return f"airkingbd/{spec.name}"


def url(spec: ModelSpec) -> str | None:
    return None


def licence(spec: ModelSpec) -> Licence:
    return APACHE


def told_by(names: set[str]) -> bool:
    """Whether tensors of these names are of DPLM: nothing but config.json tells them from those of ESM-2."""
    return False
