"""An embeddings file opened by a command: damage is one message, and everything that its fingerprint promises is there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from virnucpro_cli.alphabet import TOKENS
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.kinds import by_residue, unmasked
from virnucpro_cli.store.reading import EmbeddingFile, read_embeddings
from virnucpro_cli.store.schema import HDF5_MAGIC, UNKNOWN

DAMAGE = (OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)
"""What HDF5 and other libraries raise of files that are damaged, or of something else."""
COMPUTED_IN = ("float32", "float16", "bfloat16", "float8_e4m3fn", UNKNOWN)


def opened(path: str) -> EmbeddingFile:
    try:
        with open(path, "rb") as opened:
            ours = opened.read(8) == HDF5_MAGIC
    except OSError as error:
        what = (
            f"There is no file {path}"
            if isinstance(error, FileNotFoundError)
            else f"{path} cannot be read: {error.strerror}"
        )
        raise UserError(f"{what}.", "Name a file that virnucpro embed wrote.") from None
    if not ours:
        raise UserError(
            f"{path} is not an HDF5 file, or damaged at its very start.", "Name a file that virnucpro embed wrote."
        )
    with damage_named(path):
        file = read_embeddings(path)
    if "fingerprint" not in file.attributes:
        raise UserError(f"{path} was not written by virnucpro embed.")
    return file


def _damaged(path: str, error: object) -> UserError:
    return UserError(
        f"{path} is cut short or damaged: {error}.", "Copy it again from where it was whole, or embed again."
    )


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """HDF5 finds some damage by itself, when it reads what the damage hit, and has a type of error for each kind."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        raise _damaged(path, in_a_line(error)) from None


def settings_of(file: EmbeddingFile, path: str) -> dict[str, Any]:
    """The fingerprint, after a look at whether everything that it promises is there in its shape."""
    try:
        settings = json.loads(file.attributes["fingerprint"])
        json.loads(file.attributes["config"])["model"]
        assert "imported" in settings or json.loads(file.attributes["inputs"])[0]["path"]
        n, width = len(file), None
        bool(file.complete)
        assert settings["dtype"] in COMPUTED_IN, "unknown dtype"
        assert settings["pool"] and settings["layers"], "its fingerprint names no pool or no layer"
        for name in ("status", "flags", "reason", "replaced", "names"):
            assert len(getattr(file, name)) == n, f"{name} has {len(getattr(file, name))} entries for {n} records"
        assert all(isinstance(name, str) for name in file.names[:1]), "sequence_ids are not text"
        for kind in settings["pool"]:
            rows = int(file.residue_offsets[-1]) if kind == "residue" else n
            assert kind != "residue" or len(file.residue_offsets) == n + 1, "residue/offsets has the wrong length"
            for layer in settings["layers"]:
                shape = file.dataset(kind, layer).shape
                width = width or shape[-1]
                assert shape == (rows, width), f"{kind}/{layer} has shape {shape}, and {(rows, width)} is right"
        for name in unmasked(settings.get("emit", ())):
            shape = (int(file.residue_offsets[-1]), len(TOKENS)) if by_residue("unmasked", name) else (n,)
            assert file.dataset("unmasked", name).shape == shape, f"unmasked/{name} has another shape"
        if "contacts" in settings.get("emit", ()):
            maps = file.contact_maps
            assert maps is not None, "there are no contacts"
            assert len(maps.starts) == len(maps.sizes) == len(maps.status) == n, (
                "columns of contacts have another length"
            )
            ends = (maps.starts + maps.sizes.astype(np.int64) ** 2)[maps.starts >= 0]
            assert not len(ends) or ends.max() <= len(maps.values), "contacts/values is too short"
        for name in ("id", "long", "invalid", "max_residues", "dedup", "store_dtype", "input_sha256", "weights_sha256"):
            settings[name]
        assert settings["long"] != "window" or "overlap" in settings, "its fingerprint has windows and no overlap"
        for name in ("model", "device", "attention", "tool_version"):
            file.attributes[name]
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError, IndexError, OSError) as error:
        raise _damaged(path, error) from None
    return settings
