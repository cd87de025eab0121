"""Text that people hand in is read in one way, and text for them is read back by pandas."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import write_model
from virnucpro_cli import cli, report, tables
from virnucpro_cli.config import EmbedConfig, resolve
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import MapConfig, SearchConfig, inspect, mapping, search
from virnucpro_cli.machine import fetch
from virnucpro_cli.model import weights
from virnucpro_cli.model.families import SIZES
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.store import read_embeddings
from virnucpro_cli.validation.verdict import Check, Verdict

SMALL = ModelSpec("small", 2, 64, 4)
BOM = b"\xef\xbb\xbf"
ODD = ['"quoted" first', "tab\tin it", "plain", 'end"', "two  spaces", '"', "1", "007"]
"""Headers of a FASTA, which are names with `id="full"`."""

Embed = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("with_heads") / "model", SMALL)
    save_file(load_file(folder / "model.safetensors") | weights.random_heads(SMALL), folder / "model.safetensors")
    return folder


@pytest.fixture
def embed(tmp_path: Path, model: Path) -> Embed:
    def main(output: str = "out.h5", names: Any = ("p1", "p2", "p3", "p4"), **options: Any) -> Path:
        dice = np.random.default_rng(0)
        records = (f">{name}\n{''.join(dice.choice(list('ACDEFGHIKLMNPQRSTVWY'), 30))}\n" for name in names)
        (tmp_path / "in.fasta").write_text("".join(records))
        embed_fasta(tmp_path / "in.fasta", tmp_path / output, model=str(model), device="cpu", **options)
        return tmp_path / output

    return main


def rows_of(path: Path, content: bytes, columns: int | None = None) -> list[list[str]]:
    path.write_bytes(content)
    return list(tables.rows(tables.Lines(str(path)), columns))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_rows_are_the_same_whatever_the_mark_the_line_ends_and_the_compression(
    tmp_path: Path, mark: bytes, end: bytes, compress: Callable[[bytes], bytes]
) -> None:
    content = mark + end.join([b"p1\tx", b"", b'"p ""2"""\ty', b"p\xc3\xa9\tz"])
    assert rows_of(tmp_path / "t", compress(content)) == [["p1", "x"], ['p "2"', "y"], ["pé", "z"]]


