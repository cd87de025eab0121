"""The reader on broken files: the records that a plain reader finds, or one clear error. Never a traceback, never a wrong row."""

import random
import re
from pathlib import Path

import pytest

from test_fasta import COMPRESS, WILD, facts, plainly, read
from virnucpro_cli import fasta
from virnucpro_cli.errors import UserError

SEEDS = [content for content in WILD.values() if len(content) < 1000]
PIECES = (
    b">",
    b"-",
    b".",
    b"\n;",
    b"\n",
    b"\r",
    b"*",
    b"<mask>",
    b"<",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b" ",
    b"\n>",
    b"M",
    b"\x1f\x8b",
)

BLANKS_BEFORE_THE_MARK = re.compile(rb"(\xef\xbb\xbf)?\s*[^\S\n]>")

DAMAGE = (0, 1, 3, 4)
"""Edits that make no other valid compressed file, as a member twice would be."""


def mutated(dice: random.Random, content: bytes, edits: tuple[int, ...] = tuple(range(7))) -> bytes:
    """A few random edits: bits, bytes, pieces put in, stretches taken out, doubled, moved or replaced by another file's."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 5))):
        a, b = sorted((dice.randint(0, len(data)), dice.randint(0, len(data))))
        match dice.choice(edits):
            case 0 if a < len(data):
                data[a] ^= 1 << dice.randrange(8)
            case 1 if a < len(data):
                data[a] = dice.randrange(256)
            case 2:
                data[a:a] = dice.choice(PIECES) * dice.choice((1, 1, 3))
            case 3:
                del data[a : min(b, a + 20)]
            case 4:
                del data[a:]
            case 5:
                data[a:a] = data[a:b]
            case 6:
                data[a:b] = dice.choice(SEEDS)[: dice.randint(0, 60)]
    return bytes(data)


def outcome(path: Path) -> str:
    """Whether the file was refused, after a look at what the refusal says; raises whatever else is raised."""
    try:
        read(path)
    except UserError as error:
        assert path.name in error.what, error.what
        return "refused"
    return "read"


@pytest.mark.parametrize("cases", [500, pytest.param(100_000, marks=pytest.mark.soak)])
def test_a_mutated_file_gives_the_plain_readers_records_or_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: int
) -> None:
    dice, path, refused = random.Random(cases), tmp_path / "in.fasta", 0
    for _ in range(cases):
        content = mutated(dice, dice.choice(SEEDS))
        path.write_bytes(content)
        monkeypatch.setattr(fasta.reading, "READ_BYTES", dice.choice((7, 8, 11, 16, 37, 64, 1 << 20)))
        if outcome(path) == "refused":
            refused += 1
        elif not BLANKS_BEFORE_THE_MARK.match(content):  # which the plain reader takes for a line of text
            assert facts(read(path)) == plainly(content), content
    assert cases / 50 < refused < cases / 2


@pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", COMPRESS)
def test_a_mutated_compressed_file_is_refused_or_read_as_it_was(tmp_path: Path, kind: str, cases: int) -> None:
    dice, path = random.Random(cases), tmp_path / f"in.fasta.{kind}"
    refused = 0
    for _ in range(cases):
        content = dice.choice(SEEDS)
        damaged = mutated(dice, COMPRESS[kind](content), DAMAGE)
        path.write_bytes(damaged)
        if outcome(path) == "refused":
            refused += 1
        elif kind != "zst" and damaged.startswith(
            tuple(fasta.reading.MAGIC)
        ):  # a zst's checksum is optional, and left out by most
            assert facts(read(path)) == plainly(content)
    assert refused > cases / 2
