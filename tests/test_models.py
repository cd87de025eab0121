"""What `virnucpro models` says of each model, and licences: printed, recorded, and accepted before a download."""

import dataclasses
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest
import torch

from conftest import TINY, write_model
from packs import one_pack
from test_esmc import SMALL, transformers_model, written
from test_weights import COMMIT, FakeHub, Hub, point_hub_at, served
from virnucpro_cli import alphabet, cli
from virnucpro_cli.benchmark.bench import bench_model
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import inspect
from virnucpro_cli.machine import doctor, fetch, models, speeds
from virnucpro_cli.model import attention, families, locate, weights
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
    accepting = " --accept-licence" if families.family_of(spec).licence(spec).to_accept else ""
    assert f"`virnucpro fetch {name}{accepting}`" in message and "--model PATH" in message


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The output of `virnucpro models ...` in a terminal of so many columns."""

    def run(*arguments: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            cli.main(["models", *arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def test_the_table_has_every_model_in_80_columns_and_asks_no_hub(
    says: Callable[..., str], first: Hub, home: Path
) -> None:
    shown = says()
    names = [*families.SHORT_NAMES, "demo"]
    assert [name for name in names if f"│ {name} " not in shown] == []
    table = [line for line in shown.splitlines() if line[:1] in "┏┃┡│└┌"]
    assert max(map(len, table)) <= 80 and "A-I K-Z - . |" in shown and "1,022 residues" in shown
    assert first.requests == []


@pytest.mark.parametrize("columns", [40, 60, 76])
def test_a_narrow_terminal_has_every_model_in_lines(columns: int, says: Callable[..., str], home: Path) -> None:
    shown = says(columns=columns)
    assert all(f"│ {name} " in shown for name in [*families.SHORT_NAMES, "demo"]) and "layers of" in shown
    assert max(len(line) for line in shown.splitlines() if line[:1] in "┏┃┡│└┌") <= columns


def test_one_model_is_told_with_its_licence_its_place_and_the_way_to_have_it(
    says: Callable[..., str], first: Hub, home: Path
) -> None:
    assert f"virnucpro fetch {FIRST} --accept-licence" in says(FIRST, columns=200)
    fetch.fetch_weights(FIRST, accepted=True)
    shown = says(f"EvolutionaryScale/{FIRST}", columns=300)
    found = locate.locate(FIRST)
    assert found is not None and found.place in shown and "Cambrian Non-Commercial (https://" in shown
    assert "contacts" in says("650M") and "contacts" not in says(FIRST)
    assert says(columns=300).count(found.place) == 1


@pytest.mark.parametrize(("name", "count"), [("esmc", 5), ("ESM C", 5), ("ESM-1v", 5), ("esm2", 7), ("650", 1)])
def test_a_name_is_of_a_model_or_of_a_family(name: str, count: int, says: Callable[..., str], home: Path) -> None:
    assert len(json.loads(says(name, "--json"))) == count


def test_json_holds_what_the_table_shows_and_more(says: Callable[..., str], home: Path) -> None:
    rows = {row["name"]: row for row in json.loads(says("--json"))}
    assert len(rows) == len(families.SIZES)
    assert (rows["esm1b"]["longest"], rows["esmc-6b"]["longest"]) == (1022, None)
    assert (rows[FIRST]["licence"], rows[FIRST]["licence_to_accept"]) == ("Cambrian Non-Commercial", True)
    assert rows["3B"]["parameters"] == families.parameters(families.SIZES["esm2_t36_3B_UR50D"])
    assert rows["8M"]["tokens/s"] is None and rows["8M"]["place"] is None


def test_a_name_that_is_none_is_answered_with_the_nearest_and_a_path_with_the_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean esmc-600m"):
        models.show("esmc-600")
    with pytest.raises(UserError, match="is a path"):
        models.show(str(tmp_path))


def test_fused_kernels_are_told_where_they_run() -> None:
    assert models.Here("a GPU", "fp16", "triton").kernels == "fused"
    assert models.Here("a GPU", "fp16", "torch_varlen").kernels == "plain"


def test_where_nothing_can_run_the_table_is_shown_all_the_same(
    says: Callable[..., str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str) -> torch.device:
        raise UserError("A GPU is older than compute capability 5.0.")

    monkeypatch.setattr(devices, "resolve_device", refused)
    assert "Nothing here can run a model" in says() and "virnucpro doctor" in says("8M")
    assert json.loads(says("8M", "--json"))[0]["kernels"] is None


# --- speeds --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_keeps_the_speed_of_a_published_model_and_the_table_shows_it(
    hub: Hub, says: Callable[..., str], make_fasta: Callable[..., Path], home: Path
) -> None:
    fetch.fetch_weights("esm2_tiny")
    options = {"device": "cpu", "seconds": 0.01, "token_budget": 1024, "packed": True}
    bench_model(model="esm2_tiny", fasta=make_fasta([30, 40]), **options)  # of other lengths than all models have
    bench_model(model=write_model(home / "other", ModelSpec("other", 2, 48, 4)), **options)  # of no published model
    assert speeds.remembered() == []
    rates = [bench_model(model="esm2_tiny", **options).rates["tokens/s"] for _ in range(2)]
    (kept,) = speeds.remembered()
    assert (kept.model, kept.dtype, kept.rate) == ("esm2_tiny", "fp32", rates[-1])
    assert all(f"{rates[-1]:,.0f}" in says(columns=columns) for columns in (80, 70))
    assert json.loads(says("esm2_tiny", "--json"))[0]["tokens/s"] == rates[-1]


def test_a_speed_of_another_device_or_dtype_is_not_shown_as_the_one_here(says: Callable[..., str], home: Path) -> None:
    speeds.remember(speeds.Speed("esm2_t6_8M_UR50D", "another GPU", "fp16", "triton", 123456.0, "2026-01-01"))
    assert json.loads(says("8M", "--json"))[0]["tokens/s"] is None
    assert "123,456 on another GPU in fp16" in says("8M", columns=200)


def test_a_damaged_note_and_a_cache_that_cannot_be_written_keep_no_speed(home: Path) -> None:
    speed = speeds.Speed("esm2_t6_8M_UR50D", "CPU", "fp32", "sdpa", 1.0, "2026-01-01")
    (home / "xdg").write_text("a file where the cache should be")
    speeds.remember(speed)
    assert speeds.remembered() == []
    (home / "xdg").unlink()
    speeds.remember(speed)
    for content in ("", "[]", '{"model": "of another version"}'):
        (home / "xdg" / "virnucpro" / "speeds" / "damaged.json").write_text(content)
        assert speeds.remembered() == [speed]


def test_doctor_has_a_line_for_each_model_that_is_here_and_one_for_the_others(first: Hub, home: Path) -> None:
    fetch.fetch_weights(FIRST, accepted=True)
    found = {finding.what: finding.found for finding in doctor.look() if finding.what.startswith("weights")}
    assert set(found) == {f"weights {FIRST}", "weights not here"} and found[f"weights {FIRST}"].endswith(FILE)
    assert all(name in found["weights not here"] for name in ("650M", "demo", "esm1v-5", "dplm-3b", "esmc-6b"))


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["esm2", "dplm", "esm1b", "esm1v", "esmc"])
def test_letters_are_read_as_the_page_of_models_says(family: str) -> None:
    reading = families.FAMILIES[family].READING
    table = alphabet.letters("keep", reading)

    def read(text: bytes) -> list[str]:
        return [alphabet.TOKENS[i] for i in alphabet.token_ids(text, 99, table)]

    assert read(b"mkBZUO") == [*"MKBZUO"] and read(b"J*_7") == ["X"] * 4 and read(b"M - .\nK") == [*"M-.K"]
    assert alphabet.without_stop(b"MK*") == b"MK" and read(b"M<mask>K") == ["M", "<mask>", "K"]
    assert read(b"|") == (["<null_1>"] if family == "esmc" else ["X"])
    assert reading.scales_masks == (family != "esmc")


@pytest.mark.parametrize("layer", [0, 1])
def test_nothing_above_the_highest_layer_that_is_asked_for_is_computed(layer: int, tmp_path: Path) -> None:
    """A model without its last layer."""
    backend = attention.resolve("sdpa", torch.device("cpu"), torch.float32)
    model = families.build(TINY, weights.random_state(TINY), torch.float32, torch.device("cpu"), backend)
    batch, seen = one_pack(tmp_path, ["MKVLA"], 16), []
    model.layers = [*model.layers[:1], None]
    model.forward(batch, (0, layer), lambda number, hidden: seen.append(number))
    assert seen == [*dict.fromkeys((0, layer))]
    with pytest.raises(AttributeError):
        model.forward(batch, (TINY.layers,), lambda number, hidden: None)
