"""The map workflow: the rows of an embeddings file on a plane, as a picture, a page or a table. It needs the file alone."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console

from virnucpro_cli import __version__, report, store, tables
from virnucpro_cli.config import PICTURES
from virnucpro_cli.errors import UserError, counted, needs
from virnucpro_cli.explore import default_rows
from virnucpro_cli.explore.maps import colour, drawing, projection
from virnucpro_cli.kinds import POOLED

KINDS = (".html", ".tsv", *PICTURES)


def write_map(
    path: str, output: str, method: str | None = None, color: str = "length", sample: int = 100_000, seed: int = 0,
    overwrite: bool = False, kind: str | None = None, layer: int | None = None, out: Console | None = None,
) -> drawing.Map:  # fmt: skip
    """Draw the map of the file at `path` to `output`, and return what was drawn. kind, layer: by default those of /embeddings. Raises UserError for what the user can put right."""
    out = out or report.console()
    target = Path(output)
    _check(path, target, color, sample, seed, overwrite)
    with store.opened(path) as file:
        data = default_rows.of(file, path, kind, layer)
        lacking = default_rows.lacking(data)
        if len(data) < projection.FEWEST:
            left_out = f" ({lacking})" if lacking else ""
            raise UserError(
                f"{path} holds {counted(len(data), 'embedded protein')}{left_out}.",
                f"A map needs {projection.FEWEST} or more.",
            )
        caption = []
        if lacking:
            caption.append(f"not shown: {lacking}")
        if len(data) > sample:
            caption.append(f"a random sample of {sample:,} of {len(data):,} proteins (seed {seed})")
            chosen = np.random.default_rng(seed).choice(len(data), sample, replace=False)
            data = dataclasses.replace(data, rows=np.sort(data.rows[chosen]))
        method, word = projection.chosen(method, len(data))
        for line in [*caption, *([word] if word else [])]:
            out.print(line, style="yellow")
        by = colour.of(color, file, data.rows)
        if colour.NO_VALUE in by.words():
            caption.append(f"{by.title}: known of {len(data) - by.words().count(colour.NO_VALUE):,} of {len(data):,}")
        out.print(f"{method} of {counted(len(data), 'protein')}", style="dim")
        found = projection.project(data, method, seed)
        names = [tables.cell(name) for name in file.names_at(data.rows)]
        made_by = f"model {file.attributes['model']}, layer {data.layer}, {POOLED[data.kind]}; drawn by virnucpro {__version__}"
        title = f"{found.what.split(' ')[0]} of {counted(len(data), 'protein')} of {Path(path).name}"
        shown = drawing.Map(
            found, by, data.rows, names, file.lengths[data.rows], title, [found.what, made_by, *caption],
            seed,
        )  # fmt: skip
        with store.new_file(target, overwrite) as opened:
            drawing.save(shown, opened, target)
    out.print(f"{target}: {counted(len(data), 'protein')}, {report.size(target.stat().st_size)}")
    return shown


def _check(path: str, target: Path, color: str, sample: int, seed: int, overwrite: bool) -> None:
    """Everything that can be known before a row is read."""
    kind = target.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"The output is {target}.", f"Its name must end in one of {', '.join(KINDS)}.")
    if sample < projection.FEWEST:
        raise UserError(f"--sample is {sample}.", f"Give {projection.FEWEST} or more.")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"--seed is {seed}.", f"Give 0 to {(1 << 32) - 1}.")
    if kind != ".tsv":
        needs("plotly" if kind == ".html" else "matplotlib", "maps", f"A map in {kind}")
    report.check_places({"output": str(target)}, [path, color.rpartition(":")[0] or path])
    store.check_new(target, overwrite)
