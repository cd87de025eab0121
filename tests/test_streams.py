"""Standard streams as they come: closed, full, a pipe whose reader goes, an encoding without the letters of a name; and terminals."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import pytest

from children import closed, no_reader, program
from virnucpro_cli import cli, store
from virnucpro_cli.cluster import status
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import inspect

RUN = f"{sys.executable} -m virnucpro_cli"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin:/bin"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    (folder / "in.fasta").write_text(">protéine\nMKTAYIAKQR\n>b\nMSDNGPQNQR\n>猫\nMKKLLPTAAA\n")
    embed_fasta(folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu")
    return folder


@pytest.mark.parametrize("command", ["inspect out.h5", "verify out.h5", "search out.h5 --query b", "--version"])
def test_a_disk_that_is_full_is_no_bug(made: Path, command: str) -> None:
    run = program(*command.split(), folder=made, out="/dev/full")
    assert run.wait() == 2 and "bug" not in run.err and "Exception" not in run.err, run.err
    assert run.err.count("error: Standard output cannot be written: No space left on device.") == 1


@pytest.mark.parametrize("change", [no_reader, closed], ids=["no reader", "closed"])
@pytest.mark.parametrize("command", ["inspect out.h5", "search out.h5 --query out.h5"])
def test_an_output_that_nobody_reads_is_no_bug(made: Path, command: str, change: Callable[[int], None]) -> None:
    run = program(*command.split(), folder=made, before=partial(change, 1))
    assert run.wait() == 0 and "bug" not in run.err and "Exception" not in run.err, run.err


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("{run} --version > /dev/full", 2),
        ("{run} status out.h5 >&-", 0),
        ("set -o pipefail; {run} status out.h5 | true", 0),
    ],
)
def test_a_shell_sees_no_bug_either(made: Path, command: str, code: int) -> None:
    done = subprocess.run(["bash", "-c", command.format(run=RUN)], cwd=made, capture_output=True, text=True)
    assert done.returncode == code and "bug" not in done.stderr and "Exception" not in done.stderr, done.stderr


def in_latin_1() -> None:
    """As PYTHONIOENCODING=latin-1 has it."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="latin-1")


def test_a_letter_that_the_console_lacks_is_escaped(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "shown"
    out.touch()
    run = program("inspect", "out.h5", folder=made, out=str(out), before=in_latin_1)
    assert run.wait() == 0, run.err
    assert "protéine".encode("latin-1") in out.read_bytes() and rb"\u732b" in out.read_bytes()


ONE_BY_ONE = """
import sys
from virnucpro_cli.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as end:
        assert not end.code, line
"""


def test_names_of_files_have_letters_of_the_locale(made: Path, tmp_path: Path, tiny_model: Path) -> None:
    extract = f"extract {tiny_model}/model.safetensors in.fasta {tmp_path}/extracted --include mean --nogpu"
    export = f"export out.h5 --to fair-esm -o {tmp_path}/exported"
    subprocess.run([sys.executable, "-c", ONE_BY_ONE, extract, export], cwd=made, env=ASCII, check=True)
    for folder in (tmp_path / "extracted", tmp_path / "exported"):
        assert sorted(path.name for path in folder.glob("[!.]*.pt")) == ["_.pt", "b.pt", "prot_ine.pt"]


def test_no_character_of_a_foreign_file_steers_the_terminal(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.h5"
    path.write_bytes((made / "out.h5").read_bytes())
    evil = "\x1b]0;title\x07\x9b31m"
    with h5py.File(path, "r+") as file:
        for name in ("model", "device", "attention", "weights", "tool_version", "created"):
            file.attrs[name] = evil
        file.attrs["argv"] = json.dumps([evil])
        file.attrs["inputs"] = json.dumps([{"path": evil, "bytes": 3, "sha256": evil}])
        file["sequence_ids"][0] = evil
    inspect.inspect_file(str(path))
    for command in (["inspect", str(path)], ["verify", str(path)], ["search", str(path), "--query", evil]):
        with pytest.raises(SystemExit):
            cli.main(command)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not set("\x1b\x07\x9b") & set(text)
    assert "?]0;title??31m" in shown.out


@pytest.mark.parametrize("command", ["inspect", "verify", "map", "search", "export"])
def test_a_file_that_is_not_finished_is_said_to_be_so(
    made: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "out.h5.partial"
    partial.write_bytes((made / "out.h5").read_bytes())
    with h5py.File(partial, "r+") as file:
        file["status"][1:] = store.PENDING
        file["run/complete"][()] = 0
    options = {"map": ["-o", str(tmp_path / "m.tsv")], "search": ["--query", "b"], "export": ["--to", "npy"]}
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(tmp_path / "out.h5"), *options.get(command, [])])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "out.h5 is unfinished: 1 of 3 proteins in out.h5.partial" in told
    assert "Repeat the embed command" in told


def test_the_status_of_an_output_that_is_not_finished_says_how_far_it_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="neither"):
        status.show_shards(str(tmp_path / "out.h5"))
    (tmp_path / "out.h5.partial").write_bytes((made / "out.h5").read_bytes())
    assert not status.show_shards(str(tmp_path / "out.h5"))
    assert "out.h5 is unfinished: 3 of 3 proteins" in capsys.readouterr().out
