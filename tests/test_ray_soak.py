"""A hundred kills of actors, nodes and drivers on a Ray cluster, at random moments: every run ends with the bits of one process."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

from test_ray import Case, Cluster, Driver, fill_of, slow_actors
from virnucpro_cli import store

pytestmark = pytest.mark.soak

KILLS, MOST_NODES = 100, 3
MOST_UNSEEN = 3
"""Kills without a new row between them: a driver gives up after five deaths, and hears of some late."""
LONGEST_RUN = 900.0
LONGEST_SILENCE = 40.0
"""Ray calls a node dead that said nothing for so long, and some."""
KINDS = {"actor": 10, "node": 4, "driver": 2}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    slow_actors(tmp_path, monkeypatch)
    made = Cluster(MOST_NODES)
    yield made
    made.ray.shutdown()


class Killer:
    """Whom it killed, by kind, and how often a driver gave up with a message and was started again."""

    def __init__(self, case: Case, cluster: Cluster):
        self.case, self.cluster, self.dice = case, cluster, random.Random(0)
        self.kills: Counter[str] = Counter()
        self.gave_up: list[str] = []

    def run(self, output: Path) -> None:
        """A run to its end: the same command again and again."""
        driver, rows, unseen = Driver(self.case, output, self.cluster.ray.address), 0, 0
        deadline = time.monotonic() + LONGEST_RUN
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                _, told = driver.process.communicate(timeout=self.dice.uniform(0, 3))
                if driver.process.returncode == 0:
                    return
                if driver.process.returncode != -signal.SIGKILL:
                    assert driver.process.returncode == 2 and "Traceback" not in told, told
                    self.gave_up.append(told)
                driver = Driver(self.case, output, self.cluster.ray.address)
            if len(self.cluster.nodes) < MOST_NODES and self.dice.random() < 0.3:
                self.cluster.nodes.append(self.cluster.add())
            if (fill := fill_of(store.partial_path(output))) > rows:
                rows, unseen = fill, 0
            if unseen < MOST_UNSEEN:
                unseen += self.kill(driver)
        driver.process.kill()
        raise AssertionError(f"no end after {LONGEST_RUN} s: {driver.process.communicate()[1]}")

    def kill(self, driver: Driver) -> bool:
        """Whether one was there to be killed."""
        (kind,) = self.dice.choices(list(KINDS), list(KINDS.values()))
        if kind == "driver":
            driver.process.kill()
        elif kind == "node" and self.cluster.nodes:
            node = self.cluster.nodes.pop(self.dice.randrange(len(self.cluster.nodes)))
            self.cluster.ray.remove_node(node, allow_graceful=False)
        elif kind == "actor" and (actors := self.cluster.actors()):
            os.kill(self.dice.choice(actors), signal.SIGKILL)
        else:
            return False
        self.kills[kind] += 1
        return True


def compared(case: Case, output: Path) -> tuple[int, int]:
    """How many rows are lost, and how many are there with other values than one process's."""
    with h5py.File(case.expected) as ours, h5py.File(output) as theirs:
        done = theirs["status"][:] == store.DONE
        differ = (ours["mean/4"][:] != theirs["mean/4"][:]).any(axis=1)
    return int((~done).sum()), int((differ & done).sum())


def test_a_hundred_kills_of_actors_nodes_and_drivers_lose_no_row(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, found = Case(tmp_path, 400), []
    killer = Killer(case, cluster)
    while killer.kills.total() < KILLS:
        output = tmp_path / f"{len(found)}.h5"
        killer.run(output)
        found.append(compared(case, output))
    lost, wrong = np.sum(found, axis=0)
    by_kind = ", ".join(f"{count} {kind}s" for kind, count in sorted(killer.kills.items()))
    with capsys.disabled():
        print(
            f"\n{len(found)} runs; {killer.kills.total()} kills: {by_kind}; drivers that gave up with a message and resumed:"
            f" {len(killer.gave_up)}; rows lost: {lost}, rows wrong: {wrong}"
        )
    for number in range(len(found)):
        case.check(tmp_path / f"{number}.h5")


def test_a_driver_without_a_node_waits_for_one_and_does_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    case = Case(tmp_path, 200)
    driver = Driver(case, tmp_path / "out.h5", cluster.ray.address)
    driver.wait_for_rows()
    for node in cluster.nodes:
        cluster.ray.remove_node(node, allow_graceful=False)
    before = cpu_seconds(driver.process.pid)
    time.sleep(LONGEST_SILENCE)
    assert cpu_seconds(driver.process.pid) - before < LONGEST_SILENCE / 10
    cluster.add()
    driver.ended()
    case.check(tmp_path / "out.h5")


def test_a_cluster_on_which_every_actor_dies_ends_the_run_and_the_same_command_resumes(
    cluster: Cluster, tmp_path: Path
) -> None:
    case = Case(tmp_path, 200)
    driver = Driver(case, tmp_path / "out.h5", cluster.ray.address)
    driver.wait_for_rows()
    while driver.process.poll() is None:
        for pid in cluster.actors():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    assert (
        driver.process.returncode == 2 and "5 actors were lost one after the other" in driver.process.communicate()[1]
    )
    Driver(case, tmp_path / "out.h5", cluster.ray.address).ended()
    case.check(tmp_path / "out.h5")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
