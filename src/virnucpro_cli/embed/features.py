"""The features that a run may have. Each is imported only when it is asked for."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.features.feature import Feature


class Known(NamedTuple):
    """A feature: whether a configuration asks for it, and its module and class below virnucpro_cli.features."""

    is_asked_for: Callable[[EmbedConfig], bool]
    module: str
    name: str


FEATURES = (
    Known(lambda config: config.from_ == "contigs", "contigs", "Contigs"),
    Known(lambda config: any((config.group, config.group_regex, config.group_table)), "groups", "Groups"),
    Known(lambda config: "contacts" in config.emit, "contacts", "Contacts"),
    Known(lambda config: config.cache is not None, "cache", "CachedRows"),
    Known(lambda config: config.qc is not None, "qc", "Table"),
)
"""In the order in which their hooks are called."""


def asked_for(config: EmbedConfig) -> list[Feature]:
    """The features of a run. Raises UserError for what they cannot read."""
    return [
        getattr(import_module(f"virnucpro_cli.features.{known.module}"), known.name)(config)
        for known in FEATURES
        if known.is_asked_for(config)
    ]
