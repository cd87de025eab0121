"""Kills, full disks and changing inputs: the same command, run again, always ends at the uninterrupted run's file."""

import errno
import functools
import gc
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import forked
import slowed
import virnucpro_cli
from children import CHILDREN, program, until
from conftest import write_model
from virnucpro_cli import store
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import devices, placer, runner
from virnucpro_cli.errors import STOP_SIGNALS, UserError
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.store import disk as disk_calls

KINDS = ("mean", "bos", "residue")
MOMENTS, FLIPS = 20, 24


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in the children: on a busy machine two threads of a tiny model mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """An input and a model with the uninterrupted run's datasets, to compare other runs with."""

    def __init__(self, folder: Path, proteins: int):
        self.fasta, self.model, self.proteins = folder / "in.fasta", write_model(folder / "model"), proteins
        generator = random.Random(0)
        with open(self.fasta, "w") as file:
            for i in range(proteins):
                length = 0 if i % 97 == 3 else generator.choice((30, 90, 150, generator.randint(1, 200)))
                file.write(f">protein_{i}\n{''.join(generator.choices('ACDEFGHIKLMNPQRSTVWY', k=length))}\n")
            file.write(f">long\n{'MKVLAGW' * 60}\n>copy\n{'MKVLAGW' * 60}\n")
        finish_in_child(self, folder / "whole.h5")
        self.cpu_seconds = float(cpu_of(folder / "whole.h5").read_text())
        self.datasets = datasets(folder / "whole.h5")

    def options(self, **more: Any) -> dict[str, Any]:
        return {
            "inputs": str(self.fasta), "model": str(self.model), "device": "cpu", "token_budget": 1024, "pool": KINDS,
            "long": "window", "max_residues": 200, "overlap": 50, **more,
        }  # fmt: skip

    def embed(self, output: Path, **more: Any) -> dict[str, int]:
        return embed_fasta(output=str(output), **self.options(**more)).counts

    def check(self, output: Path) -> None:
        """`output` is complete, equals the uninterrupted run bit for bit, and nothing else of it is left."""
        self.check_rows(output)
        assert sorted(output.parent.glob(f"{output.name}*")) == [output]

    def check_values(self, output: Path) -> None:
        """As check_rows, wherever the rows were computed."""
        found = datasets(output)
        del found["computed_by"]
        assert all(found[name].tobytes() == self.datasets[name].tobytes() for name in found)

    def check_rows(self, output: Path) -> None:
        found = datasets(output)
        assert found.keys() == self.datasets.keys()
        for name, values in self.datasets.items():
            assert found[name].tobytes() == values.tobytes(), name
        assert store.fingerprint_of(output)[1]


def datasets(path: Path) -> dict[str, np.ndarray]:
    """Every dataset outside /run."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("run/") and name != "embeddings":
            found[name] = item[()] if item.dtype != object else np.array(item.asstr()[:].tolist())

    with h5py.File(path) as file:
        file.visititems(keep)
        found["mean/2"] = file["embeddings"][()]
    return found


def report_of(output: Path) -> Path:
    return output.with_suffix(".json")


def cpu_of(output: Path) -> Path:
    return output.with_suffix(".cpu")


class InTurn(ThreadPoolExecutor):
    """Does at once what it is given, so that the system calls of a run come in one order."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def child(options: dict[str, Any], deadly: tuple[str, int] | None = None, cpu_seconds: float = 0) -> None:
    """A run that commits often, and dies where it is told to.

    deadly: a system call (of `os`, or store/disk.py), and how many calls of it this process survives. cpu_seconds: the kernel ends the process
    without a word, as SIGKILL does, when it has used so much; unlike a wall clock this means the same on a busy machine.
    """
    torch.set_num_threads(1)
    placer.COMMIT_SECONDS = 0.05
    if cpu_seconds:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    if deadly:
        placer.COMMIT_SECONDS, placer.ThreadPoolExecutor = 0.0, InTurn  # type: ignore[misc]
        name, survived = deadly
        owner: Any = os if hasattr(os, name) else disk_calls
        real, calls = getattr(owner, name), 0

        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > survived:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(owner, name, wrapped)
    embed_fasta(**options)
    cpu_of(Path(options["output"])).write_text(str(time.process_time()))


