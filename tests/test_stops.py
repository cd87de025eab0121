"""Signals at random moments, for every command: each stops it with its exit code, and the same command goes on from there."""

import functools
import gc
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from children import CHILDREN, program
from conftest import write_model
from test_faults import datasets
from virnucpro_cli import cli, stopping
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine.placer import Placer
from virnucpro_cli.errors import STOP_SIGNALS, UserError
from virnucpro_cli.model import weights
from virnucpro_cli.store import Store

CONTIGS = Path(__file__).parent.parent / "examples" / "contigs.fna"
SHARDS = 2


def commands(there: Path, out: Path) -> dict[str, list[str]]:
    """A command line each. there: what exists already; out: a new folder."""
    model = ["--model", str(there / "model"), "--device", "cpu"]
    made = {
        "embed": ["embed", there / "in.fasta", "-o", out / "out.h5", "--pool", "mean,residue", *model],
        "contigs": ["embed", CONTIGS, "-o", out / "out.h5", "--from", "contigs", "--genes", "six-frame", *model],
        "extract": ["extract", there / "model", there / "in.fasta", out / "pt", "--include", "mean", "per_tok"],
        "merge": ["merge", out / "shards.h5"],
        "import": ["import", there / "keyed.h5", "-o", out / "i.h5", "--fasta", there / "in.fasta", "--model", there / "model"],
        "search": ["search", there / "whole.h5", "--query", "protein_1"],
        "verify": ["verify", there / "whole.h5"],
        "inspect": ["inspect", there / "whole.h5"],
    }  # fmt: skip
    for name in ("fair-esm", "keyed-h5", "npy", "broad", "anndata"):
        made[f"export {name}"] = ["export", there / "whole.h5", "--to", name, "-o", out / f"exported.{name}"]
    return {name: [str(part) for part in line] for name, line in made.items()}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("there")
    write_model(folder / "model")
    generator = random.Random(0)
    proteins = (
        f">protein_{i}\n{''.join(generator.choices('ACDEFGHIKLMNPQRSTVWY', k=20 + i % 90))}\n" for i in range(120)
    )
    (folder / "in.fasta").write_text("".join(proteins))
    embed_fasta(str(folder / "in.fasta"), str(folder / "whole.h5"), model=str(folder / "model"), device="cpu")
    for n in range(1, SHARDS + 1):
        embed_fasta(
            str(folder / "in.fasta"), str(folder / "shards.h5"), model=str(folder / "model"), device="cpu",
            shard=f"{n}/{SHARDS}",
        )  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["export", str(folder / "whole.h5"), "--to", "keyed-h5", "-o", str(folder / "keyed.h5")])
    return folder


