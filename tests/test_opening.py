"""Every command that opens a file tells its damage as damage, and a bug of its own as a bug."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from virnucpro_cli import cli, export, mapping, pooled, qc, search, status, verify
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import EXIT_INTERNAL, EXIT_USER_ERROR

COMMANDS: dict[str, tuple[list[str], Any, str]] = {
    "inspect": (["--qc", "qc.tsv"], qc, "norms"),
    "map": (["-o", "map.tsv", "--method", "pca"], mapping.projection, "project"),
    "search": (["--query", "p1", "-o", "hits.tsv"], search, "nearest"),
    "search for a fasta": (["--query", "in.fasta", "-o", "hits.tsv"], search.embed, "run"),
    "search the mean": (["--query", "p1", "-o", "hits.tsv"], pooled.Pooled, "mean"),
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
    import h5py

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
