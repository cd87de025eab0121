"""Shards: any number of jobs that never talk, in any order, and one file in the end that is the single run's to the bit."""

import json
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forked
from test_faults import CHILDREN, Case, datasets, one_thread  # noqa: F401  (in force here too)
from virnucpro_cli import cli, store
from virnucpro_cli.cluster import merge, status
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import index, open_sources
from virnucpro_cli.plan import shards
from virnucpro_cli.plan.policies import decide
from virnucpro_cli.plan.shards import Shard
from virnucpro_cli.validation import verify


def slurm(index: int, first: int, last: int, count: int, step: int = 1) -> dict[str, str]:
    """The variables that Slurm 22.05 set in a task of an array."""
    values = {"ID": index, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def grid_engine(index: int, first: int, last: int, step: int = 1) -> dict[str, str]:
    values = {"ID": index, "FIRST": first, "LAST": last, "STEPSIZE": step}
    return {f"SGE_TASK_{name}": str(value) for name, value in values.items()}


def lsf(index: int, last: int, step: int = 1) -> dict[str, str]:
    return {"LSB_JOBINDEX": str(index), "LSB_JOBINDEX_END": str(last), "LSB_JOBINDEX_STEP": str(step)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("small"), 60)


@pytest.fixture(scope="module")
def made(small: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three shards of out.h5, run in another order and by other means each."""
    folder = tmp_path_factory.mktemp("made")
    small.embed(folder / "out.h5", shard="2/3", token_budget=4096)
    forked.embed(output=folder / "out.h5", **small.options(shard="3/3"))
    small.embed(folder / "out.h5", shard="1/3")
    return folder


@pytest.fixture
def three(made: Path, tmp_path: Path) -> Path:
    """The same, to do things to; the output that they are shards of."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "out.h5"


# --- which shard -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("3/40", {}, Shard(3, 40)), ("3/40", slurm(7, 1, 40, 40), Shard(3, 40)),
        # the whole array, submitted for the first time
        ("auto", slurm(7, 1, 40, 40), Shard(7, 40)), ("auto", slurm(7, 0, 39, 40), Shard(8, 40)),
        ("auto", slurm(9, 1, 37, 10, step=4), Shard(3, 10)), ("auto", slurm(1, 1, 1, 1), Shard(1, 1)),
        ("auto", grid_engine(7, 1, 40), Shard(7, 40)), ("auto", grid_engine(5, 1, 9, step=2), Shard(3, 5)),
        ("auto/40", slurm(7, 1, 40, 40), Shard(7, 40)), ("auto0/40", slurm(7, 0, 39, 40), Shard(8, 40)),
        ("auto/40", grid_engine(7, 1, 40), Shard(7, 40)), ("auto/8", lsf(5, 8), Shard(5, 8)),
        ("auto/8", {"PBS_ARRAY_INDEX": "5"}, Shard(5, 8)), ("auto0/8", {"PBS_ARRAY_INDEX": "0"}, Shard(1, 8)),
        ("auto/8", {"PBS_ARRAYID": "5"}, Shard(5, 8)), ("auto0/8", {"PBS_ARRAYID": "7"}, Shard(8, 8)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "0"}, Shard(1, 8)), ("auto0/8", {"JOB_COMPLETION_INDEX": "0"}, Shard(1, 8)),
        ("auto/8", {"AWS_BATCH_JOB_ARRAY_INDEX": "7", "SGE_TASK_ID": "undefined"}, Shard(8, 8)),
        # one, a few, a range or every other of its tasks, submitted again
        ("auto/4", slurm(3, 3, 3, 1), Shard(3, 4)), ("auto/4", slurm(1, 1, 1, 1), Shard(1, 4)),
        ("auto/4", slurm(2, 2, 4, 2), Shard(2, 4)), ("auto/4", slurm(4, 2, 4, 2), Shard(4, 4)),
        ("auto/40", slurm(12, 11, 20, 10), Shard(12, 40)), ("auto/40", slurm(5, 1, 39, 20, step=2), Shard(5, 40)),
        ("auto0/4", slurm(3, 3, 3, 1), Shard(4, 4)), ("auto0/4", slurm(2, 1, 2, 2), Shard(3, 4)),
        ("auto/40", grid_engine(7, 7, 7), Shard(7, 40)), ("auto/40", grid_engine(7, 5, 9, step=2), Shard(7, 40)),
        ("auto/40", lsf(7, 7), Shard(7, 40)), ("auto/40", lsf(7, 9, step=2), Shard(7, 40)),
    ],
)  # fmt: skip
def test_a_shard_is_named_or_told_by_the_batch_system(text: str, environment: dict[str, str], expected: Shard) -> None:
    assert shards.parse(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("0/4", {}, "0/4"), ("5/4", {}, "5/4"), ("3", {}, "3/40"), ("a/b", {}, "auto"), ("1/10000", {}, "9,999"),
        ("auto0", slurm(7, 0, 39, 40), "auto0/40"), ("auto1/40", {}, "auto0/40"), ("9" * 5000 + "/3", {}, "3/40"),
        ("auto", {}, "SLURM_ARRAY_TASK_ID"), ("auto", {"SGE_TASK_ID": "undefined"}, "not a task"),
        ("auto/4", {"LSB_JOBINDEX": "0"}, "not a task"),
        # whether it is the whole array cannot be known
        ("auto", slurm(3, 3, 3, 1), "begins at 3, as when some tasks are submitted again"),
        ("auto", slurm(3, 3, 3, 1), "--shard auto/40"), ("auto", slurm(11, 11, 20, 10), "begins at 11"),
        ("auto", slurm(2, 2, 4, 2), "begins at 2"), ("auto", slurm(1, 1, 4, 2), "gaps"),
        ("auto", slurm(1, 1, 4, 3), "gaps"), ("auto", slurm(0, 0, 4, 4), "gaps"),
        ("auto", grid_engine(7, 7, 7), "begins at 7"), ("auto", grid_engine(4, 2, 10, step=2), "begins at 2"),
        ("auto", lsf(3, 4), "--shard auto/40"), ("auto", lsf(7, 7), "LSF does not say how many"),
        ("auto", {"PBS_ARRAY_INDEX": "5"}, "auto/40"), ("auto", {"PBS_ARRAYID": "5"}, "auto/40"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "auto/40"), ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "0"}, "auto/40"),
        # an index that is none of the shards
        ("auto/4", slurm(0, 0, 3, 4), "auto0/4"), ("auto/4", slurm(2, 0, 3, 4), "auto0/4"),
        ("auto/4", {"PBS_ARRAY_INDEX": "0"}, "auto0/4"), ("auto/4", {"PBS_ARRAY_INDEX": "5"}, "5/4"),
        ("auto/4", slurm(5, 5, 5, 1), r"5/4 (SLURM_ARRAY_TASK_ID is 5)"), ("auto0/4", slurm(4, 1, 4, 4), "5/4"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, "5/4"),
        # variables that are none of a batch system
        ("auto", {"SLURM_ARRAY_TASK_ID": "2"}, "3/40"), ("auto", slurm(2, 1, 4, 4) | {"SLURM_ARRAY_TASK_COUNT": "four"}, "'four'"),
        ("auto/4", {"SLURM_ARRAY_TASK_ID": "two"}, "'two'"), ("auto/4", {"PBS_ARRAY_INDEX": "-1"}, "'-1'"),
        ("auto/4", {"PBS_ARRAY_INDEX": "9" * 5000}, "'999"), ("auto", slurm(3, 1, 4, 4, step=0), "1-4:0"),
        ("auto", slurm(7, 1, 4, 4), "task 7 of an array 1-4:1"), ("auto", slurm(2, 1, 5, 3, step=2), "1-5:2"),
    ],
)  # fmt: skip
def test_what_is_no_shard_is_refused_with_the_remedy(text: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        shards.parse(text, environment)
    assert words in str(refused.value) and len(str(refused.value)) < 500


def test_some_tasks_submitted_again_with_a_bare_auto_are_refused_beside_the_other_shards(
    small: Case, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(three.parent.iterdir())
    for name, value in slurm(1, 1, 1, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"auto is --shard 1/1 here, and beside .* shards of 3\.\n.*say --shard auto/3;"
    ):
        small.embed(three, shard="auto")
    assert sorted(three.parent.iterdir()) == before
    small.embed(three, shard="auto/3")
    small.embed(three, shard="auto/1")
    assert shards.path(three, Shard(1, 1)).exists()


def test_shards_lie_beside_the_output_under_names_that_are_known_again(tmp_path: Path) -> None:
    for output in (tmp_path / "out.h5", tmp_path / "no_suffix", tmp_path / "two.dots.h5"):
        first, second = (shards.path(output, Shard(n, 12)) for n in (1, 12))
        assert first.parent == tmp_path and "-0001-of-0012" in first.name
        first.touch()
        store.partial_path(first).touch()
        store.partial_path(second).touch()
        assert shards.files_of(output) == {12: {1: first, 12: store.partial_path(second)}}


# --- which records ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5)), min_size=1, max_size=80), st.integers(1, 90),
    st.sampled_from(["truncate", "window", "skip"]),
)  # fmt: skip
def test_shards_are_a_fair_partition_that_keeps_equal_records_together(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[int, int]], count: int, long: str
) -> None:
    folder = tmp_path_factory.mktemp("fasta")
    path = folder / "in.fasta"
    texts = [("ACDEFG"[kind] + "MKVLAGW" * 60)[:length] for length, kind in records]
    path.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate([*texts, "MKV"])))
    config = EmbedConfig(inputs=(str(path),), long=long, max_residues=100, overlap=30)
    table = index(open_sources([str(path)], folder))
    work = decide(table, config)
    parts = [shards.records_of(Shard(number, count), table, config) for number in range(1, count + 1)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(table)))
    home = np.empty(len(table), np.int64)
    for number, part in enumerate(parts):
        assert (np.diff(part) > 0).all()
        home[part] = number
    assert (home == home[work.representative]).all()
    cost = np.bincount(work.segments.record, work.segments.length + 2.0, len(table))
    loads = [cost[part].sum() for part in parts]
    assert max(loads) - min(loads) <= cost.max()
    for part in parts:
        own = table.part(part)
        its = decide(own, config)
        assert np.array_equal(part[its.representative], work.representative[part]) and np.array_equal(
            its.flags, work.flags[part]
        )
        assert own.names(0, len(own)) == [f"p{i}" for i in part.tolist()]
        ids = own.token_ids(np.arange(len(own)))
        assert (
            ids == table.token_ids(part) and (own.tokens(np.arange(len(own))).tobytes() == b"".join(ids))
            if ids
            else True
        )
        assert own.text_bytes <= table.text_bytes


