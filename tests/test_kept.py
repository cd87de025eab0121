"""The index as a file beside the output: the same table, never of another input, and gone when nobody needs it."""

import bz2
import gc
import gzip
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from children import Child, until
from test_faults import Case, disk, fill, one_thread  # noqa: F401  (fixtures)
from test_helpers import assert_same, content
from virnucpro_cli import alphabet, cli, fasta, report
from virnucpro_cli.cluster import merge
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed import recipe
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import How, RecordTable, indexing, kept
from virnucpro_cli.store import Store
from virnucpro_cli.store import disk as disk_of

HOW = How("x", "keep", alphabet.ESM)
LONG_AGO = 1_700_000_000


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "WORTH_BYTES", 0)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def here(tmp_path: Path, said: list[str]) -> Iterator[Callable[..., RecordTable]]:
    """The table of files, by the index beside out.h5."""
    with ExitStack() as open_files:

        def table(*paths: Path, how: How = HOW, **options: bool) -> RecordTable:
            inputs = open_files.enter_context(kept.Kept(tmp_path / "out.h5.index", said.append))
            return inputs.table(inputs.sources(list(map(str, paths)), tmp_path), how, keep_digests=True, **options)

        yield table


def in_memory(*paths: Path) -> RecordTable:
    return fasta.index(fasta.open_sources(list(map(str, paths)), paths[0].parent), keep_digests=True)


def written(path: Path, data: bytes) -> Path:
    """A file that nobody has touched for long: its times tell whether it changes."""
    path.write_bytes(data)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the times of files just made count as old."""
    monkeypatch.setattr(kept, "SETTLED_NS", -1)


def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the input is read again")

    monkeypatch.setattr(indexing, "index_span", refuse)
    monkeypatch.setattr(fasta.reading, "decompressed", refuse)
    monkeypatch.setattr(fasta.reading.Source, "sha256", refuse)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [
        written(tmp_path / "a.fasta", content(50)),
        written(tmp_path / "b.fasta.gz", gzip.compress(content(40, seed=1))),
        written(tmp_path / "c.fasta", content(30, "\r", seed=2)),
        written(tmp_path / "d.fasta.bz2", bz2.compress(content(20, "\r\n", seed=3))),
    ]


def test_the_table_of_a_kept_index_is_that_of_the_inputs(inputs: list[Path], here: Callable[..., RecordTable]) -> None:
    expected = in_memory(*inputs)
    for table in (here(*inputs), here(*inputs)):
        assert_same(table, expected)
        assert table.names(0, len(table)) == expected.names(0, len(table))
        records = np.arange(len(table))[::-3]
        np.testing.assert_array_equal(table.tokens(records), expected.tokens(records))
        part = table.part(records[::-1])
        assert part.token_ids(np.arange(5)) == expected.part(records[::-1]).token_ids(np.arange(5))
        assert list(table.sequences(3, 9)) == list(expected.sequences(3, 9))
        assert table.inputs == expected.inputs
        table.check_unchanged()


def test_what_was_read_of_a_kept_index_need_not_stay_in_memory(
    tmp_path: Path, inputs: list[Path], here: Callable[..., RecordTable]
) -> None:
    def resident() -> int:
        """KiB of the index that count as memory of this process."""
        parts = Path("/proc/self/smaps").read_text().partition(str(tmp_path / "out.h5.index"))[2].splitlines()
        return next(int(line.split()[1]) for line in parts if line.startswith("Rss:"))

    if not Path("/proc/self/smaps").exists():
        pytest.skip("this machine tells nothing of the pages of a process")
    table = here(*inputs)
    total = int(table.length.sum())
    assert resident() > 0
    table.let_go()
    assert resident() == 0
    assert int(table.length.sum()) == total
    table.part(np.arange(5)).let_go()
    assert_same(table, in_memory(*inputs))


def test_a_second_run_reads_nothing_of_its_inputs(
    inputs: list[Path], here: Callable[..., RecordTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    expected = here(*inputs)
    with monkeypatch.context() as patch:
        nothing_read(patch)
        assert_same(here(*inputs), expected)
        assert here(*inputs, dedup=False).unique_of.tolist() == list(range(len(expected)))


def test_the_index_is_closed_with_its_run_and_its_columns_stay(inputs: list[Path], tmp_path: Path) -> None:
    """Python tells of files that are left open where it is asked to."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with kept.Kept(tmp_path / "out.h5.index", lambda _: None) as run:
            table = run.table(run.sources([str(inputs[0])], tmp_path), HOW)
        del run
        lengths = table.length.copy()
        del table
        gc.collect()
    index = str(tmp_path / "out.h5.index")  # another test may have left something else open
    assert [each for each in told if issubclass(each.category, ResourceWarning) and index in str(each.message)] == []
    assert (lengths == in_memory(inputs[0]).length).all()


