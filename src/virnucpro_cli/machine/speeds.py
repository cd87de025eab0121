"""Speeds that bench measured on this machine: in the cache, a file for each model, device and dtype."""

import json
from contextlib import suppress
from typing import NamedTuple

from virnucpro_cli.errors import UserError
from virnucpro_cli.model.keeping import keep
from virnucpro_cli.model.locate import cache_dir

FOLDER = "speeds"


class Speed(NamedTuple):
    """Tokens a second of the packed forward on lengths of natural proteins. model: its full name; date: YYYY-MM-DD."""

    model: str
    device: str
    dtype: str
    attention: str
    rate: float
    date: str


def remember(speed: Speed) -> None:
    """Keep a speed, in place of an earlier one. A cache that cannot be written keeps none."""
    about = "|".join((speed.model, speed.device, speed.dtype)).encode()
    keep(FOLDER, about, json.dumps(speed._asdict()).encode(), ".json")


def remembered() -> list[Speed]:
    """Every speed that was kept, the newest first."""
    speeds = []
    with suppress(UserError):  # no home, and so no cache
        for path in (cache_dir() / FOLDER).glob("*.json"):
            with suppress(OSError, ValueError, TypeError):  # of another version, or damaged
                speeds.append(Speed(**json.loads(path.read_bytes())))
    return sorted(speeds, key=lambda speed: speed.date, reverse=True)
