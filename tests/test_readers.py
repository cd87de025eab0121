"""What Python programs read: memory maps, data frames, AnnData, a dataset of PyTorch; and the lines of the README."""

import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from conftest import ROOT, VIRAL
from virnucpro_cli import errors
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.store import EmbeddingFile, read_embeddings
from virnucpro_cli.store.tensors import padded

PAGES = ("README.md", "docs/reference/api.md")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Names twice and odd, a skipped record, several layers and kinds."""
    folder = tmp_path_factory.mktemp("readers")
    (folder / "in.fasta").write_text(">a\nMKVLAGW\n>b/1\nMKVLAGWMKV\n>a\nGGHIK\n>none\n\n>é\nMKKLA\n")
    embed_fasta(folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu", layers=(0, 2),
                pool=("mean", "bos", "residue"))  # fmt: skip
    return folder / "out.h5"


def test_an_array_is_the_dataset_without_a_copy_and_cannot_be_written(made: Path) -> None:
    with read_embeddings(made) as file:
        for kind in ("mean", "bos", "residue"):
            for layer in (0, 2):
                array = file.array(kind, layer)
                assert isinstance(array, np.memmap) and not array.flags.writeable
                np.testing.assert_array_equal(array, file.dataset(kind, layer)[:])
        np.testing.assert_array_equal(file.array(), file.array("mean", 2))


def test_an_array_outlives_the_file_that_gave_it(made: Path) -> None:
    with read_embeddings(made) as file:
        array, expected = file.array(), file[:]
    np.testing.assert_array_equal(array, expected)


def test_an_array_of_nothing_is_empty(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in.fasta").write_text(">one\nMKVLAGW\n")
    sizes = []
    for shard in (1, 2):  # of one protein
        embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(tiny_model), device="cpu", shard=f"{shard}/2")
        with read_embeddings(tmp_path / f"out.shard-000{shard}-of-0002.h5") as file:
            assert file.array().shape == (len(file), 32) and len(file.to_torch()) == len(file) == len(file.to_pandas())
            sizes.append(len(file))
    assert sorted(sizes) == [0, 1]


def test_names_are_found_and_given_by_number_as_in_the_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virnucpro_cli.store.reader.NAME_BLOCK", 2)
    with read_embeddings(made) as file:
        assert [file.find(name) for name in ("a", "é", "z")] == [[0, 2], [4], []]
        rows = np.array([4, 0, 4, 3, 1])
        assert file.names_at(rows) == [file.names[row] for row in rows]
        assert file.names_at(rows[:0]) == []


def test_reading_and_frames_need_no_torch(made: Path) -> None:
    code = (
        "import sys; from virnucpro_cli import read_embeddings\n"
        f"file = read_embeddings({str(made)!r}); file[0], file['b/1'], file.residues(0), file.array(); file.to_pandas(); file.to_polars(); file.to_anndata()\n"
        "assert 'torch' not in sys.modules; file.to_torch(); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- a file whose name another takes --------------------------------------------------------------------------------------


@pytest.fixture
def replaceable(made: Path, tmp_path: Path, tiny_model: Path) -> tuple[Path, Callable[[], None]]:
    """A file, and how another of other proteins takes its name."""
    path = Path(shutil.copy(made, tmp_path / "x.h5"))
    (tmp_path / "other.fasta").write_text(">z\nWWWWWW\n>y\nHHHHHHHHH\n>x\nKKKKKKKKKKKK\n>w\nMK\n>v\nMKK\n")

    def replace() -> None:
        embed_fasta(tmp_path / "other.fasta", path, model=str(tiny_model), device="cpu", layers=(0, 2),
                    pool=("mean", "bos", "residue"), overwrite=True)  # fmt: skip

    return path, replace


def test_an_array_is_of_the_file_that_was_opened_whatever_has_its_name_now(
    replaceable: tuple[Path, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = replaceable
    monkeypatch.chdir(path.parent)
    with read_embeddings(path.name) as file:
        expected, checksum = file[:], file.checksum_of_the_run
        monkeypatch.chdir("/")
        np.testing.assert_array_equal(file.array(), expected)
        replace()
        np.testing.assert_array_equal(file.array(), expected)
        np.testing.assert_array_equal(file[:], expected)
        assert file.checksum() == checksum


@pytest.mark.parametrize(
    "what", [lambda file: file, lambda file: file.to_torch(), lambda file: file.to_torch("residue", 0)]
)
def test_a_pickled_reader_is_the_same_file_or_refuses(
    replaceable: tuple[Path, Callable[[], None]], monkeypatch: pytest.MonkeyPatch, what: Callable[[EmbeddingFile], Any]
) -> None:
    path, replace = replaceable
    monkeypatch.chdir(path.parent)
    with read_embeddings(path.name) as file:
        sent, expected = pickle.dumps(what(file)), what(file)[2]
    monkeypatch.chdir("/")
    again = pickle.loads(sent)[2]
    for a, b in zip(again, expected, strict=True) if isinstance(again, tuple) else [(again, expected)]:
        np.testing.assert_array_equal(a, b)
    replace()
    with pytest.raises(UserError, match="is another file than the one that was opened"):
        pickle.loads(sent)


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_file_is_a_mapping_of_names(made: Path) -> None:
    with read_embeddings(made) as file:
        assert "a" in file and "é" in file and "z" not in file and 3 not in file
        assert list(file.keys()) == ["a", "b/1", "a", "none", "é"] and len(file) == 5
        assert repr(file) == f"<EmbeddingFile '{made}': 5 proteins, mean/2>"
        assert {"array", "keys", "names", "rows", "lengths"} <= set(dir(file))


def test_a_name_is_looked_up_without_reading_all_names_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with read_embeddings(made) as file:
        assert "a" in file
        read: list[int] = []
        texts = file.texts
        monkeypatch.setattr(file, "texts", lambda name, a, b: read.append(b - a) or texts(name, a, b))
        assert "a" in file and "b/1" in file and file.rows("é") == [4]
        read.clear()
        assert "b/1" in file and file.rows("é") == [4]
        assert read == [1, 1], "names of what was found, no more"


def test_a_name_of_two_records_is_an_error_that_names_them(made: Path) -> None:
    with read_embeddings(made) as file:
        for ask in (file.__getitem__, file.residues):
            with pytest.raises(UserError, match=r"2 records of .* are named 'a': 0, 2\.\n.*file\.rows\('a'\)"):
                ask("a")
        np.testing.assert_array_equal(file[file.rows("a")], file[[0, 2]])


def test_a_protein_is_found_by_its_accession_where_that_is_plain(tmp_path: Path, tiny_model: Path) -> None:
    names = ["tr|Q1|Q1_A", "sp|P2|P2_A", "Q1", "tr|P2|P2_B", "tr|P3|P3_A"]
    (tmp_path / "in.fasta").write_text("".join(f">{name}\nMKV{'L' * i}\n" for i, name in enumerate(names)))
    embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(tiny_model), device="cpu")
    with read_embeddings(tmp_path / "out.h5") as file:
        assert file.rows("P3") == [4] and "P3" in file and file.find("P3_A") == []
        assert file.rows("Q1") == [2], "the whole name comes first"
        with pytest.raises(UserError, match=r"P2 is the accession of several names .*: sp\|P2\|P2_A, tr\|P2\|P2_B"):
            file["P2"]


# --- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda file: file.array("meen"),
            r"has no meen of layer 2\.\nIt has .*mean \(0, 2\), bos \(0, 2\), residue \(0, 2\)",
        ),
        (lambda file: file.array("mean", 1), r"has no mean of layer 1"),
        (lambda file: file.array("mean", -2), r"has no mean of layer 1"),
        (lambda file: file["nobody"], "has no record 'nobody'"),
        (lambda file: file.contacts(0), "holds no contacts"),
        (lambda file: file.logits(0), "has no dataset unmasked/logits"),
        (lambda file: file.to_pandas("meen"), "has no meen"),
        (lambda file: file.to_torch("meen"), "has no meen"),
        (lambda file: file.to_anndata("residue"), "a row for each protein"),
    ],
)
def test_what_is_not_there_is_told_with_what_there_is(
    made: Path, ask: Callable[[EmbeddingFile], Any], words: str
) -> None:
    with read_embeddings(made) as file, pytest.raises(UserError, match=words):
        ask(file)


def test_a_wrong_argument_is_no_damage(made: Path) -> None:
    with read_embeddings(made) as file:
        for ask in (lambda: file[99], lambda: file.residues(99)):
            with pytest.raises(IndexError):
                ask()
        with pytest.raises((TypeError, ValueError)):
            file.dataset()["nothing"]


def test_negative_layers_count_from_the_last_of_the_model(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKVLAGW\n")
    for name, layers in (("all", (0, 1, -1)), ("low", (0, -2))):
        embed_fasta(tmp_path / "in.fasta", tmp_path / f"{name}.h5", model=str(tiny_model), device="cpu", layers=layers)
    with read_embeddings(tmp_path / "all.h5") as file:
        np.testing.assert_array_equal(file.array("mean", -1), file.array("mean", 2))
        np.testing.assert_array_equal(file.array("mean", -3), file.array("mean", 0))
    with read_embeddings(tmp_path / "low.h5") as file:
        np.testing.assert_array_equal(file.array("mean", -2), file.array("mean", 1))
        with pytest.raises(UserError, match="no mean of layer 2"):
            file.array("mean", -1)


@pytest.mark.parametrize("name", ["none.h5", ".", "in.fasta"])
def test_a_file_that_cannot_be_opened_is_a_user_error(made: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no file|not a file|not an HDF5 file"):
        read_embeddings(made.parent / name)


def test_a_file_of_residues_alone_is_a_dataset_of_residues(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMKVLAGW\n>b\nMK\n>none\n\n>c\nMKVL\n")
    embed_fasta(tmp_path / "in.fasta", tmp_path / "r.h5", model=str(tiny_model), device="cpu", pool=("residue",))
    with read_embeddings(tmp_path / "r.h5") as file:
        with pytest.raises(UserError, match="residues alone"):
            file.array()
        rows, lengths, records = next(iter(DataLoader(file.to_torch(), batch_size=3, collate_fn=padded)))
        assert rows.shape == (3, 7, 32) and lengths.tolist() == [7, 2, 4] and records.tolist() == [0, 1, 3]
        for row, length, record in zip(rows, lengths.tolist(), records.tolist(), strict=True):
            np.testing.assert_array_equal(row[:length].numpy(), file.residues(record))
            assert not row[length:].any()


def test_h5py_and_this_reader_can_have_a_file_open_at_once(made: Path, tmp_path: Path, tiny_model: Path) -> None:
    path = Path(shutil.copy(made, tmp_path / "x.h5"))
    with h5py.File(path) as by_h5py, read_embeddings(path) as file:
        np.testing.assert_array_equal(by_h5py["embeddings"][:], file[:])
        done = embed_fasta(made.parent / "in.fasta", path, model=str(tiny_model), device="cpu", layers=(0, 2),
                           pool=("mean", "bos", "residue"))  # fmt: skip
        assert done.already_complete
    with read_embeddings(path) as file, h5py.File(path) as by_h5py:
        np.testing.assert_array_equal(by_h5py["embeddings"][:], file[:])


# --- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_a_loader_gives_every_done_row_with_its_record(made: Path, start: str | None) -> None:
    with read_embeddings(made) as file:
        data, expected, done = file.to_torch(), file[:], np.flatnonzero(file.status == 1)
    workers = {None: 0, "fork": 2, "spawn": 1}[start]  # one that is spawned imports PyTorch again
    loader = DataLoader(data, batch_size=3, num_workers=workers, multiprocessing_context=start)
    batches = list(loader)
    assert torch.cat([records for _, records in batches]).tolist() == done.tolist() == [0, 1, 2, 4]
    np.testing.assert_array_equal(torch.cat([rows for rows, _ in batches]).numpy(), expected[done])


def test_a_dataset_of_residues_gives_each_protein_whole(made: Path) -> None:
    with read_embeddings(made) as file:
        data = file.to_torch("residue", 0)
        for i, record in enumerate((0, 1, 2, 4)):
            rows, number = data[i]
            assert number == record and rows.dtype == torch.float16
            np.testing.assert_array_equal(rows.numpy(), file.residues(record, 0))


def test_what_a_worker_gets_is_the_name_of_the_file_and_not_its_rows(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    with read_embeddings(made.name) as file:
        data = file.to_torch()
    sent = pickle.dumps(data)
    monkeypatch.chdir("/")
    again = pickle.loads(sent)
    assert len(sent) < 1000 and torch.equal(again[3][0], data[3][0])


# --- data frames -----------------------------------------------------------------------------------------------------


def test_pandas_has_a_row_for_each_record_by_name(made: Path) -> None:
    with read_embeddings(made) as file:
        frame, expected = file.to_pandas("bos", 0), file.dataset("bos", 0)[:]
    assert frame.index.tolist() == ["a", "b/1", "a", "none", "é"] and frame.index.name == "name"
    assert frame["length"].tolist() == [7, 10, 5, 0, 5] and frame["status"].tolist()[2:4] == ["done", "skipped"]
    np.testing.assert_array_equal(frame.loc[:, "0":"31"].to_numpy(), expected)
    assert frame.loc[:, "0":].isna().all(axis=1).tolist() == [False, False, False, True, False]


def test_frames_of_residues_are_named_by_protein_and_position(made: Path) -> None:
    with read_embeddings(made) as file:
        by_pandas, by_polars, expected = (
            file.to_pandas("residue", 0),
            file.to_polars("residue", 0),
            file.array("residue", 0),
        )
        names = [name for name, length in zip(file.names, file.lengths.tolist(), strict=True) for _ in range(length)]
    assert by_pandas.index.names == ["name", "position"] and len(by_pandas) == len(expected) == 27
    assert by_pandas.index[:8].tolist() == [*(("a", i) for i in range(1, 8)), ("b/1", 1)]
    assert by_pandas.index.get_level_values(0).tolist() == names == by_polars["name"].to_list()
    assert by_polars["position"].to_list() == by_pandas.index.get_level_values(1).tolist()
    np.testing.assert_array_equal(by_pandas.to_numpy(), expected)
    np.testing.assert_array_equal(by_polars["embedding"].to_numpy(), expected)


def test_frames_are_float32_and_groups_without_members_are_none_of_theirs(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in.fasta").write_text(">g1_a\nMKVLAGW\n>g2_a\n\n>g1_b\nMK\n>g3_a\nMKVL\n")
    embed_fasta(tmp_path / "in.fasta", tmp_path / "g.h5", model=str(tiny_model), device="cpu", group_regex="^(.+)_")
    with read_embeddings(tmp_path / "g.h5") as file:
        assert file.groups is not None and file.groups.ids == ["g1", "g2", "g3"]
        frame = file.groups.to_pandas("max")
        assert frame.index.tolist() == ["g1", "g3"] and frame["members"].tolist() == [2, 1]
        np.testing.assert_array_equal(frame.loc[:, "0":"31"].to_numpy(), file.groups.rows("max")[:][[0, 2]])
        assert set(frame.loc[:, "0":].dtypes) == set(file.to_pandas().loc[:, "0":].dtypes) == {np.dtype(np.float32)}
        assert frame.loc[:, "0":].notna().all(axis=None)
        with pytest.raises(UserError, match="has no dataset groups/lenght"):
            file.groups.rows("lenght")


def test_polars_has_an_array_for_each_record(made: Path) -> None:
    import polars as pl

    with read_embeddings(made) as file:
        frame, expected = file.to_polars(), file[:]
    assert frame.columns == ["name", "length", "status", "embedding"]
    assert frame["embedding"].dtype == pl.Array(pl.Float32, 32)
    np.testing.assert_array_equal(frame["embedding"].to_numpy(), expected)


def test_anndata_is_written_and_read_again(made: Path, tmp_path: Path) -> None:
    import anndata

    with read_embeddings(made) as file:
        made_of, expected, model = file.to_anndata(), file[:], file.attributes["model"]
    made_of.write_h5ad(tmp_path / "out.h5ad")
    again = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert again.obs_names.tolist() == ["a", "b/1", "a-1", "none", "é"], "unique, as AnnData wants them"
    assert again.obs["name"].tolist() == ["a", "b/1", "a", "none", "é"]
    assert again.obs["status"].tolist()[3] == "skipped" and again.uns["model"] == model
    np.testing.assert_array_equal(again.X, expected)


@pytest.mark.parametrize("package", ["pandas", "polars", "anndata"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    made: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with read_embeddings(made) as file, pytest.raises(UserError, match=rf"{package}.*\n.*virnucpro\[frames\]"):
        getattr(file, f"to_{package}")()


# --- the README and the reference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_the_lines_of_python_on_a_page_run(
    page: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(snippets) >= 2
    monkeypatch.chdir(tmp_path)
    embed_fasta(VIRAL, "viral.h5", model=str(tiny_model), device="cpu", max_residues=50)
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})


def test_types_are_part_of_the_package() -> None:
    assert (ROOT / "src" / "virnucpro_cli" / "py.typed").is_file()


def test_names_are_strings_however_they_are_asked_for(
    make_fasta: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    embed_fasta(make_fasta([9, 8, 7, 6, 5]), tmp_path / "out.h5", model=str(tiny_model), device="cpu")
    with read_embeddings(tmp_path / "out.h5") as file:
        names = file.names
        assert names[3] == names[np.int64(3)] == names[-2] == "p3" and type(names[np.int32(3)]) is str
        assert names[2:5] == ["p2", "p3", "p4"] and all(type(name) is str for name in names)
        assert file.names_at(np.array([4, 0])) == ["p4", "p0"] and len(names) == len(file)
