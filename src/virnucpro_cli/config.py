"""What a run is asked to do: frozen dataclasses, made once from defaults < TOML file < flags. An unknown key is an error."""

import dataclasses
import keyword
import math
import os
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virnucpro_cli.errors import UserError, choose, unread
from virnucpro_cli.kinds import EMITS, KINDS, OF_ALL_RESIDUES, any_by_residue

CHOICES = {
    "dtype": ("auto", "fp32", "fp16", "bf16", "fp8"),
    "store_dtype": ("fp16", "fp32"),
    "attention": ("auto", "triton", "torch_varlen", "flash_attn", "efficient", "sdpa"),
    "long": ("truncate", "full", "window", "skip", "error"),
    "invalid": ("x", "error", "skip"),
    "gaps": ("keep", "strip", "x", "error"),
    "id": ("first", "full"),
    "engine": ("local", "ray"),
    "write": ("driver", "worker"),
    "from_": ("proteins", "contigs"),
    "genes": ("pyrodigal-gv", "six-frame", "virnucpro"),
}
SYNONYMS = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float8": "fp8"}
"""Names of dtypes as PyTorch has them; the short ones are stored."""
LARGEST = 1 << 24
MOST_WORKERS = 256
ABOVE_0, FINITE = math.ulp(0.0), sys.float_info.max
LIMITS = {
    "max_residues": (1, LARGEST), "overlap": (0, LARGEST), "min_aa": (1, LARGEST), "sample": (2, 1 << 63),
    "seed": (0, 1 << 63), "min_cosine": (-1, 1), "max_rel_l2": (ABOVE_0, FINITE), "seconds": (ABOVE_0, 86400),
    "min_speedup": (ABOVE_0, FINITE), "min_density": (0, 1),
}  # fmt: skip
"""The least and the largest number that an option takes."""
CHUNKS = (300, 500)
PICTURES = (".png", ".pdf", ".svg", ".jpg")
WRITTEN = ("output", "report", "qc", "plot", "save_config", "write_golden")
"""Options that name a file to write."""
PATHS = ("inputs", "output", "model", "contacts_for", "group_table", "cache", "qc", "report", "fasta", "against",
         "golden", "write_golden", "plot", "save_config")  # fmt: skip
"""Fields in which a leading ~ stands for the home folder."""
PEERS = ("fair-esm", "transformers", "esm-efficient", "faesm")


