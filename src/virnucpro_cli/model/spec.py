"""The sizes of ESM-2 as data. A new size is a new row."""

from dataclasses import dataclass

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
    def repository(self) -> str:
        return f"facebook/{self.name}"

    @property
    def url(self) -> str:
        return f"https://dl.fbaipublicfiles.com/fair-esm/models/{self.name}.pt"

    def flops(self, tokens: float, attended: float, layers: int) -> float:
        """Floating-point operations of `layers` layers over `tokens` rows; `attended`: sum of squared lengths."""
        return layers * (24.0 * self.hidden**2 * tokens + 4.0 * self.hidden * attended)


SIZES = {
    spec.name: spec
    for spec in (
        ModelSpec("esm2_t6_8M_UR50D", 6, 320, 20),
        ModelSpec("esm2_t12_35M_UR50D", 12, 480, 20),
        ModelSpec("esm2_t30_150M_UR50D", 30, 640, 20),
        ModelSpec("esm2_t33_650M_UR50D", 33, 1280, 20),
        ModelSpec("esm2_t36_3B_UR50D", 36, 2560, 40),
        ModelSpec("esm2_t48_15B_UR50D", 48, 5120, 40),
    )
}
SHORT_NAMES = {name.split("_")[2]: name for name in SIZES}
DEMO = ModelSpec("demo", 6, 320, 20)


def by_name(name: str) -> ModelSpec | None:
    """The spec of `esm2_t33_650M_UR50D`, of `650M` or of `demo`, in any case; None for anything else."""
    if name.lower() == DEMO.name:
        return DEMO
    names = {known.upper(): spec for known, spec in SIZES.items()}
    return SIZES.get(SHORT_NAMES.get(name.upper(), "")) or names.get(name.upper())


def resolve_layers(requested: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Layer numbers 0..L: negatives count from the end (-1 is L), of duplicates the last is kept, order kept.

    Raises ValueError naming the first number outside -(L + 1)..L.
    """
    for layer in requested:
        if not -(layers + 1) <= layer <= layers:
            raise ValueError(f"layer {layer} is outside {-(layers + 1)}..{layers}")
    return tuple(dict.fromkeys(layer % (layers + 1) for layer in reversed(requested)))[::-1]
