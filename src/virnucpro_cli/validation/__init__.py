"""`validate` and `verify`: the oracle's rows, how ours agree with them, the gates, and the verdict."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virnucpro_cli.model.spec import ModelSpec
    from virnucpro_cli.validation.oracle import Oracle


def oracle_of(spec: "ModelSpec") -> type["Oracle"]:
    """The oracle of a model's family. Another family is a file beside `fair_esm.py`, and a line here."""
    from virnucpro_cli.validation.fair_esm import Reference

    return Reference
