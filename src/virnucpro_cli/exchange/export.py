"""The export workflow: a finished embeddings file written in the layout of another tool, whole or not at all."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from virnucpro_cli import fasta, report, store
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.exchange import layouts
from virnucpro_cli.exchange.layouts import target as targets
from virnucpro_cli.exchange.layouts.layout import Format, Keys, Names, Selection, encodable
from virnucpro_cli.features.groups import KINDS as GROUP_KINDS
from virnucpro_cli.plan.policies import POLICIES

OF_GROUPS = "groups/"
"""Before a kind: rows of groups."""


def export_file(
    path: str, to: str | None, output: str | None = None, kinds: tuple[str, ...] = (), numbers: tuple[int, ...] = (),
    inputs: tuple[str, ...] = (), overwrite: bool = False,
) -> report.RunReport:  # fmt: skip
    """Export a file. kinds, numbers: pooling kinds and layers, by default the file's default; inputs: its FASTA.

    Raises UserError for what the user can put right, such as rows that the layout has no room for.
    """
    layout, out, clock = layouts.named(to) if to else layouts.of_suffix(output), report.console(), report.Clock()
    target = Path(output) if output else Path(path).with_name(Path(path).name.removesuffix(".h5") + layout.suffix)
    summary = report.RunReport("export")
    with store.opened(path) as file:
        kinds, numbers = _chosen(file, layout, kinds, numbers)
        if not file.complete or (file.status == store.PENDING).any():
            raise UserError(f"{path} is not complete.", "Let its run finish: the same command of embed goes on.")
        rows: Any = _GroupRows(file, kinds[0]) if kinds[0].startswith(OF_GROUPS) else file
        unit = file.words[0] if rows is file else "group"
        named = inputs or tuple(entry["path"] for entry in file.inputs)
        targets.check(target, layout, [path, *named], overwrite)
        with report.Tracker(out, len(rows), "rows") as tracker:
            with clock.stage("read FASTA") if layout.key_of else nullcontext():
                keys = _keys(file, rows, layout, named, target.absolute().parent)
            provenance = _provenance(file, kinds[0], numbers[0])
            selection = Selection(rows, kinds, numbers, keys, provenance, tracker.advance)
            store.check_free_space(target, 4 * sum(rows.dataset(*what).size for what in selection.whats))
            with clock.stage("write"), targets.placed(target, layout, overwrite) as place:
                layout.write(selection, place)
    skipped = int((rows.status != store.DONE).sum())
    summary.counts = {f"{unit}s": len(rows), "skipped": skipped, "shared": selection.shared}
    summary.notes = list(_notes(layout, selection, skipped, unit))
    summary.seconds = dict(clock.seconds)
    what = ", ".join(f"{kind}/{layer}" for kind, layer in selection.whats)
    out.print(f"{target}: {what} of {len(rows):,} {unit}s, {layout.what}")
    for note in summary.notes:
        out.print(note, style="yellow")
    return summary


class _GroupRows:
    """Rows of G groups, as an EmbeddingFile shows rows of proteins. A group without a member is skipped."""

    def __init__(self, file: store.EmbeddingFile, kind: str):
        assert file.groups is not None
        self._groups, self._kind = file.groups, kind.removeprefix(OF_GROUPS)
        members = self._groups.members
        done = (file.status == store.DONE) & (self._groups.of >= 0)
        self.lengths = np.bincount(self._groups.of[done], file.lengths[done], len(members)).astype(np.int64)
        self.status = np.where(members > 0, store.DONE, store.SKIPPED).astype(np.uint8)
        self.reason = np.where(members > 0, 0, store.EMPTY).astype(np.uint8)
        self.flags, self.replaced = np.zeros(len(members), np.uint16), np.zeros(len(members), np.int32)

    def __len__(self) -> int:
        return len(self.status)

    def names_of(self, start: int, stop: int) -> list[str]:
        return self._groups.ids[start:stop]

    def dataset(self, kind: str, layer: int) -> Any:
        return self._groups.rows(self._kind, layer)

    def chunks(self, kind: str) -> Iterator[slice]:
        return store.blocks(len(self), 4096)


def _notes(layout: Format, selection: Selection, skipped: int, unit: str) -> Iterator[str]:
    if skipped:
        why = "that embed had skipped" if unit != "group" else "without a member"
        kept = "there, with NaN in place of an embedding" if layout.holds_skipped else "left out"
        yield f"{counted(skipped, unit)} {why} {kept}"
    if selection.shared:
        shared = counted(selection.shared, unit)
        yield f"{shared} in the dataset of an earlier one of the same sequence, under its name"
    if isinstance(selection.keys, Keys) and selection.keys.changed:
        yield selection.keys.described


def _chosen(
    file: store.EmbeddingFile, layout: Format, kinds: tuple[str, ...], numbers: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Kinds and layers. Raises UserError if the file lacks one of them, or the layout has no room for it."""
    kind, _, number = (file.default or f"residue/{file.layers[-1]}").partition("/")
    kinds, numbers = tuple(dict.fromkeys(kinds or (kind,))), tuple(dict.fromkeys(numbers or (int(number),)))
    of_groups = [f"{OF_GROUPS}{kind}" for kind in GROUP_KINDS] if file.groups is not None else []
    known = {"kind": [*file.settings["pool"], *of_groups], "layer": file.settings["layers"]}
    wanted: dict[str, tuple[Any, ...]] = {"kind": kinds, "layer": numbers}
    for name, there in known.items():
        if lacking := [each for each in wanted[name] if each not in there]:
            remedy = f"It has {', '.join(map(str, there))}: --{name} {there[-1]}"
            raise UserError(f"The file has no {name} {lacking[0]}.", remedy)
    has_room = "mean" in layout.kinds and not layout.folder and not layout.key_of
    room = [*layout.kinds, *(of_groups if has_room else [])]
    if lacking := [kind for kind in kinds if kind not in room]:
        what = f"The layout {layout.name} has no place for {lacking[0]} rows."
        raise UserError(what, f"It has for {', '.join(layout.kinds)}.")
    if not layout.several and len(kinds) * len(numbers) > 1:
        what = f"The layout {layout.name} has room for one kind and one layer."
        raise UserError(what, "Name one: --kind mean --layer 33")
    return kinds, numbers


