"""The embed workflow: FASTA -> index -> segments -> plan -> packs through the model -> rows placed in the file.

`run` reads top to bottom as the steps of a run; everything it decides is decided from integers before the model is loaded.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from virnucpro_cli import report, store
from virnucpro_cli.cluster import ray as ray_engine
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.embed import summary as words
from virnucpro_cli.embed.recipe import Recipe, attributes, computed_at, decided, resolved_layers, target, where
from virnucpro_cli.engine import devices, runner, second_pass, workers
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import Stopped, UserError, counted
from virnucpro_cli.features import cache, contacts, groups, qc
from virnucpro_cli.features.contacts import head as contact_head
from virnucpro_cli.kinds import unmasked
from virnucpro_cli.model import locate, scores
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import ESM2, exact_arithmetic
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import subset, worst_first
from virnucpro_cli.plan.policies import Int64

__all__ = ["embed_fasta", "resolved_layers", "run"]

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
    at = target(config)
    recipe = decided(config, at, where(config, loaded is not None, cluster, out, clock), out, clock)
    summary = words.of(recipe, clock)
    for note in summary.notes:
        out.print(note, style="yellow")
    if config.dry_run:
        words.describe_plan(summary, recipe, out)
        return _saved(summary, config)

    assert recipe.found is not None
    if cluster is None:
        needed = recipe.spec.parameters * recipe.where.dtype.itemsize
        devices.check_room(recipe.where.device, needed, f"The weights of {recipe.spec.name}")
    with clock.stage("load model"):
        found = locate.verified(recipe.found)
        if config.emit:
            loaded = loaded or model_weights.load(found)
            _check_heads(config, loaded, found)
    fingerprint = recipe.fingerprint(found)
    finished = _finished(at.output, fingerprint, config)
    if finished is not None and not _to_be_retried(at.output, summary, config, out):
        out.print(f"{at.output} is already complete: same input, model and settings.")
        summary.already_complete = True
        _write_qc(at.output, config)
        return _saved(summary, config)
    file = _open_store(recipe, fingerprint, found, summary, out)
    file.replaces = finished
    with file.filling():
        run = _Run(recipe, found, file, summary, clock, out, loaded)
        del loaded
        if not file.locked:
            run.tell(store.without_lock(file.path))
        _fill(run, fingerprint)
    if store.partial_path(at.output).exists():  # left by a kill between the two steps of the renaming
        _drop_finished_partial(at.output)
    _write_qc(at.output, config)
    if config.verbose:
        out.print(report.packing_table(summary), report.throughput_table(summary))
        for title, rows in summary.tables.items():
            out.print(report.rows_table(title, rows))
    for line in words.ending(recipe, summary, clock):
        out.print(line)
    return _saved(summary, config)


def embed_fasta(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], **options: Any
) -> report.RunReport:
    """Embed FASTA files into an HDF5 file and return the report.

    inputs: one path or several; options: the fields of `EmbedConfig`, e.g. `model="demo", pool=("mean", "bos")`.
    Raises UserError for what the caller can put right.
    """
    with devices.as_before():
        return run(resolve(EmbedConfig, None, {"quiet": True, **options, "inputs": inputs, "output": output}))


# --- computing ---------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A run that has begun: its file is open, and locked. loaded: the weights, until a model is made of them."""

    recipe: Recipe
    found: locate.Weights
    file: store.Store
    summary: report.RunReport
    clock: report.Clock
    out: Console
    loaded: Loaded | None

    def tell(self, text: str) -> None:
        self.out.print(text, style="yellow")
        self.summary.notes.append(text)


