"""Embeddings in the layouts of other tools, read by those tools."""

import csv
import dataclasses
import errno
import functools
import gzip
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from children import Child, program
from virnucpro_cli import store
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.exchange import export, importing, layouts
from virnucpro_cli.exchange.layouts import target as target_of
from virnucpro_cli.exchange.layouts.layout import Keys, possible
from virnucpro_cli.explore import inspect
from virnucpro_cli.store import disk, reader
from virnucpro_cli.validation import verify

LONG = "n" * 300
RECORDS = (
    ("sp|P1|A_B", "MKVLAGW"),
    ("a/b", "mkvlagwmkv"),
    ("twice", "ACDEFG"),
    ("copy", "MKVLAGW"),
    ("empty", ""),
    ("..", "MKXLAG*"),
    ("twice", "GGGHHH"),
    ("a_b", "WWWLLL"),
    ("long", "ACDEFGHIKL" * 15),
    ("名前", "PPPQQQ"),
    (LONG, "SSSTTTV"),
)
DONE = [i for i, (_, text) in enumerate(RECORDS) if text]
NAMES = [name for name, _ in RECORDS]
DISTINCT = [i for i in DONE if NAMES[i] != "copy"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return embedded(tmp_path_factory.mktemp("made"), tiny_model, max_residues=100)


def embedded(folder: Path, model: Path, **options: Any) -> Path:
    """out.h5 of those records, layers 1 and 2, most kinds; beside it in.fasta."""
    (folder / "in.fasta").write_text("".join(f">{name} words\n{text[:9]}\n{text[9:]}\n" for name, text in RECORDS))
    embed_fasta(
        folder / "in.fasta", folder / "out.h5", model=str(model), device="cpu", layers=(1, 2),
        pool=("mean", "bos", "max", "residue"), invalid="x", force_protein=True,
        **options,
    )  # fmt: skip
    return folder


@pytest.fixture
def rows(made: Path) -> Callable[..., Any]:
    """What out.h5 holds of a record."""

    def of(i: int, kind: str = "mean", layer: int = 2) -> Any:
        with store.read_embeddings(made / "out.h5") as file:
            return file.residues(i, layer) if kind == "residue" else file.dataset(kind, layer)[i]

    return of


@pytest.fixture(params=[1 << 26, 1], ids=["one stretch", "a record at a time"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", request.param)


WHOLE = pytest.mark.parametrize("chunks", [1 << 26], ids=["one stretch"], indirect=True)
"""Of tests to which it is all one how much is read at once."""


def exported(made: Path, target: Path, to: str, **options: Any) -> Any:
    export.export_file(str(made / "out.h5"), to, str(target), **options)
    return target


pytestmark = pytest.mark.usefixtures("chunks")


# --- each layout, read by its own reader -----------------------------------------------------------------------------


def test_npy_is_mapped_by_numpy_and_its_table_says_whose_rows_are_whose(
    made: Path, tmp_path: Path, rows: Callable[..., Any]
) -> None:
    array = np.load(exported(made, tmp_path / "x.npy", "npy"), mmap_mode="r")
    with open(tmp_path / "x.tsv", newline="") as text:
        table = list(csv.DictReader(text, dialect="excel-tab"))
    assert [line["id"] for line in table] == NAMES
    assert [int(line["length"]) for line in table] == [len(text.rstrip("*")) for _, text in RECORDS]
    assert [line["reason"] for line in table if line["status"] == "skipped"] == ["empty"]
    for i in range(len(RECORDS)):
        np.testing.assert_array_equal(array[int(table[i]["row"])], rows(i))


def test_npy_of_residues_has_a_stretch_of_rows_for_each_protein(
    made: Path, tmp_path: Path, rows: Callable[..., Any]
) -> None:
    array = np.load(exported(made, tmp_path / "x.npy", "npy", kinds=("residue",), numbers=(1,)))
    with open(tmp_path / "x.tsv", newline="") as text:
        for i, line in enumerate(csv.DictReader(text, dialect="excel-tab")):
            np.testing.assert_array_equal(array[int(line["row"]) :][: int(line["rows"])], rows(i, "residue", 1))


def test_pandas_reads_parquet(made: Path, tmp_path: Path, rows: Callable[..., Any]) -> None:
    import pandas

    table = pandas.read_parquet(exported(made, tmp_path / "x.parquet", "parquet", kinds=("max",)))
    assert table["id"].tolist() == NAMES and table["status"].tolist().count("skipped") == 1
    assert [i for i, given in enumerate(table["embedding"]) if not np.isnan(given).all()] == DONE
    for i in DONE:
        np.testing.assert_array_equal(table["embedding"][i], rows(i, "max"))


def test_anndata_reads_h5ad(made: Path, tmp_path: Path, rows: Callable[..., Any]) -> None:
    import anndata

    found = anndata.read_h5ad(exported(made, tmp_path / "x.h5ad", "anndata", kinds=("bos",)))
    assert found.obs["id"].tolist() == NAMES and found.obs_names.is_unique
    assert found.obs["status"].tolist().count("skipped") == 1 and found.uns["virnucpro"]["layer"] == 2
    assert found.obs["length"].tolist() == [len(text.rstrip("*")) for _, text in RECORDS]
    for i in range(len(RECORDS)):
        np.testing.assert_array_equal(found.X[i], rows(i, "bos"))
    found.write_h5ad(tmp_path / "again.h5ad")


def test_fair_esm_files_hold_any_kinds_and_layers(made: Path, tmp_path: Path, rows: Callable[..., Any]) -> None:
    folder = exported(made, tmp_path / "x", "fair-esm", kinds=("mean", "bos", "residue"), numbers=(1, 2))
    found = [torch.load(path, weights_only=True) for path in folder.glob("*.pt")]
    assert sorted(each["label"] for each in found) == sorted(NAMES[i] for i in DONE)
    one = torch.load(folder / "long.pt", weights_only=True)
    i = NAMES.index("long")
    for group, kind in (
        ("mean_representations", "mean"),
        ("bos_representations", "bos"),
        ("representations", "residue"),
    ):
        for layer in (1, 2):
            np.testing.assert_array_equal(one[group][layer], rows(i, kind, layer))
            assert one[group][layer].dtype == torch.float32
    assert (folder / "long.pt").stat().st_size < 100_000, "a view saved with all that it is a view of"


def test_virnucpro_files_hold_names_and_means(
    made: Path, tmp_path: Path, rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts.virnucpro, "MOST", 4)
    folder = exported(made, tmp_path / "x", "virnucpro")
    found = [torch.load(folder / f"output_{i}_ESM.pt", weights_only=True) for i in range(3)]
    assert [len(each["proteins"]) for each in found] == [4, 4, 2]
    assert [name for each in found for name in each["proteins"]] == [NAMES[i] for i in DONE]
    for i, row in zip(DONE, [row for each in found for row in each["data"]], strict=True):
        np.testing.assert_array_equal(row, rows(i))


def test_broad_files_hold_ids_beside_embeddings(made: Path, tmp_path: Path, rows: Callable[..., Any]) -> None:
    with h5py.File(exported(made, tmp_path / "x.h5", "broad")) as file:
        assert file["sequence_ids"].asstr()[:].tolist() == [NAMES[i] for i in DONE]
        assert file["embeddings"].dtype == np.float32
        np.testing.assert_array_equal(file["embeddings"], [rows(i) for i in DONE])


@pytest.mark.parametrize("kind", ["mean", "residue"])
def test_scikit_bio_reads_its_embed_format(made: Path, tmp_path: Path, rows: Callable[..., Any], kind: str) -> None:
    import skbio

    into = {"mean": skbio.embedding.ProteinVector, "residue": skbio.embedding.ProteinEmbedding}[kind]
    target = exported(made, tmp_path / "x.h5", "scikit-bio", kinds=(kind,))
    found = list(skbio.read(str(target), format="embed", constructor=into))
    assert len(found) == len(DONE)
    for i, each in zip(DONE, found, strict=True):
        text = RECORDS[i][1].upper().rstrip("*")
        assert str(each) == (text[:100] if kind == "residue" else text)
        np.testing.assert_allclose(np.squeeze(each.embedding), rows(i, kind), rtol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "residue"])
def test_files_keyed_by_sequence_have_the_documented_keys_and_names(
    made: Path, tmp_path: Path, rows: Callable[..., Any], kind: str
) -> None:
    with h5py.File(exported(made, tmp_path / "x", "biotrainer", kinds=(kind,))) as file:
        assert len(file) == len(DISTINCT)
        for i in DISTINCT:
            text = RECORDS[i][1]
            key = hashlib.sha256(f"{text}_{len(text)}".encode()).hexdigest()
            assert file[key].attrs["original_id"] == NAMES[i]
            np.testing.assert_array_equal(file[key], rows(i, kind))


@WHOLE
def test_files_of_bio_embeddings_are_read_as_keyed_h5(made: Path, tmp_path: Path, rows: Callable[..., Any]) -> None:
    with h5py.File(tmp_path / "reduced_embeddings_file.h5", "w") as file:
        for i in DISTINCT:
            data = file.create_dataset(hashlib.md5(RECORDS[i][1].encode()).hexdigest(), data=rows(i))
            data.attrs["original_id"] = NAMES[i]
    importing.import_file(str(tmp_path / "reduced_embeddings_file.h5"), str(tmp_path / "x.h5"), model="8M")
    with store.read_embeddings(tmp_path / "x.h5") as found:
        for i in (i for i in DISTINCT if NAMES[i] != "twice"):
            np.testing.assert_array_equal(found[found.find(NAMES[i])[0]], rows(i))
    with pytest.raises(UserError, match="bio-embeddings is no longer supported: keyed-h5"):
        layouts.named("bio-embeddings")


@pytest.mark.parametrize("kind", ["mean", "residue"])
def test_keyed_files_have_a_dataset_for_each_name(
    made: Path, tmp_path: Path, rows: Callable[..., Any], kind: str
) -> None:
    with h5py.File(exported(made, tmp_path / "x.h5", "keyed-h5", kinds=(kind,))) as file:
        assert {"sp|P1|A_B", "a_b", "a_b_2", "twice", "twice_2", "__", "copy", "long", "名前", LONG} == set(file)
        for data in file.values():
            name = data.attrs.get("original_id", data.name[1:])
            i = NAMES.index(name) + (4 if data.name == "/twice_2" else 0)
            np.testing.assert_array_equal(data, rows(i, kind))


@pytest.mark.parametrize("to", ["npy", "scikit-bio", "fair-esm", "keyed-h5"])
def test_a_protein_that_was_given_up_has_no_rows_that_are_anothers(
    made: Path, tmp_path: Path, rows: Callable[..., Any], to: str
) -> None:
    shutil.copy(made / "out.h5", tmp_path / "in.h5")
    with h5py.File(tmp_path / "in.h5", "r+") as file:
        file["status"][2], file["reason"][2] = store.SKIPPED, store.NOT_FINITE
    target = tmp_path / f"x{layouts.named(to).suffix}"
    export.export_file(str(tmp_path / "in.h5"), to, str(target), kinds=("residue",))
    found = [
        (entry.name, entry.key, np.asarray(next(iter(entry.values.values()))))
        for entry in layouts.named(to).read(target)
        if entry.name != "twice" and not entry.skipped
    ]
    assert len(found) == len(DONE) - (1 if to == "scikit-bio" else 2)
    texts = [text[:100].upper().rstrip("*") for _, text in RECORDS]
    for name, key, values in found:
        i = texts.index(key) if to == "scikit-bio" else NAMES.index(name)
        np.testing.assert_array_equal(values, rows(i, "residue"))


# --- names -----------------------------------------------------------------------------------------------------------


@WHOLE
def test_names_that_were_changed_are_reported(made: Path, tmp_path: Path) -> None:
    summary = export.export_file(str(made / "out.h5"), "keyed-h5", str(tmp_path / "x.h5"))
    assert any("'a/b' is 'a_b'" in note and "'twice_2'" in note for note in summary.notes)
    assert any("skipped left out" in note for note in summary.notes)


@WHOLE
@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../x", "a\0b", "\n", "n" * 500, "名" * 100])
def test_a_possible_name_is_a_file_name(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{possible(name, 200)}.pt").write_bytes(b"")
    assert len(list(tmp_path.iterdir())) == 1


# --- what is refused, and what is left -------------------------------------------------------------------------------


@WHOLE
@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
def test_a_target_is_replaced_only_when_told_and_whole(
    made: Path, tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".h5", ".h5ad")}

    target = exported(made, tmp_path / f"x{layout.suffix}", layout.name)
    before, names = content(), sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="exists"):
        exported(made, target, layout.name)
    exported(made, target, layout.name, overwrite=True)
    assert sorted(tmp_path.iterdir()) == names and layout.recognises(target)

    def stopped(self: Any, start: int, stop: int) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.EmbeddingFile, "names_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        exported(made, target, layout.name, overwrite=True)
    assert content() == before and sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("chunks", "room"), [(1 << 26, 0), (1 << 26, 500), (1, 500)], indirect=["chunks"])
