"""Real processes, forked from one that has imported the libraries: a tenth of a second each, where Python and PyTorch take two."""

import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from virnucpro_cli.errors import STOP_SIGNALS

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["virnucpro_cli.__main__", "virnucpro_cli.cli", "virnucpro_cli.embed", "virnucpro_cli.exchange.export", "pytest",
     "virnucpro_cli.predict", "tokenizers", "safetensors.torch", "huggingface_hub.hf_api", "filelock", "typer._adapters",
     "triton.runtime.interpreter", "hypothesis"]
)  # fmt: skip


class Child:
    """A function in a process of its own, with this process's environment and folder, and files for its standard streams.

    shown: a device for its output and errors in place of the files; out: for its output alone.
    variables: of its environment, in place of this one's.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any, folder: Path | None = None, stdin: bytes = b"",
                 shown: str = "", out: str = "", **variables: str):  # fmt: skip
        self._streams: list[IO[bytes]] = [tempfile.NamedTemporaryFile() for _ in range(3)]  # noqa: SIM115
        self._streams[0].write(stdin)
        self._streams[0].flush()
        stdin_name, out_name, err_name = (stream.name for stream in self._streams)
        names = [stdin_name, out or shown or out_name, shown or err_name]
        environment = {**os.environ, **variables}
        given = target, arguments, str(folder or Path.cwd()), environment, names
        self._process = CHILDREN.Process(target=_begin, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 300) -> int:
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        assert code is not None, f"it did not end within {seconds} seconds: {self.err}"
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return Path(self._streams[1].name).read_text()

    @property
    def err(self) -> str:
        return Path(self._streams[2].name).read_text()


def program(*arguments: Any, before: Callable[[], None] | None = None, **more: Any) -> Child:
    """`virnucpro` with these arguments. before: what changes the program first."""
    return Child(_program, [str(each) for each in arguments], before, **more)


def python(code: str, *arguments: Any, **more: Any) -> Child:
    """`python -c` with this code and these arguments, but for its imports."""
    return Child(_python, code, [str(each) for each in arguments], **more)


def no_reader(number: int) -> None:
    """A stream of this process becomes a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)


def closed(number: int) -> None:
    """A stream of this process is as Python has it where it is started with `>&-` or `2>&-`."""
    os.close(number)
    setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def killed_at(run: Callable[..., object], options: Mapping[str, Any], at: int, told: str) -> None:
    """A run that ends without a word at the call number `at` of Python code in any of its threads, and commits often.

    told: a file for the number of calls of a run to its end.
    """
    import torch

    from virnucpro_cli.engine import placer

    calls = itertools.count(1)

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    placer.COMMIT_SECONDS = 0.01
    threading.setprofile(count)
    sys.setprofile(count)
    run(**options)
    sys.setprofile(None)
    Path(told).write_text(str(next(calls)))


def until(true: Callable[[], object], child: Child, seconds: float = 300) -> None:
    """Wait for something that a running child brings about."""
    deadline = time.monotonic() + seconds
    while not true():
        assert child.poll() is None and time.monotonic() < deadline, f"{child.poll()}: {child.err}"
        time.sleep(0.002)


def _begin(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    folder: str,
    environment: Mapping[str, str],
    names: list[str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in enumerate(names):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    try:
        target(*arguments)
    except Exception:
        with suppress(OSError, AttributeError):
            traceback.print_exc()
        raise
    finally:  # Python ends well where its errors cannot be shown; multiprocessing does not
        with suppress(OSError, AttributeError):
            sys.stderr.flush()
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _program(arguments: list[str], before: Callable[[], None] | None) -> None:
    from virnucpro_cli.__main__ import main

    if before is not None:
        before()
    sys.argv = ["virnucpro", *arguments]
    main()


def _python(code: str, arguments: list[str]) -> None:
    module = ModuleType("__main__")
    sys.modules["__main__"], sys.argv = module, ["-c", *arguments]
    exec(code, vars(module))
