"""Files opened for a command: first in a child process, since HDF5 can crash or loop in a damaged file."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from virnucpro_cli.errors import STOP_SIGNALS
from virnucpro_cli.store.checked import damaged
from virnucpro_cli.store.reader import EmbeddingFile
from virnucpro_cli.store.schema import NAME_BLOCK

OPENING_SECONDS, OPENING_RATE = 30, 10_000_000
"""Seconds that opening a file may take, and bytes of it for which there is a second more."""
LOST: dict[int, str] = {
    signal.SIGALRM: "does not come back", signal.SIGSEGV: "crashes", signal.SIGBUS: "crashes", signal.SIGABRT: "crashes",
    signal.SIGFPE: "crashes",
}  # fmt: skip


def opened(path: str | Path) -> EmbeddingFile:
    """The file at `path` for a command, with all that its fingerprint promises. Raises UserError if it is not such a file."""
    _try_in_a_child(Path(path).absolute())
    file = EmbeddingFile(path)
    with ExitStack() as closing:
        closing.push(file)
        file.settings  # noqa: B018  (it raises)
        closing.pop_all()
    return file


def _try_in_a_child(path: Path) -> None:
    """Raise UserError if HDF5 crashes or does not come back when it opens the file, as it may in a damaged one."""
    pid = os.fork()
    if pid == 0:
        try:
            for each in (*LOST, *STOP_SIGNALS):
                signal.signal(each, signal.SIG_DFL)
            signal.alarm(OPENING_SECONDS + path.stat().st_size // OPENING_RATE)
            with EmbeddingFile(path) as file:
                file.names_of(0, NAME_BLOCK)
        finally:
            os._exit(0)  # an error is told by the process that asks
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and (signum := os.WTERMSIG(status)) in LOST:
        raise damaged(path, f"the HDF5 library {LOST[signum]} when it reads it")