def test_a_full_disk_is_one_message_of_the_target_and_leaves_nothing(
    made: Path, tmp_path: Path, layout: Any, room: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"x\S* cannot be written"):
            exported(made, tmp_path / f"x{layout.suffix}", layout.name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@WHOLE
@pytest.mark.parametrize("kind", ["mean", "residue"])
def test_scikit_bio_knows_a_protein_by_a_letter_for_each_residue(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    path, out = tmp_path / "in.fasta", tmp_path / "out.h5"
    path.write_text(">stop\nMKV.\n>masked\nM<mask>V\n>gap\nM-V\n>star\nMKVL*\n")
    embed_fasta(path, out, model=str(tiny_model), device="cpu", pool=("mean", "residue"))
    target, back = tmp_path / "x.skbio.h5", tmp_path / "back.h5"
    export.export_file(str(out), "scikit-bio", str(target), (kind,))
    keys = [entry.key for entry in layouts.named("scikit-bio").read(target)]
    assert keys == ["MKV", "MXV", "M-V", "MKVL"]
    importing.import_file(str(target), str(back), "scikit-bio", (str(path),))
    with store.read_embeddings(out) as file, store.read_embeddings(back) as again:
        assert (again.status == store.DONE).all()
        np.testing.assert_allclose(again.dataset(kind, 2)[:], file.dataset(kind, 2)[:], rtol=1e-3)


FOLDERS = [layout.name for layout in layouts.LAYOUTS if layout.folder]


def everything(folder: Path) -> dict[str, bytes | str]:
    """All that is below a folder: the bytes of files, where links lead, folders."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def a_file(target: Path) -> None:
    (target / "thesis.txt").write_text("all of it")


def a_pt_file_of_a_folder(target: Path) -> None:
    (target / "deep").mkdir()
    torch.save({"label": "mine", "proteins": [], "data": []}, target / "deep" / "mine.pt")


def a_link(target: Path) -> None:
    (target.parent / "elsewhere").write_text("mine")
    (target / "link.pt").symlink_to(target.parent / "elsewhere")


def a_changed_file(target: Path) -> None:
    first = min(path for path in target.iterdir() if not path.name.startswith("."))
    first.write_bytes(first.read_bytes() + b"more")


def a_list_that_leads_outside(target: Path) -> None:
    (target.parent / "outside").write_text("mine")
    (target / "mine.txt").write_text("mine")
    listed = {"../outside": hashlib.sha256(b"mine").hexdigest(), str(target.parent / "outside"): "", "mine.txt": ""}
    (target / ".virnucpro-export.json").write_text(json.dumps(listed))


def no_list(target: Path) -> None:
    (target / ".virnucpro-export.json").unlink()


def a_list_that_is_none(target: Path) -> None:
    (target / ".virnucpro-export.json").write_text("[1]")


def a_list_that_is_a_link(target: Path) -> None:
    (target / ".virnucpro-export.json").rename(target.parent / "list.json")
    (target / ".virnucpro-export.json").symlink_to(target.parent / "list.json")


ADDED = [a_file, a_pt_file_of_a_folder, a_link, a_changed_file, a_list_that_leads_outside, no_list, a_list_that_is_none,
         a_list_that_is_a_link]  # fmt: skip


@WHOLE
@pytest.mark.parametrize("add", ADDED)
@pytest.mark.parametrize("to", FOLDERS)
def test_a_folder_that_holds_anything_but_an_exports_files_is_never_replaced(
    made: Path, tmp_path: Path, to: str, add: Callable[[Path], None]
) -> None:
    target = exported(made, tmp_path / "x", to)
    add(target)
    before = everything(tmp_path)
    with pytest.raises(UserError, match="not touched"):
        exported(made, target, to, overwrite=True)
    assert everything(tmp_path) == before


@WHOLE
@pytest.mark.parametrize("to", FOLDERS)
def test_the_folder_of_the_source_and_the_current_one_are_never_replaced(
    made: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "here")
    (tmp_path / "here" / "deep").mkdir()
    before = everything(tmp_path)
    source = str(tmp_path / "here" / "out.h5")
    for folder, target in (("here", "."), ("here/deep", ".."), (".", "here"), ("here", str(tmp_path))):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(UserError, match="holds"):
            export.export_file(source, to, target, overwrite=True, inputs=(str(tmp_path / "here" / "in.fasta"),))
    assert everything(tmp_path) == before
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="holds the current folder"):
        exported(made, Path("."), to, overwrite=True)


@WHOLE
def test_an_empty_folder_and_one_of_an_export_are_replaced_when_told(made: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    exported(made, tmp_path / "x", "virnucpro", overwrite=True)
    exported(made, tmp_path / "x", "fair-esm", overwrite=True)
    assert not list((tmp_path / "x").glob("output_*")) and (tmp_path / "x" / "long.pt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@WHOLE
def test_a_folder_that_changes_while_it_is_replaced_is_put_back(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = exported(made, tmp_path / "x", "fair-esm")
    rename = os.rename

    def meanwhile(source: Path, to: Path) -> None:
        if source == target and not (target / "new.txt").exists():
            (target / "new.txt").write_text("mine")
        rename(source, to)

    monkeypatch.setattr(os, "rename", meanwhile)
    with pytest.raises(UserError, match="was changed while"):
        exported(made, target, "fair-esm", overwrite=True)
    assert (target / "new.txt").read_text() == "mine" and (target / "long.pt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@WHOLE
def test_a_table_beside_the_target_that_is_not_exports_is_not_replaced(made: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("label\thost\nmine\tbat\n")
    with pytest.raises(UserError, match="was not written by export"):
        exported(made, tmp_path / "x.npy", "npy", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tsv"]


def killed_export(source: str, to: str, target: str) -> None:
    """An export that dies after some records."""
    reader.CHUNK_BYTES = 1
    names_of = store.EmbeddingFile.names_of

    def killed(self: Any, start: int, stop: int) -> Any:
        if start > 4:
            os._exit(9)
        return names_of(self, start, stop)

    store.EmbeddingFile.names_of = killed  # type: ignore[method-assign]
    export.export_file(source, to, target, overwrite=True)


@WHOLE
@pytest.mark.parametrize("to", ["fair-esm", "npy", "keyed-h5"])
def test_nothing_of_a_killed_export_stays_once_it_runs_again(
    made: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1)
    target = exported(made, tmp_path / f"x{layouts.named(to).suffix}", to)
    before = everything(tmp_path)
    for _ in range(2):
        child = Child(killed_export, str(made / "out.h5"), to, str(target))
        assert child.wait() == 9, child.err
        assert len(list(tmp_path.glob(".x*.virnucpro-partial"))) == 1
    exported(made, target, to, overwrite=True)
    assert everything(tmp_path).keys() == before.keys()


def at_a_name(number: int, do: Callable[[], Any]) -> None:
    """In this process something is done before call `number` of those that give a file a name or take it."""
    calls = itertools.count(1)

    def count(frame: Any, event: str, argument: Any) -> None:
        is_one = event == "c_call" and argument.__name__ in ("rename", "replace", "unlink", "rmdir")
        is_one |= event == "call" and frame.f_code is disk.rename_exclusive.__code__
        if is_one and next(calls) == number:
            do()

    sys.setprofile(count)


def killed_at_a_name(number: int) -> None:
    at_a_name(number, lambda: os._exit(9))


def stopped_at_a_name(number: int) -> None:
    at_a_name(number, lambda: os.kill(os.getpid(), signal.SIGTERM))


@WHOLE
@pytest.mark.parametrize(
    ("to", "overwrite", "ended"),
    [
        ("npy", False, killed_at_a_name), ("npy", True, killed_at_a_name), ("fair-esm", True, killed_at_a_name),
        ("npy", False, stopped_at_a_name), ("npy", True, stopped_at_a_name), ("keyed-h5", False, stopped_at_a_name),
    ],
)  # fmt: skip
def test_an_export_that_ends_anywhere_leaves_all_of_one_or_no_target(
    made: Path, tmp_path: Path, to: str, overwrite: bool, ended: Callable[[int], None]
) -> None:
    name = f"x{layouts.named(to).suffix}"
    for kind in ("mean", "bos"):
        (tmp_path / kind).mkdir()
        exported(made, tmp_path / kind / name, to, kinds=(kind,))
    old, new = (whole(tmp_path / kind, name) for kind in ("mean", "bos"))
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        if overwrite:
            exported(made, folder / name, to, kinds=("mean",))
        command = ["export", made / "out.h5", "--to", to, "-o", folder / name, "--kind", "bos"]
        command += ["--overwrite"] if overwrite else []
        run = program(*command, before=functools.partial(ended, number))
        code, there = run.wait(), whole(folder, name)
        assert there in (old, new) if there and overwrite else there in (new, {}), run.err
        if ended is stopped_at_a_name and code:
            assert code == 128 + signal.SIGTERM and ("nothing was written" in run.err) == (there != new), run.err
            assert there == (old if overwrite else {}) or there == new
            assert there or not [*folder.iterdir()]
        with pytest.raises(UserError, match="exists") if there == new and not overwrite else nullcontext():
            exported(made, folder / name, to, kinds=("bos",), overwrite=overwrite)
        assert whole(folder, name) == new
        assert not [*folder.glob(".x*")] or (ended is killed_at_a_name and there == new and not overwrite)
        if code == 0:
            break
    assert number > 2, "nothing was ended: this tests nothing"


def whole(folder: Path, name: str) -> dict[str, bytes | str]:
    """All that is shown in a folder, by names in it; nothing without the target."""
    shown = {path.removeprefix(f"{folder}/"): each for path, each in everything(folder).items()}
    return {path: each for path, each in shown.items() if not path.startswith(".x")} if name in shown else {}


@WHOLE
@pytest.mark.parametrize("has_locks", [True, False], ids=["locks", "no locks"])
def test_a_target_that_appears_meanwhile_keeps_no_table_of_the_export(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    rename = disk.rename_exclusive

    def meanwhile(source: Path, to: Path) -> None:
        rename(source, to)
        (tmp_path / "x.npy").write_text("mine")

    monkeypatch.setattr(disk, "rename_exclusive", meanwhile)
    if not has_locks:
        monkeypatch.setattr(disk, "_flock", lambda *_, **__: False)
    with pytest.raises(UserError, match="appeared while"):
        exported(made, tmp_path / "x.npy", "npy")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    assert (tmp_path / "x.npy").read_text() == "mine"


@WHOLE
@pytest.mark.parametrize(
    ("name", "beside", "message"),
    [
        ("real.npy", "real.tsv", r"real\.tsv was not written by export"),
        ("read.npy", "read.tsv", "which this run reads"),
        ("real.tsv", "", r"does not end in \.npy"),
    ],
)
def test_what_a_link_leads_to_is_what_is_checked(
    made: Path, tmp_path: Path, name: str, beside: str, message: str
) -> None:
    (tmp_path / "x.npy").symlink_to(tmp_path / name)
    if beside:
        shutil.copy(made / "out.h5", tmp_path / beside) if "read" in name else (tmp_path / beside).write_text("mine")
    before = everything(tmp_path)
    source = tmp_path / beside if "read" in name else made / "out.h5"
    with pytest.raises(UserError, match=message):
        export.export_file(str(source), "npy", str(tmp_path / "x.npy"), overwrite=True)
    assert everything(tmp_path) == before


@WHOLE
@pytest.mark.parametrize(("to", "name", "mine"), [("npy", "x.npy", "x.tsv"), ("fair-esm", "x", "x/mine.txt")])
def test_a_file_that_appears_before_the_target_is_taken_stays(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str, mine: str
) -> None:
    if to == "fair-esm":
        (tmp_path / "x").mkdir()
    touch = Path.touch

    def meanwhile(path: Path, *rest: Any) -> None:
        touch(path, *rest)
        if path.name == target_of.LANDING:
            (tmp_path / mine).write_text("mine")

    monkeypatch.setattr(Path, "touch", meanwhile)
    with pytest.raises(UserError, match=r"appeared while|was changed while"):
        exported(made, tmp_path / name, to, overwrite=True)
    assert everything(tmp_path).items() >= {str(tmp_path / mine): b"mine"}.items()
    assert not [*tmp_path.glob(".x*")]


def killed_in_a_way(source: str, target: str, kind: str, after_touch: bool) -> None:
    """An overwriting export that dies as the target's name is given, on a file system with fewer calls."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def die(*_: Any) -> None:
        os._exit(9)

    disk.rename_exclusive = refuse
    unlink, rename = os.unlink, os.rename
    if after_touch:  # without links: an empty file takes the name first
        os.link = refuse  # type: ignore[assignment]
        os.rename = lambda a, b: die() if str(b) == target else rename(a, b)  # type: ignore[assignment]
    else:  # with links: the file has both names
        os.unlink = lambda path, **more: die() if Path(path).name == Path(target).name else unlink(path, **more)
    export.export_file(source, None, target, (kind,), overwrite=True)


@WHOLE
@pytest.mark.parametrize("after_touch", [True, False], ids=["placeholder", "link"])
def test_a_kill_on_a_file_system_with_fewer_calls_brings_the_old_pair_back(
    made: Path, tmp_path: Path, after_touch: bool
) -> None:
    for name in ("x.npy", "old.npy"):
        exported(made, tmp_path / name, "npy", kinds=("mean",))
    child = Child(killed_in_a_way, str(made / "out.h5"), str(tmp_path / "x.npy"), "bos", after_touch)
    assert child.wait() == 9, child.err
    with pytest.raises(UserError, match=r"x\.npy exists|x\.tsv exists"):
        exported(made, tmp_path / "x.npy", "npy")
    place = tmp_path / ".x.npy.virnucpro-partial"
    target_of._clear(place, tmp_path / "x.npy", layouts.named("npy"))
    assert not place.exists()
    for suffix in (".npy", ".tsv"):
        found = (tmp_path / "x").with_suffix(suffix).read_bytes()
        assert found == (tmp_path / "old").with_suffix(suffix).read_bytes()


@WHOLE
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_file_that_a_killed_export_left_is_no_table_of_others(
    made: Path, tmp_path: Path, overwrite: bool
) -> None:
    (place := tmp_path / ".x.npy.virnucpro-partial").mkdir()
    for left in (
        place / target_of.MARK,
        place / target_of.LANDING,
        place / "x.npy",
        place / "x.tsv",
        tmp_path / "x.tsv",
    ):
        left.touch()
    exported(made, tmp_path / "x.npy", "npy", overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.tsv"]


@WHOLE
def test_two_exports_to_one_target_at_once_are_one_and_a_refusal(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = layouts.fair_esm.LAYOUT.write

    def meanwhile(selection: Any, target: Path) -> None:
        with pytest.raises(UserError, match="Another run is writing"):
            exported(made, tmp_path / "x", "fair-esm", overwrite=True)
        write(selection, target)

    other = dataclasses.replace(layouts.fair_esm.LAYOUT, write=meanwhile)
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "named", lambda name: other)
        exported(made, tmp_path / "x", "fair-esm", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@WHOLE
def test_a_hidden_place_of_somebody_else_is_not_cleared(made: Path, tmp_path: Path) -> None:
    place = tmp_path / ".x.virnucpro-partial"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        exported(made, tmp_path / "x", "fair-esm")
    assert (place / "mine.txt").read_text() == "mine"


@WHOLE
@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("yaml", {}, "no layout 'yaml'"),
        ("parquet", {"kinds": ("residue",)}, "no place for residue rows"),
        ("virnucpro", {"kinds": ("bos",)}, "no place for bos rows"),
        ("fair-esm", {"kinds": ("max",)}, "no place for max rows"),
        ("npy", {"kinds": ("std",)}, "has no kind std"),
        ("npy", {"numbers": (9,)}, "has no layer 9"),
        ("npy", {"numbers": (1, 2)}, "room for one kind and one layer"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    made: Path, tmp_path: Path, to: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        exported(made, tmp_path / "x.npy", to, **options)
    assert not list(tmp_path.iterdir())


@WHOLE
def test_a_source_is_never_its_own_target(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "out.h5", tmp_path / "out.h5")
    before = (tmp_path / "out.h5").read_bytes()
    with pytest.raises(UserError, match="would overwrite"):
        export.export_file(str(tmp_path / "out.h5"), "broad", str(tmp_path / "out.h5"), overwrite=True)
    assert (tmp_path / "out.h5").read_bytes() == before


@WHOLE
def test_keys_of_another_fasta_are_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "other.fasta").write_text(">a\nMKV\n")
    with pytest.raises(UserError, match="is not what was embedded"):
        exported(made, tmp_path / "x.h5", "biotrainer", inputs=(str(tmp_path / "other.fasta"),))
    with pytest.raises(UserError, match="the FASTA is not at"):
        exported(made, tmp_path / "x.h5", "biotrainer", inputs=(str(tmp_path / "none.fasta"),))


@WHOLE
def test_an_unfinished_file_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "out.h5", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5", "r+") as file:
        file["run/complete"][()] = 0
    with pytest.raises(UserError, match="not complete"):
        export.export_file(str(tmp_path / "out.h5"), "npy", str(tmp_path / "x.npy"))


@WHOLE
def test_parquet_without_pyarrow_names_the_extra(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"virnucpro\[parquet\]"):
        exported(made, tmp_path / "x.parquet", "parquet")
    assert not list(tmp_path.iterdir())


# --- and back --------------------------------------------------------------------------------------------------------


def there_and_back(made: Path, tmp_path: Path, to: str, kind: str, fasta: bool = True) -> Path:
    target = exported(made, tmp_path / f"x{layouts.named(to).suffix}", to, kinds=(kind,))
    inputs = (str(made / "in.fasta"),) if fasta else ()
    importing.import_file(str(target), str(tmp_path / "back.h5"), to, inputs, layer=2 if to == "virnucpro" else None)
    return tmp_path / "back.h5"


def same(a: Path, b: Path, kind: str, told: tuple[str, ...] = ()) -> None:
    """Whether the rows of b's records are those of a's, but for those that b skipped, which must be `told`."""
    with store.read_embeddings(a) as one, store.read_embeddings(b) as two:
        assert two.complete and two.unaltered and two.names == one.names
        assert [two.names[i] for i in np.flatnonzero(two.status != one.status)] == list(told)
        np.testing.assert_array_equal(two.lengths, one.lengths)
        for i in np.flatnonzero(two.status == store.DONE):
            if kind == "residue":
                np.testing.assert_array_equal(two.residues(i, 2), one.residues(i, 2))
                assert not (two.flags[i] ^ one.flags[i]) & store.TRUNCATED
            else:
                np.testing.assert_array_equal(two.dataset(kind, 2)[i], one.dataset(kind, 2)[i])
        if kind != "residue":
            assert np.isnan(two.dataset(kind, 2)[:][two.status == store.SKIPPED]).all()


CARRIED = [(layout.name, kind) for layout in layouts.LAYOUTS for kind in ("mean", "residue") if kind in layout.kinds]


@pytest.mark.parametrize(("to", "kind"), CARRIED)
def test_what_was_exported_comes_back_in_the_order_of_the_fasta(made: Path, tmp_path: Path, to: str, kind: str) -> None:
    back = there_and_back(made, tmp_path, to, kind)
    cannot = {
        "virnucpro": ("twice", "twice"),  # names alone, and not of all records
        "broad": ("twice", "twice"),
        "scikit-bio": ("long",) if kind == "residue" else (),  # cut, so that its sequence is another
    }
    same(made / "out.h5", back, kind, told=cannot.get(to, ()))
    with store.read_embeddings(back) as file:
        assert file.settings["pool"] == [kind]
        assert all(file.reason[file.status == store.SKIPPED] > 0)


@WHOLE
@pytest.mark.parametrize("gaps", ["keep", "strip", "x"])
def test_rows_of_aligned_proteins_come_back_as_they_were_read(tmp_path: Path, tiny_model: Path, gaps: str) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMK-VLAGWYKK\n>b\nMKV.LWWG\n>c\nMKVLAA\n>d\nMKVLAGWYKK\n")
    embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(tiny_model), device="cpu", gaps=gaps)
    for to in ("parquet", "keyed-h5", "biotrainer"):
        there, back = tmp_path / f"there {to}", tmp_path / f"{to}.h5"
        export.export_file(str(tmp_path / "out.h5"), to, str(there))
        importing.import_file(str(there), str(back), None, (str(tmp_path / "in.fasta"),), str(tiny_model), None)
        with store.read_embeddings(tmp_path / "out.h5") as file, store.read_embeddings(back) as again:
            np.testing.assert_array_equal(again[:], file[:])
            assert again.lengths.tolist() == file.lengths.tolist()
            assert again.columns["gaps"][:].tolist() == file.columns["gaps"][:].tolist() == [1, 1, 0, 0]
        assert verify.verify_file(str(back)).passed


@WHOLE
@pytest.mark.parametrize("to", ["npy", "parquet", "anndata", "csv", "tsv"])
def test_tables_come_back_without_a_fasta(made: Path, tmp_path: Path, to: str) -> None:
    same(made / "out.h5", there_and_back(made, tmp_path, to, "mean", fasta=False), "mean")


@WHOLE
@pytest.mark.parametrize("to", ["keyed-h5", "fair-esm", "virnucpro", "broad", "npy", "biotrainer"])
def test_rows_follow_their_names_into_a_fasta_of_another_order(made: Path, tmp_path: Path, to: str, rows: Any) -> None:
    order = [9, 0, 8, 3]
    (tmp_path / "other.fasta").write_text("".join(f">{NAMES[i]}\n{RECORDS[i][1]}\n" for i in order) + ">new\nMMMMM\n")
    target = exported(made, tmp_path / f"x{layouts.named(to).suffix}", to)
    summary = importing.import_file(
        str(target), str(tmp_path / "back.h5"), None, (str(tmp_path / "other.fasta"),), "650M", 2
    )
    with store.read_embeddings(tmp_path / "back.h5") as file:
        assert file.names == [*(NAMES[i] for i in order), "new"] and file.attributes["model"] == "650M"
        np.testing.assert_array_equal(file.dataset("mean", 2)[:4], [rows(i) for i in order])
        assert store.REASONS[file.reason[4]] == "not in what was imported" and np.isnan(file[4]).all()
    assert any("left out" in note for note in summary.notes)


@WHOLE
def test_a_uniprot_file_joins_by_accession(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">sp|P1|A_B\nMKV\n>sp|P2|C_D\nMK\n")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["P2"], file["P1"] = np.float16([2, 2]), np.float16([1, 1])
    importing.import_file(str(tmp_path / "x.h5"), str(tmp_path / "out.h5"), None, (str(tmp_path / "in.fasta"),))
    with store.read_embeddings(tmp_path / "out.h5") as file:
        assert file[:].tolist() == [[1, 1], [2, 2]] and file[:].dtype == np.float16
        assert file.attributes["model"] == "unknown" and file.layers == [-1]


@WHOLE
def test_a_name_that_two_records_have_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKV\n>b\nMK\n>a\nMKVL\n")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"], file["b"] = np.float32([2, 2]), np.float32([1, 1])
    importing.import_file(str(tmp_path / "x.h5"), str(tmp_path / "out.h5"), None, (str(tmp_path / "in.fasta"),))
    with store.read_embeddings(tmp_path / "out.h5") as file:
        assert [store.REASONS[reason] for reason in file.reason] == ["name not unique", "", "name not unique"]


@WHOLE
def test_what_is_not_finite_comes_in_as_skipped(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"], file["b"] = np.float32([2, np.inf]), np.float32([1, 1])
    importing.import_file(str(tmp_path / "x.h5"), str(tmp_path / "out.h5"), None)
    with store.read_embeddings(tmp_path / "out.h5") as file:
        assert file.status.tolist() == [store.SKIPPED, store.DONE] and np.isnan(file[0]).all()


@WHOLE
@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\1", b"PAR1....", store.HDF5_MAGIC + b"x" * 99])
@pytest.mark.parametrize("to", [None, *(layout.name for layout in layouts.LAYOUTS)])
def test_what_cannot_be_read_is_one_message_and_leaves_nothing(tmp_path: Path, content: bytes, to: str | None) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npy"):
        importing.import_file(str(tmp_path / "x.npy"), str(tmp_path / "out.h5"), to)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


@WHOLE
def test_pickles_are_read_as_tensors_only(tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("boom").touch, ())

    torch.save({"proteins": ["a"], "data": [Boom()]}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        importing.import_file(str(tmp_path / "x.pt"), str(tmp_path / "out.h5"), "virnucpro")
    assert not (tmp_path / "boom").exists()


@WHOLE
def test_an_import_never_replaces_what_it_was_not_told_to(made: Path, tmp_path: Path) -> None:
    target = exported(made, tmp_path / "x.npy", "npy")
    (tmp_path / "out.h5").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        importing.import_file(str(target), str(tmp_path / "out.h5"))
    importing.import_file(str(target), str(tmp_path / "out.h5"), overwrite=True)
    with pytest.raises(UserError, match="already a file of embed's"):
        importing.import_file(str(tmp_path / "out.h5"), str(tmp_path / "again.h5"))


@WHOLE
def test_a_fasta_without_any_of_the_proteins_is_refused(made: Path, tmp_path: Path) -> None:
    target = exported(made, tmp_path / "x.npy", "npy")
    (tmp_path / "other.fasta").write_text(">q\nMKVVVV\n")
    with pytest.raises(UserError, match="None of the 11 proteins"):
        importing.import_file(str(target), str(tmp_path / "out.h5"), inputs=(str(tmp_path / "other.fasta"),))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.fasta", "x.npy", "x.tsv"]


@WHOLE
@pytest.mark.parametrize("fasta", [True, False])
def test_inspect_verify_and_export_know_an_imported_file(
    made: Path, tmp_path: Path, fasta: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    back = there_and_back(made, tmp_path, "parquet", "mean", fasta)
    inspect.inspect_file(str(back))
    assert "Imported from" in capsys.readouterr().out
    verdict = verify.verify_file(str(back))
    assert verdict.passed and bool(verdict.notes) != fasta
    export.export_file(str(back), "parquet", str(tmp_path / "again.parquet"))
    (tmp_path / "x.parquet").unlink()
    importing.import_file(str(tmp_path / "again.parquet"), str(back), overwrite=True)
    same(made / "out.h5", back, "mean")


@WHOLE
def test_a_key_that_several_names_come_to_is_not_given_to_the_first_of_them(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a/b\nMKV\n>a_b\nMKL\n>c\nMKT\n")
    with h5py.File(tmp_path / "published.h5", "w") as file:
        file["a_b"], file["c"] = np.full(4, 2, np.float16), np.full(4, 3, np.float16)
    importing.import_file(
        str(tmp_path / "published.h5"), str(tmp_path / "out.h5"), inputs=(str(tmp_path / "in.fasta"),)
    )
    with store.read_embeddings(tmp_path / "out.h5") as found:
        assert found.status.tolist() == [store.SKIPPED, store.DONE, store.DONE]
        assert found[1:3][:, 0].tolist() == [2, 3]


# --- files as other tools write them ---------------------------------------------------------------------------------


def imported(source: Path, target: Path, fasta: Path | None = None, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Names and, by kind, the rows of what an import makes."""
    importing.import_file(str(source), str(target), None, (str(fasta),) if fasta else (), overwrite=True, **options)
    with store.read_embeddings(target) as file:
        kinds = json.loads(file.attributes["fingerprint"])["pool"]
        layer = file.layers[-1]
        rows = {
            kind: [file.residues(i, layer) for i in range(len(file))]
            if kind == "residue"
            else file.dataset(kind, layer)[:]
            for kind in kinds
        }
        return file.names, rows


@WHOLE
def test_means_that_kept_a_dimension_come_in_as_means(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    with h5py.File(tmp_path / "keepdim.h5", "w") as file:
        for i, row in enumerate(values):
            file[f"p{i}"] = row[None]
    (tmp_path / "in.fasta").write_text("".join(f">p{i}\nMKVLA\n" for i in range(3)))
    for fasta in (tmp_path / "in.fasta", None):
        _, rows = imported(tmp_path / "keepdim.h5", tmp_path / "out.h5", fasta)
        np.testing.assert_array_equal(rows["mean"], values)


@WHOLE
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_residues_that_are_not_a_row_for_each_are_refused(tmp_path: Path, rows: int) -> None:
    """A mean among residues, a cut protein, and rows of special tokens."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["p0"], file["p1"] = np.zeros((rows, 4), np.float32), np.zeros((4, 4), np.float32)
    (tmp_path / "in.fasta").write_text(">p0\nMKVLA\n>p1\nMKVL\n")
    if rows == 3:  # cut, as by another tool
        assert [
            len(each) for each in imported(tmp_path / "x.h5", tmp_path / "o.h5", tmp_path / "in.fasta")[1]["residue"]
        ] == [3, 4]
        return
    with pytest.raises(UserError, match=f"'p0' has {rows} for 5"):
        imported(tmp_path / "x.h5", tmp_path / "out.h5", tmp_path / "in.fasta")
    assert not (tmp_path / "out.h5").exists()


@WHOLE
def test_names_with_a_slash_are_names_in_keyed_files(tmp_path: Path) -> None:
    names = ["a/b/c", "a/b/d", "sp|P1|x", "z/9"]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for i, name in enumerate(names):
            file[name] = np.full(4, i, np.float32)
    (tmp_path / "in.fasta").write_text("".join(f">{name}\nMKV\n" for name in names[::-1]))
    assert imported(tmp_path / "x.h5", tmp_path / "out.h5")[0] == names
    found, rows = imported(tmp_path / "x.h5", tmp_path / "out.h5", tmp_path / "in.fasta")
    assert found == names[::-1] and rows["mean"][:, 0].tolist() == [3, 2, 1, 0]


def database(path: Path, texts: list[str], reduced: bool, models: tuple[str, ...] = ("Rostlab/prot_t5",)) -> None:
    """As write_h5_db of biotrainer-core 2.0 leaves it."""
    with h5py.File(path, "w") as file:
        for model in models:
            for i, text in enumerate(texts):
                key = hashlib.sha256(f"{text}_{len(text)}".encode()).hexdigest()
                values = np.full(4 if reduced else (len(text), 4), i, np.float32)
                data = file.create_dataset(f"{key}_{model.replace('/', '-')}", data=values, compression="gzip")
                said = {"sequence_hash": key, "sequence_length": len(text), "embedder_name": model, "reduced": reduced}
                data.attrs.update(said)


@WHOLE
@pytest.mark.parametrize("reduced", [True, False])
def test_a_database_of_biotrainer_core_joins_by_sequence(tmp_path: Path, reduced: bool) -> None:
    texts = ["MKVLA", "M", "GGTRSW"]
    database(tmp_path / "x.h5", texts, reduced)
    (tmp_path / "in.fasta").write_text("".join(f">p{i}\n{texts[i]}\n" for i in (2, 0, 1)))
    names, rows = imported(tmp_path / "x.h5", tmp_path / "out.h5", tmp_path / "in.fasta")
    assert names == ["p2", "p0", "p1"]
    if reduced:
        assert rows["mean"][:, 0].tolist() == [2, 0, 1]
    else:
        assert [each[:, 0].tolist() for each in rows["residue"]] == [[2] * 6, [0] * 5, [1]]
    with store.read_embeddings(tmp_path / "out.h5") as file:
        assert file.attributes["model"] == "Rostlab/prot_t5"


@WHOLE
def test_a_database_of_two_models_is_refused_by_their_names(tmp_path: Path) -> None:
    database(tmp_path / "x.h5", ["MKV"], True, ("one", "two"))
    with pytest.raises(UserError, match="several models, one and two"):
        imported(tmp_path / "x.h5", tmp_path / "out.h5")


@WHOLE
@pytest.mark.parametrize("how", ["whole", "first five", "strings", "nullable"])
def test_h5ad_files_that_anndata_wrote_come_back(made: Path, tmp_path: Path, how: str) -> None:
    import anndata
    import pandas

    data = anndata.read_h5ad(exported(made, tmp_path / "x.h5ad", "anndata"))
    n = 5 if how == "first five" else len(data)
    data = data[:n].copy()
    if how == "strings":
        for name in ("id", "status", "reason"):
            data.obs[name] = data.obs[name].astype(str)
    if how == "nullable":
        data.obs["length"] = data.obs["length"].astype("Int32")
        data.obs["reason"] = pandas.array(data.obs["reason"].astype(str), dtype="string")
    with anndata.settings.override(allow_write_nullable_strings=True):
        data.write_h5ad(tmp_path / "again.h5ad")
    names, rows = imported(tmp_path / "again.h5ad", tmp_path / "out.h5")
    with store.read_embeddings(made / "out.h5") as one, store.read_embeddings(tmp_path / "out.h5") as two:
        assert names == one.names[:n] and two.lengths.tolist() == one.lengths[:n].tolist()
        assert two.status.tolist() == one.status[:n].tolist() and two.reason.tolist() == one.reason[:n].tolist()
        np.testing.assert_array_equal(rows["mean"], one.dataset("mean", 2)[:n])


@WHOLE
def test_a_hash_that_two_names_share_joins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from virnucpro_cli.exchange.imports import source
    from virnucpro_cli.store import schema

    for module in (schema, source):
        monkeypatch.setattr(module, "hash", lambda text: len(text), raising=False)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["aa"] = np.zeros(4, np.float32)
    (tmp_path / "in.fasta").write_text(">bb\nMKV\n")
    with pytest.raises(UserError, match="have one hash"):
        imported(tmp_path / "x.h5", tmp_path / "out.h5", tmp_path / "in.fasta")
    assert not list(tmp_path.glob("out.h5*"))


def elsewhere_virtual(folder: Path) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "a", (4,))
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_virtual_dataset("p", layout)


def elsewhere_raw(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("p", (4,), "f4", external=[(str(folder / "secret.h5"), 0, 16)])


def elsewhere_link(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w") as file:
        file["p"] = h5py.ExternalLink(str(folder / "secret.h5"), "a")


@WHOLE
@pytest.mark.parametrize("make", [elsewhere_virtual, elsewhere_raw, elsewhere_link])
def test_values_of_other_files_are_never_imported(tmp_path: Path, make: Callable[[Path], None]) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["a"] = np.arange(4, dtype=np.float32)
    make(tmp_path)
    for name in (None, "keyed-h5", "biotrainer"):
        with pytest.raises(UserError, match=r"x\.h5"):
            importing.import_file(str(tmp_path / "x.h5"), str(tmp_path / "out.h5"), name)
    assert not list(tmp_path.glob("out.h5*"))


@WHOLE
@pytest.mark.parametrize(("name", "layout"), [("x.csv", "csv"), ("X.Parquet", "parquet"), ("x.biotrainer.h5", "biotrainer"),
                                              ("x.h5ad", "anndata"), ("x.npy", "npy")])  # fmt: skip
def test_the_suffix_of_the_target_tells_its_layout(made: Path, tmp_path: Path, name: str, layout: str) -> None:
    export.export_file(str(made / "out.h5"), None, str(tmp_path / name))
    assert layouts.named(layout).recognises(tmp_path / name)
    with pytest.raises(UserError, match="does not tell its layout"):
        export.export_file(str(made / "out.h5"), None, str(tmp_path / "x.h5"))
    with pytest.raises(UserError, match="does not tell its layout"):
        export.export_file(str(made / "out.h5"), None)


@pytest.mark.parametrize("to", ["csv", "tsv"])
def test_pandas_reads_the_numbers_of_a_table_as_they_are(made: Path, tmp_path: Path, to: str) -> None:
    import pandas

    target = exported(made, tmp_path / f"x.{to}", to, kinds=("max",))
    table = pandas.read_csv(
        target, sep="," if to == "csv" else "\t", dtype={"id": str}, keep_default_na=False, na_values={"0": ""}
    )
    assert table["id"].tolist() == NAMES and table["status"].tolist().count("skipped") == 1
    with store.read_embeddings(made / "out.h5") as file:
        width, rows = file.dataset("max", 2).shape[1], file.dataset("max", 2)[:]
    found = table.loc[DONE, [str(i) for i in range(width)]].to_numpy(np.float32)
    np.testing.assert_array_equal(found, rows[DONE].astype(np.float32))


@WHOLE
@pytest.mark.parametrize("wrong", ["id,0,1\na,1\n", "id,0,1\na,1,x\n", "id,0,2\na,1,2\n", "name,0\na,1\n"])
def test_a_wrong_line_of_a_table_is_named(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "x.csv").write_text(wrong)
    with pytest.raises(UserError, match=r"line 2|first line"):
        importing.import_file(str(tmp_path / "x.csv"), str(tmp_path / "out.h5"), "csv")
    assert not list(tmp_path.glob("out.h5*"))


@WHOLE
def test_a_table_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\ufeffid,0,1\n007,1.5,2\n")
    names, rows = imported(tmp_path / "x.csv", tmp_path / "out.h5")
    assert names == ["007"] and rows["mean"].tolist() == [[1.5, 2]]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("grouped")
    (folder / "in.fasta").write_text(">a_1\nMKV\n>b_1\nMKVLL\n>a_2\nGGTRS\n>c_1\n\n")
    embed_fasta(folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu", group_regex="^(.)_")
    return folder / "out.h5"


@WHOLE
@pytest.mark.parametrize("to", ["csv", "npy", "parquet", "anndata", "keyed-h5", "broad"])
@pytest.mark.parametrize("kind", ["mean", "length_weighted_mean", "max"])
def test_rows_of_groups_are_rows_of_a_table(tmp_path: Path, grouped: Path, to: str, kind: str) -> None:
    target = tmp_path / f"x{layouts.named(to).suffix}"
    export.export_file(str(grouped), to, str(target), (f"groups/{kind}",))
    found = [
        (entry.name, entry.skipped, np.asarray(row))
        for entry in layouts.named(to).read(target)
        for row in entry.values.values()
    ]
    with store.read_embeddings(grouped) as file:
        expected = dict(zip(file.groups.ids, file.groups.rows(kind)[:], strict=True))
    there = [name for name, skipped, _ in found if not skipped]
    assert there == ["a", "b"]
    for name, skipped, row in found:
        if not skipped:
            np.testing.assert_array_equal(row, expected[name])
    with pytest.raises(UserError):
        importing.import_file(str(target), str(tmp_path / "back.h5"))


@WHOLE
def test_layouts_without_room_for_groups_say_so(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kind groups/mean"):
        exported(made, tmp_path / "x.csv", "csv", kinds=("groups/mean",))


def killed_import(source: str, output: str, fasta: str) -> None:
    """An import that dies when its rows are placed."""
    place = importing._place

    def killed(*arguments: Any) -> None:
        place(*arguments)
        os._exit(9)

    importing._place = killed
    importing.import_file(source, output, None, (fasta,))


@WHOLE
def test_nothing_of_a_killed_import_stays_once_it_runs_again(made: Path, tmp_path: Path) -> None:
    target = exported(made, tmp_path / "x.npy", "npy")
    with gzip.open(tmp_path / "in.fasta.gz", "wb") as file:
        file.write((made / "in.fasta").read_bytes())
    before = everything(tmp_path).keys()
    arguments = [str(target), str(tmp_path / "out.h5"), str(tmp_path / "in.fasta.gz")]
    for _ in range(2):
        assert Child(killed_import, *arguments).wait() == 9
        assert everything(tmp_path).keys() - before == {str(tmp_path / "out.h5.partial")}
    importing.import_file(*arguments[:2], None, (arguments[2],))
    assert everything(tmp_path).keys() - before == {str(tmp_path / "out.h5")}
    same(made / "out.h5", tmp_path / "out.h5", "mean")


@WHOLE
def test_an_import_never_replaces_what_it_reads(made: Path, tmp_path: Path) -> None:
    exported(made, tmp_path / "x.npy", "npy")
    folder = exported(made, tmp_path / "tree", "fair-esm")
    keyed = exported(made, tmp_path / "keyed.h5", "keyed-h5")
    before = everything(tmp_path)
    for source, output in ((tmp_path / "x.npy", tmp_path / "x.tsv"), (folder, folder / "long.pt"), (folder, folder)):
        with pytest.raises(UserError):
            importing.import_file(str(source), str(output), overwrite=True)
    with pytest.raises(UserError, match="would overwrite"):
        (tmp_path / "x.h5").symlink_to(keyed)
        importing.import_file(str(keyed), str(tmp_path / "x.h5"), overwrite=True)
    (tmp_path / "x.h5").unlink()
    assert everything(tmp_path) == before


def test_what_is_said_of_changed_names_is_short_however_long_they_are() -> None:
    names = ["a/" + "x" * 70_000, "b"]
    keys = Keys(lambda start, stop: names[start:stop], 2, 200)
    keys(0, 2)
    assert keys.described.startswith("1 name changed to be possible and unique: 'a/xxx") and len(keys.described) < 1000
