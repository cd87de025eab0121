"""Files that somebody edited: a valid embeddings file changed in one place, by a seed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

HUGE = 10**12
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 3.5, 1 << 62, "", "x\x1b[2J", [], [1], ["a", 2], {}, {"a": []}, [[]], list(range(200_000)),
    ["mean"] * 200_000, [-1] * 3, [0, 0], "nan", [None], {"name": "none"},
)  # fmt: skip
"""What stands in JSON in place of something else."""


def _names(file: h5py.File) -> list[str]:
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted({*found, "embeddings"})


def _other(dice: random.Random, shape: tuple[int, ...]) -> dict[str, Any]:
    """How a dataset of another kind is made."""
    n = shape[0] if shape else 1
    return dice.choice([
        {"data": np.zeros(shape, "f8")}, {"data": np.zeros((n, 2), "u1")}, {"data": np.zeros(max(0, n - 1), "i4")},
        {"data": np.zeros((n + 1, *shape[1:]), "i8")}, {"data": np.zeros(shape, "c8")}, {"data": np.zeros(shape, "S5")},
        {"data": np.zeros(shape, [("a", "i4"), ("b", "f2")])}, {"data": np.zeros((n, 0), "f2")}, {"data": np.zeros(shape, ">i4")},
        {"data": ["text"] * n, "dtype": h5py.string_dtype()}, {"shape": (n,), "dtype": h5py.vlen_dtype("i4")},
        {"shape": (HUGE,), "dtype": "f2"}, {"shape": (HUGE, 32), "dtype": "f2", "chunks": (1 << 16, 32)},
        {"shape": (HUGE,), "dtype": "u1"}, {"shape": (HUGE,), "dtype": h5py.string_dtype()}, {"data": np.float32(1)},
        {"data": h5py.Empty("f2")}, {"data": np.zeros(shape, "?")}, {"data": np.full(shape, 255, "u1")},
        {"shape": shape, "dtype": "f2", "chunks": True, "compression": "gzip"} if shape and all(shape) else {"data": 1},
    ])  # fmt: skip


def _replace(file: h5py.File, dice: random.Random) -> str:
    name = dice.choice(_names(file))
    made = _other(dice, file[name].shape)
    del file[name]
    file.create_dataset(name, **made)
    return f"{name} made as {str(made)[:80]}"


def _delete(file: h5py.File, dice: random.Random) -> str:
    name = dice.choice([*_names(file), "run", "mean", "residue"])
    if name in file:
        del file[name]
    if dice.random() < 0.3:
        file.create_group(name)
    return f"{name} deleted"


def _value(file: h5py.File, dice: random.Random) -> str:
    name = dice.choice([name for name in _names(file) if file[name].dtype.kind in "iu" and file[name].size])
    data = file[name]
    info = np.iinfo(data.dtype)
    values = data[()] if data.shape == () else data[:]
    values = np.array(values)
    values.reshape(-1)[dice.randrange(values.size)] = number = dice.choice([info.min, info.max, info.max // 2, 0, 1, 7])
    data[...] = values
    return f"{name} has {number}"


def _text(file: h5py.File, dice: random.Random) -> str:
    name = dice.choice([name for name in _names(file) if file[name].dtype.kind in "SO"])
    text = dice.choice([b"", b"\xff\xfe", b"[" * 5000, b"{}" * 9, b"\x1b]0;title\x07", b"null\n", b"3\n"])
    if file[name].shape == ():
        file[name][()] = text
    else:
        file[name][dice.randrange(len(file[name]))] = text
    return f"{name} has {text[:20]!r}"


def _attribute(file: h5py.File, dice: random.Random) -> str:
    name = dice.choice(sorted(file.attrs))
    value = dice.choice([1, 2.5, "", "{", "x\x1b[31m\x07", "[" * 100_000, "9" * 6000, np.zeros(3), ["a", "b"], h5py.Empty("f"),
                         "y" * 3_000_000, b"\xff"])  # fmt: skip
    del file.attrs[name]
    if dice.random() < 0.9:
        file.attrs[name] = value
    return f"@{name} is {str(value)[:20]!r}"


def _json(file: h5py.File, dice: random.Random) -> str:
    """One value in an attribute of JSON, the fingerprint most of all."""
    names = [name for name in sorted(file.attrs) if isinstance(file.attrs[name], str) and file.attrs[name][:1] in "[{"]
    name = dice.choice([*names, *["fingerprint"] * len(names)])
    value, wrong = json.loads(file.attrs[name]), dice.choice(WRONG)
    if isinstance(value, dict) and value:
        key = dice.choice([*sorted(value), "overlap", "emit", "groups", "gene_caller", "imported", "shard"])
        if dice.random() < 0.2:
            value.pop(key, None)
        else:
            value[key] = wrong
        where = f"{name}.{key}"
    else:
        value, where = wrong, name
    file.attrs[name] = json.dumps(value)
    return f"@{where} is {str(wrong)[:20]!r}"


CHANGES: tuple[Callable[[h5py.File, random.Random], str], ...] = (_replace, _delete, _value, _text, _attribute, _json)


def mutate(path: Path, seed: int) -> str:
    """Change the file in one place, and say which."""
    dice = random.Random(seed)
    if dice.random() < 0.15:
        data = bytearray(path.read_bytes())
        at, bit = dice.randrange(len(data)), dice.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data[: dice.choice([len(data)] * 3 + [at])])
        return f"byte {at} changed or last"
    with h5py.File(path, "r+") as file:
        return dice.choice(CHANGES)(file, dice)
