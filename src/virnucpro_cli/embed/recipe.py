"""Everything that a run decides from integers before the model is loaded: where packs are computed, of what, and the file's layout."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import fasta, report, store
from virnucpro_cli.cluster import ray as ray_engine
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features import cache, contacts, contigs, groups
from virnucpro_cli.features.contacts.head import regression_beside
from virnucpro_cli.kinds import any_by_residue, unmasked
from virnucpro_cli.model import attention as attention_backends
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.attention import Backend
from virnucpro_cli.model.spec import VOCABULARY, ModelSpec, by_name, resolve_layers
from virnucpro_cli.plan import shards
from virnucpro_cli.plan.packing import Plan, in_blocks
from virnucpro_cli.plan.policies import Int64, Work, decide


class Target(NamedTuple):
    """The file that a run writes, of which shard, and the output of all shards."""

    output: Path
    shard: shards.Shard | None
    whole: Path


def target(config: EmbedConfig) -> Target:
    """Raises UserError if nothing can be written there."""
    if not config.inputs or not config.output:
        raise UserError(
            "An input FASTA and an output file are needed.", "virnucpro embed proteins.fasta -o embeddings.h5"
        )
    output = store.behind(Path(config.output))
    shard, whole = None if config.shard is None else shards.parse(config.shard), output
    if config.shard is not None and shard is not None:
        shards.check_one_set(config.shard, shard, whole)
        output = shards.path(output, shard)
    _check_paths(output, config, contigs.check(config, whole))
    if output.exists() and not (config.overwrite or config.dry_run) and store.fingerprint_of(output) is None:
        raise UserError(
            f"{output} exists and was not written by virnucpro embed.", "Choose another -o, or --overwrite it."
        )
    return Target(output, shard, whole)


@dataclass(frozen=True)
class Where:
    """Where packs are computed: in this process, in several of this host, or by the actors of a Ray cluster.

    devices: of each process, or of each actor that there is room for; device and backend: of this process (see
    `Cluster.of_the_driver`).
    """

    place: devices.Place
    devices: list[torch.device]
    device: torch.device
    backend: Backend | None
    dtype: torch.dtype
    cluster: ray_engine.Cluster | None = None
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        return len(set(self.devices)) if self.cluster is None else len(self.devices)

    @property
    def processes(self) -> int:
        """Those that share the devices of this host."""
        return len(self.devices) if self.cluster is None else 1

    def computed_by(self, several: bool) -> str:
        """What the bits of a row depend on besides its input, in a line of JSON. several: whether there is work for all processes."""
        return _computed_by(self.place, self.dtype, self.device, self.processes if several else 1)


def where(
    config: EmbedConfig, alone: bool, cluster: ray_engine.Cluster | None, out: Console, clock: report.Clock
) -> Where:
    """alone: in one process, whatever is asked for. Raises UserError for a device or backend that is not to be had."""
    if cluster is not None:
        with clock.stage("start workers"):
            place = cluster.first_place(out.print)
        device, backend = cluster.of_the_driver()
        return Where(place, [device] * cluster.room(), device, backend, cluster.dtype, cluster)
    each, notes = devices.resolve_devices(config.device, config.workers)
    each = each[:1] if alone else each
    dtype = devices.resolve_dtype(config.dtype, each[0])
    backend = attention_backends.resolve(config.attention, each[0], dtype)
    place = devices.place_of(each[0], backend)
    return Where(place, each, each[0], backend, dtype, notes=tuple(notes))


@dataclass(frozen=True)
class Recipe:
    """A run, decided. found: the weights, None if they are not on this machine (of a dry run)."""

    config: EmbedConfig
    output: Path
    shard: shards.Shard | None
    where: Where
    found: locate.Weights | None
    spec: ModelSpec
    layers: tuple[int, ...]
    table: fasta.RecordTable
    work: Work
    plan: Plan
    layout: store.Layout

    def fingerprint(self, found: locate.Weights) -> dict[str, Any]:
        """What the values depend on. found: the weights, with their SHA-256."""
        config = self.config
        policy = {name: getattr(config, name) for name in ("max_residues", "long", "invalid", "id", "dedup")}
        if config.long == "window":
            policy["overlap"] = config.overlap
        if config.emit:
            policy["emit"] = list(config.emit)
        if "contacts" in config.emit and (beside := [path for path in regression_beside(found) if path.is_file()]):
            policy["contact_regression_sha256"] = locate.sha256_of(beside)
        if self.shard is not None:
            policy["shard"] = str(self.shard)
        return {
            "input_sha256": self.table.sha256,
            "weights_sha256": found.sha256,
            "heads": self.spec.heads,
            "layers": list(self.layers),
            "pool": list(config.pool),
            "dtype": attention_backends.describe(self.where.dtype),
            "store_dtype": config.store_dtype,
            **policy,
            "attention": self.where.place.attention,
            "device": self.where.place.kind,
            **self.layout.extra.fingerprint,
        }


def decided(config: EmbedConfig, target: Target, where: Where, out: Console, clock: report.Clock) -> Recipe:
    """Read the input and decide. All that is read is opened before the first long step. Raises UserError for what the user can
    put right.
    """
    output, shard, whole = target
    grouped, mapped = groups.named(config), contacts.named(config)
    with clock.stage("index"):
        sources = fasta.open_sources(config.inputs, output.parent)
    found = _locate(config, out)
    spec = _spec(config, found)
    layers = resolved_layers(config.layers, spec)
    sources, extra = contigs.find(config, sources, whole, out, clock)
    with clock.stage("index"):
        table = fasta.index(
            sources,
            on_invalid=config.invalid,
            gaps=config.gaps,
            dedup=config.dedup,
            keep_digests=config.cache is not None,
        )
    _check_protein(table, config, out)
    extra |= _gaps(table, config)
    with clock.stage("plan"):
        work, records = decide(table, config), None
        extra |= groups.of_records(config, table, extra, grouped)
        with_map, named = contacts.wanted(config, table, mapped)
        extra |= named
        if shard is None:
            extra |= groups.room(extra)
        else:
            records = shards.records_of(shard, work)
            table, extra, with_map = table.part(records), extra.part(records), with_map[records]
            work = decide(table, config)
        extra |= contacts.room(config, with_map, work)
        plan = in_blocks(work.segments.length, _token_budget(config, where, spec, layers))
        layout = _layout(config, table, work, spec, layers, records, where.computed_by(len(plan) > 1), extra)
    return Recipe(config, output, shard, where, found, spec, layers, table, work, plan, layout)


def _locate(config: EmbedConfig, out: Console) -> locate.Weights | None:
    if config.dry_run:
        return locate.locate(config.model)
    return locate.fetch(config.model, lambda text: out.print(text))


def _spec(config: EmbedConfig, found: locate.Weights | None) -> ModelSpec:
    if found is not None:
        return model_weights.spec_of(found)
    spec = by_name(config.model)
    assert spec is not None
    return spec


def resolved_layers(requested: tuple[int, ...], spec: ModelSpec) -> tuple[int, ...]:
    """Layer numbers 0..L of what --layers asks for. Raises UserError for one that the model does not have."""
    try:
        return resolve_layers(requested, spec.layers)
    except ValueError as error:
        raise UserError(f"--layers: {error} of {spec.name}.", "0 is the embedding, -1 the last layer.") from None


def _gaps(table: fasta.RecordTable, config: EmbedConfig) -> store.Extra:
    """The column of gaps, where there are any, and the policy in the fingerprint, where it changes rows."""
    changed = {"gaps": config.gaps} if config.gaps in ("strip", "x") else {}
    return store.Extra({"gaps": table.gaps} if table.gaps.any() else {}, fingerprint=changed)


def _check_protein(table: fasta.RecordTable, config: EmbedConfig, out: Console) -> None:
    """Raise UserError for a file of nucleotides; name the first of single records that look like some."""
    for source, share in zip(table.sources, table.nucleotide_share, strict=True):
        if share >= fasta.NUCLEOTIDE_SHARE and config.from_ == "proteins" and not config.force_protein:
            raise UserError(
                f"{source.path} looks like nucleotides: {share:.1%} of its letters are A, C, G, T, U, N or their ambiguity codes.",
                "Say --from contigs to find its proteins first, or --force-protein if these are proteins.",
            )
    like = table.nucleotide_like
    if len(like) and not config.force_protein:
        first = ", ".join(repr(table.names(i, i + 1, config.id == "full")[0]) for i in like[:3].tolist())
        out.print(
            f"{len(like):,} of {counted(len(table), 'record')} like nucleotides, and embedded as proteins: {first}"
            f"{' ...' if len(like) > 3 else ''}; --force-protein says that they are proteins",
            style="yellow",
        )


def _check_paths(output: Path, config: EmbedConfig, beside: list[Path]) -> None:
    """Nothing that is read may be written, and the report must have a place before anything is computed."""
    store.check_destination(output)
    named = (*config.inputs, config.group_table or "-", config.contacts_for or "-")
    read = [*(Path(name) for name in named if name != "-"), *locate.files_read(config.model)]
    cached = [Path(config.cache).resolve()] if config.cache is not None else []
    if any(output.exists() and other.exists() and output.samefile(other) for other in read) or any(
        output.exists() and output.resolve().is_relative_to(folder) for folder in cached
    ):
        raise UserError(
            f"The output {output} is one of the inputs, of the model or of the cache.",
            "Choose another name; inputs are never overwritten.",
        )
    store.check_hdf5_name(output)
    if config.cache is not None and not config.dry_run:
        cache.check_place(config.cache)
    places = {"report": config.report, "qc": config.qc}
    report.check_places(places, [*read, *cached, output, store.partial_path(output), *beside], config.overwrite)


def _token_budget(config: EmbedConfig, where: Where, spec: ModelSpec, layers: tuple[int, ...]) -> int:
    if config.token_budget != "auto":
        return int(config.token_budget)
    stored = 4 * (spec.hidden * len(layers) * ("residue" in config.pool) + VOCABULARY * ("logits" in config.emit))
    sharing = where.devices.count(where.device) if where.cluster is None else 1
    weight_bytes = spec.parameters * where.dtype.itemsize
    return devices.auto_token_budget(where.place.kind, where.place.free, spec.hidden, weight_bytes, stored, sharing)


def _layout(
    config: EmbedConfig, table: fasta.RecordTable, work: Work, spec: ModelSpec, layers: tuple[int, ...],
    records: Int64 | None, environment: str, extra: store.Extra,
) -> store.Layout:  # fmt: skip
    offsets = (
        np.append(0, np.cumsum(work.embedded, dtype=np.int64)) if any_by_residue(config.pool, config.emit) else None
    )
    dtype = np.dtype(np.float16 if config.store_dtype == "fp16" else np.float32)
    names = partial(table.names, full=config.id == "full")
    return store.Layout(spec.hidden, layers, config.pool, dtype, table.length, table.replaced, work.flags, work.status,
                        work.reason, offsets, names, table.text_bytes - table.residues, records, environment,
                        unmasked=unmasked(config.emit), extra=extra)  # fmt: skip


def _computed_by(place: devices.Place, dtype: torch.dtype, device: torch.device, processes: int = 1) -> str:
    """What the bits of a row depend on besides its input, in a line of JSON. processes: that share a device of this host."""
    return json.dumps({
        "device": place.device if processes == 1 else devices.describe_device(device, processes),
        "dtype": attention_backends.describe(dtype),
        "attention": place.attention,
        "torch": place.torch,
        "virnucpro": place.virnucpro,
    })  # fmt: skip


def computed_at(device: torch.device, dtype: torch.dtype, backend: Backend) -> str:
    return _computed_by(devices.place_of(device, backend), dtype, device)


def attributes(
    recipe: Recipe, environment: dict[str, Any], found: locate.Weights, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """Of the file, for its readers. environment: as the report has it."""
    config, table = recipe.config, recipe.table
    inputs = [
        {"path": source.path, "bytes": source.size, "sha256": sha}
        for source, sha in zip(table.sources, table.sha256, strict=True)
    ]
    return {
        "tool": "virnucpro",
        "tool_version": virnucpro_cli.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": json.dumps(sys.argv),
        "config": json.dumps(asdict(config)),
        "environment": json.dumps(environment),
        "model": environment["model"],
        "model_layers": recipe.spec.layers,
        "weights": found.place,
        "weights_sha256": found.sha256,
        "weights_origin": locate.origin_of(found),
        "dtype": fingerprint["dtype"],
        "approximate": fingerprint["dtype"] == attention_backends.describe(torch.float8_e4m3fn),
        "store_dtype": config.store_dtype,
        "attention": fingerprint["attention"],
        "device": environment["device"],
        "layers": json.dumps(fingerprint["layers"]),
        "pool": json.dumps(config.pool),
        "inputs": json.dumps(inputs),
        "fingerprint": json.dumps(fingerprint),
    }
