"""The embed workflow: FASTA -> index -> segments -> plan -> packs through the model -> rows placed in the file.

`run` reads top to bottom as the recipe; everything it decides is decided from integers before the model is loaded.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import virnucpro_cli
from virnucpro_cli import attention as attention_backends
from virnucpro_cli import cache, fasta, genes, groups, qc, ray_engine, report, rescue, runner, shards, store, workers
from virnucpro_cli.attention import Backend
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.errors import Stopped, UserError
from virnucpro_cli.kinds import EMITS, any_by_residue
from virnucpro_cli.model import locate, scores
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.model.spec import VOCABULARY, ModelSpec, by_name, resolve_layers
from virnucpro_cli.packing import SPECIAL_TOKENS, Plan, in_blocks, subset, worst_first
from virnucpro_cli.placer import Placer
from virnucpro_cli.policies import Int64, Work, decide

SIXTEEN_BIT = {320: 2.2e14, 480: 2.8e14, 640: 3.6e14, 1280: 4.9e14, 2560: 5.6e14}
MEASURED_FLOPS = {
    ("H100", "fp16"): SIXTEEN_BIT,
    ("H100", "bf16"): SIXTEEN_BIT,
    ("H100", "fp8"): {640: 4.4e14, 1280: 7.3e14, 2560: 9.4e14},
    ("H100", "fp32"): {320: 2.0e13},
    ("CPU thread", "fp32"): {320: 4.5e10},
}
"""FLOP/s that forwards reached by hidden width, for the estimate of --dry-run: virnucpro bench on one
H100 80GB (torch 2.11, UniProt lengths) and on two threads of an AVX-512 server CPU (torch 2.13)."""

APPROXIMATE = (
    "fp8 is approximate: on real 8M weights a protein's mean is off by 4 % (median; the worst of 128 by 26 %), forty times what "
    "rounding in fp16 does. Check what your own downstream task makes of it."
)


Loaded = tuple[ModelSpec, dict[str, Any], tuple[str, ...]]


def run(config: EmbedConfig, out: Console | None = None, loaded: Loaded | None = None) -> report.RunReport:
    """Do what `virnucpro embed` does and return its report. Raises UserError for what the user can put right.

    loaded: what reading the model's weights yielded, for a caller that has read them already; one process then does it all.
    """
    if config.engine == "local":
        return _run(config, out, loaded, None)
    with ray_engine.Cluster(config) as cluster:
        return _run(config, out, loaded, cluster)


def _run(
    config: EmbedConfig, out: Console | None, loaded: Loaded | None, cluster: ray_engine.Cluster | None
) -> report.RunReport:
    out = out or report.console(config.quiet)
    clock = report.Clock()
    if not config.inputs or not config.output:
        raise UserError(
            "An input FASTA and an output file are needed.", "virnucpro embed proteins.fasta -o embeddings.h5"
        )
    output = Path(config.output)
    if output.is_symlink():
        output = output.resolve()  # the file that it names, not the link
    shard, whole = None if config.shard is None else shards.parse(config.shard), output
    if shard is not None:
        output = shards.path(output, shard)
    _check_paths(output, config, genes.check(config, whole))
    if output.exists() and not (config.overwrite or config.dry_run) and store.fingerprint_of(output) is None:
        raise UserError(
            f"{output} exists and was not written by virnucpro embed.", "Choose another -o, or --overwrite it."
        )

    backend: Backend | None
    if cluster is None:
        devices, device_notes = runner.resolve_devices(config.device, config.workers)
        if loaded is not None:
            devices = devices[:1]
        device = devices[0]
        dtype = runner.resolve_dtype(config.dtype, device)
        backend = attention_backends.resolve(config.attention, device, dtype)
        place, processes = runner.place_of(device, backend), len(devices)
    else:
        with clock.stage("start workers"):
            place = cluster.first_place(out.print)
        dtype, device_notes = cluster.dtype, []
        device, backend = cluster.of_the_driver()
        devices, processes = [device] * cluster.room(), 1
    found = _locate(config, out)
    spec = _spec(config, found)
    layers = resolved_layers(config.layers, spec)

    inputs, extra = genes.find(config, whole, out, clock)
    with clock.stage("index"):
        sources = fasta.open_sources(inputs, output.parent)
        table = fasta.index(
            sources, on_invalid=config.invalid, dedup=config.dedup, keep_digests=config.cache is not None
        )
    _check_protein(table, config)

    with clock.stage("plan"):
        work, records = decide(table, config), None
        extra |= groups.of_records(config, table, extra)
        if shard is None:
            extra |= groups.room(extra)
        else:
            records = shards.records_of(shard, work)
            table, extra = table.part(records), extra.part(records)
            work = decide(table, config)
        budget = config.token_budget
        if budget == "auto":
            stored = 4 * (
                spec.hidden * len(layers) * ("residue" in config.pool) + VOCABULARY * ("logits" in config.emit)
            )
            budget = runner.auto_token_budget(
                place.kind, place.free, spec.hidden, spec.parameters * dtype.itemsize, stored,
                devices.count(device) if cluster is None else 1,
            )  # fmt: skip
        plan = in_blocks(work.segments.length, int(budget))
        environment = _computed_by(place, dtype, device, processes if len(plan) > 1 else 1)
        layout = _layout(config, table, work, spec, layers, records, environment, extra)
    summary = report.RunReport("embed", notes=[*_warnings(table, work, config), *device_notes, *place.notes])
    if dtype == torch.float8_e4m3fn:
        summary.notes.append(APPROXIMATE)
    summary.counts = _counts(table, work) | extra.counts
    if shard is not None:
        summary.notes.insert(0, f"shard {shard}: {len(table):,} proteins of the input, into {output}")
    summary.packing = _packing(plan, work)
    summary.environment = _environment(config, spec, place, devices, dtype, plan)
    summary.seconds = clock.seconds
    for note in summary.notes:
        out.print(note, style="yellow")

    if config.dry_run:
        _describe_plan(
            summary,
            table,
            work,
            plan,
            layout,
            spec,
            layers,
            place,
            len(set(devices) if cluster is None else devices),
            dtype,
            found,
            config,
            out,
        )
        return _saved(summary, config)

    assert found is not None
    if cluster is None:
        runner.check_room(device, spec.parameters * dtype.itemsize, f"The weights of {spec.name}")
    with clock.stage("load model"):
        found = locate.verified(found)
        if config.emit:
            scores.check_head(model_weights.load(found)[1], found)
    fingerprint = _fingerprint(config, table, found, layers, dtype, place) | extra.fingerprint
    if shard is not None:
        fingerprint["shard"] = str(shard)
    if _already_complete(output, fingerprint, config, out):
        out.print(f"{output} is already complete: same input, model and settings.")
        summary.already_complete = True
        _write_qc(output, config)
        return _saved(summary, config)
    file = _open_store(output, layout, fingerprint, config, summary, table, found, out)

    with file.filling():

        def tell(text: str) -> None:
            out.print(text, style="yellow")
            summary.notes.append(text)

        shared = None
        if config.cache is not None:
            assert table.digest is not None
            of_a_row = {key: value for key, value in fingerprint.items() if key not in extra.fingerprint}
            shared = cache.Cache(config, of_a_row, environment, file, work, table.digest, tell)
            with clock.stage("cache"):
                summary.counts |= shared.take()
        todo = np.zeros(len(table), np.bool_)
        todo[work.unit[file.status == store.PENDING]] = True
        packs = worst_first(plan, subset(plan, todo[work.segments.record]), work.segments.length)
        placer = Placer(file, table, work, plan, config, todo, clock, pin=cluster is None and device.type == "cuda")

        exact_arithmetic()
        several = len(packs) > 1 and len(devices) > 1
        file.compute_in(_computed_by(place, dtype, device, processes if several else 1))
        if cluster is not None and len(packs):
            with report.Tracker(out, int(plan.tokens[packs].sum())) as tracker:
                placer.tracker = tracker
                summary.tables["Nodes"] = cluster.run(packs, plan, placer, found, layers, tell)
        elif several:
            job = workers.Job(config, found, layers, dtype, place.attention, table, work, plan, todo, output,
                              store.partial_path(output), file.fd, runner.threads_of(len(devices)))  # fmt: skip
            with report.Tracker(out, int(plan.tokens[packs].sum())) as tracker:
                placer.tracker = tracker
                summary.tables["Workers"] = workers.run(job, packs, devices[: len(packs)], placer, tell)
        elif len(packs):
            with clock.stage("load model"):
                _, state, notes = loaded or model_weights.load(found)
                assert backend is not None
                model = ESM2(spec, state, dtype, device, backend)
                del state
            for note in notes:
                out.print(note, style="yellow")
            summary.notes += notes
            compute = runner.compute_with(model, layers, config)
            with clock.stage("forward"), report.Tracker(out, int(plan.tokens[packs].sum())) as tracker:
                placer.tracker = tracker
                placer.started = time.perf_counter()
                runner.run(packs, placer.collator, compute, placer, device, tell, placer.note_unfit)
            del model, compute
        if placer.broken or placer.unfit:
            rescue.second_pass(placer, found, layers, config, dtype, device, backend, _computed_at, tell)
        with clock.stage("finish"):
            file.commit()
            table.check_unchanged()
            groups.fill(file)
            if shared is not None:
                shared.publish()
            _fill_rates(summary, plan, packs, work, clock, placer, device, file)
            summary.checksum = file.finish(summary.to_json_within(store.REPORT_BYTES), config.overwrite)
    if store.partial_path(output).exists():  # left by a kill between the two steps of the renaming
        _drop_finished_partial(output)
    _write_qc(output, config)
    out.print(report.packing_table(summary), report.throughput_table(summary))
    for title, rows in summary.tables.items():
        out.print(report.rows_table(title, rows))
    out.print(f"{output}: {len(table):,} proteins, {report.size(output.stat().st_size)}")
    return _saved(summary, config)


def embed_fasta(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], **options: Any
) -> report.RunReport:
    """Embed FASTA files into an HDF5 file and return the report.

    inputs: one path or several; options: the fields of `EmbedConfig`, e.g. `model="demo", pool=("mean", "bos")`.
    Raises UserError for what the caller can put right.
    """
    return run(resolve(EmbedConfig, None, {"quiet": True, **options, "inputs": inputs, "output": output}))


# --- decisions ---------------------------------------------------------------------------------------------------


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


def _check_protein(table: fasta.RecordTable, config: EmbedConfig) -> None:
    for source, share in zip(table.sources, table.nucleotide_share, strict=True):
        if share >= fasta.NUCLEOTIDE_SHARE and config.from_ == "proteins" and not config.force_protein:
            raise UserError(
                f"{source.path} looks like nucleotides: {share:.1%} of its residues are A, C, G, T, U or N.",
                "Say --from contigs to find its proteins first, or --force-protein if these are proteins.",
            )


def _check_paths(output: Path, config: EmbedConfig, beside: list[Path]) -> None:
    """Nothing that is read may be written, and the report must have a place before anything is computed."""
    store.check_destination(output)
    read = [Path(name) for name in (*config.inputs, config.group_table or "-") if name != "-"]
    if any(output.exists() and other.exists() and output.samefile(other) for other in read):
        raise UserError(
            f"The output {output} is one of the inputs.", "Choose another name; inputs are never overwritten."
        )
    if config.cache is not None and not config.dry_run:
        cache.check_place(config.cache)
    places = {"report": config.report, "qc": config.qc}
    report.check_places(places, [*read, output, store.partial_path(output), *beside])


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
                        unmasked=tuple(EMITS[name] for name in config.emit), extra=extra)  # fmt: skip


def _computed_by(place: runner.Place, dtype: torch.dtype, device: torch.device, processes: int = 1) -> str:
    """What the bits of a row depend on besides its input, in a line of JSON. processes: that share a device of this host."""
    return json.dumps({
        "device": place.device if processes == 1 else runner.describe_device(device, processes),
        "dtype": attention_backends.describe(dtype),
        "attention": place.attention,
        "torch": place.torch,
        "virnucpro": place.virnucpro,
    })  # fmt: skip


def _computed_at(device: torch.device, dtype: torch.dtype, backend: Backend) -> str:
    return _computed_by(runner.place_of(device, backend), dtype, device)


def _fingerprint(
    config: EmbedConfig, table: fasta.RecordTable, found: locate.Weights, layers: tuple[int, ...],
    dtype: torch.dtype, place: runner.Place,
) -> dict[str, Any]:  # fmt: skip
    policy = {name: getattr(config, name) for name in ("max_residues", "long", "invalid", "id", "dedup")}
    if config.long == "window":
        policy["overlap"] = config.overlap
    if config.emit:
        policy["emit"] = list(config.emit)
    return {
        "input_sha256": table.sha256,
        "weights_sha256": found.sha256,
        "layers": list(layers),
        "pool": list(config.pool),
        "dtype": attention_backends.describe(dtype),
        "store_dtype": config.store_dtype,
        **policy,
        "attention": place.attention,
        "device": place.kind,
    }


def _already_complete(output: Path, fingerprint: dict[str, Any], config: EmbedConfig, out: Console) -> bool:
    if config.overwrite or not output.exists():
        return False
    there = store.fingerprint_of(output)
    if there is None:
        raise UserError(f"{output} was taken up or replaced by another run just now.", "Run the command again.")
    differing = store.differences(there[0], fingerprint)
    if differing:
        raise UserError(
            f"{output} exists and is of another run: {'; '.join(differing)}.", "Choose another -o, or --overwrite it."
        )
    if not there[1]:
        raise UserError(f"{output} exists but is not complete.", "Choose another -o, or --overwrite it.")
    _drop_finished_partial(output)
    with store.read_embeddings(output) as file:
        missed = int(((file.status == store.SKIPPED) & (file.reason == store.NO_MEMORY)).sum())
    if missed and not config.restart and not store.partial_path(output).exists():
        out.print(
            f"{output}: {missed:,} proteins had been skipped for want of memory, and are tried again", style="yellow"
        )
        store.take_back(output)
        return False
    return True


def _drop_finished_partial(output: Path) -> None:
    """Remove OUT.partial if it is OUT itself under its old name."""
    partial_file = store.partial_path(output)
    if partial_file.exists() and partial_file.samefile(output):
        partial_file.unlink()


def _open_store(
    output: Path, layout: store.Layout, fingerprint: dict[str, Any], config: EmbedConfig, summary: report.RunReport,
    table: fasta.RecordTable, found: locate.Weights, out: Console,
) -> store.Store:  # fmt: skip
    partial_file = store.partial_path(output)
    if partial_file.exists() and not config.restart:
        there = store.fingerprint_of(partial_file)
        if there is None:
            raise UserError(
                f"{partial_file} is not a partial output of virnucpro.", "Move it away, or discard it with --restart."
            )
        differing = store.differences(there[0], fingerprint)
        if differing:
            raise UserError(
                f"{partial_file} belongs to another run: {'; '.join(differing)}.",
                "Repeat that run's command to finish it, discard it with --restart, or choose another -o.",
            )
        file = store.Store.resume(output)
        done = int((file.status == store.DONE).sum())
        out.print(f"resuming {partial_file}: {done:,} of {len(table):,} proteins are there already")
        summary.counts["resumed proteins"] = done
        return file
    if partial_file.exists():
        store.discard_partial(output)
    store.check_free_space(output, layout.file_bytes)
    layout.attributes.update(_attributes(config, summary, table, found, fingerprint))
    return store.Store.create(output, layout, config.preallocate)


def _attributes(
    config: EmbedConfig, summary: report.RunReport, table: fasta.RecordTable, found: locate.Weights,
    fingerprint: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
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
        "environment": json.dumps(summary.environment),
        "model": summary.environment["model"],
        "weights": found.place,
        "weights_sha256": found.sha256,
        "weights_origin": locate.origin_of(found),
        "dtype": fingerprint["dtype"],
        "approximate": fingerprint["dtype"] == attention_backends.describe(torch.float8_e4m3fn),
        "store_dtype": config.store_dtype,
        "attention": fingerprint["attention"],
        "device": summary.environment["device"],
        "layers": json.dumps(fingerprint["layers"]),
        "pool": json.dumps(config.pool),
        "inputs": json.dumps(inputs),
        "fingerprint": json.dumps(fingerprint),
    }


# --- words and numbers -------------------------------------------------------------------------------------------


def _warnings(table: fasta.RecordTable, work: Work, config: EmbedConfig) -> list[str]:
    n = len(table)
    notes = []
    truncated = (work.flags & store.TRUNCATED) > 0
    if truncated.any():
        unseen = int((table.length[truncated] - work.embedded[truncated]).sum(dtype=np.int64)) / max(table.residues, 1)
        notes.append(
            f"{int(truncated.sum()):,} of {n:,} proteins truncated, {_percent(unseen)} of residues not seen; --long window embeds them whole"
        )
    replaced = int((table.replaced > 0).sum())
    if replaced and config.invalid == "x":
        odd = int(table.replaced.sum(dtype=np.int64))
        notes.append(
            f"{replaced:,} of {n:,} proteins hold {odd:,} residues outside the alphabet, embedded as X (column /replaced)"
        )
    for code in (store.EMPTY, store.INVALID, store.TOO_LONG):
        count = int((work.reason == code).sum())
        if count:
            notes.append(f"{count:,} of {n:,} proteins skipped: {store.REASONS[code]}; their rows are NaN")
    if config.pool == ("residue",):
        notes.append(
            "only per-residue rows are stored, so the file has no /embeddings; add mean, say, to --pool for one row a protein"
        )
    repeated = _repeated_names(table, config) if config.shard is None else 0
    if repeated:
        notes.append(
            f"{repeated:,} proteins share their name with an earlier one; all are kept, one row each, in input order"
        )
    return notes


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def _repeated_names(table: fasta.RecordTable, config: EmbedConfig) -> int:
    """How many records have the name of an earlier one."""
    hashes = np.empty(len(table), np.int64)
    for start in range(0, len(table), store.NAME_BLOCK):
        stop = min(len(table), start + store.NAME_BLOCK)
        hashes[start:stop] = [hash(name) for name in table.names(start, stop, config.id == "full")]
    return len(table) - len(np.unique(hashes))


def _counts(table: fasta.RecordTable, work: Work) -> dict[str, int]:
    def flagged(bit: int) -> int:
        return int(((work.flags & bit) > 0).sum())

    return {
        "proteins": len(table),
        "distinct proteins": len(np.unique(work.segments.record)),
        "residues": table.residues,
        "tokens": int(work.segments.length.sum(dtype=np.int64)) + SPECIAL_TOKENS * len(work.segments),
        "truncated": flagged(store.TRUNCATED),
        "windowed": flagged(store.WINDOWED),
        "with replaced residues": int((table.replaced > 0).sum()),
        "copied from an identical one": flagged(store.COPIED),
        "tokens saved by copying": int(
            (work.embedded.astype(np.int64) + SPECIAL_TOKENS)[(work.flags & store.COPIED) > 0].sum()
        ),
        "skipped": int((work.status == store.SKIPPED).sum()),
    }


def _packing(plan: Plan, work: Work) -> dict[str, float]:
    return {
        "packs": len(plan),
        "token budget": plan.token_budget,
        "density": plan.density,
        "density without the last pack": plan.density_without_last,
        "segments per pack": len(work.segments) / max(len(plan), 1),
        "filler tokens": int(plan.rung.sum() - plan.tokens.sum()),
    }


def _environment(
    config: EmbedConfig,
    spec: ModelSpec,
    place: runner.Place,
    devices: list[torch.device],
    dtype: torch.dtype,
    plan: Plan,
) -> dict[str, Any]:
    def chosen(value: str, asked: Any) -> str:
        return f"{value} (auto)" if asked == "auto" else value

    shared = f"{len(devices)} processes on {', '.join(map(str, dict.fromkeys(devices)))}"
    if config.engine == "ray":
        shared = f"{len(devices)} actors of Ray at the start"
    return {
        "virnucpro": virnucpro_cli.__version__,
        "torch": place.torch,
        "python": platform.python_version(),
        "model": f"{spec.name} ({spec.layers} layers of {spec.hidden})",
        "device": chosen(place.device, config.device),
        **({"workers": chosen(shared, config.workers)} if len(devices) > 1 or config.engine == "ray" else {}),
        "dtype": chosen(runner.describe_dtype(dtype), config.dtype),
        "attention": chosen(place.attention, config.attention),
        "token budget": chosen(f"{plan.token_budget:,}", config.token_budget),
    }


def _fill_rates(
    summary: report.RunReport, plan: Plan, packs: Int64, work: Work, clock: report.Clock, placer: Placer,
    device: torch.device, file: store.Store,
) -> None:  # fmt: skip
    seconds = dict(clock.seconds)
    if placer.first_pack is not None:
        seconds["first pack"] = placer.first_pack
    order = (
        "genes",
        "index",
        "plan",
        "cache",
        "load model",
        "start workers",
        "first pack",
        "forward",
        "write",
        "write (overlapped)",
    )
    summary.seconds = {name: seconds[name] for name in order if name in seconds}
    forward = seconds.get("forward", 0.0)
    if forward > 0:
        tokens = int(plan.tokens[packs].sum())
        segments = int(sum(plan.offsets[p + 1] - plan.offsets[p] for p in packs.tolist()))
        summary.rates = {
            "residues/s": (tokens - SPECIAL_TOKENS * segments) / forward,
            "tokens/s": tokens / forward,
            "segments/s": segments / forward,
        }
    summary.memory = {"peak host memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        summary.memory["peak GPU memory"] = torch.cuda.max_memory_allocated(device)
    if len(file.environments) > 1:
        summary.tables["Computed by"] = report.where_computed(
            file.environments, file.computed_by, file.status == store.DONE
        )
    summary.counts["skipped"] = int((file.status == store.SKIPPED).sum())
    summary.counts["recomputed in fp32"] = int(((file.flags & store.RECOMPUTED) > 0).sum())


def _describe_plan(
    summary: report.RunReport, table: fasta.RecordTable, work: Work, plan: Plan, layout: store.Layout, spec: ModelSpec,
    layers: tuple[int, ...], place: runner.Place, gpus: int, dtype: torch.dtype, found: locate.Weights | None, config: EmbedConfig,
    out: Console,
) -> None:  # fmt: skip
    length = work.segments.length.astype(np.float64) + SPECIAL_TOKENS
    flops = spec.flops(float(plan.rung.sum()), float((length**2).sum()), max(layers))
    kind, count = ("CPU thread", torch.get_num_threads())
    if "H100" in place.device:
        kind, count = "H100", gpus
    name = runner.short_name(dtype)
    by_width = MEASURED_FLOPS.get((kind, name), {}) if kind == "H100" or place.kind == "cpu" else {}
    rate = max((rate for width, rate in by_width.items() if width <= spec.hidden), default=None)
    summary.counts["output bytes (estimate)"] = layout.file_bytes
    summary.environment["weights"] = found.place if found else "not on this machine; the run will fetch them"
    edges = [0, 50, 100, 200, 400, 800, 1023, 2000, 5000]
    bins = np.append(edges, np.iinfo(np.int32).max)
    labels = [f"{a}-{b - 1}" for a, b in pairwise(edges)] + [f"{edges[-1]} and more"]
    histogram = np.histogram(table.length, bins)[0].tolist()
    summary.environment["length histogram"] = dict(zip(labels, histogram, strict=True))
    out.print(report.packing_table(summary))
    out.print(
        "lengths:  "
        + ";  ".join(f"{label}: {n:,}" for label, n in summary.environment["length histogram"].items() if n)
    )
    for key in ("model", "weights", "device", "workers", "dtype", "attention", "token budget"):
        if key in summary.environment:
            out.print(f"{key}: {summary.environment[key]}")
    free = store.free_space(Path(config.output))
    enough = "" if free >= layout.file_bytes else ", WHICH IS NOT ENOUGH"
    out.print(f"output: at most {report.size(layout.file_bytes)}; {report.size(free)} are free there{enough}")
    if rate:
        summary.seconds["forward (estimate)"] = flops / (rate * count)
        out.print(
            f"time: about {report.clock_time(flops / (rate * count))} of forward, an estimate from FLOPs and a measured rate"
        )
    else:
        out.print(f"time: no measured rate for {place.device} in {name}, so no estimate")


def _write_qc(output: Path, config: EmbedConfig) -> None:
    if config.qc:
        try:
            with store.read_embeddings(output) as file:
                qc.write(config.qc, file)
        except Stopped as stop:
            stop.resumable = True  # the file is complete: the same command writes the table alone
            raise


def _saved(summary: report.RunReport, config: EmbedConfig) -> report.RunReport:
    if config.report:
        report.save(config.report, summary.to_json())
    return summary
