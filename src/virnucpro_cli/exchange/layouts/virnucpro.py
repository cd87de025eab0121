"""VirNucPro's own files: a folder of output_0_ESM.pt, output_1_ESM.pt ... of at most 10,000 proteins, names and means."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from virnucpro_cli.exchange.layouts import pt
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection, no_provenance

MOST = 10_000


def write(selection: Selection, target: Path) -> None:
    target.mkdir()
    names: list[str] = []
    data: list[Any] = []
    number = 0

    def save() -> None:
        nonlocal number
        pt.save({"proteins": names, "data": data}, target / f"output_{number}_ESM.pt")
        number += 1
        names.clear()
        data.clear()

    for block in selection.blocks():
        for _, name, _, values in block.each():
            names.append(name)
            data.append(pt.tensor(values[selection.what]))
            if len(names) == MOST:
                save()
    if names:
        save()


def _number(path: Path) -> tuple[int, str]:
    found = re.search(r"(\d+)_ESM\.pt$", path.name)
    return int(found[1]) if found else -1, path.name


def read(path: Path) -> Iterator[Entry]:
    for file in [path] if path.is_file() else sorted(path.glob("*.pt"), key=_number):
        found = pt.load(file)
        if len(found["proteins"]) != len(found["data"]):
            raise ValueError(f"{file.name} has {len(found['data'])} rows for {len(found['proteins'])} proteins")
        for name, row in zip(found["proteins"], found["data"], strict=True):
            yield Entry(str(name), {("mean", None): pt.array(row)})


def recognises(path: Path) -> bool:
    return {"proteins", "data"} <= pt.first_of(path, "*.pt").keys()


LAYOUT = Format(
    "virnucpro", "VirNucPro's .pt files of 10,000 proteins, in a folder", ".virnucpro", ("mean",),
    write, read, no_provenance, recognises, folder=True,
)  # fmt: skip
