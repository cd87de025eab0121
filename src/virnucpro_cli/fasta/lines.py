"""Where in a FASTA a mistake is, for a message: its line and column."""

import re

from virnucpro_cli import alphabet
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import reading
from virnucpro_cli.fasta.reading import Source

_MASK_IN_TEXT = re.compile(rb"\s*".join(re.escape(bytes([c])) for c in b"<mask>"), re.IGNORECASE)


def line_number(source: Source, offset: int) -> int:
    """1-based number of the line that holds the byte at `offset`; lines end with LF, CRLF or CR."""
    line, at, last = 1, 0, b""
    while at < offset:
        text = source.read_raw(at, min(reading.READ_BYTES, offset - at))
        line += text.count(b"\n") + text.count(b"\r") - (last + text).count(b"\r\n")
        at, last = at + len(text), text[-1:]
    if last == b"\r" and offset < source.size and source.read_raw(offset, 1) == b"\n":
        line -= 1
    return line


def record_text(source: Source, offset: int) -> bytes:
    """The text of the record whose `>` is at `offset`, as it stands in the file."""
    size = reading.READ_BYTES
    while True:
        size = min(size, source.size - offset)
        text = source.read_raw(offset, size)
        end = re.search(rb"[\r\n]>", text)
        if end or offset + size == source.size:
            return text[: end.start() + 1] if end else text
        size *= 2


def name_of(text: bytes) -> str:
    """The name of a record by its text."""
    header = text[1:].splitlines()[:1]
    return b"".join(b"".join(header).split(None, 1)[:1]).decode("utf-8", "backslashreplace")


def invalid_residue(source: Source, offset: int, codes: bytes = alphabet.CODES, kept: bool = False) -> UserError:
    """The first letter of the record at `offset` that is no residue by `codes` (see `alphabet.CODES`). kept: gaps are refused although
    --gaps keeps them.
    """
    line, text = line_number(source, offset), record_text(source, offset)
    name, pending = name_of(text), None
    masked = _MASK_IN_TEXT.sub(lambda mask: re.sub(rb"\S", b"X", mask[0]), text)
    for number, row in enumerate(masked.splitlines()[1:], start=line + 1):
        for column, code in enumerate(row.translate(codes), start=1):
            if code == alphabet.SPACE:
                continue
            if pending is not None:  # a star that turned out not to be the last residue
                return _not_a_residue(source, name, *pending, kept)
            if code == alphabet.STAR:
                pending = (number, column, "*")
            elif code >= alphabet.INVALID:
                return _not_a_residue(source, name, number, column, row[column - 1 :][:1].decode("latin-1"), kept)
    raise AssertionError("an invalid residue was counted but not found; this is a bug")


def _not_a_residue(source: Source, name: str, line: int, column: int, shown: str, kept: bool) -> UserError:
    if shown in "-.":
        remedy = "Use --gaps strip (leave gaps out) or x (embed them as X)"
        remedy += (
            "; --invalid error refuses those that are kept." if kept else ", or keep (embed them as fair-esm does)."
        )
    else:
        remedy = "Correct the file, or use --invalid x (embed such residues as X) or --invalid skip."
    return UserError(
        f"{source.path}: record {name!r}, line {line}, column {column}: {shown!r} is not a residue.", remedy
    )