def run_child(case: Case, output: Path, *death: Any, **more: Any) -> int:
    """Exit code of a run in a process of its own."""
    options = case.options(output=str(output), report=str(report_of(output)), **more)
    process = CHILDREN.Process(target=child, args=(options, *death))
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return int(process.exitcode)


def finish_in_child(case: Case, output: Path) -> int:
    """Run to the end; how many proteins had been done by an earlier run."""
    assert run_child(case, output) == 0
    return int(json.loads(report_of(output).read_text())["counts"].get("resumed proteins", 0))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """About a second of work."""
    return Case(tmp_path_factory.mktemp("case"), 1000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("small"), 60)


# --- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_at_any_moment_is_made_good_by_the_same_command(case: Case, tmp_path: Path) -> None:
    generator = random.Random(1)
    killed = resumed = 0
    for i in range(MOMENTS):
        output = tmp_path / f"{i}.h5"
        moment = case.cpu_seconds * (i + generator.random()) / MOMENTS
        killed += run_child(case, output, None, moment) == -signal.SIGPROF
        resumed += 0 < finish_in_child(case, output) < case.proteins
        case.check(output)
        output.unlink()
    assert killed >= MOMENTS // 2, "most runs were over before their kill: this tests nothing"
    assert resumed >= MOMENTS // 4, "hardly any run found work of an earlier one: this tests nothing"


@pytest.mark.parametrize(
    ("call", "survived"),
    [
        ("pwrite", 0), ("pwrite", 1), ("pwrite", 5), ("pwrite", 50), ("fdatasync", 0), ("fdatasync", 1),
        ("fdatasync", 2), ("fdatasync", 7), ("fallocate", 0), ("fallocate", 1), ("fsync", 0), ("fsync", 1),
        ("fsync", 2), ("rename", 0), ("rename_exclusive", 0),
    ],
    ids=lambda value: str(value),
)  # fmt: skip
def test_a_kill_at_a_system_call_is_made_good_too(small: Case, tmp_path: Path, call: str, survived: int) -> None:
    output = tmp_path / "out.h5"
    assert run_child(small, output, (call, survived)) == -signal.SIGKILL
    finish_in_child(small, output)
    small.check(output)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_kill_near_the_end_is_made_good_too(small: Case, tmp_path: Path, call: str) -> None:
    """Wherever the report, the mark of completion and their syncs are: the last calls of a run, one by one."""
    calls = count_calls(small, tmp_path, call)
    for survived in range(calls - 3, calls):
        output = tmp_path / f"{survived}.h5"
        assert run_child(small, output, (call, survived)) == -signal.SIGKILL
        finish_in_child(small, output)
        small.check(output)


def count_calls(case: Case, folder: Path, call: str) -> int:
    """How often a whole run makes a system call."""
    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(os, call)

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*arguments)

        patch.setattr(os, call, counted)
        patch.setattr(placer, "COMMIT_SECONDS", 0.0)
        patch.setattr(placer, "ThreadPoolExecutor", InTurn)
        case.embed(folder / "counted.h5")
    return calls


