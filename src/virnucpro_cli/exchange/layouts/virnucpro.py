"""VirNucPro's files: a folder of output_0_ESM.pt, output_1_ESM.pt ... of at most 10,000 proteins, names and means."""

import re
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path

from virnucpro_cli.exchange.layouts import pt
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection

MOST = 10_000


def write(selection: Selection, target: Path) -> None:
    target.mkdir()
    entries = chain.from_iterable(block.each() for block in selection.blocks())
    for number in count():
        proteins = [(name, pt.tensor(values[selection.what])) for _, name, _, values in islice(entries, MOST)]
        if not proteins:
            return
        names, data = map(list, zip(*proteins, strict=True))
        pt.save({"proteins": names, "data": data}, target / f"output_{number}_ESM.pt")


def _number(path: Path) -> tuple[int, str]:
    match = re.search(r"(\d+)_ESM\.pt$", path.name)
    return int(match[1]) if match else -1, path.name


def read(path: Path) -> Iterator[Entry]:
    for file in [path] if path.is_file() else sorted(path.glob("*.pt"), key=_number):
        content = pt.load(file)
        names, data = content["proteins"], content["data"]
        if len(names) != len(data):
            raise ValueError(f"{file.name} has {len(data)} rows for {len(names)} proteins")
        for name, row in zip(names, data, strict=True):
            yield Entry(str(name), {("mean", None): pt.array(row)})


def recognises(path: Path) -> bool:
    return {"proteins", "data"} <= pt.first_of(path, "*.pt").keys()


LAYOUT = Format(
    "virnucpro", "VirNucPro's .pt files of 10,000 proteins, in a folder", ".virnucpro", write, read, recognises,
    ("mean",), folder=True,
)  # fmt: skip
