"""`validate` and `verify`: the oracle's rows, how ours agree with them, the gates, and the verdict."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from virnucpro_cli.errors import UserError, install_command
from virnucpro_cli.kinds import NUCLEOTIDE, PROTEIN

if TYPE_CHECKING:
    from pathlib import Path

    from virnucpro_cli.model.spec import ModelSpec
    from virnucpro_cli.validation.oracle import Oracle

ORACLES = {
    "esm2": "fair_esm", "dplm": "transformers_esm", "esm1b": "fair_esm_1", "esm1v": "fair_esm_1", "esmc": "esmc",
    "lucavirus": "lucavirus", "dnabert": "dnabert",
}  # fmt: skip
"""The file beside this one that holds the oracle of a family, its class by the kind of input."""
CLASSES = {PROTEIN: "Reference", NUCLEOTIDE: "OfNucleotides"}


def oracle_of(spec: "ModelSpec", kind: str = PROTEIN, tokenizer: "Path | None" = None) -> type["Oracle"]:
    """The oracle of a model's family for a kind of input. tokenizer: the file of one whose tokens are not letters.

    Raises UserError if its package is not installed, too old, or has a fault.
    """
    try:
        module = import_module(f"virnucpro_cli.validation.{ORACLES[spec.family]}")
    except ImportError as error:
        lacking = "is not installed" if isinstance(error, ModuleNotFoundError) else "is too old"
        raise UserError(
            f"Nothing to compare {spec.name} with: {error.name} {lacking}.",
            f"Install it: {install_command('test')}",
        ) from None
    reference: type[Oracle] = getattr(module, CLASSES[kind])
    if hasattr(reference, "reading_by"):
        reference = reference.reading_by(tokenizer)
    release = version(reference.package)
    if fault := reference.fault_of(release):
        raise UserError(
            f"Nothing to compare {spec.name} with: {reference.package} {release} {fault}.",
            f"Install a newer one: {install_command('test')}",
        )
    return reference
