"""The import workflow: embeddings in the layout of another tool into a file like embed's, in the order of a FASTA if one is given.

Two passes over the source: a look at what is in it, from which the file is laid out, and the rows, placed where they belong.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from virnucpro_cli import fasta, report, store
from virnucpro_cli.errors import UserError, absent, counted
from virnucpro_cli.exchange import layouts
from virnucpro_cli.exchange.imports.plan import ImportPlan, plan
from virnucpro_cli.exchange.imports.source import Batch, Int64, batches, look, reading_of
from virnucpro_cli.exchange.layouts.layout import Format, What


def import_file(
    source: str, output: str, name: str | None = None, inputs: tuple[str, ...] = (), model: str | None = None,
    layer: int | None = None, overwrite: bool = False, out: Console | None = None,
) -> report.RunReport:  # fmt: skip
    """Import `source`, of the layout `name` or of what it looks like. inputs: the FASTA that was embedded; model, layer: what made
    the rows, where the source does not say it (or which of its layers to take). Raises UserError for what cannot be.
    """
    out, clock, target = out or report.console(), report.Clock(), store.behind(Path(output))
    summary = report.RunReport("import")
    layout = _layout_of(source, name)
    store.check_destination(target)
    store.check_hdf5_name(target)
    beside = [Path(source).with_suffix(layout.beside)] if layout.beside else []
    report.check_places({"output": output}, [source, *beside, *inputs])
    _make_way(target, overwrite)
    with reading_of(source, layout):
        said = layout.provenance(Path(source))
    with clock.stage("read FASTA"):  # the cheaper of the two passes comes first
        sources = fasta.open_sources(inputs, target.absolute().parent)
        policies = {"gaps": said.get("gaps", "keep"), "dedup": said.get("dedup", False)}
        table = fasta.index(sources, **policies) if inputs else None
    if str(said.get("kind", "")).startswith("groups/"):
        raise UserError(f"{source} holds rows of groups.", "Import the proteins; their groups are made by embed.")
    with clock.stage("look"):
        found = look(source, layout, said, layer)
    if said.get("store_dtype") == "fp16":  # in a layout of fp32: nothing is lost
        found.dtype = np.dtype(np.float16)
    made = plan(source, output, layout, found, said, table, model, summary.notes)
    store.check_free_space(target, made.layout.file_bytes)
    with report.Tracker(out, len(found), "proteins") as tracker:
        file = _filled(target, made, batches(source, layout, found), tracker, clock)
    try:
        skipped = int((file.status == store.SKIPPED).sum())
        summary.counts = {"proteins": len(file.status), "imported": len(file.status) - skipped, "skipped": skipped}
        for code in np.unique(file.reason[file.status == store.SKIPPED]).tolist():
            summary.notes.append(
                f"{counted(int((file.reason == code).sum()), 'protein')} without an embedding: {store.REASONS[code]}"
            )
        summary.seconds = dict(clock.seconds)
        summary.checksum = file.finish(summary.to_json_within(store.REPORT_BYTES), overwrite)
    finally:
        file.close()
    what = ", ".join(f"{kind}/{number}" for kind, number in found.take.values())
    out.print(f"{target}: {what} of {counted(summary.counts['imported'], 'protein')} from {source}, {layout.what}")
    for note in summary.notes:
        out.print(note, style="yellow")
    return summary


def _layout_of(source: str, name: str | None) -> Format:
    if not Path(source).exists():
        raise UserError(f"{absent(source)}.", f"Paths are relative to {Path.cwd()}.")
    if name is not None:
        return layouts.named(name)
    if store.fingerprint_of(Path(source)) is not None:
        raise UserError(f"{source} is already a file of embed's.", "Nothing is to be imported: use it as it is.")
    layout = layouts.guessed(Path(source))
    if layout is None:
        raise UserError(
            f"{source} looks like none of the layouts, or is damaged.",
            f"Say which it is: --from {' | '.join(each.name for each in layouts.LAYOUTS)}",
        )
    return layout


def _make_way(target: Path, overwrite: bool) -> None:
    """Nothing that exists is lost but what --overwrite names, and what a killed import left."""
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists.", "Choose another output with -o, or --overwrite it.")
    begun = store.partial_path(target)
    if begun.exists():
        there = store.fingerprint_of(begun)
        if there is None or "imported" not in there[0]:
            raise UserError(
                f"{begun} is of a run of embed.", "Finish that run first, or choose another output with -o."
            )
        store.discard_partial(target)


def _filled(
    target: Path, made: ImportPlan, rows: Iterator[Batch], tracker: report.Tracker, clock: report.Clock
) -> store.Store:  # fmt: skip
    """The file with all rows in it; nothing of it is left if that fails."""
    file = store.Store.create(target, made.layout)
    try:
        with clock.stage("write"):
            records = np.argsort(made.entry_of, kind="stable")
            entries = made.entry_of[records]
            first = 0
            for batch in rows:
                a, b = np.searchsorted(entries, (first, first + len(batch))).tolist()
                if made.way is not None:
                    made.way.check(batch.entries, records[a:b], entries[a:b] - first)
                _place(file, made.layout, batch.rows, records[a:b], entries[a:b] - first)
                file.commit()
                tracker.advance(len(batch))
                first += len(batch)
        return file
    except BaseException:
        with suppress(OSError):
            file.path.unlink()
        file.close()
        raise


def _place(
    file: store.Store, layout: store.Layout, batch: list[dict[What, NDArray[Any]]], records: Int64, which: Int64
) -> None:  # fmt: skip
    """The rows of batch[which] into the records'. What is not finite is no embedding: NaN, and skipped."""
    finite = np.array([all(np.isfinite(rows).all() for rows in each.values()) for each in batch], np.bool_)
    for i in np.flatnonzero(~finite).tolist():
        batch[i] = {what: np.full_like(rows, np.nan) for what, rows in batch[i].items()}
    if not len(records):
        return
    for kind, layer in batch[0]:
        rows = [batch[i][kind, layer] for i in which.tolist()]
        if kind == "residue":
            assert layout.residue_offsets is not None
            at = layout.residue_offsets[records]
            places = [np.arange(start, start + len(each)) for start, each in zip(at.tolist(), rows, strict=True)]
            file.place(kind, layer, np.concatenate(places), np.concatenate(rows))
        else:
            file.place(kind, layer, records, np.stack(rows))
    file.mark(records[finite[which]])
    file.mark(records[~finite[which]], store.SKIPPED, reason=store.NOT_FINITE)
