"""Where in a FASTA a mistake is, for a message: its line and column."""

import itertools
import re

from virnucpro_cli import alphabet
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import reading
from virnucpro_cli.fasta.reading import Source


def line_number(source: Source, offset: int) -> int:
    """1-based number of the line that holds the byte at `offset`."""
    line, at = 1, 0
    while at < offset:
        size = min(reading.READ_BYTES, offset - at)
        line += source.read(at, size).count(b"\n")
        at += size
    return line


_MASK_IN_TEXT = re.compile(rb"\s*".join(re.escape(bytes([c])) for c in b"<mask>"), re.IGNORECASE)


def invalid_residue(source: Source, offset: int) -> UserError:
    line = line_number(source, offset)
    source.file.seek(offset)
    header = source.file.readline()
    name = b"".join(header[1:].split(None, 1)[:1]).decode("utf-8", "backslashreplace")
    pending_star = None
    lines = itertools.takewhile(lambda text: not text.startswith(b">"), iter(source.file.readline, b""))
    record = _MASK_IN_TEXT.sub(lambda mask: re.sub(rb"\S", b"X", mask[0]), b"".join(lines))
    for text in record.split(b"\n"):
        line += 1
        for column, code in enumerate(text.translate(alphabet.CODES), start=1):
            if code == alphabet.SPACE:
                continue
            if pending_star is not None:  # a star that turned out not to be the last residue
                line, column, shown = pending_star
                return _not_a_residue(source, name, line, column, shown)
            if code == alphabet.STAR:
                pending_star = (line, column, "*")
            elif code >= alphabet.INVALID:
                return _not_a_residue(source, name, line, column, text[column - 1 :][:1].decode("latin-1"))
    raise AssertionError("an invalid residue was counted but not found; this is a bug")


def _not_a_residue(source: Source, name: str, line: int, column: int, shown: str) -> UserError:
    return UserError(
        f"{source.path}: record {name!r}, line {line}, column {column}: {shown!r} is not a residue.",
        "Correct the file, or use --invalid x (embed such residues as X) or --invalid skip.",
    )
