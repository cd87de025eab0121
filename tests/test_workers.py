"""Several processes, one file: the same bits for any number of them, whoever is killed, and whenever."""

import errno
import gzip
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

import children
import forked
from conftest import no_more_files
from test_faults import KINDS, Case, one_thread  # noqa: F401  (in force here too)
from virnucpro_cli import cli, embed_fasta, store, waking
from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.embed import engines
from virnucpro_cli.engine import devices, placer, runner, workers
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import indexing

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="this machine has no /proc, where workers are found"
)

Change = Callable[[PackedBatch], None]
"""What a worker does, too, before it computes a pack."""


def changed(change: Change) -> None:
    """In a worker: it commits often, and does so."""
    placer.COMMIT_SECONDS = 0.1
    serial = runner.serial

    def with_change(packs: Any, collate: Any, compute: Any, sink: Any, device: Any) -> None:
        def both(batch: PackedBatch) -> Any:
            change(batch)
            return compute(batch)

        serial(packs, collate, both, sink, device)

    runner.serial = with_change  # type: ignore[assignment]


def with_workers(before: Callable[[], None]) -> None:
    """In a parent: it commits often, too."""
    placer.COMMIT_SECONDS = 0.1
    forked.workers(before)


def slow(batch: PackedBatch, seconds: float = 0.02) -> None:
    time.sleep(seconds)


slower = partial(slow, seconds=0.1)


def fails_once(error: Exception, mark: Path, batch: PackedBatch) -> None:
    """One worker, once."""
    with suppress(FileExistsError):
        mark.touch(exist_ok=False)
        raise error


def fails_for_long_ones(batch: PackedBatch) -> None:
    if batch.max_seqlen > 201:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def finds_the_disk_full(batch: PackedBatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = full


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), 600)


class Program:
    """`virnucpro embed` in a process of its own, with workers of its own; change: of these."""

    def __init__(self, case: Case, output: Path, workers: int, change: Change | None = slow,
                 before: Callable[[], None] | None = None, **variables: str):  # fmt: skip
        self.output = output
        if change is not None:
            before = partial(changed, change)
            before = before if workers == 1 else partial(with_workers, before)
        self.process = children.program(
            "embed", case.fasta, "-o", output, *self.options(case, workers), "--report", output.with_suffix(".json"),
            before=before, OMP_NUM_THREADS="1", **variables,
        )  # fmt: skip

    @staticmethod
    def options(case: Case, workers: int) -> list[Any]:
        return [
            "--model", case.model, "--device", "cpu", "--token-budget", 1024, "--pool", ",".join(KINDS),
            "--long", "window", "--max-residues", 200, "--overlap", 50, "--workers", workers,
        ]  # fmt: skip

    @property
    def workers(self) -> list[int]:
        try:
            listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:
            return []
        return [int(pid) for pid in listed.split()]

    def wait_for_work(self) -> None:
        """Until some rows are in the file, with the states that vouch for them."""
        partial = store.partial_path(self.output)

        def rows_are_there() -> bool:
            if not partial.exists():
                return False
            with h5py.File(partial, "r", locking=False) as file:
                return bool((file["status"][:] == store.DONE).any())

        children.until(rows_are_there, self.process)

    def end(self, code: int = 3) -> str:  # 3: some records are empty
        assert self.process.wait() == code, self.process.err
        assert "Traceback" not in self.process.err
        return self.process.err

    def notes(self) -> str:
        return "\n".join(json.loads(self.output.with_suffix(".json").read_text())["notes"])


