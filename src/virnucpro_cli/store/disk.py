"""The file as the disk has it: its names and locks, reserved room, checksum, and the message of a write that fails."""

import ctypes
import errno
import fcntl
import hashlib
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from virnucpro_cli.errors import UserError, shell_word
from virnucpro_cli.stopping import cores, held, threads, wrote
from virnucpro_cli.store.schema import CHECKSUM_BYTES

OTHER_FILES = 256
CHECKSUM_BLOCK, CHECKSUM_PIECE = 1 << 24, 1 << 20
MOST_HASHING = 16
"""Threads that hash a file, at most; each holds a piece."""
NEW = ".virnucpro-new"
"""Suffix of a file that is being made. Whatever has such a name is this program's; a lock is known by being empty."""
ANOTHER = "Wait for it, or choose another output with -o."
LINGER = 10.0
"""Seconds in which a lock is asked for again: workers that were just starting when their run was killed hold it on."""

SYNC_FILE_RANGE_WRITE = 2
"""Linux's number."""
ENOTSUPP = 524
"""The kernel's own number for "not supported", which some network file systems let out."""
LACKS = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, ENOTSUPP)
DENIES = (*LACKS, errno.EPERM, errno.EACCES)
REFUSALS: dict[str, tuple[tuple[int, ...], str]] = {
    "flock": ((*LACKS, errno.ENOLCK), "the run goes on without a lock, and says so"),
    "fallocate": ((*LACKS, errno.ENODEV, errno.EPERM), "space is taken when it is written"),
    "fdatasync": (LACKS, "fsync in its place"),
    "fsync of a folder": ((*DENIES, errno.EBADF, errno.EISDIR), "a name is as durable as the file system makes it"),
    "renameat2": (DENIES, "link and unlink"),
    "link": ((*DENIES, errno.EMLINK, errno.EXDEV), "an empty file takes the name first, which the rename replaces"),
}
"""Calls that not every file system has: errors where they lack, and the way of a run then. Other errors end it."""


