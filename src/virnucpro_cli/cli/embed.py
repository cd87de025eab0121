"""virnucpro embed."""

from typing import Annotated

import typer

from virnucpro_cli.cli.options import Overwrite, QcFile, ReportFile, budget, numbers
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.errors import EXIT_SOME_SKIPPED

EPILOG = (
    "Exit codes: 0 all done; 2 something to put right (the message says what); 3 finished, but some records were skipped; "
    "70 a bug; 128+signal after an orderly stop, which the same command resumes."
)


def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="FASTA files, plain or gz, bz2, xz, zst; - for standard input."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT.h5", help="The HDF5 file to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="8M, 35M, 150M, 650M, 3B, 15B, their long names, demo, or a path to a fair-esm .pt, a .safetensors file or a HuggingFace directory. [default: 650M]",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="N,N", help="Layers to store: 0 is the embedding, -1 the last. [default: -1]"),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option("--pool", metavar="KIND,KIND", help="Any of mean, bos, eos, max, std, residue. [default: mean]"),
    ] = None,
    emit: Annotated[
        str | None,
        typer.Option(
            "--emit",
            metavar="WHAT,WHAT",
            help="Of the unmasked pass: logits, entropy, pseudo-perplexity; contacts, a map for each protein. [default: none]",
        ),
    ] = None,
    contacts_for: Annotated[
        str | None,
        typer.Option(
            "--contacts-for",
            metavar="FILE",
            help="Whose contacts: names of proteins, one in a line. [default: all]",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Compute in auto, fp32, fp16, bf16 or fp8 (Hopper; approximate: errors of several %). "
            "[default: auto: fp16 on CUDA, fp32 elsewhere]",
        ),
    ] = None,
    store_dtype: Annotated[
        str | None, typer.Option("--store-dtype", metavar="TYPE", help="Store fp16 or fp32. [default: fp16]")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda (all GPUs), cuda:N, cuda:N,N or mps. [default: auto]",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Processes on this host, that share the devices; auto is one for each GPU, and one on a CPU. [default: auto]",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", metavar="NAME", help="local, or ray: the nodes of a Ray cluster (extra ray). [default: local]"
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address", metavar="ADDRESS", help="auto or HOST:PORT of a running cluster. [default: start one here]"
        ),
    ] = None,
    write: Annotated[
        str | None,
        typer.Option(
            "--write",
            metavar="WHO",
            help="On a Ray cluster, who writes rows of residues: driver, or worker, where all nodes share the file system of -o. [default: driver]",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            metavar="NAME",
            help="auto, triton, torch_varlen, flash_attn, efficient or sdpa; a named one runs or is refused. [default: auto]",
        ),
    ] = None,
    token_budget: Annotated[
        str | None, typer.Option("--token-budget", metavar="N", help="Tokens per pack, or auto. [default: auto]")
    ] = None,
    max_residues: Annotated[
        int | None,
        typer.Option("--max-residues", metavar="N", help="Longest protein embedded in one piece. [default: 1022]"),
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(
            "--long",
            metavar="HOW",
            help="Longer proteins: truncate, full, window (overlapping windows, stitched), skip or error. [default: truncate]",
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option("--overlap", metavar="N", help="Least overlap of two windows, in residues. [default: 256]"),
    ] = None,
    invalid: Annotated[
        str | None,
        typer.Option(
            "--invalid",
            metavar="HOW",
            help="Residues outside the alphabet: x (embed as X), error or skip. [default: x]",
        ),
    ] = None,
    gaps: Annotated[
        str | None,
        typer.Option(
            "--gaps",
            metavar="HOW",
            help="Gaps (- and .): keep (embed as tokens, as fair-esm does), strip, x (embed as X) or error. [default: keep]",
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="HOW", help="Names: first (up to the first white space) or full header. [default: first]"
        ),
    ] = None,
    no_dedup: Annotated[
        bool, typer.Option("--no-dedup", help="Compute identical proteins again instead of copying.")
    ] = False,
    overwrite: Overwrite = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard a partial output instead of resuming it.")
    ] = False,
    retry_skipped: Annotated[
        bool,
        typer.Option(
            "--retry-skipped", help="Try again what a finished file lacks for want of memory, wherever this runs."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan and print it.")] = False,
    no_preallocate: Annotated[
        bool,
        typer.Option(
            "--no-preallocate", help="Do not reserve the disk space first (network disks where that is slow)."
        ),
    ] = False,
    force_protein: Annotated[
        bool, typer.Option("--force-protein", help="Accept a file that looks like nucleotides.")
    ] = False,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="WHAT",
            help="The input is proteins, or contigs, whose proteins are found first, into OUT.proteins.faa. [default: proteins]",
        ),
    ] = None,
    genes: Annotated[
        str | None,
        typer.Option(
            "--genes",
            metavar="HOW",
            help="How to find them: pyrodigal-gv, six-frame (every ORF) or virnucpro (chunks, as VirNucPro itself). [default: pyrodigal-gv]",
        ),
    ] = None,
    min_aa: Annotated[
        int | None,
        typer.Option("--min-aa", metavar="N", help="Shortest ORF of --genes six-frame, in residues. [default: 30]"),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", metavar="N", help="Chunks of --genes virnucpro: 300 or 500 bases. [default: 500]"),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="contig", help="Store a row for each contig, too, from its proteins' means."),
    ] = None,
    group_regex: Annotated[
        str | None,
        typer.Option(
            "--group-regex",
            metavar="REGEX",
            help="Store a row for each group, too: what (...) captures in a protein's name.",
        ),
    ] = None,
    group_table: Annotated[
        str | None,
        typer.Option("--group-table", metavar="FILE.tsv", help="Groups by a table of two columns: name, group."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="K/N",
            help="Embed the K-th of N parts, into OUT.shard-K-of-N.h5; auto/N in an array job. See status and merge.",
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Take rows of proteins that were embedded before from this folder, and add new ones.",
        ),
    ] = None,
    cache_size: Annotated[
        str | None,
        typer.Option("--cache-size", metavar="SIZE", help="Most that the cache may take, such as 500M. [default: 50G]"),
    ] = None,
    qc: QcFile = None,
    report: ReportFile = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE.toml", help="Options from a TOML file, table [embed]; flags win."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="End with tables of packing, seconds by stage and memory.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Embed protein FASTA files, or the proteins of contigs (--from contigs), into one HDF5 file, row i for record i.

    Nothing else is needed: virnucpro embed proteins.fasta -o embeddings.h5. An interrupted run is resumed by the same command.
    """
    flags = {
        "inputs": tuple(inputs), "output": output, "model": model, "layers": numbers(layers),
        "pool": None if pool is None else tuple(dict.fromkeys(part.strip() for part in pool.split(","))),
        "emit": None if emit is None else tuple(dict.fromkeys(part.strip() for part in emit.split(","))),
        "contacts_for": contacts_for, "dtype": dtype, "store_dtype": store_dtype, "device": device, "workers": budget(workers), "engine": engine, "ray_address": ray_address, "write": write, "attention": attention,
        "token_budget": budget(token_budget), "max_residues": max_residues, "long": long, "overlap": overlap,
        "invalid": invalid, "gaps": gaps, "id": id, "dedup": False if no_dedup else None, "overwrite": overwrite or None,
        "restart": restart or None, "retry_skipped": retry_skipped or None, "dry_run": dry_run or None, "preallocate": False if no_preallocate else None,
        "force_protein": force_protein or None, "from_": from_, "genes": genes, "min_aa": min_aa, "chunk": chunk,
        "group": group, "group_regex": group_regex, "group_table": group_table, "shard": shard, "cache": cache,
        "cache_size": cache_size, "qc": qc, "report": report, "verbose": verbose or None,
        "quiet": quiet or None,
    }  # fmt: skip
    settings = resolve(EmbedConfig, config, flags)
    from virnucpro_cli import embed as workflow

    summary = workflow.run(settings)
    missed = summary.counts.get("skipped") or summary.counts.get("contact maps left out")
    if missed and not (settings.dry_run or summary.already_complete):
        raise typer.Exit(EXIT_SOME_SKIPPED)
