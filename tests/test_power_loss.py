"""Power cuts: a run's writes are recorded, and replayed with what was not synced lost, torn or out of order."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from test_faults import Case, InTurn, one_thread  # noqa: F401  (in force here too)
from virnucpro_cli import store
from virnucpro_cli.engine import placer

SECTOR = 512
CUTS = 24
Write = tuple[int, bytes]


class Recording:
    """The partial file as it was when it got its name, and what was written to it after: writes, and None for a sync.

    in_turn: whether the threads of the run take turns, so that every run has one record. Else it has a commit wherever
    the one before has ended, and writes of rows between its own.
    """

    def __init__(self, case: Case, folder: Path, in_turn: bool = False):
        self.base = b""
        self.log: list[Write | None] = []
        with pytest.MonkeyPatch.context() as patch:
            pwrite, fdatasync, rename = os.pwrite, os.fdatasync, os.rename

            def write(fd: int, data: Any, offset: int) -> int:
                count = pwrite(fd, data, offset)
                if self.base:
                    self.log.append((offset, bytes(data[:count])))
                return count

            def sync(fd: int) -> None:
                fdatasync(fd)
                self.log.append(None)

            def named(source: Any, target: Any) -> None:
                rename(source, target)
                self.base = Path(target).read_bytes()

            patch.setattr(os, "pwrite", write)
            patch.setattr(os, "fdatasync", sync)
            patch.setattr(os, "rename", named)
            patch.setattr(placer, "COMMIT_SECONDS", 0.0)
            if in_turn:
                patch.setattr(placer, "ThreadPoolExecutor", InTurn)
            case.embed(folder / "recorded.h5")
        assert len(self.log) > 50 and self.log.count(None) > 10, "too short a run: this tests nothing"

    def after_a_cut(self, dice: random.Random, path: Path) -> None:
        """The file that a power cut at some moment may leave: what was synced is there, of the rest any sectors."""
        moment = dice.randrange(len(self.log) + 1)
        synced = max((i for i in range(moment) if self.log[i] is None), default=0)
        survives = dice.choice((0.0, 0.2, 0.8, 1.0))
        data = bytearray(self.base)
        for i, entry in enumerate(self.log[:moment]):
            if entry is None:
                continue
            for offset, sector in sectors(*entry):
                if i < synced or dice.random() < survives:
                    data[offset : offset + len(sector)] = sector
        path.write_bytes(data)


def sectors(offset: int, data: bytes) -> Iterator[Write]:
    """A write in the parts that a disk takes whole."""
    at = 0
    while at < len(data):
        size = SECTOR - (offset + at) % SECTOR
        yield offset + at, data[at : at + size]
        at += size


def wrong_rows(case: Case, path: Path) -> int:
    """Rows whose status says done and that are not those of the uninterrupted run."""
    with h5py.File(path, "r") as file:
        done = np.flatnonzero(file["status"][:] == store.DONE)
        wrong = 0
        for name, expected in case.datasets.items():
            if name.startswith(("mean/", "bos/")):
                wrong += int((file[name][:][done] != expected[done]).any(axis=1).sum())
            elif name.startswith("residue/") and name != "residue/offsets":
                offsets, stored = case.datasets["residue/offsets"], file[name][:]
                wrong += sum(
                    (stored[a:b] != expected[a:b]).any() for a, b in zip(offsets[done], offsets[done + 1], strict=True)
                )
        wrong += int((file["reason"][:][done] != 0).sum())
    return wrong


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("small"), 60)


@pytest.fixture(scope="module")
def recording(small: Case, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording(small, tmp_path_factory.mktemp("recording"))


def test_after_a_power_cut_every_done_row_is_right_and_the_same_command_resumes(
    small: Case, recording: Recording, tmp_path: Path
) -> None:
    dice = random.Random(0)
    for i in range(CUTS):
        output = tmp_path / f"{i}.h5"
        recording.after_a_cut(dice, store.partial_path(output))
        assert wrong_rows(small, store.partial_path(output)) == 0
        small.embed(output)
        small.check(output)
        output.unlink()


def test_a_store_that_syncs_too_little_would_be_seen(small: Case, tmp_path: Path) -> None:
    """A run with its syncs struck from the record: the test above is not blind."""
    careless = Recording(small, tmp_path, in_turn=True)
    careless.log = [entry for entry in careless.log if entry is not None]
    dice, seen = random.Random(0), 0
    for i in range(CUTS):
        careless.after_a_cut(dice, tmp_path / f"{i}.h5")
        seen += wrong_rows(small, tmp_path / f"{i}.h5") > 0
    assert seen > CUTS // 4
