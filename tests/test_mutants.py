"""Files that somebody edited or made up end every command with a message, within seconds and in bounded memory."""

import io
import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import mutants
from conftest import TINY, write_model
from virnucpro_cli import cli
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.model import weights
from virnucpro_cli.store import read_embeddings

SECONDS = 20
"""Time of a command, at most; all end within one second on an idle machine."""
SHARDS = ("out.shard-0001-of-0002.h5", "out.shard-0002-of-0002.h5")
COMMANDS = {
    "inspect": ["--qc", "qc.tsv"], "status": [], "verify": ["--fasta", "in.fasta"], "merge": [],
    "export": ["--to", "npy", "-o", "out.npy"], "search": ["--query", "g1_p1", "-o", "hits.tsv"],
    "map": ["-o", "map.tsv", "--method", "pca"],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with windows, groups and residues; one with scores and contacts; and two shards."""
    folder = tmp_path_factory.mktemp("mutants")
    model = write_model(folder / "model")
    save_file(load_file(model / "model.safetensors") | weights.random_heads(TINY), model / "model.safetensors")
    fasta = folder / "in.fasta"
    fasta.write_text("".join(f">g{i % 4}_p{i}\nMKV{'LAGWMKTAYI' * (i % 9)}\n" for i in range(40)) + ">g1_none\n\n")
    same: dict[str, Any] = {"model": str(model), "device": "cpu"}
    embed_fasta(fasta, folder / "windows.h5", pool=("mean", "residue"), long="window", max_residues=50, overlap=10,
                group_regex="^(.+)_", **same)  # fmt: skip
    embed_fasta(fasta, folder / "scores.h5", layers=(0, 2), emit=("entropy", "logits", "contacts"), **same)
    for shard in ("1/2", "2/2"):
        embed_fasta(fasta, folder / "out.h5", shard=shard, **same)
    return folder


def ended(arguments: list[str]) -> tuple[int, str, float]:
    """Exit code of a command, all that it printed, and its seconds."""
    printed, started = io.StringIO(), time.monotonic()
    with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as error:
        cli.main(arguments)
    return int(error.value.code or 0), printed.getvalue(), time.monotonic() - started


def check(made: Path, folder: Path, seed: int, commands: list[str]) -> None:
    """Change a copy by the seed, and run commands on it."""
    for there in folder.iterdir():
        there.unlink()
    shutil.copy(made / "in.fasta", folder)
    source = ("windows.h5", "scores.h5", SHARDS[0])[seed % 3]
    target = folder / (source if source in SHARDS else "out.h5")
    shutil.copy(made / source, target)
    shutil.copy(made / SHARDS[1], folder)
    changed = mutants.mutate(target, seed)
    for command in commands:
        name = "out.h5" if command in ("merge", "status") else target.name
        code, printed, seconds = ended([command, name, *COMMANDS[command]])
        what = f"seed {seed}, {changed}: {command}: {printed}"
        assert code in (0, 1, 2, 3), what
        assert "\x1b" not in printed and "\x07" not in printed and "Traceback" not in printed, what
        assert seconds < SECONDS, what


@pytest.mark.slow
def test_an_edited_file_ends_every_command_with_a_message(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred and sixty edits; each is read by two of the commands."""
    monkeypatch.chdir(tmp_path)
    names = list(COMMANDS)
    for seed in range(160):
        check(made, tmp_path, seed, [names[seed % len(names)], names[seed // 7 % len(names)]])


@pytest.mark.soak
def test_thousands_of_edited_files_end_every_command_with_a_message(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(1000, 4000):
        check(made, tmp_path, seed, list(COMMANDS))


# --- the name of the field -------------------------------------------------------------------------------------------


def _json(file: h5py.File, name: str, key: str, value: Any) -> None:
    settings = json.loads(file.attrs[name])
    file.attrs[name] = json.dumps(settings | {key: value})


def _instead(file: h5py.File, name: str, **made: Any) -> None:
    del file[name]
    file.create_dataset(name, **made)


FIELDS: list[tuple[str, Any]] = [
    ("status", lambda file: _instead(file, "status", data=np.zeros((41, 2), "u1"))),
    ("status", lambda file: _instead(file, "status", data=np.zeros(41, "f4"))),
    ("status", lambda file: _instead(file, "status", data=["done"] * 41, dtype=h5py.string_dtype())),
    ("lengths", lambda file: _instead(file, "lengths", data=np.zeros(41, "i8"))),
    ("lengths", lambda file: _instead(file, "lengths", shape=(10**12,), dtype="i4")),
    ("lengths", lambda file: _instead(file, "lengths", data=np.zeros(41, [("a", "i4")]))),
    ("replaced", lambda file: _instead(file, "replaced", data=np.zeros(40, "i4"))),
    ("mean/2", lambda file: _instead(file, "mean/2", shape=(41, 32), dtype="f2", chunks=True)),
    ("mean/2", lambda file: _instead(file, "mean/2", data=np.zeros((41, 32), "f4"))),
    ("residue/offsets", lambda file: _instead(file, "residue/2", data=np.zeros((5, 32), "f2"))),
    ("residue/offsets", lambda file: file["residue/offsets"].__setitem__(3, 1 << 62)),
    ("groups/ids", lambda file: _instead(file, "groups/ids", data=np.zeros(4, "i4"))),
    ("groups/of", lambda file: file["groups/of"].__setitem__(3, 99)),
    ("inputs", lambda file: file.attrs.__setitem__("inputs", 3)),
    ("fingerprint.layers", lambda file: _json(file, "fingerprint", "layers", list(range(1_000_000)))),
    ("fingerprint.pool", lambda file: _json(file, "fingerprint", "pool", ["mean"] * 1_000_000)),
    ("fingerprint.overlap", lambda file: _json(file, "fingerprint", "overlap", "much")),
    ("fingerprint.overlap", lambda file: _json(file, "fingerprint", "overlap", 50)),
    ("mean/1", lambda file: _json(file, "fingerprint", "layers", [1, 2])),
    ("model", lambda file: file.attrs.__setitem__("model", 3)),
    ("argv", lambda file: file.attrs.__setitem__("argv", "[" * 100_000)),
]


@pytest.mark.parametrize(("field", "change"), FIELDS, ids=[f"{i}-{field}" for i, (field, _) in enumerate(FIELDS)])
def test_a_field_that_is_not_as_the_schema_says_is_named(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, change: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(made / "windows.h5", tmp_path / "out.h5"))
    with h5py.File(path, "r+") as file:
        if field == "mean/2":
            del file["embeddings"]
        change(file)
    for command in ("inspect", "search"):
        code, printed, _ = ended([command, "out.h5", *COMMANDS[command]])
        assert code == 2 and field in printed and "damaged" in printed, printed


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_texts_that_all_name_one_long_text_are_refused(made: Path, tmp_path: Path) -> None:
    """A text is where its dataset says, and so every record may have the same one of a megabyte."""
    path = Path(shutil.copy(made / "windows.h5", tmp_path / "out.h5"))
    with h5py.File(path, "r+") as file:
        file["sequence_ids"][0] = "x" * (1 << 20)
        at = file["sequence_ids"].id.get_offset()
    with open(path, "r+b") as raw:
        raw.seek(at)
        entry = raw.read(16)
        raw.seek(at)
        raw.write(entry * 41)
    with read_embeddings(path) as file, pytest.raises(UserError, match="longer texts than the file"):
        file.names  # noqa: B018


def test_declared_sizes_take_no_memory(made: Path, tmp_path: Path) -> None:
    """Within an address space in which the program just fits."""
    for i, name in enumerate(("mean/2", "sequence_ids", "residue/offsets", "status", "run/report")):
        path = Path(shutil.copy(made / "windows.h5", tmp_path / f"{i}.h5"))
        with h5py.File(path, "r+") as file:
            shape = (10**10, 32) if name == "mean/2" else (10**10,)
            _instead(file, name, shape=shape, dtype=h5py.string_dtype() if name == "sequence_ids" else file[name].dtype)
    code = (
        "import resource, sys\nfrom virnucpro_cli import read_embeddings\nfrom virnucpro_cli.errors import UserError\n"
        "with open('/proc/self/statm') as file: used = int(file.read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_embeddings(path)\n"
        "    except UserError: continue\n"
        "    sys.exit(path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, sorted(tmp_path.glob("*.h5")))], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
