"""The embed workflow: FASTA -> index -> segments -> plan -> packs through the model -> rows placed in the file.

`run` reads top to bottom as the steps of a run. Everything is decided from integers before the model is loaded.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from virnucpro_cli import report, store
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.embed import engines
from virnucpro_cli.embed import summary as words
from virnucpro_cli.embed.recipe import (
    Around,
    EmbedRun,
    attributes,
    decided,
    inputs_of,
    resolved_layers,
    target,
    tokens_beside,
)
from virnucpro_cli.engine import devices
from virnucpro_cli.engine.placer import Job, Placer
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.features import Loaded, asked_for
from virnucpro_cli.model import locate
from virnucpro_cli.model.families import parameters
from virnucpro_cli.model.packed import exact_arithmetic
from virnucpro_cli.plan.packing import Int64, subset, worst_first

if TYPE_CHECKING:
    from virnucpro_cli.waking import Begun

__all__ = ["embed_fasta", "resolved_layers", "run"]

LESS = (
    "choose another disk with -o, or store less (--store-dtype fp16, fewer --layers, no residue pool, contacts of "
    "fewer with --contacts-for)"
)
ANOTHER = "Choose another -o, or --overwrite it."
LOOKS = 5
"""How often a run looks at what is there, if each time another one changes it."""


def run(
    config: EmbedConfig,
    out: Console | None = None,
    loaded: Loaded | None = None,
    since: float | None = None,
    waiting: "list[Begun] | None" = None,
) -> report.RunReport:
    """Do what `virnucpro embed` does and return its report. Raises UserError for what the user can put right.

    loaded: the weights, for a caller that has read them already; one process then does it all.
    since: the moment (`time.perf_counter`) at which the program began, from which on its seconds are reported.
    waiting: worker processes that wait for a job.
    """
    clock = report.Clock(since)
    with clock.stage("plan"):
        out, features = out or report.console(config.quiet), asked_for(config)
        at = target(config, features)
    with (
        tokens_beside(at),
        inputs_of(config, at, out) as inputs,
        engines.chosen(config, loaded is not None, out, clock, waiting or []) as computing,
    ):
        with clock.stage("plan"):
            begun = decided(config, features, inputs, Around(at, computing, out, clock))
            begun.loaded = loaded
            words.begin(begun)
            begun.table.let_go()
            for note in begun.summary.notes:
                out.print(note, style="yellow")
        if config.dry_run:
            words.describe_plan(begun)
        else:
            _embed(begun)
    words.note_seconds(begun)
    if config.report:
        report.save(config.report, begun.summary.to_json())
    return begun.summary


def embed_fasta(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], **options: Any
) -> report.RunReport:
    """Embed FASTA files into an HDF5 file and return the report.

    inputs: one path or several; options: the fields of `EmbedConfig`, e.g. `model="demo", pool=("mean", "bos")`.
    Raises UserError for what the caller can put right.
    """
    with devices.as_before():
        return run(resolve(EmbedConfig, None, {"quiet": True, **options, "inputs": inputs, "output": output}))


def _embed(run: EmbedRun) -> None:
    """Have the finished file at its place, and what its features write beside it."""
    with run.clock.stage("load model"):
        for each in (run, *run.halves.values()):
            run.computing.check_room(each.spec)
            assert each.located is not None
            each.weights = locate.verified(each.located)
    with run.clock.stage("lay out"):
        for each in (run, *run.halves.values()):
            each.fingerprint = each.fingerprint_with(each.weights)
        _take_up(run)
        run.table.let_go()
    if not run.summary.already_complete:
        with run.file.filling():
            if not run.file.locked:
                run.tell(store.without_lock(run.file.path))
            _fill(run)
    with run.clock.stage("finish"):
        if not run.summary.already_complete:
            _drop_finished_partial(run.output)  # left by a kill between the two steps of the renaming
        for feature in run.features:
            feature.written(run.output)
        if not run.summary.already_complete:
            words.end(run)


def _fill(run: EmbedRun) -> None:
    """Have every pending record of the run and of its halves in the file, and end it."""
    file = run.file
    for name, half in run.halves.items():
        half.file = file.halves[name]
    with _readied(run) as ready:
        packs, placer = _pending(run)
        tokens = int(run.plan.tokens[packs].sum())
        shares = {half.half: parameters(half.spec) / parameters(run.spec) for half in run.halves.values()}
        guess = {name: round(share * int(run.halves[name].plan.tokens.sum())) for name, share in shares.items()}
        with report.Tracker(run.out, tokens + sum(guess.values())) as tracker:
            placer.tracker = tracker.part(1)
            _compute(run, packs, placer)
            for name, half in run.halves.items():
                with run.clock.stage("tokens"):
                    ready[name].result()
                of_half, its = _pending(half)
                its.tracker = tracker.part(shares[name])
                tracker.total += round(shares[name] * int(half.plan.tokens[of_half].sum())) - guess[name]
                _compute(half, of_half, its)
                words.note_half(run, half, of_half)
    for feature in run.features:
        feature.after(run)
    with run.clock.stage("finish"):
        file.commit()
        for each in (*run.halves.values(), run):
            each.table.check_unchanged()
            for feature in each.features:
                feature.finish(each)
        words.fill_rates(run, packs, placer)
        run.summary.checksum = file.finish(run.summary.to_json_within(store.REPORT_BYTES), run.config.overwrite)


@contextmanager
def _readied(run: EmbedRun) -> Iterator[dict[str, Future[None]]]:
    """The halves, which another thread gets ready meanwhile."""
    over = Event()
    with ThreadPoolExecutor(1, "tokens") as beside:
        try:
            yield {name: beside.submit(half.get_ready, over.is_set) for name, half in run.halves.items()}
        finally:
            over.set()


def _pending(run: EmbedRun) -> tuple[Int64, Placer]:
    """Numbers of the packs that hold pending records, int64 [P], and what places their rows."""
    decisions, plan = run.decisions, run.plan
    with run.clock.stage("plan"):
        for feature in run.features:
            feature.before(run)
        pending = np.zeros(len(run.table), np.bool_)
        pending[decisions.representative[run.file.status == store.PENDING]] = True
        segments = decisions.segments
        packs = worst_first(plan, subset(plan, pending[segments.record]), segments.length)
        job = Job(run.config, run.table, decisions, plan, pending, run.weights, run.layers, run.dtype)
        return packs, Placer(run.file, job, run.clock, run.computing.pins)


def _compute(run: EmbedRun, packs: Int64, placer: Placer) -> None:
    """Have packs, int64 [P], in the file, and what is too large or not finite in the ways that are left."""
    computing = run.computing
    with run.clock.stage("plan"):
        exact_arithmetic()
        run.file.compute_in(computing.computed_by(len(packs) > 1, run.dtype))
    with placer:
        if len(packs):
            computing.compute(run, packs, placer)
        if placer.broken or placer.unfit:
            from virnucpro_cli.engine.second_pass import second_pass

            with run.clock.stage("second pass"):
                second_pass(placer, run.device, computing.backend, run.tell)
    with run.clock.stage("finish"):
        run.file.commit()


# --- the file ----------------------------------------------------------------------------------------------------


def _take_up(run: EmbedRun) -> None:
    """Have the file that the run fills, or see that nothing is left to do. Looks again if another run was faster."""
    for left in reversed(range(LOOKS)):
        try:
            finished = _finished(run)
            if finished is not None and not _is_retried(run):
                run.out.print(f"{run.output} is already complete: same input, model and settings.")
                run.summary.already_complete = True
            else:
                run.file = _open_store(run, finished)
            return
        except store.Overtaken:
            if not left:
                raise


def _finished(run: EmbedRun) -> os.stat_result | None:
    """The finished file that is there, None without one, or if it is to be overwritten.

    Raises UserError if it is of another run.
    """
    output = run.output
    if run.config.overwrite or not output.exists():
        return None
    there, known = output.stat(), store.fingerprint_of(output)
    if known is None:
        raise store.Overtaken(output)
    theirs, is_complete = known
    if differing := store.differences(theirs, run.fingerprint):
        raise UserError(f"{output} exists and is of another run: {'; '.join(differing)}.", ANOTHER)
    if not is_complete:
        raise UserError(f"{output} exists but is not complete.", ANOTHER)
    _drop_finished_partial(output)
    return there


def _is_retried(run: EmbedRun) -> bool:
    """Whether this run computes what the finished file lacks for want of memory. A partial file is there then."""
    output, config, summary = run.output, run.config, run.summary
    with store.read_embeddings(output) as file:
        skipped = file.status == store.SKIPPED
        summary.counts["skipped"] = int(skipped.sum())
        lacking = {name: n for feature in run.features for name, n in feature.lacking(file).items()}
        missed = int((skipped & (file.reason == store.NO_MEMORY)).sum()) + sum(lacking.values())
        had = file.report.get("memory", {})
    if not missed:
        return False
    begun = store.partial_path(output).exists() and not config.restart
    more = not config.restart and words.has_more_memory(had, summary.memory) and _has_room(output)
    skipped_before = f"{output}: {counted(missed, config.words[0])} skipped"
    if not (begun or more or config.retry_skipped):
        way = "--retry-skipped tries again, as does the same command where more is free"
        run.out.print(f"{skipped_before} for want of memory; {way}", style="yellow")
        summary.counts |= lacking
        return False
    run.out.print(f"{skipped_before} before for want of memory, now tried again", style="yellow")
    if not begun and not config.restart:
        store.copy_back(output)
    return True


def _has_room(output: Path) -> bool:
    """Whether a better file can be made beside this one, and may take its place."""
    return os.access(output, os.W_OK) and store.has_room(output, output.stat().st_size)


def _drop_finished_partial(output: Path) -> None:
    """Remove OUT.partial if it is OUT itself under its old name."""
    partial_file = store.partial_path(output)
    if partial_file.exists() and partial_file.samefile(output):
        partial_file.unlink()


def _open_store(run: EmbedRun, finished: os.stat_result | None) -> store.Store:
    """The partial file, resumed or new. Raises UserError for one that is of another run.

    finished: the file that it will replace.
    """
    output, layout, partial_file = run.output, run.layout, store.partial_path(run.output)
    if partial_file.exists() and not run.config.restart:
        there = store.fingerprint_tried(partial_file, "Discard it with --restart.")
        if there is None:
            store.check_unheld(partial_file)
            remedy = "Move it away, or discard it with --restart."
            raise UserError(f"{partial_file} is not a partial output of virnucpro.", remedy)
        if differing := store.differences(there[0], run.fingerprint):
            remedy = "Repeat that run's command to finish it, discard it with --restart, or choose another -o."
            raise UserError(f"{partial_file} belongs to another run: {'; '.join(differing)}.", remedy)
        file = _resumed(run)
    else:
        if partial_file.exists():
            store.discard_partial(output)
        store.check_free_space(output, layout.file_bytes, LESS)
        layout.attributes.update(attributes(run))
        file = store.Store.create(output, layout, run.config.preallocate)
        if finished is None and output.exists() and not run.config.overwrite:
            file.close()
            store.discard_partial(output)
            raise store.Overtaken(output)
    file.replaces = finished
    return file


def _resumed(run: EmbedRun) -> store.Store:
    """The partial file, in which every record that is not pending is as it was committed."""
    file = store.Store.resume(run.output)
    try:
        if lost := file.recheck(run.layout):
            lost_rows = f"{counted(lost, run.config.words[0])} not in {file.path} as they were committed"
            run.tell(f"{lost_rows}, and computed again: see to the disk")
        done = int((file.status == store.DONE).sum())
        run.out.print(f"resuming {file.path}: {done:,} of {counted(len(run.table), run.config.words[0])} there already")
        run.summary.counts["resumed proteins"] = done
    except BaseException:
        file.close()
        raise
    return file