@contextmanager
def _optional(call: str) -> Iterator[None]:
    """Pass over the error of a file system that does not have the call of the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS[call][0]:
            raise


# --- names -----------------------------------------------------------------------------------------------------------


class Overtaken(UserError):
    """Another run did just now what this one was about to do: whoever looks again sees what it made."""

    def __init__(self, path: Path):
        super().__init__(f"{path} was begun, finished or replaced by another run just now.", "Run the command again.")


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def lock_of(path: Path) -> Path:
    """The lock of whoever makes a file, beside it."""
    return path.with_name(f"{path.name}.lock")


def behind(output: Path) -> Path:
    """The file that a link names, whether it is there or not; else the path itself."""
    return output.resolve() if output.is_symlink() else output


def check_destination(output: Path) -> None:
    """Raise UserError unless `output` could be created or replaced where it is."""
    output = behind(output)
    folder = output.parent
    if output.is_dir():
        raise UserError(f"The output {output} is a directory.", "Name a file, such as out.h5.")
    if len(os.fsencode(output.name)) + len(f".partial{NEW}") > 255:
        raise UserError(f"The output name {output.name[:40]}... is too long for its .partial.", "Choose a shorter one.")
    for path in (output, partial_path(output)):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file.", "Choose another output with -o.")
    if not folder.is_dir():
        above = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        if not above.is_dir():
            raise UserError(f"{above} is not a directory, and the output is to be in {folder}.", "Choose another -o.")
        raise UserError(f"The output directory {folder} does not exist.", f"mkdir -p {shell_word(folder)}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"The output directory {folder} cannot be written.", "Choose another place with -o.")


OTHER_FORMATS = {
    ".npy": "npy", ".parquet": "parquet", ".h5ad": "anndata", ".csv": "csv", ".tsv": "tsv", ".pt": "fair-esm",
    ".npz": "", ".pth": "", ".pkl": "", ".pickle": "", ".safetensors": "", ".zarr": "", ".json": "", ".txt": "",
    ".fasta": "", ".fa": "", ".faa": "",
}  # fmt: skip
"""Suffixes of other formats, and the layout of export that writes one."""


def check_hdf5_name(output: Path) -> None:
    """Raise UserError if the name of an HDF5 file promises another format."""
    layout = OTHER_FORMATS.get(output.suffix.lower())
    if layout is None:
        return
    file = output.with_suffix(".h5")
    exported = output.with_suffix("") if layout == "fair-esm" else output
    then = f", then virnucpro export {file} --to {layout} -o {exported}" if layout else ""
    raise UserError(f"The output {output} is HDF5, and its name says {output.suffix}.", f"Give -o {file}{then}")


def free_space(output: Path) -> int | None:
    """Bytes free where `output` will be; None on a file system that does not count them."""
    usage = shutil.disk_usage(output.parent)
    return usage.free if usage.total else None


def has_room(output: Path, needed: int) -> bool:
    """Whether so many bytes are free where `output` will be, as far as the file system says."""
    free = free_space(output)
    return free is None or free >= needed


def check_free_space(output: Path, needed: int, less: str = "") -> None:
    """Raise UserError if fewer bytes than needed are free where `output` will be. less: how to need less, as words."""
    free = free_space(output)
    if free is not None and free < needed:
        raise UserError(
            f"{output} may need {needed / 1e6:,.1f} MB, and only {free / 1e6:,.1f} MB are free in {output.parent}.",
            f"Free some space, {less or 'or choose another disk for it'}.",
        )


def check_new(output: Path, overwrite: bool) -> None:
    """Raise UserError unless a file can be made there, and one that is there is to be overwritten."""
    check_destination(output)
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists.", "Choose another -o, or --overwrite it.")


def allow_open_files(count: int) -> None:
    """Let this process open so many files besides those it needs anyway, as far as its limit can be raised."""
    needed, (soft, hard) = count + OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# --- locks -----------------------------------------------------------------------------------------------------------


def state_of(path: Path) -> tuple[int, ...]:
    """A file and all that changes with its content; nothing of one that is not there."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_the_file(path: Path, there: os.stat_result, unchanged: bool = False) -> bool:
    """Whether `path` names the file of which `there` was taken. unchanged: and is as it was, if it is not held open."""
    try:
        here = os.stat(path)
    except FileNotFoundError:
        return False
    same = (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns)  # a number is soon another file's
    return os.path.samestat(here, there) and (same or not unchanged)


def _flock(fd: int, path: Path, wait: bool = False) -> bool:
    """Take the file's lock. Returns whether the file system has locks.

    Raises BlockingIOError if another process has it, and UserError if the file system refuses it.
    """
    try:
        with _optional("flock"):
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        return False
    except BlockingIOError:
        raise
    except OSError as error:
        message = f"The lock of {path} cannot be taken: {error.strerror}."
        raise UserError(message, "Choose another -o, on a file system whose locks work.") from None


def has_locks(folder: Path) -> bool:
    """Whether files in a folder can be locked. Raises OSError or UserError if one cannot be made, or is refused."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return _flock(file.fileno(), folder)


def without_lock(path: Path) -> str:
    """Words for a file system without locks."""
    return f"{path.parent} is on a file system without locks: nothing keeps a second run of the same output away"


def lock(fd: int, path: Path) -> bool:
    """Take the file's lock, which the kernel drops when its process dies. Returns whether the file system has locks."""
    patience = time.monotonic() + LINGER
    while True:
        try:
            locked = _flock(fd, path)
            break
        except BlockingIOError:
            if time.monotonic() >= patience:
                raise UserError(f"Another run is writing {path} now.", ANOTHER) from None
        time.sleep(0.1)
    if not is_the_file(path, os.fstat(fd)):
        raise Overtaken(path)
    return locked


