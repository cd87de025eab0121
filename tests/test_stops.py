"""Signals at random moments, for every command: each stops it with its exit code, and the same command goes on from there."""

import gc
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import write_model
from test_faults import CHILDREN, datasets
from virnucpro_cli import cli, stopping, store
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import STOP_SIGNALS, UserError

CONTIGS = Path(__file__).parent.parent / "examples" / "contigs.fna"
SHARDS = 2


def commands(there: Path, out: Path) -> dict[str, list[str]]:
    """A command line each. there: what exists already; out: a new folder."""
    model = ["--model", str(there / "model"), "--device", "cpu"]
    made = {
        "embed": ["embed", there / "in.fasta", "-o", out / "out.h5", "--pool", "mean,residue", *model],
        "contigs": ["embed", CONTIGS, "-o", out / "out.h5", "--from", "contigs", "--genes", "six-frame", *model],
        "extract": ["extract", there / "model", there / "in.fasta", out / "pt", "--include", "mean", "per_tok"],
        "merge": ["merge", out / "shards.h5"],
        "import": ["import", there / "keyed.h5", "-o", out / "i.h5", "--fasta", there / "in.fasta", "--model", there / "model"],
        "search": ["search", there / "whole.h5", "--query", "protein_1"],
        "verify": ["verify", there / "whole.h5"],
        "inspect": ["inspect", there / "whole.h5"],
    }  # fmt: skip
    for name in ("fair-esm", "keyed-h5", "npy", "broad", "anndata"):
        made[f"export {name}"] = ["export", there / "whole.h5", "--to", name, "-o", out / f"exported.{name}"]
    return {name: [str(part) for part in line] for name, line in made.items()}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("there")
    write_model(folder / "model")
    generator = random.Random(0)
    proteins = (
        f">protein_{i}\n{''.join(generator.choices('ACDEFGHIKLMNPQRSTVWY', k=20 + i % 90))}\n" for i in range(120)
    )
    (folder / "in.fasta").write_text("".join(proteins))
    embed_fasta(str(folder / "in.fasta"), str(folder / "whole.h5"), model=str(folder / "model"), device="cpu")
    for n in range(1, SHARDS + 1):
        embed_fasta(
            str(folder / "in.fasta"), str(folder / "shards.h5"), model=str(folder / "model"), device="cpu",
            shard=f"{n}/{SHARDS}",
        )  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["export", str(folder / "whole.h5"), "--to", "keyed-h5", "-o", str(folder / "keyed.h5")])
    return folder


@pytest.fixture(autouse=True)
def signal_handlers() -> Any:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def child(line: list[str], at: int, answer: Any) -> None:
    """Run a command, with SIGTERM at the event number `at` of its Python code; answers with how many events there were."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    events = 0

    def count(*_: Any) -> None:
        nonlocal events
        events += 1
        if events == at:
            signal.raise_signal(signal.SIGTERM)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.setprofile(count)
    try:
        cli.main(line)
    except SystemExit as end:
        sys.setprofile(None)
        seen = stopping._stopper is not None and stopping._stopper.signum is not None
        answer.send((events, end.code, seen))


def ran(line: list[str], at: int = 0) -> tuple[int, int, bool]:
    """Events, exit code, and whether the command saw the signal."""
    answer, question = CHILDREN.Pipe(duplex=False)
    process = CHILDREN.Process(target=child, args=(line, at, question))
    process.start()
    process.join(120)
    if answer.poll():
        return answer.recv()
    assert process.exitcode is not None
    return 0, process.exitcode, True


def prepared(there: Path, out: Path) -> Path:
    out.mkdir()
    for n in range(1, SHARDS + 1):
        name = f"shards.{n}-of-{SHARDS}.h5"
        source = next(path for path in there.glob("shards*") if f"{n}" in path.name.replace("h5", "").split("of")[0])
        os.link(source, out / source.name)
        assert name
    return out


@pytest.mark.parametrize(
    "seed", [*range(14), *(pytest.param(n, marks=pytest.mark.soak) for n in range(14, 200))]
)  # fmt: skip
def test_a_signal_at_any_moment_stops_any_command_and_the_same_command_goes_on(
    there: Path, tmp_path: Path, seed: int
) -> None:
    out = prepared(there, tmp_path / "out")
    names = list(commands(there, out))
    name, generator = names[seed % len(names)], random.Random(seed)
    whole = prepared(there, tmp_path / "whole")
    events, expected, _ = ran(commands(there, whole)[name])
    assert expected in (0, 3)
    line, moment = commands(there, out)[name], generator.randrange(1, events)
    _, code, seen = ran(line, moment)
    if seen:
        assert code in (128 + signal.SIGTERM, -signal.SIGTERM), f"{name}, event {moment} of {events}"
    assert ran([*line, "--overwrite"] if name.startswith("export") else line)[1] == expected
    left = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert left == sorted(path.relative_to(whole) for path in whole.rglob("*"))
    for path in whole.glob("*.h5"):
        if name in ("embed", "contigs", "merge", "import"):
            first, second = datasets(path), datasets(out / path.name)
            assert all(first[each].tobytes() == second[each].tobytes() for each in first)
