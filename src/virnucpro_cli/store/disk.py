"""The file as the disk has it: its names and locks, reserved room, checksum, and what is said when a write fails."""

import errno
import fcntl
import hashlib
import os
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from virnucpro_cli.errors import UserError
from virnucpro_cli.store.schema import CHECKSUM_BLOCK, CHECKSUM_BYTES, NO_SPACE

OTHER_FILES = 256


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def check_destination(output: Path) -> None:
    """Raise UserError unless `output` could be created or replaced where it is."""
    folder = output.parent
    if output.is_dir():
        raise UserError(f"The output {output} is a directory.", "Name a file, such as out.h5.")
    if len(os.fsencode(output.name)) + len(".partial.new") > 255:
        raise UserError(
            f"The output name {output.name[:40]}... is too long for its .partial.", "Choose a shorter name."
        )
    for path in (output, partial_path(output)):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file.", "Choose another output with -o.")
    if not folder.is_dir():
        raise UserError(f"The output directory {folder} does not exist.", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"The output directory {folder} cannot be written.", "Choose another place with -o.")


def free_space(output: Path) -> int:
    """Bytes free where `output` will be."""
    return shutil.disk_usage(output.parent).free


def check_free_space(output: Path, needed: int) -> None:
    free = free_space(output)
    if free < needed:
        raise UserError(
            f"{output} will need {needed / 1e6:,.1f} MB, and only {free / 1e6:,.1f} MB are free in {output.parent}.",
            "Free some space, choose another disk with -o, or store less (--store-dtype fp16, fewer --layers, no residue pool).",
        )


def allow_open_files(count: int) -> int | None:
    """Let this process open so many files besides those it needs anyway. Returns how many it may, in all, if that is not enough."""
    needed, (soft, hard) = count + OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most if most < needed else None


def copy_back(output: Path) -> None:
    """Make a partial file of a finished one, which stays, for a run to go on with. Raises UserError if that cannot be."""
    partial = partial_path(output)
    if partial.exists():
        discard_partial(output)
    check_free_space(output, output.stat().st_size)
    with open(output, "rb") as finished, written_whole(partial, replace=False) as file:
        shutil.copyfileobj(finished, file, 1 << 24)


def checksum(fd: int, itself: int, complete: int) -> str:
    """SHA-256, in hex, of the SHA-256 of every 16 MiB of a file whose /run/checksum and /run/complete, at those offsets, count
    as zeros: they are written last. Everything else counts: embeddings, names, columns, attributes, the report.
    """

    def of_block(start: int) -> bytes:
        block = bytearray(CHECKSUM_BLOCK)
        view, filled = memoryview(block), 0
        while count := os.preadv(fd, [view[filled:]], start + filled):
            filled += count
        for offset, size in ((itself, CHECKSUM_BYTES), (complete, 1)):
            first, last = max(offset - start, 0), min(offset + size - start, filled)
            if first < last:
                view[first:last] = bytes(last - first)
        return hashlib.sha256(view[:filled]).digest()

    pool = ThreadPoolExecutor(4)  # hashing lets go of Python
    try:
        starts = range(0, os.fstat(fd).st_size, CHECKSUM_BLOCK)
        return hashlib.sha256(b"".join(pool.map(of_block, starts))).hexdigest()
    finally:
        pool.shutdown(cancel_futures=True)


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def disk_error(error: OSError, output: Path, resumable: bool) -> UserError:
    if error.errno in NO_SPACE:
        what = (
            f"No space is left for {output}"
            if error.errno == errno.ENOSPC
            else f"The disk quota is used up for {output}"
        )
    else:
        what = f"{output} cannot be written: {error.strerror}"
    room = "Make room" if error.errno in NO_SPACE else "See to the file system"
    if resumable:
        return UserError(
            f"{what}. Nothing that was computed and committed is lost.",
            f"{room}, then run the same command again to resume.",
        )
    return UserError(f"{what}.", f"{room} or choose another disk with -o, and run again.")


def is_the_file(path: Path, there: os.stat_result, unchanged: bool = False) -> bool:
    """Whether `path` names the file of which `there` was taken. unchanged: since then, for a file that is not held open."""
    try:
        here = os.stat(path)
    except FileNotFoundError:
        return False
    same = (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns)  # a number is soon another file's
    return os.path.samestat(here, there) and (same or not unchanged)


def lock(fd: int, path: Path) -> None:
    """Take the file's lock, which the kernel drops when its process dies."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another run is writing {path} now.", "Wait for it, or choose another output with -o."
        ) from None
    if not is_the_file(path, os.fstat(fd)):
        raise UserError(f"{path} was finished or replaced by another run just now.", "Run the command again.")


def open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        raise UserError(
            f"{path} is there and cannot be opened for writing: {error.strerror}.",
            "Ask its owner, or choose another output with -o.",
        ) from None


def create_locked(path: Path) -> int:
    """Create a file that did not exist and lock it; what a killed layout left under its name is removed first."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            old = open_existing(path)
            try:
                lock(old, path)
                os.unlink(path)
            finally:
                os.close(old)
        else:
            lock(fd, path)
            return fd


@contextmanager
def written_whole(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when all of it is on disk; replace: even if another has it. Raises UserError if that fails."""
    new = path.with_name(path.name + ".new")
    try:
        fd = create_locked(new)
        with os.fdopen(fd, "wb") as file:
            try:
                yield file
                file.flush()
                os.fsync(fd)
                os.replace(new, path) if replace else rename_new(new, path)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path, resumable=False) from None


def reserve(fd: int, size: int) -> None:
    """Take the disk space now, so that a full disk shows now; a file system that cannot is left to show it later."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def discard_partial(output: Path) -> None:
    """Remove OUT.partial, whatever it holds; raises UserError if a living run writes it."""
    path = partial_path(output)
    fd = open_existing(path)
    try:
        lock(fd, path)
        path.unlink()
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def rename_new(source: Path, target: Path) -> None:
    """Rename without ever replacing a file that appeared meanwhile."""
    try:
        os.link(source, target)
        os.unlink(source)
    except FileExistsError:
        raise UserError(
            f"{target} appeared while this run was working; it was not touched.",
            f"The result is in {source}; rename it yourself.",
        ) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(source, target)  # a file system without hard links
    sync_folder(target.parent)


def check_new(output: Path, overwrite: bool) -> None:
    """Raise UserError unless a file can be made there, and one that is there is to be overwritten."""
    check_destination(output)
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists.", "Choose another -o, or --overwrite it.")


@contextmanager
def new_file(output: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is whole and on disk, and that is gone if the block fails; see `check_new`."""
    check_new(output, overwrite)
    with written_whole(output.resolve() if output.is_symlink() else output, overwrite) as file:
        yield file