def _fill(run: _Run, fingerprint: dict[str, Any]) -> None:
    """Have every pending record in the file, and end it."""
    recipe, file, clock, summary = run.recipe, run.file, run.clock, run.summary
    config, table, work, where = recipe.config, recipe.table, recipe.work, recipe.where
    shared = None
    if config.cache is not None:
        assert table.digest is not None
        of_a_row = {key: value for key, value in fingerprint.items() if key not in recipe.layout.extra.fingerprint}
        shared = cache.Cache(config, of_a_row, recipe.layout.environment, file, work, table.digest, run.tell)
        with clock.stage("cache"):
            summary.counts |= shared.take()
    todo = np.zeros(len(table), np.bool_)
    todo[work.unit[file.status == store.PENDING]] = True
    packs = worst_first(recipe.plan, subset(recipe.plan, todo[work.segments.record]), work.segments.length)
    pin = where.cluster is None and where.device.type == "cuda"
    placer = Placer(file, table, work, recipe.plan, config, todo, clock, pin)
    _forward(run, packs, placer)
    if placer.broken or placer.unfit:
        second_pass.second_pass(
            placer, run.found, recipe.layers, config, where.dtype, where.device, where.backend, computed_at, run.tell
        )
    if "contacts" in config.emit:
        with clock.stage("contacts"):
            left_out = contacts.fill(file, table, work, recipe.plan, run.found, where.device, run.out)
        if left_out:
            summary.counts["contact maps left out"] = left_out
            run.tell(
                f"{counted(left_out, 'protein')} without a contact map: out of memory; the same command where there is more tries them again"
            )
    with clock.stage("finish"):
        file.commit()
        table.check_unchanged()
        groups.fill(file)
        if shared is not None:
            shared.publish()
        words.fill_rates(summary, recipe, packs, clock, placer, file)
        summary.checksum = file.finish(summary.to_json_within(store.REPORT_BYTES), config.overwrite)


def _forward(run: _Run, packs: Int64, placer: Placer) -> None:
    """Have packs computed and placed by whoever computes in this run."""
    recipe, file, clock, tell = run.recipe, run.file, run.clock, run.tell
    config, plan, where = recipe.config, recipe.plan, recipe.where
    exact_arithmetic()
    several = len(packs) > 1 and len(where.devices) > 1
    file.compute_in(where.computed_by(several))
    if not len(packs):
        run.loaded = None
        return
    compute = None if where.cluster is not None or several else _model(run)
    run.loaded = None
    with report.Tracker(run.out, int(plan.tokens[packs].sum())) as placer.tracker:
        if where.cluster is not None:
            run.summary.tables["Nodes"] = where.cluster.run(packs, plan, placer, run.found, recipe.layers, tell)
        elif compute is None:
            job = workers.Job(
                config, run.found, recipe.layers, where.dtype, where.place.attention, recipe.table, recipe.work, plan,
                placer.todo, file.output, file.path, file.fd, devices.threads_of(len(where.devices)),
            )  # fmt: skip
            on = where.devices[: len(packs)]
            run.summary.tables["Workers"] = workers.run(job, packs, on, placer, tell)
        else:
            with clock.stage("forward"):
                placer.started = time.perf_counter()
                runner.run(packs, placer.collator, compute, placer, where.device, tell, placer.note_unfit)


def _model(run: _Run) -> runner.Compute:
    """What this process computes of a batch."""
    recipe, where = run.recipe, run.recipe.where
    with run.clock.stage("load model"):
        _, state, notes = run.loaded or model_weights.load(run.found)
        assert where.backend is not None
        model = ESM2(recipe.spec, state, where.dtype, where.device, where.backend)
    for note in notes:
        run.out.print(note, style="yellow")
    run.summary.notes += notes
    return runner.compute_with(model, recipe.layers, recipe.config)


def _check_heads(config: EmbedConfig, loaded: Loaded, found: locate.Weights) -> None:
    """Raise UserError if the weights lack what --emit needs."""
    spec, state, _ = loaded
    if unmasked(config.emit):
        scores.check_head(state, found)
    if "contacts" in config.emit:
        contact_head.with_contact_head(state, spec, found)


# --- the file ----------------------------------------------------------------------------------------------------


