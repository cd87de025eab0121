"""DPLM: ESM-2's network and names, trained further to remove noise. Its files have rotary frequencies of their own."""

from virnucpro_cli.model.esm2 import Esm2
from virnucpro_cli.model.spec import APACHE, Licence, ModelSpec


class Dplm(Esm2):
    """The family. Nothing but config.json tells its tensors from those of ESM-2."""

    TITLE = "DPLM"

    def repository(self, spec: ModelSpec) -> str:
        return f"airkingbd/{spec.name}"

    def url(self, spec: ModelSpec) -> str | None:
        return None

    def licence(self, spec: ModelSpec) -> Licence:
        return APACHE


DPLM = Dplm()
