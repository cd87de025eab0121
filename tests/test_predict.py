"""`predict`: from contigs to VirNucPro's tables and a call for each contig, whole or not at all, and resumed.

A pipeline written anew from VirNucPro's description stands beside it, with the same tiny encoders and head.
"""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from children import CHILDREN, killed_at, program
from conftest import ROOT
from halves import stopped_in_the_half
from heads import pickled_head
from test_dnabert import SMALL, checkpoint, state_of
from test_faults import one_thread  # noqa: F401  (in force here too)
from test_genes import contents
from virnucpro_cli import predict, read_embeddings, store
from virnucpro_cli.cluster import merge
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import Stopped, UserError
from virnucpro_cli.fasta import tokenised
from virnucpro_cli.fasta.token_file import TokenFile
from virnucpro_cli.predict import compare, contigs, frames, predict_contigs, tables
from virnucpro_cli.predict import head as heads
from virnucpro_cli.store import disk

GOLDENS = ROOT / "tests" / "data" / "virnucpro_goldens.npz"
Predict = Callable[..., Path]
FEATURES = SMALL.hidden + 32
KILLS = 50
MADE = ("prediction_results.txt", "prediction_results_highestscore.csv", "contigs.tsv")


# --- the pipeline, written anew --------------------------------------------------------------------------------------

CODE = dict(
    zip(
        map("".join, itertools.product("TCAG", repeat=3)),
        "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
        strict=True,
    )
)


