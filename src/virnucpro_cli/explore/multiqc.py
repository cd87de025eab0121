"""Files of a sample for MultiQC: numbers for its general statistics, and two bar charts. Needs the file alone.

Files of several samples in one folder make one report, with the samples side by side.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from virnucpro_cli import report, store
from virnucpro_cli.errors import UserError, printable

PARENT = {
    "parent_id": "virnucpro",
    "parent_name": "virnucpro",
    "parent_description": "embeds proteins and nucleotides with language models, packed, resumable and checked.",
}
MADE_OF = "made_of"
"""The key of what a file of ours is of, which MultiQC passes over."""
SECTIONS = ("stats", "records", "lengths")


def sample_of(path: str | Path) -> str:
    """The name of a file's sample: p for p.h5, p.hdf5 and p.h5.partial. What HTML would read as its own is `_`."""
    name = Path(path).name.removesuffix(".partial").removesuffix(".h5").removesuffix(".hdf5")
    return re.sub("[<>&\"']", "_", printable(name))


def places(folder: str, path: str | Path) -> dict[str, str]:
    """Paths of the files that `write` makes in the folder, by section."""
    return {section: f"{folder}/{sample_of(path)}_virnucpro_{section}_mqc.json" for section in SECTIONS}


def check(folder: str, file: store.EmbeddingFile, overwrite: bool) -> None:
    """Raise UserError if the folder has another file's sample of this name."""
    for path in places(folder, file.path).values():
        with suppress(OSError, ValueError, AttributeError):
            there = json.loads(Path(path).read_bytes()).get(MADE_OF)
            if there not in (None, _made_of(file)) and not overwrite:
                remedy = "Give the files names of their own, or --overwrite it."
                raise UserError(f"{path} is of another file of this name.", remedy)


def _made_of(file: store.EmbeddingFile) -> str:
    """The moment when a file was begun, and its input: the same while it is filled, and wherever it lies."""
    return f"{file.attributes['created']} {file.settings['input_sha256']}"


def write(folder: str, file: store.EmbeddingFile) -> None:
    """Write the files of a sample into the folder. Raises UserError if that fails."""
    contents = {"stats": _stats(file), "records": _records(file), "lengths": _lengths(file)}
    for section, path in places(folder, file.path).items():
        content = {"id": f"virnucpro_{section}", MADE_OF: _made_of(file), **contents[section]}
        content["data"] = {sample_of(file.path): content["data"]}
        with store.new_file(Path(path), overwrite=True) as out:
            out.write(json.dumps(content, indent=1).encode() + b"\n")


def _stats(file: store.EmbeddingFile) -> dict[str, Any]:
    run = file.report if file.complete else {}
    cut = (file.flags & store.TRUNCATED > 0) & (file.status == store.DONE)
    whole, share = {"format": "{:,.0f}", "min": 0}, {"format": "{:.1%}", "min": 0, "max": 1}
    words = "Records of which only the first residues, bases or tokens were embedded"
    rate, density = run.get("rates", {}).get("tokens/s"), run.get("packing", {}).get("density")
    model = Path(str(file.attributes["model"]).partition(" (")[0]).name
    columns: tuple[tuple[str, Any, str, Any, dict[str, Any]], ...] = (
        ("records", len(file), "Proteins, or sequences of nucleotides, of the input", "Blues", whole),
        ("skipped", int((file.status == store.SKIPPED).sum()), "Records without an embedding", "Reds", whole),
        ("cut", int(cut.sum()), words, "Oranges", whole),
        ("tokens/s", rate, "Tokens by the second of the model's forward", "Greens", whole),
        ("density", density, "Share of computed rows that are tokens of the input", "Purples", share),
        ("model", model, "Language model", False, {}),
    )
    return {
        "plot_type": "generalstats",
        "pconfig": [
            {name: {"title": name, "namespace": "virnucpro", "description": text, "scale": scale, **how}}
            for name, _, text, scale, how in columns
        ],
        "data": {name: value for name, value, *_ in columns if value is not None},
    }


def _records(file: store.EmbeddingFile) -> dict[str, Any]:
    """Every record in one bar: embedded whole, in windows or cut, skipped by reason, or pending."""
    done = file.status == store.DONE
    cut, windowed = (done & (file.flags & bit > 0) for bit in (store.TRUNCATED, store.WINDOWED))
    counts = {
        "embedded": done & ~cut & ~windowed,
        "in windows": windowed,
        "cut": cut,
        "pending": file.status == store.PENDING,
        **{f"skipped: {reason}": (file.status == store.SKIPPED) & (file.reason == code)
           for code, reason in enumerate(store.REASONS) if code},
    }  # fmt: skip
    text = "What became of each record: embedded whole, in overlapping windows or cut, or skipped, with the reason."
    return _bars("records", text, {name: int(chosen.sum()) for name, chosen in counts.items()})


def _lengths(file: store.EmbeddingFile) -> dict[str, Any]:
    text = "Records of the input by their number of residues or bases, before any cut."
    return _bars("lengths", text, report.by_length(file.lengths))


def _bars(what: str, description: str, counts: dict[str, int]) -> dict[str, Any]:
    return {
        **PARENT, "section_name": what.capitalize(), "description": description, "plot_type": "bargraph",
        "pconfig": {"id": f"virnucpro_{what}_plot", "title": f"virnucpro: {what}", "ylab": "records"},
        "categories": {name: {"name": name} for name in counts}, "data": counts,
    }  # fmt: skip
