"""The configuration of `predict`. Options that it shares with `embed` are those of that command."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from virnucpro_cli.config import COMPUTE, FIRST, INPUT, OUTPUT, Config, EmbedConfig, Rule
from virnucpro_cli.config.options import option

FORMATS = ("broad", "original")
_EMBED = {field.name: field for field in dataclasses.fields(EmbedConfig)}


def _as_in_embed(name: str, **other: Any) -> Any:
    """The field of EmbedConfig of that name. other: a default, or metadata, that is another here."""
    default = other.pop("default", _EMBED[name].default)
    return dataclasses.field(default=default, metadata={**_EMBED[name].metadata, **other})


@dataclass(frozen=True)
class PredictConfig(Config):
    """Everything that `predict` can be told. Field names are the long options with underscores."""

    # fmt: off
    inputs: tuple[str, ...] = option(
        (), INPUT, "FASTA or FASTQ files of contigs or reads, plain or gz, bz2, xz, zst; - for standard input; or "
        "one file of embed --from contigs --genes virnucpro --nucleotide.", "INPUT...", repeated=True, path=True,
        argument=True)
    output: str = option("", FIRST, "The folder for the tables and embeddings.h5.", "DIR", written=True, short="o")
    chunk: int | None = option(
        None, FIRST, "Bases in a chunk.", choices=(300, 500), said="the head's; 500 without --head")
    head: str | None = option(
        None, FIRST, "VirNucPro's 300_model.pth or 500_model.pth, a state_dict of the same module, or a .safetensors.",
        "FILE", path=True, said="the published one, from the cache")
    format: str = option(
        "broad", FIRST, "Tables with the columns and digits of virnucpro-broad, or of VirNucPro itself.",
        choices=FORMATS)
    compare: str | None = option(
        None, FIRST, "Also compare with another prediction_results.txt, into DIR/compare.tsv.", "FILE", path=True)
    model: str = _as_in_embed(
        "model", default="esm2_t36_3B_UR50D", panel=COMPUTE, help="The protein model, as in embed.", said="3B")
    nucleotide_model: str = _as_in_embed("nucleotide_model", panel=COMPUTE, help="The nucleotide model, or a path.")
    dtype: str = _as_in_embed("dtype")
    device: str = _as_in_embed("device")
    workers: int | str = _as_in_embed("workers")
    attention: str = _as_in_embed("attention")
    token_budget: int | str = _as_in_embed("token_budget")
    store_dtype: str = _as_in_embed("store_dtype", default="fp32")
    cache: str | None = _as_in_embed("cache")
    cache_size: str = _as_in_embed("cache_size")
    overwrite: bool = option(False, OUTPUT, "Replace tables of another head, format or embeddings file.")
    restart: bool = _as_in_embed("restart")
    report: str | None = _as_in_embed("report")
    verbose: bool = _as_in_embed("verbose")
    quiet: bool = _as_in_embed("quiet")
    shard: str | None = _as_in_embed(
        "shard", help="Embed the K-th of N parts only, into DIR/embeddings.shard-K-of-N.h5. See status and merge.")
    engine: str = _as_in_embed("engine")
    ray_address: str | None = _as_in_embed("ray_address")
    # fmt: on

    def rules(self) -> Iterator[Rule]:
        usage = "virnucpro predict contigs.fna -o DIR"
        yield not self.inputs or not self.output, "Contigs and a folder for the tables are needed.", usage
        yield self.output == "-", "--output is -, and a folder is needed.", "Name one, such as predictions."
        refusal = "--compare with --shard: a shard makes no tables."
        yield self.shard is not None and self.compare is not None, refusal, "Compare after the merge."
