"""What `virnucpro models` says of each model, and licences: printed, recorded, and accepted before a download."""

import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import h5py
import pytest
import torch

from conftest import write_model
from test_esmc import SMALL, transformers_model, written
from test_weights import COMMIT, FakeHub, Hub, point_hub_at
from virnucpro_cli import cli
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import inspect
from virnucpro_cli.machine import fetch
from virnucpro_cli.model import families, locate, weights
from virnucpro_cli.model.spec import ModelSpec

FIRST = "esmc-600m-2024-12"
FILE = "data/weights/esmc_600m_2024_12_v0.pth"


class FirstHub(FakeHub):
    """A hub with the repository of the makers' first ESM C, whose file is in a folder and has no configuration."""

    def do_GET(self) -> None:
        path, repository = self.path.partition("?")[0], f"EvolutionaryScale/{FIRST}"
        self.requests.append(f"{self.command} {path}")
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path == f"/api/models/{repository}":
            self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": self.siblings()}).encode())
        elif path.startswith(f"/{repository}/resolve/") and name in self.files:
            self.send(self.files[name])
        else:
            self.send(b"", 404)


def served(hub: Hub, handler: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: partial(handler, hub.files, hub.published, hub.requests)(*args)
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_hub_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return written(tmp_path / "published", "esm 3.2", transformers_model())


@pytest.fixture
def first(home: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The first ESM C 600M, so small that a test can have it, on a hub."""
    monkeypatch.setitem(families.SIZES, FIRST, dataclasses.replace(SMALL, name=FIRST))
    hub = Hub()
    hub.files = {FILE: published.read_bytes(), "README.md": b"not weights"}
    yield from served(hub, FirstHub, monkeypatch)


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a tiny ESM-2, whose licence is ESM-2's."""
    monkeypatch.setitem(families.SIZES, "esm2_tiny", ModelSpec("esm2_tiny", 2, 32, 4))
    hub = Hub()
    hub.publish(write_model(home / "published"))
    yield from served(hub, FakeHub, monkeypatch)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a hub that nobody is at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_hub_at(monkeypatch, url)
    return url


# --- licences ------------------------------------------------------------------------------------------------------


def test_every_model_has_a_licence_and_two_have_to_be_accepted() -> None:
    licences = {name: families.family_of(spec).licence(spec) for name, spec in families.SIZES.items()}
    assert {name for name, licence in licences.items() if licence.to_accept} == {"esmc-300m-2024-12", FIRST}
    assert all(licence.url for licence in licences.values() if licence.to_accept)
    assert {licences[name].name for name in ("esm2_t33_650M_UR50D", "ESMC-600M", "esm1b_t33_650M_UR50S")} == {"MIT"}
    assert (licences["demo"].name, licences["dplm_3b"].name) == ("GPL-3.0", "Apache-2.0")


@pytest.mark.parametrize("name", [FIRST, f"EvolutionaryScale/{FIRST}", "ESMC_600M_2024_12"])
def test_weights_whose_licence_has_to_be_accepted_are_not_asked_for_without_the_flag(
    name: str, first: Hub, make_fasta: Callable[..., Path], home: Path
) -> None:
    for call in (
        lambda: fetch.fetch_weights(name),
        lambda: embed_fasta(make_fasta([20]), home / "out.h5", model=name, device="cpu"),
    ):
        with pytest.raises(UserError, match=r"Cambrian Non-Commercial \(https://\S+\)\.") as caught:
            call()
        assert f"virnucpro fetch {FIRST} --accept-licence" in caught.value.remedy
    assert first.requests == [] and locate.locate(name) is None


def test_accepted_weights_are_fetched_from_the_layout_of_esm_3_2_and_used_without_the_flag(
    first: Hub, published: Path, make_fasta: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch.fetch_weights(FIRST, accepted=True)
    assert "licence: Cambrian Non-Commercial (https://" in capsys.readouterr().err
    assert any(line.endswith(FILE) for line in first.requests) and not any("config.json" in r for r in first.requests)
    found = locate.locate(f"EvolutionaryScale/{FIRST}")
    assert found is not None and found.place.endswith(FILE)
    spec, state, _ = weights.load(found)
    given = locate.locate(str(published))
    assert given is not None and spec == families.SIZES[FIRST]
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.load(given)[1].items())
    embed_fasta(make_fasta([20]), home / "out.h5", model=FIRST, device="cpu")
    with h5py.File(home / "out.h5") as file:
        assert file.attrs["weights_licence"].startswith("Cambrian Non-Commercial (https://")


def test_a_path_is_never_refused_for_a_licence(first: Hub, published: Path, make_fasta: Callable[..., Path]) -> None:
    out = published.with_name("out.h5")
    embed_fasta(make_fasta([20]), out, model=published, device="cpu")
    with h5py.File(out) as file:
        assert "weights_licence" not in file.attrs
    assert first.requests == []


def test_a_refusal_names_the_model_of_that_size_that_needs_no_consent(home: Path) -> None:
    with pytest.raises(UserError, match="esmc-600m is of the same size, under MIT"):
        locate.fetch(FIRST, print)


def test_a_dry_run_says_that_a_licence_has_to_be_accepted_and_fetches_nothing(
    first: Hub, make_fasta: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, words in ((FIRST, f"virnucpro fetch {FIRST} --accept-licence"), ("8M", "embed fetches them")):
        options = ["embed", str(make_fasta([20])), "-o", str(home / "out.h5"), "--device", "cpu", "--dry-run"]
        with pytest.raises(SystemExit) as ended:
            cli.main([*options, "--model", model])
        assert not ended.value.code and words in capsys.readouterr().err
    assert first.requests == []


def test_a_licence_is_printed_when_embed_downloads_and_kept_in_the_file(
    hub: Hub, make_fasta: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["embed", str(make_fasta([20])), "-o", str(home / "out.h5"), "--model", "esm2_tiny", "--device", "cpu"]
        )
    assert not ended.value.code and "models/facebook/esm2_tiny" in " ".join(hub.requests)
    assert "facebook/esm2_tiny; licence: MIT" in capsys.readouterr().err
    with h5py.File(home / "out.h5") as file:
        assert file.attrs["weights_licence"] == "MIT"
    inspect.inspect_file(str(home / "out.h5"))
    assert "licence of the weights" in capsys.readouterr().out


def test_random_weights_have_no_licence() -> None:
    found = locate.locate("random:8M")
    assert found is not None and locate.licence_of(found) is None


def test_a_directory_of_a_published_size_is_not_taken_for_weights_under_terms() -> None:
    assert weights._published_name(36, 1152, 18, "esmc") == "ESMC-600M"


@pytest.mark.parametrize("name", [*families.SHORT_NAMES])
def test_each_model_that_cannot_be_fetched_says_where_it_was_looked_for_and_what_to_do(
    name: str, home: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = families.by_name(name)
    assert spec is not None
    with pytest.raises(UserError, match="are not on this machine and could not be fetched") as caught:
        locate.fetch(name, print, accepted=True)
    message = str(caught.value)
    assert all(str(place) in message for place in locate.places(spec))
    assert f"https://huggingface.co/{families.family_of(spec).repository(spec)}: " in message
    assert f"virnucpro fetch {spec.name}" in message and "--model PATH" in message
