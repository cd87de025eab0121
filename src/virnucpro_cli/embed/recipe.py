"""The decisions of a run, made before the model is loaded: where packs are computed, and the file's layout."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import fasta, report, store
from virnucpro_cli.alphabet import Reading
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed.engines import Computing
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features import Feature, Half, Run, asked_for
from virnucpro_cli.kinds import NUCLEOTIDE, PROTEIN, any_by_residue, unmasked
from virnucpro_cli.model import attention, locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.families import by_name, check_dtype, check_emit, family_of, flops, parameters, reading
from virnucpro_cli.model.spec import ModelSpec, check_longest, resolved_layers
from virnucpro_cli.plan.packing import in_blocks
from virnucpro_cli.plan.policies import Decisions, decide

if TYPE_CHECKING:
    from virnucpro_cli.plan.shards import Shard


MOST_ODD = 0.5
"""Share of letters from which on an input is not of nucleotides; of proteins it is about 0.75."""
OF_A_HALF = ("weights_sha256", "tokenizer_sha256", "heads", "layers", "pool", "dtype", "max_residues", "kind")
"""Entries of a half's fingerprint that its rows depend on, beside those that are the run's."""


class Target(NamedTuple):
    """The file that a run writes, of which shard, and the output of all shards."""

    output: Path
    shard: "Shard | None"
    whole: Path


def target(config: EmbedConfig, features: list[Feature]) -> Target:
    """Raises UserError if nothing can be written there."""
    if not config.inputs or not config.output:
        usage = "virnucpro embed proteins.fasta -o embeddings.h5"
        raise UserError("An input FASTA and an output file are needed.", usage)
    shard, output = None, store.behind(Path(config.output))
    whole = output
    if config.shard is not None:
        from virnucpro_cli.plan import shards

        shard = shards.parse(config.shard)
        shards.check_one_set(config.shard, shard, whole)
        output = shards.path(whole, shard)
    _check_paths(output, whole, config, features)
    if output.exists() and not (config.overwrite or config.dry_run) and store.fingerprint_tried(output) is None:
        refusal = f"{output} exists and was not written by virnucpro embed."
        raise UserError(refusal, "Choose another -o, or --overwrite it.")
    return Target(output, shard, whole)


def _check_paths(output: Path, whole: Path, config: EmbedConfig, features: list[Feature]) -> None:
    """Nothing that is read may be written, and reports must have a place. Raises UserError."""
    store.check_destination(output)
    named = [*config.inputs, *(getattr(config, option) for feature in features for option in feature.reads)]
    read = [
        *(Path(name) for name in named if name not in (None, "-")),
        *locate.files_read(config.model, config.adapter),
    ]
    beside = [path for feature in features for path in feature.writes(whole)]
    if output.exists() and any(_is_of(output, other) for other in read if other.exists()):
        refusal = f"The output {output} is one of the inputs, of the model or of the cache."
        raise UserError(refusal, "Choose another name; inputs are never overwritten.")
    store.check_hdf5_name(output)
    reports = {"report": config.report, "qc": config.qc}
    index = fasta.index_of(whole)
    written = [output, store.partial_path(output), index, store.lock_of(index), *_token_files(output), *beside]
    report.check_places(reports, [*read, *written], config.overwrite)


def _is_of(output: Path, read: Path) -> bool:
    """Whether an output that is there is a file that is read, or in a folder that is."""
    return output.samefile(read) or (read.is_dir() and output.resolve().is_relative_to(read.resolve()))


@dataclass(kw_only=True)
class EmbedRun(Run):
    """A run of embed. located: the weights, None if they are not on this machine (of a dry run).

    halves: runs of other models on the same records, whose rows lie in folders of the file by these names.
    model: of a half whose tokens are not known yet.
    """

    output: Path
    shard: "Shard | None"
    computing: Computing
    located: locate.Weights | None
    features: list[Feature] = field(default_factory=list)
    halves: "dict[str, EmbedRun]" = field(default_factory=dict)
    model: "Model | None" = None

    def get_ready(self, is_over: Callable[[], bool]) -> None:
        """Know the tokens of all records, and plan by them. Until then a half is planned as if each letter were one.

        is_over: as in `tokenised`.
        """
        if self.model is not None:
            self.table = self.model.in_tokens(self.table, self.output, self.half, is_over)
            self.decisions = decide(self.table, self.config)
            self.plan = in_blocks(self.decisions.segments.length, self.plan.token_budget)

    def fingerprint_with(self, weights: locate.Weights) -> dict[str, Any]:
        """All that the values depend on. weights: with their SHA-256."""
        config = self.config
        policy = {name: getattr(config, name) for name in ("max_residues", "long", "invalid", "id", "dedup")}
        if config.long == "window":
            policy["overlap"] = config.overlap
        if config.emit:
            policy["emit"] = list(config.emit)
        if attention.is_wide(config.residual, self.dtype):
            policy["residual"] = config.residual
        if config.kind != PROTEIN:
            policy["kind"] = config.kind
        for feature in self.features:
            policy |= feature.fingerprint(weights, self.dtype)
        if self.shard is not None:
            policy["shard"] = str(self.shard)
        for name, half in self.halves.items():
            own = half.fingerprint_with(half.weights)
            policy[name] = {key: own[key] for key in OF_A_HALF if key in own}
        if (tokenizer := locate.tokenizer_of(weights, self.spec)) is not None:
            policy["tokenizer_sha256"] = locate.sha256_of([tokenizer])
        return {
            "input_sha256": self.table.sha256, "weights_sha256": weights.sha256, "heads": self.spec.heads,
            "layers": list(self.layers), "pool": list(config.pool), "dtype": attention.describe(self.dtype),
            "store_dtype": config.store_dtype, **policy, "attention": self.computing.device.attention,
            "device": self.computing.device.kind, **self.layout.extra.fingerprint,
        }  # fmt: skip


class Around(NamedTuple):
    """The surroundings that a run and its halves share."""

    at: Target
    computing: Computing
    out: Console
    clock: report.Clock


class Model(NamedTuple):
    """A model as a run takes it. config: with what the model decides; how: the reading of the input."""

    config: EmbedConfig
    located: locate.Weights | None
    spec: ModelSpec
    layers: tuple[int, ...]
    how: Reading
    dtype: torch.dtype

    def table(self, inputs: fasta.Inputs, sources: list[fasta.Source], keep_digests: bool) -> fasta.RecordTable:
        """The record table of sources, as the model reads them."""
        how = fasta.How(self.config.invalid, self.config.gaps, self.how)
        return inputs.table(sources, how, self.config.dedup, keep_digests)

    def in_tokens(
        self, table: fasta.RecordTable, output: Path, half: str = "", is_over: Callable[[], bool] = lambda: False
    ) -> fasta.RecordTable:
        """The same table, or one that knows the tokens of all records, if these are not letters; see `tokenised`."""
        if family_of(self.spec).TOKENIZER is None:
            return table
        from virnucpro_cli.fasta.tokenised import tokenised

        path = locate.tokenizer_of(self.located, self.spec) if self.located is not None else None
        kept = None if self.config.dry_run else fasta.tokens_of(output, half)
        return tokenised(table, path, output.parent, kept, is_over)


def _model_of(config: EmbedConfig, features: list[Feature], dtype: torch.dtype, around: Around) -> Model:
    """Raises UserError for what the model cannot do, before it is fetched, and for weights that cannot be had."""
    with around.clock.stage("load model"):
        located, spec = _here(config)
    check_dtype(spec, dtype)
    check_emit(spec, config.emit)
    family = family_of(spec)
    if family.READING is None and config.kind == PROTEIN and config.from_ == "proteins":
        config = replace(config, kind=NUCLEOTIDE)
    config, how, layers = _with_long(config, spec), reading(spec, config.kind), resolved_layers(config.layers, spec)
    with around.clock.stage("load model"):
        if located is None and not config.dry_run:
            located = _adapted(locate.fetch(config.model, around.out.print), config)
        if located is not None:
            located = replace(located, states=locate.states_of(located))
            locate.tokenizer_of(located, spec)
            _check_heads(config, features, located)
    return Model(config, located, spec, layers, how, dtype)


def _check_heads(config: EmbedConfig, features: list[Feature], located: locate.Weights) -> None:
    """Raise UserError if the weights lack what --emit needs: names and shapes of tensors say it, no values are read."""
    if not config.emit or located.seed is not None:
        return
    loaded = model_weights.load(replace(located, adapters=(), states=()))
    if unmasked(config.emit):
        from virnucpro_cli.model.scores import check_head

        check_head(loaded[1], located)
    for feature in features:
        feature.check_weights(loaded, located)


def decided(config: EmbedConfig, features: list[Feature], inputs: fasta.Inputs, around: Around) -> EmbedRun:
    """Read the input and decide. All that is read is opened before the first long step.

    Raises UserError for what the user can put right.
    """
    at, clock = around.at, around.clock
    with clock.stage("index"):
        sources = inputs.sources(config.inputs, at.output.parent)
    model, extra = _model_of(config, features, around.computing.dtype, around), store.Extra()
    config = model.config
    for feature in features:
        sources, more = feature.sources(sources, at.whole, around.out, clock)
        extra |= more
    with clock.stage("index"):
        table = model.table(inputs, sources, any(feature.needs_digests for feature in features))
    with clock.stage("devices"):
        around.computing.here()
    _check_protein(table, config, model.spec, around.out)
    extra |= _gaps(table, config)
    for feature in features:
        extra |= feature.of_input(table, extra)
    records, count = None, len(table)
    if at.shard is not None:
        from virnucpro_cli.plan.shards import records_of

        records = records_of(at.shard, table, config)
        table, extra = table.part(records), extra.part(records)
    halves = {
        half.name: _decided_half(half, around, records, count)
        for half in filter(None, (feature.half() for feature in features))
    }
    if family_of(model.spec).TOKENIZER is not None:
        with clock.stage("tokens"):
            table = model.in_tokens(table, at.output)
        extra |= store.Extra(columns={"tokens": table.sizes})
    decisions = decide(table, config)
    for feature in features:
        extra |= feature.of_part(records, decisions, extra)
    for half in halves.values():
        half.layout = replace(half.layout, extra=store.Extra(rows=extra.rows))
    extra |= store.Extra(halves={name: half.layout for name, half in halves.items()})
    table.let_go()
    run = _planned(model, table, decisions, extra, around, records)
    run.features, run.halves = features, halves
    every, no_attention = (run, *halves.values()), 0.0  # which would take an array of all lengths
    computing = around.computing.worth(
        sum(flops(each.spec, float(each.plan.tokens.sum()), no_attention, max(each.layers)) for each in every)
    )
    for each in every:
        each.computing = computing
    return run


def _decided_half(half: Half, around: Around, records: NDArray[np.int64] | None, count: int) -> EmbedRun:
    """The run of a half. records: int64 [M], of a shard; count: records of the whole input.

    Raises UserError if it has another number of records.
    """
    features, dtype = asked_for(half.config), around.computing.dtype
    model = _model_of(half.config, features, torch.float16 if dtype == torch.float8_e4m3fn else dtype, around)
    with around.clock.stage("index"):
        table = model.table(fasta.Inputs(), half.sources, any(feature.needs_digests for feature in features))
    if len(table) != count:
        raise UserError(f"{half.sources[0].path} was changed: it has {len(table):,} records, not {count:,}.")
    table = table if records is None else table.part(records)
    run = _planned(model, table, decide(table, model.config), store.Extra(), around, records)
    run.features, run.half = features, half.name
    if family_of(model.spec).TOKENIZER is not None:
        run.model = model
    return run


def _planned(
    model: Model, table: fasta.RecordTable, decisions: Decisions, extra: store.Extra, around: Around,
    records: NDArray[np.int64] | None,
) -> EmbedRun:  # fmt: skip
    """The run of a model on a table, with its plan and the layout of its file. records: int64 [M], of a shard."""
    config, spec, layers, computing = model.config, model.spec, model.layers, around.computing
    plan = in_blocks(decisions.segments.length, _token_budget(config, computing, spec, layers, model.how.width))
    by_residue = any_by_residue(config.pool, config.emit)
    layout = store.Layout(
        spec.hidden, layers, config.pool, np.dtype(np.float16 if config.store_dtype == "fp16" else np.float32),
        table.length, table.replaced, decisions.flags, decisions.status, decisions.reason,
        np.append(0, np.cumsum(decisions.embedded, dtype=np.int64)) if by_residue else None,
        partial(table.name_texts, full=config.id == "full"), table.text_bytes - table.residues, records,
        computing.computed_by(len(plan) > 1, model.dtype), unmasked=unmasked(config.emit), vocabulary=model.how.width,
        extra=extra,
    )  # fmt: skip
    return EmbedRun(
        config=config, spec=spec, layers=layers, table=table, decisions=decisions, plan=plan, layout=layout,
        device=computing.local_device, dtype=model.dtype, out=around.out, clock=around.clock,
        summary=report.RunReport("embed"), output=around.at.output, shard=around.at.shard, computing=computing,
        located=model.located,
    )  # fmt: skip


def inputs_of(config: EmbedConfig, at: Target, out: Console) -> fasta.Inputs:
    """How inputs are read: the index of large ones is kept beside the output. A dry run writes none."""
    if config.dry_run or not fasta.is_large(config.inputs):
        return fasta.Inputs()
    from virnucpro_cli.fasta import kept

    needed_by = None if at.shard is not None else store.partial_path(at.output)
    return kept.Kept(fasta.index_of(at.whole), partial(out.print, style="yellow"), needed_by)


def _token_files(output: Path) -> list[Path]:
    return [fasta.tokens_of(output, half) for half in ("", *store.HALVES)]


@contextmanager
def tokens_beside(at: Target) -> Iterator[None]:
    """Tokens of several letters that are kept beside the output go at the end, unless its partial file is there."""
    try:
        yield
    finally:
        there = [path for path in _token_files(at.output) if path.exists()]
        if there and not store.partial_path(at.output).exists():
            from virnucpro_cli.fasta.token_file import forget

            for path in there:
                forget(path)


def _here(config: EmbedConfig) -> tuple[locate.Weights | None, ModelSpec]:
    """The weights, None if they are not on this machine, and the sizes of the model."""
    found = locate.locate(config.model)
    located = None if found is None else _adapted(found, config)
    spec = by_name(config.model) if located is None else model_weights.spec_of(located)
    assert spec is not None
    return located, spec


def _adapted(located: locate.Weights, config: EmbedConfig) -> locate.Weights:
    if not config.adapter:
        return located
    from virnucpro_cli.model.adapters import with_adapters

    return with_adapters(located, config.adapter)


def index_input(config: EmbedConfig, out: Console) -> None:
    """Make the index that shards of this configuration map, and say what it holds. Raises UserError."""
    from virnucpro_cli.fasta import kept

    at = target(config, [])
    _, spec = _here(config)
    path, how = fasta.index_of(at.whole), fasta.How("x", config.gaps, reading(spec, config.kind))
    if not fasta.is_large(config.inputs) and "-" not in config.inputs:
        out.print("no index of so small an input is kept: every run reads it in a second")
        return
    with kept.Kept(path, partial(out.print, style="yellow")) as inputs:
        table = inputs.table(inputs.sources(config.inputs, path.parent), how)
    if not kept.is_there(path) or "-" in config.inputs:
        why = "a pipe can be read only once" if "-" in config.inputs else "see above"
        raise UserError(f"The index {path} was not made: {why}.", "Without it each shard reads the input by itself.")
    try:
        _check_protein(table, config, spec, out)
    except UserError:
        kept.forget(path)
        raise
    (word, letter), copies = config.words, int((table.unique_of != np.arange(len(table))).sum())
    held = f"{counted(len(table), word)}, {counted(table.residues, letter)}, {copies:,} like an earlier one"
    out.print(f"{path}: {held}")


def _with_long(config: EmbedConfig, spec: ModelSpec) -> EmbedConfig:
    """The configuration with what becomes of long proteins: cut, or by windows if the model itself has a limit.

    Raises UserError for what the model or windows cannot do.
    """
    check_longest(spec, config.max_residues)
    if config.long == "full" and spec.longest is not None:
        raise UserError(
            f"{spec.name} takes at most {spec.longest:,} residues, so not --long full.",
            "Choose --long window, truncate, skip or error.",
        )
    if config.long != "auto":
        return config
    try:
        return replace(config, long="truncate" if spec.longest is None else "window")
    except UserError as error:  # a rule of windows, which nobody named
        raise UserError(
            f"{spec.name} takes longer proteins by windows. {error.what}", "Say --long truncate to cut them instead."
        ) from None


def _gaps(table: fasta.RecordTable, config: EmbedConfig) -> store.Extra:
    """The column of gaps, where there are any, and the policy in the fingerprint, where it changes rows."""
    changed = {"gaps": config.gaps} if config.gaps in ("strip", "x") else {}
    return store.Extra({"gaps": table.gaps} if table.gaps.any() else {}, fingerprint=changed)


def _check_nucleotides(table: fasta.RecordTable) -> None:
    """Raise UserError for proteins that are to be read as nucleotides."""
    odd = int(table.replaced.sum(dtype=np.int64)) / max(table.residues, 1)
    if odd > MOST_ODD:
        inputs = ", ".join(source.path for source in table.sources)
        refusal = f"{inputs} does not look like nucleotides: {odd:.1%} of the letters are not A, C, G, T, U or N."
        raise UserError(refusal, "For proteins name a model of proteins, and no --kind nucleotide.")


def _check_protein(table: fasta.RecordTable, config: EmbedConfig, spec: ModelSpec, out: Console) -> None:
    """Raise UserError for a file of nucleotides; name the first of single records that look like some."""
    if config.force_protein:
        return
    if config.kind == NUCLEOTIDE:
        return _check_nucleotides(table)
    ways = "--from contigs to find its proteins first, or --force-protein if these are proteins."
    if family_of(spec).NUCLEOTIDES is not None:
        ways = f"--kind nucleotide to embed them as they are, {ways}"
    for source, share in zip(table.sources, table.nucleotide_share, strict=True):
        if share >= fasta.NUCLEOTIDE_SHARE and config.from_ == "proteins":
            raise UserError(
                f"{source.path} looks like nucleotides: {share:.1%} of its letters are A, C, G, T, U, N or their "
                "ambiguity codes.",
                f"Say {ways}",
            )
    like = table.nucleotide_like
    if len(like):
        first = ", ".join(repr(table.names(i, i + 1, config.id == "full")[0]) for i in like[:3].tolist())
        out.print(
            f"{len(like):,} of {counted(len(table), 'record')} like nucleotides, and embedded as proteins: {first}"
            f"{' ...' if len(like) > 3 else ''}; --force-protein says that they are proteins",
            style="yellow",
        )


def _token_budget(
    config: EmbedConfig, computing: Computing, spec: ModelSpec, layers: tuple[int, ...], columns: int
) -> int:
    """Tokens of a pack. columns: of logits."""
    if config.token_budget != "auto":
        return int(config.token_budget)
    stored = 4 * (spec.hidden * len(layers) * ("residue" in config.pool) + columns * ("logits" in config.emit))
    weight_bytes = parameters(spec) * computing.dtype.itemsize
    device = computing.device
    return devices.auto_token_budget(device.kind, device.free, spec.hidden, weight_bytes, stored, computing.sharing)


def _adapters(weights: locate.Weights) -> dict[str, str]:
    """Attributes of a file that was made with adapters, whose `weights_sha256` is of base and adapters."""
    entries = [{"path": str(each.folder), "sha256": each.sha256} for each in weights.adapters]
    return {"base_sha256": weights.base_sha256, "adapters": json.dumps(entries)} if entries else {}


def attributes(run: EmbedRun) -> dict[str, Any]:
    """Attributes of the file, for its readers."""
    config, fingerprint, environment = run.config, run.fingerprint, run.summary.environment
    approximate = attention.describe(torch.float8_e4m3fn)
    texts = {
        "config": asdict(config), "environment": environment, "layers": fingerprint["layers"], "pool": config.pool,
        "inputs": run.table.inputs, "fingerprint": fingerprint,
    }  # fmt: skip
    family = {} if run.spec.family == ModelSpec.family else {"family": run.spec.family}  # a file without it is ESM-2's
    kind = {} if config.kind == PROTEIN else {"kind": config.kind}
    licence = {"weights_licence": str(terms)} if (terms := locate.licence_of(run.weights)) else {}
    return {
        "tool": "virnucpro", **family, **kind, "tool_version": virnucpro_cli.__version__, **store.of_this_command(),
        "model": environment["model"], "model_layers": run.spec.layers, "weights": run.weights.place,
        "weights_sha256": run.weights.sha256, "weights_origin": locate.origin_of(run.weights),
        **licence, **_adapters(run.weights),
        "dtype": fingerprint["dtype"], "approximate": fingerprint["dtype"] == approximate,
        "store_dtype": config.store_dtype, "attention": fingerprint["attention"], "device": environment["device"],
        **{name: json.dumps(value) for name, value in texts.items()},
    }  # fmt: skip
