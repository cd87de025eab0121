"""Text tables: all that people hand in are read in one way, and all for people are written in one way.

UTF-8 with or without a byte order mark, any line ends, plain or compressed, tab-separated, quoted as by the csv module.
"""

import csv
import io
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from virnucpro_cli import fasta
from virnucpro_cli.errors import UserError, counted, unread
from virnucpro_cli.fasta.compressed import decoder_errors


class Dialect(csv.excel_tab):
    """Strict: a quotation mark that is never closed is an error, and swallows no lines."""

    lineterminator = "\n"
    strict = True


@dataclass
class Lines:
    """The lines of a text file, checked. digest: SHA-256 of the lines read so far, as UTF-8 without a byte order mark.

    number: of the last line. Iteration raises UserError, which names file and line, for what cannot be read.
    """

    path: str
    number: int = 0
    digest: Any = field(default_factory=sha256)

    def __iter__(self) -> Iterator[str]:
        try:
            with open(self.path, "rb") as raw, fasta.decompressed(raw) as file:
                text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
                for self.number, line in enumerate(text, start=1):
                    self.digest.update(self._encoded(line))
                    yield line
        except decoder_errors() as error:
            words = (
                unread(str(self.path), error)
                if isinstance(error, OSError) and error.strerror
                else f"{self.path} cannot be read: {error}"
            )
            raise UserError(f"The table {words}.") from None

    def _encoded(self, line: str) -> bytes:
        try:
            data = line.encode()
        except UnicodeEncodeError:
            raise self.refused("is not UTF-8 text.", "Save the file as UTF-8.") from None
        if 0 in data:
            raise self.refused("holds a NUL byte.", "Save the file as UTF-8 text.")
        return data

    def refused(self, what: str, remedy: str) -> UserError:
        return UserError(f"{self.path} line {self.number:,} {what}", remedy)


def rows(lines: Lines, columns: int | None = None) -> Iterator[list[str]]:
    """The rows of a table. Each has `columns` cells, or as many as the first; blank lines are left out.

    Raises UserError, which names file and line.
    """
    table = csv.reader(lines, Dialect)
    while True:
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise lines.refused(
                f"is no line of a table: {error}.",
                'Quote a cell that begins with a quotation mark, and double its quotation marks: """a""" for "a".',
            ) from None
        if not row:
            continue
        columns = columns or len(row)
        if len(row) != columns:
            raise lines.refused(f"has {counted(len(row), 'column')}, not {columns}.", "Separate columns with a tab.")
        yield row


def by_name(lines: Lines, found: Iterator[tuple[str, str]], what: str) -> dict[str, str]:
    """Name -> value. Raises UserError if a name has two values. what: a word for the value."""
    values: dict[str, str] = {}
    for name, value in found:
        if values.setdefault(name, value) != value:
            raise lines.refused(
                f"gives {name!r} the {what} {value!r}, and an earlier line {values[name]!r}.",
                f"Give each name one {what}.",
            )
    return values


def is_of(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file is a table with these columns, as `writer` writes it."""
    header = ("\t".join(columns) + "\n").encode()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def writer(file: IO[str]) -> Any:
    """A writer of rows, which pandas and spreadsheets read back."""
    return csv.writer(file, Dialect)


@contextmanager
def written_to(file: IO[bytes]) -> Iterator[Any]:
    """A writer of rows into a binary file, which stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    try:
        yield writer(text)
    finally:
        text.detach()


def cell(name: str) -> str:
    """A name as it is, but for characters that would steer a terminal; tabs, line feeds and other spaces stay."""
    return name if name.isprintable() else "".join(c if _stays(c) else "?" for c in name)


def _stays(character: str) -> bool:
    return character.isprintable() or character in "\t\n" or unicodedata.category(character) == "Zs"
