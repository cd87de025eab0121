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

from virnucpro_cli import report, stopping
from virnucpro_cli.errors import UserError, in_a_line, shell_word
from virnucpro_cli.exchange.layouts.layout import Format, possible
from virnucpro_cli.store.disk import alone, disk_error, lock_of, rename_new, sha256, sync_folder

LIST = ".virnucpro-export.json"
MARK, LANDING = ".virnucpro-partial", ".virnucpro-landing"
"""Suffix of a hidden place, and name of a file in it; and of one that is there while files get their names."""
LONGEST_NAME = 200
ELSEWHERE = "Choose another target with -o."
UNTOUCHED = "The folder is not touched: choose another target with -o, or remove it yourself."
Stamp = tuple[int, int, int]
"""Inode, bytes and time of change of a file."""


def check(target: Path, layout: Format, read: list[str], overwrite: bool) -> None:
    """Raise UserError unless an export can land at the target. read: every file that the export reads."""
    target = target if layout.folder else target.resolve()  # a link stays one
    if layout.folder:
        _check_folder(target, read)
    else:
        report.check_places({f"target {path.suffix}": str(path) for path in _files(target, layout)}, read)
    if layout.beside and target.suffix != layout.suffix:
        raise UserError(f"The target {target} does not end in {layout.suffix}.", f"-o {target.name}{layout.suffix}")
    place = _hidden(target.resolve())
    for path in _files(target, layout):
        is_put_away = (place / target.name).exists() and _old(path, place).exists()  # and will be put back
        is_there = path.exists() and not _is_left(path, target, place, layout)
        if (is_there or is_put_away) and not overwrite:
            raise UserError(f"{path} exists.", "Choose another target with -o, or --overwrite it.")
        if is_there and path != target and not layout.is_beside(path):
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
    for name in sorted(names, key=LIST.__eq__):  # the list last, which says whose the others are
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
    place = _hidden(target)
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
                _sync(place, target, layout)
                ours = written(target) if layout.folder and overwrite and target.exists() else {}
                with stopping.held():
                    _land(place, target, layout, overwrite, ours)
                if ours:
                    _remove(_old(target, place), ours)
            finally:
                with stopping.held():
                    _clear(place, target, layout)
    except OSError as error:
        if error.errno is None:  # NumPy's, of a short write
            raise _unwritable(target, error) from None
        raise disk_error(error, target, resumable=False) from None
    except RuntimeError as error:  # HDF5's and torch's
        raise _unwritable(target, error) from None


def _hidden(target: Path) -> Path:
    """Where a target, which is no link, is written."""
    return target.with_name(possible(f".{target.name}", LONGEST_NAME) + MARK)


def _old(path: Path, place: Path) -> Path:
    """Where an old file or folder waits for the new one to have its name."""
    return place / f"{path.name}.old"


def _unwritable(target: Path, error: Exception) -> UserError:
    remedy = "Is there room? Or choose another disk with -o."
    return UserError(f"{target} cannot be written: {in_a_line(error)}.", remedy)


def _sync(place: Path, target: Path, layout: Format) -> None:
    """Make all that was written durable, with the list of a folder."""
    new = place / target.name
    if layout.folder:
        sums = {name: sha256(new / name) for name in sorted(os.listdir(new))}
        (new / LIST).write_text(json.dumps(sums, indent=0))
    for folder, _, names in os.walk(place):
        for name in names:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def _land(place: Path, target: Path, layout: Format, overwrite: bool, ours: dict[str, Stamp]) -> None:
    """Give what is new its names, the target's last, once what is old is put away: no file of an export is beside one
    of another. Where this is left in the middle, `_clear` undoes it. ours: what is in an old folder.
    """
    files = _files(target, layout)
    if overwrite and target.is_file() and len(files) == 1:
        os.replace(place / target.name, target)
    else:
        (place / LANDING).touch()
        for path in filter(Path.exists, reversed(files)):
            if not overwrite or (path != target and not layout.is_beside(path)):
                raise UserError(f"{path} appeared while this export ran; it was not touched.", ELSEWHERE)
            os.rename(path, _old(path, place))
        if (old := _old(target, place)).is_dir() and _stamps(old) != ours:
            raise UserError(f"{target} was changed while this export ran.", "It is not touched: run the export again.")
        for path in files:
            if layout.folder:
                os.rename(place / path.name, path)
            else:
                rename_new(place / path.name, path, kept=False)
    sync_folder(target.parent)
    stopping.wrote()


def _is_left(path: Path, target: Path, place: Path, layout: Format) -> bool:
    """Whether a killed export left this file without its target: the next one takes it away as it begins.

    It is the file beside, or one of the ways of `rename_new` was in the middle: a placeholder, or a second link.
    """
    new = place / path.name
    if layout.folder or not ((place / LANDING).exists() and (place / target.name).exists() and path.is_file()):
        return False
    if new.exists():
        return path.stat().st_size == 0 or path.samefile(new)
    return layout.is_beside(path)


def _clear(place: Path, target: Path, layout: Format) -> None:
    """Remove an export's hidden place. Unless the target is new, what had its name before has it again."""
    if not os.path.lexists(place):
        return
    files = _files(target, layout)
    new, old = [place / path.name for path in files], [_old(path, place) for path in files]
    is_folder = place.is_dir() and not place.is_symlink()
    there = set(place.iterdir()) if is_folder else set()
    if (
        not is_folder
        or not there <= {place / MARK, place / LANDING, *old, *new}
        or (there and place / MARK not in there)
    ):
        raise UserError(f"{place} is in the way, and not of an export.", "Move it away, or choose another -o.")
    if new[-1] in there:
        for path, its_new in zip(files, new, strict=True):
            if _is_left(path, target, place, layout):
                path.unlink() if its_new in there else os.rename(path, its_new)
        for path, its_old in zip(files, old, strict=True) if not target.exists() else ():
            if its_old in there:
                os.rename(its_old, path)
    for left in old:
        if left.is_dir():
            _remove(left, written(left))
        left.unlink(missing_ok=True)
    for left in (place / LANDING, *new, place / MARK):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    place.rmdir()
