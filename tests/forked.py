"""Workers forked from a test's program, which has imported the libraries: a fresh Python takes two seconds of a processor to."""

import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from children import Child
from virnucpro_cli.errors import STOP_SIGNALS
from virnucpro_cli.processes import BOUND


def workers(change: Callable[[], None] | None = None) -> None:
    """From now on, workers of this process are forked. change: what is done in each before it begins."""
    from virnucpro_cli import waking

    waking.started = partial(Worker, change)  # type: ignore[assignment]


def embed(*paths: Path, before: Callable[[], None] | None = None, **options: Any) -> None:
    """As `embed_fasta` with several such workers, in a process of its own. before: what changes the program first."""
    run = Child(_embed, paths, before, {"workers": 2, **options}, TOKENIZERS_PARALLELISM="false")
    assert run.wait() == 0, run.err


def _embed(paths: tuple[Path, ...], before: Callable[[], None] | None, options: dict[str, Any]) -> None:
    from virnucpro_cli.embed import embed_fasta

    if before is not None:
        before()
    workers()
    embed_fasta(*paths, **options)


class Worker:
    """What `processes.started` returns, as far as workers need it."""

    def __init__(self, change: Callable[[], None] | None, code: str, descriptors: Collection[int], **streams: int):
        of_stops = [each for each in threading.enumerate() if each.name == "stop"]  # it has no lock while it waits
        others = len(os.listdir("/proc/self/task")) - 1 - len(of_stops)
        assert not others, "the lock of another thread would stay locked in the worker"
        self.returncode: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run(change, BOUND.format(parent=parent) + code, descriptors)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked worker", timeout)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _run(change: Callable[[], None] | None, code: str, descriptors: Collection[int]) -> None:
    """The whole life of a worker, with the sockets, the group and the mask of one that is started afresh."""
    gc.freeze()  # what the parent has open is not closed by its objects here
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.setpgid(0, 0)
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if number not in descriptors and stat.S_ISSOCK(os.fstat(number).st_mode):
                os.close(number)
    nothing, ended = os.open(os.devnull, os.O_RDWR), 1
    for number in (0, 1):
        os.dup2(nothing, number)
    try:
        if change is not None:
            change()
        exec(code, {"__name__": "__main__"})
        ended = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(ended)
