"""VirNucPro's files: a folder of output_0_ESM.pt, output_1_ESM.pt ... of at most 10,000 proteins, names and means.

With VirNucPro's nucleotide half there are output_0_DNABERT_S.pt and output_0_merged.pt ... of the same records, too.
"""

import re
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from virnucpro_cli.exchange.layouts import pt
from virnucpro_cli.exchange.layouts.layout import Entry, Format, Selection
from virnucpro_cli.store import DONE

MOST, DNA = 10_000, "dna"


def write(selection: Selection, target: Path) -> None:
    target.mkdir()
    nucleotides = half_of(selection.file)
    entries = chain.from_iterable(block.each() for block in selection.blocks())
    for number in count():
        proteins = [(at, name, pt.tensor(values[selection.what])) for at, name, _, values in islice(entries, MOST)]
        if not proteins:
            return
        records, names, data = map(list, zip(*proteins, strict=True))
        pt.save({"proteins": names, "data": data}, target / f"output_{number}_ESM.pt")
        if nucleotides is not None:
            _write_nucleotides(nucleotides, records, names, data, target / f"output_{number}")


def half_of(file: Any) -> Any:
    """VirNucPro's nucleotide half, float16 or float32 [N, 768], with its status; None of a file that has none."""
    return file.half(DNA) if DNA in getattr(file, "settings", {}) else None


def _write_nucleotides(half: Any, records: list[int], names: list[str], proteins: list[Any], stem: Path) -> None:
    """The files of the nucleotide half, and of both; records without it are in neither."""
    import torch

    rows, there = half.array(half.names[-1]), [half.status[record] == DONE for record in records]
    names = [name for name, is_there in zip(names, there, strict=True) if is_there]
    bases = [pt.tensor(rows[record]) for record, is_there in zip(records, there, strict=True) if is_there]
    each = [{"label": name, "mean_representation": row.tolist()} for name, row in zip(names, bases, strict=True)]
    pt.save({"nucleotide": names, "data": each}, stem.with_name(f"{stem.name}_DNABERT_S.pt"))
    of_proteins = (row for row, is_there in zip(proteins, there, strict=True) if is_there)
    both = [torch.cat(pair) for pair in zip(bases, of_proteins, strict=True)]
    merged = torch.stack(both) if both else torch.empty(0)
    pt.save({"ids": names, "data": merged}, stem.with_name(f"{stem.name}_merged.pt"))


def _number(path: Path) -> tuple[int, str]:
    match = re.search(r"(\d+)_ESM\.pt$", path.name)
    return int(match[1]) if match else -1, path.name


def read(path: Path) -> Iterator[Entry]:
    files = [path] if path.is_file() else [*path.glob("*_ESM.pt")] or [*path.glob("*.pt")]
    for file in sorted(files, key=_number):
        content = pt.load(file)
        names, data = content["proteins"], content["data"]
        if len(names) != len(data):
            raise ValueError(f"{file.name} has {len(data)} rows for {len(names)} proteins")
        for name, row in zip(names, data, strict=True):
            yield Entry(str(name), {("mean", None): pt.array(row)})


def recognises(path: Path) -> bool:
    first = pt.first_of(path, "*_ESM.pt") or pt.first_of(path, "*.pt")
    return {"proteins", "data"} <= first.keys()


LAYOUT = Format(
    "virnucpro", "VirNucPro's .pt files of 10,000 proteins, in a folder", ".virnucpro", write, read, recognises,
    ("mean",), folder=True,
)  # fmt: skip
