"""The export workflow: a finished embeddings file written in the layout of another tool, whole or not at all."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from virnucpro_cli import fasta, report, store
from virnucpro_cli.errors import UserError, counted
from virnucpro_cli.exchange import layouts
from virnucpro_cli.exchange.layouts import target as targets
from virnucpro_cli.exchange.layouts.layout import Format, Keys, Selection, encodable
from virnucpro_cli.features.groups import KINDS as GROUP_KINDS
from virnucpro_cli.plan.policies import POLICIES

OF_GROUPS = "groups/"
"""Before a kind: rows of groups."""


def export_file(
    path: str, to: str | None, output: str | None = None, kinds: tuple[str, ...] = (), numbers: tuple[int, ...] = (),
    inputs: tuple[str, ...] = (), overwrite: bool = False,
) -> report.RunReport:  # fmt: skip
    """Export the file at `path`. kinds, numbers: which pooling kinds and layers, by default the file's default; inputs: its FASTA,
    by default where embed read it. Raises UserError for what the layout has no room for.
    """
    layout, out, clock = layouts.named(to) if to else layouts.of_suffix(output), report.console(), report.Clock()
    target = Path(output) if output else Path(path).with_name(Path(path).name.removesuffix(".h5") + layout.suffix)
    summary = report.RunReport("export")
    with store.opened(path) as file:
        settings = file.settings
        kinds, chosen = _chosen(file, settings, layout, kinds, numbers)
        if not file.complete or (file.status == store.PENDING).any():
            raise UserError(f"{path} is not complete.", "Let its run finish: the same command of embed goes on.")
        rows: Any = file
        if kinds[0].startswith(OF_GROUPS):
            rows = _GroupRows(file, kinds[0])
        named = inputs or tuple(entry["path"] for entry in file.inputs)
        targets.check(target, layout, [path, *named], overwrite)
        with report.Tracker(out, len(rows), "rows") as tracker:
            if layout.key_of:
                with clock.stage("read FASTA"):
                    keys = _of_sequences(file, settings, named, layout.key_of, target.absolute().parent)
            else:
                keys = Keys(_names(rows, layout), len(rows), layout.longest) if layout.longest else rows.names_of
            selection = Selection(
                rows, kinds, chosen, keys, _provenance(file, settings, kinds, chosen), tracker.advance
            )
            store.check_free_space(target, 4 * sum(rows.dataset(*what).size for what in selection.whats))
            with clock.stage("write"), targets.placed(target, layout, overwrite) as place:
                layout.write(selection, place)
    skipped = len(rows) - selection.count(skipped=False)
    unit = "proteins" if rows is file else "groups"
    summary.counts = {unit: len(rows), "skipped": skipped, "shared": selection.shared}
    summary.notes = list(_notes(layout, selection, skipped, unit))
    summary.seconds = dict(clock.seconds)
    what = ", ".join(f"{kind}/{layer}" for kind, layer in selection.whats)
    out.print(f"{target}: {what} of {len(rows):,} {unit}, {layout.what}")
    for note in summary.notes:
        out.print(note, style="yellow")
    return summary


class _GroupRows:
    """Rows of groups, as an EmbeddingFile shows rows of proteins. lengths: int64 [G], residues of the members; without a member: skipped."""

    def __init__(self, file: store.EmbeddingFile, kind: str):
        assert file.groups is not None
        self._groups, self._kind = file.groups, kind.removeprefix(OF_GROUPS)
        members = self._groups.members
        counted = (file.status == store.DONE) & (self._groups.of >= 0)
        self.lengths = np.bincount(self._groups.of[counted], file.lengths[counted], len(members)).astype(np.int64)
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


def _names(file: store.EmbeddingFile, layout: Format) -> Callable[[int, int], list[str]]:
    """Names of a range of records; those that become names of files only with letters that this locale has."""
    if not layout.folder:
        return file.names_of
    return lambda start, stop: list(map(encodable, file.names_of(start, stop)))


def _notes(layout: Format, selection: Selection, skipped: int, unit: str) -> Iterator[str]:
    if skipped:
        kept = "there, with NaN in place of an embedding" if layout.holds_skipped else "left out"
        yield f"{counted(skipped, unit.removesuffix('s'))} {'that embed had skipped' if unit == 'proteins' else 'without a member'} {kept}"
    if selection.shared:
        yield f"{counted(selection.shared, 'protein')} in the dataset of an earlier one of the same sequence, under its name"
    if isinstance(selection.keys, Keys) and selection.keys.changed:
        yield selection.keys.told


def _chosen(
    file: store.EmbeddingFile, settings: dict[str, Any], layout: Format, kinds: tuple[str, ...], numbers: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:  # fmt: skip
    """Kinds and layers, after a look at whether the file has them and the layout room for them."""
    default = (file.default or f"residue/{file.layers[-1]}").split("/")
    kinds, numbers = kinds or (default[0],), numbers or (int(default[1]),)
    of_groups = [f"{OF_GROUPS}{kind}" for kind in GROUP_KINDS] if file.groups is not None else []
    pools = [*settings["pool"], *of_groups]
    for name, wanted, there in (("kind", kinds, pools), ("layer", numbers, settings["layers"])):
        if lacking := [each for each in wanted if each not in there]:
            raise UserError(
                f"The file has no {name} {lacking[0]}.", f"It has {', '.join(map(str, there))}: --{name} {there[-1]}"
            )
    room = [*layout.kinds, *(of_groups if "mean" in layout.kinds and not layout.folder and not layout.key_of else [])]
    if lacking := [kind for kind in kinds if kind not in room]:
        raise UserError(
            f"The layout {layout.name} has no place for {lacking[0]} rows.", f"It has for {', '.join(layout.kinds)}."
        )
    if not layout.several and len(kinds) * len(numbers) > 1:
        raise UserError(
            f"The layout {layout.name} has room for one kind and one layer.", "Name one: --kind mean --layer 33"
        )
    return tuple(dict.fromkeys(kinds)), tuple(dict.fromkeys(numbers))


def _provenance(
    file: store.EmbeddingFile, settings: dict[str, Any], kinds: tuple[str, ...], numbers: tuple[int, ...]
) -> dict[str, Any]:
    """What goes along, as plain words and numbers."""
    return {
        "tool": f"virnucpro {file.attributes['tool_version']}",
        "model": str(file.attributes["model"]),
        "weights_sha256": settings["weights_sha256"],
        "dtype": settings["dtype"],
        "store_dtype": settings["store_dtype"],
        "kind": kinds[0],
        "layer": numbers[0],
        "input_sha256": ",".join(settings["input_sha256"]),
        **{name: settings[name] for name in POLICIES if name in settings and name not in settings.get("unknown", ())},
    }


def _of_sequences(
    file: store.EmbeddingFile, settings: dict[str, Any], inputs: tuple[str, ...], key_of: Callable[[bytes], str], spool: Path
) -> Callable[[int, int], list[str]]:  # fmt: skip
    """The keys of a layout that knows proteins by their sequences, from the FASTA that was embedded."""
    if not inputs or not all(Path(name).is_file() for name in inputs):
        where = f" is not at {', '.join(inputs)}" if inputs else " is not known"
        raise UserError(
            f"This layout knows proteins by their sequences, and the FASTA{where}.", "Say where it is: --fasta FILE"
        )
    table = fasta.index(fasta.open_sources(inputs, spool), gaps=settings.get("gaps", "keep"), dedup=False)
    if settings["input_sha256"] != table.sha256:
        raise UserError(f"{', '.join(inputs)} is not what was embedded.", "Say where that is: --fasta FILE")
    if file.records is not None:
        table = table.part(file.records)
    return lambda start, stop: [key_of(sequence) for sequence in table.sequences(start, stop)]
