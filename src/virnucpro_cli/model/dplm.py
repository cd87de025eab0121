"""DPLM: ESM-2's network and names, trained further to remove noise. Its files have rotary frequencies of their own."""

from virnucpro_cli.model.esm2 import Esm2
from virnucpro_cli.model.spec import APACHE, Licence, ModelSpec, named


class Dplm(Esm2):
    """The family. Nothing but config.json tells its tensors from those of ESM-2."""

    TITLE = "DPLM"
    SIZES = named(
        ModelSpec("dplm_150m", 30, 640, 20, "dplm"),
        ModelSpec("dplm_650m", 33, 1280, 20, "dplm"),
        ModelSpec("dplm_3b", 36, 2560, 40, "dplm"),
    )
    SHORT_NAMES = {name.replace("_", "-"): name for name in SIZES}
    ALIASES = SHORT_NAMES | {f"airkingbd/{name}": name for name in SIZES}
    PUBLISHED_SHA256 = {}
    """No source was found for the SHA-256 of the published files."""
    ARCHITECTURES = ("EsmForDPLM",)

    def repository(self, spec: ModelSpec) -> str:
        return f"airkingbd/{spec.name}"

    def url(self, spec: ModelSpec) -> str | None:
        return None

    def licence(self, spec: ModelSpec) -> Licence:
        return APACHE


DPLM = Dplm()
