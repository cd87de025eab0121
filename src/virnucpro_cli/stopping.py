"""Signals that stop a run, one way for all commands: at once, or at the end of a block that must not be interrupted.

Threads of this process are here too, since what they have not begun must not hold up a stop.

Python raises the exception of a signal handler wherever the program is. In a callback of a compiled library, or in a
destructor, it is swallowed, or ends the process. Such blocks are `held`; for others the handler looks again a moment
later. Where Python's own threads are begun or told something, it would leave a lock taken that a thread then waits for
for ever: there too the handler looks again. And a signal that comes while Python is on its way into a wait, or that
the system gives to another thread, does not end the wait: a thread that is told of it does.
"""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

from virnucpro_cli.errors import STOP_SIGNALS, Stopped

AGAIN_SECONDS = 0.2
WHOLE = frozenset(
    each.__code__
    for each in (
        ThreadPoolExecutor.submit, threading.Thread.start, threading.Condition.__enter__, threading.Condition.__exit__,
    )
)  # fmt: skip
"""Python's functions that are as good as instantaneous, and leave a lock or a thread behind if they are interrupted."""


class Stopper:
    """Turns a signal into Stopped. A Stopped on its way out is not disturbed; a swallowed one is raised again."""

    def __init__(self) -> None:
        self.signum: int | None = None  # of the first signal
        self.holding = 0
        self.wrote = False
        self.over = False
        self._raised: weakref.ref[Stopped] | None = None
        self._told, self._telling = os.pipe()
        self._print_unraisable = sys.unraisablehook

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None and not self.over:
            self.signum = signum
        self.again(signum, frame)

    def again(self, signum: int, frame: FrameType | None) -> None:
        if not self.holding and not _in_whole(frame):
            self.check()

    def check(self) -> None:
        """Raise Stopped if a signal came, and none is on its way out."""
        on_its_way = self._raised is not None and self._raised() is not None
        if self.signum is None or self.over or on_its_way:
            return
        stop = Stopped(self.signum)
        self._raised = weakref.ref(stop)
        try:
            raise stop
        finally:
            del stop  # nothing else keeps it alive when it is swallowed

    def begin(self) -> None:
        """Have signals told to a thread, and a swallowed Stopped not printed: it is raised again."""
        sys.unraisablehook = self._unraisable
        os.set_blocking(self._telling, False)
        signal.set_wakeup_fd(self._telling, warn_on_full_buffer=False)
        threading.Thread(target=self._remind, name="stop", daemon=True).start()

    def _unraisable(self, what: "sys.UnraisableHookArgs") -> None:
        if not issubclass(what.exc_type, Stopped):
            self._print_unraisable(what)

    def _remind(self) -> None:
        """Interrupt the main thread now and then, from the first signal that stops until the command is over."""
        main = threading.main_thread().ident
        assert main is not None
        while (told := os.read(self._told, 1)) and told[0] not in STOP_SIGNALS:
            pass
        while told and not self.over:
            signal.pthread_kill(main, signal.SIGALRM)
            time.sleep(AGAIN_SECONDS)
        os.close(self._told)

    def end(self) -> None:
        """The command is over: a signal that comes now finds nothing to stop."""
        if not self.over:
            self.over = True
            signal.set_wakeup_fd(-1)
            sys.unraisablehook = self._print_unraisable
            os.close(self._telling)


def _in_whole(frame: FrameType | None) -> bool:
    """Whether a frame is of a function that is not to be interrupted, or was called by one."""
    while frame is not None and frame.f_code not in WHOLE:
        frame = frame.f_back
    return frame is not None


_stopper: Stopper | None = None


def install() -> Stopper:
    """Have signals stop this process's command."""
    global _stopper
    _stopper = Stopper()
    _stopper.begin()
    signal.signal(signal.SIGALRM, _stopper.again)
    on_stop_signals(_stopper)
    return _stopper


def on_stop_signals(handler: Any) -> None:
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(signum, handler)


def check() -> None:
    """A safe point in a block that is held: raise what a signal asked for."""
    if _stopper is not None and threading.current_thread() is threading.main_thread():
        _stopper.check()


def wrote() -> None:
    """Note that a file that the user asked for has its name: a stop that comes later cannot say that nothing has."""
    if _stopper is not None:
        _stopper.wrote = True


@contextmanager
def held() -> Iterator[None]:
    """Let no signal interrupt the block; one that comes is acted upon at its end, or where the block calls `check`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler ever runs
    elif _stopper is not None and not _stopper.over:
        stopper = _stopper
        stopper.holding += 1
        try:
            yield
        finally:
            stopper.holding -= 1
            if not stopper.holding:
                stopper.check()
    else:
        with _interrupt_held():
            yield


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Hold Ctrl-C back in a program that is not ours, and give it to its own handler afterwards."""
    before, seen = signal.getsignal(signal.SIGINT), list[int]()
    if not callable(before):
        yield
        return
    try:
        signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)


def stop_in(error: BaseException | None) -> BaseException | None:
    """The stop that an error was made of: compiled code turns what a signal handler raises into errors of its own."""
    while error is not None and not isinstance(error, Stopped | KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def resumable(is_so: bool) -> Iterator[None]:
    """Have a stop in the block say whether the same command goes on from what it leaves."""
    try:
        yield
    except BaseException as error:
        if (stop := stop_in(error)) is not None:
            stop.resumable = is_so  # type: ignore[attr-defined]
        raise


def cores() -> int:
    """How many processors this process may use: in a container, a batch job or under taskset not all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(most: int, name: str = "") -> Iterator[ThreadPoolExecutor]:
    """Threads for a block, one for each of `cores` and at most so many. What has not begun at its end never does."""
    pool = ThreadPoolExecutor(min(cores(), most), name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
