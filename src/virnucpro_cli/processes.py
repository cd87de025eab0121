"""Processes on this host that cannot outlive their parent: a fresh Python, or helpers that call functions for it."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib import import_module
from itertools import chain
from multiprocessing.connection import Connection, Pipe
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from virnucpro_cli.errors import STOP_SIGNALS

BOUND = """
import ctypes, os, threading, time
try:
    ctypes.CDLL(None).prctl(1, 9)
except AttributeError:
    pass
def end_with_parent():
    while os.getppid() == {parent}:
        time.sleep(0.5)
    os.kill(os.getpid(), 9)
threading.Thread(target=end_with_parent, daemon=True).start()
"""
"""The first lines of a process that must not outlive its parent, however that ends: another run may soon hold the file.
The kernel sees to it where it can (PR_SET_PDEATHSIG, SIGKILL), elsewhere a thread."""

PIPE_BYTES = 1 << 20
"""Room of a pipe for results: the most that Linux gives without asking."""

T = TypeVar("T")


def started(code: str, descriptors: Collection[int], **streams: Any) -> "subprocess.Popen[bytes]":
    """A fresh Python that runs the code, bound to this process, and inherits the descriptors.

    Whoever sends a stop signal to all means this process, which ends the other. That one inherits the mask: a handler
    of its own would come too late for a signal that meets Python while it starts. Raises OSError if it cannot start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        command = [sys.executable, "-P", "-c", BOUND.format(parent=os.getpid()) + code]
        return subprocess.Popen(command, pass_fds=list(descriptors), process_group=0, **streams)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_order(
    function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], helpers: int, descriptors: Collection[int] = ()
) -> Iterator[T]:
    """Results of the function for each task, in their order, by so many helpers; what they raise is raised in its turn.

    The function is one of a module, tasks and results can be pickled. A call whose helper dies is made here.
    """
    calls = _Calls(function, helpers, descriptors)
    with ThreadPoolExecutor(helpers, "helper") as threads:
        try:
            futures = deque(threads.submit(calls, task) for task in tasks)
            while futures:  # no result is kept once it is given
                yield futures.popleft().result()
        finally:
            calls.kill()
            threads.shutdown(cancel_futures=True)
            calls.close()


class _Calls:
    """Calls of a function, from several threads; each has a helper of its own.

    Helpers are forks of a fresh Python that has read the function's module, so that libraries are read once.
    """

    def __init__(self, function: Callable[..., Any], helpers: int, descriptors: Collection[int]):
        self.function, self.stopped = function, False
        self._first: subprocess.Popen[bytes] | None = None
        self._own, self._free = threading.local(), SimpleQueue[tuple[Connection, Connection]]()
        self._ours, ends = ExitStack(), list[tuple[int, int]]()
        with suppress(OSError), ExitStack() as theirs:  # whoever has no helper makes the call here
            for _ in range(helpers):
                (tasks, to), (answers, results) = Pipe(duplex=False), Pipe(duplex=False)
                _widen(results)
                self._free.put((self._ours.enter_context(to), self._ours.enter_context(answers)))
                ends.append((theirs.enter_context(tasks).fileno(), theirs.enter_context(results).fileno()))
            code = f"from virnucpro_cli.processes import serve; serve({function.__module__!r}, {ends})"
            self._first = started(code, [*chain(*ends), *descriptors], stdin=subprocess.DEVNULL)

    def __call__(self, task: tuple[Any, ...]) -> Any:
        try:
            if not hasattr(self._own, "helper"):
                self._own.helper = self._free.get_nowait()
            to, answers = self._own.helper
            to.send((self.function, task))
            went_well, found = answers.recv()
        except (OSError, EOFError, Empty, pickle.UnpicklingError):  # it could not be started, or has died
            return None if self.stopped else self.function(*task)
        if not went_well:
            raise found
        return found

    def kill(self) -> None:
        """End all helpers, whatever they are at."""
        self.stopped = True
        if self._first is not None:
            with suppress(OSError):
                os.killpg(self._first.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of what is left, once no thread calls."""
        self._ours.close()
        if self._first is not None:
            self._first.wait()


def _widen(pipe: Connection) -> None:
    """Let a pipe hold much, if the system allows it: each time that it is full, two processes wait for each other."""
    with suppress(AttributeError, OSError):  # Linux alone has it, and limits it
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def serve(module: str, ends: list[tuple[int, int]]) -> None:
    """The whole life of the process that helpers are forked from.

    ends: for each helper the descriptor that its calls come from, and the one that its results go to.
    """
    os.dup2(2, 1)
    import_module(module)
    warnings.simplefilter("ignore")  # of forks beside the thread that looks for the parent
    first = os.getpid()
    with suppress(OSError):  # whoever has no helper makes the call itself
        for own in ends:
            if not os.fork():
                try:
                    for end in chain(*(each for each in ends if each != own)):
                        os.close(end)
                    exec(BOUND.format(parent=first), {})
                    _help(*map(Connection, own))
                finally:
                    os._exit(0)
    for end in chain(*ends):
        os.close(end)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _help(tasks: Connection, results: Connection) -> None:
    """The life of a helper, which ends with its calls."""
    with suppress(EOFError, BrokenPipeError):
        while True:
            function, task = tasks.recv()
            try:
                answer = True, function(*task)
            except Exception as error:
                answer = False, error
            results.send(answer)
