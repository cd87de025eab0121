"""BGZF: threads decompress its blocks beside one another, to the bytes and the refusals of a plain gzip reader."""

import errno
import gzip
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pysam
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xopen import xopen

from virnucpro_cli import fasta
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import compressed
from virnucpro_cli.fasta.compressed import BGZF_END, decoder_errors

DICE = random.Random(0)
TEXT = b"".join(
    b">p%d\n%s\n" % (i, bytes(DICE.choices(b"ACDEFGHIKLMNPQRSTVWY", k=DICE.randrange(90)))) for i in range(60)
)


def member(stream: bytes, text: bytes, more: int = 0) -> bytes:
    """A BGZF block of a deflate stream. more: bytes by which its size is said to be larger."""
    size = 18 + len(stream) + 8
    head = bytes.fromhex("1f8b08040000000000ff060042430200") + (size - 1 + more).to_bytes(2, "little")
    return head + stream + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little")


def block(text: bytes, flush: int = zlib.Z_FINISH) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    return member(deflate.compress(text) + deflate.flush(flush), text)


def stored(text: bytes) -> bytes:
    """A block that holds its text as it is, and is 31 bytes longer."""
    size = len(text)
    return member(b"\x01" + size.to_bytes(2, "little") + (size ^ 0xFFFF).to_bytes(2, "little") + text, text)


def bgzf(text: bytes, *cuts: int, end: bytes = BGZF_END) -> bytes:
    return b"".join(block(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])) + end


SMALL = bgzf(TEXT[:150], 60, 60, 120)  # the second block of four is empty
CASES = {
    "many blocks": bgzf(TEXT, *range(10, len(TEXT), 10)),
    "without an end": bgzf(TEXT, 1000, 2000, end=b""),
    "the end alone": BGZF_END,
    "an empty block in the middle": SMALL,
    "two files": bgzf(TEXT, 99) + bgzf(TEXT, 1000),
    "blocks of 64 kB": bgzf(b"A" * (3 << 16), 1 << 16, 2 << 16),
    "blocks of 64 kB that hardly shrink": bgzf(
        bytes(DICE.choices(b"ACDEFGHIKLMNPQRSTVWY", k=3 << 16)), 1 << 16, 2 << 16
    ),
    "a block that does not shrink": stored(DICE.randbytes(65505)) + block(TEXT) + BGZF_END,
    "no samtools": b"".join(map(block, [TEXT, b"", b"", TEXT])),
}
"""Sound BGZF files."""
MIXED = {
    "a plain member behind": (bgzf(TEXT, 500), gzip.compress(TEXT)),
    "a plain member between": (bgzf(TEXT, 500), gzip.compress(TEXT), bgzf(TEXT, 700)),
    "zeros behind": (SMALL, bytes(700)),
    "zeros between": (SMALL, bytes(7), SMALL),
    "text behind": (SMALL, b">behind\nMKV\n"),
    "a byte behind": (SMALL, b"\0", b"x"),
    "a head behind": (SMALL, BGZF_END[:18]),
    "half a member behind": (SMALL, gzip.compress(TEXT)[:-3]),
    "a size of two blocks": (member(block(TEXT)[18:-8], TEXT, more=len(block(TEXT))), block(TEXT), BGZF_END),
    "a size too small": (member(block(TEXT)[18:-8], TEXT, more=-9), BGZF_END),
    "no size": (block(TEXT)[:16] + b"\0\0" + block(TEXT)[18:], BGZF_END),
    "a stream without an end": (block(TEXT, flush=zlib.Z_SYNC_FLUSH), block(TEXT)),
    "a block that is too large": (block(b"A" * 100_000), block(TEXT)),
    "another field": (block(TEXT).replace(b"\x06\0BC", b"\x0a\0XY\0\0BC", 1), block(TEXT)),
    "a name": (block(TEXT)[:3] + b"\x0c" + block(TEXT)[4:18] + b"name\0" + block(TEXT)[18:], block(TEXT)),
}
"""Files that begin as BGZF does, or nearly so."""