# --- from shards to one file ------------------------------------------------------------------------------------------


def test_shards_run_anyhow_and_merged_are_the_single_runs_file(small: Case, three: Path) -> None:
    merged = merge.merge_shards(str(three))
    assert merged.counts == {"shards": 3, "proteins": 62, "skipped": 1}
    small.check(three)
    with store.read_embeddings(three) as file:
        assert file.records is None and json.loads(file.attributes["merged_from"])[2] == "out.shard-0003-of-0003.h5"
        assert "shard" not in json.loads(file.attributes["fingerprint"])
    assert verify.verify_file(str(three)).passed
    assert merge.merge_shards(str(three)).already_complete
    assert small.embed(three)["proteins"] == 62, "and the plain command finds it complete"


@pytest.mark.slow
def test_more_shards_than_records_leave_some_empty(small: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    for number in range(1, 81):
        small.embed(output, shard=f"{number}/80")
    with store.read_embeddings(shards.path(output, Shard(80, 80))) as file:
        assert len(file) == 0 and file.complete
    assert verify.verify_file(str(shards.path(output, Shard(80, 80)))).passed
    merge.merge_shards(str(output))
    small.check(output)


def test_a_shard_is_resumed_and_a_complete_one_is_left_alone(small: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    path = shards.path(output, Shard(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "finish", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            small.embed(output, shard="1/2")
    assert store.partial_path(path).exists()
    assert small.embed(output, shard="1/2")["resumed proteins"] > 0
    before = path.stat().st_mtime_ns
    small.embed(output, shard="1/2")
    assert path.stat().st_mtime_ns == before
    assert verify.verify_file(str(path)).passed


def test_a_merge_that_finds_all_done_writes_the_report_that_is_asked_for(three: Path, tmp_path: Path) -> None:
    merge.merge_shards(str(three))
    assert merge.merge_shards(str(three), report_path=str(tmp_path / "report.json")).already_complete
    assert json.loads((tmp_path / "report.json").read_text())["already_complete"]


def test_a_shard_is_checked_against_its_part_of_the_fasta(three: Path) -> None:
    path = shards.path(three, Shard(2, 3))
    with h5py.File(path, "r+") as file:
        file["lengths"][3] += 1
    failed = {check.what for check in verify.verify_file(str(path)).checks if check.passed is False}
    assert failed == {"checksum of all bytes", "lengths", "lengths, by a second reader"}


def test_status_says_what_is_complete_partial_and_missing(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.show_shards(str(three))
    assert "3 of 3 shards complete; virnucpro merge" in capsys.readouterr().out
    shards.path(three, Shard(1, 3)).unlink()
    path = shards.path(three, Shard(2, 3))
    path.rename(store.partial_path(path))
    with h5py.File(store.partial_path(path), "r+") as file:
        file["run/complete"][()] = 0
        file["status"][:5] = store.PENDING
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", str(three)])
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "missing" in out and "partial, 7" in out and "1 of 3 shards complete" in out
    damaged = shards.path(three, Shard(3, 3))
    damaged.write_bytes(damaged.read_bytes()[:9000])
    assert not status.show_shards(str(three)) and "damaged, remove it" in capsys.readouterr().out
    with pytest.raises(UserError, match="neither"):
        status.show_shards(str(three.with_name("other.h5")))


def other_settings(small: Case, three: Path) -> None:
    shards.path(three, Shard(2, 3)).unlink()
    small.embed(three, shard="2/3", layers=(1,))


def missing(small: Case, three: Path) -> None:
    shards.path(three, Shard(2, 3)).unlink()


def unfinished(small: Case, three: Path) -> None:
    path = shards.path(three, Shard(2, 3))
    path.rename(store.partial_path(path))


def renamed(small: Case, three: Path) -> None:
    shards.path(three, Shard(1, 3)).replace(shards.path(three, Shard(2, 3)))
    small.embed(three, shard="1/3")


def another_input(small: Case, three: Path) -> None:
    path = three.with_name("other.fasta")
    path.write_text(small.fasta.read_text() + ">more\nMKV\n")
    shards.path(three, Shard(2, 3)).unlink()
    small.embed(three, shard="2/3", inputs=str(path))


def damaged(small: Case, three: Path) -> None:
    path = shards.path(three, Shard(2, 3))
    data = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        data[file["mean/2"].id.get_offset() + 8] ^= 1
    path.write_bytes(data)


def in_two_sets(small: Case, three: Path) -> None:
    small.embed(three, shard="1/2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, "1 of 3 shards .* missing or not finished: 2"), (unfinished, "missing or not finished: 2"),
        (other_settings, "layers"), (renamed, "holds shard 1/3"), (another_input, "content of the input"),
        (damaged, "damaged"), (in_two_sets, "of 2 and 3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_does_not_belong_together_is_not_merged(
    small: Case, three: Path, change: Callable[[Case, Path], None], words: str
) -> None:
    change(small, three)
    with pytest.raises(UserError, match=words):
        merge.merge_shards(str(three))
    assert not three.exists() and not store.partial_path(three).exists()


def test_of_several_sets_one_is_named(small: Case, three: Path) -> None:
    in_two_sets(small, three)
    merge.merge_shards(str(three), count=3)
    small.check(three)


def test_a_merge_reads_each_row_of_a_shard_once_and_none_of_the_merged_file(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: dict[int, list[tuple[int, int]]] = {}
    monkeypatch.setattr(merge, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(store.disk, "CHECKSUM_BLOCK", 1 << 10)
    for call in ("pread", "preadv"):
        real = getattr(os, call)

        def noted(fd: int, what: Any, offset: int, real: Any = real) -> Any:
            size = what if isinstance(what, int) else sum(memoryview(each).nbytes for each in what)
            reads.setdefault(os.fstat(fd).st_ino, []).append((offset, offset + size))
            return real(fd, what, offset)

        monkeypatch.setattr(os, call, noted)
    merge.merge_shards(str(three))
    seen = {number: list(each) for number, each in reads.items()}
    assert verify.verify_file(str(three)).passed
    for path in (shards.path(three, Shard(number, 3)) for number in (1, 2, 3)):
        with h5py.File(path) as file:
            for kind in ("mean/2", "bos/2", "residue/2"):
                begin, end = file[kind].id.get_offset(), file[kind].id.get_offset() + file[kind].nbytes
                inside = sorted((a, b) for a, b in seen[path.stat().st_ino] if b > begin and a < end)
                assert [a for a, _ in inside] == [begin, *(b for _, b in inside[:-1])] and inside[-1][1] == end
    with h5py.File(three) as file:
        size = file["residue/2"].nbytes
        begin, end = file["residue/2"].id.get_offset(), file["residue/2"].id.get_offset() + size
    again = sum(max(0, min(b, end) - max(a, begin)) for a, b in seen[three.stat().st_ino])
    assert again < size // 20, "blocks at its ends, and none between them"


@pytest.mark.parametrize("name", ["mean/2", "bos/2", "residue/2", "status", "flags", "lengths", "records", "run/sums"])
def test_a_damaged_shard_leaves_no_merged_file_and_put_right_it_merges(small: Case, three: Path, name: str) -> None:
    path = shards.path(three, Shard(2, 3))
    whole = path.read_bytes()
    with h5py.File(path) as file:
        at = file[name].id.get_offset() + file[name].nbytes - 1
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match=r"shard-0002-of-0003.h5 is (cut short or )?damaged"):
        merge.merge_shards(str(three))
    assert not three.exists() and not store.partial_path(three).exists()
    path.write_bytes(whole)
    merge.merge_shards(str(three))
    small.check(three)


def merged_in_child(output: str, survived: int) -> None:
    real, calls = os.pwrite, 0

    def counted(*arguments: Any) -> int:
        nonlocal calls
        calls += store.partial_path(Path(output)).exists()
        if calls > survived:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    os.pwrite = counted
    merge.BLOCK_BYTES = 1 << 12
    merge.merge_shards(output)


def test_a_merge_that_is_killed_goes_on(small: Case, three: Path) -> None:
    dice, killed = random.Random(0), 0
    for _ in range(6):
        process = CHILDREN.Process(target=merged_in_child, args=(str(three), dice.randint(0, 40)))
        process.start()
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3
    merge.merge_shards(str(three))
    small.check(three)


def test_rows_that_a_shard_had_no_memory_for_stay_skipped_also_in_a_resumed_merge(small: Case, three: Path) -> None:
    path = shards.path(three, Shard(2, 3))
    with h5py.File(path) as file:
        row = int(np.flatnonzero(file["status"][:] == store.DONE)[0])
        record = int(file["records"][row])
    path.rename(store.partial_path(path))
    file = store.Store.resume(path)
    for name in ("mean", "bos"):
        file.place(name, 2, np.array([row]), np.full((1, 32), np.nan, np.float16))
    file.mark(np.array([row]), store.SKIPPED, reason=store.NO_MEMORY)
    file.finish("{}", overwrite=False)
    file.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "finish", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            merge.merge_shards(str(three))
    merge.merge_shards(str(three))
    with store.read_embeddings(three) as merged:
        assert (merged.status[record], merged.reason[record]) == (store.SKIPPED, store.NO_MEMORY)
        assert np.isnan(merged[record]).all()
    others = np.delete(np.arange(62), record)
    assert np.array_equal(datasets(three)["mean/2"][others], small.datasets["mean/2"][others], equal_nan=True)


def test_a_merge_may_open_as_many_files_as_it_has_shards(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (50, 1000))
    merge.merge_shards(str(three))
    assert raised == [(259, 1000)]
