"""Numbers that nobody would type, at every option of every command that takes one."""

import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_model
from heads import pickled_head
from test_dnabert import SMALL, checkpoint, state_of
from virnucpro_cli import cli, embed_fasta
from virnucpro_cli.cli import extract

NOT_FINITE = ("nan", "inf", "-inf", "1e309")
VALUES = ("0", "-1", "1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, str(1 << 63), "-0.0", "1e-320", "", *NOT_FINITE)
SLOW = ("0", "-0.0", "1e-320", "1" + "0" * 30, str(1 << 63))
"""What `bench` takes for some options, and then measures."""
ARGUMENTS = {
    "embed": "in.fasta -o new.h5 --dry-run --model tiny --device cpu",
    "bench": "--fasta in.fasta --seconds 0.1 --model tiny --device cpu --quiet",
    "validate": "--fasta in.fasta --sample 2 --model tiny --device cpu --quiet --token-budget 1024",
    "search": "out.h5 --query p1",
    "map": "out.h5 -o map.tsv --method pca --overwrite",
    "extract": "tiny in.fasta tree --include mean --nogpu",
    "export": "out.h5 --to npy -o out.npy --overwrite",
    "import": "rows.npy -o imported.h5 --fasta in.fasta --overwrite",
    "merge": "parts.h5 --overwrite",
    "predict": "contigs.fna -o predicted --model tiny --nucleotide-model dna --head head/head.pth --chunk 300 --device cpu -q",
}


def options_of(command: Callable[..., Any]) -> list[str]:
    """Options of a command that take a number, by their types and by how --help writes their values."""
    if command is extract.extract:
        return [each.option_strings[0] for each in extract.parser()._actions if each.type is not None]
    found = []
    for kind in typing.get_type_hints(command, include_extras=True).values():
        plain, *metadata = typing.get_args(kind) or (kind,)
        for option in metadata:
            names = [name for name in (option.default, *(option.param_decls or ())) if str(name).startswith("-")]
            number = {int, float} & {plain, *typing.get_args(plain)}
            if names and (number or re.fullmatch(r"N|N,N|S|X|K/N|SIZE", str(option.metavar))):
                found.append(names[0])
    return found


FUNCTIONS = {info.name or "": info.callback for info in cli.program(*cli.COMMANDS).registered_commands if info.callback}
OPTIONS = [(name, option) for name, command in FUNCTIONS.items() for option in options_of(command)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short proteins, a tiny model, and what other commands made of them."""
    folder = tmp_path_factory.mktemp("numbers")
    model = write_model(folder / "tiny")
    text = "".join(f">p{i}\nM{'ACDEFGHIKL'[i:] * 3}{'W' * i}\n" for i in range(6))
    (folder / "in.fasta").write_text(text)
    embed_fasta(folder / "in.fasta", folder / "out.h5", model=model, device="cpu")
    for part in ("1/2", "2/2"):
        embed_fasta(folder / "in.fasta", folder / "parts.h5", model=model, device="cpu", shard=part)
    (folder / "contigs.fna").write_text(f">c\n{'GCT' * 40}\n")
    checkpoint(folder / "dna", SMALL, state_of(SMALL))
    pickled_head(folder / "head", SMALL.hidden + 32)
    with pytest.raises(SystemExit):
        cli.main(["export", str(folder / "out.h5"), "-o", str(folder / "rows.npy")])
    return folder


pytestmark = pytest.mark.usefixtures("signal_handlers")


def test_every_command_with_numbers_is_tried() -> None:
    assert {command for command, _ in OPTIONS} == set(ARGUMENTS) and len(OPTIONS) > 30


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_number_that_nobody_would_type_is_taken_or_refused_by_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, option: str
) -> None:
    monkeypatch.chdir(folder)
    for value in VALUES:
        if command == "bench" and value in SLOW:
            continue
        text = f"1/{value}" if option == "--shard" else value
        given = f"{option}={text}" if option.startswith("--") else option + text
        with pytest.raises(SystemExit) as stop:
            cli.main([command, *ARGUMENTS[command].split(), given])
        said = capfd.readouterr().err
        assert stop.value.code in ((2,) if value in NOT_FINITE else (0, 1, 2, 3)), (value, said)
        assert "Traceback" not in said and "internal error" not in said
        if stop.value.code == 2:
            assert option.lstrip("-") in said and len(said) < 2500, (value[:40], said[:300])
