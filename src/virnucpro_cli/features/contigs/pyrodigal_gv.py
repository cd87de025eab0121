"""Genes by pyrodigal-gv: Prodigal's metagenomic mode with models of viruses and giant viruses (Camargo et al. 2023)."""

import io
from typing import Any

from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError, install_command
from virnucpro_cli.features.contigs.codons import GAP, Genes


def _library() -> Any:
    try:
        import pyrodigal
        import pyrodigal_gv
    except ImportError:
        raise UserError(
            "--genes pyrodigal-gv needs the package pyrodigal-gv, which is not installed.",
            f"{install_command('contigs')}, or choose --genes six-frame.",
        ) from None
    return pyrodigal_gv, pyrodigal


def settings(config: EmbedConfig) -> dict[str, Any]:
    """Settings that its results depend on. Raises UserError if it is not installed."""
    pyrodigal_gv, pyrodigal = _library()
    return {"version": f"{pyrodigal_gv.__version__} (pyrodigal {pyrodigal.__version__})", "mode": "meta", "mask": True}


GAPS = "no gene is looked for in or across them"


class Caller:
    """Names and headers are those of the library's own writer: `CONTIG_1 # begin # end # strand # ID=CONTIG_1;...`.

    The whole name stands in ID, because the number of the contig that Prodigal has there depends on the order of calls.
    Coordinates include the stop codon, as Prodigal's do. No gene lies in or across a gap (`codons.gaps`).
    Several threads may call it at once: it lets go of Python.
    """

    def __init__(self, config: EmbedConfig):
        self._finder = _library()[0].ViralGeneFinder(meta=True, mask=True, min_mask=GAP)

    def __call__(self, name: str, sequence: bytes) -> Genes:
        genes = self._finder.find_genes(sequence)
        text = io.StringIO()
        genes.write_translations(text, name, full_id=True)
        return Genes.of(text.getvalue().encode(), ((gene.begin, gene.end, gene.strand) for gene in genes))