@contextmanager
def alone(path: Path, say: Callable[[str], None], waiting: str, remedy: str = "", wait: bool = True) -> Iterator[bool]:
    """Be the only process that holds the lock file `path`, which is gone at the end; `say` tells why this takes time.

    Gives whether the file system has locks. Raises UserError if the file cannot be made or locked; and with the words
    of `waiting`, if another process has it and this one shall not wait. remedy: of the one that this one may meet.
    """
    try:
        while (had := _lock_file(path, say, waiting, remedy, wait)) is None:
            pass
    except OSError as error:
        remedy = (wait and remedy) or f"See to {path.parent}, or choose another place."
        raise UserError(f"The lock {path} cannot be made: {error.strerror}.", remedy) from None
    fd, locked = had
    try:
        yield locked
    finally:
        with held():
            path.unlink(missing_ok=True)
            os.close(fd)


def _lock_file(
    path: Path, say: Callable[[str], None], waiting: str, remedy: str, wait: bool
) -> tuple[int, bool] | None:
    """Descriptor of the file, and whether it is locked; None if its last holder removed it meanwhile."""
    with ExitStack() as undo:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        undo.callback(os.close, fd)
        if os.fstat(fd).st_size:
            raise UserError(f"{path} is in the way, and not this program's: its locks are empty.", "Move it away.")
        try:
            locked = _flock(fd, path)
        except BlockingIOError:
            if not wait:
                raise UserError(waiting, remedy) from None
            say(waiting)
            locked = _flock(fd, path, wait=True)
        except UserError:
            path.unlink(missing_ok=True)
            raise
        if not is_the_file(path, os.fstat(fd)):
            return None
        if not locked:
            say(without_lock(path))
        undo.pop_all()
        return fd, locked


def open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        raise Overtaken(path) from None
    except OSError as error:
        message = f"{path} is there and cannot be opened for writing: {error.strerror}."
        raise UserError(message, "Ask its owner, or choose another output with -o.") from None


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """Descriptor of an existing file, locked. Raises UserError if another process has it, or it cannot be opened."""
    fd = open_existing(path)
    try:
        lock(fd, path)
        yield fd
    finally:
        os.close(fd)


def check_unheld(path: Path) -> None:
    """Raise UserError if another process writes the file, or it is not there any more."""
    with _held(path):
        pass


# --- new files -------------------------------------------------------------------------------------------------------


def new_path(path: Path) -> Path:
    """The name of a file while it is made."""
    return path.with_name(path.name + NEW)