@pytest.fixture(autouse=True)
def signal_handlers() -> Any:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def child(line: list[str], at: int, answer: Any, trap: Callable[[], None] | None = None) -> None:
    """Run a command, with SIGTERM at the event number `at` of its Python code; answers with how many events there were.

    trap: sets up another moment for the signal.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    events = 0

    def count(*_: Any) -> None:
        nonlocal events
        events += 1
        if events == at:
            signal.raise_signal(signal.SIGTERM)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if trap is None:
        sys.setprofile(count)
    else:
        trap()
    try:
        cli.main(line)
    except SystemExit as end:
        sys.setprofile(None)
        seen = stopping._stopper is not None and stopping._stopper.signum is not None
        answer.send((events, end.code, seen))


def ran(line: list[str], at: int = 0, trap: Callable[[], None] | None = None) -> tuple[int, int, bool]:
    """Events, exit code, and whether the command saw the signal."""
    answer, question = CHILDREN.Pipe(duplex=False)
    process = CHILDREN.Process(target=child, args=(line, at, question, trap))
    process.start()
    process.join(300)
    ended = process.exitcode
    process.kill()
    assert ended is not None, "it said that it ended, and did not" if answer.poll() else "it did not end"
    return answer.recv() if answer.poll() else (0, ended, True)


def prepared(there: Path, out: Path) -> Path:
    out.mkdir()
    for shard in there.glob("shards*.h5"):
        os.link(shard, out / shard.name)
    return out


def at_the_write(number: int) -> None:
    """A signal at a write of the layout, which HDF5 calls for."""
    real, calls = os.pwrite, 0

    def pwrite(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == number:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    os.pwrite = pwrite


class Dying:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def in_a_destructor() -> None:
    """A signal where Python itself swallows what a handler raises, and prints it."""
    begin = Placer.__init__

    def placer(*arguments: Any, **more: Any) -> None:
        Dying()
        begin(*arguments, **more)

    Placer.__init__ = placer  # type: ignore[method-assign]


def in_compiled_code() -> None:
    """A signal in a library whose compiled code makes an error of its own of what a handler raises."""

    def load_file(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise SystemError("returned a result with an exception set") from error

    weights.load_file = load_file


def among_threads(event: str, *functions: Callable[..., object]) -> None:
    """A signal in functions of Python's own that call each other, where a thread is begun that has rows to write.

    It writes none before the signal.
    """
    codes, came, place_runs = {each.__code__ for each in functions}, threading.Event(), Store.place_runs  # type: ignore[attr-defined]

    def at_the_moment(frame: FrameType, what: str, _: Any) -> None:
        if what == event and codes <= {each.f_code for each, _ in traceback.walk_stack(frame)}:
            sys.setprofile(None)
            came.set()
            signal.raise_signal(signal.SIGTERM)

    def late(*arguments: Any) -> None:
        came.wait(60)
        place_runs(*arguments)

    def placed(*arguments: Any) -> Any:
        sys.setprofile(None if came.is_set() else at_the_moment)
        return place_residues(*arguments)

    Store.place_runs = late  # type: ignore[method-assign]
    place_residues, Placer._place_residues = Placer._place_residues, placed  # type: ignore[method-assign]


AMONG_THREADS = {
    f"{event}: {', '.join(each.__qualname__ for each in functions)}": functools.partial(
        among_threads, event, *functions
    )
    for event, *functions in (
        ("call", threading.Thread.start),
        ("c_return", threading.Thread.start, threading.Condition.__enter__),
        ("call", threading.Thread.start, threading.Condition.__exit__),
        ("c_call", threading.Thread.start, threading.Condition.wait),
        ("c_return", Future.result, threading.Condition.__enter__),
    )
}
TRAPS: dict[str, Callable[[], None]] = {
    **{f"write {n} of the layout": functools.partial(at_the_write, n) for n in (1, 2, 3, 5, 8, 12, 17, 23, 30)},
    **AMONG_THREADS,
    "a destructor": in_a_destructor,
    "loading weights": in_compiled_code,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_signal_that_a_library_would_swallow_stops_the_run_too(there: Path, tmp_path: Path, trap: str) -> None:
    line = commands(there, tmp_path)["embed"]
    _, code, seen = ran(line, trap=TRAPS[trap])
    assert seen and code == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("*new"))
    assert ran(line)[1] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5"]


def test_a_stop_that_python_swallows_is_not_printed(there: Path, tmp_path: Path) -> None:
    run = program(*commands(there, tmp_path)["embed"], before=in_a_destructor)
    assert run.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in run.err and "Traceback" not in run.err and "ignored" not in run.err


def with_room_for(files: int) -> None:
    """Only so many files more can be opened."""
    limit = max(map(int, os.listdir("/proc/self/fd"))) + files
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@pytest.mark.parametrize("files", range(6))
def test_a_program_that_can_open_too_few_files_says_so(there: Path, tmp_path: Path, files: int) -> None:
    run = program(*commands(there, tmp_path)["embed"], before=functools.partial(with_room_for, files))
    code = run.wait()
    assert code == 0 or (code == 2 and "files are open" in run.err and "ulimit -n" in run.err), run.err


def with_room_for_threads(threads: int) -> None:
    """Only so many threads more can begin."""
    real, left = threading._start_new_thread, itertools.repeat(None, threads)  # type: ignore[attr-defined]

    def begin(*arguments: Any) -> int:
        for _ in left:
            begun: int = real(*arguments)
            return begun
        raise RuntimeError("can't start new thread")

    threading._start_new_thread = begin  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", range(6))
def test_a_program_that_can_begin_too_few_threads_says_so(there: Path, tmp_path: Path, threads: int) -> None:
    run = program(*commands(there, tmp_path)["embed"], before=functools.partial(with_room_for_threads, threads))
    code = run.wait()
    assert code == 0 or (code == 2 and "no more threads" in run.err and "ulimit -u" in run.err), run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("what", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"])
@pytest.mark.parametrize("number", [1, 2, 5, 12, 23])
def test_files_opened_after_a_layout_that_failed_are_untouched(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, what: BaseException
) -> None:
    """In a process that lives on: no HDF5 handle writes to a descriptor that is another file's now."""
    real, calls = os.pwrite, 0

    def failing(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == number:
            raise what
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises((UserError, KeyboardInterrupt)) as failed:
            embed_fasta(str(there / "in.fasta"), str(tmp_path / "out.h5"), model=str(there / "model"), device="cpu")
    assert calls >= number and list(tmp_path.iterdir()) == []
    opened = [open(tmp_path / f"{n}.txt", "w+b", buffering=0) for n in range(10)]  # noqa: SIM115
    for file in opened:
        file.write(b"mine")
    del failed
    gc.collect()
    for file in opened:
        file.seek(0)
        assert file.read() == b"mine"
        file.close()


ANNDATA = pytest.param(12, marks=pytest.mark.slow)
"""The seed of `export anndata`, whose library takes a second to import."""


@pytest.mark.parametrize(
    "seed", [*range(12), ANNDATA, 13, *(pytest.param(n, marks=pytest.mark.soak) for n in range(14, 200))]
)
def test_a_signal_at_any_moment_stops_any_command_and_the_same_command_goes_on(
    there: Path, tmp_path: Path, seed: int
) -> None:
    out = prepared(there, tmp_path / "out")
    names = list(commands(there, out))
    name, generator = names[seed % len(names)], random.Random(seed)
    whole = prepared(there, tmp_path / "whole")
    events, expected, _ = ran(commands(there, whole)[name])
    assert expected in (0, 3)
    line, moment = commands(there, out)[name], generator.randrange(1, events)
    _, code, seen = ran(line, moment)
    if seen:
        assert code in (128 + signal.SIGTERM, -signal.SIGTERM), f"{name}, event {moment} of {events}"
    assert ran([*line, "--overwrite"] if name.startswith("export") else line)[1] == expected
    left = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert left == sorted(path.relative_to(whole) for path in whole.rglob("*"))
    for path in whole.glob("*.h5"):
        if name in ("embed", "contigs", "merge", "import"):
            first, second = datasets(path), datasets(out / path.name)
            assert all(first[each].tobytes() == second[each].tobytes() for each in first)


def told_to_another_thread() -> None:
    """A signal that interrupts no wait of the main thread: the system may give it to any."""

    def later() -> None:
        time.sleep(2)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    threading.Thread(target=later, daemon=True).start()


def test_a_signal_that_does_not_interrupt_a_wait_ends_it_too(there: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    os.mkfifo(silent)
    writer = os.open(silent, os.O_RDWR)
    line = ["embed", str(silent), "-o", str(tmp_path / "out.h5"), "--model", str(there / "model"), "--device", "cpu"]
    run = program(*line, before=told_to_another_thread)
    assert run.wait(60) == 128 + signal.SIGTERM and "stopped by SIGTERM" in run.err
    os.close(writer)


@pytest.mark.parametrize("place", ["virnucpro_cli.cli.at_home", "virnucpro_cli.cli._check_current_folder"])
def test_a_stop_before_the_command_has_begun_is_orderly(place: str) -> None:
    module, _, name = place.rpartition(".")
    program = f"import os, {module} as m; m.{name} = lambda *a: os.kill(os.getpid(), 15); m.main(['status', 'x'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 143 and "stopped by SIGTERM" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt_while_the_program_is_imported_is_no_traceback() -> None:
    program = "import sys; sys.modules['typer'] = None; import virnucpro_cli.__main__ as m; import builtins; real = builtins.__import__\n"
    program += "def stopping(name, *of):\n    if name == 'typer': raise KeyboardInterrupt\n    return real(name, *of)\n"
    program += "builtins.__import__ = stopping; m.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr == "stopped by SIGINT; nothing was written.\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(12, "Cannot allocate memory"), ImportError("x.so: failed to map segment from x")]
)
def test_a_system_that_gives_no_more_memory_is_told_as_such(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._failed(error) == 2
    assert "no more memory" in capsys.readouterr().err
    assert cli._failed(UserError(f"x.fa cannot be read: {error} Cannot allocate memory.")) == 2
    assert "x.fa cannot be read" in capsys.readouterr().err
