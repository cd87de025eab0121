"""The import workflow: embeddings in the layout of another tool into a file like embed's, in the order of a FASTA.

Two passes over the source: a look at what is in it, from which the file is laid out, and the rows.
Without a FASTA the order is that of the source.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.console import Console

from virnucpro_cli import fasta, report, store
from virnucpro_cli.errors import Stopped, UserError, absent, counted
from virnucpro_cli.exchange import layouts
from virnucpro_cli.exchange.imports.plan import ImportPlan, plan
from virnucpro_cli.exchange.imports.source import Int64, Source, look, reading_of
from virnucpro_cli.exchange.layouts.layout import Entry, Format


def import_file(
    source: str, output: str, name: str | None = None, inputs: tuple[str, ...] = (), model: str | None = None,
    layer: int | None = None, overwrite: bool = False, out: Console | None = None,
) -> report.RunReport:  # fmt: skip
    """Import `source`, of the layout `name` or of the one that it looks like. inputs: the FASTA that was embedded.

    model, layer: what made the rows, where the source does not say it (or which of its layers to take).
    Raises UserError for what cannot be.
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
        provenance = layout.provenance(Path(source))
    if str(provenance.get("kind", "")).startswith("groups/"):
        raise UserError(f"{source} holds rows of groups.", "Import the proteins; their groups are made by embed.")
    with clock.stage("read FASTA"):  # the cheaper of the two passes comes first
        policies = {"gaps": provenance.get("gaps", "keep"), "dedup": provenance.get("dedup", False)}
        sources = fasta.open_sources(inputs, target.absolute().parent)
        table = fasta.index(sources, **policies) if inputs else None
    with clock.stage("look"):
        contents = look(source, layout, provenance, layer)
    if provenance.get("store_dtype") == "fp16":  # in a layout of fp32: nothing is lost
        contents.dtype = np.dtype(np.float16)
    planned = plan(contents, output, provenance, table, model, summary.notes)
    store.check_free_space(target, planned.layout.file_bytes)
    with report.Tracker(out, len(contents), "proteins") as tracker, clock.stage("write"):
        file = _filled(target, planned, contents, tracker)
    try:
        n, reasons = len(file.status), file.reason[file.status == store.SKIPPED]
        summary.counts = {"proteins": n, "imported": n - len(reasons), "skipped": len(reasons)}
        for code, count in zip(*map(np.ndarray.tolist, np.unique(reasons, return_counts=True)), strict=True):
            summary.notes.append(f"{counted(count, 'protein')} without an embedding: {store.REASONS[code]}")
        summary.seconds = dict(clock.seconds)
        summary.checksum = file.finish(summary.to_json_within(store.REPORT_BYTES), overwrite)
    except Stopped:
        with suppress(OSError):  # it has its name
            store.partial_path(target).unlink()
        raise
    finally:
        file.close()
    what = ", ".join(f"{kind}/{number}" for kind, number in contents.take.values())
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
        remedy = f"Say which it is: --from {' | '.join(layouts.NAMES)}"
        raise UserError(f"{source} looks like none of the layouts, or is damaged.", remedy)
    return layout


def _make_way(target: Path, overwrite: bool) -> None:
    """Discard what a killed import left. Raises UserError for anything else that is in the way."""
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists.", "Choose another output with -o, or --overwrite it.")
    begun = store.partial_path(target)
    if begun.exists():
        fingerprint = store.fingerprint_of(begun)
        if fingerprint is None or "imported" not in fingerprint[0]:
            remedy = "Finish that run first, or choose another output with -o."
            raise UserError(f"{begun} is of a run of embed.", remedy)
        store.discard_partial(target)


def _filled(target: Path, planned: ImportPlan, source: Source, tracker: report.Tracker) -> store.Store:
    """The file with all rows in it; nothing of it is left if that fails."""
    file = store.Store.create(target, planned.layout)
    try:
        records = np.argsort(planned.entry_of, kind="stable")
        entries = planned.entry_of[records]
        first = 0
        for batch in source.batches():
            a, b = np.searchsorted(entries, (first, first + len(batch))).tolist()
            if planned.way is not None:
                planned.way.check(batch, records[a:b], entries[a:b] - first)
            _place(file, planned.layout, batch, records[a:b], entries[a:b] - first)
            file.commit()
            tracker.advance(len(batch))
            first += len(batch)
        return file
    except BaseException:
        with suppress(OSError):
            file.path.unlink()
        file.close()
        raise


def _place(file: store.Store, layout: store.Layout, batch: list[Entry], records: Int64, which: Int64) -> None:
    """The rows of batch[which] into the records'. A row that is not finite becomes NaN, and its record is skipped."""
    if not len(records):
        return
    entries = [batch[i] for i in which.tolist()]
    is_finite = np.array([all(np.isfinite(rows).all() for rows in entry.values.values()) for entry in entries])
    for kind, layer in batch[0].values:
        rows = [
            entry.values[kind, layer] if finite else np.full_like(entry.values[kind, layer], np.nan)
            for entry, finite in zip(entries, is_finite.tolist(), strict=True)
        ]
        if kind == "residue":
            assert layout.residue_offsets is not None
            starts = layout.residue_offsets[records].tolist()
            places = [np.arange(start, start + len(each)) for start, each in zip(starts, rows, strict=True)]
            file.place(kind, layer, np.concatenate(places), np.concatenate(rows))
        else:
            file.place(kind, layer, records, np.stack(rows))
    file.mark(records[is_finite])
    file.mark(records[~is_finite], store.SKIPPED, reason=store.NOT_FINITE)
