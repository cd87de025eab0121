"""The Ray engine on real clusters of several nodes: the bits of one process, whoever is killed.

All tests that start a cluster are in this file, since two clusters on a host find each other.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

import slowed
import test_adapters
import test_dnabert
import test_lucavirus
import test_nucleotide
from conftest import ROOT, write_model
from test_genes import contents
from virnucpro_cli import cli, fasta, report, store
from virnucpro_cli.cluster.ray import actor as actors
from virnucpro_cli.cluster.ray import driver
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import runner
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.engine.placer import Job, Placer
from virnucpro_cli.errors import UserError
from virnucpro_cli.kinds import NUCLEOTIDE
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import in_blocks
from virnucpro_cli.plan.policies import decide

os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves actors beside other tests
os.environ.setdefault("RAY_health_check_timeout_ms", "300000")  # a node that has no time for an answer is not lost
ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.slow

SMALL = ModelSpec("small", 4, 192, 12)
OPTIONS: dict[str, Any] = {
    "pool": ("mean", "residue"), "long": "window", "max_residues": 300, "overlap": 50, "token_budget": 1024, "device": "cpu",
}  # fmt: skip


def slow_actors(folder: Path, patch: pytest.MonkeyPatch, seconds: float = 0.3) -> Path:
    site = slowed.packs(folder / "site", seconds, "default_worker.py")
    patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    return site / "pace"


class Case:
    """An input with long and equal proteins, and what one process makes of it with one thread."""

    def __init__(self, folder: Path, size: int = 400):
        dice = random.Random(0)
        proteins = ["".join(dice.choices("ACDEFGHIKLMNPQRSTVWY", k=dice.randint(20, 400))) for _ in range(size)]
        proteins[7::50] = proteins[6::50]
        self.fasta = folder / "in.fasta"
        self.fasta.write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(proteins)))
        self.model = write_model(folder / "model", SMALL)
        self.expected = folder / "expected.h5"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        embed_fasta(self.fasta, self.expected, model=str(self.model), **OPTIONS)
        torch.set_num_threads(threads)

    def check(self, output: Path) -> None:
        with h5py.File(self.expected) as ours, h5py.File(output) as theirs:
            names: list[str] = []
            ours.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in names:
                if not name.startswith("run/"):
                    assert np.array_equal(ours[name][()], theirs[name][()], equal_nan=ours[name].dtype.kind == "f"), (
                        name
                    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"))


class Cluster:
    """A head without CPUs, where drivers are, and nodes of one CPU each."""

    def __init__(self, nodes: int):
        self.ray = cluster_utils.Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20})
        self.nodes = [self.add() for _ in range(nodes)]

    def add(self) -> Any:
        return self.ray.add_node(num_cpus=1, object_store_memory=100 << 20)

    def actors(self) -> list[int]:
        """Those of this cluster: processes are children of their node's raylet."""
        raylets = [str(node.all_processes["raylet"][0].process.pid) for node in self.ray.worker_nodes]
        command = ["pgrep", "-f", "ray::Actor", "-P", ",".join(raylets)]
        listed = subprocess.run(command, capture_output=True, text=True).stdout
        return [int(pid) for pid in listed.split()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """One cluster for all tests, and the file that holds the seconds that its actors take for a pack."""
    with pytest.MonkeyPatch.context() as patch:
        pace = slow_actors(tmp_path_factory.mktemp("actors"), patch, 0)
        made = Cluster(2)
        yield made, pace
        made.ray.shutdown()


@pytest.fixture
def cluster(shared: tuple[Cluster, Path]) -> Cluster:
    """The cluster with two nodes, whatever became of those of the last test."""
    made, pace = shared
    pace.write_text("0")
    made.nodes = [*made.ray.worker_nodes]
    while len(made.nodes) < 2:
        made.nodes.append(made.add())
    return made


class Driver:
    def __init__(self, case: Case, output: Path, address: str, *more: str):
        self.output = output
        command = [
            sys.executable, "-m", "virnucpro_cli", "embed", str(case.fasta), "-o", str(output), "--model", str(case.model),
            "--pool", "mean,residue", "--long", "window", "--max-residues", "300", "--overlap", "50", "--token-budget", "1024",
            "--device", "cpu", "--engine", "ray", "--ray-address", address, "--report", str(output) + ".json", *more,
        ]  # fmt: skip
        self.before = fill_of(store.partial_path(output))
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def wait_for_rows(self) -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.process.poll() is None:
            if fill_of(store.partial_path(self.output)) > self.before + 10:
                return
            time.sleep(0.02)
        raise AssertionError(f"no rows came: {self.process.communicate()}")

    def ended(self) -> dict[str, Any]:
        _, told = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, told
        return json.loads(Path(f"{self.output}.json").read_text())


def fill_of(partial: Path) -> int:
    if not partial.exists():
        return 0
    with h5py.File(partial, locking=False) as file:
        return int((file["mean/4"][:] != 0).any(axis=1).sum())


# --- an actor, without a cluster --------------------------------------------------------------------------------


def placer_of(case: Case, config: EmbedConfig) -> Placer:
    table = fasta.index(fasta.open_sources(config.inputs, case.fasta.parent))
    work = decide(table, config)
    plan = in_blocks(work.segments.length, 1024)
    nowhere: Any = None
    job = Job(config, table, work, plan, np.ones(len(table), np.bool_), nowhere, (4,), torch.float32)
    return Placer(nowhere, job, report.Clock(), pin=False)


def test_a_share_is_whole_whatever_packs_are_in_it(case: Case) -> None:
    placer = placer_of(case, EmbedConfig(inputs=(str(case.fasta),), output="x.h5", **OPTIONS))
    plan = placer.collator.plan
    dice = np.random.default_rng(0)
    for _ in range(20):
        packs = dice.choice(len(plan), dice.integers(1, 6), replace=False).tolist()
        share = driver.share_of(packs, placer)
        collator = VarlenCollator(actors.Texts(share), share.segments, share.embedded, share.plan)
        for here, there in enumerate(packs):
            batch = actors.Collate()((collator, share.numbers, here))
            expected = placer.collator(there)
            assert np.array_equal(batch.segments, expected.segments)
            for name in ("tokens", "positions", "cu_seqlens", "divisor", "query_tiles", "weights"):
                ours, theirs = getattr(batch, name), getattr(expected, name)
                assert theirs is None if ours is None else torch.equal(ours, theirs), name


def words(messages: list[Any]) -> list[str]:
    return [word for word, *_ in messages]


@pytest.fixture
def actor() -> Any:
    made = actors.Actor(EmbedConfig(inputs=("x",), output="x.h5", **OPTIONS), "cpu", torch.float32, 1)
    made.look()
    return made


def test_weights_that_are_not_on_a_node_are_sent_to_it(case: Case, actor: Any) -> None:
    found = locate.verified(locate.fetch(str(case.model), print))
    missing = [("no weights",)]
    assert actor.load(replace(found, files=(Path("/nowhere/model.safetensors"),)), (4,)) == missing
    assert actor.load(replace(found, sha256="0" * 64), (4,)) == missing, "other weights under the same path"
    spec, state, notes = weights.load(found)
    sent = {key: each.numpy() for key, each in state.items()}
    for array in sent.values():
        array.flags.writeable = False  # as in Ray's object store
    assert words(actor.take((spec, sent, notes), (4,))) == ["done"]
    placer = placer_of(case, EmbedConfig(inputs=(str(case.fasta),), output="x.h5", **OPTIONS))
    actor.work(driver.share_of([0], placer))
    assert words(actor.work(None))[-2:] == ["rows", "done"]


def test_an_actor_that_fails_says_so_and_answers_every_call(
    case: Case, actor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise runner.DeviceFailed("it fell off the bus")

    monkeypatch.setattr(runner, "serial", fails)
    assert words(actor.load(locate.verified(locate.fetch(str(case.model), print)), (4,))) == ["done"]
    placer = placer_of(case, EmbedConfig(inputs=(str(case.fasta),), output="x.h5", **OPTIONS))
    share = driver.share_of([0], placer)
    said = [message for share in (share, share, None) for message in actor.work(share)]
    (lost,) = (rest[0] for word, *rest in said if word == "lost")
    assert not lost.fatal and "fell off the bus" in lost.error.what and "done" not in words(said)


def test_a_cluster_of_this_host_starts_by_itself_and_the_report_says_when_the_driver_is_the_limit(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "LIMITED", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = embed_fasta(case.fasta, tmp_path / "out.h5", model=str(case.model), engine="ray", workers=1, **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    case.check(tmp_path / "out.h5")
    (said,) = (note for note in made.notes if "is the limit" in note)
    assert "--shard" in said


def test_actors_merge_adapters_too(tmp_path: Path, make_fasta: Callable[..., Path]) -> None:
    adapter, few = test_adapters.made(tmp_path), make_fasta([300] * 12)
    common = {"model": str(tmp_path / "base"), "adapter": str(adapter), "token_budget": 1024, "device": "cpu"}
    embed_fasta(few, tmp_path / "here.h5", **common)
    embed_fasta(few, tmp_path / "ray.h5", **common, engine="ray", workers=2)
    with store.read_embeddings(tmp_path / "here.h5") as here, store.read_embeddings(tmp_path / "ray.h5") as there:
        assert (here.dataset("mean", 3)[:] == there.dataset("mean", 3)[:]).all()


def test_actors_give_the_bits_of_one_process_of_nucleotides(tmp_path: Path) -> None:
    model = test_lucavirus.checkpoint(tmp_path / "model", "hub", test_lucavirus.authors_model())
    texts = [*test_lucavirus.ODD[NUCLEOTIDE], *test_lucavirus.sequences_of(NUCLEOTIDE, 60, 90)]
    path = test_lucavirus.written(tmp_path / "in.fasta", texts)
    options: dict[str, Any] = {
        "model": str(model), "kind": NUCLEOTIDE, "device": "cpu", "pool": ("mean", "residue"),
        "emit": ("logits", "pseudo-perplexity"),
    }  # fmt: skip
    embed_fasta(path, tmp_path / "one.h5", workers=1, **options)
    embed_fasta(path, tmp_path / "ray.h5", engine="ray", workers=1, **options)
    with store.read_embeddings(tmp_path / "one.h5") as one, store.read_embeddings(tmp_path / "ray.h5") as there:
        for kind, name in (("mean", 4), ("residue", 4), ("unmasked", "logits"), ("unmasked", "pseudo_perplexity")):
            assert np.array_equal(one.dataset(kind, name)[:], there.dataset(kind, name)[:])


def test_actors_compute_both_halves_of_contigs(tmp_path: Path) -> None:
    """Tokens of the nucleotide half are made while the actors compute the proteins."""
    model = write_model(tmp_path / "tiny")
    half = test_dnabert.checkpoint(tmp_path / "small", test_dnabert.SMALL, test_dnabert.state_of(test_dnabert.SMALL))
    dice = random.Random(5)
    bases = [test_nucleotide.without_stops(dice, length, "N") for length in (1400, 900, 60, 2, 1800)]
    (tmp_path / "c.fna").write_text("".join(f">c{i}\n{each}\n" for i, each in enumerate(bases)))
    options: dict[str, Any] = {
        "model": str(model), "nucleotide_model": str(half), "from_": "contigs", "genes": "virnucpro", "chunk": 300,
        "nucleotide": True, "device": "cpu", "token_budget": 1024,
    }  # fmt: skip
    embed_fasta(tmp_path / "c.fna", tmp_path / "one.h5", **options)
    embed_fasta(tmp_path / "c.fna", tmp_path / "ray.h5", engine="ray", workers=2, **options)
    one, there = contents(tmp_path / "one.h5"), contents(tmp_path / "ray.h5")
    assert len(one.pop("dna/sums")) == len(there.pop("dna/sums"))  # they vouch for the environment, too: its threads
    assert there == one


def test_without_ray_the_remedy_is_told(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"virnucpro\[ray\]"):
        embed_fasta(case.fasta, tmp_path / "out.h5", model=str(case.model), engine="ray")


def test_an_address_where_no_cluster_is_is_named(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["embed", str(case.fasta), "-o", str(tmp_path / "o.h5"), "--engine", "ray", "--ray-address", "auto"])
    assert end.value.code == 2 and "--ray-address auto" in capfd.readouterr().err


# --- a cluster that grows by itself -------------------------------------------------------------------------------


EXAMPLE = ROOT / "examples" / "ray" / "cluster.yaml"


def test_the_example_of_a_cluster_is_one_for_ray() -> None:
    from ray.autoscaler._private import util

    util.validate_config(util.fillout_defaults(yaml.safe_load(EXAMPLE.read_text())))


def test_the_nodes_of_the_example_are_started_when_they_are_asked_for(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example's node types, by Ray's autoscaler, as processes of this host; each has a CPU in the GPU's place."""
    example = yaml.safe_load(EXAMPLE.read_text())
    types = {name: node | {"node_config": {}} for name, node in example["available_node_types"].items()}
    types["gpu"]["resources"] = {"CPU": types["gpu"]["resources"]["GPU"]}
    types["ray.head.default"] = types.pop("head")  # the name that this provider gives it
    here = {"type": "fake_multinode", "use_node_id_as_ip": True}
    here |= dict.fromkeys(("disable_node_updaters", "disable_launch_config_check"), True)
    phases = ("setup", "initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    nothing = {f"{phase}_commands": list[str]() for phase in phases} | {"file_mounts": {}, "auth": {}, "docker": {}}
    nothing |= {name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")}
    monkeypatch.setattr(
        cluster_utils.AutoscalingCluster, "_generate_config",
        lambda *_, **__: example | nothing
        | {"provider": here, "available_node_types": types, "head_node_type": "ray.head.default"},
    )  # fmt: skip
    slow_actors(tmp_path, monkeypatch)  # or it would be over before the second node is there
    growing = cluster_utils.AutoscalingCluster(types["ray.head.default"]["resources"], {})
    growing.start()
    try:
        driver = Driver(case, tmp_path / "out.h5", "auto", "--workers", "2")
        found = driver.ended()
    finally:
        growing.shutdown()
    case.check(tmp_path / "out.h5")
    assert sum(node["actors"] for node in found["tables"]["Nodes"]) == 2


# --- one cluster for all, and last: no other may run beside it ----------------------------------------------------


def test_two_nodes_give_the_bits_of_one_process(case: Case, cluster: Cluster, tmp_path: Path) -> None:
    found = Driver(case, tmp_path / "out.h5", cluster.ray.address).ended()
    case.check(tmp_path / "out.h5")
    (nodes,) = found["tables"]["Nodes"]  # all of this host, by its name
    assert nodes["actors"] == 2 and nodes["tokens"] == found["counts"]["tokens"]


def test_a_node_an_actor_and_the_driver_are_killed_and_no_row_is_lost(
    case: Case, cluster: Cluster, tmp_path: Path
) -> None:
    driver = Driver(case, tmp_path / "out.h5", cluster.ray.address)
    driver.wait_for_rows()
    driver.process.kill()
    driver.process.wait()
    driver = Driver(case, tmp_path / "out.h5", cluster.ray.address)
    driver.wait_for_rows()
    cluster.ray.remove_node(cluster.nodes[0], allow_graceful=False)
    os.kill(cluster.actors()[0], signal.SIGKILL)
    cluster.add()
    found = driver.ended()
    case.check(tmp_path / "out.h5")
    assert "lost" in found["tables"]["Nodes"][0]["lost"]


def test_a_node_that_is_to_be_taken_away_ends_what_it_has_and_gets_no_more(
    case: Case, cluster: Cluster, shared: tuple[Cluster, Path], tmp_path: Path
) -> None:
    """A notice of pre-emption, as clouds give them: nothing is lost, and what the node would have done is done elsewhere."""
    shared[1].write_text("0.3")
    driver = Driver(case, tmp_path / "out.h5", cluster.ray.address)
    driver.wait_for_rows()
    subprocess.run(
        [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.ray.address, "--node-id",
            cluster.nodes[0].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
            "--deadline-remaining-seconds", "600",
        ], check=True, capture_output=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while len(cluster.actors()) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert driver.process.poll() is None, "its actor had gone while there was work for the other"
    cluster.ray.remove_node(cluster.nodes[0], allow_graceful=False)
    found = driver.ended()
    case.check(tmp_path / "out.h5")
    assert any("its node is to be taken away" in note for note in found["notes"])
    assert not any("lost" in note for note in found["notes"]) and found["tables"]["Nodes"][0]["lost"] == ""


def test_a_driver_that_is_told_to_stop_keeps_what_it_has(case: Case, cluster: Cluster, tmp_path: Path) -> None:
    driver = Driver(case, tmp_path / "out.h5", cluster.ray.address)
    driver.wait_for_rows()
    driver.process.send_signal(signal.SIGTERM)
    _, told = driver.process.communicate(timeout=600)
    assert driver.process.returncode == 128 + signal.SIGTERM and "the same command resumes" in told
    with store.read_embeddings(store.partial_path(tmp_path / "out.h5")) as file:
        assert (file.status == store.DONE).any()