def gone(pids: list[int], within: float) -> bool:
    """Whether the processes have ended within so many seconds, with all their threads: any of these still holds its files."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if all(set(threads_of(pid)) <= {"Z", "X"} for pid in pids):
            return True
        time.sleep(0.02)
    return False


def threads_of(pid: int) -> list[str]:
    """The state of each thread of a process."""
    states = []
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(task.read_text().rsplit(")", 1)[1].split()[0])
    return states


def test_several_workers_make_the_file_of_one(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    counts = case.embed(output, workers=2)
    assert counts["skipped"] == sum(i % 97 == 3 for i in range(600))
    case.check(output)


@pytest.mark.parametrize(
    ("operations", "asked", "processes"), [(1e12, False, 1), (4.1e15, False, 2), (1e18, False, 4), (1e12, True, 4)]
)
def test_a_short_run_takes_no_more_gpus_than_it_is_worth_unless_they_are_asked_for(
    operations: float, asked: bool, processes: int
) -> None:
    gpus = [torch.device("cuda", i) for i in range(4)]
    every = engines.OnThisHost(
        lambda: pytest.fail("no device is looked at"), gpus[0], torch.float16, 4, "4 processes", 4, devices=gpus,
        asked=asked, begun=[],
    )  # fmt: skip
    some = every.worth(operations)
    assert isinstance(some, engines.OnThisHost)
    assert (some.processes, some.gpus, some.devices) == (processes, processes, gpus[:processes])
    assert bool(some.workers) == (processes > 1)
    assert ["--workers 4 takes all" in note for note in some.notes] == [True] * (processes < 4)


def test_a_run_of_seconds_is_computed_by_one_process_which_says_so(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "resolve_devices", lambda *_: ([torch.device("cpu")] * 2, []))
    output = tmp_path / "out.h5"
    found = embed_fasta(str(case.fasta), str(output), model=str(case.model), device="cpu", token_budget=1024)
    assert "Workers" not in found.tables and any("--workers 2 takes all" in note for note in found.notes)


def begun_early(then: Callable[[list[Any]], None], arguments: list[str]) -> None:
    """A command with an input that counts as large. then: what is done once its workers wait, and it is to be read."""
    forked.workers()
    begun: list[Any] = []
    begin, read_all = waking.begin, indexing.read_all

    def seen(*of: Any) -> Any:
        then(begun)
        return read_all(*of)

    def begin_seen(device: str) -> Any:
        begun.append(begin(device))
        return begun[-1]

    indexing.WORTH_BYTES, indexing.read_all, waking.begin = 1, seen, begin_seen
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert len(begun) == 2 and all(each.process.poll() is not None for each in begun)
    sys.exit(ended.value.code)


def two_wait(begun: list[Any]) -> None:
    assert len(begun) == 2 and all(each.process.poll() is None for each in begun)


def one_dies(begun: list[Any]) -> None:
    two_wait(begun)
    begun[0].process.kill()
    begun[0].process.wait()


def large(then: Callable[[list[Any]], None], case: Case, fasta: Path, output: Path, code: int) -> dict[str, Any]:
    """The report of such a command with two workers."""
    options = [*Program.options(case, 2), "--report", output.with_suffix(".json")]
    arguments = [str(each) for each in ("embed", fasta, "-o", output, *options)]
    run = children.Child(begun_early, then, arguments, TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    assert run.wait() == code, run.err
    return dict(json.loads(output.with_suffix(".json").read_text()))


def test_workers_of_a_large_input_begin_before_it_is_read(case: Case, tmp_path: Path) -> None:
    """Compressed, so that its plain text lies in a file that was opened after them."""
    fasta, output = tmp_path / "in.fasta.gz", tmp_path / "out.h5"
    fasta.write_bytes(gzip.compress(case.fasta.read_bytes()))
    large(two_wait, case, fasta, output, code=3)  # some records are empty
    case.check_rows(output)


def test_a_worker_that_dies_while_it_waits_is_told_of_and_done_without(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    report = large(one_dies, case, case.fasta, output, code=3)
    assert any("worker 1" in note and "SIGKILL" in note for note in report["notes"])
    case.check_rows(output)


def test_workers_that_a_large_input_does_not_need_end_with_the_run(case: Case, tmp_path: Path) -> None:
    fasta, output = tmp_path / "in.fasta", tmp_path / "out.h5"
    fasta.write_text(">one\nMKVLA\n")
    large(two_wait, case, fasta, output, code=0)
    with store.read_embeddings(output) as file:
        assert list(file.names) == ["one"] and file.status.tolist() == [store.DONE]


def without_descriptors(workers_without: int, arguments: list[str]) -> None:
    """A command that may open no more files while so many of its workers are to be given their jobs."""
    forked.workers()
    tell, told = workers._tell, itertools.count()

    def tell_without(*of: Any) -> None:
        with no_more_files() if next(told) < workers_without else nullcontext():
            tell(*of)

    workers._tell = tell_without
    cli.main(arguments)


@pytest.mark.parametrize("without", [1, 2])
def test_a_worker_that_cannot_be_given_its_job_is_not_waited_for(case: Case, tmp_path: Path, without: int) -> None:
    output = tmp_path / "out.h5"
    arguments = ["embed", str(case.fasta), "-o", str(output), *map(str, Program.options(case, 2))]
    run = children.Child(without_descriptors, without, arguments, TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    assert run.wait() == (3 if without == 1 else 2), run.err
    assert re.search(r"worker [12] on cpu was lost", run.err)
    assert "could not be given its job: Too many open files" in run.err
    if without == 1:
        case.check_rows(output)
    else:
        assert "No worker is left" in run.err and "ulimit -n" in run.err


@pytest.mark.parametrize(("device", "workers", "names"), [
    ("cpu", "auto", ["cpu"]), ("cpu", 3, ["cpu"] * 3), ("mps", 2, []), ("cuda:0,2", "auto", ["cuda:0", "cuda:2"]),
    ("cuda:1", 2, ["cuda:1"] * 2), ("auto", "auto", ["cuda:0", "cuda:1", "cuda:2"]), ("cuda", 2, ["cuda:0", "cuda:1"]),
])  # fmt: skip
def test_devices_of_workers_are_known_by_the_drivers_word(
    device: str, workers: int | str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu in ("0000:0f:00.0", "0000:1f:00.0", "0000:2f:00.0"):
        (tmp_path / gpu).mkdir()
    monkeypatch.setattr(waking, "GPUS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert waking.expected(device, workers) == names
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert waking.expected("cuda", "auto") == ["cuda:0"]


def test_the_packs_of_a_killed_worker_are_done_by_the_others(case: Case, tmp_path: Path) -> None:
    program = Program(case, tmp_path / "out.h5", 3, slower)
    program.wait_for_work()
    os.kill(program.workers[0], signal.SIGKILL)
    program.end()
    assert "was lost" in program.notes() and "SIGKILL" in program.notes()
    case.check_rows(program.output)


def test_a_worker_out_of_memory_halves_its_packs_and_says_so(case: Case, tmp_path: Path) -> None:
    error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    program = Program(case, tmp_path / "out.h5", 2, partial(fails_once, error, tmp_path / "once"))
    assert "Tried to allocate 20.00 GiB" in program.end()
    assert "was lost" not in program.notes() and "worker" in program.notes() and "packs of at most" in program.notes()
    case.check_rows(program.output)


def test_a_worker_that_crashes_leaves_its_packs_to_the_others(case: Case, tmp_path: Path) -> None:
    error = RuntimeError("an illegal memory access")
    program = Program(case, tmp_path / "out.h5", 2, partial(fails_once, error, tmp_path / "once"))
    assert program.process.wait() == 3 and "was lost" in program.process.err
    assert "was lost" in program.notes() and "an illegal memory access" in program.notes()
    case.check_rows(program.output)


def test_a_protein_that_fits_no_workers_device_is_left_for_the_second_pass(case: Case, tmp_path: Path) -> None:
    program = Program(case, tmp_path / "out.h5", 2, fails_for_long_ones)
    program.end()
    assert "left for later" in program.notes() and "was lost" not in program.notes()
    case.check_rows(program.output)


def test_without_any_worker_left_the_run_ends_and_another_goes_on(case: Case, tmp_path: Path) -> None:
    program = Program(case, tmp_path / "out.h5", 2, slower)
    program.wait_for_work()
    for pid in program.workers:
        os.kill(pid, signal.SIGKILL)
    err = program.end(2)
    assert "No worker is left" in err and "SIGKILL" in err and "same command again" in err
    assert case.embed(program.output)["resumed proteins"] > 0
    case.check_rows(program.output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_takes_its_workers_along_and_keeps_what_they_did(
    case: Case, tmp_path: Path, number: signal.Signals
) -> None:
    program = Program(case, tmp_path / "out.h5", 2, slower)
    program.wait_for_work()
    workers = program.workers
    asked = time.monotonic()
    for pid in [program.process.pid, *(workers if number == signal.SIGINT else [])]:  # as a terminal does
        os.kill(pid, number)
    err = program.end(128 + number)
    assert time.monotonic() - asked < 60 and number.name in err and "the same command resumes" in err
    assert gone(workers, 0.1)
    assert case.embed(program.output, workers=1)["resumed proteins"] > 0
    case.check_rows(program.output)


def test_a_killed_parent_leaves_no_worker_behind_and_no_lock(case: Case, tmp_path: Path) -> None:
    program = Program(case, tmp_path / "out.h5", 2, slower)
    program.wait_for_work()
    workers = program.workers
    program.process.kill()
    program.process.wait()
    assert workers and gone(workers, 30)
    case.embed(program.output)
    case.check_rows(program.output)


SLOW_TO_BEGIN = """
import sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "torch" and sys.argv[0] == "-c":
            time.sleep(60)
