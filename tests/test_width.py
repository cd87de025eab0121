"""A terminal of 80 columns: no line is longer, and nothing is cut off."""

import os
import pty
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from children import program
from conftest import read_fasta
from virnucpro_cli import cli

COMMANDS = list(cli.COMMANDS)
SIZED = ["--device", "cpu", "--fasta", "in.fasta"]


pytestmark = pytest.mark.usefixtures("signal_handlers")


def lines_on_a_terminal(arguments: list[str], folder: Path) -> list[str]:
    """Run the command with a terminal of 80 columns as its standard output and error."""
    ours, theirs = pty.openpty()
    device = os.ttyname(theirs)
    run = program(*arguments, folder=folder, shown=device, COLUMNS="80", LINES="40", TERM="xterm")
    blocks: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # nobody has the other end any more
            while block := os.read(ours, 1 << 16):
                blocks.append(block)

    reader = threading.Thread(target=read)
    reader.start()
    code = run.wait()
    os.close(theirs)
    reader.join(60)
    shown = b"".join(blocks)
    os.close(ours)
    assert code in (0, 1), shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--seconds", "0.2", "--token-budget", "1024,2048", *SIZED], "padded, sorted by length"),
        (["validate", "--sample", "3", *SIZED], "one neighbour's residues changed"),
        (["doctor"], "weights not here"),
    ],
    ids=["bench", "validate", "doctor"],
)
def test_a_command_fits_80_columns_and_cuts_nothing_off(
    arguments: list[str], words: str, make_fasta: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    fasta = make_fasta([20, 30, 40, 50])
    records = [(f"sp|Q9HC10|{'LONG_NAME_OF_A_PROTEIN_' * 3}{name}", text) for name, text in read_fasta(fasta)]
    fasta.write_text("".join(f">{name}\n{text}\n" for name, text in records))
    model = [] if arguments == ["doctor"] else ["--model", str(tiny_model)]
    shown = lines_on_a_terminal([*arguments, *model], tmp_path)
    assert not [line for line in shown if len(line) > 80 or "…" in line or "..." in line]
    joined = re.sub(r"[\s│]+", "", "".join(shown))
    assert words.replace(" ", "") in joined


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 5 and max(map(len, shown)) <= 80