def cut(name: str, contig: str, size: int) -> list[tuple[str, str, str]]:
    """(name, bases, residues) of the frames of a contig."""
    kept, n = [], len(contig)
    count = -(-n // size)
    each, rest = divmod(count * size - n, max(count, 1))
    for number in range(count):
        start = number * (size - each) - min(number, each + rest)
        chunk = contig[start : start + size].upper()
        for letter, strand in (("F", chunk), ("R", chunk.translate(str.maketrans("ACGT", "TGCA"))[::-1])):
            for k in range(3):
                residues = "".join(CODE.get(strand[i : i + 3], "") for i in range(k, len(strand) - 2, 3))
                if residues and "*" not in residues:
                    label = f"{name}_chunk_{number + 1}{letter}{k + 1}"
                    kept.append((label, strand[k : k + 3 * len(residues) + 1], residues))
    return kept


def original_tables(names: list[str], scores: Any) -> tuple[str, str]:
    """VirNucPro's own two tables of scores float32 [n, 2]."""
    rows, best = ["Sequence_ID\tPrediction\tscore1\tscore2"], dict[str, Any]()
    for name, (others, virus) in zip(names, scores, strict=True):
        rows.append(f"{name}\t{'virus' if virus > others else 'others'}\t{others!s}\t{virus!s}")
        a, b = best.get(name[:-2], (np.float32(0), np.float32(0)))
        best[name[:-2]] = max(a, others), max(b, virus)
    calls = ["Modified_ID\tIs_Virus", *(f"{chunk}\t{best[chunk][1] >= best[chunk][0]}" for chunk in sorted(best))]
    return "\n".join(rows) + "\n", "\n".join(calls) + "\n"


def without_stops(generator: random.Random, length: int, odd: str = "") -> str:
    codons = [codon for codon, residue in CODE.items() if residue != "*"]
    bases = "".join(generator.choices(codons, k=length // 3 + 1))[:length]
    return "".join(generator.choice(odd) if odd and generator.random() < 0.03 else base for base in bases)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DNABERT-S."""
    return checkpoint(tmp_path_factory.mktemp("small") / "small", SMALL, state_of(SMALL))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contigs of 1 to 8 chunks, with odd letters and names, and some without a frame."""
    generator, path = random.Random(4), tmp_path_factory.mktemp("contigs") / "contigs.fna"
    lengths = [299, 340, 700, 1100, 1400, 1501, 2000, 2400, 1, 60]
    odd = ["", "N", "NRYKMSWBDHV", "", "N", "", "RY", "", "", ""]
    names = ["c10", "c2", "a_chunk_1", "a", 'q"q', "c2_chunk_2F1", "NODE_1_length_5", "é", "one", "z|x"]
    with open(path, "w") as file:
        for name, length, letters in zip(names, lengths, odd, strict=True):
            text = "TAA" * 20 if length == 60 else without_stops(generator, length, letters)
            file.write(f">{name} more\n{text.lower() if name == 'c2' else text}\n")
        file.write(f">last\n{'TAACTAGCTGATTAGTTAATCA' * 30}\n")
    return path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, sample: Path, tiny_model: Path, small: Path) -> Path:
    """A head that calls about half of the sample's frames virus."""
    folder = tmp_path_factory.mktemp("head")
    embed_fasta(
        sample, folder / "e.h5", model=str(tiny_model), from_="contigs", genes="virnucpro", chunk=300,
        nucleotide=True, nucleotide_model=str(small), device="cpu", store_dtype="fp32",
    )  # fmt: skip
    with read_embeddings(folder / "e.h5") as file:
        half = file.half("dna")
        np.save(folder / "features.npy", np.concatenate([half.array(half.names[-1]), file.array("mean")], axis=1))
    return pickled_head(folder, FEATURES, 16, folder / "features.npy")


@pytest.fixture
def run(tmp_path: Path, sample: Path, tiny_model: Path, small: Path, head: Path) -> Predict:
    def call(inputs: Any = None, output: str = "out", **options: Any) -> Path:
        told: dict[str, Any] = {"head": head} if "head" not in options else {}
        if inputs is None or not str(inputs).endswith(".h5"):
            told |= {"chunk": 300, "model": str(tiny_model), "nucleotide_model": str(small), "device": "cpu"}
        predict_contigs(inputs or sample, tmp_path / output, **told | options)
        return tmp_path / output

    return call


def fasta_of(path: Path) -> list[tuple[str, str]]:
    text = path.read_text().split(">")[1:]
    return [(each.split()[0], each.partition("\n")[2].replace("\n", "")) for each in text]


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", [300, 500])
def test_tables_are_those_of_virnucpros_own_steps(
    run: Predict, tmp_path: Path, sample: Path, tiny_model: Path, small: Path, head: Path, size: int
) -> None:
    """Frames, slices and order by a pipeline written anew; rows of each half embedded by themselves."""
    out = run(format="original", chunk=size)
    cuts = [each for name, text in fasta_of(sample) for each in cut(name, text, size)]
    halves = []
    for column, more in (
        (1, {"model": str(small), "kind": "nucleotide", "pool": ("mean-all",)}),
        (2, {"model": str(tiny_model)}),
    ):
        text = "".join(f">{i}\n{each[column]}\n" for i, each in enumerate(cuts))
        (tmp_path / "half.fa").write_text(text)
        embed_fasta(tmp_path / "half.fa", tmp_path / f"half{column}.h5", device="cpu", store_dtype="fp32", **more)
        with read_embeddings(tmp_path / f"half{column}.h5") as file:
            halves.append(file[:])
    scores = heads.read(head).scores(np.concatenate(halves, axis=1))
    expected = original_tables([name for name, *_ in cuts], scores)
    found = [(out / name).read_text() for name in MADE[:2]]
    ours, theirs = (list(csv.reader(text.splitlines(), delimiter="\t")) for text in (found[1], expected[1]))
    assert [[name.replace('"', ""), call] for name, call in ours] == [[n.replace('"', ""), c] for n, c in theirs]
    for ours, theirs in zip(found[0].splitlines(), expected[0].splitlines(), strict=True):
        (name, call, *numbers), (its_name, its_call, *its_numbers) = ours.split("\t"), theirs.split("\t")
        assert (name, call) == (its_name, its_call)
        if name != "Sequence_ID":
            assert np.allclose(np.array(numbers, float), np.array(its_numbers, float), atol=1e-5, rtol=0)
    assert len(cuts) > 25 and {line.split("\t")[1] for line in found[0].splitlines()[1:]} == {"virus", "others"}


def test_contigs_are_listed_in_the_order_of_the_input_by_their_numbers(run: Predict, sample: Path) -> None:
    out = run()
    table = rows_of(out / "contigs.tsv")
    assert table[0] == list(contigs.COLUMNS)
    assert [row[0].strip('"').replace('""', '"') for row in table[1:]] == [name for name, _ in fasta_of(sample)]
    calls = {row[0]: row for row in table[1:]}
    for name in ("one", "last"):
        assert calls[name][1:5] == ["no frame", "", "", "0"]
    chunks = rows_of(out / MADE[1])
    assert sum(int(row[4]) for row in table[1:]) == len(chunks) - 1
    of_a = [row for row in chunks if row[0].rpartition("_chunk_")[0] == "a"]
    assert int(calls["a"][4]) == len(of_a) and int(calls["a_chunk_1"][4]) < len(of_a)


def test_a_file_that_was_embedded_before_gives_the_same_tables(
    run: Predict, sample: Path, tmp_path: Path, tiny_model: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run()
    embed_fasta(
        sample, tmp_path / "e.h5", model=str(tiny_model), from_="contigs", genes="virnucpro", chunk=300,
        nucleotide=True, nucleotide_model=str(small), device="cpu", store_dtype="fp32",
    )  # fmt: skip
    monkeypatch.setattr(predict.embed, "run", None)  # no encoder
    again = run(tmp_path / "e.h5", "again")
    assert [(again / name).read_bytes() for name in MADE] == [(out / name).read_bytes() for name in MADE]
    assert not (again / "embeddings.h5").exists()
    with pytest.raises(UserError, match="of chunks of 300 bases, not 500"):
        run(tmp_path / "e.h5", "no", chunk=500)


def test_shards_and_their_merge_give_the_same_tables(run: Predict, tmp_path: Path) -> None:
    out = run()
    for shard in ("1/2", "2/2"):
        there = run(output="sharded", shard=shard)
        assert not any((there / name).exists() for name in MADE)
    merge.merge_shards(str(tmp_path / "sharded" / "embeddings.h5"))
    run(output="sharded")
    assert [(tmp_path / "sharded" / name).read_bytes() for name in MADE] == [(out / n).read_bytes() for n in MADE]


def test_the_same_command_makes_what_is_missing_and_nothing_else(
    run: Predict, sample: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run()
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    run(quiet=False)
    assert capsys.readouterr().err.count("is already complete") == 2
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    (out / MADE[1]).unlink()
    (out / MADE[2]).write_bytes(before[MADE[2]][0].replace(b"no frame", b"mo frame"))
    run()
    now = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert {name for name in now if now[name][1] != before[name][1]} == {MADE[1], MADE[2], "predict.json"}
    assert {name: content for name, (content, _) in now.items()} == {n: content for n, (content, _) in before.items()}


def content_of(folder: Path) -> dict[str, Any]:
    """All that a user reads of a run: tables, FASTA files, and every dataset but those of the run itself."""
    found: dict[str, Any] = {name: (folder / name).read_bytes() for name in MADE}
    found |= {path.name: path.read_bytes() for path in folder.glob("embeddings.*.f[an]a")}
    return found | contents(folder / "embeddings.h5")


@pytest.mark.slow
def test_a_kill_at_any_moment_is_made_good_by_the_same_command(
    tmp_path: Path, sample: Path, tiny_model: Path, small: Path, head: Path
) -> None:
    told, generator = tmp_path / "calls", random.Random(6)
    options = {
        "inputs": str(sample), "head": str(head), "chunk": 300, "model": str(tiny_model), "token_budget": 1024,
        "nucleotide_model": str(small), "device": "cpu",
    }  # fmt: skip

    def child(at: int, output: Path) -> int:
        process = CHILDREN.Process(
            target=killed_at, args=(predict_contigs, options | {"output": str(output)}, at, str(told))
        )
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    assert child(0, tmp_path / "whole") == 0
    whole, calls, killed, ended = content_of(tmp_path / "whole"), int(told.read_text()), 0, 0
    while killed < KILLS or not ended:  # a run that goes on with another's work has fewer calls to make, and may end
        output = tmp_path / f"{ended}"
        code = child(generator.randrange(1, calls), output)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if code == 0:
            assert content_of(output) == whole
            ended += 1
        assert ended <= KILLS, "most runs were over before their kill: this tests nothing"
    assert child(0, output) == 0 and content_of(output) == whole


@pytest.mark.parametrize("broken", MADE)
def test_a_table_is_whole_or_not_there(
    run: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    class Stop(Exception):
        pass

    def half(file: Any, *rest: Any) -> None:
        file.write(b"Sequence_ID\n")
        raise Stop

    writers = predict._writers

    def spoilt(config: Any) -> Any:
        return {name: half if name == broken else write for name, write in writers(config).items()}

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(predict, "_writers", spoilt)
        run()
    assert not any(name.name == broken or name.suffix == ".virnucpro-new" for name in (tmp_path / "out").iterdir())
    out = run()
    assert all((out / name).read_text().count("\n") > 5 for name in MADE)


def test_tokens_are_kept_until_the_run_is_finished(run: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(output="whole")
    monkeypatch.setattr(tokenised, "AT_ONCE", 300)
    stopped_in_the_half(run, token_budget=1024)
    tokens = whole.with_name("out") / "embeddings.h5.dna.tokens"
    assert tokens.stat().st_size > 0
    with monkeypatch.context() as patched:
        patched.setattr(TokenFile, "add", lambda *made: pytest.fail("tokens are made again"))
        assert content_of(run(token_budget=1024)) == content_of(whole)
    assert not tokens.exists()


def test_a_stop_between_tables_is_resumed(run: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*rest: Any) -> None:
        raise Stopped(15)

    with monkeypatch.context() as patched, pytest.raises(Stopped) as caught:
        patched.setattr(predict.contigs, "write", stop)
        run()
    assert caught.value.resumable and not (tmp_path / "out" / MADE[2]).exists()
    out = run()
    assert (out / MADE[2]).exists()


def test_tables_of_another_head_or_format_are_not_replaced_unasked(
    run: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run()
    embedded = (out / "embeddings.h5").stat().st_mtime_ns
    with pytest.raises(UserError, match="of another head, format or embeddings file") as caught:
        run(format="original")
    assert "--overwrite" in caught.value.remedy
    run(format="original", overwrite=True)
    assert rows_of(out / MADE[1])[0] == ["Modified_ID", "Is_Virus"]
    assert (out / "embeddings.h5").stat().st_mtime_ns == embedded
    (out / "predict.json").unlink()
    with pytest.raises(UserError, match="nothing says what it is of"):
        run(format="original")


def test_two_runs_into_one_folder_are_one_and_a_refusal(run: Predict, tmp_path: Path) -> None:
    out = run()
    with (
        disk.alone(disk.lock_of(out / "predict.json"), lambda _: None, ""),
        pytest.raises(UserError, match="Another run is writing the tables"),
    ):
        run(format="original", overwrite=True)
    assert rows_of(out / MADE[1])[0] != ["Modified_ID", "Is_Virus"]
    run(format="original", overwrite=True)
    assert not [*out.glob("*.lock")]


@pytest.mark.parametrize("name", ["predict.json", "compare.tsv"])
def test_files_of_others_are_not_replaced_unasked(run: Predict, tmp_path: Path, name: str) -> None:
    other = run(output="other")
    shutil.copytree(other, out := tmp_path / "out", ignore=shutil.ignore_patterns(*MADE, "predict.json"))
    told = {"compare": str(other / MADE[0])}
    (out / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"{name} is there, and was not written by predict"):
        run(**told)
    assert (out / name).read_text() == '{"mine": 1}' and not (out / MADE[0]).exists()
    run(**told, overwrite=True)
    assert (out / name).read_text() != '{"mine": 1}'
    run(**told)


def test_odd_things_in_place_of_files_are_told(run: Predict, tmp_path: Path) -> None:
    told = {"compare": str(run(output="other") / MADE[0])}
    out = run()
    (out / "compare.tsv").mkdir()
    with pytest.raises(UserError, match=r"compare\.tsv is there, and was not written by predict"):
        run(**told)
    (out / "compare.tsv").rmdir()
    (out / "predict.json").write_text('{"made_of": {}, "sha256": null}')
    with pytest.raises(UserError, match=r"predict\.json is there, and was not written by predict"):
        run()
    (out / "predict.json").unlink()
    os.mkfifo(out / "predict.json")
    with pytest.raises(UserError, match=r"predict\.json is there, and was not written by predict"):
        run()
    (tmp_path / "link").symlink_to(tmp_path / "no" / "where")
    with pytest.raises(UserError, match=r"The folder of .* does not exist") as caught:
        run(output="link")
    assert caught.value.remedy == f"mkdir -p {tmp_path / 'no' / 'where'}"


def test_links_stay_links_to_what_is_written(run: Predict, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    out = run()
    assert out.is_symlink() and (tmp_path / "elsewhere" / MADE[0]).is_file()
    before = (out / MADE[0]).read_bytes()
    (out / MADE[0]).rename(tmp_path / "there.txt")
    (out / MADE[0]).symlink_to(tmp_path / "there.txt")
    (tmp_path / "there.txt").unlink()
    run()
    assert (out / MADE[0]).is_symlink() and (tmp_path / "there.txt").read_bytes() == before


def test_embeddings_of_other_contigs_are_never_replaced(run: Predict, tmp_path: Path) -> None:
    out = run()
    (tmp_path / "other.fna").write_text(f">x\n{without_stops(random.Random(1), 600)}\n")
    for overwrite in (False, True):
        with pytest.raises(UserError) as caught:
            run(tmp_path / "other.fna", overwrite=overwrite)
        assert "embeddings.*" in caught.value.remedy and "--overwrite" not in caught.value.remedy
    assert (out / "embeddings.h5").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "nowhere.pth"}, "There is no file nowhere.pth"),
        ({"chunk": None}, "does not say for which chunks"),
        ({"compare": "nowhere.txt"}, "nowhere.txt"),
        ({"output": "a/b/c"}, "does not exist"),
        ({"inputs": "nowhere.fna"}, "no file nowhere.fna"),
        ({"model": "demo"}, "takes 128 features, and the models give 96 \\+ 320"),
        ({"compare": "x", "shard": "1/2"}, "a shard makes no tables"),
        ({"format": "csv"}, "--format is 'csv'"),
    ],
)
def test_all_is_refused_before_an_encoder_is_loaded(
    run: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(predict.embed, "run", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        run(**options)


def test_the_published_head_is_looked_for_before_anything_else(
    run: Predict, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict.embed, "run", None)

    def no_network(url: str) -> bytes:
        raise OSError("no network")

    monkeypatch.setattr(predict.fetching, "_bytes_at", no_network)
    with pytest.raises(UserError, match="300 head is not on this machine") as caught:
        run(head=None)
    assert "git blob a0b5b85e" in caught.value.remedy


@pytest.mark.parametrize(
    "options", [{"model": "650M"}, {"dtype": "fp8", "workers": 2}, {"shard": "1/2"}, {"cache": "folder"}]
)
def test_nothing_is_said_of_encoders_where_none_is_needed(run: Predict, tmp_path: Path, options: Any) -> None:
    embeddings = run() / "embeddings.h5"
    named = " and ".join(f"--{name}" for name in ("model", "dtype", "cache", "workers", "shard") if name in options)
    with pytest.raises(UserError, match=f"embedded already: nothing is left for {named}"):
        run(embeddings, output="more", **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [(f">p\n{'MKVLAEFQ' * 40}\n", "predict reads contigs or reads"), (">a\nACGT\n>a\nACGT\n", "a name of its own")],
)
def test_remedies_are_those_of_predict(run: Predict, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "odd.fna").write_text(text)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "odd.fna")
    assert words in caught.value.remedy and "--from" not in str(caught.value)


@pytest.mark.parametrize("what", ["proteins", "one half", "six-frame", "shard", "contigs"])
def test_files_that_are_not_of_both_halves_are_refused(
    run: Predict, tmp_path: Path, sample: Path, tiny_model: Path, small: Path, what: str
) -> None:
    told: dict[str, Any] = {"model": str(tiny_model), "device": "cpu"}
    of_frames = {"from_": "contigs", "genes": "virnucpro"}
    both = of_frames | {"nucleotide": True, "nucleotide_model": str(small)}
    options, words = {
        "proteins": ({"force_protein": True}, "not of VirNucPro's frames"),
        "one half": (of_frames, "no nucleotide half"),
        "six-frame": ({"from_": "contigs", "genes": "six-frame"}, "not of VirNucPro's frames"),
        "shard": (both | {"shard": "1/2"}, "is a shard"),
        "contigs": (both, "not the only input"),
    }[what]
    path = tmp_path / "e.h5"
    (tmp_path / "p.fa").write_text(">a\nMKVLA\n")
    embed_fasta(tmp_path / "p.fa" if what == "proteins" else sample, path, **told | options)
    path = next(tmp_path.glob("e.shard-*.h5")) if what == "shard" else path
    with pytest.raises(UserError, match=words):
        predict_contigs([path, sample] if what == "contigs" else path, tmp_path / "out", head=tiny_model)


def test_frames_without_a_row_are_left_out_and_counted(run: Predict, tmp_path: Path, head: Path) -> None:
    out = run()
    whole = rows_of(out / MADE[0])
    with h5py.File(out / "embeddings.h5", "r+") as file:
        file["dna/status"][2] = store.SKIPPED
        file["status"][5] = store.SKIPPED
        contig = file["genes/contig"][:]
        file["status"][contig == 1] = store.SKIPPED
        left_out = set(np.flatnonzero(contig == 1).tolist()) | {2, 5}
    report = predict_contigs(out / "embeddings.h5", tmp_path / "less", head=head)
    assert report.missed == report.counts["frames without a score"] == len(left_out)
    kept = [row for i, row in enumerate(whole[1:]) if i not in left_out]
    assert rows_of(tmp_path / "less" / MADE[0])[1:] == kept
    assert rows_of(tmp_path / "less" / MADE[2])[2][1:3] == ["no score", ""]


# --- tables of given scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["broad", "original"])
def test_contigs_without_any_frame_are_listed(run: Predict, tmp_path: Path, capsys: Any, format: str) -> None:
    contigs = tmp_path / "none.fna"
    contigs.write_text(f">é one\n{'TAACTAGCTGATTAGTTAATCA' * 30}\n>two\nA\n>empty\n")
    out = run(contigs, format=format, quiet=False)
    assert "no contig has a frame" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == sorted([*MADE, "predict.json"])
    assert [(out / name).read_text().count("\n") for name in MADE] == [1, 1, 4]
    assert [row[:2] for row in rows_of(out / "contigs.tsv")[1:]] == [
        [name, "no frame"] for name in ("é", "two", "empty")
    ]
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    run(contigs, format=format)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match="No protein was found"):
        run(contigs, output="shard", shard="1/2", format=format)


def test_contigs_without_a_letter_are_listed(run: Predict, tmp_path: Path) -> None:
    (tmp_path / "empty.fna").write_text(">a\n>b\n")
    rows = rows_of(run(tmp_path / "empty.fna") / "contigs.tsv")[1:]
    assert [row[:2] for row in rows] == [["a", "no frame"], ["b", "no frame"]]


def test_contigs_without_any_frame_are_not_mixed_with_others(run: Predict, tmp_path: Path) -> None:
    out, contigs = run(), tmp_path / "none.fna"
    contigs.write_text(">two\nA\n")
    before = content_of(out)
    with pytest.raises(UserError, match="exists, and is not of these contigs"):
        run(contigs)
    for path in out.glob("embeddings.*"):
        path.unlink()
    with pytest.raises(UserError, match="is of another head, format or embeddings file"):
        run(contigs)
    assert {name: (out / name).read_bytes() for name in MADE} == {name: before[name] for name in MADE}


def given(names: list[str], scores: Any, number: list[int] | None = None) -> frames.Scored:
    """Frames by their names, with scores that are given; number: of the contig of each."""

    class File:
        def texts(self, name: str, start: int, stop: int) -> list[str]:
            return [f"k{i}" for i in range(start, stop)]

        def names_at(self, rows: Any) -> list[str]:
            return [names[i] for i in rows.tolist()]

    class Some:
        file = File()
        contigs = max(number or [0], default=0) + 1

        def names(self) -> Any:
            for first in range(0, len(names), 3):
                yield np.arange(first, min(first + 3, len(names))), names[first : first + 3]

    contig = np.array(number if number is not None else [0] * len(names), np.int64)
    chunk = np.array([frames.chunk_in(name) for name in names], np.int64)
    some: Any = Some()
    return frames.Scored(some, np.arange(len(names)), contig, chunk, np.array(scores, np.float32).reshape(-1, 2))


def written(write: Callable[..., None], *arguments: Any, folder: Path) -> str:
    with open(folder / "written", "wb") as file:
        write(file, *arguments)
    return (folder / "written").read_text()


BROAD = """Sequence_ID\tPrediction\tscore1\tscore2
synthetic_seq_1_chunk_1R1\tvirus\t0.12100530415773392\t0.8789947032928467
synthetic_seq_1_chunk_1R2\tvirus\t0.0011595478281378746\t0.9988405108451843
synthetic_seq_2_chunk_1R1\tothers\t0.5501205325126648\t0.44987940788269043
synthetic_seq_2_chunk_1R2\tvirus\t0.06045392155647278\t0.9395461082458496
"""
BROADS_CHUNKS = """Modified_ID\tIs_Virus\tmax_score_0\tmax_score_1
synthetic_seq_1_chunk_1\tTrue\t0.1210053041577339\t0.9988405108451844
synthetic_seq_2_chunk_1\tTrue\t0.5501205325126648\t0.9395461082458496
"""
ORIGINAL = """Sequence_ID\tPrediction\tscore1\tscore2
synthetic_seq_1_chunk_1R1\tvirus\t0.12100612\t0.8789939
synthetic_seq_1_chunk_1R2\tvirus\t0.0011595711\t0.9988405
synthetic_seq_2_chunk_1R1\tothers\t0.5501341\t0.4498659
synthetic_seq_2_chunk_1R2\tvirus\t0.06045397\t0.93954605
"""
"""Files in the tests of virnucpro-broad (MIT), of its own program and of VirNucPro's."""


@pytest.mark.parametrize(("text", "format"), [(BROAD, "broad"), (ORIGINAL, "original")])
def test_tables_are_published_ones_byte_for_byte(tmp_path: Path, text: str, format: str) -> None:
    pandas = pytest.importorskip("pandas")
    lines = [line.split("\t") for line in text.splitlines()[1:]]
    scored = given([row[0] for row in lines], [row[2:] for row in lines], [0, 0, 1, 1])
    assert written(tables.write_frames, scored, format, folder=tmp_path) == text
    chunks = written(tables.write_chunks, scored, format, tmp_path, folder=tmp_path)
    if format == "original":
        assert chunks == "".join(
            f"{line.rpartition(chr(9))[0].rpartition(chr(9))[0]}\n" for line in BROADS_CHUNKS.splitlines()
        )
        return
    through = pandas.read_csv(tmp_path / "written", sep="\t")  # its parser is off by one in the 17th digit
    assert through.to_csv(sep="\t", index=False) == BROADS_CHUNKS
    values = [float(cell) for line in chunks.splitlines()[1:] for cell in line.split("\t")[2:]]
    assert [np.float32(value) == value for value in values] == [True] * 4


def test_goldens_have_their_published_calls(tmp_path: Path) -> None:
    there = np.load(GOLDENS)
    names = there["names"].tolist()
    numbers = [there["contig_names"].tolist().index(frames._NAME.sub("", name)) for name in names]
    scored = given(names, there["scores"], numbers)
    expected = original_tables(names, there["scores"])
    assert written(tables.write_frames, scored, "original", folder=tmp_path) == expected[0]
    assert written(tables.write_chunks, scored, "original", tmp_path, folder=tmp_path) == expected[1]


def test_ties_are_others_for_a_frame_and_virus_for_a_chunk(tmp_path: Path) -> None:
    scored = given(["a_chunk_1F1", "a_chunk_1F2", "a_chunk_2F1"], [[0.5, 0.5], [0.3, 0.4], [1.0, 1e-5]])
    assert [row.split("\t")[1:] for row in written(tables.write_frames, scored, "original", folder=tmp_path).splitlines()[1:]] == [
        ["others", "0.5", "0.5"], ["virus", "0.3", "0.4"], ["others", "1.0", "1e-05"],
    ]  # fmt: skip
    chunks = written(tables.write_chunks, scored, "original", tmp_path, folder=tmp_path)
    assert chunks == "Modified_ID\tIs_Virus\na_chunk_1\tTrue\na_chunk_2\tFalse\n"


def test_chunks_of_the_original_are_sorted_as_text_however_many_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(0)
    names = [f"{name}_chunk_{k}F1" for name in ("b", "a", "a!", 'q"', "é", "A") for k in range(1, 30)]
    numbers = [i // 29 for i in range(len(names))]
    scored = given(names, [[generator.random(), generator.random()] for _ in names], numbers)
    expected = original_tables(names, scored.scores)[1].replace('q"_', '"q""_')
    expected = "".join(
        f"{line.replace(chr(9), chr(34) + chr(9))}\n" if line[0] == '"' else f"{line}\n"
        for line in expected.splitlines()
    )
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr(tables, "RUN", size)
        assert written(tables.write_chunks, scored, "original", tmp_path, folder=tmp_path) == expected
    broad = written(tables.write_chunks, scored, "broad", tmp_path, folder=tmp_path)
    assert [line.split("\t")[0].strip('"').replace('""', '"') for line in broad.splitlines()[1:]] == [
        name[:-2] for name in names
    ]


def test_nothing_scored_gives_headers_alone(tmp_path: Path) -> None:
    scored = given([], [])
    assert written(tables.write_frames, scored, "broad", folder=tmp_path).count("\n") == 1
    assert written(tables.write_chunks, scored, "broad", tmp_path, folder=tmp_path).count("\n") == 1
    assert contigs.calls_of(scored.contig_of_chunk, scored.highest, 2).call.tolist() == [contigs.NO_FRAME] * 2


# --- calls of contigs ------------------------------------------------------------------------------------------------


def by_the_rules(scores: list[tuple[float, float]]) -> list[Any]:
    """The call of one contig, written from viral-ngs' description."""
    deltas = [v - o for o, v in scores]
    weights = [abs(d) ** 0.5 for d in deltas]
    total = sum(weights)
    delta = sum(d * w for d, w in zip(deltas, weights, strict=True)) / total if total else sum(deltas) / len(deltas)
    viral = sum(v > 0.8 and o < 0.3 for o, v in scores)
    other = sum(o > 0.8 and v < 0.3 for o, v in scores)
    both = sum(v > 0.7 and o > 0.7 for o, v in scores)
    left = len(scores) - both
    shares = [n / left if left else 0 for n in (viral, other)]
    call = "Viral" if delta > 0.3 else "Non-viral" if delta < -0.3 else "Ambiguous"
    tier = "review"
    if call != "Ambiguous":
        n, share = (viral, shares[0]) if call == "Viral" else (other, shares[1])
        tier = (
            ("high_confidence" if abs(delta) > 0.6 else "moderate_confidence")
            if n and share >= 0.1
            else "low_confidence"
        )
    if len(scores) < 5 and tier != "review":
        tier = "low_confidence" if tier != "low_confidence" else "review"
    return [call, tier, round(delta, 3), len(scores), viral, other, both, *(round(share, 3) for share in shares)]


def calls_in(lists: list[list[tuple[float, float]]]) -> list[list[Any]]:
    contig = np.repeat(np.arange(len(lists)), [len(each) for each in lists])
    highest = np.array([pair for each in lists for pair in each], np.float32).reshape(-1, 2)
    found = contigs.calls_of(contig, highest, len(lists))
    return [line[1:] for line in contigs._lines([""] * len(lists), *found)]


def test_calls_by_hand() -> None:
    assert calls_in([[(0.2182, 0.9979)]])[0][:4] == ["Viral", "low_confidence", 0.78, 1]
    assert calls_in([[]])[0] == ["no frame", "", "", 0, 0, 0, 0, 0.0, 0.0]
    assert calls_in([[(0.1, 0.9)] * 5])[0] == ["Viral", "high_confidence", 0.8, 5, 5, 0, 0, 1.0, 0.0]
    assert calls_in([[(0.9, 0.1)] * 5])[0][:2] == ["Non-viral", "high_confidence"]
    assert calls_in([[(0.75, 0.75)] * 6])[0] == ["Ambiguous", "review", 0.0, 6, 0, 0, 6, 0.0, 0.0]
    assert calls_in([[(0.3, 0.7)] * 6])[0][:2] == ["Viral", "low_confidence"]
    assert calls_in([[(0.3, 0.7)] * 4])[0][:2] == ["Viral", "review"]
    assert calls_in([[(0.1, 0.9)] + [(0.3, 0.7)] * 5])[0][:2] == ["Viral", "moderate_confidence"]


def test_calls_of_many_contigs_are_those_of_each() -> None:
    generator = random.Random(5)
    levels = (0.02, 0.1, 0.29, 0.31, 0.5, 0.69, 0.71, 0.79, 0.81, 0.98)
    lists = [
        [(float(np.float32(generator.choice(levels))), float(np.float32(generator.choice(levels)))) for _ in range(n)]
        for n in (generator.randrange(1, 14) for _ in range(3000))
    ]
    found = calls_in(lists)
    assert found == [by_the_rules(each) for each in lists]
    assert {(row[0], row[1]) for row in found} >= set(itertools.product(("Viral", "Non-viral"), contigs.TIERS[:4]))


# --- comparison ------------------------------------------------------------------------------------------------------


def test_a_table_agrees_with_itself_in_both_formats(
    run: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run()
    other = run(out / "embeddings.h5", "original", format="original") / MADE[0]
    (tmp_path / "copy.txt").write_bytes((out / MADE[0]).read_bytes())
    with pytest.raises(UserError, match="is read by this run"):
        run(compare=str(out / MADE[0]))
    for table in (tmp_path / "copy.txt", other):
        run(compare=str(table), quiet=False)
        assert rows_of(out / "compare.tsv") == [list(compare.COLUMNS)]
        said = capsys.readouterr().err
        assert said.count("(100.00%)") == 3 and "differ by 0 at most" in said


def test_every_changed_call_and_missing_frame_is_listed(run: Predict, tmp_path: Path, head: Path) -> None:
    out = run()
    lines = (out / MADE[0]).read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    rows[3][1:] = [{"virus": "others", "others": "virus"}[rows[3][1]], *rows[3][3:1:-1]]  # a frame turned
    nudged = np.float32(float(rows[5][2])) + np.float32(0.001)
    rows[5][2:] = [str(nudged), str(np.float32(1) - nudged)]
    gone = rows.pop(7)[0]
    rows.append(["new_chunk_1F1", "virus", "0.1", "0.9"])
    random.Random(0).shuffle(shuffled := rows[1:])
    (tmp_path / "other.txt").write_text("\n".join("\t".join(row) for row in [rows[0], *shuffled]) + "\n")
    report = predict_contigs(out / "embeddings.h5", out, head=head, compare=tmp_path / "other.txt")
    table = rows_of(out / "compare.tsv")
    changed = [row for row in table if row[0] == "frame" and compare.MISSING not in row[2:4]]
    assert [row[1] for row in changed] == [rows[3][0]]
    assert {changed[0][2], changed[0][3]} == {"virus", "others"} and all(changed[0][4:])
    assert ["frame", gone, "", "missing", "", "", "", ""] in table
    assert ["frame", "new_chunk_1F1", "missing", "", "", "", "", ""] in table
    assert report.counts["frames compared"] == len(lines) - 2
    assert report.counts["frames with the same call"] == len(lines) - 3
    assert (report.counts["frames missing here"], report.counts["frames missing there"]) == (1, 1)
    assert report.already_complete is False and set(report.tables) == {"Compared"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its columns are nothing"),
        (BROADS_CHUNKS, "its columns are Modified_ID"),
        (BROAD + "x\tvirus\n", "line 6 has 2 columns, not 4"),
        (BROAD + "x_chunk_1F1\tvirus\ta\t0.1\n", "a score that is no number"),
        (BROAD + "x_chunk_1F1\tvirus\tnan\t0.1\n", "line 6 has a score that is not from 0 to 1: virus nan 0.1"),
        (BROAD + "x_chunk_1F1\tvirus\t-4\t17\n", "line 6 has a score that is not from 0 to 1"),
        (BROAD + "x_chunk_1F1\tvirus\t0.9\t0.1\n", "line 6 has a call that its scores contradict: virus 0.9 0.1"),
        (BROAD + "x_chunk_1F1\tbanana\t0.9\t0.1\n", "line 6 has a call that is not others or virus: banana"),
        (BROAD + BROAD.splitlines()[2] + "\n", "the same name in lines 3 and 6"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "other.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        compare.read(str(tmp_path / "other.txt"))


def test_chunks_are_called_in_the_words_of_frames(
    run: Predict, tmp_path: Path, head: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every call of the other file is turned."""
    out = run()
    header, *rows = rows_of(out / MADE[0])
    turned = [[name, {"virus": "others", "others": "virus"}[call], two, one] for name, call, one, two in rows]
    (tmp_path / "other.txt").write_text("".join("\t".join(row) + "\n" for row in [header, *turned]))
    capsys.readouterr()
    run(out / "embeddings.h5", output=out, head=head, compare=str(tmp_path / "other.txt"), quiet=False)
    changed = rows_of(out / "compare.tsv")[1:]
    for level in ("frame", "chunk"):
        assert {call for row in changed if row[0] == level for call in row[2:4]} == {"virus", "others"}
    said = capsys.readouterr().err.splitlines()
    for level in ("frame", "chunk"):
        _, name, here, there, *scores = next(row for row in changed if row[0] == level)
        line = f"  {level} {name}: {here} here ({', '.join(scores[:2])}), {there} there ({', '.join(scores[2:])})"
        assert line in said


def test_a_table_of_other_contigs_is_named(run: Predict, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "other.txt").write_text(BROAD)
    run(compare=str(tmp_path / "other.txt"), quiet=False)
    assert "no frame is both here and there" in " ".join(capsys.readouterr().err.split())


def test_names_that_would_steer_a_terminal_are_the_same_in_all_tables(run: Predict, tmp_path: Path, head: Path) -> None:
    contigs = tmp_path / "odd.fna"
    contigs.write_text(f">\x1b[31mred\n{without_stops(random.Random(1), 400)}\n")
    out = run(contigs)
    names = [rows_of(out / name)[1][0].partition("_chunk")[0] for name in MADE]
    assert names == ["?[31mred"] * 3
    run(out / "embeddings.h5", output="again", head=head, compare=str(out / MADE[0]), report=str(tmp_path / "r.json"))
    counts = json.loads((tmp_path / "r.json").read_text())["counts"]
    assert counts["frames compared"] == counts["frames with the same call"] == len(rows_of(out / MADE[0])) - 1
    (tmp_path / "other.txt").write_text("\t".join(compare.HEADER) + "\n")
    run(out / "embeddings.h5", output="third", head=head, compare=str(tmp_path / "other.txt"))
    missing = [row[1] for row in rows_of(out.parent / "third" / "compare.tsv")[1:]]
    assert missing == [row[0] for row in rows_of(out / MADE[0])[1:]]


def test_names_are_found_by_their_keys() -> None:
    names = [f"c_chunk_{i}F1" for i in range(1, 2000)]
    keys = compare.keys_of(names)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    other = compare.Other("x", keys[order], np.zeros((len(names), 2), np.float32), order)
    assert (order[compare._places(other, keys)] == np.arange(len(names))).all()
    assert (compare._places(other, compare.keys_of(["x", "y"])) == -1).all()


# --- reads -----------------------------------------------------------------------------------------------------------


def command(*words: Any, stdin: Any = None, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "virnucpro_cli", *map(str, words)], stdin=stdin, capture_output=True, text=True, **more
    )


def test_reads_of_a_fastq_are_those_of_a_fasta(run: Predict, tmp_path: Path, sample: Path) -> None:
    reads = [(name, text) for name, text in fasta_of(sample) if len(text) > 200]
    (tmp_path / "reads.fq").write_text("".join(f"@{n} x\n{t}\n+\n{'I' * len(t)}\n" for n, t in reads))
    (tmp_path / "reads.fa").write_text("".join(f">{n} x\n{t}\n" for n, t in reads))
    found = [run(tmp_path / name, name[-2:]) for name in ("reads.fq", "reads.fa")]
    assert len({(out / MADE[0]).read_bytes() for out in found}) == 1


@pytest.mark.slow
def test_reads_of_a_bam_come_through_a_pipe(
    tmp_path: Path, sample: Path, tiny_model: Path, small: Path, head: Path
) -> None:
    """`samtools fasta -N reads.bam | virnucpro predict -`: both mates have names of their own."""
    pysam = pytest.importorskip("pysam")
    generator = random.Random(3)
    with pysam.AlignmentFile(str(tmp_path / "reads.bam"), "wb", header={"HD": {"VN": "1.6"}}) as bam:
        for i, flag in itertools.product(range(4), (77, 141)):
            read = pysam.AlignedSegment(bam.header)
            read.query_name, read.flag = f"r{i}", flag
            read.query_sequence = without_stops(generator, 280)
            read.query_qualities = pysam.qualitystring_to_array("I" * 280)
            bam.write(read)
    samtools = f"import pysam; pysam.fasta('-N', {str(tmp_path / 'reads.bam')!r}, catch_stdout=False)"
    with subprocess.Popen([sys.executable, "-c", samtools], stdout=subprocess.PIPE) as piped:
        ran = command(
            "predict", "-", "-o", tmp_path / "out", "--chunk", 300, "--head", head, "--model", tiny_model,
            "--nucleotide-model", small, "--device", "cpu", stdin=piped.stdout,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    table = rows_of(tmp_path / "out" / "contigs.tsv")
    assert [row[0] for row in table[1:]] == [f"r{i}/{mate}" for i in range(4) for mate in (1, 2)]
    models = ("--model", tiny_model, "--nucleotide-model", small)
    ran = command("predict", tmp_path / "reads.bam", "-o", tmp_path / "no", "--chunk", 300, "--head", head, *models)
    assert ran.returncode == 2 and "samtools fasta -N" in ran.stderr


def test_the_command_says_what_it_made(tmp_path: Path, sample: Path, tiny_model: Path, small: Path, head: Path) -> None:
    ran = program(
        "predict", sample, "-o", "out", "--chunk", 300, "--head", head, "--model", tiny_model, "--nucleotide-model",
        small, "--device", "cpu", "--report", "r.json", folder=tmp_path,
    )  # fmt: skip
    assert ran.wait() == 0 and ran.out == "", ran.err
    assert "out/contigs.tsv: 11 contigs" in ran.err and "2 no frame" in ran.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["command"] == "predict" and report["counts"]["frames"] > 30 and "score" in report["seconds"]
