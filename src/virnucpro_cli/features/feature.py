"""The seam between a run and what may be added to it: a feature is a file in this package, and a line of the table in embed/features.py.

A run calls the hooks of its features in the order of this file. Each does nothing unless the feature says otherwise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import fasta, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.model import locate
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import Plan
from virnucpro_cli.plan.policies import Decisions

Loaded = tuple[ModelSpec, dict[str, Any], tuple[str, ...]]
"""What reading a model's weights yields."""


@dataclass
class Run:
    """A run that has begun: its file is open, and locked. loaded: the weights, until a model is made of them."""

    config: EmbedConfig
    table: fasta.RecordTable
    work: Decisions
    plan: Plan
    layout: store.Layout
    layers: tuple[int, ...]
    spec: ModelSpec
    found: locate.Weights
    fingerprint: dict[str, Any]
    file: store.Store
    device: torch.device
    summary: report.RunReport
    clock: report.Clock
    out: Console
    loaded: Loaded | None

    def tell(self, text: str) -> None:
        """Print a note, and keep it in the report."""
        self.out.print(text, style="yellow")
        self.summary.notes.append(text)


class Feature:
    """What one feature adds to one run. Its constructor reads the small files that it needs, and raises UserError for a bad one."""

    needs_digests = False
    """Whether the index must keep the content hash of each record."""

    def __init__(self, config: EmbedConfig):
        self.config = config

    def reads(self) -> list[str]:
        """Files that it reads, which no output may overwrite."""
        return []

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

    def of_part(self, records: NDArray[np.int64] | None, work: Decisions, extra: store.Extra) -> store.Extra:
        """Columns and room in the file of this run. records: int64 [M], those of its shard; None for the whole input."""
        return store.Extra()

    def note(self, layout: store.Layout, spec: ModelSpec) -> str | None:
        """A sentence for the first screen."""
        return None

    def fingerprint(self, found: locate.Weights) -> dict[str, Any]:
        """What its values depend on, beside the columns' own entries."""
        return {}

    def check_weights(self, loaded: Loaded, found: locate.Weights) -> None:
        """Raises UserError if the weights lack what it needs."""

    def lacking(self, file: store.EmbeddingFile) -> dict[str, int]:
        """What a finished file lacks of it for want of memory, as the report counts it."""
        return {}

    def before(self, run: Run) -> None:
        """Before the forward: rows that need no computing."""

    def after(self, run: Run) -> None:
        """After the forward, when every record is placed and marked."""

    def finish(self, run: Run) -> None:
        """When all else is in the file, which is about to be finished."""

    def written(self, output: Path) -> None:
        """When the file has its final name."""
