"""An HDF5 file as it is opened: every dataset and attribute is held against the schema before anything of it is used.

HDF5 is asked first, and its errors are damage of the file; checks are of its answers, and their errors are bugs. Sizes
are compared with the file's length and with each other before anything is allocated.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from virnucpro_cli.errors import UserError, damage_named, damaged, unread
from virnucpro_cli.kinds import any_by_residue, by_residue, unmasked
from virnucpro_cli.store import schema
from virnucpro_cli.store.layout import datasets_in, foreign
from virnucpro_cli.store.schema import MOST_OBJECTS, MOST_TEXT, field_of, unfit

HEAP_ENTRY = 16
"""Bytes of a text in its dataset: its length (uint32), and where it is in a heap."""
NAME_ANOTHER = "Name a file that virnucpro embed wrote."
COLUMNS = ("lengths", "status", "flags", "reason", "replaced")


def reading(path: Path) -> AbstractContextManager[None]:
    """Tell as damage what reading a checked dataset raises."""
    return damage_named(path, (OSError, UnicodeDecodeError))


class Dataset(h5py.Dataset):
    """A checked h5py dataset that tells damage which a read finds as a UserError."""

    def __init__(self, data: h5py.Dataset, path: Path):
        super().__init__(data.id)
        self._path = path

    def __getitem__(self, args: Any, new_dtype: Any = None) -> Any:
        with reading(self._path):
            return super().__getitem__(args, new_dtype)

    def read_direct(self, *args: Any, **kwargs: Any) -> None:
        with reading(self._path):
            super().read_direct(*args, **kwargs)


def opened_hdf5(path: Path) -> h5py.File:
    """The file at `path`, which must be HDF5. Raises UserError if it cannot be opened.

    A finished file is opened as h5py does by default, so that both can be open at once. A run locks the file that it
    fills, and that lock is none of ours.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file.", NAME_ANOTHER)
        with open(path, "rb") as start:
            magic = start.read(len(schema.HDF5_MAGIC))
    except OSError as error:
        raise UserError(f"{unread(str(path), error)}.", NAME_ANOTHER) from None
    if magic != schema.HDF5_MAGIC:
        raise UserError(f"{path} is not an HDF5 file, or damaged at its very start.", NAME_ANOTHER)
    first, second = [{"locking": False}, {}] if path.suffix == ".partial" else [{}, {"locking": False}]
    with damage_named(path):
        try:
            return h5py.File(path, "r", **first)
        except OSError:
            return h5py.File(path, "r", **second)


# --- attributes ------------------------------------------------------------------------------------------------------


