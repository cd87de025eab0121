"""`--emit contacts`: fair-esm's contacts for whom they are asked, resumed, sharded and merged to the bit, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import VIRAL, read_fasta, write_model
from virnucpro_cli import cli, store
from virnucpro_cli.cluster import merge
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import devices
from virnucpro_cli.errors import UserError
from virnucpro_cli.features import contacts
from virnucpro_cli.model import locate, weights
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import verify
from virnucpro_cli.validation.fair_esm import Reference, encode

Make = Callable[..., Path]
SMALL = ModelSpec("small", 2, 64, 4)
LENGTHS = [50, 7, 130, 1, 0, 50, 64, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("with_heads") / "model", SMALL)
    save_file(load_file(folder / "model.safetensors") | weights.random_heads(SMALL), folder / "model.safetensors")
    return folder


def embed(fasta: Path, output: Path, model: Path, **options: Any) -> dict[str, int]:
    options = {"model": str(model), "device": "cpu", "emit": ("contacts",), **options}
    return embed_fasta(str(fasta), str(output), **options).counts


def twice(fasta: Path) -> Path:
    """The same records once more, under other names."""
    text = fasta.read_text()
    fasta.write_text(text + text.replace(">p", ">q"))
    return fasta


def datasets(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        found: dict[str, Any] = {}
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return {name: np.asarray(values) for name, values in found.items() if not name.startswith("run/")}


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = datasets(found), datasets(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes() or ours[name].dtype == object, name


def by_fair_esm(spec: ModelSpec, state: dict[str, torch.Tensor], sequence: str) -> Any:
    with torch.no_grad():
        return Reference(spec, state).model.predict_contacts(torch.tensor([encode(sequence)]))[0].numpy()


def test_every_map_is_fair_esms(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    fasta = make_fasta(LENGTHS)
    embed(fasta, tmp_path / "out.h5", model, store_dtype="fp32", dtype="fp32", max_residues=100)
    spec, state, _ = weights.load(locate.locate(str(model)))
    with read_embeddings(tmp_path / "out.h5") as file:
        for row, (name, sequence) in enumerate(read_fasta(fasta)):
            if not sequence:
                assert file.contacts(row).shape == (0, 0)
                continue
            assert file.contacts(name).shape == (min(len(sequence), 100),) * 2
            assert np.abs(file.contacts(row) - by_fair_esm(spec, state, sequence[:100])).max() < 2e-5
    assert verify.verify_file(str(tmp_path / "out.h5")).passed


def test_a_map_has_the_same_bits_in_any_company_and_is_symmetric(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    lengths = [30, 2, 315, 352, 343, 77, 1, 130]
    fasta = make_fasta(lengths)
    options = {"store_dtype": "fp32", "dtype": "fp32", "max_residues": 400, "force_protein": True}
    embed(fasta, tmp_path / "all.h5", model, **options)
    assert verify.verify_file(str(tmp_path / "all.h5")).passed
    with read_embeddings(tmp_path / "all.h5") as every:
        for row, (name, sequence) in enumerate(read_fasta(fasta)):
            (tmp_path / "one.fasta").write_text(f">{name}\n{sequence}\n")
            embed(tmp_path / "one.fasta", tmp_path / f"{row}.h5", model, **options)
            with read_embeddings(tmp_path / f"{row}.h5") as alone:
                found = every.contacts(row)
                assert np.array_equal(found, found.T) and np.array_equal(found, alone.contacts(0)), lengths[row]


@pytest.mark.demo
def test_real_maps_are_fair_esms_and_far_from_even(tmp_path: Path, demo: Any) -> None:
    records = read_fasta(VIRAL)[:3]
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{name}\n{sequence[:200]}\n" for name, sequence in records))
    embed(fasta, tmp_path / "out.h5", Path("demo"), store_dtype="fp32")
    with read_embeddings(tmp_path / "out.h5") as file:
        for row, (_, sequence) in enumerate(records):
            found = file.contacts(row)
            assert np.abs(found - by_fair_esm(*demo, sequence[:200])).max() < 2e-5
            assert found.max() > 10 * np.median(found)


def test_equal_proteins_share_a_map(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    embed(twice(make_fasta(LENGTHS)), tmp_path / "out.h5", model)
    with read_embeddings(tmp_path / "out.h5") as file:
        maps = file.contact_maps
        assert maps is not None and len(maps.values) == sum(n * n for n in LENGTHS)
        assert maps.done == 2 * (len(LENGTHS) - 1) and np.array_equal(maps.starts[:8], maps.starts[8:])
        np.testing.assert_array_equal(file.contacts("p2"), file.contacts("q2"))
        assert file.contacts(0).dtype == np.float16


def test_only_those_that_are_named_have_a_map(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    fasta = twice(make_fasta(LENGTHS))
    (tmp_path / "names").write_text("q2\n\np0 \r\nnobody\n")
    embed(fasta, tmp_path / "all.h5", model)
    counts = embed(fasta, tmp_path / "out.h5", model, contacts_for=str(tmp_path / "names"))
    assert counts["contact maps"] == 2
    with read_embeddings(tmp_path / "out.h5") as file, read_embeddings(tmp_path / "all.h5") as every:
        assert [row for row in range(len(file)) if len(file.contacts(row))] == [0, 10]
        for row in (0, 10):
            np.testing.assert_array_equal(file.contacts(row), every.contacts(row))
    (tmp_path / "names").write_text("nobody\n")
    with pytest.raises(UserError, match=r"(?s)names no protein.*'p0'"):
        embed(fasta, tmp_path / "none.h5", model, contacts_for=str(tmp_path / "names"))
    with pytest.raises(UserError, match="cannot be read"):
        embed(fasta, tmp_path / "none.h5", model, contacts_for=str(tmp_path / "nowhere"))


def stop_after(maps: int, patch: pytest.MonkeyPatch) -> None:
    """The run ends like a killed one when so many maps have been placed: what they say of themselves is not yet on disk."""
    real, left = contacts.place, maps

    def counted(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(*arguments)

    patch.setattr(contacts, "place", counted)
    patch.setattr(contacts, "COMMIT_SECONDS", 0.0 if maps % 2 else 1e9)


@pytest.mark.parametrize("maps", [0, 1, 4, 5])
def test_a_stopped_run_goes_on_to_the_same_file(tmp_path: Path, make_fasta: Make, model: Path, maps: int) -> None:
    fasta = twice(make_fasta(LENGTHS))
    embed(fasta, tmp_path / "expected.h5", model)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(maps, patch)
        with pytest.raises(KeyboardInterrupt):
            embed(fasta, tmp_path / "out.h5", model)
    with read_embeddings(tmp_path / "out.h5.partial") as file:
        assert not file.complete and file.contact_maps is not None
        assert file.contact_maps.done == (2 * maps if maps % 2 else 0), "two proteins share each"
    computed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = contacts.place
        patch.setattr(contacts, "place", lambda *arguments: (computed.append(1), real(*arguments)))
        embed(fasta, tmp_path / "out.h5", model)
    assert len(computed) == 7 - (maps if maps % 2 else 0), "what was there is not computed again"
    assert_same(tmp_path / "out.h5", tmp_path / "expected.h5")


def test_what_there_is_no_memory_for_is_left_out_and_tried_again(
    tmp_path: Path, make_fasta: Make, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = make_fasta([50, 130, 60])
    embed(fasta, tmp_path / "expected.h5", model)
    command = [
        "embed",
        str(fasta),
        "-o",
        str(tmp_path / "out.h5"),
        "--model",
        str(model),
        "--device",
        "cpu",
        "--emit",
        "contacts",
    ]
    with pytest.MonkeyPatch.context() as patch:
        real = contacts.head.bytes_needed
        patch.setattr(contacts.head, "bytes_needed", lambda spec, n: real(spec, n) if max(n) < 100 else 1 << 60)
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
    assert stop.value.code == 3 and "1 protein without a contact map: out of memory" in capsys.readouterr().err
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.complete and file.contacts(1).shape == (0, 0) and len(file.contacts(2)) == 60
        assert file.contact_maps is not None and np.isnan(file.contact_maps.raw(1)).all()
    assert verify.verify_file(str(tmp_path / "out.h5")).passed
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--retry-skipped"])
    assert stop.value.code == 0
    assert_same(tmp_path / "out.h5", tmp_path / "expected.h5")


def test_memory_that_ends_midway_leaves_out_one_map(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    def scarce(self: Any, batch: Any) -> Any:
        if batch.used > 100:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(self, batch)

    real = contacts.head.Contacts.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contacts.head.Contacts, "start", scarce)
        assert embed(make_fasta([50, 130, 60]), tmp_path / "out.h5", model)["contact maps left out"] == 1
    with read_embeddings(tmp_path / "out.h5") as file:
        assert [len(file.contacts(row)) for row in range(3)] == [50, 0, 60]


def test_a_protein_that_is_not_finite_has_a_map_of_nan(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["contact_head.regression.bias" if "contact_head.regression.bias" in state else "x"] = torch.tensor(
        [torch.nan]
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    save_file({k: v for k, v in state.items() if k != "x"}, broken / "model.safetensors")
    embed(make_fasta([30]), tmp_path / "out.h5", broken)
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.contact_maps is not None and file.contact_maps.status.tolist() == [store.SKIPPED]
        assert np.isfinite(file[0]).all() and file.contacts(0).shape == (0, 0)
    assert verify.verify_file(str(tmp_path / "out.h5")).passed


def test_a_protein_without_an_embedding_has_no_map_however_the_run_went(
    tmp_path: Path, make_fasta: Make, model: Path
) -> None:
    state = load_file(model / "model.safetensors")
    state["emb_layer_norm_after.weight"][0] = torch.inf
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    save_file(state, broken / "model.safetensors")
    fasta = make_fasta([30, 40])
    embed(fasta, tmp_path / "one.h5", broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contacts, "fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(fasta, tmp_path / "two.h5", broken)
    embed(fasta, tmp_path / "two.h5", broken)
    assert_same(tmp_path / "two.h5", tmp_path / "one.h5")
    with read_embeddings(tmp_path / "one.h5") as file:
        assert file.contact_maps is not None and file.contact_maps.status.tolist() == [store.SKIPPED] * 2
        assert np.isnan(file.contact_maps.values[:]).all()
    assert verify.verify_file(str(tmp_path / "one.h5")).passed


def test_the_list_of_names_is_not_overwritten(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    names = tmp_path / "names"
    names.write_text("p0\n")
    with pytest.raises(UserError):
        embed(make_fasta(LENGTHS), tmp_path / "out.h5", model, contacts_for=str(names), report=str(names))
    assert names.read_text() == "p0\n"


def test_names_of_nobody_are_told_to_a_shard_too(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    (tmp_path / "names").write_text("nobody\n")
    with pytest.raises(UserError, match="names no protein"):
        embed(make_fasta(LENGTHS), tmp_path / "out.h5", model, contacts_for=str(tmp_path / "names"), shard="1/2")


@pytest.mark.parametrize("named", [False, True])
def test_shards_merged_are_the_single_runs_file(tmp_path: Path, make_fasta: Make, model: Path, named: bool) -> None:
    fasta = twice(make_fasta(LENGTHS * 2))
    (tmp_path / "names").write_text("q2\np0\nq0\np6\n")
    options = {"contacts_for": str(tmp_path / "names") if named else None}
    embed(fasta, tmp_path / "expected.h5", model, **options)
    for part in ("1/3", "2/3", "3/3"):
        embed(fasta, tmp_path / "out.h5", model, shard=part, **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        if not named:
            with pytest.raises(KeyboardInterrupt):
                merge.merge_shards(str(tmp_path / "out.h5"))
    merge.merge_shards(str(tmp_path / "out.h5"))
    assert_same(tmp_path / "out.h5", tmp_path / "expected.h5")
    assert verify.verify_file(str(tmp_path / "out.h5")).passed


def test_a_flipped_value_fails_verify(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    embed(make_fasta(LENGTHS), tmp_path / "out.h5", model)
    with h5py.File(tmp_path / "out.h5", "r+") as file:
        file["contacts/values"][3] = 0.25
    failed = {check.what for check in verify.verify_file(str(tmp_path / "out.h5")).checks if check.passed is False}
    assert failed == {"checksum of all bytes", "done rows finite, skipped rows NaN"}


def test_the_plan_says_what_the_maps_take(
    tmp_path: Path, make_fasta: Make, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = make_fasta([1000, 30])
    cli_options = ["--model", str(model), "--emit", "contacts", "--dry-run", "--store-dtype", "fp32"]
    with pytest.raises(SystemExit):
        cli.main(["embed", str(fasta), "-o", str(tmp_path / "out.h5"), *cli_options])
    assert "contacts: 4 MB of maps" in capsys.readouterr().err.replace("4.00", "4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--emit", "contacts", "--long", "window"], "in one piece"),
        (["--emit", "contacts", "--engine", "ray"], "--shard"),
        (["--contacts-for", "names"], "Add --emit contacts"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, make_fasta: Make, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["embed", str(make_fasta([9])), "-o", str(tmp_path / "out.h5"), *options])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_weights_without_the_head_are_refused_before_the_layout(
    tmp_path: Path, make_fasta: Make, tiny_model: Path
) -> None:
    with pytest.raises(UserError, match="no contact regression"):
        embed(make_fasta([30]), tmp_path / "out.h5", tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_the_models_own_memory_may_be_lacking(tmp_path: Path, make_fasta: Make, model: Path) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contacts.head.Contacts, "__init__", full)
        assert embed(make_fasta(LENGTHS), tmp_path / "out.h5", model)["contact maps left out"] == len(LENGTHS) - 1
    assert devices.is_for_want_of_memory(MemoryError())


def test_a_map_that_is_not_as_it_was_stored_is_computed_again(model: Path, tmp_path: Path) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a\nMKVLAWGG\n>b\nMKVLLLAWGG\n>c\nMKVLAWGG\n")
    output, whole = tmp_path / "out.h5", tmp_path / "whole.h5"
    embed(fasta, whole, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "finish", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            embed(fasta, output, model)
    with h5py.File(store.partial_path(output)) as file:
        offset = file["contacts/values"].id.get_offset()
    with open(store.partial_path(output), "r+b") as partial:
        partial.seek(offset + 40)
        partial.write(b"\xff\x12")
    embed(fasta, output, model)
    with h5py.File(output) as found, h5py.File(whole) as right:
        assert (found["contacts/values"][:] == right["contacts/values"][:]).all()
    with read_embeddings(output) as file:
        assert [note for note in file.report["notes"] if "contact maps of 2 proteins not in" in note]


@pytest.mark.parametrize("start", [-1, -7])
def test_a_map_that_is_nowhere_is_damage(tmp_path: Path, make_fasta: Make, model: Path, start: int) -> None:
    embed(make_fasta(LENGTHS), tmp_path / "out.h5", model)
    with h5py.File(tmp_path / "out.h5", "r+") as file:
        file["contacts/starts"][3] = start
    with pytest.raises(UserError, match="contacts/starts"):
        read_embeddings(tmp_path / "out.h5")