def test_a_run_that_is_killed_again_and_again_still_arrives(small: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    for _ in range(3):
        assert run_child(small, output, ("fdatasync", 4)) == -signal.SIGKILL
    assert finish_in_child(small, output) > 0
    small.check(output)


def test_an_overwriting_run_that_is_killed_leaves_the_old_file(small: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    small.embed(output, layers=(0,))
    old = output.read_bytes()
    assert run_child(small, output, ("replace", 0), overwrite=True) == -signal.SIGKILL
    assert output.read_bytes() == old
    small.embed(output, overwrite=True)
    small.check(output)


def slow_and_told(marked: Path) -> None:
    """In this process packs take long, and a file is there once rows are final, though not committed."""
    slowed.here(0.02)
    mark = store.Store.mark

    def told(file: store.Store, rows: Any, *more: Any, **named: Any) -> None:
        mark(file, rows, *more, **named)
        if len(rows):
            marked.touch()

    store.Store.mark = told  # type: ignore[method-assign]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stopped_program_says_how_to_go_on(case: Case, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out.h5"
    command = (
        "embed", case.fasta, "-o", output, "--model", case.model, "--device", "cpu", "--token-budget", 1024,
        "--pool", ",".join(KINDS), "--long", "window", "--max-residues", 200, "--overlap", 50,
    )  # fmt: skip
    marked = tmp_path / "marked"
    run = program(*command, before=functools.partial(slow_and_told, marked))
    until(marked.exists, run)
    run.kill(number)
    assert run.wait() == 128 + number, run.err
    assert run.out == "" and "Traceback" not in run.err
    assert number.name in run.err and "the same command resumes" in run.err
    assert not output.exists()
    assert case.embed(output)["resumed proteins"] > 0
    case.check(output)


def with_a_thread_that_never_ends() -> None:
    threading.Thread(target=threading.Event().wait).start()


def test_a_program_that_has_said_its_last_word_and_does_not_end_can_be_killed(tmp_path: Path) -> None:
    run = program("embed", tmp_path / "absent.fasta", "-o", tmp_path / "out.h5", before=with_a_thread_that_never_ends)
    until(lambda: "absent.fasta" in run.err, run)
    for _ in range(1000):  # those that come before it takes no more notice do nothing
        run.kill(signal.SIGTERM)
        if run.poll() is not None:
            break
        time.sleep(0.01)
    assert run.wait(1) == -signal.SIGTERM


# --- a disk that forgets ------------------------------------------------------------------------------------------


def flipped(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.fixture(scope="module")
def begun(small: Case, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A partial file in which some proteins are done and some are not."""
    output = tmp_path_factory.mktemp("begun") / "out.h5"
    assert run_child(small, output, ("fdatasync", 9)) == -signal.SIGKILL
    with h5py.File(store.partial_path(output)) as file:
        assert {store.PENDING, store.DONE, store.SKIPPED} == set(file["status"][:].tolist())
    return store.partial_path(output).read_bytes()


def test_a_flipped_bit_of_a_partial_file_is_never_in_a_finished_one(small: Case, begun: bytes, tmp_path: Path) -> None:
    """Wherever it is: rows, columns, names, HDF5's own bytes. The run makes it good or refuses to go on."""
    generator, refused, output = random.Random(3), 0, tmp_path / "out.h5"
    for i in range(FLIPS):
        store.partial_path(output).write_bytes(begun)
        within = 4096 if i % 4 == 0 else len(begun)  # HDF5's own bytes are few
        flipped(store.partial_path(output), generator.randrange(within), generator.randrange(8))
        try:
            small.embed(output)
        except UserError as error:
            assert "--restart" in error.remedy or "damaged" in error.what, error
            refused += 1
            small.embed(output, restart=True)
        small.check(output)
        output.unlink()
    assert 0 < refused < FLIPS


@pytest.mark.parametrize(
    ("name", "workers"),
    [(name, 1) for name in ("mean/2", "bos/2", "residue/2", "status", "flags", "reason", "computed_by", "run/sums")]
    + [("residue/2", 2)],
)
def test_rows_that_are_not_as_they_were_committed_are_computed_again(
    small: Case, begun: bytes, tmp_path: Path, name: str, workers: int
) -> None:
    output = tmp_path / "out.h5"
    partial = store.partial_path(output)
    partial.write_bytes(begun)
    with h5py.File(partial) as file:
        done = np.flatnonzero((file["status"][:] == store.DONE) & (file["lengths"][:] > 0))
        row = int(file["residue/offsets"][done[0]] if name == "residue/2" else done[0])
        item = file[name]
        offset = item.id.get_offset() + row * int(np.prod(item.shape[1:])) * item.dtype.itemsize
    flipped(partial, offset, 1)
    report = tmp_path / "report.json"
    run = embed_fasta if workers == 1 else forked.embed
    run(output=output, **small.options(report=str(report)))
    small.check_rows(output)
    told = json.loads(report.read_text())
    assert told["counts"]["resumed proteins"] == len(done) - 1
    assert any("not in" in note and "as they were committed" in note for note in told["notes"]) or name == "status"


# --- out of memory -------------------------------------------------------------------------------------------------


def out_of_memory_beyond(
    patch: pytest.MonkeyPatch, tokens: int, longest: int, spared: Callable[[PackedModel], bool] = lambda model: False
) -> list[int]:
    """A device with room for so many tokens, and segments up to so long, but for a model that is `spared`; the sizes that
    were tried."""
    tried, embed = [], PackedModel.embed

    def limited(model: PackedModel, batch: PackedBatch, **how: Any) -> Embeddings:
        tried.append(batch.used)
        if not spared(model) and (batch.used > tokens or batch.max_seqlen > longest):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore words.")
        return embed(model, batch, **how)

    patch.setattr(PackedModel, "embed", limited)
    return tried


def test_packs_that_do_not_fit_are_halved_until_they_do(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, report = tmp_path / "out.h5", tmp_path / "report.json"
    tried = out_of_memory_beyond(monkeypatch, 300, 1000)
    small.embed(output, report=str(report))
    small.check(output)
    notes = [note for note in json.loads(report.read_text())["notes"] if "out of memory" in note]
    assert notes and "packs of at most" in notes[0] and "20.00 GiB" in notes[0] and "More words" not in notes[0]
    assert sum(size > 300 for size in tried) == len(notes) <= 3, "no size is tried again that was too large"


@pytest.mark.parametrize("long", ["full", "window"])
def test_a_piece_that_does_not_fit_alone_is_computed_in_parts(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: str
) -> None:
    small.embed(tmp_path / "whole.h5", long=long)
    output, report = tmp_path / "out.h5", tmp_path / "report.json"
    out_of_memory_beyond(monkeypatch, 300, 201, spared=lambda model: model.rows_of_a_part is not None)
    assert small.embed(output, long=long, report=str(report))["skipped"] == 1
    notes = "\n".join(json.loads(report.read_text())["notes"])
    assert "left for later" in notes and "in parts of" in notes
    whole, found = datasets(tmp_path / "whole.h5"), datasets(output)
    assert all(found[name].tobytes() == values.tobytes() for name, values in whole.items())


def skipped_for_memory(case: Case, output: Path, **more: Any) -> dict[str, int]:
    """A run on a device without room for the long protein and its copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "free_memory", lambda device: 1e9)
        out_of_memory_beyond(patch, 10_000, 201)
        return case.embed(output, **more)


def test_a_protein_that_never_fits_is_skipped_and_tried_again_where_there_is_more_memory(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    for retry in (False, True):
        assert skipped_for_memory(small, output, retry_skipped=retry)["skipped"] == 3, "one is empty, one a copy"
        with store.read_embeddings(output) as file:
            given_up = np.flatnonzero(file.reason == store.NO_MEMORY)
            assert file.complete and [file.names[row] for row in given_up.tolist()] == ["long", "copy"]
            assert np.isnan(file[given_up]).all() and np.isnan(file.residues("long")).all()
    before = output.read_bytes()
    monkeypatch.setattr(devices, "free_memory", lambda device: 1.1e9)
    again = embed_fasta(output=str(output), **small.options())
    assert again.already_complete and again.counts["skipped"] == 3 and output.read_bytes() == before
    monkeypatch.setattr(devices, "free_memory", lambda device: 2e9)
    assert small.embed(output)["skipped"] == 1
    small.check(output)
    assert embed_fasta(output=str(output), **small.options()).already_complete


@pytest.mark.parametrize(("call", "survived"), [("fsync", 0), ("fdatasync", 0), ("fdatasync", 3), ("replace", 0)])
def test_a_finished_file_stays_until_a_better_one_is_complete(
    small: Case, tmp_path: Path, call: str, survived: int
) -> None:
    output = tmp_path / "out.h5"
    skipped_for_memory(small, output)
    before = output.read_bytes()
    assert run_child(small, output, (call, survived), retry_skipped=True) == -signal.SIGKILL
    assert output.read_bytes() == before
    assert run_child(small, output, None, retry_skipped=True) == 0
    assert sorted(tmp_path.glob("out.h5*")) == [output]
    small.check_rows(output)


def test_a_better_file_takes_the_place_of_no_other(small: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    skipped_for_memory(small, output)
    finish = store.Store.finish

    def replaced_meanwhile(file: store.Store, *arguments: Any) -> str:
        output.unlink()
        output.write_text("of somebody else")
        return finish(file, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "finish", replaced_meanwhile)
        with pytest.raises(UserError, match="appeared while this run was working"):
            small.embed(output, retry_skipped=True)
    assert output.read_text() == "of somebody else"


def test_a_read_only_finished_file_is_left_alone(small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.h5"
    skipped_for_memory(small, output)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != output and access(path, mode))
    assert embed_fasta(output=str(output), **small.options()).already_complete
    assert sorted(tmp_path.glob("out.h5*")) == [output]


def test_a_finished_file_is_not_discarded_for_what_it_lacks(small: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    with pytest.MonkeyPatch.context() as patch:
        out_of_memory_beyond(patch, 10_000, 201)
        small.embed(output)
    before = output.read_bytes()
    assert embed_fasta(output=str(output), **small.options(restart=True)).already_complete
    assert output.read_bytes() == before


def test_packs_whose_rows_find_no_pinned_memory_are_halved(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, report, to_host = tmp_path / "out.h5", tmp_path / "report.json", runner._to_host

    def limited(found: Embeddings, non_blocking: bool) -> Embeddings:
        if max(len(rows) for rows in found.residue.values()) > 1024:
            raise torch.AcceleratorError("CUDA error: out of memory\nCompile with ...")
        return to_host(found, non_blocking)

    monkeypatch.setattr(runner, "_to_host", limited)
    small.embed(output, report=str(report), token_budget=8192)
    small.check(output)
    assert any("packs of at most" in note for note in json.loads(report.read_text())["notes"])


def test_a_host_without_memory_is_as_a_device_without(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, embed = tmp_path / "out.h5", PackedModel.embed

    def limited(model: PackedModel, batch: PackedBatch, **how: Any) -> Embeddings:
        if batch.max_seqlen > 201:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return embed(model, batch, **how)

    monkeypatch.setattr(PackedModel, "embed", limited)
    assert small.embed(output)["skipped"] == 3
    monkeypatch.undo()
    small.embed(output, retry_skipped=True)
    small.check(output)


def test_what_another_worker_has_done_is_not_given_up(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker says that a protein is too large for it, and dies; another does the pack; the first one's word is old."""
    output, commit = tmp_path / "out.h5", placer.Placer.commit_now_and_then

    def old_word(self: placer.Placer) -> None:
        self.unfit, self.broken = [5], [6]
        commit(self)

    monkeypatch.setattr(placer.Placer, "commit_now_and_then", old_word)
    out_of_memory_beyond(monkeypatch, 0, 0, spared=lambda model: model.rows_of_a_part is None)
    small.embed(output)
    small.check(output)


def test_memory_that_a_container_leaves_is_what_counts(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs" / "cgroup"
    job = root / "slurm" / "job_7"
    job.mkdir(parents=True)
    own.write_text("0::/slurm/job_7\n")
    assert devices._left_by_cgroups(own, root) == float("inf")
    for folder, limit, used in ((job, "max", 10), (job.parent, "5000", 2000), (root, "9000", 1000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert devices._left_by_cgroups(own, root) == 3000
    old = root / "memory" / "docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("700\n")
    (old / "memory.usage_in_bytes").write_text("100\n")
    own.write_text("4:memory:/docker\n3:cpu:/docker\n")
    assert devices._left_by_cgroups(own, root) == 600


def test_a_protein_too_large_for_the_device_is_computed_on_the_cpu_in_fp32(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    out_of_memory_beyond(monkeypatch, 10_000, 201, spared=lambda model: model.dtype == torch.float32)
    assert small.embed(output, dtype="fp16", long="full")["skipped"] == 1
    monkeypatch.undo()
    small.embed(tmp_path / "exact.h5", dtype="fp32", long="full")
    with store.read_embeddings(output) as file, store.read_embeddings(tmp_path / "exact.h5") as exact:
        there = np.asarray(file.rows("long") + file.rows("copy"))
        np.testing.assert_array_equal(file[there], exact[there])
        assert (file.flags[there] & store.RECOMPUTED > 0).all() and (file.computed_by[there] == 1).all()
        assert [each["dtype"] for each in file.environments] == ["float16", "float32"]
        assert (np.delete(file.computed_by, there) == 0).all()
        table = file.report["tables"]["Computed by"]
    assert [(row["proteins"], row["rows"]) for row in table] == [(59, "0-2, 4-59"), (2, "60-61")]


def test_a_failed_device_is_one_message_and_the_same_command_resumes(small: Case, tmp_path: Path) -> None:
    output, embed = tmp_path / "out.h5", PackedModel.embed
    with pytest.MonkeyPatch.context() as patch:
        left = [3]

        def fails(model: PackedModel, batch: PackedBatch, **how: Any) -> Embeddings:
            left[0] -= 1
            if not left[0]:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")
            return embed(model, batch, **how)

        patch.setattr(PackedModel, "embed", fails)
        with pytest.raises(UserError, match="failed: RuntimeError: CUDA error: an illegal memory access") as stopped:
            small.embed(output)
    assert "same command again" in stopped.value.remedy
    assert small.embed(output)["resumed proteins"] > 0
    small.check(output)


# --- another place -------------------------------------------------------------------------------------------------


def of_another_version() -> None:
    virnucpro_cli.__version__ = "9.9"


def test_a_run_may_go_on_elsewhere_and_the_file_says_which_rows_did(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    assert run_child(case, output, ("fdatasync", 40)) == -signal.SIGKILL
    with h5py.File(store.partial_path(output)) as file:
        done = file["status"][:] == store.DONE
    assert done.any() and not done.all()
    more = case.options(token_budget=2048, report=str(report_of(output)))
    forked.embed(before=of_another_version, output=output, **more)
    with store.read_embeddings(output) as file:
        assert (file.computed_by == np.where(done | (file.status == store.SKIPPED), 0, 1)).all()
        assert [each["virnucpro"] == "9.9" for each in file.environments] == [False, True]
    told = json.loads(report_of(output).read_text())
    assert told["counts"]["resumed proteins"] == done.sum()
    rows = told["tables"]["Computed by"]
    assert [row["proteins"] for row in rows] == [done.sum(), (~done).sum() - case.proteins // 97 - 1]
    case.check_values(output)


def test_rows_of_a_cpu_say_with_how_many_threads_a_process_computed_them(small: Case, tmp_path: Path) -> None:
    """A run goes on with another number of workers, and so of threads: what is there stays, and no bit is unaccounted for."""
    output = tmp_path / "out.h5"
    assert run_child(small, output, ("fdatasync", 12)) == -signal.SIGKILL
    options, four = small.options(), functools.partial(torch.set_num_threads, 4)
    del options["inputs"]
    for path in (output, tmp_path / "two.h5"):
        forked.embed(small.fasta, path, before=four, **options)
    with store.read_embeddings(output) as file, store.read_embeddings(tmp_path / "two.h5") as other:
        assert [each["device"] for each in file.environments] == ["CPU, 1 thread", "CPU, 2 threads"]
        assert [each["device"] for each in other.environments] == ["CPU, 2 threads"]
        done = np.flatnonzero(file.status == store.DONE)
        assert set(file.computed_by[done]) == {0, 1}
        for kind in ("mean", "bos"):
            whole = small.datasets[f"{kind}/2"], other.array(kind)
            for row in done.tolist():
                assert file.array(kind)[row].tobytes() == whole[file.computed_by[row]][row].tobytes()


# --- full disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of a given size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(size: str) -> Path:
        nonlocal mounted
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"this machine mounts no tmpfs: {done.stderr.decode().strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up all space."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return filler


def test_a_disk_that_is_too_small_is_told_before_any_work(case: Case, disk: Callable[[str], Path]) -> None:
    folder = disk("1m")
    with pytest.raises(UserError, match=r"only 1\.0 MB are free") as refused:
        case.embed(folder / "out.h5")
    assert "-o" in refused.value.remedy and not list(folder.iterdir())


@pytest.mark.parametrize("preallocate", [True, False])
@pytest.mark.parametrize("size", ["16k", "64k", "96k", "128k", "160k", "1m"])
def test_a_disk_that_fills_up_at_the_layout_is_left_clean(
    case: Case, disk: Callable[[str], Path], size: str, preallocate: bool
) -> None:
    """However far the layout gets: into HDF5's own writes, or to the reservation of the rows."""
    folder = disk(size)
    answer, question = CHILDREN.Pipe(duplex=False)
    process = CHILDREN.Process(
        target=embed_without_room, args=(case.options(output=str(folder / "out.h5"), preallocate=preallocate), question)
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0, "HDF5 after a failed write can take the process down"
    assert answer.recv().startswith("No space is left for")
    left = (
        [folder / "out.h5.partial"] if (size, preallocate) == ("1m", False) else []
    )  # its layout fits, its rows do not
    assert list(folder.iterdir()) == left


def embed_without_room(options: dict[str, Any], question: Any) -> None:
    store.check_free_space = lambda *_: None
    try:
        embed_fasta(**options)
    except UserError as error:
        question.send(error.what)
    gc.collect()


def test_a_disk_that_fills_up_during_the_run_costs_nothing_that_is_done(
    case: Case, disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = disk("40m")
    output = folder / "out.h5"
    create = store.Store.create.__func__  # type: ignore[attr-defined]

    def create_and_fill(*arguments: Any) -> store.Store:
        file = create(store.Store, *arguments)
        fill(folder)
        os.truncate(folder / "filler", (folder / "filler").stat().st_size - (1 << 20))  # room for some rows
        return file

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "create", create_and_fill)
        patch.setattr(placer, "COMMIT_SECONDS", 0.0)
        patch.setattr(placer, "ThreadPoolExecutor", InTurn)
        with pytest.raises(UserError, match="No space is left") as stopped:
            case.embed(output, preallocate=False)
    assert "same command" in stopped.value.remedy
    (folder / "filler").unlink()
    assert 0 < case.embed(output, preallocate=False)["resumed proteins"] < case.proteins
    case.check(output)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "No space"), (errno.EDQUOT, "quota"), (errno.EIO, "error"), (errno.EROFS, "Read-only")],
)
@pytest.mark.parametrize("survived", [0, 3, 40])
def test_a_write_that_fails_is_one_clear_message_and_can_be_resumed(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int, code: int, words: str
) -> None:
    output = tmp_path / "out.h5"
    real, calls = os.pwrite, 0

    def failing(*arguments: Any) -> int:
        nonlocal calls
        calls += store.partial_path(output).exists()  # after the layout
        if calls > survived:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        patch.setattr(placer, "COMMIT_SECONDS", 0.0)
        patch.setattr(placer, "ThreadPoolExecutor", InTurn)
        with pytest.raises(UserError, match=words):
            small.embed(output)
    assert not output.exists() and store.partial_path(output).exists()
    small.embed(output)
    small.check(output)


def test_short_writes_are_carried_on(small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 2)], offset))
        small.embed(tmp_path / "out.h5")
    small.check(tmp_path / "out.h5")


# --- the input -----------------------------------------------------------------------------------------------------


def test_an_input_that_changes_during_the_run_is_never_mixed_in(tmp_path: Path) -> None:
    case = Case(tmp_path, 60)
    output = tmp_path / "out.h5"
    create = store.Store.create.__func__  # type: ignore[attr-defined]

    def create_and_change(*arguments: Any) -> store.Store:
        file = create(store.Store, *arguments)
        with open(case.fasta, "a") as fasta:
            fasta.write(">one_more\nMKVLA\n")
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "create", create_and_change)
        with pytest.raises(UserError, match=r"in\.fasta was changed"):
            case.embed(output)
    assert not output.exists()
    with pytest.raises(UserError, match="another run: the content of the input differs"):
        case.embed(output)
    case.embed(output, restart=True)
    assert len(datasets(output)["lengths"]) == case.proteins + 3
