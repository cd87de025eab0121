"""The files of fair-esm's extract.py: a folder with a .pt for each protein, any kinds and layers in it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from virnucpro_cli.exchange.layouts import pt
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection, encodable, possible

GROUPS = {"residue": "representations", "mean": "mean_representations", "bos": "bos_representations"}
LONGEST_PART, MOST_PARTS = 252, 4
"""Bytes of a part of a path, without its .pt; a path is no longer than so many of these."""


def path_of(label: str, longest: int) -> str:
    """Path below a folder, without its .pt, where extract.py has the file of a label: nested where it has a `/`.

    A label that would leave the folder is changed as little as that needs; one that is too long becomes a single name.
    """
    parts = [encodable(part.replace("\0", "_")) for part in f"{label}.pt".split("/") if part not in ("", ".")]
    path = "/".join("__" if part == ".." else part for part in parts).removesuffix(".pt")
    whole = os.fsencode(path)
    fits = len(whole) <= MOST_PARTS * longest and all(len(part) <= longest for part in whole.split(b"/"))
    return path if fits else possible(path, longest)


def contents(selection: Selection) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(record number, key, content of its file) of every protein that has an embedding."""
    for block in selection.blocks():
        for number, name, key, values in block.each():
            content: dict[str, Any] = {"label": name}
            for (kind, layer), rows in values.items():
                content.setdefault(GROUPS[kind], {})[layer] = pt.tensor(rows)
            yield number, key, content


def write(selection: Selection, target: Path) -> None:
    target.mkdir()
    for _, key, content in contents(selection):
        pt.save(content, target / f"{key}.pt")


def read(path: Path) -> Iterator[Entry]:
    for file in [path] if path.is_file() else sorted(path.rglob("*.pt")):  # names with a / are in folders of their own
        content = pt.load(file)
        groups = {kind: content.get(group, {}) for kind, group in GROUPS.items()}
        values = {(kind, layer): pt.array(rows) for kind, layers in groups.items() for layer, rows in layers.items()}
        if not values:
            raise ValueError(f"{file.name} holds none of {', '.join(GROUPS.values())}")
        yield Entry(str(content.get("label", file.stem)), values, file.stem)


def recognises(path: Path) -> bool:
    return "label" in pt.first_of(path, "**/*.pt")


LAYOUT = Format(
    "fair-esm", "fair-esm's extract.py, a .pt file per protein in a folder", ".fair-esm", write, read, recognises,
    tuple(GROUPS), folder=True, several=True, longest=200,
)  # fmt: skip
