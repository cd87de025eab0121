"""virnucpro: protein FASTA to language-model embeddings, packed, resumable and checked."""

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__: str
BEGUN = time.perf_counter()
"""When this package was imported: for its own program, when that began."""

if TYPE_CHECKING:
    from virnucpro_cli.benchmark.bench import bench_model
    from virnucpro_cli.config import EmbedConfig
    from virnucpro_cli.embed import embed_fasta
    from virnucpro_cli.store import EmbeddingFile, read_embeddings
    from virnucpro_cli.validation.validate import validate_model

__all__ = ["EmbedConfig", "EmbeddingFile", "bench_model", "embed_fasta", "read_embeddings", "validate_model"]

_HOME = {
    "EmbedConfig": "config",
    "EmbeddingFile": "store",
    "embed_fasta": "embed",
    "read_embeddings": "store",
    "validate_model": "validation.validate",
    "bench_model": "benchmark.bench",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a file needs no torch."""
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name in _HOME:
        return getattr(import_module(f"virnucpro_cli.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("virnucpro")
    except PackageNotFoundError:  # run from a source tree
        return "0+source"
