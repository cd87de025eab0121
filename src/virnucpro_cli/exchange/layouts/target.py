"""The target of an export: written in a hidden place beside it, then renamed, whole or not at all.

A folder holds a list of the files that export wrote into it, with their SHA-256. Only such a folder is replaced.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from virnucpro_cli import report
from virnucpro_cli.errors import UserError, in_a_line, shell_word
from virnucpro_cli.exchange.layouts.layout import Format, possible
from virnucpro_cli.store.disk import alone, disk_error, lock_of, rename_new, sha256, sync_folder

LIST = ".virnucpro-export.json"
MARK = ".virnucpro-partial"
LONGEST_NAME = 200
ELSEWHERE = "Choose another target with -o."
UNTOUCHED = "The folder is not touched: choose another target with -o, or remove it yourself."
Stamp = tuple[int, int, int]
"""Inode, bytes and time of change of a file."""


def check(target: Path, layout: Format, read: list[str], overwrite: bool) -> None:
    """Raise UserError unless an export can land at the target. read: every file that the export reads."""
    if layout.beside and target.suffix != layout.suffix:
        raise UserError(f"The target {target} does not end in {layout.suffix}.", f"-o {target.name}{layout.suffix}")
    if layout.folder:
        _check_folder(target, read)
    else:
        report.check_places({f"target {path.suffix}": str(path) for path in _files(target, layout)}, read)
    for path in filter(Path.exists, _files(target, layout)):
        if not overwrite:
            raise UserError(f"{path} exists.", "Choose another target with -o, or --overwrite it.")
        if path != target and not layout.is_beside(path):
            raise UserError(f"{path} was not written by export.", f"It is not touched. {ELSEWHERE}")
    if layout.folder and target.exists():
        written(target)


def _check_folder(target: Path, read: list[str]) -> None:
    whole = target.resolve()
    held = [path for path in read if Path(path).resolve().is_relative_to(whole)]
    for is_so, what, remedy in (
        (not whole.parent.is_dir(), f"There is no folder {target.parent}.", f"mkdir -p {shell_word(target.parent)}"),
        (target.exists() and not target.is_dir(), f"{target} is a file, and this layout is a folder.", ELSEWHERE),
        (Path.cwd().is_relative_to(whole), f"{target} holds the current folder.", "Name a new folder with -o."),
        (bool(held), f"{target} holds {', '.join(held)}, which this export reads.", ELSEWHERE),
    ):
        if is_so:
            raise UserError(what, remedy)


def _files(target: Path, layout: Format) -> list[Path]:
    """The target, and the file beside it. The target is last, as it vouches for the other."""
    return [*([target.with_suffix(layout.beside)] if layout.beside else []), target]


# --- the list of a folder ---------------------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, Stamp]:
    """The files of a folder that export wrote, its list among them; an empty folder has none.

    Raises UserError if anything else is in the folder, or if a file was changed since.
    """
    stamps = _stamps(folder)
    if not stamps:
        return stamps
    try:
        listed = json.loads((folder / LIST).read_text())
    except (OSError, ValueError):
        listed = None
    if not isinstance(listed, dict):
        raise UserError(f"{folder} has no list of files that export wrote.", UNTOUCHED)
    for name in stamps.keys() - {LIST}:
        if listed.get(name) != sha256(folder / name):
            raise UserError(f"{folder / name} was not written by export, or was changed since.", UNTOUCHED)
    return stamps


def _stamps(folder: Path) -> dict[str, Stamp]:
    """Every entry of a folder. Raises UserError if one is no plain file."""
    stamps: dict[str, Stamp] = {}
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            raise UserError(f"{entry.path} was not written by export.", UNTOUCHED)
        status = entry.stat(follow_symlinks=False)
        stamps[entry.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return stamps


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
    """A place to write the target. At the end of the block it is synced, and takes the name of the target.

    Raises UserError if another export to the same target is alive, and of every error of the disk.
    """
    target = target.resolve()  # a link stays one
    place = target.with_name(possible(f".{target.name}", LONGEST_NAME) + MARK)
    lock, busy = lock_of(place), f"Another run is writing {target} now."
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


def _unwritable(target: Path, error: Exception) -> UserError:
    remedy = "Is there room? Or choose another disk with -o."
    return UserError(f"{target} cannot be written: {in_a_line(error)}.", remedy)


def _land(place: Path, target: Path, layout: Format, overwrite: bool) -> None:
    new = place / target.name
    if layout.folder:
        sums = {name: sha256(new / name) for name in sorted(os.listdir(new))}
        (new / LIST).write_text(json.dumps(sums, indent=0))
    for folder, _, names in os.walk(place):
        for name in names:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    for path in _files(target, layout):
        if layout.folder:
            _take_the_place_of(path, place, overwrite)
        elif overwrite:
            os.replace(place / path.name, path)
        else:
            rename_new(place / path.name, path, kept=False)
    sync_folder(target.parent)


def _take_the_place_of(path: Path, place: Path, overwrite: bool) -> None:
    """Rename the new folder to `path`. An older one goes if export wrote every file in it, and else is put back."""
    new, old = place / path.name, place / f"{path.name}.old"
    if not path.exists():
        os.rename(new, path)
        return
    if not overwrite:
        raise UserError(f"{path} appeared while this export ran; it was not touched.", ELSEWHERE)
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
    """Remove an export's hidden place. An old folder that was moved there goes back, or goes if it is export's."""
    if not os.path.lexists(place):
        return
    old, new = place / f"{target.name}.old", [place / path.name for path in _files(target, layout)]
    is_folder = place.is_dir() and not place.is_symlink()
    there = set(place.iterdir()) if is_folder else set()
    if not is_folder or not there <= {place / MARK, old, *new} or (there and place / MARK not in there):
        raise UserError(f"{place} is in the way, and not of an export.", "Move it away, or choose another -o.")
    if old.is_dir():
        if target.exists():
            _remove(old, written(old))
        else:
            os.rename(old, target)
    for left in new:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    (place / MARK).unlink(missing_ok=True)
    place.rmdir()
