"""Options that several commands share, and how their texts are read."""

import re
from typing import Annotated

import typer

from virnucpro_cli.errors import UserError

ReportFile = Annotated[str | None, typer.Option("--report", metavar="FILE.json", help="Write the report as JSON.")]
QcFile = Annotated[
    str | None, typer.Option("--qc", metavar="FILE.tsv", help="Write a line for each protein: what became of it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output file.")]


def numbers(text: str | None, option: str = "--layers") -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}.", "Give numbers such as -1 or 0,6,-1.") from None


def budget(text: str | None) -> int | str | None:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,18}", text) else text
