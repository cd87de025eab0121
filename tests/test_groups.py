"""A row for each group of proteins: what NumPy makes of the rows in the file, to the bit whatever the run was."""

import gzip
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_faults import CHILDREN, InTurn, child, one_thread  # noqa: F401  (one_thread is in force here too)
from test_genes import CONTIGS, contents
from virnucpro_cli import store
from virnucpro_cli.cluster import merge
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.engine import placer
from virnucpro_cli.errors import UserError
from virnucpro_cli.features import groups
from virnucpro_cli.plan import shards
from virnucpro_cli.store import schema
from virnucpro_cli.validation import verify

NAMED = r"^(c\d+)_"
LAYERS = (0, 2)


@pytest.fixture
def proteins(tmp_path: Path) -> Path:
    """120 proteins of thirty contigs in no order, some empty (skipped), some alike, one contig of empty ones, five of no contig."""
    dice = random.Random(0)
    names = [f"c{i % 30}_{i}" for i in range(120)] + [f"alone{i}" for i in range(5)]
    dice.shuffle(names)
    with open(tmp_path / "in.fasta", "w") as file:
        for name in names:
            empty = name.startswith("c7_") or dice.random() < 0.05
            length = 0 if empty else dice.randint(1, 300)
            text = "MKVLAGW" * 9 if dice.random() < 0.1 else "".join(dice.choices("ACDEFGHIKLMNPQRSTVWY", k=length))
            file.write(f">{name}\n{'' if name.startswith('c7_') else text}\n")
    return tmp_path / "in.fasta"