@dataclass(frozen=True)
class EmbedConfig:
    """Everything that `embed` can be told. Field names are the long options with underscores."""

    inputs: tuple[str, ...] = ()
    output: str = ""
    model: str = "esm2_t33_650M_UR50D"
    layers: tuple[int, ...] = (-1,)
    pool: tuple[str, ...] = ("mean",)
    emit: tuple[str, ...] = ()
    contacts_for: str | None = None
    dtype: str = "auto"
    store_dtype: str = "fp16"
    device: str = "auto"
    workers: int | str = "auto"
    engine: str = "local"
    ray_address: str | None = None
    write: str = "driver"
    attention: str = "auto"
    token_budget: int | str = "auto"
    max_residues: int = 1022
    long: str = "truncate"
    overlap: int = 256
    invalid: str = "x"
    gaps: str = "keep"
    id: str = "first"
    dedup: bool = True
    overwrite: bool = False
    restart: bool = False
    retry_skipped: bool = False
    dry_run: bool = False
    preallocate: bool = True
    force_protein: bool = False
    from_: str = "proteins"
    genes: str = "pyrodigal-gv"
    min_aa: int = 30
    chunk: int = 500
    group: str | None = None
    group_regex: str | None = None
    group_table: str | None = None
    shard: str | None = None
    qc: str | None = None
    report: str | None = None
    cache: str | None = None
    cache_size: str = "50G"
    verbose: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        _check(self)
        bytes_of(self.cache_size)
        if self.cache is not None and ("residue" in self.pool or self.emit):
            raise UserError(
                "--cache keeps pooled rows, not those of --pool residue or --emit.", "Leave one of them out."
            )
        if self.output == "-":
            raise UserError("--output is -, and HDF5 cannot be written to a pipe.", "Name a file, such as out.h5.")
        unknown = [kind for kind in self.pool if kind not in KINDS]
        if unknown or not self.pool:
            remedy = choose((*unknown, "")[0], KINDS, "Choose any of")
            raise UserError(f"--pool has {', '.join(unknown) or 'nothing'}.", remedy)
        if self.workers != "auto" and not (isinstance(self.workers, int) and 1 <= self.workers <= MOST_WORKERS):
            raise UserError(f"--workers is {self.workers}.", f"Give auto, or 1 to {MOST_WORKERS}.")
        if self.ray_address is not None and self.engine != "ray":
            raise UserError("--ray-address has a meaning with --engine ray only.", "Add --engine ray.")
        if self.write == "worker" and (self.engine != "ray" or not any_by_residue(self.pool, self.emit)):
            raise UserError(
                "--write worker is of rows of residues on a Ray cluster.",
                "Add --engine ray, and residue to --pool or logits to --emit; or leave it out.",
            )
        if not self.layers:
            raise UserError("--layers has nothing.", "Give numbers such as -1 or 0,6,-1.")
        unknown = [name for name in self.emit if name not in EMITS]
        if unknown:
            raise UserError(f"--emit has {', '.join(unknown)}.", choose(unknown[0], EMITS, "Choose any of"))
        if "contacts" in self.emit and self.engine == "ray":
            raise UserError(
                "--emit contacts is the work of one device, not of --engine ray.", "Leave one out, or see --shard."
            )
        if self.contacts_for is not None and "contacts" not in self.emit:
            raise UserError("--contacts-for says whose contacts.", "Add --emit contacts.")
        if self.emit and self.long == "window":
            raise UserError("--emit with --long window: it is of a protein in one piece.", "Choose --long full.")
        whole = [kind for kind in self.pool if kind in OF_ALL_RESIDUES]
        if self.long == "window" and whole:
            raise UserError(
                f"--pool {','.join(whole)} with --long window: a protein's windows do not add up to that.",
                "Choose --long full, or compute it from the rows of --pool residue.",
            )
        if self.long == "window" and not 0 <= self.overlap < self.max_residues:
            raise UserError(
                f"--overlap is {self.overlap}.", f"Give 0 or more, and less than --max-residues {self.max_residues}."
            )
        self._check_genes()
        self._check_groups()

    def _check_genes(self) -> None:
        given = [name for name in ("genes", "min_aa", "chunk") if getattr(self, name) != getattr(EmbedConfig, name)]
        if given and self.from_ != "contigs":
            raise UserError(f"{_option(given[0])} is of contigs.", "Say --from contigs, or leave it out.")
        for name, caller in (("min_aa", "six-frame"), ("chunk", "virnucpro")):
            if name in given and self.genes != caller:
                raise UserError(f"{_option(name)} is of --genes {caller}.", "Leave it out.")
        if self.chunk not in CHUNKS:
            raise UserError(f"--chunk is {self.chunk}.", f"Choose one of {', '.join(map(str, CHUNKS))}.")

    def _check_groups(self) -> None:
        given = [name for name in ("group", "group_regex", "group_table") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{_option(given[0])} and {_option(given[1])} both say what a group is.", "Give one.")
        if given and "mean" not in self.pool:
            raise UserError(f"{_option(given[0])} needs the means of the proteins.", "Add mean to --pool.")
        if self.group is not None and (self.group != "contig" or self.from_ != "contigs"):
            raise UserError(
                f"--group is {self.group!r}, from {self.from_}.",
                "It can be contig, with --from contigs; else see --group-regex and --group-table.",
            )
        if self.group_regex is not None:
            try:
                groups = re.compile(self.group_regex).groups
            except re.error as error:
                raise UserError(
                    f"--group-regex {self.group_regex!r} is no regular expression: {error}.", "See Python's module re."
                ) from None
            if groups != 1:
                raise UserError(
                    f"--group-regex {self.group_regex!r} has {groups} capturing groups.",
                    "Give one, such as '^(.+)_[0-9]+$'; (?:...) does not capture.",
                )


@dataclass(frozen=True)
class ValidateConfig:
    """Everything that `validate` can be told. Field names are the long options with underscores."""

    fasta: tuple[str, ...] = ()
    against: str | None = None
    model: str | None = None
    sample: int = 60
    seed: int = 0
    layers: tuple[int, ...] = ()
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    token_budget: int | str = "auto"
    max_residues: int = 1022
    reference_device: str = "cpu"
    min_cosine: float | None = None
    max_rel_l2: float | None = None
    golden: str | None = None
    write_golden: str | None = None
    report: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        _check(self)
        of_the_file = ("layers", "dtype", "max_residues", "attention", "token_budget", "golden", "write_golden")
        given = [name for name in of_the_file if getattr(self, name) != getattr(ValidateConfig, name)]
        if self.against and given:
            raise UserError(
                f"--{given[0].replace('_', '-')} has no meaning with --against.", "The file says how it was made."
            )
        if (self.golden or self.write_golden) and self.fasta:
            raise UserError("Goldens are of proteins that ship with virnucpro.", "Leave --fasta out.")


@dataclass(frozen=True)
class BenchConfig:
    """Everything that `bench` can be told. Field names are the long options with underscores."""

    packed: bool = False
    unpacked: bool = False
    fasta: tuple[str, ...] = ()
    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    token_budget: tuple[int | str, ...] = ("auto",)
    max_residues: int = 1022
    seconds: float = 45.0
    peers: tuple[str, ...] = ()
    min_speedup: float | None = None
    min_density: float | None = None
    report: str | None = None
    plot: str | None = None
    save_config: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        _check(self)
        unknown = [name for name in self.peers if name not in PEERS]
        if unknown:
            raise UserError(f"--peers has {', '.join(unknown)}.", choose(unknown[0], PEERS, "Choose any of"))
        if self.min_speedup is not None and not self.unpacked and self.packed:
            raise UserError("--min-speedup compares with --unpacked.", "Give both --packed and --unpacked, or neither.")
        if self.unpacked and not self.packed and (self.min_density, self.min_speedup) != (None, None):
            raise UserError("The gates are on packed batches.", "Give both --packed and --unpacked, or neither.")
        if self.plot and Path(self.plot).suffix.lower() not in PICTURES:
            raise UserError(f"--plot is {self.plot}.", f"Its name must end in one of {', '.join(PICTURES)}.")


def _option(name: str) -> str:
    """The option of a field."""
    return f"--{name.strip('_').replace('_', '-')}"


def _check(config: Any) -> None:
    """Check what the commands' configurations have in common, and give dtypes their short names."""
    for name in ("dtype", "store_dtype"):
        if isinstance(given := getattr(config, name, None), str) and given in SYNONYMS:
            object.__setattr__(config, name, SYNONYMS[given])
    budgets = config.token_budget if isinstance(config.token_budget, tuple) else (config.token_budget,)
    for name, (least, most) in LIMITS.items():
        value = getattr(config, name, None)
        if value is not None and not least <= value <= most:  # NaN is in no range
            lower = "above 0" if least == ABOVE_0 else f"from {least:,}"
            upper = "and finite" if most == FINITE else f"to {most:,}"
            raise UserError(f"{_option(name)} is {value}.", f"Give a number {lower} {upper}.")
    for name, allowed in CHOICES.items():
        if getattr(config, name, allowed[0]) not in allowed:
            raise UserError(
                f"{_option(name)} is {getattr(config, name)!r}.", choose(str(getattr(config, name)), allowed)
            )
    for name, value in vars(config).items():
        if value == "" and name != "output":
            raise UserError(f"{_option(name)} is empty.", "Give it a value, or leave it out.")
    for budget in budgets:
        if budget != "auto" and not (isinstance(budget, int) and 1024 <= budget <= LARGEST):
            raise UserError(f"--token-budget is {budget}.", f"Give auto or a number of tokens, 1024 to {LARGEST:,}.")


def bytes_of(size: str) -> int:
    """Bytes of a size such as 500M or 1.5T (of 1000). Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([kMGT]?)B?", size)
    if not match:
        raise UserError(f"--cache-size is {size!r}.", "Give a number of bytes, such as 50G or 500M.")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def resolve(kind: type[Any], toml: str | None, flags: dict[str, Any]) -> Any:
    """A config of `kind` from its defaults, the TOML file's table of its command, and the flags that are not None.

    Paths may be path objects, and a single value may stand for a list of one.
    """
    values = _fitting(kind, _from_toml(kind, Path(toml)), f"The config file {toml}: ") if toml is not None else {}
    values |= _fitting(kind, {name: value for name, value in flags.items() if value is not None}, "")
    for name in WRITTEN:
        path = values.get(name)
        if toml is not None and isinstance(path, str) and os.path.realpath(path) == os.path.realpath(toml):
            raise UserError(
                f"{_option(name)} {path} would overwrite the config file of this run.", "Choose another name."
            )
    return kind(**values)


def _from_toml(kind: type[Any], path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"The config file {unread(str(path), error)}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} is not TOML: {error}.") from None
    command = kind.__name__.removesuffix("Config").lower()
    tables = [key for key in content if key not in ("embed", "bench", "validate")]
    if tables:
        raise UserError(
            f"The config file {path} has an unknown entry {tables[0]!r}.", f"Options stand in a table [{command}]."
        )
    values = content.get(command, {})
    if not isinstance(values, dict):
        raise UserError(f"The config file {path} has {command} = {values!r}.", f"Options stand in a table [{command}].")
    return values


SPECIAL_TYPES: dict[str, tuple[type, ...]] = {
    "token_budget": (int, str),
    "workers": (int, str), "layers": (int,), "min_cosine": (float, int), "max_rel_l2": (float, int),
    "seconds": (float, int), "min_speedup": (float, int), "min_density": (float, int),
}  # fmt: skip


def _fitting(kind: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values in the types of the fields. Raises UserError for an unknown name or a value of another type."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    fitting = {}
    for key, value in values.items():
        key += "_" * keyword.iskeyword(key)
        if key not in fields:
            raise UserError(f"{where}there is no option {key!r}.", choose(key, list(fields), "Known:"))
        default: Any = fields[key].default
        several = isinstance(default, tuple)
        wanted = SPECIAL_TYPES.get(key) or (str if several or default is None else type(default),)
        items = value if several and isinstance(value, list | tuple) else (value,)
        items = tuple(os.fspath(item) if isinstance(item, os.PathLike) else item for item in items)
        if key in PATHS:
            items = tuple(os.path.expanduser(item) if isinstance(item, str) else item for item in items)
        if any(not isinstance(item, wanted) or (isinstance(item, bool) and bool not in wanted) for item in items):
            names = " or ".join(t.__name__ for t in wanted)
            raise UserError(f"{where}{key} is {value!r}, and must be {'a list of' if several else 'a'} {names}.")
        fitting[key] = items if several else items[0]
    return fitting