@contextmanager
def making(path: Path, rename: Callable[[Path, Path], None], durable: bool = True) -> Iterator[tuple[int, bool]]:
    """A new file at `new_path(path)`, which is renamed when the block ends and, if `durable`, all of it is on disk.

    Gives its descriptor, and whether it is locked. It stays open, unless the block fails: then it is closed and gone.
    A file that a killed process left there goes first. Raises UserError if another run makes the file now.
    """
    new = new_path(path)
    while True:
        try:
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            break
        except FileExistsError:
            with _held(new):
                os.unlink(new)
    try:
        yield fd, lock(fd, new)
        if durable:
            os.fsync(fd)
        if not is_the_file(new, os.fstat(fd)):  # where there are no locks
            raise UserError(f"Another run is writing {new} now.", ANOTHER)
        rename(new, path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        if is_the_file(new, os.fstat(fd)):
            new.unlink(missing_ok=True)
        os.close(fd)
        raise


@contextmanager
def written_whole(path: Path, replace: bool = True, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when all of it is on disk, and is gone if the block fails.

    replace: even if another file has the name. durable: False for what its readers check, so that nobody need wait for
    the disk. Raises UserError if the disk fails, or another file is not replaced.
    """
    with _written_whole(path, os.replace if replace else partial(rename_new, kept=False), durable) as file:
        yield file


@contextmanager
def _written_whole(path: Path, rename: Callable[[Path, Path], None], durable: bool = True) -> Iterator[IO[bytes]]:
    try:
        with making(path, rename, durable) as (fd, _), os.fdopen(fd, "wb", closefd=False) as file:
            yield file
        os.close(fd)
    except OSError as error:
        raise disk_error(error, path, resumable=False) from None


def new_file(output: Path, overwrite: bool) -> AbstractContextManager[IO[bytes]]:
    """A file to write, as `written_whole` gives it, where `check_new` saw that it can be made. A link stays one."""
    return _written_whole(behind(output), partial(rename_asked_for, replace=overwrite, kept=False))


def rename_asked_for(source: Path, target: Path, replace: bool, kept: bool = True) -> None:
    """Give a file that the user asked for its name. A stop comes before, or knows that it is there. kept: as below."""
    with held():
        if replace:
            os.replace(source, target)
        else:
            rename_new(source, target, kept)
        wrote()


def copy_back(output: Path) -> None:
    """Make a partial file of a finished one, which stays, for a run to go on with. Raises UserError if that fails."""
    if partial_path(output).exists():
        discard_partial(output)
    check_free_space(output, output.stat().st_size)
    with open(output, "rb") as finished, written_whole(partial_path(output), replace=False) as file:
        shutil.copyfileobj(finished, file, 1 << 24)


def discard_partial(output: Path) -> None:
    """Remove OUT.partial, whatever it holds; raises UserError if a living run writes it."""
    with _held(partial_path(output)):
        partial_path(output).unlink()


def rename_exclusive(source: Path, target: Path) -> None:
    """Linux' rename that never replaces. Raises OSError; FileExistsError if the target exists."""
    here, no_replace = -100, 1
    _call("renameat2", here, os.fsencode(source), here, os.fsencode(target), no_replace)


def _call(name: str, *arguments: Any) -> None:
    """A call of the system that Python does not know. Raises OSError; ENOSYS if the C library does not have it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None or call(*arguments):
        number = ctypes.get_errno() if call else errno.ENOSYS
        raise OSError(number, os.strerror(number))


def _link_and_unlink(source: Path, target: Path) -> None:
    os.link(source, target)
    os.unlink(source)


def _rename_over_a_placeholder(source: Path, target: Path) -> None:
    target.touch(exist_ok=False)
    try:
        os.rename(source, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def rename_new(source: Path, target: Path, kept: bool = True) -> None:
    """Rename, and never replace a file that appeared meanwhile, which is a UserError; kept: the source stays then."""
    ways = {"renameat2": rename_exclusive, "link": _link_and_unlink}
    try:
        for call, rename in ways.items():
            with _optional(call):
                rename(source, target)
                break
        else:
            _rename_over_a_placeholder(source, target)
    except FileExistsError:
        remedy = f"The result is in {source}; rename it yourself." if kept else "Move it away, or choose another name."
        raise UserError(f"{target} appeared while this run was working; it was not touched.", remedy) from None
    sync_folder(target.parent)


# --- bytes -----------------------------------------------------------------------------------------------------------


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def pread_all(fd: int, view: memoryview, offset: int) -> int:
    """Read into all of the view. Returns the bytes that there are, fewer where the file ends."""
    filled = 0
    while filled < len(view) and (count := os.preadv(fd, [view[filled:]], offset + filled)):
        filled += count
    return filled


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_error(error: OSError, output: Path, resumable: bool) -> UserError:
    full = {errno.ENOSPC: "No space is left", errno.EDQUOT: "The disk quota is used up"}.get(error.errno or 0)
    message = f"{full} for {output}." if full else f"{output} cannot be written: {error.strerror}."
    remedy = "Make room" if full else "See to the file system"
    if error.errno == errno.ENOENT:
        return UserError(message, "Its folder, or what this run had written, was removed meanwhile: run again.")
    if not resumable:
        return UserError(message, f"{remedy} or choose another disk with -o, and run again.")
    kept = f"{message} Nothing that was computed and committed is lost."
    return UserError(kept, f"{remedy}, then run the same command again to resume.")


def reserve(fd: int, size: int) -> None:
    """Take the disk space now, so that a full disk shows now; a file system that cannot is left to show it later."""
    with _optional("fallocate"):
        fallocate(fd, size)


def fallocate(fd: int, size: int) -> None:
    """Linux' call that gives a file its space. Raises OSError.

    Where a file system lacks it, the C library's `posix_fallocate` writes a byte into every block instead: on a network
    file system that takes as long as to write the file.
    """
    while True:
        with suppress(InterruptedError):
            return _call("fallocate", fd, 0, ctypes.c_int64(0), ctypes.c_int64(size))


def begin_to_write(fd: int, offset: int, size: int) -> None:
    """Have the disk begin with bytes that were written, where the system can be asked to (Linux), and do not wait.

    What becomes of them `sync_data` says, as of any others.
    """
    if (call := getattr(ctypes.CDLL(None), "sync_file_range", None)) is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


def sync_data(fd: int) -> None:
    """Make all writes durable. Raises OSError if one was lost."""
    with _optional("fdatasync"):
        getattr(os, "fdatasync", os.fsync)(fd)  # Apple has the second alone
        return
    os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Make names in a folder durable, as far as the file system can."""
    with _optional("fsync of a folder"):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class PassingDigests:
    """SHA-256 of blocks of a file, taken as they are written. whole: those of blocks written from end to end in order.

    Every write must be told: one that is out of order makes its block one to be read.
    """

    def __init__(self) -> None:
        self.whole: dict[int, bytes] = {}
        self._begun: dict[int, tuple[Any, int]] = {}  # start of a block -> its hash, and the offset up to which it is
        self._pool = ThreadPoolExecutor(min(cores(), MOST_HASHING), "hash")
        self._lock = threading.Lock()  # neighbours of two writes may share a block

    @contextmanager
    def taken(self, data: memoryview, offset: int) -> Iterator[None]:
        """Hash data beside the block, which writes it at that offset."""
        first = offset - offset % CHECKSUM_BLOCK
        starts = range(first, offset + len(data), CHECKSUM_BLOCK)
        with self._lock:
            hashing = [self._pool.submit(self._pass, start, data, offset) for start in starts]
            try:
                yield
            finally:
                for each in hashing:
                    each.result()

    def close(self) -> None:
        self._pool.shutdown()

    def _pass(self, start: int, data: memoryview, offset: int) -> None:
        self.whole.pop(start, None)
        hasher, upto = self._begun.pop(start, (None, -1))
        begin, end = max(start, offset), min(start + CHECKSUM_BLOCK, offset + len(data))
        if begin == start:
            hasher = hashlib.sha256()
        elif begin != upto:
            return
        hasher.update(data[begin - offset : end - offset])
        if end == start + CHECKSUM_BLOCK:
            self.whole[start] = hasher.digest()
        else:
            self._begun[start] = hasher, end


def checksum(fd: int, itself: int, complete: int, known: Mapping[int, bytes] = MappingProxyType({})) -> str:
    """SHA-256, in hex, of the SHA-256 of every 16 MiB of a file: embeddings, names, columns, attributes, the report.

    /run/checksum and /run/complete, at those offsets, count as zeros: they are written last.
    known: SHA-256 of blocks, by their start, that need not be read.
    """

    def of_block(start: int) -> bytes:
        if start in known:
            return known[start]
        sha, piece, stop = hashlib.sha256(), memoryview(bytearray(CHECKSUM_PIECE)), min(start + CHECKSUM_BLOCK, end)
        for at in range(start, stop, CHECKSUM_PIECE):
            view = piece[: stop - at]
            filled = pread_all(fd, view, at)
            for offset, size in ((itself, CHECKSUM_BYTES), (complete, 1)):
                first, last = max(offset - at, 0), min(offset + size - at, filled)
                if first < last:
                    view[first:last] = bytes(last - first)
            sha.update(view[:filled])
        return sha.digest()

    end = os.fstat(fd).st_size
    with threads(MOST_HASHING) as pool:  # hashing lets go of Python
        return hashlib.sha256(b"".join(pool.map(of_block, range(0, end, CHECKSUM_BLOCK)))).hexdigest()
