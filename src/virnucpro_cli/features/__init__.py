"""Additions to a run: contigs, contacts, groups, a cache, quality columns. No feature imports another.

A feature is a file in this package with a subclass of Feature, and a line of FEATURES. A run imports those it needs.
It calls the hooks of its features in the order of the table, and so do commands on files that hold something of them.
A hook does nothing unless the feature overrides it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import fasta, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.model import locate
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import Plan
from virnucpro_cli.plan.policies import Decisions

if TYPE_CHECKING:
    import torch


class Known(NamedTuple):
    """A feature in the table. leaves: a dataset of files that other commands must ask it about."""

    module: str
    name: str
    is_asked_for: Callable[[EmbedConfig], Any]
    leaves: str | None = None


FEATURES = (
    Known("contigs", "Contigs", lambda config: config.from_ == "contigs"),
    Known("contigs.nucleotide", "Nucleotide", lambda config: config.nucleotide, "dna/status"),
    Known("groups", "Groups", lambda config: config.group or config.group_regex or config.group_table, "groups/ids"),
    Known("contacts", "Contacts", lambda config: "contacts" in config.emit, "contacts/starts"),
    Known("cache", "Cache", lambda config: config.cache),
    Known("qc", "Table", lambda config: config.qc),
)
"""Every feature, in the order in which hooks are called."""

Loaded = tuple[ModelSpec, dict[str, Any], tuple[str, ...]]
"""Weights that were read: the sizes of the model, its tensors, and notes."""


def asked_for(config: EmbedConfig) -> "list[Feature]":
    """The features of a run. Raises UserError for what they cannot read."""
    return [_class_of(known)(config) for known in FEATURES if known.is_asked_for(config)]


def stored_in(file: "store.EmbeddingFile") -> "list[type[Feature]]":
    """The features that left something in a file, of those whose hooks need to know."""
    return [_class_of(known) for known in FEATURES if known.leaves is not None and file.holds(known.leaves)]


def _class_of(known: Known) -> "type[Feature]":
    of: type[Feature] = getattr(import_module(f"{__name__}.{known.module}"), known.name)
    return of


@dataclass(kw_only=True)
class Run:
    """A run, decided. weights, fingerprint and file are there once the file is open, and locked.

    loaded: the weights, if they were read already and no model is made of them yet; device: of this process; dtype: of
    the forward. half: the name of a run that is one of another's, empty for a whole one.
    """

    config: EmbedConfig
    spec: ModelSpec
    layers: tuple[int, ...]
    table: fasta.RecordTable
    decisions: Decisions
    plan: Plan
    layout: store.Layout
    device: "torch.device"
    dtype: "torch.dtype"
    out: Console
    clock: report.Clock
    summary: report.RunReport
    loaded: Loaded | None = None
    half: str = ""
    weights: locate.Weights = field(init=False)
    fingerprint: dict[str, Any] = field(init=False)
    file: store.Store = field(init=False)

    def tell(self, text: str) -> None:
        """Print a note, and keep it in the report."""
        self.out.print(text, style="yellow")
        self.summary.notes.append(text)

    def take_weights(self) -> Loaded:
        """The weights, which the run forgets, so that memory holds them once."""
        from virnucpro_cli.model import weights  # which needs PyTorch; commands on files do without

        loaded, self.loaded = self.loaded, None
        return loaded or weights.load(self.weights)


class Half(NamedTuple):
    """Rows that another model has of the same records, as a run of its own in the same file.

    name: the folder of the file that they lie in, of `schema.HALVES`; sources: a record for each record of the run.
    """

    name: str
    config: EmbedConfig
    sources: list[fasta.Source]


Shards = list[tuple[NDArray[np.int64], "store.EmbeddingFile"]]
"""Shards of an output: the numbers of its records, int64 [M], and its open file."""


class Feature:
    """An addition to a run. The constructor reads its small files, and raises UserError for a bad file."""

    needs_digests = False
    """Whether the index must keep the content hash of each record."""
    reads: tuple[str, ...] = ()
    """Options that name files or folders that it reads, which no output may overwrite."""

    remade: tuple[str, ...] = ()
    """Columns that a merge makes anew, where it copies all others."""

    def __init__(self, config: EmbedConfig):
        self.config = config

    def writes(self, whole: Path) -> list[Path]:
        """Files that it writes beside the output of all shards. Raises UserError if they cannot be written."""
        return []

    def sources(
        self, sources: list[fasta.Source], whole: Path, out: Console, clock: report.Clock
    ) -> tuple[list[fasta.Source], store.Extra]:
        """The FASTA texts to embed instead of the input, and what the file holds of the input."""
        return sources, store.Extra()

    def of_input(self, table: fasta.RecordTable, extra: store.Extra) -> store.Extra:
        """Columns [N] and tables of the whole input; extra: those that were added before."""
        return store.Extra()

    def of_part(self, records: NDArray[np.int64] | None, decisions: Decisions, extra: store.Extra) -> store.Extra:
        """Columns and room in the file of this run. records: int64 [M], of its shard; None for the whole input."""
        return store.Extra()

    def half(self) -> Half | None:
        """Rows of another model that it adds, once `sources` was called."""
        return None

    def note(self, run: Run) -> str | None:
        """A sentence for the first screen."""
        return None

    def fingerprint(self, weights: locate.Weights, dtype: "torch.dtype") -> dict[str, Any]:
        """Entries of the fingerprint that its values depend on, beside those of its columns."""
        return {}

    def check_weights(self, loaded: Loaded, weights: locate.Weights) -> None:
        """Raises UserError if the weights lack what it needs."""

    def lacking(self, file: "store.EmbeddingFile") -> dict[str, int]:
        """Things that a finished file lacks for want of memory, as the report counts them."""
        return {}

    def before(self, run: Run) -> None:
        """Before the forward: rows that need no computing."""

    def after(self, run: Run) -> None:
        """After the forward, when every record is placed and marked."""

    def finish(self, run: Run) -> None:
        """When all else is in the file, which is about to be finished."""

    def written(self, output: Path) -> None:
        """When the file has its final name."""

    # --- files that hold something of it -----------------------------------------------------------------------------

    @staticmethod
    def of_merged(extra: store.Extra, shards: Shards) -> store.Extra:
        """Columns and room in the merged file. extra: its tables and the columns that are copied."""
        return store.Extra()

    @staticmethod
    def merge(file: store.Store, shards: Shards) -> None:
        """Place in the merged file, whose rows are there, what is not of records."""

    @staticmethod
    def described(file: "store.EmbeddingFile") -> Iterator[tuple[str, str]]:
        """Lines of `inspect`: name and facts."""
        yield from ()

    @staticmethod
    def count_wrong(file: "store.EmbeddingFile") -> int:
        """Number of stored things that are neither as their status says nor NaN."""
        return 0