def test_the_index_is_a_safetensors_file(inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path) -> None:
    table, columns = here(*inputs), load_file(tmp_path / "out.h5.index")
    np.testing.assert_array_equal(columns["length"], table.length)
    np.testing.assert_array_equal(columns["digest"], table.digest)
    assert columns["text/1"].tobytes() == gzip.decompress(inputs[1].read_bytes())


def rewritten(path: Path) -> None:
    """The same size and the same time of change, as after a careless copy."""
    times = os.stat(path)
    path.write_bytes(path.read_bytes().replace(b"r1 ", b"rX "))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n>more\nMKV\n")


def another(path: Path) -> None:
    path.unlink()
    path.write_bytes(content(20, seed=9))


@pytest.mark.parametrize("change", [rewritten, longer, another])
@pytest.mark.parametrize("settled", [True, False])
def test_an_index_of_another_input_is_never_used(
    change: Callable[[Path], None], settled: bool, inputs: list[Path], here: Callable[..., RecordTable],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if settled:
        settle(monkeypatch)
    first = here(*inputs)
    change(inputs[0])
    second = here(*inputs)
    assert second.sha256 != first.sha256
    assert_same(second, in_memory(*inputs))


def test_an_index_of_other_inputs_or_another_order_is_never_used(
    inputs: list[Path], here: Callable[..., RecordTable]
) -> None:
    here(*inputs)
    for others in (inputs[:2], inputs[::-1], [inputs[1]]):
        assert_same(here(*others), in_memory(*others))


@pytest.mark.parametrize("order", [(3, 1), (1, 1), (3, 3), (1, 3, 1), (1, 0, 3)])
def test_compressed_inputs_in_another_order_or_twice_are_other_inputs(
    order: tuple[int, ...], inputs: list[Path], here: Callable[..., RecordTable]
) -> None:
    here(inputs[1], inputs[3])
    others = [inputs[number] for number in order]
    for _ in range(2):
        table, expected = here(*others), in_memory(*others)
        assert_same(table, expected)
        assert table.names(0, len(table)) == expected.names(0, len(table))


def test_a_changed_compressed_input_is_read_again(inputs: list[Path], here: Callable[..., RecordTable]) -> None:
    here(*inputs)
    inputs[1].write_bytes(gzip.compress(content(41, seed=5)))
    assert_same(here(*inputs), in_memory(*inputs))


def test_a_copy_of_an_input_on_another_host_has_the_same_index(
    inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = here(*inputs)
    (tmp_path / "scratch").mkdir()
    copies = [Path(shutil.copy(path, tmp_path / "scratch")) for path in inputs]
    monkeypatch.setattr(indexing, "index_span", None)
    assert here(*copies).sha256 == expected.sha256


@pytest.mark.parametrize("is_copy", [False, True], ids=["the same", "a copy"])
def test_the_index_of_equal_compressed_inputs_is_used(
    is_copy: bool, inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Path(shutil.copy(inputs[1], tmp_path / "copy.fasta.gz")) if is_copy else inputs[1]
    expected = here(inputs[1], second)
    monkeypatch.setattr(indexing, "index_span", None)
    assert_same(here(inputs[1], second), expected)


def test_a_damaged_index_is_told_once(
    inputs: list[Path], here: Callable[..., RecordTable], said: list[str], tmp_path: Path
) -> None:
    expected = here(*inputs)
    with open(tmp_path / "out.h5.index", "r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"damage")
    assert_same(here(*inputs), expected)
    assert len([each for each in said if "is damaged, and made again" in each]) == 1


def test_letters_read_otherwise_have_an_index_of_their_own(
    inputs: list[Path], here: Callable[..., RecordTable]
) -> None:
    here(*inputs)
    stripped = here(*inputs, how=How("x", "strip", alphabet.ESM))
    expected = fasta.index(fasta.open_sources(list(map(str, inputs)), inputs[0].parent), gaps="strip")
    np.testing.assert_array_equal(stripped.length, expected.length)


@pytest.mark.parametrize("how", [How("error", "strip", alphabet.ESM), How("error", "keep", alphabet.ESM)])
def test_a_letter_is_refused_in_the_words_of_the_first_reading(
    how: How, inputs: list[Path], here: Callable[..., RecordTable]
) -> None:
    written(inputs[2], inputs[2].read_bytes() + b"\n>wrong\nMK-V~\n>more\nMK")
    with pytest.raises(UserError) as first:
        here(*inputs, how=how)
    here(*inputs, how=How("x", how.gaps, how.reading))
    with pytest.raises(UserError) as again:
        here(*inputs, how=how)
    assert str(again.value) == str(first.value)


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_index_is_made_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder, said = tmp_path_factory.mktemp("damaged"), list[str]()
    path, index = written(folder / "a.fasta", content(20)), folder / "out.h5.index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "WORTH_BYTES", 0)
        for _ in range(2):
            with kept.Kept(index, said.append) as inputs:
                table = inputs.table(inputs.sources([str(path)], folder), HOW, keep_digests=True)
            assert_same(table, in_memory(path))
            whole = bytearray(index.read_bytes())
            first = len(kept._MARK) + 8
            head = 8 + int.from_bytes(whole[:8], "little")
            at = data.draw(st.one_of(st.integers(first, head - 1), st.integers(first, len(whole) - 1)))
            bit = data.draw(st.integers(0, 7))
            whole[at] ^= 1 << bit
            size = data.draw(st.sampled_from([len(whole), at]))
            index.write_bytes(whole[:size])


def test_a_file_of_somebody_else_is_left_alone(
    inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path, said: list[str]
) -> None:
    index = tmp_path / "out.h5.index"
    index.write_text("mine")
    assert_same(here(*inputs), in_memory(*inputs))
    kept.forget(index)
    assert index.read_text() == "mine" and "is no index of this program" in said[0]


def test_an_empty_file_is_what_the_power_left_and_a_pipe_is_somebody_elses(
    inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path, said: list[str]
) -> None:
    index = tmp_path / "out.h5.index"
    index.touch()
    here(inputs[0])
    assert kept.is_there(index) and index.stat().st_size
    index.unlink()
    os.mkfifo(index)
    assert_same(here(inputs[0]), in_memory(inputs[0]))
    assert index.is_fifo() and "Move it away" in said[-1]


def test_a_disk_without_room_for_the_index_is_named_and_the_run_goes_on(
    inputs: list[Path],
    tmp_path: Path,
    said: list[str],
    disk: Callable[[str], Path],  # noqa: F811
) -> None:
    folder = disk("64k")
    fill(folder).rename(folder / "full")
    with kept.Kept(folder / "out.h5.index", said.append) as without:
        table = without.table(without.sources([str(inputs[0])], tmp_path), HOW, keep_digests=True)
    assert_same(table, in_memory(inputs[0]))
    assert [path.name for path in folder.iterdir()] == ["full"] and "No space" in said[0]


def make(index: Path, path: Path, told: Path) -> None:
    """Make or map the index of a file in another process, and put down what it says, at once."""
    indexing.WORTH_BYTES = 0
    with kept.Kept(index, lambda text: told.write_text(text) and None) as inputs:
        inputs.table(inputs.sources([str(path)], index.parent), HOW)


def test_runs_that_begin_together_read_a_compressed_input_once(inputs: list[Path], tmp_path: Path) -> None:
    index, told = tmp_path / "out.h5.index", [tmp_path / f"told-{number}" for number in range(2)]
    with kept.Kept(index, lambda _: None) as first:
        sources = first.sources([str(inputs[1])], tmp_path)  # decompressed, under the lock
        others = [Child(make, index, inputs[1], each) for each in told]
        for each, other in zip(told, others, strict=True):
            until(each.exists, other)
        first.table(sources, HOW)
    assert [other.wait() for other in others] == [0, 0]
    assert all("waiting for it" in each.read_text() for each in told)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.h5.index"]


def make_half(index: Path, path: Path, told: Path) -> None:
    def half(source: IO[bytes], target: IO[bytes], size: int) -> None:
        target.write(source.read(100))
        target.flush()
        told.write_text("written")
        time.sleep(600)

    kept.shutil.copyfileobj = half  # type: ignore[attr-defined]
    make(index, path, told)


def test_what_a_kill_leaves_of_an_index_is_made_good(
    inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path
) -> None:
    told = tmp_path / "told"
    child = Child(make_half, tmp_path / "out.h5.index", inputs[0], told)
    until(told.exists, child)
    child.kill()
    child.wait()
    assert not (tmp_path / "out.h5.index").exists()
    assert_same(here(inputs[0]), in_memory(inputs[0]))
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.h5.index"]


def wait_with_the_lock(index: Path, path: Path, told: Path) -> None:
    with disk_of.alone(disk_of.lock_of(index), print, "waiting"):
        told.write_text("locked")
        time.sleep(600)


def test_the_lock_of_a_killed_run_goes_with_the_index(
    inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path
) -> None:
    index, told = tmp_path / "out.h5.index", tmp_path / "told"
    here(inputs[0])
    child = Child(wait_with_the_lock, index, inputs[0], told)
    until(told.exists, child)
    kept.forget(index)
    assert disk_of.lock_of(index).exists(), "another run holds it"
    child.kill()
    child.wait()
    kept.forget(index)
    assert not list(tmp_path.glob("out*"))


def test_pipes_and_small_inputs_have_no_index(
    inputs: list[Path], here: Callable[..., RecordTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(inputs[0], "rb") as file, kept.Kept(tmp_path / "out.h5.index", print) as piped:
        monkeypatch.setattr("sys.stdin", file)
        table = piped.table(piped.sources(["-"], tmp_path), HOW, keep_digests=True)
    assert_same(table, in_memory(inputs[0]))
    monkeypatch.setattr(indexing, "WORTH_BYTES", 1 << 20)
    assert_same(here(*inputs), in_memory(*inputs))
    assert not list(tmp_path.glob("out*"))


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("small"), 60)


def test_one_shard_reads_the_input_for_all_and_the_merge_removes_the_index(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    output = tmp_path / "out.h5"
    small.embed(output, shard="2/3")
    with monkeypatch.context() as patch:
        nothing_read(patch)
        for number in (1, 3):
            small.embed(output, shard=f"{number}/3")
    assert fasta.index_of(output).exists()
    merge.merge_shards(str(output))
    small.check_rows(output)
    assert not fasta.index_of(output).exists()


def test_a_run_that_resumes_maps_the_index_and_removes_it_at_its_end(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    output, mark = tmp_path / "out.h5", Store.mark
    with monkeypatch.context() as patch:
        patch.setattr(Store, "mark", lambda self, *rows, **of: mark(self, *rows, **of) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small.embed(output)
    assert fasta.index_of(output).exists()
    with monkeypatch.context() as patch:
        nothing_read(patch)
        small.embed(output)
    small.check(output)


def test_a_run_that_is_refused_leaves_nothing(small: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        small.embed(tmp_path / "out.h5", long="error")
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_refused_keeps_the_index_of_another_command(small: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    small.embed(output, shard="1/2")
    with pytest.raises(UserError):
        small.embed(output, long="error")
    assert fasta.index_of(output).exists()
    with pytest.raises(UserError, match="would overwrite"):
        small.embed(output, report=str(fasta.index_of(output)), overwrite=True)
    small.embed(output)
    assert not fasta.index_of(output).exists()


@pytest.mark.parametrize("what", ["foreign", "nucleotides"])
def test_the_index_command_that_makes_none_is_refused(what: str, tmp_path: Path, said: list[str]) -> None:
    path, output = tmp_path / "in.fasta", tmp_path / "out.h5"
    path.write_text(">a\n" + ("MKVLAGW" if what == "foreign" else "ACGT") * 20 + "\n")
    if what == "foreign":
        fasta.index_of(output).write_text("mine")
    with pytest.raises(UserError, match="was not made" if what == "foreign" else "looks like nucleotides"):
        recipe.index_input(EmbedConfig(inputs=(str(path),), output=str(output), model="8M"), report.console(quiet=True))
    assert fasta.index_of(output).exists() == (what == "foreign")


def test_the_index_command_makes_what_shards_map(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settle(monkeypatch)
    output = tmp_path / "out.h5"
    with pytest.raises(SystemExit) as end:
        cli.main(["index", str(small.fasta), "-o", str(output), "--model", "8M"])
    assert not end.value.code and "62 proteins" in capfd.readouterr().err
    nothing_read(monkeypatch)
    small.embed(output, shard="1/2")
