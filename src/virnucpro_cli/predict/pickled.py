"""A pickled PyTorch module, or a state_dict, read as inert records: nothing that it names is imported or called.

A file of `torch.save` is a zip of uncompressed members: a pickle, and the bytes of each tensor's storage.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BYTES, MOST_PICKLE, MOST_MEMBERS = 1 << 28, 1 << 18, 256
"""Bytes of a file and of the pickle in it, and members of the zip; a head of VirNucPro has 6.83 MB."""
STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8"}
MODULES = {
    ("__main__", "MLPClassifier"), ("torch.nn.modules.linear", "Linear"),
    ("torch.nn.modules.batchnorm", "BatchNorm1d"), ("torch.nn.modules.dropout", "Dropout"),
}  # fmt: skip
"""Modules that a head is made of, by the names that a pickle gives them."""
EMPTY = {("collections", "OrderedDict"), ("builtins", "set"), ("__builtin__", "set")}
TENSORS = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}
Tensors = dict[str, NDArray[Any]]


class Refused(Exception):
    """The words for why a file is refused."""


class Record:
    """A module as the pickle has it: its state, and nothing that runs."""

    state: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file by their names, and the state of each batch norm by its name; none of a state_dict.

    Raises Refused for a file that is anything else, damaged, or larger than any head.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise Refused(f"it has {path.stat().st_size / 1e6:,.0f} MB, and no head is larger than {MOST_BYTES >> 20}")
        with zipfile.ZipFile(path) as archive:
            record = _Reader(*_members(archive)).load()
        if isinstance(record, dict):
            tensors, norms = dict(record), {}
        else:
            tensors, norms = dict(_leaves(record)), dict(_states(record))
    except Refused:
        raise
    except zipfile.BadZipFile as error:
        raise Refused(f"it is no zip file of torch.save, or is damaged ({error})") from None
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise Refused(f"its pickle is damaged, or none of a head ({type(error).__name__})") from None
    if not all(isinstance(name, str) and isinstance(tensor, np.ndarray) for name, tensor in tensors.items()):
        raise Refused("it holds other things than tensors")
    return tensors, norms


def _members(archive: zipfile.ZipFile) -> tuple[bytes, Callable[[str], bytes]]:
    """The pickle, and what gives the bytes of a storage by its key. Raises Refused for members that are no tensors."""
    infos = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in infos if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1 or len(infos) > MOST_MEMBERS:
        raise Refused("it is no file of torch.save, which has one data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    for info in infos.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > MOST_BYTES:
            raise Refused("its members are compressed, which torch.save never does")
    if infos[pickles[0]].file_size > MOST_PICKLE:
        raise Refused("its pickle is larger than that of any head")
    if f"{root}byteorder" in infos and archive.read(f"{root}byteorder") != b"little":
        raise Refused("its numbers are not little-endian")

    def storage(key: str) -> bytes:
        if f"{root}data/{key}" not in infos:
            raise Refused("a tensor's bytes are not there")
        return archive.read(f"{root}data/{key}")

    return archive.read(pickles[0]), storage


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]  # in Python: no opcode can ask C for memory
    """A pickle whose names are those of a head. storage: gives bytes by a key."""

    def __init__(self, data: bytes, storage: Callable[[str], bytes]):
        super().__init__(io.BytesIO(data))
        self._storage, self._read = storage, dict[str, NDArray[Any]]()

    def find_class(self, module: str, name: str) -> Any:
        """An inert stand-in for a name, made anew each time. Raises Refused for a name that no head has."""
        if (module, name) in MODULES:
            return type(name, (Record,), {})
        if (module, name) in EMPTY:
            return type(name, (dict,), {"__setstate__": lambda self, state: None, "__init__": _take_only_pairs})
        if (module, name) in TENSORS:
            return _tensor if name == "_rebuild_tensor_v2" else lambda data, *rest: data
        if module == "torch" and name in STORAGES:
            return name
        raise Refused(f"its pickle names {module[:80]}.{name[:80]}, which no head does; nothing was called")

    def persistent_load(self, pid: Any) -> NDArray[Any]:
        """The numbers of a storage."""
        kind, of, key, _device, count = pid
        if kind != "storage" or not (isinstance(of, str) and of in STORAGES) or not re.fullmatch("[0-9]{1,9}", key):
            raise Refused("it has a storage of a kind that no head has")
        if key not in self._read:
            data = self._storage(key)
            if type(count) is not int or len(data) != count * np.dtype(STORAGES[of]).itemsize:
                raise Refused(f"the bytes of tensor {key} do not fit its size")
            self._read[key] = np.frombuffer(data, STORAGES[of])
        if self._read[key].dtype != STORAGES[of]:
            raise Refused(f"tensor {key} is of two types")
        return self._read[key]


def _take_only_pairs(self: dict[Any, Any], given: Any = ()) -> None:
    """Fill a stand-in for an OrderedDict; for a set, of hooks, which is empty, too."""
    if len(given):
        raise Refused("it has hooks, which no head has")


def _tensor(storage: NDArray[Any], offset: Any, size: Any, stride: Any, *rest: Any) -> NDArray[Any]:
    """A tensor of a storage, in its shape and dtype. Raises Refused if it is not contiguous, or lies outside."""
    if not all(type(each) is int and 0 <= each <= MOST_BYTES for each in (offset, *size, *stride)) or len(size) > 2:
        raise Refused("a tensor has a shape that no head has")
    expected = tuple(math.prod(size[place + 1 :]) for place in range(len(size)))
    if tuple(stride) != expected:
        raise Refused("a tensor is not contiguous: save the head again after .contiguous()")
    count = math.prod(size)
    if offset + count > len(storage):
        raise Refused("a tensor is larger than its bytes")
    return storage[offset : offset + count].reshape(size)


def _states(record: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The state of each batch norm in a module, with its name."""
    for name, child in record.state["_modules"].items():
        if type(child).__name__ == "BatchNorm1d":
            yield name, child.state


def _leaves(record: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Each parameter and buffer of a module and of those in it, with its name."""
    if not isinstance(record, Record) or depth > 2:
        raise Refused("it is neither a module nor a state_dict")
    for kind in ("_parameters", "_buffers"):
        yield from ((prefix + name, value) for name, value in record.state[kind].items() if value is not None)
    for name, child in record.state["_modules"].items():
        yield from _leaves(child, f"{prefix}{name}.", depth + 1)
