"""What a run may write to, and what it survives losing: inputs are safe, links are followed, a dead terminal is no fault."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from children import closed, no_reader, program
from virnucpro_cli import report
from virnucpro_cli.benchmark import plot
from virnucpro_cli.cluster import merge, status
from virnucpro_cli.config import EmbedConfig, ValidateConfig, resolve
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError, shell_word
from virnucpro_cli.exchange import export, extract, importing
from virnucpro_cli.explore import MapConfig, SearchConfig, inspect, mapping, search
from virnucpro_cli.model import locate
from virnucpro_cli.model.families import DEMO
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation import validate, verify

Make = Callable[..., Path]


def test_an_input_is_never_overwritten(make_fasta: Make, tiny_model: Path) -> None:
    path = make_fasta([20, 30])
    text = path.read_bytes()
    with pytest.raises(UserError, match="one of the inputs"):
        embed_fasta(str(path), str(path), model=str(tiny_model), overwrite=True)
    with pytest.raises(UserError, match="would overwrite"):
        embed_fasta(str(path), str(path.with_suffix(".h5")), model=str(tiny_model), report=str(path))
    assert path.read_bytes() == text


@pytest.mark.parametrize("place", ["out.h5", "out.h5.partial", "nowhere/r.json", "."])
def test_a_report_without_a_place_is_refused_before_the_work(
    make_fasta: Make, tiny_model: Path, tmp_path: Path, place: str
) -> None:
    with pytest.raises(UserError, match="report"):
        embed_fasta(
            str(make_fasta([20])), str(tmp_path / "out.h5"), model=str(tiny_model), report=str(tmp_path / place)
        )
    assert not (tmp_path / "out.h5").exists()


def test_an_output_that_is_no_file_is_refused(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.h5")
    with pytest.raises(UserError, match="not a regular file"):
        embed_fasta(str(make_fasta([20])), str(tmp_path / "out.h5"), model=str(tiny_model), overwrite=True)


def test_a_link_is_followed_to_where_it_points(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.h5").symlink_to("real.h5")
    embed_fasta(str(make_fasta([20])), str(tmp_path / "link.h5"), model=str(tiny_model), device="cpu")
    assert (tmp_path / "link.h5").is_symlink()
    with read_embeddings(tmp_path / "real.h5") as file:
        assert len(file) == 1


def test_a_nucleotide_file_among_proteins_is_named(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    genes = tmp_path / "genes.fasta"
    genes.write_text(">gene\n" + "ACGT" * 20 + "\n")
    with pytest.raises(UserError, match=r"genes\.fasta looks like nucleotides"):
        embed_fasta([str(make_fasta([400])), str(genes)], str(tmp_path / "out.h5"), model=str(tiny_model))


def test_embeddings_is_the_last_requested_layer_even_if_it_was_named_before(
    make_fasta: Make, tiny_model: Path, tmp_path: Path
) -> None:
    embed_fasta(str(make_fasta([20])), str(tmp_path / "out.h5"), model=str(tiny_model), layers=(2, 0, -1), device="cpu")
    with read_embeddings(tmp_path / "out.h5") as file:
        assert np.array_equal(file[:], file.dataset("mean", 2)[:])


@pytest.mark.parametrize("stderr", ["broken pipe", "full", "closed"])
def test_a_run_outlives_its_terminal(make_fasta: Make, tiny_model: Path, tmp_path: Path, stderr: str) -> None:
    out = tmp_path / "out.h5"
    command = ("embed", make_fasta([2000, 30]), "-o", out, "--model", tiny_model, "--device", "cpu")
    run = program(*command, before={"broken pipe": partial(no_reader, 2), "closed": partial(closed, 2)}.get(stderr),
                  shown="/dev/full" if stderr == "full" else "")  # fmt: skip
    assert run.wait() == 0
    with read_embeddings(out) as file:
        assert file.complete and len(file) == 2


@pytest.mark.parametrize("option", ["report", "qc"])
@pytest.mark.parametrize("read", ["model/config.json", "model/model.safetensors", "groups.tsv", "maps.txt", "in.fasta"])
def test_nothing_that_a_run_reads_is_written(
    make_fasta: Make, tiny_model: Path, tmp_path: Path, option: str, read: str
) -> None:
    fasta = make_fasta([20, 30])
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "groups.tsv").write_text("p0\ta\np1\tb\n")
    (tmp_path / "maps.txt").write_text("p0\n")
    before = (tmp_path / read).read_bytes()
    options: dict[str, Any] = {"group_table": str(tmp_path / "groups.tsv")} if read == "groups.tsv" else {}
    options |= {"contacts_for": str(tmp_path / "maps.txt"), "emit": ("contacts",)} if read == "maps.txt" else {}
    run = partial(embed_fasta, str(fasta), model=str(tmp_path / "model"), device="cpu", overwrite=True, **options)
    with pytest.raises(UserError, match="would overwrite"):
        run(str(tmp_path / "out.h5"), **{option: str(tmp_path / read)})
    with pytest.raises(UserError, match=r"one of the inputs|is not a regular"):
        run(str(tmp_path / read))
    assert (tmp_path / read).read_bytes() == before and not (tmp_path / "out.h5").exists()


READERS: dict[str, Callable[[str, str, str], Any]] = {
    "search x": lambda file, fasta, to: search.search_file(SearchConfig(file, fasta, 1, output=to, overwrite=True)),
    "map x.tsv": lambda file, fasta, to: mapping.write_map(MapConfig(file, to, "pca", overwrite=True)),
    "export x.npy": lambda file, fasta, to: export.export_file(file, "npy", to, overwrite=True),
    "inspect x": lambda file, fasta, to: inspect.inspect_file(file, to),
    "verify x": lambda file, fasta, to: verify.verify_file(file, report_path=to),
}
"""A command that reads a file, and how its output must be named."""


@pytest.mark.parametrize("command", READERS)
def test_no_command_writes_over_what_it_reads(make_fasta: Make, tiny_model: Path, tmp_path: Path, command: str) -> None:
    fasta, file = str(make_fasta([20, 30, 40, 50])), str(tmp_path / "out.h5")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    embed_fasta(fasta, file, model=str(model), device="cpu")
    read = [Path(file), *(model.iterdir() if command == "search x" else [])]
    before = [path.read_bytes() for path in read]
    output = tmp_path / command.split()[1]
    for path in read:
        output.unlink(missing_ok=True)
        output.symlink_to(path)
        with pytest.raises(UserError, match="would overwrite"):
            READERS[command](file, fasta, str(output))
    assert before == [path.read_bytes() for path in read]


def test_a_report_does_not_land_on_the_model_that_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = locate.places(DEMO)[0] / "pytorch_model.bin"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    with pytest.raises(UserError, match="would overwrite"):
        validate.run(ValidateConfig(report=str(weights), device="cpu"))
    assert weights.read_bytes() == b"weights"


def test_nothing_in_the_cache_is_written_as_an_output(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    fasta, cache = str(make_fasta([20, 30])), tmp_path / "rows"
    run = partial(embed_fasta, fasta, model=str(tiny_model), device="cpu", cache=str(cache), overwrite=True)
    run(tmp_path / "out.h5")
    kept = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert kept
    for path in kept:
        (tmp_path / "link.h5").symlink_to(path)
        with pytest.raises(UserError, match="of the cache"):
            run(tmp_path / "link.h5")
        (tmp_path / "link.h5").unlink()
        with pytest.raises(UserError, match="would overwrite"):
            run(tmp_path / "more.h5", report=str(path))
    assert kept == {path: path.read_bytes() for path in kept}


def test_a_run_does_not_write_over_its_config_file(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[embed]\nlayers = [1]\n")
    with pytest.raises(UserError, match="would overwrite the config file"):
        resolve(EmbedConfig, str(config), {"inputs": ("a.fa",), "output": "o.h5", "report": str(tmp_path / "run.toml")})


def test_a_report_replaces_reports_and_nothing_else(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    fasta = str(make_fasta([20, 30]))
    run = partial(embed_fasta, fasta, str(tmp_path / "out.h5"), model=str(tiny_model), device="cpu")
    for option in ("report", "qc"):
        mine = tmp_path / f"mine.{option}"
        mine.write_text("name,label\nall,of it\n")
        with pytest.raises(UserError, match="is no"):
            run(**{option: str(mine)})
        assert mine.read_text() == "name,label\nall,of it\n" and not (tmp_path / "out.h5").exists()
    for _ in range(2):
        run(report=str(tmp_path / "r.json"), qc=str(tmp_path / "q.tsv"))
        assert verify.verify_file(str(tmp_path / "out.h5"), report_path=str(tmp_path / "v.json")).passed
    verify.verify_file(str(tmp_path / "out.h5"), report_path=str(tmp_path / "r.json"))
    inspect.inspect_file(str(tmp_path / "out.h5"), str(tmp_path / "q.tsv"))
    with pytest.raises(UserError, match="is no qc of this program"):
        inspect.inspect_file(str(tmp_path / "out.h5"), str(tmp_path / "mine.qc"))
    run(report=str(tmp_path / "mine.report"), overwrite=True)
    assert (tmp_path / "mine.report").read_text().startswith("{")


def test_a_report_to_the_null_device_is_no_fault(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    embed_fasta(str(make_fasta([9])), str(tmp_path / "o.h5"), model=str(tiny_model), device="cpu", report="/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_picture_and_a_config_of_bench_are_known_again(tmp_path: Path) -> None:
    found = report.RunReport("bench", environment={"virnucpro": "1", "model": "m", "dtype": "fp32", "device": "cpu"})
    found.tables["Throughput"] = [{"mode": "packed", "workload": "w", "tokens/s": 1.0}]
    for suffix in ("png", "svg", "pdf"):
        plot.save(found, str(tmp_path / f"p.{suffix}"))
        report.check_places({"plot": str(tmp_path / f"p.{suffix}")}, [])
        (tmp_path / f"mine.{suffix}").write_bytes((tmp_path / f"p.{suffix}").read_bytes().replace(b"virnucpro", b"x"))
        with pytest.raises(UserError, match="is no plot"):
            report.check_places({"plot": str(tmp_path / f"mine.{suffix}")}, [])


@pytest.mark.parametrize(("name", "way"), [("x.npy", "--to npy -o"), ("x.pt", "--to fair-esm -o"), ("x.JSON", "-o ")])
def test_a_name_of_another_format_is_refused_with_the_commands(
    make_fasta: Make, tiny_model: Path, tmp_path: Path, name: str, way: str
) -> None:
    with pytest.raises(UserError, match="is HDF5, and its name says") as told:
        embed_fasta(str(make_fasta([9])), str(tmp_path / name), model=str(tiny_model), device="cpu")
    assert way in told.value.remedy and "x.h5" in told.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


@pytest.mark.parametrize(("path", "word"), [("-x.h5", "./-x.h5"), ("sp ace/ü.h5", "'sp ace/ü.h5'"), ("o.h5", "o.h5")])
def test_a_path_in_a_command_that_is_advised_is_one_word_and_no_option(path: str, word: str) -> None:
    assert shell_word(path) == word and shlex.split(shell_word(path))[0].endswith(path)


def test_a_file_that_is_taken_for_a_folder_is_told(make_fasta: Make, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("mine")
    with pytest.raises(UserError, match=r"a\.h5 is not a directory") as told:
        embed_fasta(str(make_fasta([9])), str(tmp_path / "a.h5" / "n.h5"), model=str(tiny_model), device="cpu")
    assert "mkdir" not in told.value.remedy
    with pytest.raises(UserError) as told:
        report.check_places({"report": str(tmp_path / "none" / "r.json")}, [])
    assert f"mkdir -p {tmp_path / 'none'}" in told.value.remedy
    with pytest.raises(UserError) as told:
        report.check_places({"report": str(tmp_path / "a.h5" / "r.json")}, [])
    assert "mkdir" not in told.value.remedy


def test_a_second_merge_into_one_output_is_refused(
    make_fasta: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fasta, out = str(make_fasta([9, 20, 30])), str(tmp_path / "o.h5")
    for shard in ("1/2", "2/2"):
        embed_fasta(fasta, out, model=str(tiny_model), device="cpu", shard=shard)
    store_of = merge._store

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(merge, "_store", store_of)
        with pytest.raises(UserError, match="Another merge is writing"):
            merge.merge_shards(out, overwrite=True)
        return store_of(*arguments)

    monkeypatch.setattr(merge, "_store", meanwhile)
    merge.merge_shards(out, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("o.h5*")) == ["o.h5"]


LINKED: dict[str, Callable[[Path, str], Any]] = {
    "inspect": lambda there, link: inspect.inspect_file(link),
    "verify": lambda there, link: verify.verify_file(link),
    "search": lambda there, link: search.search_file(SearchConfig(link, "p0")),
    "search --query": lambda there, link: search.search_file(SearchConfig(str(there), link)),
    "map": lambda there, link: mapping.write_map(MapConfig(link, f"{there}.tsv", "pca")),
    "map --color": lambda there, link: mapping.write_map(MapConfig(str(there), f"{there}.tsv", "pca", f"{link}:host")),
    "export": lambda there, link: export.export_file(link, "npy"),
    "extract": lambda there, link: extract.extract_files("random:8M:1", link, f"{there}.d", ("mean",)),
    "validate --against": lambda there, link: validate.run(ValidateConfig(against=link)),
    "embed --model": lambda there, link: embed_fasta(there.with_name("in.fasta"), f"{there}.new.h5", model=link),
    "embed --config": lambda there, link: resolve(EmbedConfig, link, {}),
}
"""What opens a file that is a link to nothing."""


@pytest.mark.parametrize("command", LINKED)
def test_a_link_that_leads_nowhere_is_told_as_one_by_every_command(
    make_fasta: Make, tiny_model: Path, tmp_path: Path, command: str
) -> None:
    embed_fasta(str(make_fasta([20, 30, 40])), tmp_path / "out.h5", model=str(tiny_model), device="cpu")
    link = tmp_path / "link"
    link.symlink_to("gone")
    with pytest.raises(UserError, match=r"link is a link to gone, which is not there"):
        LINKED[command](tmp_path / "out.h5", str(link))


def test_an_output_link_that_leads_nowhere_is_written_where_it_leads(
    make_fasta: Make, tiny_model: Path, tmp_path: Path
) -> None:
    fasta = str(make_fasta([20, 30, 40]))
    links = {}
    for name in ("shards.h5", "imported.h5", "tree"):
        links[name] = tmp_path / f"link-{name}"
        links[name].symlink_to(name)
    for shard in ("1/2", "2/2"):
        embed_fasta(fasta, links["shards.h5"], model=str(tiny_model), device="cpu", shard=shard)
    assert status.show_shards(str(links["shards.h5"]))
    merge.merge_shards(str(links["shards.h5"]))
    export.export_file(str(tmp_path / "shards.h5"), "npy", str(tmp_path / "rows.npy"))
    importing.import_file(str(tmp_path / "rows.npy"), str(links["imported.h5"]), inputs=(fasta,))
    extract.extract_files(str(tiny_model), fasta, str(links["tree"]), ("mean",), gpu=False)
    assert all(link.is_symlink() for link in links.values()) and (tmp_path / "tree" / "p0.pt").is_file()
    for name in ("shards.h5", "imported.h5"):
        with read_embeddings(tmp_path / name) as file:
            assert file.complete and len(file) == 3
    (tmp_path / "far").symlink_to("no/folder/x")
    with pytest.raises(UserError, match="cannot be written there"):
        verify.verify_file(str(tmp_path / "shards.h5"), report_path=str(tmp_path / "far"))


def test_an_input_link_that_leads_nowhere_is_told_as_one(tiny_model: Path, tmp_path: Path) -> None:
    link = tmp_path / "in.fasta"
    link.symlink_to("gone.fasta")
    with pytest.raises(UserError, match=r"in\.fasta is a link to gone\.fasta, which is not there"):
        embed_fasta(str(link), str(tmp_path / "o.h5"), model=str(tiny_model), device="cpu")
    with pytest.raises(UserError, match=r"in\.fasta is a link to gone\.fasta, which is not there"):
        importing.import_file(str(link), str(tmp_path / "o.h5"))


def test_a_file_of_others_with_the_name_of_a_lock_is_never_removed(
    make_fasta: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """What this program makes and removes is known by being empty, or by a name that has its own in it."""
    proteins, contigs = make_fasta([20, 30]), tmp_path / "contigs.fna"
    contigs.write_text(">c\n" + "ATGGCTAAAGTTCTGGGTGAA" * 20 + "\n")
    options = {"model": str(tiny_model), "device": "cpu"}
    embed_fasta(proteins, tmp_path / "out.h5", **options)
    for shard in ("1/2", "2/2"):
        embed_fasta(proteins, tmp_path / "s.h5", **options, shard=shard)
    commands: dict[str, Callable[[], Any]] = {
        "s.h5.merging": lambda: merge.merge_shards(str(tmp_path / "s.h5")),
        "c.proteins.faa.lock": lambda: embed_fasta(
            contigs, tmp_path / "c.h5", **options, from_="contigs", genes="six-frame"
        ),
        ".x.npy.virnucpro-partial.lock": lambda: export.export_file(
            str(tmp_path / "out.h5"), "npy", str(tmp_path / "x.npy")
        ),
    }
    for name, command in commands.items():
        (tmp_path / name).write_text("theirs")
        with pytest.raises(UserError, match=f"{re.escape(name)} is in the way"):
            command()
        assert (tmp_path / name).read_text() == "theirs"
        (tmp_path / name).unlink()
        command()
    (tmp_path / "p.h5.partial.new").write_text("theirs")
    embed_fasta(proteins, tmp_path / "p.h5", **options)
    assert (tmp_path / "p.h5.partial.new").read_text() == "theirs"


def test_a_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f"cd {tmp_path}/gone && rmdir ../gone && {sys.executable} -m virnucpro_cli status {tmp_path}/out.h5"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "The current folder is not there any more" in done.stderr
    assert "Traceback" not in done.stderr
