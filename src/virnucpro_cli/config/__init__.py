"""Configurations of runs: frozen dataclasses, made once from defaults < TOML file < flags.

Each field carries what the command line, the checks and the documentation say of it. Rules between fields follow.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from virnucpro_cli.config.options import ABOVE_0, FINITE, fields_of, flag_of, option
from virnucpro_cli.config.options import resolve as resolve
from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import EMITS, KINDS, NUCLEOTIDE, OF_ALL_RESIDUES, PROTEIN, WORDS

SYNONYMS = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float8": "fp8"}
"""Names of dtypes as PyTorch has them; the short ones are stored."""
DTYPES = ("auto", "fp32", "fp16", "bf16", "fp8")
BACKENDS = ("auto", "triton", "portable", "torch_varlen", "flash_attn", "efficient", "sdpa")
LARGEST = 1 << 24
MOST_WORKERS = 256
PICTURES = (".png", ".pdf", ".svg", ".jpg")
PEERS = ("fair-esm", "transformers", "esm-efficient", "faesm")
FIRST, INPUT, COMPUTE, LONG = "Most used", "Input", "Model and compute", "Long proteins"
STORED, OUTPUT, CONTIGS, CLUSTER = "What is stored", "Output and reports", "Contigs and groups", "Cluster"
GATES = "Gates"

_report = partial(option, None, OUTPUT, "Write the report as JSON.", "FILE.json", written=True)
_quiet = partial(option, False, OUTPUT, short="q")
_max_residues = partial(option, 1022, LONG, metavar="N", least=1, most=LARGEST)

Rule = tuple[bool, str, str]
"""Whether it is broken, the refusal, and the remedy."""


class Config:
    """The checks of a configuration: every field by itself, then the rules between them."""

    def __post_init__(self) -> None:
        """Give dtypes their short names. Raises UserError for a value that cannot be, and for a broken rule."""
        for name in ("dtype", "store_dtype"):
            if getattr(self, name, None) in SYNONYMS:
                object.__setattr__(self, name, SYNONYMS[getattr(self, name)])
        for name, field in fields_of(type(self)).items():
            field.check(getattr(self, name))
        for is_broken, refusal, remedy in self.rules():
            if is_broken:
                raise UserError(refusal, remedy)

    def rules(self) -> Iterator[Rule]:
        """The rules in their order; each may rely on those before it."""
        return iter(())

    def given(self, *names: str) -> list[str]:
        """The options, of those named, that have another value than their default."""
        fields = fields_of(type(self))
        return [flag_of(name) for name in names if getattr(self, name) != fields[name].default]


@dataclass(frozen=True)
class EmbedConfig(Config):
    """Everything that `embed` can be told. Field names are the long options with underscores."""

    # fmt: off
    inputs: tuple[str, ...] = option(
        (), INPUT, "FASTA files, plain or gz, bz2, xz, zst; - for standard input.", "INPUT...", repeated=True,
        path=True, argument=True)
    output: str = option("", FIRST, "The HDF5 file to write.", "OUT.h5", written=True, short="o")
    model: str = option(
        "esm2_t33_650M_UR50D", FIRST, "8M, 35M, 150M, 650M, 3B, 15B, dplm-150m, dplm-650m, dplm-3b, "
        "esmc-300m, esmc-600m, esmc-6b, esm1b, esm1v-1 to esm1v-5, lucavirus, dnabert-s, their long names, demo, or a "
        "path to a fair-esm .pt, an esm 3.2 .pth, a .safetensors file or a HuggingFace directory.", "MODEL", path=True,
        said="650M")
    adapter: tuple[str, ...] = option(
        (), COMPUTE, "A folder with a LoRA or DoRA adapter of PEFT, merged into the model; may be repeated, in order.",
        "DIR", repeated=True, path=True)
    pool: tuple[str, ...] = option(
        ("mean",), FIRST, f"Rows to store, any of {', '.join(KINDS)}.", "KIND,KIND", choices=KINDS)
    layers: tuple[int, ...] = option((-1,), FIRST, "Layers to store: 0 is the embedding, -1 the last.", "N,N")
    long: str = option(
        "auto", FIRST,
        "Proteins longer than --max-residues: cut, whole, covered by stitched windows, skipped, or refused.",
        choices=("auto", "truncate", "full", "window", "skip", "error"),
        said="auto: truncate; window for ESM-1b and ESM-1v")
    kind: str = option(
        PROTEIN, INPUT, "What the letters are; nucleotide for LucaVirus; DNABERT-S reads nothing else.",
        choices=tuple(WORDS))
    invalid: str = option(
        "x", INPUT, "Residues outside the alphabet: embed them as X, refuse them, or skip the protein.",
        choices=("x", "error", "skip"))
    gaps: str = option(
        "keep", INPUT,
        "Gaps (- and .): embed them as tokens as fair-esm does, leave them out, embed them as X, or refuse them.",
        choices=("keep", "strip", "x", "error"))
    id: str = option(
        "first", INPUT, "Names: up to the first white space, or the full header.", choices=("first", "full"))
    dedup: bool = option(True, INPUT, "Compute identical proteins again instead of copying.")
    force_protein: bool = option(False, INPUT, "Accept a file that looks like nucleotides.")
    dtype: str = option(
        "auto", COMPUTE, "Compute in fp32, fp16, bf16 or fp8 (Hopper; approximate: errors of several %).", "TYPE",
        choices=DTYPES, said="auto: fp16 on CUDA, fp32 elsewhere")
    residual: str = option(
        "same", COMPUTE, "Residual stream in --dtype, or in fp32 for models that overflow in fp16 (plain PyTorch).",
        choices=("same", "fp32"))
    device: str = option("auto", COMPUTE, "auto, cpu, cuda (all GPUs), cuda:N, cuda:N,N or mps.", "DEVICE")
    workers: int | str = option(
        "auto", COMPUTE,
        "Processes on this host, which share its GPUs or CPU threads; auto is one on a CPU, and one for each GPU, or "
        "for as many as the work is worth.",
        "N", least=1, most=MOST_WORKERS)
    attention: str = option(
        "auto", COMPUTE,
        f"Kernels of attention: {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}; named ones run or are refused.", "NAME",
        choices=BACKENDS)
    token_budget: int | str = option("auto", COMPUTE, "Tokens per pack, or auto.", "N", least=1024, most=LARGEST)
    max_residues: int = _max_residues("Longest protein embedded in one piece.")
    overlap: int = option(256, LONG, "Least overlap of two windows, in residues.", "N", least=0, most=LARGEST)
    emit: tuple[str, ...] = option(
        (), STORED,
        "Store, too: logits, entropy or pseudo-perplexity of the unmasked pass; contacts, a map for each protein.",
        "WHAT,WHAT", choices=EMITS)
    contacts_for: str | None = option(
        None, STORED, "Names of the proteins that get a contact map, one in a line.", "FILE", path=True, said="all")
    store_dtype: str = option("fp16", STORED, "Store values as fp16 or fp32.", "TYPE", choices=("fp16", "fp32"))
    cache: str | None = option(
        None, STORED, "Take rows of proteins that were embedded before from this folder, and add new ones.", "DIR",
        path=True)
    cache_size: str = option("50G", STORED, "Most that the cache may take, such as 500M.", "SIZE")
    overwrite: bool = option(False, OUTPUT, "Replace a finished output file.")
    restart: bool = option(False, OUTPUT, "Discard a partial output instead of resuming it.")
    retry_skipped: bool = option(
        False, OUTPUT, "Try again what a finished file lacks for want of memory, wherever this runs.")
    dry_run: bool = option(False, OUTPUT, "Stop after the plan and print it.")
    preallocate: bool = option(True, OUTPUT, "Do not reserve the disk space first (network disks where that is slow).")
    qc: str | None = option(None, OUTPUT, "Write a line for each protein: what became of it.", "FILE.tsv", written=True)
    report: str | None = _report()
    verbose: bool = option(False, OUTPUT, "End with tables of packing, seconds by stage and memory.", short="v")
    quiet: bool = _quiet("Print errors only.")
    from_: str = option(
        "proteins", CONTIGS,
        "The input is proteins, or contigs, whose proteins are found first, into OUT.proteins.faa.",
        choices=("proteins", "contigs"))
    genes: str = option(
        "pyrodigal-gv", CONTIGS,
        "How to find them: pyrodigal-gv, six-frame (every ORF) or virnucpro (chunks, as VirNucPro itself).", "HOW",
        choices=("pyrodigal-gv", "six-frame", "virnucpro"))
    min_aa: int = option(30, CONTIGS, "Shortest ORF of --genes six-frame, in residues.", "N", least=1, most=LARGEST)
    chunk: int = option(500, CONTIGS, "Bases in a chunk of --genes virnucpro.", choices=(300, 500))
    nucleotide: bool = option(
        False, CONTIGS,
        "With --genes virnucpro, store VirNucPro's nucleotide half, too: a row of the bases behind each protein.")
    nucleotide_model: str = option(
        "dnabert-s", CONTIGS, "The model of that half: dnabert-s or a path.", "MODEL", path=True)
    group: str | None = option(None, CONTIGS, "Store a row for each contig, too, from its proteins' means.", "contig")
    group_regex: str | None = option(
        None, CONTIGS, "Store a row for each group, too: what (...) captures in a protein's name.", "REGEX")
    group_table: str | None = option(
        None, CONTIGS, "Groups by a table of two columns: name, group.", "FILE.tsv", path=True)
    shard: str | None = option(
        None, CLUSTER,
        "Embed the K-th of N parts, into OUT.shard-K-of-N.h5; auto/N in an array job. See status and merge.", "K/N",
        said="all")
    engine: str = option(
        "local", CLUSTER, "local, or ray: the nodes of a Ray cluster (extra ray).", choices=("local", "ray"))
    ray_address: str | None = option(
        None, CLUSTER, "auto or HOST:PORT of a running cluster.", "ADDRESS", said="start one here")
    # fmt: on

    @property
    def words(self) -> tuple[str, str]:
        """The words for a record and for a letter of it."""
        return WORDS[self.kind]

    @property
    def asks_for_processes(self) -> bool:
        """Whether it says how many processes a run on this host has, or names several GPUs."""
        return self.workers != "auto" or "," in self.device

    def rules(self) -> Iterator[Rule]:
        bytes_of(self.cache_size)
        yield self.output == "-", "--output is -, and HDF5 cannot be written to a pipe.", "Name a file, such as out.h5."
        yield not self.pool, "--pool has nothing.", "Give it a value, such as mean."
        yield not self.layers, "--layers has nothing.", "Give it a value, such as -1."
        contacts, unkept = "contacts" in self.emit, "residue" in self.pool or bool(self.emit)
        refusal = "--cache keeps pooled rows, not those of --pool residue or --emit."
        yield self.cache is not None and unkept, refusal, "Leave one of them out."
        refusal = "--contacts-for says whose contacts."
        yield self.contacts_for is not None and not contacts, refusal, "Add --emit contacts."
        if self.long == "window":
            refusal = "--emit with --long window: it is of a protein in one piece."
            yield bool(self.emit), refusal, "Choose --long full."
            whole = [kind for kind in self.pool if kind in OF_ALL_RESIDUES]
            refusal = f"--pool {','.join(whole)} with --long window: windows do not add up to that."
            yield bool(whole), refusal, "Choose --long full, or compute it from the rows of --pool residue."
            remedy = f"Give 0 or more, and less than --max-residues {self.max_residues}."
            yield self.overlap >= self.max_residues, f"--overlap is {self.overlap}.", remedy
        for flag in (*self.given("force_protein"), *["--from contigs"] * (self.from_ == "contigs")):
            yield self.kind == NUCLEOTIDE, f"{flag} is of proteins, not of --kind nucleotide.", "Leave one of them out."
        ray, refusal = self.engine == "ray", "--ray-address has a meaning with --engine ray only."
        yield self.ray_address is not None and not ray, refusal, "Add --engine ray."
        refusal = "--emit contacts is the work of one device, not of --engine ray."
        yield contacts and ray, refusal, "Leave one out, or see --shard."
        for flag in self.given("nucleotide_model"):
            yield not self.nucleotide, f"{flag} is of --nucleotide.", "Add --nucleotide, or leave it out."
        for flag in self.given("genes", "min_aa", "chunk", "nucleotide"):
            yield self.from_ != "contigs", f"{flag} is of contigs.", "Say --from contigs, or leave it out."
        for name, caller in (("min_aa", "six-frame"), ("chunk", "virnucpro"), ("nucleotide", "virnucpro")):
            for flag in self.given(name):
                yield self.genes != caller, f"{flag} is of --genes {caller}.", "Leave it out."
        yield from self._rules_of_groups()

    def _rules_of_groups(self) -> Iterator[Rule]:
        given = self.given("group", "group_regex", "group_table")
        for other in given[1:]:
            yield True, f"{given[0]} and {other} both say what a group is.", "Give one."
        for flag in given:
            yield "mean" not in self.pool, f"{flag} needs the means of the proteins.", "Add mean to --pool."
        of_contigs = (self.group, self.from_) == ("contig", "contigs")
        remedy = "It can be contig, with --from contigs; else see --group-regex and --group-table."
        refusal = f"--group is {self.group!r}, from {self.from_}."
        yield self.group is not None and not of_contigs, refusal, remedy
        if self.group_regex is not None:
            _check_regex(self.group_regex)


def _check_regex(text: str) -> None:
    try:
        groups = re.compile(text).groups
    except re.error as error:
        refusal = f"--group-regex {text!r} is no regular expression: {error}."
        raise UserError(refusal, "See Python's module re.") from None
    if groups != 1:
        remedy = "Give one, such as '^(.+)_[0-9]+$'; (?:...) does not capture."
        raise UserError(f"--group-regex {text!r} has {groups} capturing groups.", remedy)


@dataclass(frozen=True)
class ValidateConfig(Config):
    """Everything that `validate` can be told. Field names are the long options with underscores."""

    # fmt: off
    fasta: tuple[str, ...] = option(
        (), INPUT, "Your own proteins; may be repeated.", "FILE", repeated=True, path=True,
        said="128 that ship with virnucpro")
    against: str | None = option(
        None, INPUT, "Audit a file that embed wrote, with the model and settings it names; or another tool's, with "
        "--model and --fasta.", "OUT.h5", path=True)
    sample: int = option(
        60, INPUT, "Proteins to compare, spread over the lengths; longest, shortest and odd ones among them.", "N",
        least=2, most=1 << 63)
    seed: int = option(0, INPUT, "Seed of the sample.", "N", least=0, most=1 << 63)
    min_cosine: float | None = option(
        None, GATES, "Least cosine of a pooled row with the reference's.", "X", least=-1, most=1,
        said="fp32 and fp16 0.999, bf16 0.998, fp8 0.92")
    max_rel_l2: float | None = option(
        None, GATES, "Largest relative L2 error of a pooled row.", "X", least=ABOVE_0, most=FINITE,
        said="fp32 1e-5, fp16 1e-2, bf16 6e-2, fp8 4e-1")
    model: str | None = option(None, COMPUTE, "As in embed.", "MODEL", path=True, said="demo")
    adapter: tuple[str, ...] = option((), COMPUTE, "As in embed.", "DIR", repeated=True, path=True)
    kind: str = option(PROTEIN, COMPUTE, "As in embed.", choices=tuple(WORDS))
    layers: tuple[int, ...] = option((), COMPUTE, "Layers to compare.", "N,N", said="0, the middle and the last")
    dtype: str = option("auto", COMPUTE, "As in embed.", "TYPE", choices=DTYPES)
    residual: str = option("same", COMPUTE, "As in embed.", choices=("same", "fp32"))
    device: str = option("auto", COMPUTE, "As in embed.", "DEVICE")
    attention: str = option("auto", COMPUTE, "As in embed.", "NAME", choices=BACKENDS)
    token_budget: int | str = option("auto", COMPUTE, "As in embed.", "N", least=1024, most=LARGEST)
    max_residues: int = _max_residues("As in embed.")
    reference_device: str = option("cpu", COMPUTE, "Where the reference runs; cuda for large models.", "DEVICE")
    report: str | None = _report()
    quiet: bool = _quiet("Print the verdict only.")
    # fmt: on

    def rules(self) -> Iterator[Rule]:
        for flag in self.given("kind", "layers", "dtype", "residual", "max_residues", "attention", "token_budget"):
            yield bool(self.against), f"{flag} has no meaning with --against.", "The file says how it was made."


@dataclass(frozen=True)
class BenchConfig(Config):
    """Everything that `bench` can be told. Field names are the long options with underscores."""

    # fmt: off
    packed: bool = option(False, INPUT, "Time packed batches.", said="both")
    unpacked: bool = option(False, INPUT, "Time padded batches, in file order and sorted by length.", said="both")
    fasta: tuple[str, ...] = option(
        (), INPUT, "Your own proteins (a sample).", "FILE", repeated=True, path=True, said="made-up ones")
    seconds: float = option(45.0, INPUT, "About how long to measure.", "S", least=ABOVE_0, most=86400, said="45")
    peers: tuple[str, ...] = option(
        (), INPUT, f"Also time {', '.join(PEERS)} if installed.", "NAME,NAME", choices=PEERS)
    model: str | None = option(
        None, COMPUTE, "As in embed; random weights if it is not here.", "MODEL", path=True,
        said="650M on a GPU, 8M on a CPU")
    dtype: str = option("auto", COMPUTE, "As in embed.", "TYPE", choices=DTYPES)
    device: str = option("auto", COMPUTE, "As in embed.", "DEVICE")
    attention: str = option("auto", COMPUTE, "As in embed.", "NAME", choices=BACKENDS)
    token_budget: tuple[int | str, ...] = option(
        ("auto",), COMPUTE, "One or several to compare.", "N,N", least=1024, most=LARGEST)
    max_residues: int = _max_residues("As in embed.")
    min_speedup: float | None = option(
        None, GATES, "Exit 1 unless packed is X times padded in file order.", "X", least=ABOVE_0, most=FINITE)
    min_density: float | None = option(None, GATES, "Exit 1 unless packs are this full.", "X", least=0, most=1)
    report: str | None = _report()
    plot: str | None = option(None, OUTPUT, "Draw it (extra plots).", "FILE.png", written=True)
    save_config: str | None = option(
        None, OUTPUT, "Write the recommended settings for embed --config.", "FILE.toml", written=True)
    quiet: bool = _quiet("Print errors only.")
    # fmt: on

    def rules(self) -> Iterator[Rule]:
        remedy = "Give both --packed and --unpacked, or neither."
        one_sided = self.packed and not self.unpacked
        yield self.min_speedup is not None and one_sided, "--min-speedup compares with --unpacked.", remedy
        gated = bool(self.given("min_density", "min_speedup"))
        yield gated and self.unpacked and not self.packed, "The gates are on packed batches.", remedy
        is_picture = self.plot is None or Path(self.plot).suffix.lower() in PICTURES
        yield not is_picture, f"--plot is {self.plot}.", f"Its name must end in one of {', '.join(PICTURES)}."


def bytes_of(size: str) -> int:
    """Bytes of a size such as 500M or 1.5T (of 1000). Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([kMGT]?)B?", size)
    if not match:
        raise UserError(f"--cache-size is {size!r}.", "Give a number of bytes, such as 50G or 500M.")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))
