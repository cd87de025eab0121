"""Helper processes, and large FASTA files that several of them read a span each."""

import gzip
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from children import Child, until
from virnucpro_cli import alphabet, fasta, processes, stopping
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import RecordTable, indexing
from virnucpro_cli.store import disk

COLUMNS = ("offset", "length", "replaced", "gaps", "unique_of", "digest", "nucleotide_like")
HOW = indexing.How("x", "keep", alphabet.ESM)
WHERE_I_AM = "__import__('os').getpid()"


def record(number: int, newline: str, dice: np.random.Generator) -> str:
    text = "".join(dice.choice(list("ACDEFGHIKLMNPQRSTVWYX-*"), dice.integers(0, 90)))
    lines = newline.join(text[at : at + 30] for at in range(0, len(text), 30))
    return f">r{number} a > b{newline}{lines}{newline * int(dice.integers(1, 3))}"


def content(records: int, newline: str = "\n", seed: int = 0) -> bytes:
    dice = np.random.default_rng(seed)
    return "".join(record(number, newline, dice) for number in range(records)).encode() + b">last copy\nMKV\n>copy\nMKV"


def table_of(*paths: Path, **options: object) -> RecordTable:
    return fasta.index(fasta.open_sources(list(map(str, paths)), paths[0].parent), keep_digests=True, **options)  # type: ignore[arg-type]


def assert_same(found: RecordTable, expected: RecordTable) -> None:
    assert found.sha256 == expected.sha256 and found.nucleotide_share == expected.nucleotide_share
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(found, column), getattr(expected, column), column)


@given(
    st.sampled_from(["", "\ufeff", "\n\r\n"]), st.integers(0, 12), st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(0, 99), st.integers(4, 400), st.sampled_from([2, 7, 64, 1 << 20]),
)  # fmt: skip
def test_spans_of_any_size_have_together_the_records_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, before: str, records: int, newline: str, seed: int, span: int, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "spans.fasta"
    path.write_bytes(before.encode() + content(records, newline, seed))
    (source,) = fasta.open_sources([str(path)], path.parent)
    with pytest.MonkeyPatch.context() as patch:
        whole, kinds = indexing.index_span(source, HOW, 0, source.size)
        patch.setattr(fasta.reading, "READ_BYTES", size)
        begins = range(0, source.size, span)
        spans = [indexing.index_span(source, HOW, begin, min(begin + span, source.size)) for begin in begins]
    for column, *parts in zip(whole, *(part for part, _ in spans), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), column)
    np.testing.assert_array_equal(np.sum([each for _, each in spans], axis=0), kinds)


@pytest.fixture
def in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SPAN_BYTES", 1000)


def test_helpers_find_what_one_process_finds_in_files_and_spools(in_spans: None, tmp_path: Path) -> None:
    plain, packed, old = tmp_path / "a.fasta", tmp_path / "b.fasta.gz", tmp_path / "c.fasta"
    plain.write_bytes(content(100))
    packed.write_bytes(gzip.compress(content(90, seed=1)))
    old.write_bytes(content(80, "\r", seed=2))
    assert_same(table_of(plain, packed, old, helpers=3), table_of(plain, packed, old, helpers=1))


@pytest.mark.parametrize(
    ("damage", "options"),
    [(b"MK\0V", {}), (b"MK>V", {}), (b"; a comment\n", {}), (b"MK~V", {"on_invalid": "error"})],
    ids=["NUL", "mark", "comment", "letter"],
)
def test_a_helper_refuses_in_the_words_of_one_process(
    in_spans: None, tmp_path: Path, damage: bytes, options: dict[str, str]
) -> None:
    path = tmp_path / "a.fasta"
    path.write_bytes(
        content(60) + b"\n>wrong\n" + damage + b"\n>more\nMK\n" + content(60).replace(b"-", b"").replace(b"*", b"")
    )
    with pytest.raises(UserError) as alone:
        table_of(path, helpers=1, **options)
    with pytest.raises(UserError) as helped:
        table_of(path, helpers=2, **options)
    assert str(helped.value) == str(alone.value)


@pytest.mark.parametrize("helpers", [1, 2])
def test_a_refusal_does_not_wait_until_a_large_file_is_hashed(
    helpers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "a.fasta", list[int]()
    path.write_bytes(b">a\nMK>V\n" + b">b\nMKV\n" * 20_000)
    os.truncate(path, 1 << 38)  # a hole, which takes no room
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read.append(size) or pread(fd, size, at))  # type: ignore[func-returns-value]
    with pytest.raises(UserError):
        table_of(path, helpers=helpers)
    assert sum(read) < 1 << 36


def test_results_come_in_the_order_of_the_calls_from_other_processes() -> None:
    tasks = [(f"({WHERE_I_AM}, {number})",) for number in range(20)]
    found = list(processes.in_order(eval, tasks, 3))
    assert [number for _, number in found] == list(range(20))
    assert 1 <= len({process for process, _ in found}) <= 3 and os.getpid() not in {process for process, _ in found}


def test_a_call_whose_helper_is_killed_is_made_here() -> None:
    mine = os.getpid()
    deadly = f"__import__('os').kill({WHERE_I_AM}, 9) if {WHERE_I_AM} != {mine} else 'here'"
    assert list(processes.in_order(eval, [("1",), (deadly,), ("2",), (deadly,)], 2)) == [1, "here", 2, "here"]


def test_where_no_process_can_be_started_all_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert list(processes.in_order(eval, [(WHERE_I_AM,)] * 3, 2)) == [os.getpid()] * 3


def test_what_a_call_raises_is_raised_in_its_turn_and_ends_the_helpers() -> None:
    found: Iterator[int] = processes.in_order(eval, [(WHERE_I_AM,), ("1 / 0",), ("__import__('time').sleep(600)",)], 2)
    helper = next(found)
    with pytest.raises(ZeroDivisionError):
        next(found)
    gone(lambda: os.kill(helper, 0))


def test_helpers_end_with_the_caller_who_wants_no_more() -> None:
    found = processes.in_order(eval, [(WHERE_I_AM,), ("__import__('time').sleep(600)",)], 2)
    helper = next(found)
    found.close()  # type: ignore[attr-defined]
    gone(lambda: os.kill(helper, 0))


def call_without_end(told: Path) -> None:
    found = processes.in_order(eval, [(WHERE_I_AM,), ("__import__('time').sleep(600)",)], 1)
    told.with_suffix(".new").write_text(str(next(found)))
    told.with_suffix(".new").rename(told)
    next(found)


def test_a_helper_does_not_outlive_a_killed_caller(tmp_path: Path) -> None:
    told = tmp_path / "helper"
    caller = Child(call_without_end, told)
    until(told.exists, caller)
    caller.kill()
    gone(lambda: os.kill(int(told.read_text()), 0))


def gone(ask: Callable[[], None], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            ask()
            time.sleep(0.01)
        raise AssertionError("it lives")


@pytest.fixture
def one_processor() -> Iterator[None]:
    """This process may use one of the processors of this machine."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no such sets")
@pytest.mark.usefixtures("one_processor")
def test_a_process_that_may_use_one_processor_has_one_thread() -> None:
    names = set()
    with stopping.threads(16) as pool:
        for _ in range(20):
            pool.submit(lambda: names.add(threading.current_thread().name)).result()
    assert (stopping.cores(), len(names)) == (1, 1)
    digests = disk.PassingDigests()
    assert digests._pool._max_workers == 1
    digests.close()
