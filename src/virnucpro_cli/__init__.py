"""virnucpro: protein FASTA to ESM-2 embeddings, packed, resumable and checked."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from virnucpro_cli.benchmark.bench import bench_model
    from virnucpro_cli.config import EmbedConfig
    from virnucpro_cli.embed import embed_fasta
    from virnucpro_cli.store import EmbeddingFile, read_embeddings
    from virnucpro_cli.validation.validate import validate_model

try:
    __version__ = version("virnucpro")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+source"

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
    if name in _HOME:
        return getattr(import_module(f"virnucpro_cli.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
