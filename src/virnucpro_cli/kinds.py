"""Kinds of input, and of rows of it. A new pooling is a row here and a function in pooling.py (and the oracle's)."""

from collections.abc import Sequence

PROTEIN, NUCLEOTIDE = "protein", "nucleotide"
WORDS = {PROTEIN: ("protein", "residue"), NUCLEOTIDE: ("sequence", "base")}
"""Kinds of input, and the words for a record and for a letter of it."""

POOLED = {
    "mean": "the mean over residues",
    "mean-all": "the mean over all tokens, the first and the last included",
    "bos": "the row of the <cls> token",
    "eos": "the row of the <eos> token",
    "max": "the maximum over residues",
    "std": "the standard deviation over residues",
}
"""Kinds of one row a protein, in words. /embeddings is the first of them that was asked for."""

KINDS = (*POOLED, "residue")
OF_ALL_RESIDUES = ("max", "std", "mean-all")
"""Kinds that windows of a protein do not add up to."""

UNMASKED = {"logits": "logits", "entropy": "entropy", "pseudo-perplexity": "pseudo_perplexity"}
"""Names of --emit and their datasets in /unmasked, from one pass over the unmasked protein.

Logits are [sum L, V] in the store dtype; scores are float32 [N].
"""

EMITS = (*UNMASKED, "contacts")
"""All names of --emit; contacts take a pass of their own (features/contacts)."""


def pooled(kinds: Sequence[str]) -> list[str]:
    """Kinds of one row a protein; the first is the default embedding."""
    return [kind for kind in POOLED if kind in kinds]


def unmasked(emit: Sequence[str]) -> tuple[str, ...]:
    """Datasets of /unmasked for what --emit names."""
    return tuple(UNMASKED[name] for name in emit if name in UNMASKED)


def by_residue(kind: str, name: int | str) -> bool:
    """Whether the dataset `kind/name` has a row for each residue."""
    return kind == "residue" or name == "logits"


def any_by_residue(pool: Sequence[str], emit: Sequence[str]) -> bool:
    """Whether a file with these has rows for residues, and so their offsets."""
    return "residue" in pool or "logits" in emit
