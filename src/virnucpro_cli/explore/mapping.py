"""The map workflow: the rows of an embeddings file on a plane, as a picture, a page or a table."""

import dataclasses
from pathlib import Path

import numpy as np

from virnucpro_cli import __version__, report, store, tables
from virnucpro_cli.errors import UserError, counted, needs
from virnucpro_cli.explore import FEWEST, MapConfig, default_rows
from virnucpro_cli.explore.maps import colour, drawing, projection
from virnucpro_cli.kinds import POOLED


def write_map(settings: MapConfig) -> drawing.Map:
    """Draw the map of a file, and return what was drawn. Raises UserError for what the user can put right."""
    out, path, target = report.console(), settings.file, Path(settings.output)
    _check(settings, target)
    with store.opened(path) as file:
        data = default_rows.of(file, settings.kind, settings.layer)
        n, lacking = len(data), data.lacking()
        if n < FEWEST:
            left_out = f" ({lacking})" if lacking else ""
            raise UserError(
                f"{path} holds {counted(n, 'embedded protein')}{left_out}.", f"A map needs {FEWEST} or more."
            )
        caption = [f"not shown: {lacking}"] if lacking else []
        if n > settings.sample:
            caption.append(f"a random sample of {settings.sample:,} of {n:,} proteins (seed {settings.seed})")
            chosen = np.random.default_rng(settings.seed).choice(n, settings.sample, replace=False)
            data = dataclasses.replace(data, rows=np.sort(data.rows[chosen]))
            n = len(data)
        word, _ = file.words
        method, why = projection.chosen(settings.method, n)
        for line in [*caption, *([why] if why else [])]:
            out.print(line, style="yellow")
        by = colour.of(settings.color, file, data.rows)
        if unknown := by.words().count(colour.NO_VALUE):
            caption.append(f"{by.title}: known of {n - unknown:,} of {n:,}")
        out.print(f"{method} of {counted(n, word)}", style="dim")
        plane = projection.project(data, method, settings.seed)
        made_of = f"model {file.attributes['model']}, layer {data.layer}, {POOLED[data.kind]}"
        shown = drawing.Map(
            plane, by, data.rows, [tables.cell(name) for name in file.names_at(data.rows)], file.lengths[data.rows],
            f"{plane.what.split(' ')[0]} of {counted(n, word)} of {Path(path).name}",
            [plane.what, f"{made_of}; drawn by virnucpro {__version__}", *caption], settings.seed,
        )  # fmt: skip
        with store.new_file(target, settings.overwrite) as opened:
            drawing.save(shown, opened, target)
    out.print(f"{target}: {counted(n, word)}, {report.size(target.stat().st_size)}")
    return shown


def _check(settings: MapConfig, target: Path) -> None:
    """Everything that can be known before a row is read."""
    kind = target.suffix.lower()
    if kind != ".tsv":
        needs("plotly" if kind == ".html" else "matplotlib", "maps", f"A map in {kind}")
    report.check_places({"output": str(target)}, [settings.file, settings.color.rpartition(":")[0] or settings.file])
    store.check_new(target, settings.overwrite)
