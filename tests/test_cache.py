"""A cache of rows: what one run has computed the next takes, bit for bit, and never anything else."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from children import Child, program
from test_faults import datasets, one_thread  # noqa: F401  (in force here too)
from virnucpro_cli import store
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import runner
from virnucpro_cli.errors import UserError
from virnucpro_cli.features import cache as caches
from virnucpro_cli.report import RunReport

Make = Callable[..., Path]
LENGTHS = [30, 90, 0, 150, 200, 41, 300, 77]


class Bench:
    def __init__(self, folder: Path, model: Path):
        self.folder, self.model, self.cache = folder, model, folder / "cache"

    def embed(self, fasta: Path, output: str, **more: Any) -> RunReport:
        options = {"model": str(self.model), "device": "cpu", "max_residues": 200, "cache": str(self.cache)}
        return embed_fasta(str(fasta), str(self.folder / output), **options | more)

    def segments(self) -> list[Path]:
        return sorted(self.cache.glob("*/*.rows"))

    def same(self, one: str, other: str) -> None:
        """Every dataset has the same bits, but for the flag that a row is from a cache."""
        first, second = datasets(self.folder / one), datasets(self.folder / other)
        first["flags"], second["flags"] = (x["flags"] & ~np.uint16(store.CACHED) for x in (first, second))
        assert first.keys() == second.keys()
        assert [name for name in first if first[name].tobytes() != second[name].tobytes()] == []


@pytest.fixture
def bench(tmp_path: Path, tiny_model: Path) -> Bench:
    return Bench(tmp_path, tiny_model)


@pytest.mark.parametrize("more", [
    {}, {"pool": ("mean", "bos", "std"), "layers": (0, -1), "store_dtype": "fp32"}, {"long": "window", "overlap": 50},
    {"dedup": False},
])  # fmt: skip
def test_a_second_run_computes_nothing_and_has_the_same_bits(
    bench: Bench, make_fasta: Make, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    fasta = make_fasta(LENGTHS)
    fasta.write_text(fasta.read_text() + ">copy\n" + fasta.read_text().split("\n")[1] + "\n")
    first = bench.embed(fasta, "1.h5", **more)
    assert first.counts["from the cache"] == 0 and len(bench.segments()) == 1

    def no_forward(*_: Any) -> None:
        raise AssertionError("a forward")

    monkeypatch.setattr(runner, "run_packs", no_forward)
    second = bench.embed(fasta, "2.h5", **more)
    assert second.counts["from the cache"] == 8
    assert second.counts["tokens saved by the cache"] == second.counts["tokens"]
    bench.same("1.h5", "2.h5")
    assert len(bench.segments()) == 1


def test_overlapping_samples_share_what_they_have_in_common(bench: Bench, make_fasta: Make) -> None:
    both = make_fasta(LENGTHS).read_text().split(">")[1:]
    a, b = bench.folder / "a.fasta", bench.folder / "b.fasta"
    a.write_text("".join(f">{r}" for r in both[:5]))
    b.write_text("".join(f">{r}" for r in reversed(both[3:])))
    bench.embed(a, "a.h5")
    assert bench.embed(b, "b.h5").counts["from the cache"] == 2
    bench.embed(b, "alone.h5", cache=None)
    bench.same("b.h5", "alone.h5")
    assert bench.embed(b, "again.h5").counts["from the cache"] == 5


@pytest.mark.parametrize(
    "more", [{"layers": (0,)}, {"dtype": "bf16"}, {"store_dtype": "fp32"}, {"max_residues": 100}, {"pool": ("bos",)}]
)
def test_other_settings_share_nothing(bench: Bench, make_fasta: Make, more: dict[str, Any]) -> None:
    fasta = make_fasta(LENGTHS)
    bench.embed(fasta, "1.h5")
    assert bench.embed(fasta, "2.h5", **more).counts["from the cache"] == 0


@pytest.mark.parametrize("where", [5, -5, 300, "short"])
def test_a_damaged_segment_is_noticed_and_never_used(bench: Bench, make_fasta: Make, where: int | str) -> None:
    fasta = make_fasta(LENGTHS)
    bench.embed(fasta, "1.h5")
    (segment,) = bench.segments()
    data = bytearray(segment.read_bytes())
    if isinstance(where, str):
        del data[-100:]
    else:
        data[where] ^= 4
    segment.write_bytes(data)
    second = bench.embed(fasta, "2.h5")
    assert second.counts["from the cache"] == 0 and any("is damaged" in note for note in second.notes)
    assert segment not in bench.segments() and len(bench.segments()) == 1
    bench.same("1.h5", "2.h5")


def test_the_least_recently_used_segments_make_room(bench: Bench, make_fasta: Make) -> None:
    inputs = [make_fasta(LENGTHS, f"{i}.fasta", seed=i) for i in range(3)]
    for i in (0, 1):
        bench.embed(inputs[i], f"{i}.h5")
        os.utime(next(p for p in bench.segments() if p.stat().st_mtime > 1e9), (i + 1, i + 1))
    most = 3 * bench.segments()[0].stat().st_size
    bench.embed(inputs[0], "used.h5")
    size = str(most - 1 + 4096 - bench.segments()[0].stat().st_size)
    bench.embed(inputs[2], "2.h5", cache_size=size)
    assert bench.embed(inputs[0], "again.h5").counts["from the cache"] == 7
    tiny = bench.embed(make_fasta([50], "x.fasta"), "x.h5", cache_size="10")
    assert any("more than --cache-size" in note for note in tiny.notes)


def test_files_of_others_are_never_removed(bench: Bench, make_fasta: Make) -> None:
    bench.embed(make_fasta(LENGTHS, "0.fasta", seed=0), "0.h5")
    (segment,) = bench.segments()
    folder = segment.parent
    data = segment.read_bytes()
    elsewhere = bench.folder / "elsewhere"
    elsewhere.mkdir()
    (bench.cache / ("a" * 32)).symlink_to(elsewhere)
    (bench.cache / "thesis").mkdir()
    (bench.cache / ("b" * 32)).mkdir()
    theirs = {
        bench.cache / "thesis" / f"{'c' * 32}.rows": data,
        bench.cache / "thesis" / "old.unfinished": b"",
        bench.cache / ("b" * 32) / f"{'d' * 32}.rows": b"temperature, pressure",
        bench.cache / ("b" * 32) / f"{'d' * 32}.unfinished": b"a letter",
        folder / "notes.rows": data,
        folder / "notes.unfinished": b"",
        elsewhere / f"{'e' * 32}.rows": data,
        elsewhere / f"{'e' * 32}.unfinished": b"",
    }
    for path, content in theirs.items():
        path.write_bytes(content)
        os.utime(path, (1, 1))
    bench.embed(make_fasta(LENGTHS, "1.fasta", seed=1), "1.h5", cache_size=str(len(data) + 4096))
    assert segment not in bench.segments(), "room was made"
    assert {path: path.read_bytes() for path in theirs} == theirs


def test_a_folder_with_other_things_in_it_is_no_cache(bench: Bench, make_fasta: Make) -> None:
    bench.cache.mkdir()
    fasta = make_fasta(LENGTHS)
    (bench.cache / "thesis.tex").write_text("chapter 1")
    with pytest.raises(UserError, match=r"is no cache of virnucpro: it holds thesis\.tex"):
        bench.embed(fasta, "1.h5")
    (bench.cache / "thesis.tex").unlink()
    (bench.cache / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# of cargo\n")
    with pytest.raises(UserError, match="of another program"):
        bench.embed(fasta, "1.h5")
    (bench.cache / "CACHEDIR.TAG").unlink()
    bench.embed(fasta, "1.h5")
    (bench.cache / "CACHEDIR.TAG").unlink()  # as earlier versions left it
    assert bench.embed(fasta, "2.h5").counts["from the cache"] == 7
    assert (bench.cache / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def killed_at_the_rename(fasta: str, output: str, model: str, cache: str) -> None:
    rename = os.rename
    caches.os.rename = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if str(b).endswith(".rows") else rename(a, b)
    embed_fasta(fasta, output, model=model, device="cpu", max_residues=200, cache=cache)


def test_a_kill_while_publishing_leaves_nothing_that_is_used(bench: Bench, make_fasta: Make) -> None:
    fasta = make_fasta(LENGTHS)
    given = (fasta, bench.folder / "1.h5", bench.model, bench.cache)
    assert Child(killed_at_the_rename, *map(str, given)).wait() == -signal.SIGKILL
    assert bench.segments() == [] and len(list(bench.cache.glob("*/*.unfinished"))) == 1
    assert bench.embed(fasta, "2.h5").counts["from the cache"] == 0
    bench.embed(fasta, "1.h5")  # resumes
    bench.same("1.h5", "2.h5")


def test_two_runs_at_once_share_a_folder(bench: Bench, make_fasta: Make) -> None:
    fasta = make_fasta(LENGTHS)
    options = ("--model", bench.model, "--device", "cpu", "--cache", bench.cache, "-o")
    runs = [program("embed", fasta, *options, bench.folder / f"{i}.h5") for i in (1, 2)]
    assert [run.wait() for run in runs] == [3, 3]  # one protein is empty
    bench.same("1.h5", "2.h5")
    assert list(bench.cache.glob("*/*.unfinished")) == [] and bench.segments()


def test_a_cache_that_cannot_be_is_refused_before_anything_is_computed(bench: Bench, make_fasta: Make) -> None:
    bench.cache.write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        bench.embed(make_fasta(LENGTHS), "1.h5")
    with pytest.raises(UserError, match="pooled rows"):
        bench.embed(make_fasta(LENGTHS), "1.h5", pool=("residue",))
    with pytest.raises(UserError, match="pooled rows"):
        bench.embed(make_fasta(LENGTHS), "1.h5", emit=("entropy",))
    with pytest.raises(UserError, match="--cache-size"):
        bench.embed(make_fasta(LENGTHS), "1.h5", cache_size="much")


def test_a_cache_that_fails_at_the_end_costs_no_row(
    bench: Bench, make_fasta: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("virnucpro_cli.features.cache.Cache._write", full)
    found = bench.embed(make_fasta(LENGTHS), "1.h5")
    assert any("was not added to" in note for note in found.notes) and (bench.folder / "1.h5").exists()


def test_groups_and_where_proteins_come_from_play_no_part(bench: Bench, make_fasta: Make) -> None:
    fasta = make_fasta(LENGTHS)
    bench.embed(fasta, "1.h5")
    assert bench.embed(fasta, "2.h5", group_regex="(p).*").counts["from the cache"] == 7
    contigs = Path(__file__).parent.parent / "examples" / "contigs.fna"
    found = {"from_": "contigs", "genes": "six-frame"}
    bench.embed(contigs, "3.h5", **found)
    again = bench.embed(contigs, "4.h5", **found, group="contig")
    assert again.counts["from the cache"] == again.counts["proteins"]
