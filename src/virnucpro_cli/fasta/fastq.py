"""FASTQ to FASTA: reads of four lines each, without their qualities."""

import re
import string
from collections.abc import Iterator
from itertools import zip_longest

from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta.compressed import plain

FIRST = b"@"
BLOCK_BYTES = 1 << 20
LETTERS = string.ascii_letters.encode() + b"-.*"
_SAM = re.compile(rb"@(HD|SQ|RG|PG|CO)\t")
FROM_SAM = "Make FASTA of it: samtools fasta -N FILE | virnucpro predict - -o DIR"
FOUR_LINES = "Each read has four lines: @NAME, bases, +, qualities. Write it anew so, or as FASTA (seqtk seq -A)."


def as_fasta(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The same reads as FASTA, in blocks. blocks: the text; name: of the file, for messages.

    Raises UserError, which names file, read and line, for what is no read of four lines.
    """
    lines, size, text = plain(blocks), 0, list[bytes]()
    for number, four in enumerate(zip_longest(*[iter(lines)] * 4, fillvalue=b"")):
        header, bases, plus, quality = (line.rstrip(b"\r\n") for line in four)
        if (
            header[:1] != FIRST or plus[:1] != b"+" or len(bases) != len(quality) or bases.translate(None, LETTERS)
        ):  # fmt: skip
            if not (header or bases or plus or quality):
                continue
            raise _refused(name, number, [header, bases, plus, quality])
        text += (b">", header[1:].replace(b"\r", b" "), b"\n", bases, b"\n")  # else the rest were bases
        size += len(header) + len(bases)
        if size >= BLOCK_BYTES:
            yield b"".join(text)
            size, text = 0, []
    yield b"".join(text)


def _refused(name: str, number: int, lines: list[bytes]) -> UserError:
    """The words for what is wrong with a read. number: from 0; lines: all four, without their ends."""
    header, bases, plus, quality = lines
    if _SAM.match(header):
        return UserError(f"{name} is SAM (it starts with {header[:3].decode()!r}).", FROM_SAM)
    odd = bases.translate(None, LETTERS)
    kinds = (
        (0, header[:1] != FIRST, "does not begin with @"),
        (1, bool(odd), f"holds {odd[:1].decode('latin-1')!r}, which stands for no base"),
        (2, plus[:1] != b"+", "does not begin with +"),
        (3, True, f"has {len(quality):,} qualities for {len(bases):,} bases"),
    )
    place, what = next((place, what) for place, is_so, what in kinds if is_so)
    return UserError(
        f"{name} is no FASTQ of four lines a read: read {number + 1:,}, line {4 * number + place + 1:,} {what}.",
        FOUR_LINES,
    )
