"""The words for users when something is wrong, and the exit codes of the program."""

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

EXIT_OK = 0
EXIT_GATE_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_SOME_SKIPPED = 3
EXIT_INTERNAL = 70
EXIT_SIGNAL_BASE = 128
MOST_OF_A_MESSAGE = 2000
_LONG_WORD = re.compile(r"\S{300,}")
STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip
"""Signals that ask for an orderly stop: by a user, a lost terminal, or a batch system (SIGUSR1, SIGUSR2)."""


def in_a_line(error: BaseException) -> str:
    """The kind of an error of another project's code, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def printable(text: str) -> str:
    """Text without characters that would steer a terminal, but for ends of lines."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def counted(n: int, one: str, several: str = "") -> str:
    """`1,234 proteins`, `1 protein`; several: the plural, if it is no `s` at the end."""
    return f"{n:,} {one if n == 1 else several or one + 's'}"


def shell_word(path: str | Path) -> str:
    """A path as a word of a command, which no shell splits and no program takes for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def shortened(text: str) -> str:
    """A message with the middle of very long words cut out, and its own middle if it is longer than any of ours."""
    text = _LONG_WORD.sub(lambda word: f"{word[0][:200]}...{word[0][-40:]}", text)
    return text if len(text) <= MOST_OF_A_MESSAGE else f"{text[:1500]} ... {text[-300:]}"


class UserError(Exception):
    """Something the user can put right: what happened (with the place), and the remedy. Both are shortened."""

    def __init__(self, what: str, remedy: str = ""):
        what, remedy = shortened(what), shortened(remedy)
        super().__init__(what if not remedy else f"{what}\n{remedy}")
        self.what = what
        self.remedy = remedy


class Missing(UserError, KeyError):
    """There is no such record or dataset."""

    __str__ = Exception.__str__  # a KeyError shows its text in quotes


def joined(errors: Sequence[UserError]) -> UserError:
    """One error that says what several say, each once."""
    whats = dict.fromkeys(each.what for each in errors)
    remedies = dict.fromkeys(each.remedy for each in errors if each.remedy)
    return UserError("\n".join(whats), "\n".join(remedies))


class NoProteins(UserError):
    """No contig has a protein. contigs: their names, in order."""

    def __init__(self, what: str, remedy: str, contigs: list[str]):
        super().__init__(what, remedy)
        self.contigs = contigs


def absent(path: str) -> str:
    """The words for a path that does not open because nothing is there: a name, or a link that leads nowhere."""
    if os.path.islink(path):
        return f"{path} is a link to {os.readlink(path)}, which is not there"
    return f"There is no file {path}"


def unread(path: str, error: OSError) -> str:
    """Why a path that exists by its name does not open: a link that leads nowhere, or the system's words."""
    lost = isinstance(error, FileNotFoundError) and os.path.islink(path)
    return absent(path) if lost else f"{path} cannot be read: {error.strerror}"


DAMAGE = (OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError)
"""Kinds of errors that HDF5 and other libraries raise when they open damaged files, or something else."""
AGAIN = "Copy it again from where it was whole, or embed again."
MORE_FILES = "Let this process open more files: ulimit -n 1024"
MORE_MEMORY = "Give it more (ulimit -v, the memory of the job), or take fewer --workers and a small --token-budget."
MORE_PROCESSES = "End other programs, ask for fewer with --workers and OMP_NUM_THREADS=1, or raise ulimit -u."


def too_many_open(path: str | Path, error: BaseException) -> UserError | None:
    """Words for an error that says nothing of the file at the path: this process may open no more. None for others."""
    if os.strerror(errno.EMFILE) not in str(error):
        return None
    return UserError(f"{path} cannot be read: too many files are open.", MORE_FILES)


def damaged(path: str | Path, what: object, remedy: str = AGAIN) -> UserError:
    return UserError(f"{path} is cut short or damaged: {what}.", remedy)


@contextmanager
def damage_named(path: str | Path, kinds: tuple[type[Exception], ...] = DAMAGE, remedy: str = AGAIN) -> Iterator[None]:
    """Tell as damage what the block raises of these kinds. Only reads of the file belong into the block."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise too_many_open(path, error) or damaged(path, in_a_line(error), remedy) from None


def choose(given: str, allowed: Sequence[str], how: str = "Choose one of") -> str:
    """The remedy for a word that is none of those allowed: the nearest, if any is near, and all."""
    near = get_close_matches(given, allowed, 1)
    return f"{f'Did you mean {near[0]}? ' if near else ''}{how} {', '.join(allowed)}."


def needs(package: str, extra: str, what: str) -> None:
    """Raise UserError with the remedy if an optional package is not installed."""
    if find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed.", install_command(extra))


def install_command(extra: str) -> str:
    """The command that adds an extra of this project, by the installer that made this environment."""
    home = Path(sys.prefix)
    if home.parent.name == "tools" and home.parent.parent.name == "uv":
        return f"uv tool install 'virnucpro[{extra}]'"
    if home.parent.name == "venvs" and home.parent.parent.name == "pipx":
        return f"pipx install --force 'virnucpro[{extra}]'"
    return f"{'uv ' if made_by_uv(home) else ''}pip install 'virnucpro[{extra}]'"


def made_by_uv(home: Path) -> bool:
    """Whether uv made this virtual environment, which has no pip then."""
    made_by = home / "pyvenv.cfg"
    return made_by.is_file() and bool(re.search(r"^uv *=", made_by.read_text(errors="replace"), re.MULTILINE))


class Stopped(BaseException):
    """Raised in the main thread by a signal; everything computed so far is committed on the way out."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
        self.resumable = False  # whether something was kept that the same command goes on from
