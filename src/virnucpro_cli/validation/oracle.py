"""The oracle of a model family, the proteins that it is asked for, and its rows for them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

import virnucpro_cli
from virnucpro_cli.engine import devices
from virnucpro_cli.kinds import KINDS
from virnucpro_cli.model.locate import Weights
from virnucpro_cli.model.spec import ModelSpec, State
from virnucpro_cli.validation.plain_reader import FAIR_ESM, Letters

Array = NDArray[np.floating]
Rows = dict[tuple[str, int], Array]
"""(kind, layer) -> [n, D], for residue [sum of lengths, D]."""

LONGEST = 4096
"""Residues of the longest protein that an oracle is asked for: eager attention takes 4 heads x L^2 bytes a map."""


class Oracle(ABC):
    """The authors' own class of a model family, from the Python package `package`, with given weights on one device.

    letters: those of its alphabet.

    It shares no code with the fast path, so that it can judge it. In fp32, one unpadded sequence at a time, it is the
    definition of the embeddings. In another dtype it runs plainly: the noise floor of that dtype.
    """

    package: ClassVar[str]
    pad: ClassVar[int]
    letters: ClassVar[Letters] = FAIR_ESM

    def __init__(
        self, spec: ModelSpec, state: State, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        """state: tensors by the names of the family's own checkpoints. Raises RuntimeError if some lack or are left."""
        self.spec, self.device, self.dtype = spec, torch.device(device), dtype
        self.model = self.made(state)

    @abstractmethod
    def made(self, state: State) -> Any:
        """The class with the tensors [...] of a state, on the device in the dtype."""

    @classmethod
    def fault_of(cls, release: str) -> str:
        """The fault of a release of the package, as the end of a sentence, or nothing: a release may be no judge."""
        return ""

    @staticmethod
    @abstractmethod
    def encode(text: str, longest: int | None = None) -> list[int]:
        """Token ids of a cleaned sequence, cut after `longest` residues, between the tokens of its start and end."""

    def hidden(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden rows, layer -> [B, L, D] in the model's dtype, of a batch of token ids, int64 [B, L] on the device."""
        mask = (tokens != self.pad).long()
        found = self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, **self.more(tokens))
        return {layer: found.hidden_states[layer] for layer in layers}

    def more(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further arguments, [B, L] each, that the class takes with token ids, int64 [B, L]."""
        return {}

    def embed(self, sequence: str | list[int], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden rows of one sequence with its first and last token: layer -> [length + 2, D] in the model's dtype."""
        return self.embed_padded([self.encode(sequence) if isinstance(sequence, str) else sequence], layers)[0]

    @torch.inference_mode()
    def embed_padded(self, encoded: list[list[int]], layers: Sequence[int]) -> list[dict[int, torch.Tensor]]:
        """The same for several sequences as one ordinary padded batch, each [length + 2, D] in the model's dtype."""
        tokens = pad_sequence([torch.tensor(ids) for ids in encoded], batch_first=True, padding_value=self.pad)
        hidden = self.hidden(tokens.to(self.device), layers)
        return [{layer: hidden[layer][i, : len(ids)] for layer in layers} for i, ids in enumerate(encoded)]

    @classmethod
    def environment(cls, weights: Weights, device: torch.device) -> dict[str, str]:
        """Versions, weights and the oracle that runs on the device, in words for reports."""
        return {
            "virnucpro": virnucpro_cli.__version__,
            "torch": torch.__version__,
            cls.package: version(cls.package),
            "weights": weights.place,
            "weights_sha256": weights.sha256,
            "reference": f"{cls.package} in float32 on {devices.describe_device(device)}, eager, one at a time",
        }


def fill(model: torch.nn.Module, tensors: State, *heads: str) -> None:
    """Give a model its tensors [...]; those of heads, whose names begin like this, may lack. Raises RuntimeError."""
    own = {name: each for name, each in model.state_dict().items() if name.startswith(heads)}
    model.load_state_dict(own | tensors)


class WideRotary(torch.nn.Module):
    """A rotary embedding of others, computed in the dtype of `inv_freq` whatever the model's."""

    def __init__(self, rotary: torch.nn.Module, inv_freq: torch.Tensor):
        super().__init__()
        self.rotary: Any = rotary
        self.rotary.inv_freq = inv_freq

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k: [..., L, Dh] of any dtype; returns both rotated, in that dtype."""
        wide = self.rotary(q.to(self.rotary.inv_freq.dtype), k.to(self.rotary.inv_freq.dtype))
        return wide[0].to(q.dtype), wide[1].to(k.dtype)


@dataclass(frozen=True)
class Sample:
    """n proteins: their names, raw FASTA text, and token ids with the first and last token."""

    names: list[str]
    texts: list[bytes]
    tokens: list[list[int]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each protein, int64 [n]."""
        return np.asarray([len(ids) - 2 for ids in self.tokens], np.int64)

    def names_of(self, kind: str) -> NDArray[np.object_]:
        """The protein of each row of a kind, of dtype object [n], for residue [sum of lengths]."""
        names = np.asarray(self.names, object)
        return np.repeat(names, self.lengths) if kind == "residue" else names

    def by_protein(self, rows: NDArray[Any], kind: str) -> list[NDArray[Any]]:
        """Rows of a kind, of any dtype [n, ...] or for residue [sum of lengths, ...], of each protein."""
        return np.split(rows, np.cumsum(self.lengths)[:-1] if kind == "residue" else len(self))

    def __len__(self) -> int:
        return len(self.tokens)


def stratified(lengths: NDArray[np.int64], odd: NDArray[np.uint16], size: int, seed: int) -> NDArray[np.int64]:
    """Numbers of `size` of n records, in order, int64 [size]; lengths: int64 [n]; odd: uint16 [n], oddities as bits.

    They are the longest, the shortest, two of each oddity, and at random one from each stratum of lengths.
    """
    if size >= len(lengths):
        return np.arange(len(lengths))
    random = np.random.default_rng(seed)
    chosen = {int(lengths.argmin()), int(lengths.argmax())}
    for bit in range(16):
        having = np.flatnonzero(odd & (1 << bit))
        chosen |= set(random.permutation(having)[:2].tolist())
    others = np.setdiff1d(np.argsort(lengths, kind="stable"), list(chosen), assume_unique=True)
    strata = np.array_split(others, max(size - len(chosen), 1))
    return np.sort([*chosen, *(int(random.choice(stratum)) for stratum in strata if len(stratum))])


def pooled(residues: Array, bos: Array, eos: Array) -> dict[str, Array]:
    """Kinds of one row of a protein, each [D], of its residue rows, float [L, D], and both ends; means are float64."""
    mean = residues.mean(axis=0, dtype=np.float64)
    std = np.subtract(residues, residues[:1], dtype=np.float64).std(axis=0)  # a mean of equal float64 rows is rounded
    every = (residues.sum(axis=0, dtype=np.float64) + bos + eos) / (len(residues) + 2)
    return {"mean": mean, "mean-all": every, "bos": bos, "eos": eos, "max": residues.max(axis=0), "std": std}


def rows_of(judge: Oracle, sample: Sample, layers: tuple[int, ...], together: int = 1) -> Rows:
    """The oracle's rows of every kind, float32 (float64 in fp64) [n, D], for residue [sum of lengths, D].

    It computes one protein at a time, or `together` of similar length as a padded batch.
    """
    rows: dict[tuple[str, int], list[Array]]
    rows = {(kind, layer): [np.empty(0)] * len(sample) for kind in KINDS for layer in layers}
    order = np.argsort(sample.lengths, kind="stable").tolist()
    for start in range(0, len(order), together):
        batch = order[start : start + together]
        for i, by_layer in zip(batch, judge.embed_padded([sample.tokens[i] for i in batch], layers), strict=True):
            for layer, hidden in by_layer.items():
                host = (hidden if hidden.dtype == torch.float64 else hidden.float()).cpu().numpy()
                rows["residue", layer][i] = host[1:-1]
                for kind, values in pooled(host[1:-1], host[0], host[-1]).items():
                    rows[kind, layer][i] = values[None]
    return {key: np.concatenate(each) for key, each in rows.items()}
