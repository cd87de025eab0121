"""VirNucPro's nucleotide half: a row of the bases behind each protein, by a model of nucleotides, in /dna."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from virnucpro_cli import fasta, report, store
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import counted
from virnucpro_cli.features import Feature, Half, Run
from virnucpro_cli.features.contigs import paths_of
from virnucpro_cli.kinds import NUCLEOTIDE

DNA = "dna"
POOL = ("mean-all",)
BLOCK = 1 << 15
OWN = (
    "store_dtype", "cache", "cache_size", "device", "workers", "engine", "ray_address", "quiet", "shard", "dedup",
    "token_budget", "dry_run",
)  # fmt: skip
"""Settings of the run that hold for this half as well."""
LEFT_OUT = "slices left out"


class Nucleotide(Feature):
    """Rows of the slices behind the proteins of `--genes virnucpro`."""

    whole: Path

    def sources(
        self, sources: list[fasta.Source], whole: Path, out: Console, clock: report.Clock
    ) -> tuple[list[fasta.Source], store.Extra]:
        """The sources as they are; the slices were written beside the proteins."""
        self.whole = whole
        return sources, store.Extra()

    def half(self) -> Half:
        config = self.config
        slices = paths_of(self.whole).slices
        own = EmbedConfig(
            inputs=(str(slices),), output=config.output, model=config.nucleotide_model, kind=NUCLEOTIDE, pool=POOL,
            dtype="fp16" if config.dtype == "fp8" else config.dtype, long="truncate", max_residues=1 << 16,
            **{name: getattr(config, name) for name in OWN},
        )  # fmt: skip
        return Half(DNA, own, fasta.open_sources([str(slices)], self.whole.parent))

    def lacking(self, file: store.EmbeddingFile) -> dict[str, int]:
        """Slices that there was no memory for."""
        half = file.half(DNA)
        missing = int(((half.status == store.SKIPPED) & (half.reason == store.NO_MEMORY)).sum())
        return {LEFT_OUT: missing} if missing else {}

    def after(self, run: Run) -> None:
        """Count the slices that have no row."""
        half = run.file.halves[DNA]
        if skipped := int((half.status == store.SKIPPED).sum()):
            run.summary.counts[LEFT_OUT] = skipped
            run.summary.missed += skipped
            run.tell(f"{counted(skipped, 'slice')} without a row: its row in /{DNA} is NaN")

    @staticmethod
    def described(file: store.EmbeddingFile) -> Iterator[tuple[str, str]]:
        """A line of `inspect` for each dataset of rows."""
        half = file.half(DNA)
        for name in half.names:
            data = half.at(name)
            left_out = f", {n:,} left out" if (n := int((half.status == store.SKIPPED).sum())) else ""
            yield f"/{DNA}/{name}", f"{' x '.join(f'{n:,}' for n in data.shape)} {data.dtype}{left_out}"

    @staticmethod
    def count_wrong(file: store.EmbeddingFile) -> int:
        """Rows that are not finite where they are done, or not NaN where they were skipped."""
        half, wrong = file.half(DNA), 0
        for name in half.names:
            for block in store.blocks(len(half.status), BLOCK):
                rows, status = half.at(name)[block], half.status[block]
                wrong += int((~np.isfinite(rows).all(axis=1) & (status == store.DONE)).sum())
                wrong += int((~np.isnan(rows).all(axis=1) & (status == store.SKIPPED)).sum())
        return wrong
