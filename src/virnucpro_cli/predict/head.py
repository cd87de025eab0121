"""VirNucPro's heads: Linear, BatchNorm, ReLU, Linear, softmax. Column 0 of the scores is others, column 1 is virus.

A head says nothing of its chunk length, so the published ones are known by their git blob ids.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from virnucpro_cli.errors import UserError, absent, shell_word, unread
from virnucpro_cli.model import locate
from virnucpro_cli.predict import pickled
from virnucpro_cli.predict.pickled import Refused, Tensors
from virnucpro_cli.store import disk

PUBLISHED = {
    300: "a0b5b85e7c1e44f00cde146d091beb82b2c8e855",
    500: "fc35d5ef9f1f4564eea7036f34f4f8ec6000d33d",
}
"""Chunk lengths, and the git blob ids of 300_model.pth and 500_model.pth."""
CLASSES = "others,virus"
BATCH = 256
"""Rows that are scored at once. The last batch is filled up, so that every product has the same shape."""
EPS = 1e-5
"""The batch norm's, where a file does not say it: PyTorch's default."""
SHAPES = {
    "hidden_layer.weight": ("H", "D"), "hidden_layer.bias": ("H",), "bn1.weight": ("H",), "bn1.bias": ("H",),
    "bn1.running_mean": ("H",), "bn1.running_var": ("H",), "output_layer.weight": (2, "H"), "output_layer.bias": (2,),
}  # fmt: skip
COUNTER = "bn1.num_batches_tracked"
"""A tensor of training alone, which a file may have or lack."""
SAVE_AGAIN = (
    "A head is VirNucPro's 300_model.pth or 500_model.pth, a state_dict of the same module, or a .safetensors of it."
)


@dataclass(frozen=True)
class Head:
    """A head with H hidden units over D features. tensors: float32, by the names and of the shapes of SHAPES.

    chunk: bases of a chunk, None if nothing says it; git_blob, sha256: of the file that it was read from first;
    is_claimed: whether they are known by the word of a .safetensors alone.
    """

    place: str
    tensors: Tensors = field(repr=False)
    chunk: int | None
    git_blob: str
    sha256: str
    eps: float = EPS
    is_claimed: bool = False

    @property
    def features(self) -> int:
        return int(self.tensors["hidden_layer.weight"].shape[1])

    @property
    def is_published(self) -> bool:
        return self.git_blob in PUBLISHED.values()

    @property
    def name(self) -> str:
        if not self.is_published:
            return f"a head of one's own ({self.place})"
        claim = "by its own word " if self.is_claimed else ""
        return f"{claim}VirNucPro's {self.chunk} head ({self.place})"

    def identity(self) -> dict[str, Any]:
        """All that the scores depend on."""
        sha = hashlib.sha256()
        for name in SHAPES:
            sha.update(np.ascontiguousarray(self.tensors[name]).tobytes())
        return {"tensors_sha256": sha.hexdigest(), "eps": self.eps, "chunk": self.chunk, "git_blob": self.git_blob}

    def scores(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of others and of virus, float32 [n, 2], for features float32 [n, D].

        They are computed in fp32 on the CPU, and a row has the same bits whatever rows are beside it.
        """
        found = np.empty((len(rows), 2), np.float32)
        tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in self.tensors.items()}
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            if len(batch) < BATCH:
                batch = np.concatenate([batch, np.zeros((BATCH - len(batch), rows.shape[1]), np.float32)])
            found[first : first + BATCH] = self._batch(torch.from_numpy(batch), tensors)[: len(rows) - first].numpy()
        return found

    def _batch(self, rows: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The same for one batch, float32 [BATCH, D] to [BATCH, 2], in the order of the module's own forward."""
        with torch.inference_mode():
            mean, variance, weight, bias = (
                tensors[f"bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
            )
            hidden = functional.linear(rows, tensors["hidden_layer.weight"], tensors["hidden_layer.bias"])
            hidden = functional.batch_norm(hidden, mean, variance, weight, bias, False, 0.0, self.eps)
            hidden = functional.relu(hidden)
            output = functional.linear(hidden, tensors["output_layer.weight"], tensors["output_layer.bias"])
            return functional.softmax(output, dim=1)


def read(path: str | Path) -> Head:
    """The head in a file: a pickled module, a state_dict, or a .safetensors. Raises UserError for anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(pickled.MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{absent(str(path))}.", "Name the head's file with --head.") from None
    except OSError as error:
        raise UserError(f"The head {unread(str(path), error)}.") from None
    if len(data) > pickled.MOST_BYTES:
        raise UserError(f"{path} is too large for a head: over {pickled.MOST_BYTES >> 20} MB.", SAVE_AGAIN)
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        if path.suffix == ".safetensors":
            return _of_safetensors(path, data, blob, sha256)
        if not data.startswith(b"PK"):
            raise Refused("it is no zip file, as torch.save writes")
        tensors, norms = pickled.read(path)
        if norms.keys() - {"bn1"}:
            raise Refused("it has another batch norm than bn1")
        eps = norms["bn1"].get("eps") if norms else EPS
    except Refused as refusal:
        raise UserError(f"{path} is not a head: {refusal}.", SAVE_AGAIN) from None
    chunk = next((chunk for chunk, each in PUBLISHED.items() if each == blob), None)
    return _checked(Head(str(path), tensors, chunk, blob, sha256, eps))


def _of_safetensors(path: Path, data: bytes, blob: str, sha256: str) -> Head:
    """A head that `save` wrote, or one's own. Raises Refused."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        notes = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        chunk, eps = int(notes["chunk"]) if "chunk" in notes else None, float(notes.get("eps", EPS))
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise Refused(f"it is no whole .safetensors file ({type(error).__name__})") from None
    if notes.get("classes", CLASSES) != CLASSES:
        raise Refused(f"its classes are {notes['classes'][:40]}, not {CLASSES}")
    if chunk not in (None, *PUBLISHED):
        raise Refused(f"its chunk length is {chunk}")
    is_claimed, blob, sha256 = "git_blob" in notes, notes.get("git_blob", blob), notes.get("sha256", sha256)
    return _checked(Head(str(path), tensors, chunk, blob, sha256, eps, is_claimed))


def _checked(head: Head) -> Head:
    """The head without what is training's alone. Raises UserError for tensors that are not a head's."""
    tensors, sizes = dict(head.tensors), dict[Any, int]()
    tensors.pop(COUNTER, None)
    wrong = [f"it has no {name}" for name in SHAPES.keys() - tensors.keys()]
    wrong += [f"it has a tensor {name[:80]}" for name in sorted(tensors.keys() - SHAPES.keys())]
    for name in SHAPES.keys() & tensors.keys():
        shape, found = SHAPES[name], tensors[name].shape
        same = len(found) == len(shape) and all(
            n > 0 and n == (letter if isinstance(letter, int) else sizes.setdefault(letter, n))
            for n, letter in zip(found, shape, strict=True)
        )
        if not same:
            wrong.append(f"{name} has the shape {list(found)}")
        elif tensors[name].dtype != np.float32:
            wrong.append(f"{name} is {tensors[name].dtype}, not float32")
        elif not np.isfinite(tensors[name]).all() or (name == "bn1.running_var" and (tensors[name] < 0).any()):
            wrong.append(f"{name} has values that cannot be")
    if not (isinstance(head.eps, float) and 0 < head.eps < 1):
        wrong.append("the eps of its batch norm is no small number")
    if wrong:
        raise UserError(f"{head.place} is not a head: {sorted(wrong)[0]}.", SAVE_AGAIN)
    return replace(head, tensors=tensors)


def save(head: Head, path: Path) -> None:
    """Write a head as safetensors, with what is known of it. Raises UserError if the disk fails."""
    from safetensors.numpy import save as packed

    notes = {"classes": CLASSES, "eps": repr(head.eps), "git_blob": head.git_blob, "sha256": head.sha256}
    notes |= {"chunk": str(head.chunk)} if head.chunk else {}
    with disk.written_whole(path) as file:
        file.write(packed({name: np.array(tensor) for name, tensor in head.tensors.items()}, notes))


def folder() -> Path:
    """Where published heads are kept."""
    return locate.cache_dir() / "heads"


def places(chunk: int) -> list[Path]:
    """Where a published head is looked for: as it was kept, and as VirNucPro has it."""
    return [folder() / f"{chunk}_model.{ending}" for ending in ("safetensors", "pth")]


def kept(chunk: int) -> Head | None:
    """The published head of a chunk length in the cache; None if it is not there.

    Raises UserError for a file of that name that is another's.
    """
    for path in places(chunk):
        if path.exists():
            head = read(path)
            if head.git_blob != PUBLISHED[chunk]:
                refusal = f"{path} is not VirNucPro's {chunk} head: its git blob is {head.git_blob}."
                raise UserError(refusal, f"Remove it, or use it as it is: --head {shell_word(path)} --chunk {chunk}.")
            return replace(head, is_claimed=False)  # `save` wrote it, of a .pth that was checked
    return None


def for_chunk(head: Head, chunk: int | None) -> Head:
    """The head for chunks of that length, None for its own. Raises UserError if it is of others, or does not say."""
    if head.chunk is None:
        if chunk is None:
            refusal = f"{head.place} does not say for which chunks it was trained."
            raise UserError(refusal, "Say --chunk 300 or --chunk 500.")
        return replace(head, chunk=chunk)
    if chunk not in (None, head.chunk):
        refusal = f"{head.place} is the head for chunks of {head.chunk} bases, not {chunk}."
        raise UserError(refusal, f"Say --chunk {head.chunk}, or give the other head.")
    return head
