"""The embed workflow: FASTA -> index -> segments -> plan -> packs through the model -> rows placed in the file.

`run` reads top to bottom as the steps of a run; everything it decides is decided from integers before the model is loaded.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from virnucpro_cli import report, store
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.embed import engines
from virnucpro_cli.embed import summary as words
from virnucpro_cli.embed.features import asked_for
from virnucpro_cli.embed.recipe import Recipe, attributes, decided, resolved_layers, target
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features.feature import Loaded, Run
from virnucpro_cli.kinds import unmasked
from virnucpro_cli.model import locate
from virnucpro_cli.model import weights as model_weights
from virnucpro_cli.model.esm2 import exact_arithmetic
from virnucpro_cli.plan.packing import subset, worst_first

__all__ = ["embed_fasta", "resolved_layers", "run"]


def run(config: EmbedConfig, out: Console | None = None, loaded: Loaded | None = None) -> report.RunReport:
    """Do what `virnucpro embed` does and return its report. Raises UserError for what the user can put right.

    loaded: what reading the model's weights yielded, for a caller that has read them already; one process then does it all.
    """
    out, clock = out or report.console(config.quiet), report.Clock()
    features = asked_for(config)
    at = target(config, features)
    with engines.chosen(config, loaded is not None, out, clock) as computing:
        recipe = decided(config, features, at, computing, out, clock)
        summary = words.of(recipe, clock)
        for note in summary.notes:
            out.print(note, style="yellow")
        if config.dry_run:
            words.describe_plan(summary, recipe, out)
        else:
            _made(recipe, summary, clock, out, loaded)
    if config.report:
        report.save(config.report, summary.to_json())
    return summary


def _made(recipe: Recipe, summary: report.RunReport, clock: report.Clock, out: Console, loaded: Loaded | None) -> None:
    """Have the finished file at its place, and what its features write beside it."""
    config, output = recipe.config, recipe.output
    assert recipe.found is not None
    recipe.computing.check_room(recipe.spec)
    with clock.stage("load model"):
        found = locate.verified(recipe.found)
        if config.emit:
            loaded = loaded or model_weights.load(found)
            _check_heads(recipe, loaded, found)
    fingerprint = recipe.fingerprint(found)
    finished = _finished(output, fingerprint, config)
    if finished is not None and not _to_be_retried(recipe, summary, out):
        out.print(f"{output} is already complete: same input, model and settings.")
        summary.already_complete = True
    else:
        file = _open_store(recipe, fingerprint, found, summary, out)
        file.replaces = finished
        with file.filling():
            run = Run(
                config, recipe.table, recipe.work, recipe.plan, recipe.layout, recipe.layers, recipe.spec, found, fingerprint,
                file, recipe.computing.local_device, summary, clock, out, loaded,
            )  # fmt: skip
            del loaded
            if not file.locked:
                run.tell(store.without_lock(file.path))
            _fill(run, recipe)
        if store.partial_path(output).exists():  # left by a kill between the two steps of the renaming
            _drop_finished_partial(output)
    for feature in recipe.features:
        feature.written(output)
    if not summary.already_complete:
        _say_end(recipe, summary, clock, out)


def _say_end(recipe: Recipe, summary: report.RunReport, clock: report.Clock, out: Console) -> None:
    if recipe.config.verbose:
        out.print(report.packing_table(summary), report.throughput_table(summary))
        for title, rows in summary.tables.items():
            out.print(report.rows_table(title, rows))
    for line in words.ending(recipe, summary, clock):
        out.print(line)


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


def _fill(run: Run, recipe: Recipe) -> None:
    """Have every pending record in the file, and end it."""
    file, work, plan, computing = run.file, run.work, run.plan, recipe.computing
    for feature in recipe.features:
        feature.before(run)
    todo = np.zeros(len(run.table), np.bool_)
    todo[work.representative[file.status == store.PENDING]] = True
    packs = worst_first(plan, subset(plan, todo[work.segments.record]), work.segments.length)
    placer = Placer(file, run.table, work, plan, run.config, todo, run.clock, computing.pins)
    exact_arithmetic()
    file.compute_in(computing.computed_by(len(packs) > 1))
    if len(packs):
        computing.compute(run, packs, placer)
    run.loaded = None
    if placer.broken or placer.unfit:
        from virnucpro_cli.engine.second_pass import second_pass

        second_pass(
            placer, run.found, run.layers, run.config, computing.dtype, run.device, computing.backend,
            engines.computed_at, run.tell,
        )  # fmt: skip
    for feature in recipe.features:
        feature.after(run)
    with run.clock.stage("finish"):
        file.commit()
        run.table.check_unchanged()
        for feature in recipe.features:
            feature.finish(run)
        words.fill_rates(run.summary, recipe, packs, run.clock, placer, file)
        run.summary.checksum = file.finish(run.summary.to_json_within(store.REPORT_BYTES), run.config.overwrite)


def _check_heads(recipe: Recipe, loaded: Loaded, found: locate.Weights) -> None:
    """Raise UserError if the weights lack what --emit needs."""
    if unmasked(recipe.config.emit):
        from virnucpro_cli.model.scores import check_head

        check_head(loaded[1], found)
    for feature in recipe.features:
        feature.check_weights(loaded, found)


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


def _to_be_retried(recipe: Recipe, summary: report.RunReport, out: Console) -> bool:
    """Whether this run computes what the finished file lacks for want of memory, in a partial file that is then there."""
    output, config = recipe.output, recipe.config
    with store.read_embeddings(output) as file:
        summary.counts["skipped"] = int((file.status == store.SKIPPED).sum())
        missed = int(((file.status == store.SKIPPED) & (file.reason == store.NO_MEMORY)).sum())
        lacking = {name: n for feature in recipe.features for name, n in feature.lacking(file).items()}
        had = file.report.get("memory", {})
    missed += sum(lacking.values())
    if not missed:
        return False
    begun = store.partial_path(output).exists() and not config.restart
    more = not config.restart and words.has_more_memory(had, summary.memory) and _has_room(output)
    if not (begun or more or config.retry_skipped):
        out.print(
            f"{output}: {counted(missed, 'protein')} skipped for want of memory; --retry-skipped tries again, as does "
            "the same command where more is free",
            style="yellow",
        )
        summary.counts |= lacking
        return False
    out.print(
        f"{output}: {counted(missed, 'protein')} skipped before for want of memory, now tried again", style="yellow"
    )
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