@pytest.fixture
def embed_groups(proteins: Path, tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    def main(output: str = "out.h5", **options: Any) -> Path:
        given = {"model": str(tiny_model), "device": "cpu", "layers": LAYERS, "max_residues": 200}
        if not options.keys() & {"group", "group_table"}:
            given["group_regex"] = NAMED
        embed_fasta(options.pop("inputs", proteins), tmp_path / output, **given | options)
        return tmp_path / output

    return main


def check(path: Path) -> None:
    """Every row of every group, anew from the file's own rows."""
    with store.read_embeddings(path) as file:
        found = file.groups
        assert (
            found is not None and len(found) == len(found.members) and found.of.dtype == found.members.dtype == np.int64
        )
        for layer in file.layers:
            rows = file.dataset("mean", layer)[:].astype(np.float64)
            expected = {kind: np.full((len(found), rows.shape[1]), np.nan) for kind in groups.KINDS}
            for number in range(len(found)):
                members = np.flatnonzero((found.of == number) & (file.status == store.DONE))
                assert found.members[number] == len(members)
                if len(members):
                    lengths = file.lengths[members, None]
                    expected["mean"][number] = rows[members].mean(axis=0)
                    expected["length_weighted_mean"][number] = (rows[members] * lengths).sum(axis=0) / lengths.sum()
                    expected["max"][number] = rows[members].max(axis=0)
            for kind, values in expected.items():
                stored = found.rows(kind, layer)
                assert stored.dtype == file.dataset("mean", layer).dtype
                tolerance = 1e-3 if stored.dtype == np.float16 else 1e-6
                np.testing.assert_allclose(stored[:], values, rtol=tolerance, atol=tolerance / 10)
        assert file.groups is not None and np.array_equal(
            file.groups.rows()[:], found.rows("mean", file.layers[-1])[:], True
        )


@pytest.mark.parametrize("store_dtype", ["fp16", "fp32"])
def test_rows_of_groups_are_what_numpy_makes_of_the_rows_of_their_members(
    embed_groups: Callable[..., Path], store_dtype: str
) -> None:
    path = embed_groups(store_dtype=store_dtype)
    check(path)
    with store.read_embeddings(path) as file:
        found = file.groups
        assert found is not None and sorted(found.ids) == sorted(f"c{i}" for i in range(30))
        for name, number in zip(file.names, found.of.tolist(), strict=True):
            assert (found.ids[number] if number >= 0 else "alone") == name.partition("_")[0].rstrip(
                "01234" if number < 0 else ""
            )
        first = list(dict.fromkeys(number for number in found.of.tolist() if number >= 0))
        assert first == list(range(30)), "in the order of their first member"
        nothing = found.ids.index("c7")
        assert found.members[nothing] == 0 and np.isnan(found.rows("max")[nothing]).all()
        assert file.report["counts"]["groups"] == 30 and file.report["counts"]["proteins in no group"] == 5
    assert verify.verify_file(str(path)).passed


def test_bits_do_not_depend_on_budget_or_blocks(
    embed_groups: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(embed_groups())
    assert contents(embed_groups("budget.h5", token_budget=1024)) == expected
    monkeypatch.setattr(
        groups, "BLOCK_BYTES", 3 * 8 * 32
    )  # three members at once, so that groups are in several blocks
    path = embed_groups("blocks.h5")
    check(path)
    assert contents(path).keys() == expected.keys()


def test_shards_merge_to_the_single_run_also_when_the_merge_is_killed(
    embed_groups: Callable[..., Path], tmp_path: Path
) -> None:
    expected = contents(embed_groups())
    for number in (3, 1, 2):
        embed_groups("merged.h5", shard=f"{number}/3")
    with store.read_embeddings(shards.path(tmp_path / "merged.h5", shards.Shard(2, 3))) as file:
        assert file.groups is not None and len(file.groups) == 30 and len(file.groups.of) == len(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "fill", lambda _: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            merge.merge_shards(str(tmp_path / "merged.h5"))
    merge.merge_shards(str(tmp_path / "merged.h5"))
    assert contents(tmp_path / "merged.h5") == expected
    check(tmp_path / "merged.h5")


def test_a_group_larger_than_a_block_is_added_up_block_by_block() -> None:
    values = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float16)
    group, length = np.repeat([0, 2], [900, 100]), np.arange(1, 1001, dtype=np.float64)
    blocks = [(group[i : i + 7], length[i : i + 7], values[i : i + 7]) for i in range(0, 1000, 7)]
    mean, weighted, most = groups._pooled(iter(blocks), 3, 4)
    wide = values.astype(np.float64)
    for number, rows in ((0, slice(0, 900)), (2, slice(900, 1000))):
        np.testing.assert_allclose(mean[number], wide[rows].mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(weighted[number], np.average(wide[rows], axis=0, weights=length[rows]), rtol=1e-12)
        assert np.array_equal(most[number], wide[rows].max(axis=0))
    assert np.isnan(mean[1]).all() and np.isnan(weighted[1]).all() and np.isnan(most[1]).all()


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_chunks_cover_everything_once_and_stay_small(sizes: list[int], rows: int) -> None:
    offsets = np.append(0, np.cumsum(sizes, dtype=np.int64))
    found = list(schema.chunks(offsets, len(sizes), rows))
    assert [i for start, stop in found for i in range(start, stop)] == list(range(len(sizes)))
    assert all(stop - start == 1 or offsets[stop] - offsets[start] <= rows >= stop - start for start, stop in found)


def test_a_kill_while_rows_of_groups_are_written_is_made_good(
    embed_groups: Callable[..., Path], tmp_path: Path, proteins: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, real = 0, os.pwrite

    def counted(*arguments: Any) -> int:
        nonlocal writes
        writes += 1
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", counted)
        patch.setattr(placer, "COMMIT_SECONDS", 0.0)  # as in the child
        patch.setattr(placer, "ThreadPoolExecutor", InTurn)
        expected = contents(embed_groups("whole.h5", token_budget=1024))
    options = {"inputs": str(proteins), "output": str(tmp_path / "out.h5"), "model": str(tiny_model), "device": "cpu",
               "layers": LAYERS, "max_residues": 200, "group_regex": NAMED, "token_budget": 1024}  # fmt: skip
    for before_the_end in (1, 3, 4, 7, 9, 10):  # seven are of groups, then come report, checksum and complete
        process = CHILDREN.Process(target=child, args=(options, ("pwrite", writes - before_the_end)))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        with store.read_embeddings(tmp_path / "out.h5.partial") as file:
            assert (file.status != store.PENDING).all() and not file.complete
        assert contents(embed_groups(token_budget=1024)) == expected
        (tmp_path / "out.h5").unlink()


# --- which group -----------------------------------------------------------------------------------------------------


def test_groups_are_contigs_in_the_order_of_the_contigs(embed_groups: Callable[..., Path]) -> None:
    path = embed_groups(inputs=CONTIGS, from_="contigs", group="contig", group_regex=None)
    check(path)
    with store.read_embeddings(path) as file:
        assert file.groups is not None
        assert file.groups.ids == ["contig_1", "contig_2", "contig_3", "contig_4"]
        assert np.array_equal(file.groups.of, file.columns["genes/contig"])
        assert file.groups.members.tolist() == np.bincount(file.columns["genes/contig"], minlength=4).tolist()
        assert file.groups.members[3] == 0 and np.isnan(file.groups.rows()[3]).all()


def test_a_table_says_the_group_of_each_name(embed_groups: Callable[..., Path], proteins: Path, tmp_path: Path) -> None:
    by_regex = contents(embed_groups("regex.h5"))
    names = [line[1:-1] for line in proteins.open() if line.startswith(">c")]
    text = "name\tgroup\r\n\n" + "".join(f"{name}\t{name.partition('_')[0]}\n" for name in reversed(names))
    (tmp_path / "table.tsv").write_text(text)
    with gzip.open(tmp_path / "table.tsv.gz", "wt", newline="") as file:
        file.write(text)
    for name in ("table.tsv", "table.tsv.gz"):
        path = embed_groups(f"{name}.h5", group_table=str(tmp_path / name))
        assert contents(path) == by_regex
    with store.read_embeddings(path) as file:
        sha256 = hashlib.sha256((tmp_path / "table.tsv").read_bytes().replace(b"\r\r", b"\r")).hexdigest()
        assert json.loads(file.attributes["fingerprint"])["groups"] == f"table {sha256}"
    (tmp_path / "table.tsv").write_text(text + "more\tmore\n")
    with pytest.raises(UserError, match="groups: table"):
        embed_groups("table.tsv.h5", group_table=str(tmp_path / "table.tsv"))


def test_names_are_those_of_the_file(embed_groups: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "os.fasta").write_text(">a OS=one virus\nMKV\n>b OS=another\nMKVL\n>c OS=one virus\nMKVLA\n>d\nMK\n")
    path = embed_groups(inputs=tmp_path / "os.fasta", group_regex=r"OS=(.+?)?$", id="full")
    check(path)
    with store.read_embeddings(path) as file:
        assert file.groups is not None
        assert (file.groups.ids, file.groups.of.tolist()) == (["one virus", "another"], [0, 1, 0, -1])
    with pytest.raises(UserError, match="'a', 'b', 'c'"):
        embed_groups("first.h5", inputs=tmp_path / "os.fasta", group_regex="OS=(.+)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": "contig"}, "with --from contigs"), ({"group": "genome", "from_": "contigs"}, "--group is 'genome'"),
        ({"group_regex": "(a"}, "no regular expression"), ({"group_regex": "a"}, "has 0 capturing groups"),
        ({"group_regex": "(a)(b)"}, "has 2 capturing groups"), ({"group_regex": ""}, "--group-regex is empty"),
        ({"group_regex": "(a)", "group_table": "t"}, "both"), ({"group_regex": "(a)", "pool": ("bos",)}, "Add mean to --pool"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        EmbedConfig(**options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("c1_1\tc1\nc2_2 c2\n", "line 2 has 1 column, not 2"), ("c1_1\tc1\tx\n", "line 1 has 3 columns"),
        ("c1_1\tc1\nc1_1\tc2\n", "line 2 gives 'c1_1' the group 'c2', and an earlier line 'c1'"),
        ("other\tc1\n", "holds the name of no protein"), ("", "holds the name of no protein"), (None, "No such file"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(
    embed_groups: Callable[..., Path], tmp_path: Path, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / "table.tsv").write_text(text)
    with pytest.raises(UserError, match=words):
        embed_groups(group_table=str(tmp_path / "table.tsv"))
    (tmp_path / "table.tsv.gz").write_bytes(b"\x1f\x8b\x08\x00garbage")
    with pytest.raises(UserError, match="cannot be read"):
        embed_groups(group_table=str(tmp_path / "table.tsv.gz"))
    assert not list(tmp_path.glob("out*"))
