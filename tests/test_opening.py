"""Every command that opens a file tells its damage as damage, and a bug of its own as a bug."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from virnucpro_cli import cli, store
from virnucpro_cli.cluster import status
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import EXIT_INTERNAL, EXIT_USER_ERROR, UserError
from virnucpro_cli.exchange import export
from virnucpro_cli.explore import default_rows, inspect, mapping, search
from virnucpro_cli.features import qc
from virnucpro_cli.store import checked, read_embeddings
from virnucpro_cli.store import reader as reading
from virnucpro_cli.validation import verify

COMMANDS: dict[str, tuple[list[str], Any, str]] = {
    "inspect": (["--qc", "qc.tsv"], qc, "norms"),
    "map": (["-o", "map.tsv", "--method", "pca"], mapping.projection, "project"),
    "search": (["--query", "p1", "-o", "hits.tsv"], search, "nearest"),
    "search for a fasta": (["--query", "in.fasta", "-k", "60", "-o", "hits.tsv"], search.embed, "run"),
    "search the mean": (["--query", "p1", "-o", "hits.tsv"], default_rows.Pooled, "mean"),
    "export": (["--to", "parquet", "-o", "out.parquet"], export, "Selection"),
    "export of keys": (["--to", "keyed-h5", "-o", "keyed.h5"], export.Keys, "__call__"),
    "verify": ([], verify, "decide"),
}
"""Options of a command, and one of its functions."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("opening")
    (folder / "in.fasta").write_text("".join(f">p{i}\nMKV{'LAGW' * (i % 3)}\n" for i in range(60)))
    embed_fasta(folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu")
    return folder


@pytest.fixture
def ended(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit code and message of a command on a file of some content."""

    def run(command: str, content: bytes) -> tuple[int, str]:
        (tmp_path / "out.h5").write_bytes(content)
        (tmp_path / "in.fasta").write_bytes((made / "in.fasta").read_bytes())
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as error:
            cli.main([command.split()[0], "out.h5", *COMMANDS[command][0]])
        return int(error.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bug_is_told_as_a_bug(
    made: Path, ended: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise TypeError("of ours")

    monkeypatch.setattr(*COMMANDS[command][1:], wrong)
    code, told = ended(command, (made / "out.h5").read_bytes())
    assert code == EXIT_INTERNAL and "a bug in virnucpro: TypeError: of ours" in told and "damaged" not in told, told


@pytest.mark.parametrize("place", [(checked, "_bind"), (checked, "_parsed"), (checked, "by_residue")])
def test_a_bug_in_the_checks_of_a_file_is_told_as_a_bug(
    made: Path, ended: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise KeyError("of ours")

    monkeypatch.setattr(*place, wrong)
    code, told = ended("inspect", (made / "out.h5").read_bytes())
    assert code == EXIT_INTERNAL and "a bug in virnucpro: KeyError: 'of ours'" in told, told


def test_a_file_that_was_cut_since_it_was_opened_is_told_as_damaged(copy: Path) -> None:
    with read_embeddings(copy) as file:
        os.truncate(copy, 4096)
        for read in (file.array, file.to_pandas):
            with pytest.raises(UserError, match=r"out\.h5 is cut short or damaged"):
                read()


@pytest.mark.parametrize("command", COMMANDS)
def test_damage_that_only_a_later_read_finds_is_told_as_damage(
    made: Path, ended: Callable[..., tuple[int, str]], command: str
) -> None:
    content = (made / "out.h5").read_bytes()
    assert content.count(b"p30\0") == 1
    code, told = ended(command, content.replace(b"p30\0", b"\xff30\0"))
    assert code == EXIT_USER_ERROR and "out.h5 is cut short or damaged: " in told, told


@pytest.mark.parametrize("place", ["status", "reason", "lengths"])
def test_a_number_that_means_nothing_is_told_as_damage(
    made: Path, ended: Callable[..., tuple[int, str]], place: str
) -> None:
    with h5py.File(made / "out.h5") as file:
        at = file[place].id.get_offset() + 7 * file[place].dtype.itemsize
    content = bytearray((made / "out.h5").read_bytes())
    content[at : at + 4] = b"\xff\xff\xff\xff"
    code, told = ended("inspect", bytes(content))
    assert code == EXIT_USER_ERROR and f"damaged: {place} has no possible number at 7" in told, told


def test_the_status_of_shards_tells_damage_and_bugs_apart(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.h5").write_bytes((made / "out.h5").read_bytes())
    assert status._state(tmp_path / "out.h5")[0] == "complete"
    with open(tmp_path / "out.h5", "r+b") as file:
        file.truncate(9000)
    assert status._state(tmp_path / "out.h5")[0] == "damaged, remove it"
    (tmp_path / "out.h5").write_bytes((made / "out.h5").read_bytes())
    monkeypatch.setattr(status.np, "count_nonzero", lambda _: None)
    with pytest.raises(TypeError):
        status._state(tmp_path / "out.h5")


# --- files that somebody made up -------------------------------------------------------------------------------------


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made / "out.h5", tmp_path / "out.h5"))


def _external(file: h5py.File, secret: Path) -> None:
    shape, dtype = file["mean/2"].shape, file["mean/2"].dtype
    del file["embeddings"], file["mean/2"]
    file.create_dataset("mean/2", shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    file["embeddings"] = file["mean/2"]


def _virtual(file: h5py.File, secret: Path) -> None:
    shape, dtype = file["mean/2"].shape, file["mean/2"].dtype
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(str(secret), "mean/2", shape, dtype)
    del file["embeddings"], file["mean/2"]
    file.create_virtual_dataset("mean/2", layout)
    file["embeddings"] = file["mean/2"]


def _linked(file: h5py.File, secret: Path) -> None:
    del file["embeddings"], file["mean/2"]
    file["mean/2"] = h5py.ExternalLink(str(secret), "mean/2")


def _soft(file: h5py.File, secret: Path) -> None:
    del file["lengths"]
    file["lengths"] = h5py.SoftLink("/replaced")


@pytest.mark.parametrize("change", [_external, _virtual, _linked, _soft])
def test_a_file_that_would_show_bytes_of_another_is_refused(
    made: Path, copy: Path, change: Callable[[h5py.File, Path], None]
) -> None:
    secret = Path(shutil.copy(made / "out.h5", copy.parent / "secret.h5"))
    with h5py.File(copy, "r+") as file:
        change(file, secret)
    with pytest.raises(UserError, match="is refused"):
        read_embeddings(copy)
    for run in (partial(export.export_file, to="npy"), inspect.inspect_file, verify.verify_file):
        with pytest.raises(UserError, match="is refused"):
            run(str(copy))


def test_a_view_of_shards_that_an_earlier_version_made_is_refused(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file.attrs["virtual_of"] = json.dumps([["out.shard-0001-of-0001.h5", "0" * 64]])
        _virtual(file, copy)
    for run in (read_embeddings, inspect.inspect_file, verify.verify_file):
        with pytest.raises(UserError, match=r"is a view.*\n?.*Merge the shards without --virtual"):
            run(str(copy))


@pytest.mark.parametrize(
    ("lost", "words"),
    [(lambda *_: time.sleep(60), "does not come back"), (lambda *_: os.kill(os.getpid(), signal.SIGSEGV), "crashes")],
)
def test_a_file_in_which_the_library_is_lost_is_told_as_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch, lost: Any, words: str
) -> None:
    """A damaged file can make HDF5 loop or crash, where no handler of ours gets its turn."""
    monkeypatch.setattr(reading, "datasets_of", lost)
    monkeypatch.setattr(reading, "OPENING_SECONDS", 1)
    with pytest.raises(UserError, match=rf"damaged: the HDF5 library {words}"):
        inspect.inspect_file(str(copy))


def test_a_file_is_tried_once_until_it_changes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, child = [], reading._child_that_opens
    monkeypatch.setattr(reading, "_child_that_opens", lambda paths: tried.append(paths) or child(paths))
    for expected in (1, 1, 2):
        if expected == 2:
            os.utime(copy)
        reading.opened(copy).close()
        assert len(tried) == expected


def test_a_partial_file_in_which_the_library_is_lost_is_refused_and_can_be_discarded(
    copy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, fasta = tmp_path / "new.h5", tmp_path / "in.fasta"
    fasta.write_text(">a\nMKV\n")
    store.partial_path(output).write_bytes(copy.read_bytes())
    monkeypatch.setattr(reading, "datasets_of", lambda *_: time.sleep(60))
    monkeypatch.setattr(reading, "OPENING_SECONDS", 1)
    with pytest.raises(UserError, match=r"the HDF5 library does not come back.*\n?.*--restart"):
        embed_fasta(fasta, output, model=str(tiny_model), device="cpu")
    monkeypatch.undo()
    assert embed_fasta(fasta, output, model=str(tiny_model), device="cpu", restart=True).counts["proteins"] == 1


def test_damage_is_told_under_optimised_python_too(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        del file["replaced"]
        file["replaced"] = np.zeros(59, np.int32)
    done = subprocess.run(
        [sys.executable, "-O", "-m", "virnucpro_cli", "inspect", str(copy)], capture_output=True, text=True
    )
    assert done.returncode == EXIT_USER_ERROR and "damaged: replaced has 59 entries, and 60 is right" in done.stderr
