"""An embeddings file opened by a command: damage is one message, and everything that its fingerprint promises is there."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import getitem
from types import MethodType
from typing import Any, cast

import h5py
import numpy as np

from virnucpro_cli.alphabet import TOKENS
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.kinds import any_by_residue, by_residue, unmasked
from virnucpro_cli.store.reading import ContactMaps, EmbeddingFile, Groups, read_embeddings
from virnucpro_cli.store.schema import HDF5_MAGIC, REASONS, STATUS_NAMES, UNKNOWN

DAMAGE = (OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)
"""What HDF5 and other libraries raise of files that are damaged, or of something else."""
COMPUTED_IN = ("float32", "float16", "bfloat16", "float8_e4m3fn", UNKNOWN)
WORDS = ("model", "device", "attention", "tool_version", "created", "weights", "weights_sha256", "dtype")
JSONS = ("fingerprint", "config", "environment", "argv", "layers", "pool", "inputs")
"""Attributes of every file: plain ones, and those in JSON."""


def opened(path: str) -> EmbeddingFile:
    """The file at `path`, of which every read, now and later, tells damage as a UserError; what else goes wrong stays what it is."""
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
    return cast(EmbeddingFile, _Guarded(file, path))


class _Guarded:
    """A part of a file, an EmbeddingFile first of all, and the parts that are reached through it."""

    def __init__(self, part: Any, path: str):
        self._part, self._path = part, path

    def _read(self, how: Callable[..., Any], *what: Any, **options: Any) -> Any:
        with damage_named(self._path):
            found = how(*what, **options)
        return _Guarded(found, self._path) if isinstance(found, PARTS) else found

    def __getattr__(self, name: str) -> Any:
        return self._read(getattr, self._part, name)

    def __getitem__(self, key: Any) -> Any:
        return self._read(getitem, self._part, key)

    def __call__(self, *what: Any, **options: Any) -> Any:
        return self._read(self._part, *what, **options)

    def __len__(self) -> int:
        return self._read(len, self._part)

    def __enter__(self) -> "_Guarded":
        return self

    def __exit__(self, *exc: object) -> None:
        self._part.close()


PARTS = (h5py.Group, h5py.Dataset, Groups, ContactMaps, MethodType)


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
        said = {name: json.loads(file.attributes[name]) for name in JSONS}
        settings = said["fingerprint"]
        said["config"]["model"]
        for name in (*WORDS, "imported_from") if "imported" in settings else WORDS:
            file.attributes[name]
        assert "imported" in settings or said["inputs"], "its inputs are not named"
        for entry in said["inputs"] + json.loads(file.attributes.get("contigs", "[]")):
            entry["path"], entry["bytes"], entry["sha256"]
        n, width = len(file), None
        bool(file.complete)
        assert settings["dtype"] in COMPUTED_IN, "unknown dtype"
        assert settings["pool"] and settings["layers"], "its fingerprint names no pool or no layer"
        columns = {name: len(getattr(file, name)) for name in ("status", "flags", "reason", "replaced")}
        for name, entries in (columns | {"sequence_ids": len(file._file["sequence_ids"])}).items():
            assert entries == n, f"{name} has {entries} entries for {n} records"
        assert all(isinstance(name, str) for name in file.names_of(0, 1)), "sequence_ids are not text"
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
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError, IndexError, OSError) as error:
        raise _damaged(path, error) from None
    return settings


def checked(file: EmbeddingFile, path: str) -> dict[str, Any]:
    """As `settings_of`, for commands that take every number in the columns for what it says."""
    settings = settings_of(file, path)
    right = {
        "status": file.status < len(STATUS_NAMES),
        "reason": file.reason < len(REASONS),
        "lengths": file.lengths >= 0,
    }
    if any_by_residue(settings["pool"], settings.get("emit", ())):
        right["residue/offsets"] = np.diff(file.residue_offsets, prepend=0) >= 0
    if file.groups is not None:
        right["groups/of"] = file.groups.of < len(file.groups)
    for name, each in right.items():
        if not each.all():
            raise _damaged(path, f"{name} has no possible number at {int(each.argmin())}")
    return settings
