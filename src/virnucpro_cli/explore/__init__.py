"""A look at a finished file: its contents, its neighbours, its map. Here are the options of map and search."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path

from virnucpro_cli.config import PICTURES, Config, Rule
from virnucpro_cli.config.options import option

PANEL = "Options"
METHODS = ("pca", "umap", "tsne")
MAPS = (".html", ".tsv", *PICTURES)
FEWEST = 3
"""Proteins of which there can be a map."""
MOST_HITS = 10_000


@dataclass(frozen=True)
class MapConfig(Config):
    """Everything that `map` can be told. Field names are the long options with underscores."""

    # fmt: off
    file: str = option(MISSING, PANEL, "What embed wrote.", "OUT.h5", argument=True)
    output: str = option(
        MISSING, PANEL,
        "What to draw: .png, .pdf, .svg, .jpg; .html, a page to look around in; or .tsv, the coordinates.", "MAP.png",
        short="o")
    method: str | None = option(
        None, PANEL, "pca, umap or tsne.", "HOW", choices=METHODS, said="umap if it is installed, else pca")
    color: str = option(
        "length", PANEL,
        "length, status, group, or a column of a table whose first column holds the names: FILE.tsv:column.", "WHAT")
    sample: int = option(
        100_000, PANEL, "Most proteins to show; of more, a random sample.", "N", least=FEWEST, most=1 << 63)
    seed: int = option(0, PANEL, "Of the sample, UMAP and t-SNE.", "N", least=0, most=(1 << 32) - 1)
    kind: str | None = option(None, PANEL, "Rows of which --pool.", "KIND", said="those of /embeddings")
    layer: int | None = option(None, PANEL, "Rows of which layer.", "N", said="the last stored")
    overwrite: bool = option(False, PANEL, "Replace a finished output file.")
    # fmt: on

    def rules(self) -> Iterator[Rule]:
        is_none = Path(self.output).suffix.lower() not in MAPS
        yield is_none, f"The output is {self.output}.", f"Its name must end in one of {', '.join(MAPS)}."


@dataclass(frozen=True)
class SearchConfig(Config):
    """Everything that `search` can be told. Field names are the long options with underscores."""

    # fmt: off
    file: str = option(MISSING, PANEL, "What embed wrote: the proteins to search among.", "OUT.h5", argument=True)
    query: str = option(
        MISSING, PANEL, "A FASTA file (- for standard input), embedded as OUT.h5 was; the name of a protein in OUT.h5; "
        "or another file that embed wrote.", "QUERY")
    k: int = option(10, PANEL, "Hits for each query.", "N", least=1, most=MOST_HITS)
    raw: bool = option(
        False, PANEL, "Plain cosines. Those of ESM-2 are nearly blind: unrelated proteins reach .9.")
    output: str | None = option(None, PANEL, "", "HITS.tsv", short="o", said="standard output")
    model: str | None = option(None, PANEL, "Where the weights of OUT.h5 are now, for a FASTA query.", "PATH")
    adapter: tuple[str, ...] = option(
        (), PANEL, "Where the adapters of OUT.h5 are now, in order.", "DIR", repeated=True, path=True)
    force_protein: bool = option(False, PANEL, "As in embed, for a FASTA query.")
    kind: str | None = option(None, PANEL, "Rows of which --pool.", "KIND", said="those of /embeddings")
    layer: int | None = option(None, PANEL, "Rows of which layer.", "N", said="the last stored")
    overwrite: bool = option(False, PANEL, "Replace a finished output file.")
    # fmt: on