def test_the_digest_is_of_the_text_without_its_mark(tmp_path: Path) -> None:
    digests = set()
    for content in (b"p1\tx\n", BOM + b"p1\tx\n", gzip.compress(BOM + b"p1\tx\n")):
        (tmp_path / "t").write_bytes(content)
        lines = tables.Lines(str(tmp_path / "t"))
        assert list(tables.rows(lines)) == [["p1", "x"]]
        digests.add(lines.digest.hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\tb\nc\n", "t line 2 has 1 column, not 2"), (b"a\tb\nc\td\te\n", "t line 2 has 3 columns, not 2"),
        (b"a\tb\n\xe9\td\n", "t line 2 is not UTF-8"), ("a\tb\n".encode("utf-16"), "t line 1 is not UTF-8"),
        (b"a\tb\nc\0\td\n", "t line 2 holds a NUL"), (b'a\tb\n"c\td\ne\tf\n', "t line 3 is no line of a table"),
        (b'a\tb\n"c" d\te\n', "t line 2 is no line of a table"), (b"\x1f\x8b\x08\x00garbage", "t cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused_with_its_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows_of(tmp_path / "t", content)


def test_a_byte_order_mark_hides_no_name(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "groups.tsv").write_bytes(BOM + b"p1\tx\np2\ty\np3\tx\np4\ty\n")
    with read_embeddings(embed("groups.h5", group_table=str(tmp_path / "groups.tsv"))) as file:
        assert file.groups is not None and file.groups.ids == ["x", "y"] and file.groups.members.tolist() == [2, 2]
    (tmp_path / "names").write_bytes(BOM + b"p1\np3\n")
    path = embed("contacts.h5", emit=("contacts",), contacts_for=str(tmp_path / "names"))
    with read_embeddings(path) as file:
        assert [row for row in range(len(file)) if len(file.contacts(row))] == [0, 2]
    (tmp_path / "colours.tsv").write_bytes(BOM + b"name\tclass\np1\tx\np2\ty\np3\tx\np4\ty\n")
    (tmp_path / "colours.tsv.gz").write_bytes(gzip.compress((tmp_path / "colours.tsv").read_bytes()))
    for name in ("colours.tsv", "colours.tsv.gz"):
        map_to = str(tmp_path / f"{name}.map.tsv")
        shown = mapping.write_map(MapConfig(str(path), map_to, method="pca", color=f"{tmp_path / name}:class"))
        assert shown.colour.words() == ["x", "y", "x", "y"]
    (tmp_path / "c.toml").write_bytes(BOM + b'[embed]\npool = ["bos"]\n')
    assert resolve(EmbedConfig, str(tmp_path / "c.toml"), {}).pool == ("bos",)


def test_a_byte_order_mark_in_the_config_of_a_model_is_none_of_its_text(embed: Embed, model: Path) -> None:
    expected = (model / "config.json").read_bytes()
    try:
        (model / "config.json").write_bytes(BOM + expected)
        assert embed().exists()
    finally:
        (model / "config.json").write_bytes(expected)


def test_a_line_of_a_colour_table_that_lacks_the_column_is_named(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "colours.tsv").write_text("name\thost\tclass\np1\thuman\tx\np2\thuman\np3\tbat\ty\n")
    with pytest.raises(UserError, match=r"colours.tsv line 3 has 2 columns, not 3"):
        mapping.write_map(MapConfig(str(embed()), str(tmp_path / "m.tsv"), color=f"{tmp_path / 'colours.tsv'}:class"))


def test_names_of_a_table_that_no_protein_has_are_counted(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("p1\tx\nP2\ty\np3 \tx\n")
    (tmp_path / "names").write_text("p1\nP2\n")
    path = embed(
        group_table=str(tmp_path / "t.tsv"), contacts_for=str(tmp_path / "names"), emit=("contacts",),
        report=str(tmp_path / "r.json"),
    )  # fmt: skip
    notes = json.loads((tmp_path / "r.json").read_text())["notes"]
    assert f"names of {tmp_path / 't.tsv'} that no protein has: 2" in notes
    assert f"names of {tmp_path / 'names'} that no protein has: 1" in notes
    assert path.exists()


# --- writing ---------------------------------------------------------------------------------------------------------


def test_pandas_reads_back_every_name_of_every_table(
    embed: Embed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pandas = pytest.importorskip("pandas")
    path = embed(names=ODD, id="full", qc=str(tmp_path / "qc.tsv"))
    with read_embeddings(path) as file:
        names = file.names
    assert len(set(names)) == len(ODD) and any("\t" in name for name in names)
    search.search_file(SearchConfig(str(path), str(path), k=1, output=str(tmp_path / "hits.tsv")))
    mapping.write_map(MapConfig(str(path), str(tmp_path / "map.tsv"), method="pca"))
    for table, column in (("qc", "name"), ("hits", "query"), ("map", "name")):
        read = pandas.read_csv(tmp_path / f"{table}.tsv", sep="\t", dtype=str, keep_default_na=False)
        assert read[column].tolist() == names, table
    capsys.readouterr()
    inspect.inspect_file(str(path), "-")
    inspected = capsys.readouterr().out
    assert inspected == (tmp_path / "qc.tsv").read_text()
    assert pandas.read_csv(io.StringIO(inspected), sep="\t", dtype=str)["name"].tolist() == names
    coloured = mapping.write_map(
        MapConfig(str(path), str(tmp_path / "m.tsv"), method="pca", color=f"{tmp_path / 'qc.tsv'}:length")
    )
    assert coloured.colour.words() == ["30"] * len(names)


def test_a_name_of_digits_is_found_by_the_names_of_a_table(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("007\tx\n1\ty\n")
    with read_embeddings(embed(names=["1", "007"], group_table=str(tmp_path / "t.tsv"))) as file:
        assert file.groups is not None and file.groups.ids == ["y", "x"]


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_in_toml_and_after_an_equals_sign(
    tmp_path: Path, tiny_model: Path, make_fasta: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    fasta = make_fasta([20, 30, 40, 50])
    Path("c.toml").write_text('[embed]\ncache = "~/rows"\nqc = "~/qc.tsv"\ndevice = "cpu"\n')
    main(
        ["embed", str(fasta), "--output=~/o.h5", "--model", str(tiny_model), "--config", "c.toml", "--report=~/r.json"]
    )
    main(["verify", "~/o.h5", f"--fasta={fasta}", "--report=~/v.json"])
    main(["search", "~/o.h5", "--query=p1", "--output=~/hits.tsv"])
    main(["map", "~/o.h5", "-o~/m.tsv", "--color=~/qc.tsv:norm"])
    assert {p.name for p in home.iterdir()} >= {"rows", "qc.tsv", "o.h5", "r.json", "v.json", "hits.tsv", "m.tsv"}
    assert [p.name for p in here.iterdir()] == ["c.toml"]


def test_a_hyphen_is_standard_output_for_tables_and_reports(
    tmp_path: Path, tiny_model: Path, make_fasta: Callable[..., Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    fasta = make_fasta([20, 30])
    main(["embed", str(fasta), "-o", "o.h5", "--model", str(tiny_model), "--device", "cpu", "--qc", "-", "-q"])
    assert capsys.readouterr().out.startswith("name\tstatus\t")
    main(["embed", str(fasta), "-o", "o.h5", "--model", str(tiny_model), "--device", "cpu", "--report", "-", "-q"])
    assert json.loads(capsys.readouterr().out)["already_complete"]
    assert not Path("-").exists()


def main(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0


# --- tables on a screen ----------------------------------------------------------------------------------------------


def shown(table: Any, width: int = 80) -> str:
    """A table as a terminal of this width shows it, without borders and spaces."""
    out = Console(width=width, file=io.StringIO(), soft_wrap=True, force_terminal=True, color_system=None)
    out.print(table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return "".join(c for c in text if c.isalnum() or c in "/._…")


LONG = "/a/folder/with/a/name/that/is/longer/than/any/terminal/is/wide/proteins_of_a_whole_project_in_one_file.h5"


def test_a_table_of_many_columns_loses_nothing_at_80_columns() -> None:
    rows = [{"workload": f"natural{i}", **{f"rate {j} of {i % 2}": f"{i}.{j}" for j in range(11)}} for i in range(5)]
    rows = [{name: str(row.get(name, "")) for name in rows[0]} for row in rows] + [{**rows[0], "workload": LONG}]
    text = shown(report.rows_table("Throughput", rows))
    for row in rows:
        for word in row.values():
            assert word in text
    assert "…" not in text


def test_tables_of_checks_lose_nothing_at_80_columns() -> None:
    what = "a check with a description of some length, as there are"
    checks = [
        Check(
            f"Part {i}", what, passed, 1.5e-7, 2.5e-6, 3.5e-5, f"record_{LONG}", "floor_is_4e4", "limit_is_5e3", "note"
        )
        for i, passed in enumerate((True, False, None))
    ]
    text = shown(Verdict("validate", checks).table())
    for word in ("Part0", "1.5e07", "2.5e06", "3.5e05", "proteins_of_a_whole", "floor_is_4e4", "limit_is_5e3", "FAIL"):
        assert word.replace("_", "") in text.replace("_", ""), word
    assert "…" not in text


def test_commands_show_whole_paths_at_80_columns(
    tmp_path: Path, tiny_model: Path, make_fasta: Callable[..., Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("a_long_name_" * 8)
    folder.mkdir()
    for number in (1, 2):
        embed_fasta(make_fasta([20, 30]), folder / "o.h5", model=str(tiny_model), device="cpu", shard=f"{number}/2")
    shard = sorted(folder.glob("o*.h5"))[0]
    for command in (["inspect", str(shard)], ["status", str(folder / "o.h5")], ["verify", str(shard)]):
        main(command)
        ran = capsys.readouterr()
        assert "…" not in ran.out + ran.err
        if command[0] != "verify":
            assert max(len(line) for line in ran.out.splitlines() if line[0] in "│┃") <= 80
            assert shard.name in "".join(c for c in ran.out if c.isalnum() or c in "._-")
    fetch.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "layers", "hidden", "place"] and len(lines) == 1 + len(SIZES)
