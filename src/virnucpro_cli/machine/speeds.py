"""Speeds that bench measured on this machine: in the cache, a file for each model, device and dtype."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from virnucpro_cli.errors import UserError
from virnucpro_cli.model import locate
from virnucpro_cli.store import disk


class Speed(NamedTuple):
    """Tokens a second of the packed forward on lengths of natural proteins. model: its full name; date: YYYY-MM-DD."""

    model: str
    device: str
    dtype: str
    attention: str
    rate: float
    date: str


def _folder() -> Path:
    return locate.cache_dir() / "speeds"


def remember(speed: Speed) -> None:
    """Keep a speed, in place of an earlier one. A cache that cannot be written keeps none."""
    key = hashlib.sha256("|".join((speed.model, speed.device, speed.dtype)).encode()).hexdigest()
    with suppress(OSError, UserError):
        _folder().mkdir(parents=True, exist_ok=True)
        with disk.written_whole(_folder() / f"{key}.json") as file:
            file.write(json.dumps(speed._asdict()).encode())


def remembered() -> list[Speed]:
    """Every speed that was kept, the newest first."""
    speeds = []
    with suppress(UserError):  # no home, and so no cache
        for path in _folder().glob("*.json"):
            with suppress(OSError, ValueError, TypeError):  # of another version, or damaged
                speeds.append(Speed(**json.loads(path.read_bytes())))
    return sorted(speeds, key=lambda speed: speed.date, reverse=True)