def _provenance(file: store.EmbeddingFile, kind: str, layer: int) -> dict[str, Any]:
    """Where the rows are from, as plain words and numbers."""
    settings = file.settings
    return {
        "tool": f"virnucpro {file.attributes['tool_version']}",
        "model": str(file.attributes["model"]),
        "weights_sha256": settings["weights_sha256"],
        "dtype": settings["dtype"],
        "store_dtype": settings["store_dtype"],
        "kind": kind,
        "layer": layer,
        "input_sha256": ",".join(settings["input_sha256"]),
        **{name: settings[name] for name in POLICIES if name in settings and name not in settings.get("unknown", ())},
    }


def _keys(file: store.EmbeddingFile, rows: Any, layout: Format, inputs: tuple[str, ...], spool: Path) -> Names:
    """Names, keys made of names, or keys of sequences, which are read from the FASTA: the layout says which."""
    if layout.key_of:
        return _of_sequences(file, layout.key_of, inputs, spool)
    if not layout.longest:
        return rows.names_of

    def names(start: int, stop: int) -> list[str]:
        return [encodable(name) for name in rows.names_of(start, stop)]

    return Keys(names if layout.folder else rows.names_of, len(rows), layout.longest)


def _of_sequences(
    file: store.EmbeddingFile, key_of: Callable[[bytes], str], inputs: tuple[str, ...], spool: Path
) -> Names:
    if not inputs or not all(Path(name).is_file() for name in inputs):
        why = f"is not at {', '.join(inputs)}" if inputs else "is not known"
        what = f"This layout knows proteins by their sequences, and the FASTA {why}."
        raise UserError(what, "Say where it is: --fasta FILE")
    settings = file.settings
    table = fasta.index(fasta.open_sources(inputs, spool), gaps=settings.get("gaps", "keep"), dedup=False)
    if settings["input_sha256"] != table.sha256:
        raise UserError(f"{', '.join(inputs)} is not what was embedded.", "Say where that is: --fasta FILE")
    if file.records is not None:
        table = table.part(file.records)
    return lambda start, stop: [key_of(sequence) for sequence in table.sequences(start, stop)]
