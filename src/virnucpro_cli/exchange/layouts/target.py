"""Where an export lands: a hidden place beside the target while it is written, then the target, whole or not at all.

A folder holds a list of the files that export wrote into it, with their SHA-256. Only a folder of such files is ever replaced.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from virnucpro_cli import report
from virnucpro_cli.errors import UserError, in_a_line
from virnucpro_cli.exchange.layouts.layout import Format, possible
from virnucpro_cli.store.disk import alone, disk_error, rename_new, sync_folder

LIST = ".virnucpro-export.json"
MARK = ".virnucpro-partial"
LONGEST_NAME = 200
Stamp = tuple[int, int, int]
"""Inode, bytes and time of change of a file."""


def check(target: Path, layout: Format, read: list[str], overwrite: bool) -> None:
    """Raise UserError unless an export can land at the target. read: every file that the export reads."""
    if layout.beside and target.suffix != layout.suffix:
        raise UserError(f"The target {target} does not end in {layout.suffix}.", f"-o {target.name}{layout.suffix}")
    if layout.folder:
        _check_folder(target, read)
    else:
        report.check_places({f"target {path.suffix}": str(path) for path in _beside(target, layout)}, read)
    for path in _beside(target, layout):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists.", "Choose another target with -o, or --overwrite it.")
        if path != target and path.exists() and not layout.is_beside(path):
            raise UserError(f"{path} was not written by export.", "It is not touched: choose another target with -o.")
    if layout.folder and target.exists():
        written(target)


def _check_folder(target: Path, read: Iterable[str]) -> None:
    whole = target.resolve()
    if not whole.parent.is_dir():
        raise UserError(f"There is no folder {target.parent}.", f"mkdir -p {target.parent}")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, and this layout is a folder.", "Choose another target with -o.")
    if Path.cwd().is_relative_to(whole):
        raise UserError(f"{target} holds the current folder.", "Name a new folder with -o.")
    for path in read:
        if Path(path).resolve().is_relative_to(whole):
            raise UserError(f"{target} holds {path}, which this export reads.", "Choose another target with -o.")


def _beside(target: Path, layout: Format) -> list[Path]:
    """The target, and what lies beside it: the target is last, as it vouches for the others."""
    return [*([target.with_suffix(layout.beside)] if layout.beside else []), target]


# --- the list of a folder ---------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_list(folder: Path) -> None:
    """Write the list of all files of a new folder into it."""
    names = sorted(os.listdir(folder))
    (folder / LIST).write_text(json.dumps({name: _sha256(folder / name) for name in names}, indent=0))


def written(folder: Path) -> dict[str, Stamp]:
    """The files of a folder that export wrote, its list among them; an empty folder has none.

    Raises UserError if anything else is in the folder, or if a file was changed since. Nothing outside the folder is looked at.
    """
    there = _stamps(folder)
    if not there:
        return there
    try:
        listed = json.loads((folder / LIST).read_text()) if LIST in there else None
    except (OSError, ValueError):
        listed = None
    if not isinstance(listed, dict):
        raise UserError(f"{folder} has no list of files that export wrote.", _UNTOUCHED)
    for name in there:
        if name != LIST and (name not in listed or listed[name] != _sha256(folder / name)):
            raise UserError(f"{folder / name} was not written by export, or was changed since.", _UNTOUCHED)
    return there


_UNTOUCHED = "The folder is not touched: choose another target with -o, or remove it yourself."


def _stamps(folder: Path) -> dict[str, Stamp]:
    """Every entry of a folder. Raises UserError if one is no plain file."""
    found: dict[str, Stamp] = {}
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            raise UserError(f"{entry.path} was not written by export.", _UNTOUCHED)
        status = entry.stat(follow_symlinks=False)
        found[entry.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove these files, and the folder if nothing else is in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        raise UserError(f"Files appeared in the old folder while it was replaced; they are in {folder}.") from None


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def placed(target: Path, layout: Format, overwrite: bool) -> Iterator[Path]:
    """Where to write the target. What is there when the block ends is synced and takes its name; with `overwrite` the old goes only then.

    Raises UserError if another export to the same target is alive, and of every error of the disk.
    """
    target = target.resolve()  # a link stays one
    place = target.with_name(possible(f".{target.name}", LONGEST_NAME) + MARK)
    lock, busy = place.with_name(f"{place.name}.lock"), f"Another run is writing {target} now."
    try:
        with alone(lock, lambda _: None, busy, "Wait for it, or choose another target with -o.", wait=False) as locked:
            if not locked:  # the file system has no locks
                place = place.with_name(place.name + secrets.token_hex(8))
            try:
                _clear(place, target, layout)
                place.mkdir()
                (place / MARK).touch()
                yield place / target.name
                _land(place, target, layout, overwrite)
            finally:
                _clear(place, target, layout)
    except OSError as error:
        if error.errno is None:  # NumPy's, of a short write
            raise _unwritable(target, error) from None
        raise disk_error(error, target, resumable=False) from None
    except RuntimeError as error:  # HDF5's and torch's
        raise _unwritable(target, error) from None


def _land(place: Path, target: Path, layout: Format, overwrite: bool) -> None:
    new = place / target.name
    if layout.folder:
        write_list(new)
    _sync(place)
    for path in _beside(target, layout):
        if layout.folder:
            _take_the_place_of(path, place, overwrite)
        elif overwrite:
            os.replace(place / path.name, path)
        else:
            rename_new(place / path.name, path, kept=False)
    sync_folder(target.parent)


def _take_the_place_of(path: Path, place: Path, overwrite: bool) -> None:
    """Rename the new folder to `path`. An older one goes if every file is one that export wrote, and else is put back."""
    new, old = place / path.name, place / f"{path.name}.old"
    if not path.exists():
        os.rename(new, path)
        return
    if not overwrite:
        raise UserError(f"{path} appeared while this export ran; it was not touched.", "Choose another target with -o.")
    ours = written(path)
    os.rename(path, old)
    try:
        if _stamps(old) != ours:
            raise UserError(f"{path} was changed while this export ran.", "It is not touched: run the export again.")
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    _remove(old, ours)


def _clear(place: Path, target: Path, layout: Format) -> None:
    """Remove what an export left in its hidden place. An old folder that was moved there goes back, or goes if it is export's."""
    if not os.path.lexists(place):
        return
    there = [] if place.is_symlink() or not place.is_dir() else os.listdir(place)
    ours = {MARK, f"{target.name}.old", *(path.name for path in _beside(target, layout))}
    if place.is_symlink() or not place.is_dir() or not set(there) <= ours or (there and MARK not in there):
        raise UserError(f"{place} is in the way, and not of an export.", "Move it away, or choose another -o.")
    old = place / f"{target.name}.old"
    if old.is_dir():
        if target.exists():
            _remove(old, written(old))
        else:
            os.rename(old, target)
    for path in _beside(target, layout):
        left = place / path.name
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    (place / MARK).unlink(missing_ok=True)
    place.rmdir()


def _unwritable(target: Path, error: Exception) -> UserError:
    return UserError(
        f"{target} cannot be written: {in_a_line(error)}.", "Is there room? Or choose another disk with -o."
    )


def _sync(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            with open(Path(place) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))
