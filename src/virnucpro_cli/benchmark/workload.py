"""Sequences to time: built-in lengths with random residues, or a sample of the user's own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnucpro_cli import fasta
from virnucpro_cli.alphabet import ESM, Reading
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.fasta.plain import write_texts
from virnucpro_cli.plan.packing import SPECIAL_TOKENS, Segments, whole_segments

# fmt: off
UNIPROT_LENGTHS = (
    7, 33, 52, 62, 67, 73, 78, 84, 92, 97, 103, 111, 117, 122, 129, 132, 140, 145, 150, 155, 161, 166, 171, 179, 185,
    191, 197, 202, 208, 212, 218, 224, 229, 235, 240, 247, 255, 262, 270, 275, 281, 289, 294, 300, 307, 314, 321, 330,
    335, 342, 349, 354, 360, 365, 371, 379, 387, 394, 401, 410, 418, 427, 439, 447, 455, 463, 475, 485, 494, 507, 516,
    530, 544, 560, 577, 589, 602, 612, 622, 634, 642, 652, 671, 690, 706, 730, 752, 779, 809, 842, 872, 910, 941, 997,
    1083, 1197, 1284, 1434, 1703, 2236, 7592,
)
# fmt: on
"""Lengths of 5,000 UniProtKB proteins at every percentile from 0 to 100; their mean is 459."""

NATURAL = "natural"
"""The name of the workload whose lengths those are."""
FRAGMENT_LENGTHS = (60, 165)
RESIDUES = b"LAGVSERTIDPKQNFYMHWC"


@dataclass(frozen=True)
class Workload:
    """Named records with their segments, each cut after max_residues."""

    name: str
    table: RecordTable
    segments: Segments

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each segment, int64 [n]."""
        return self.segments.length.astype(np.int64) + SPECIAL_TOKENS

    @property
    def path(self) -> str:
        return self.table.sources[0].path

    def token_ids(self) -> list[bytes]:
        """Token ids of each segment without `<cls>` and `<eos>`."""
        ids = self.table.token_ids(self.segments.record.astype(np.int64))
        return [text[:length] for text, length in zip(ids, self.segments.length.tolist(), strict=True)]


def natural(tokens: int, dice: np.random.Generator) -> NDArray[np.int64]:
    """Lengths as in UniProt, int64 [n], about `tokens` tokens of them after the cut at 1022."""
    mean = np.minimum(UNIPROT_LENGTHS, 1022).mean() + SPECIAL_TOKENS
    return np.interp(dice.random(max(int(tokens / mean), 8)), np.linspace(0, 1, 101), UNIPROT_LENGTHS).astype(np.int64)


def fragments(tokens: int, dice: np.random.Generator) -> NDArray[np.int64]:
    """Lengths of 60-165 residues, int64 [n], as of short open reading frames or VirNucPro's chunks."""
    low, high = FRAGMENT_LENGTHS
    count = max(int(tokens / ((low + high) / 2 + SPECIAL_TOKENS)), 8)
    return dice.integers(low, high + 1, count)


def made_up(name: str, lengths: NDArray[np.int64], folder: Path, max_residues: int, reading: Reading = ESM) -> Workload:
    """Random proteins of the given lengths, int64 [n], written as FASTA and read back as any input."""
    dice = np.random.default_rng(0)
    letters = np.frombuffer(RESIDUES, np.uint8)
    texts = [dice.choice(letters, length).tobytes() for length in lengths.tolist()]
    return _indexed(name, write_texts(folder / f"{name}.fasta", texts), folder, max_residues, reading)


def sampled(inputs: tuple[str, ...], tokens: int, folder: Path, max_residues: int, reading: Reading = ESM) -> Workload:
    """A random sample of the user's records of about `tokens` tokens, in their order; all if they are fewer."""
    table = fasta.index(fasta.open_sources(inputs, folder), dedup=False, reading=reading)
    able = np.flatnonzero(table.length > 0)
    sizes = np.minimum(table.length[able], max_residues).astype(np.int64) + SPECIAL_TOKENS
    order = np.random.default_rng(0).permutation(len(able))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), tokens)) + 1
    chosen = able[np.sort(order[:enough])]
    letters = {i: letter for letter, i in reading.ids().items()}
    texts = ["".join(letters.get(i, reading.unknown) for i in ids).encode() for ids in table.token_ids(chosen)]
    return _indexed("input", write_texts(folder / "input.fasta", texts), folder, max_residues, reading)


def _indexed(name: str, path: Path, folder: Path, max_residues: int, reading: Reading) -> Workload:
    table = fasta.index(fasta.open_sources([str(path)], folder), dedup=False, reading=reading)
    kept = np.flatnonzero(table.length > 0)
    return Workload(name, table, whole_segments(kept, table.length[kept].astype(np.int64), max_residues))