sys.meta_path.insert(0, Slow())
"""


@pytest.fixture
def hardly_begun(case: Case, tmp_path: Path) -> tuple[Program, list[int]]:
    """A run whose two workers import PyTorch, which takes long on a busy machine; it would wait for them for long."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_BEGIN)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    program = Program(case, tmp_path / "out.h5", 2, change=None, before=patient, PYTHONPATH=path)
    deadline = time.monotonic() + 300
    while len(program.workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = program.workers
    time.sleep(0.5)
    assert len(pids) == 2 and program.process.poll() is None
    return program, pids


def patient() -> None:
    workers.STOP_SECONDS = 300.0


def test_a_stop_does_not_wait_for_workers_that_have_hardly_begun(hardly_begun: tuple[Program, list[int]]) -> None:
    program, pids = hardly_begun
    os.kill(program.process.pid, signal.SIGINT)
    assert "SIGINT" in program.end(130)
    assert gone(pids, 0.1)


@pytest.mark.parametrize("before", [None, signal.SIGSTOP], ids=["running", "stopped"])
def test_workers_that_have_hardly_begun_end_with_their_parent(
    hardly_begun: tuple[Program, list[int]], before: signal.Signals | None
) -> None:
    """Whatever the parent does."""
    program, pids = hardly_begun
    if before is not None:
        os.kill(program.process.pid, before)
    program.process.kill()
    program.process.wait()
    assert gone(pids, 30)


@pytest.mark.slow
@pytest.mark.parametrize("moments", [4, pytest.param(200, marks=pytest.mark.soak)])
def test_a_kill_of_anybody_at_any_moment_is_made_good_by_the_same_command(
    case: Case, tmp_path: Path, moments: int
) -> None:
    dice = random.Random(moments)
    killed = 0
    for i in range(moments):
        workers = dice.choice((1, 2, 4))  # fifty packs take five seconds at least, however many do them
        program = Program(case, tmp_path / f"{i}.h5", workers, partial(slow, seconds=0.1 * workers))
        for _ in range(dice.randint(1, 3)):
            time.sleep(dice.uniform(0, 4))
            victims = [program.process.pid, *program.workers]
            if program.process.poll() is None:
                os.kill(dice.choice(victims), signal.SIGKILL)
                killed += 1
        if program.process.wait() != 0:
            case.embed(program.output, workers=dice.choice((1, 2)))
        case.check_rows(program.output)
        program.output.unlink()
    assert killed >= moments


def test_no_room_for_what_workers_are_told_is_one_message(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: Any, shared: Any) -> list[int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "_dump", full)
    with pytest.raises(UserError, match="No space left") as told:
        case.embed(tmp_path / "out.h5", workers=2)
    assert "TMPDIR" in told.value.remedy
    monkeypatch.undo()
    case.embed(tmp_path / "out.h5")
    case.check(tmp_path / "out.h5")


def test_when_the_disk_fails_the_workers_end_with_the_run(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    begin = workers._begun
    monkeypatch.setattr(workers, "_begun", lambda *arguments: begun.append(begin(*arguments)) or begun[-1])
    monkeypatch.setattr(os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    monkeypatch.setattr("virnucpro_cli.engine.placer.COMMIT_SECONDS", 0.0)
    with pytest.raises(UserError, match="Input/output"):
        case.embed(tmp_path / "out.h5", workers=2)
    assert len(begun) == 2 and all(worker.process.poll() is not None for worker in begun)
    monkeypatch.undo()
    case.embed(tmp_path / "out.h5")
    case.check(tmp_path / "out.h5")


def test_a_full_disk_in_a_worker_ends_the_run_with_its_own_words(case: Case, tmp_path: Path) -> None:
    program = Program(case, tmp_path / "out.h5", 2, finds_the_disk_full)
    err = program.end(2)
    assert "No space is left for" in err and "resume" in err
    case.embed(program.output)
    case.check_rows(program.output)


def test_an_input_that_changes_meanwhile_is_refused(case: Case, tmp_path: Path) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_bytes(case.fasta.read_bytes())
    other = Case.__new__(Case)
    other.fasta, other.model = fasta, case.model
    program = Program(other, tmp_path / "out.h5", 2, slower)
    program.wait_for_work()
    with open(fasta, "a") as file:
        file.write(">late\nMKV\n")
    assert "in.fasta was changed" in program.end(2)


def test_devices_are_one_a_process_and_shared_in_turn() -> None:
    cpu = torch.device("cpu")
    assert devices.resolve_devices("cpu", "auto") == ([cpu], [])
    assert devices.resolve_devices("cpu", 3) == ([cpu] * 3, [])
    with pytest.raises(UserError, match="--device"):
        devices.resolve_devices("cuda:0,", "auto")


def test_gpus_of_one_kind_are_used_and_others_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(name: str, option: str = "") -> Any:
        return torch.device("cuda", 0 if name in ("auto", "cuda") else int(name.partition(":")[2]))

    monkeypatch.setattr(devices, "resolve_device", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4" if device.index == 3 else "H100")
    gpus = [torch.device("cuda", i) for i in range(4)]
    for name in ("auto", "cuda"):
        found, notes = devices.resolve_devices(name, "auto")
        assert found == gpus[:3] and "only the 3 of 4 GPUs that are H100" in notes[0]
    assert devices.resolve_devices("cuda:0,2", "auto") == ([gpus[0], gpus[2]], [])
    assert devices.resolve_devices("cuda:1", "auto") == ([gpus[1]], [])
    assert devices.resolve_devices("cuda:1,2", 4)[0] == [gpus[1], gpus[2]] * 2
    with pytest.raises(UserError, match="names a GPU twice"):
        devices.resolve_devices("cuda:1,1", "auto")