@pytest.fixture(params=[(1 << 18, 8), (97, 2), (7, 1)], ids=["as it is", "small pieces", "tiny pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "PIECE_BYTES", request.param[0])
    monkeypatch.setattr(compressed, "PIECE_BLOCKS", request.param[1])


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Four cores, or as many as a test says."""

    def set_cores(number: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(number)))

    set_cores(4)
    return set_cores


@pytest.fixture
def plainly_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each file that the plain reader got to read."""
    opened, read = list[str](), compressed._xopened
    monkeypatch.setattr(compressed, "_xopened", lambda file, kind: opened.append(kind) or read(file, kind))
    return opened


def outcome(file: Any) -> bytes | str:
    """All bytes of a file, or that it is refused."""
    try:
        return b"".join(iter(partial(file.read, 1000), b""))
    except decoder_errors():
        return "refused"


def now(content: bytes) -> bytes | str:
    return outcome(fasta.decompressed(io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]


def before(content: bytes) -> bytes | str:
    return outcome(xopen(io.BytesIO(content), "rb", threads=0, format="gz"))


@pytest.mark.parametrize("case", CASES)
def test_every_block_of_a_sound_file_is_read_by_threads(pieces: None, plainly_read: list[str], case: str) -> None:
    assert (now(CASES[case]), plainly_read) == (gzip.decompress(CASES[case]), [])


@pytest.mark.parametrize("size", [65535, 65536, 65537])
def test_half_of_the_largest_block_waits_for_the_other_half(
    monkeypatch: pytest.MonkeyPatch, plainly_read: list[str], size: int
) -> None:
    text = DICE.randbytes(65505)
    largest = stored(text)
    assert len(largest) == 65536
    monkeypatch.setattr(compressed, "PIECE_BYTES", size)
    assert (now(largest * 3), plainly_read) == (text * 3, [])


def test_much_that_is_no_bgzf_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "PIECE_BYTES", 1 << 16)
    content = SMALL + gzip.compress(DICE.randbytes(3 << 20)) + SMALL
    assert now(content) == gzip.decompress(content)


@pytest.mark.parametrize("case", MIXED)
def test_what_is_no_bgzf_is_read_or_refused_as_any_gzip_file(pieces: None, plainly_read: list[str], case: str) -> None:
    content = b"".join(MIXED[case])
    assert (now(content), plainly_read) == (before(content), ["gz"])


def test_cases_are_read_and_refused() -> None:
    refused = {case for case in MIXED if before(b"".join(MIXED[case])) == "refused"}
    assert refused == {
        "text behind", "a byte behind", "a head behind", "half a member behind", "a stream without an end",
    }  # fmt: skip
    assert before(b"".join(MIXED["a size of two blocks"])) == TEXT * 2


def test_a_file_cut_at_any_place_is_read_or_refused_as_before(pieces: None) -> None:
    for size in range(18, len(SMALL)):
        assert now(SMALL[:size]) == before(SMALL[:size]), size


@pytest.mark.parametrize("flip", [0xFF, 1])
def test_a_flipped_byte_at_any_place_is_read_or_refused_as_before(pieces: None, flip: int) -> None:
    refused = 0
    for at in range(3, len(SMALL)):
        content = SMALL[:at] + bytes([SMALL[at] ^ flip]) + SMALL[at + 1 :]
        assert now(content) == before(content), at
        refused += now(content) == "refused"
    assert refused > len(SMALL) / 3


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cutting_into_blocks_whole_or_damaged_is_read_as_before(
    monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    draw = data.draw
    monkeypatch.setattr(compressed, "PIECE_BYTES", draw(st.sampled_from((1, 19, 100, 1000, 1 << 20))))
    monkeypatch.setattr(compressed, "PIECE_BLOCKS", draw(st.integers(1, 5)))
    cuts = sorted(draw(st.lists(st.integers(0, len(TEXT)), max_size=12)))
    members = [
        draw(st.sampled_from((stored, block, gzip.compress) if cuts[:1] != [0] else (block,)))(part)
        for part in (TEXT[a:b] for a, b in pairwise([0, *cuts, len(TEXT)]))
    ]
    content = b"".join(members) + draw(st.sampled_from((b"", BGZF_END, bytes(5), b">a\nMK\n")))
    at, kind = draw(st.integers(0, len(content) - 1)), draw(st.sampled_from(("whole", "flip", "cut", "drop", "twice")))
    content = {
        "whole": content,
        "flip": content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :],
        "cut": content[:at],
        "drop": content[:at] + content[at + 1 :],
        "twice": content[:at] + content[at:][:40] + content[at:],
    }[kind]
    if content.startswith(b"\x1f\x8b"):  # what does not is no gzip file, whoever reads it
        assert now(content) == before(content)


def test_a_file_of_htslib_is_read_by_threads(tmp_path: Path, plainly_read: list[str]) -> None:
    text = DICE.randbytes(6 << 20).translate(b"ACDEFGHIKLMNPQRS" * 16)
    with pysam.BGZFile(str(tmp_path / "in.fasta.gz"), "wb") as file:  # type: ignore[attr-defined]
        file.write(text)
    content = (tmp_path / "in.fasta.gz").read_bytes()
    assert len(content) > 9 * compressed.PIECE_BYTES and content.endswith(BGZF_END)
    assert (now(content), plainly_read) == (text, [])


def test_blocks_keep_their_order_whichever_is_ready_first(monkeypatch: pytest.MonkeyPatch) -> None:
    inflated, threads = compressed._inflated, set[str]()

    def slowly(blocks: list[bytes], decoder: Any) -> list[bytes]:
        threads.add(threading.current_thread().name)
        time.sleep(DICE.random() / 50)
        return inflated(blocks, decoder)

    monkeypatch.setattr(compressed, "_inflated", slowly)
    monkeypatch.setattr(compressed, "PIECE_BLOCKS", 1)
    assert now(bgzf(TEXT, *range(100, len(TEXT), 100))) == TEXT
    assert len(threads) == 4


def test_few_pieces_are_read_ahead_of_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "PIECE_BYTES", 1000)
    content = io.BufferedReader(io.BytesIO(block(TEXT[:900]) * 1000), 100)  # type: ignore[arg-type]
    with fasta.decompressed(content) as file:
        assert file.read(10) == TEXT[:10] and content.tell() < 12_000 < len(block(TEXT[:900]) * 1000)


def test_blocks_that_grow_a_thousandfold_take_little_memory(plainly_read: list[str]) -> None:
    """A megabyte of such blocks is hundreds of megabytes of text: a piece holds few of them."""
    content = block(b"N" * 65280) * 2000
    pieces = list(compressed._bgzf_pieces(io.BytesIO(content)))
    assert max(map(len, pieces)) == 8 and b"".join(chain.from_iterable(pieces)) == content
    assert (now(content), plainly_read) == (b"N" * 65280 * 2000, [])


def test_bytes_that_are_no_block_are_not_gathered_in_memory() -> None:
    content = SMALL + DICE.randbytes(5 << 20)
    pieces = list(chain.from_iterable(compressed._bgzf_pieces(io.BytesIO(content))))
    assert max(map(len, pieces)) <= 5 << 16 and b"".join(pieces) == content


def test_one_core_reads_as_before_and_begins_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: Callable[[int], None], plainly_read: list[str]
) -> None:
    (tmp_path / "in.fasta.gz").write_bytes(bgzf(TEXT, 1000, 2000))
    cores(1)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail("a thread"))
    [source] = fasta.open_sources([str(tmp_path / "in.fasta.gz")], tmp_path)
    assert (source.read(0, source.size), plainly_read) == (TEXT, ["gz"])


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Gives a pipe as standard input, into which a thread writes bytes."""
    writers = list[threading.Thread]()

    def give(content: bytes) -> None:
        end, begin = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(end, "rb"))

        def write() -> None:
            with open(begin, "wb") as pipe:
                pipe.write(content)

        writers.append(threading.Thread(target=write))
        writers[-1].start()

    yield give
    sys.stdin.close()
    for writer in writers:
        writer.join()


@pytest.mark.parametrize("case", [*CASES, *MIXED])
def test_standard_input_is_read_as_a_file_is(
    tmp_path: Path, standard_input: Callable[[bytes], None], case: str
) -> None:
    content = CASES.get(case) or b"".join(MIXED[case])
    expected = before(content)
    standard_input(content)
    if isinstance(expected, bytes) and expected.startswith(b">"):
        [source] = fasta.open_sources(["-"], tmp_path)
        assert source.read(0, source.size) == expected
    else:
        with pytest.raises(UserError, match="is damaged" if expected == "refused" else "is empty|is not FASTA|binary"):
            fasta.open_sources(["-"], tmp_path)


# --- the spool -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("failing", [1, 2, 5])
def test_a_disk_that_is_full_at_any_block_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: Callable[[int], None], number: int, failing: int
) -> None:
    class Full(io.BytesIO):
        blocks = 0

        def write(self, block: Any) -> int:
            self.blocks += bool(block)
            if self.blocks == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    cores(number)
    monkeypatch.setattr(fasta.reading, "_new_spool", lambda folder: Full())
    monkeypatch.setattr(fasta.reading, "READ_BYTES", -(-len(TEXT) // 5))
    (tmp_path / "in.fasta.gz").write_bytes(bgzf(TEXT, 1000))
    with pytest.raises(UserError, match=r"in\.fasta\.gz cannot be spooled to .*: No space left on device"):
        fasta.open_sources([str(tmp_path / "in.fasta.gz")], tmp_path)


READING = """
from pathlib import Path
from virnucpro_cli import fasta, stopping
from virnucpro_cli.fasta import compressed
stopping.install()
compressed.PIECE_BYTES = fasta.reading.READ_BYTES = 1000
fasta.open_sources(["-"], Path("."))
"""


@pytest.mark.parametrize("compress", [bgzf, gzip.compress], ids=["bgzf", "gz"])
def test_a_stop_does_not_wait_for_a_pipe_that_gives_nothing(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    command = [sys.executable, "-c", READING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write(compress(TEXT) * 2500)
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not _spooled(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _spooled(process.pid)
        time.sleep(0.5)  # it awaits more by now
        process.send_signal(signal.SIGINT)
        process.wait(30)
        assert process.stderr is not None and b"Stopped" in process.stderr.read()


def _spooled(pid: int) -> bool:
    """Whether a process has written to a nameless file."""
    return any("(deleted)" in os.readlink(link) and os.stat(link).st_size for link in Path(f"/proc/{pid}/fd").iterdir())


def test_a_file_without_the_block_at_its_end_is_told(tmp_path: Path, tiny_model: Path) -> None:
    for data, is_told in (
        (bgzf(TEXT, 1000), False), (bgzf(TEXT, 1000, end=b""), True), (gzip.compress(TEXT), False), (TEXT, False),
        (BGZF_END, False), (b"", False), (b"\x1f\x8b", False),
    ):  # fmt: skip
        (tmp_path / "in.gz").write_bytes(data)
        assert fasta.lacks_end(str(tmp_path / "in.gz")) == is_told
    assert not fasta.lacks_end("-") and not fasta.lacks_end(str(tmp_path))
    (tmp_path / "in.gz").write_bytes(bgzf(TEXT, 1000, end=b""))
    report = embed_fasta(tmp_path / "in.gz", tmp_path / "out.h5", model=str(tiny_model), device="cpu", dry_run=True)
    assert [note for note in report.notes if "in.gz lacks the block that ends a BGZF file" in note]