def _finished(output: Path, fingerprint: dict[str, Any], config: EmbedConfig) -> os.stat_result | None:
    """The finished file that is there, None without one, or if it is to be overwritten. Raises UserError if it is of another run."""
    if config.overwrite or not output.exists():
        return None
    there, found = output.stat(), store.fingerprint_of(output)
    if found is None:
        raise UserError(f"{output} was taken up or replaced by another run just now.", "Run the command again.")
    differing = store.differences(found[0], fingerprint)
    if differing:
        raise UserError(
            f"{output} exists and is of another run: {'; '.join(differing)}.", "Choose another -o, or --overwrite it."
        )
    if not found[1]:
        raise UserError(f"{output} exists but is not complete.", "Choose another -o, or --overwrite it.")
    _drop_finished_partial(output)
    return there


def _to_be_retried(output: Path, summary: report.RunReport, config: EmbedConfig, out: Console) -> bool:
    """Whether this run computes what the finished file lacks for want of memory, in a partial file that is then there."""
    with store.read_embeddings(output) as file:
        summary.counts["skipped"] = int((file.status == store.SKIPPED).sum())
        missed = int(((file.status == store.SKIPPED) & (file.reason == store.NO_MEMORY)).sum())
        if file.contact_maps is not None:
            missed += file.contact_maps.pending
            summary.counts |= {"contact maps left out": file.contact_maps.pending} if file.contact_maps.pending else {}
        shown, had = bool(file.sources), file.report.get("memory", {})
    if not missed or shown:  # the shards' own commands try theirs again
        return False
    begun = store.partial_path(output).exists() and not config.restart
    more = not config.restart and words.has_more_memory(had, summary.memory) and _has_room(output)
    if not (begun or more or config.retry_skipped):
        out.print(
            f"{output}: {counted(missed, 'protein')} skipped for want of memory; --retry-skipped tries again, as does "
            "the same command where more is free",
            style="yellow",
        )
        return False
    out.print(
        f"{output}: {counted(missed, 'protein')} skipped before for want of memory, now tried again", style="yellow"
    )
    summary.counts.pop("contact maps left out", None)
    if not begun and not config.restart:
        store.copy_back(output)
    return True


def _has_room(output: Path) -> bool:
    """Whether a better file can be made beside this one, and may take its place."""
    return os.access(output, os.W_OK) and store.free_space(output) > output.stat().st_size


def _drop_finished_partial(output: Path) -> None:
    """Remove OUT.partial if it is OUT itself under its old name."""
    partial_file = store.partial_path(output)
    if partial_file.exists() and partial_file.samefile(output):
        partial_file.unlink()


def _open_store(
    recipe: Recipe, fingerprint: dict[str, Any], found: locate.Weights, summary: report.RunReport, out: Console
) -> store.Store:
    output, layout, config, table = recipe.output, recipe.layout, recipe.config, recipe.table
    partial_file = store.partial_path(output)
    if partial_file.exists() and not config.restart:
        there = store.fingerprint_of(partial_file)
        if there is None or store.is_view(partial_file):
            raise UserError(
                f"{partial_file} is not a partial output of virnucpro.", "Move it away, or discard it with --restart."
            )
        differing = store.differences(there[0], fingerprint)
        if differing:
            raise UserError(
                f"{partial_file} belongs to another run: {'; '.join(differing)}.",
                "Repeat that run's command to finish it, discard it with --restart, or choose another -o.",
            )
        file = _resumed(output, layout, summary, out)
        done = int((file.status == store.DONE).sum())
        out.print(f"resuming {partial_file}: {done:,} of {counted(len(table), 'protein')} there already")
        summary.counts["resumed proteins"] = done
        return file
    if partial_file.exists():
        store.discard_partial(output)
    store.check_free_space(output, layout.file_bytes)
    layout.attributes.update(attributes(recipe, summary.environment, found, fingerprint))
    return store.Store.create(output, layout, config.preallocate)


def _resumed(output: Path, layout: store.Layout, summary: report.RunReport, out: Console) -> store.Store:
    """The partial file, in which every record that is not pending is as it was committed."""
    file = store.Store.resume(output)
    try:
        if lost := file.recheck(layout):
            note = f"{counted(lost, 'protein')} not in {file.path} as they were committed, and computed again: see to the disk"
            out.print(note, style="yellow")
            summary.notes.append(note)
    except BaseException:
        file.close()
        raise
    return file


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