def attributes_of(file: h5py.File, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes that are single values or short arrays of numbers, and the JSON in them, read, by name.

    Raises UserError if the file is none of schema 1, or for an attribute that is not as the schema says.
    """
    with damage_named(path):
        attributes = dict(_plain_attributes(file, path))
    if "virtual_of" in attributes:  # of an earlier version
        raise UserError(
            f"{path} is a view, which shows rows of shards.",
            "Merge the shards without --virtual: virnucpro merge --overwrite.",
        )
    if not np.array_equal(attributes.get("schema", 0), schema.SCHEMA):
        raise UserError(
            f"{path} was not written by virnucpro embed, or by one of another schema than {schema.SCHEMA}.",
            "Give a file that embed, merge or import wrote; virnucpro import reads those of other tools.",
        )
    names = [name for key in schema.JSONS if (name := key.removesuffix("?")) in attributes]
    parsed = {name: _parsed(path, name, attributes[name]) for name in names}
    for values, form in ((attributes, schema.PLAIN), (parsed, schema.JSONS)):
        if (place := unfit(values, form, whole=False)) is not None:
            raise damaged(path, f"the attribute {place} is not of its kind")
    return attributes, parsed


def _plain_attributes(file: h5py.File, path: Path) -> Iterator[tuple[str, Any]]:
    if len(file.attrs) > MOST_OBJECTS:
        raise damaged(path, f"it has {len(file.attrs):,} attributes")
    for name in file.attrs:
        attribute = file.attrs.get_id(name)
        size = attribute.get_storage_size()
        if size > MOST_TEXT:
            raise damaged(path, f"the attribute {name} has {size:,} bytes")
        if attribute.shape == () or attribute.dtype.kind in "biuf":
            yield name, file.attrs[name]


def _parsed(path: Path, name: str, text: Any) -> Any:
    if not isinstance(text, str) or len(text) > MOST_TEXT:
        raise damaged(path, f"the attribute {name} is not text, or too long")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise damaged(path, f"the attribute {name} is not JSON") from None


def settings_of(
    path: Path, attributes: dict[str, Any], parsed: dict[str, Any], data: dict[str, Dataset]
) -> dict[str, Any]:
    """The fingerprint. Raises UserError if it is not whole, or a dataset that it promises or an attribute lacks."""
    if "fingerprint" not in attributes:
        raise UserError(f"{path} was not written by virnucpro embed.")
    settings: dict[str, Any] = parsed["fingerprint"]
    words = (*schema.WORDS, "imported_from") if "imported" in settings else schema.WORDS
    if lacking := [name for name in words if name not in attributes]:
        raise damaged(path, f"it has no attribute {lacking[0]}")
    if (place := unfit(parsed, schema.JSONS)) is not None:
        raise damaged(path, f"the attribute {place} lacks")
    if not parsed["inputs"] and "imported" not in settings:
        raise damaged(path, "its inputs are not named")
    if settings["long"] == "window" and settings.get("overlap", settings["max_residues"]) >= settings["max_residues"]:
        raise damaged(path, "the attribute fingerprint.overlap is no overlap of its windows")
    emit = settings.get("emit", ())
    rows = _names_of_rows(settings)
    others = [f"unmasked/{name}" for name in unmasked(emit)] + ["contacts/values"] * ("contacts" in emit)
    others += ["residue/offsets"] * any_by_residue(settings["pool"], emit)
    for half in (each for each in schema.HALVES if each in settings):
        rows += [schema.name_in(half, name) for name in _names_of_rows(settings[half])]
        others += [schema.name_in(half, name) for name in (*schema.STATES, "run/sums")]
    _check_has(path, [*rows, *others], data)
    stored = np.dtype(np.float16 if settings["store_dtype"] == "fp16" else np.float32)
    if other := [name for name in rows if data[name].dtype != stored]:
        raise damaged(path, f"{other[0]} is of {data[other[0]].dtype}, not {stored}")
    return settings


def _names_of_rows(settings: dict[str, Any]) -> list[str]:
    return [f"{kind}/{layer}" for kind in settings["pool"] for layer in settings["layers"]]


def fingerprint_of(path: Path) -> tuple[dict[str, Any], bool] | None:
    """(fingerprint, complete) of a file that this program wrote; None if it is something else."""
    try:
        with opened_hdf5(path) as file:
            attributes, parsed = attributes_of(file, path)
            with damage_named(path):
                complete = file["run/complete"]
                if "fingerprint" not in attributes or complete.shape != () or complete.dtype != np.uint8:
                    return None
                return parsed["fingerprint"], bool(complete[()])
    except UserError:
        return None


# --- datasets --------------------------------------------------------------------------------------------------------


def datasets_of(file: h5py.File, path: Path) -> dict[str, Dataset]:
    """Every dataset of the file by name, checked.

    Raises UserError for a dataset that is not as the schema says, lies outside the file, or is in another file.
    """
    with damage_named(path):
        length = os.fstat(file.id.get_vfd_handle()).st_size
        data = {name: Dataset(each, path) for name, each in datasets_in(file, path)}
    sizes = dict[str, int]()
    for name, each in data.items():
        if name != "embeddings":  # a second name
            _check(path, name, each, length, sizes)
    _check_has(path, schema.NEEDED, data)
    default = data.get("embeddings")
    if default is not None and not any(each == default for name, each in data.items() if name != "embeddings"):
        raise damaged(path, "embeddings is no second name of a dataset")
    return data


def _check(path: Path, name: str, data: Dataset, length: int, sizes: dict[str, int]) -> None:
    """Raise UserError unless the dataset's bytes are in this file, and are as its row of the schema says.

    length: of the file; sizes: those by letters of the schema that other datasets have.
    """
    with damage_named(path):
        shape, dtype, creation, offset = data.shape, data.dtype, data.id.get_create_plist(), data.id.get_offset()
        layout, external, text = creation.get_layout(), creation.get_external_count(), h5py.check_string_dtype(dtype)
    if layout == h5py.h5d.VIRTUAL or external:
        raise foreign(path, f"{name} {'has its bytes in' if external else 'shows'} another file")
    if shape is None:
        raise damaged(path, f"{name} has no shape")
    if (field := field_of(name)) is None:
        return
    if declared := prod(shape) * (HEAP_ENTRY if dtype.kind == "O" else dtype.itemsize):
        if layout != h5py.h5d.CONTIGUOUS or offset is None:
            raise damaged(path, f"{name} is not stored in one piece, as embed stores it")
        if offset + declared > length:
            extent = f"{declared:,} bytes from {offset:,} on"
            raise damaged(path, f"{name} would take {extent}, and the file has {length:,}")
    word = str(dtype) if text is None else schema.TEXT if dtype.kind == "O" else schema.BYTES
    word = dtype.str if dtype.kind in "biuf" else word
    if word not in field.dtypes:
        raise damaged(path, f"{name} is of {word}, not {' or '.join(field.dtypes)}")
    if len(shape) != len(field.shape):
        raise damaged(path, f"{name} has {len(shape)} dimensions, not {len(field.shape)}")
    for size, letter in zip(shape, field.shape, strict=True):
        _bind(path, name, size, letter, sizes)


def _bind(path: Path, name: str, size: int, letter: str | int, sizes: dict[str, int]) -> None:
    """Hold a size against those of the same letter."""
    if letter == "N+1":
        letter, size = "N", size - 1
    right = letter if isinstance(letter, int) else sizes.setdefault(letter, size)
    if size != right:
        raise damaged(path, f"{name} has {size:,} entries, and {right:,} is right")


def _check_has(path: Path, names: "list[str] | tuple[str, ...]", data: dict[str, Dataset]) -> None:
    if lacking := [name for name in names if name not in data]:
        raise damaged(path, f"it has no {lacking[0]}")


def columns_of(path: Path, data: dict[str, Dataset], parsed: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Columns that every file has, by name: [N] in the schema's dtypes.

    Raises UserError if a number in them or in another column is not possible.
    """
    columns = {name: data[name][:] for name in COLUMNS}
    possible = {
        "status": columns["status"] < len(schema.STATUS_NAMES),
        "reason": columns["reason"] < len(schema.REASONS),
        "lengths": columns["lengths"] >= 0,
        "replaced": columns["replaced"] >= 0,
        **_possible_residues(path, data),
        **_possible_contacts(path, data),
    }
    if "records" in data:
        possible["records"] = data["records"][:] >= 0
    if "groups/ids" in data and "groups/of" in data:
        possible["groups/of"] = data["groups/of"][:] < len(data["groups/ids"])
    for name, each in possible.items():
        if not each.all():
            raise damaged(path, f"{name} has no possible number at {int(each.argmin())}")
    n = len(columns["status"])
    for kind in ("columns", "tables"):
        for name in parsed.get(kind, []):
            if name not in data or data[name].ndim != 1 or (kind == "columns" and len(data[name]) != n):
                raise damaged(path, f"{name}, of its {kind}, lacks or has another size")
    return columns


def _possible_residues(path: Path, data: dict[str, Dataset]) -> dict[str, NDArray[np.bool_]]:
    known = [name for name in data if field_of(name) is not None and name != "residue/offsets"]
    sizes = [len(data[name]) for name in known if by_residue(*name.partition("/")[::2])]
    if "residue/offsets" not in data:
        if sizes:
            raise damaged(path, "it has no residue/offsets")
        return {}
    offsets = data["residue/offsets"][:]
    if offsets[0] != 0 or any(offsets[-1] != size for size in sizes):
        raise damaged(path, f"residue/offsets ends at {offsets[-1]:,} of {max(sizes, default=0):,} rows")
    return {"residue/offsets": np.diff(offsets, prepend=0) >= 0}


def _possible_contacts(path: Path, data: dict[str, Dataset]) -> dict[str, NDArray[np.bool_]]:
    names = tuple(f"contacts/{name}" for name in ("starts", "sizes", "status", "values"))
    if not any(name in data for name in names):
        return {}
    _check_has(path, names, data)
    starts, sizes, status = (data[name][:] for name in names[:-1])
    sides, room = sizes.astype(np.int64), len(data["contacts/values"])
    return {
        "contacts/sizes": (sides >= 0) & (sides < 1 << 31),
        "contacts/starts": ((starts == -1) & (status != schema.DONE))
        | ((starts >= 0) & (starts <= room) & (sides**2 <= room - starts)),
        "contacts/status": status < len(schema.STATUS_NAMES),
    }
