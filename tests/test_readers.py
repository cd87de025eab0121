"""What Python programs read: memory maps, data frames, AnnData, a dataset of PyTorch; and the README's own lines."""

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import virnucpro_cli
from conftest import ROOT, VIRAL
from virnucpro_cli import errors
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.store import EmbeddingFile, read_embeddings

README = (ROOT / "README.md").read_text()


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
    monkeypatch.setattr("virnucpro_cli.store.reading.NAME_BLOCK", 2)
    with read_embeddings(made) as file:
        assert [file.find(name) for name in ("a", "é", "z")] == [[0, 2], [4], []]
        rows = np.array([4, 0, 4, 3, 1])
        assert file.names_at(rows) == [file.names[row] for row in rows]
        assert file.names_at(rows[:0]) == []


def test_reading_and_frames_need_no_torch(made: Path) -> None:
    code = (
        "import sys; from virnucpro_cli import read_embeddings\n"
        f"file = read_embeddings({str(made)!r}); file.array(); file.to_pandas(); file.to_polars(); file.to_anndata()\n"
        "assert 'torch' not in sys.modules; file.to_torch(); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- PyTorch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_a_loader_gives_every_done_row_with_its_record(made: Path, start: str | None) -> None:
    with read_embeddings(made) as file:
        data, expected, done = file.to_torch(), file[:], np.flatnonzero(file.status == 1)
    loader = DataLoader(data, batch_size=3, num_workers=2 if start else 0, multiprocessing_context=start)
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


# --- the README --------------------------------------------------------------------------------------------------------


def test_the_lines_of_python_in_the_readme_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 2
    monkeypatch.chdir(tmp_path)
    embed_fasta(VIRAL, "viral.h5", model=str(tiny_model), device="cpu", max_residues=50)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_every_public_name_is_in_the_readme_with_its_parameters() -> None:
    section = README.partition("## From Python")[2].partition("\n## ")[0]
    for name in virnucpro_cli.__all__:
        assert f"`{name}" in section, name
    methods = [method for method in vars(EmbeddingFile) if not method.startswith("_")]
    for method in methods:
        assert f"`{method}" in section, method
    for method, parameters in re.findall(r"`(\w+)\((.*?)\)(?: -> .*?)?`", section):
        if method in methods:
            known = inspect.signature(getattr(EmbeddingFile, method)).parameters
            given = [part.partition(":")[0].partition("=")[0].strip() for part in parameters.split(",") if part]
            assert given == [each for each in known if each != "self"], method


def test_types_are_part_of_the_package() -> None:
    assert (ROOT / "src" / "virnucpro_cli" / "py.typed").is_file()
