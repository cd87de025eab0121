"""What the reference says of a sample of proteins, and how far other rows are from that."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_cli.kinds import KINDS
from virnucpro_cli.validation import agreement
from virnucpro_cli.validation.reference import Reference

Float64 = NDArray[np.float64]
Rows = dict[tuple[str, int], NDArray[np.floating]]
"""(kind, layer) -> [n, D], for residue [sum of lengths, D]."""

ODD_LETTERS = b"XUBZO.-<"
LONGEST = 4096
"""Residues of the longest protein that the reference is asked for: eager attention takes 4 heads x L^2 bytes a map."""


@dataclass(frozen=True)
class Sample:
    """n proteins: their names, raw FASTA text, token ids with `<cls>` and `<eos>`, and residues (int64 [n])."""

    names: list[str]
    texts: list[bytes]
    tokens: list[list[int]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.asarray([len(ids) - 2 for ids in self.tokens], np.int64)

    @property
    def owner(self) -> NDArray[np.int64]:
        """The protein of each residue, [sum of lengths]."""
        return np.repeat(np.arange(len(self.tokens)), self.lengths)

    def __len__(self) -> int:
        return len(self.tokens)


def oddities(text: bytes, replaced: int) -> int:
    """Bits of what is unusual in a record's text: letters that are no amino acid of their own, replaced residues."""
    upper = text.upper()
    return sum(1 << bit for bit, code in enumerate(ODD_LETTERS) if code in upper) | (replaced > 0) << 15


def stratified(lengths: NDArray[np.int64], odd: NDArray[np.uint16], size: int, seed: int) -> NDArray[np.int64]:
    """Numbers of `size` records, in order: the longest, the shortest, two of each oddity (a bit of `odd`), the others at
    random, one from each stratum of lengths.
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


def pooled(residues: NDArray[np.floating]) -> dict[str, NDArray[np.floating]]:
    """What is pooled from a protein's residue rows [L, D], each [D]; means in float64."""
    mean, std = (reduce(residues, axis=0, dtype=np.float64) for reduce in (np.mean, np.std))
    return {"mean": mean, "max": residues.max(axis=0), "std": std}


def rows_of(reference: Reference, sample: Sample, layers: tuple[int, ...], together: int = 1) -> Rows:
    """The reference's rows of every kind, of every protein: one at a time, or `together` of similar
    length as a padded batch.
    """
    found: dict[tuple[str, int], list[NDArray[np.floating]]]
    found = {(kind, layer): [np.empty(0)] * len(sample) for kind in KINDS for layer in layers}
    order = np.argsort(sample.lengths, kind="stable").tolist()
    for start in range(0, len(order), together):
        batch = order[start : start + together]
        if together == 1:
            rows = [reference.embed(sample.tokens[batch[0]], layers)]
        else:
            rows = reference.embed_padded([sample.tokens[i] for i in batch], layers)
        for i, hidden_of in zip(batch, rows, strict=True):
            for layer, hidden in hidden_of.items():
                host = (hidden if hidden.dtype == torch.float64 else hidden.float()).cpu().numpy()
                for kind, values in pooled(host[1:-1]).items():
                    found[kind, layer][i] = values[None]
                found["bos", layer][i], found["eos", layer][i] = host[:1], host[-1:]
                found["residue", layer][i] = host[1:-1]
    return {key: np.concatenate(each) for key, each in found.items()}


@dataclass(frozen=True)
class Errors:
    """Relative L2 errors of some vectors and the protein that each belongs to."""

    error: Float64
    owner: NDArray[np.int64]

    @property
    def median(self) -> float:
        return float(np.median(self.error))

    @property
    def p99(self) -> float:
        return float(np.quantile(self.error, 0.99))

    @property
    def worst(self) -> float:
        return float(self.error.max())

    @property
    def worst_owner(self) -> int:
        return int(self.owner[self.error.argmax()])


def errors(found: Rows, expected: Rows, sample: Sample, kind: str, layer: int) -> Errors:
    """Relative L2 of each vector: of each protein, for residue of each residue's for residue."""
    owner = sample.owner if kind == "residue" else np.arange(len(sample))
    return Errors(agreement.relative_l2(found[kind, layer], expected[kind, layer]), owner)


def record_errors(found: Rows, expected: Rows, sample: Sample, layer: int) -> Errors:
    """Relative L2 of each protein's residues taken as one matrix [length, D]."""
    a, b = (np.asarray(rows["residue", layer], np.float64) for rows in (found, expected))
    starts = np.append(0, np.cumsum(sample.lengths))[:-1]
    error, norm = (np.add.reduceat((m**2).sum(axis=1), starts) for m in (a - b, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        return Errors(np.where(error == 0, 0.0, np.sqrt(error / norm)), np.arange(len(sample)))
