"""Small results that are kept on a machine, in folders of the program's cache: compiled kernels, timed trials."""

import hashlib
from contextlib import suppress
from pathlib import Path

from virnucpro_cli.errors import UserError
from virnucpro_cli.model import locate
from virnucpro_cli.store import disk


def _path(folder: str, about: bytes, suffix: str) -> Path:
    return locate.cache_dir() / folder / (hashlib.sha256(about).hexdigest() + suffix)


def kept(folder: str, about: bytes, suffix: str = "") -> bytes | None:
    """The result that was kept; None if there is none. about: all that it depends on."""
    with suppress(OSError, UserError):
        return _path(folder, about, suffix).read_bytes()
    return None


def keep(folder: str, about: bytes, result: bytes, suffix: str = "") -> None:
    """Keep a result, whole or not at all. A cache that cannot be written keeps none."""
    with suppress(OSError, UserError):
        path = _path(folder, about, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.written_whole(path) as file:
            file.write(result)
