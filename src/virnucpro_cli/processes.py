"""Helper processes on this host: a fresh Python each, which calls functions for its parent and cannot outlive it."""

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
    calls = _Calls(function, descriptors)
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
    """Calls of a function, from several threads; each has a helper of its own."""

    def __init__(self, function: Callable[..., Any], descriptors: Collection[int]):
        self.function, self.descriptors, self.stopped = function, descriptors, False
        self._own, self._all = threading.local(), list["subprocess.Popen[bytes]"]()

    def __call__(self, task: tuple[Any, ...]) -> Any:
        try:
            if not hasattr(self._own, "helper"):
                code = "from virnucpro_cli.processes import serve; serve()"
                streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                self._own.helper = started(code, self.descriptors, **streams)
                self._all.append(self._own.helper)
                _widen(self._own.helper.stdout)
            pickle.dump((self.function, task), self._own.helper.stdin, pickle.HIGHEST_PROTOCOL)
            self._own.helper.stdin.flush()
            went_well, found = pickle.load(self._own.helper.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):  # it could not be started, or has died
            return None if self.stopped else self.function(*task)
        if not went_well:
            raise found
        return found

    def kill(self) -> None:
        """End all helpers, whatever they are at."""
        self.stopped = True
        for helper in self._all:
            helper.kill()

    def close(self) -> None:
        """End what is left, once no thread calls."""
        self.kill()
        for helper in self._all:
            with suppress(OSError):  # what it was still to be told
                helper.communicate()


def _widen(pipe: Any) -> None:
    """Let a pipe hold much, if the system allows it: each time that it is full, two processes wait for each other."""
    with suppress(AttributeError, OSError):  # Linux alone has it, and limits it
        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def serve() -> None:
    """The whole life of a helper: calls come on standard input, results go to what was standard output."""
    tasks, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(EOFError, BrokenPipeError):
        while True:
            function, task = pickle.load(tasks)
            try:
                answer = True, function(*task)
            except Exception as error:
                answer = False, error
            pickle.dump(answer, results, pickle.HIGHEST_PROTOCOL)
            results.flush()
