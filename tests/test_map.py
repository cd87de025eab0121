"""Maps: the projection is PCA's, the page works in a real browser without a network, and what is shown is said."""

import csv
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virnucpro_cli import cli, errors, store
from virnucpro_cli.embed import embed_fasta
from virnucpro_cli.errors import UserError
from virnucpro_cli.explore import METHODS, MapConfig, mapping
from virnucpro_cli.explore.default_rows import Pooled
from virnucpro_cli.explore.maps import colour, projection
from virnucpro_cli.kinds import POOLED
from virnucpro_cli.store import read_embeddings

Make = Callable[..., Path]
EVIL = (
    "<script>document.title='ran'</script>",
    "<img/src=x/onerror=document.title='ran'>",
    "</script>&amp;$x_1$",
    "é|b/1",
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Forty proteins: four of evil names, one skipped, one truncated, one with residues replaced."""
    folder = tmp_path_factory.mktemp("map")
    dice = np.random.default_rng(0)
    texts = ["".join(dice.choice(list("ACDEFGHIKLMNPQRSTVWY"), 5 + i)) for i in range(40)]
    texts[10], texts[11], texts[12] = "", "MK*LA", "MKVLAGW" * 20
    names = [*EVIL, *(f"p{i}" for i in range(4, 40))]
    (folder / "in.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in zip(names, texts, strict=True)))
    embed_fasta(folder / "in.fasta", folder / "out.h5", model=str(tiny_model), device="cpu", max_residues=100)
    (folder / "of.tsv").write_text(
        "name\tclass\tnumber\tcluster\n"
        + "".join(f"{name}\t$_$C<b>{i % 3}\t{i / 7}\t{i % 4}\n" for i, name in enumerate(names[:30]))
    )
    return folder / "out.h5"


@pytest.fixture
def drawn(made: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Draw a map of `made` to a file in tmp_path: what was drawn, and the file."""

    def draw(name: str, method: str | None = "pca", color: str = "length", **options: Any) -> tuple[Any, Path]:
        color = color.replace("of.tsv", str(made.parent / "of.tsv"))
        return mapping.write_map(MapConfig(str(made), str(tmp_path / name), method, color, **options)), tmp_path / name

    return draw


# --- projections -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(3, 60), st.integers(2, 12), st.integers(1, 60), st.integers(0, 1000))
def test_pca_is_that_of_numpys_svd(n: int, dimensions: int, block: int, seed: int) -> None:
    dice = np.random.default_rng(seed)
    array = (dice.normal(size=(n, dimensions)) * np.linspace(1, 9, dimensions) + 50).astype(np.float32)
    rows = np.sort(dice.choice(n, max(3, n // 2), replace=False))
    points, shares = projection.pca(Pooled(None, "mean", 0, array, rows, size=block), 2)  # type: ignore[arg-type]
    centred = array[rows].astype(np.float64) - array[rows].astype(np.float64).mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (left * values)[:, :2]
    expected *= np.sign((expected * points).sum(axis=0))
    np.testing.assert_allclose(points, expected, atol=1e-6 * values[0])
    np.testing.assert_allclose(shares, (values**2 / (values**2).sum())[:2], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_map_is_the_same_again_and_two_groups_lie_apart(method: str) -> None:
    dice = np.random.default_rng(0)
    array = (dice.normal(size=(80, 20)) + np.repeat([[0.0], [8.0]], 40, axis=0)).astype(np.float16)
    data = Pooled(None, "mean", 0, array, np.arange(80))  # type: ignore[arg-type]
    points, again = (projection.project(data, method, seed=3).points for _ in range(2))
    np.testing.assert_array_equal(points, again)
    nearest = ((points[:, None] - points) ** 2).sum(axis=2) + np.diag(np.full(80, np.inf))
    assert ((nearest.argmin(axis=1) < 40) == (np.arange(80) < 40)).mean() > 0.95


def test_rows_all_alike_are_one_point_and_no_fault() -> None:
    data = Pooled(None, "mean", 0, np.ones((5, 4), np.float16), np.arange(5))  # type: ignore[arg-type]
    points, shares = projection.pca(data, 2)
    assert np.abs(points).max() < 1e-12 and np.isfinite(shares).all()


# --- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", ["length", "status", "of.tsv:class", "of.tsv:number", "of.tsv:cluster"])
def test_a_picture_has_many_colours_and_is_the_same_again(drawn: Callable[..., Any], color: str) -> None:
    from matplotlib.image import imread

    _, first = drawn("a.png", color=color)
    _, second = drawn("b.png", color=color)
    pixels = imread(first)[..., :3]
    assert pixels.shape[0] > 500 and (pixels.min(axis=2) < 0.9).mean() > 0.002
    assert len(np.unique((pixels * 15).astype(int) @ (1, 16, 256))) > 8
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["pdf", "svg", "jpg"])
def test_other_kinds_of_pictures(drawn: Callable[..., Any], kind: str) -> None:
    _, path = drawn(f"a.{kind}")
    assert path.stat().st_size > 5000


def test_a_table_has_a_line_for_each_point(drawn: Callable[..., Any], made: Path) -> None:
    shown, path = drawn("a.tsv", color="of.tsv:class")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    with read_embeddings(made) as opened:
        assert [line["name"] for line in lines] == [name for i, name in enumerate(opened.names) if i != 10]
        assert [int(line["length"]) for line in lines] == np.delete(opened.lengths, 10).tolist()
    assert [int(line["record"]) for line in lines] == [i for i in range(40) if i != 10]
    np.testing.assert_allclose(
        [float(line["x"]) for line in lines], shown.projection.points[:, 0], rtol=1e-4, atol=1e-6
    )
    again = drawn("b.tsv", color=f"{path}:x")[0].colour
    assert isinstance(again, colour.Scale) and not np.isnan(again.values).any(), "its first column are the names"
    assert lines[1]["class"] == "$_$C<b>1" and lines[38]["class"] == "no value"


def test_the_caption_says_what_is_shown(drawn: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = drawn("a.png", sample=20, seed=4, color="of.tsv:class")
    caption = "\n".join(shown.caption)
    for words in ("PCA", "layer 2", "mean over residues", "not shown: 1 skipped of 40 proteins", "a random sample of 20 of 39 proteins (seed 4)",
                  "class: known of "):  # fmt: skip
        assert words in caption, words
    assert "20 proteins of out.h5" in shown.title and all("of the variance" in axis for axis in shown.projection.axes)
    assert "a random sample of 20" in capsys.readouterr().err
    assert len(shown.rows) == 20 and 10 not in shown.rows


@pytest.mark.parametrize("kind", POOLED)
def test_every_kind_of_pool_can_be_drawn(made: Path, tmp_path: Path, tiny_model: Path, kind: str) -> None:
    embed_fasta(made.parent / "in.fasta", tmp_path / "k.h5", model=str(tiny_model), device="cpu", pool=(kind,))
    shown = mapping.write_map(MapConfig(str(tmp_path / "k.h5"), str(tmp_path / "k.tsv"), "pca", "length"))
    assert any(POOLED[kind] in line for line in shown.caption)


# --- colours -----------------------------------------------------------------------------------------------------------


def test_more_classes_than_can_be_told_apart_are_others() -> None:
    values = [f"c{i}" for i in range(30) for _ in range(i + 1)] + [None] * 5
    parts = colour.Classes("x", values).parts
    assert [label for label, _, rank in parts if rank < 0] == [f"10 others ({sum(range(1, 11))})", "no value (5)"]
    assert [label for label, _, rank in parts if rank >= 0][:2] == ["c29 (30)", "c28 (29)"]
    assert sorted(i for _, points, _ in parts for i in points.tolist()) == list(range(len(values)))


def test_whole_numbers_of_few_kinds_are_classes_and_others_a_scale(drawn: Callable[..., Any]) -> None:
    assert isinstance(drawn("a.tsv", color="of.tsv:cluster")[0].colour, colour.Classes)
    scale = drawn("b.tsv", color="of.tsv:number")[0].colour
    assert isinstance(scale, colour.Scale) and np.isnan(scale.values).sum() == 10


def test_status_tells_what_was_done_to_a_protein(drawn: Callable[..., Any]) -> None:
    words = drawn("a.tsv", color="status")[0].colour.words()
    assert {word: words.count(word) for word in words} == {"done": 37, "replaced": 1, "truncated": 1}


def test_groups_of_the_file_are_colours(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(made, tmp_path / "grouped.h5"))
    with h5py.File(path, "r+") as file:
        file["groups/of"] = np.arange(40) % 3 - 1
        file["groups/ids"] = np.array(["one", "two"], object)
    by = mapping.write_map(MapConfig(str(path), str(tmp_path / "a.tsv"), "pca", "group")).colour
    assert by.words()[:4] == ["no value", "one", "two", "no value"]


@pytest.mark.parametrize(
    ("color", "words"),
    [("size", "--color is 'size'"), ("group", "has no groups"), ("nowhere.tsv:x", "cannot be read"), ("of.tsv:size", "no column"),
     ("of.tsv:name", "no column"), ("bad.tsv:x", "no x for any protein"), ("twice.tsv:x", "line 3 gives .p4. the x"), ("raw.tsv:x", "line 2 is not UTF-8")],
)  # fmt: skip
def test_a_colour_that_is_none_is_one_message(
    drawn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, color: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.tsv").write_text("name\tx\nq\t1\n")
    Path("twice.tsv").write_text("name\tx\np4\t1\np4\t2\n")
    Path("raw.tsv").write_bytes(b"name\tx\n\xff\xfe\t1\n")
    with pytest.raises(UserError, match=words):
        drawn("a.png", color=color)
    assert not Path("a.png").exists()


# --- the page, in a browser --------------------------------------------------------------------------------------------


LOOK = """
<script>
window.addEventListener('load', async () => {
  const seen = {points: document.querySelectorAll('path.point').length, errors: window.failed || 0, hovers: [],
                text: document.querySelector('.infolayer').textContent, high: document.getElementById('map').clientHeight / innerHeight};
  for (const [t, trace] of document.getElementById('map').calcdata.entries()) for (const p of trace.keys()) {
    Plotly.Fx.hover('map', [{curveNumber: t, pointNumber: p}]);
    await new Promise(then => setTimeout(then, 100));  // plotly looks at the mouse twenty times a second
    seen.hovers.push(document.querySelector('.hoverlayer').textContent);
  }
  seen.title = document.title;
  seen.strangers = document.querySelectorAll('#map img, #map script, #map iframe').length;
  const told = document.createElement('pre'); told.id = 'told'; told.textContent = JSON.stringify(seen);
  document.body.append(told);
});
</script>"""


def in_browser(page: Path) -> dict[str, Any]:
    """What a real browser, which has no network, makes of a page: its points, and the words over each."""
    look = page.with_name("look.html")
    text = page.read_text()
    assert text.count("</body>") >= 1
    head, _, tail = text.rpartition("</body>")
    look.write_text(
        f"{head}{LOOK}</body>{tail}".replace("<head>", "<head><script>onerror = () => {failed = 1}</script>", 1)
    )
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=30000", "--dump-dom", look.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")
@pytest.mark.parametrize("color", ["length", "of.tsv:class"])
def test_a_page_shows_every_protein_and_its_name_and_runs_nothing_that_a_name_says(
    drawn: Callable[..., Any], made: Path, color: str
) -> None:
    shown, path = drawn("a.html", color=color)
    seen = in_browser(path)
    assert seen["points"] == len(seen["hovers"]) == len(shown.rows) == 39 and not seen["errors"]
    assert seen["high"] == 1
    lines = [f"{name}{length:,} residues" for name, length in zip(shown.names, shown.lengths.tolist(), strict=True)]
    words = [""] * 39 if shown.words is None else [f"class: {word}" for word in shown.words]
    assert sorted(seen["hovers"]) == sorted(a + b for a, b in zip(lines, words, strict=True))
    assert seen["title"] == shown.title and seen["strangers"] == 0, "a protein's name was run"
    for line in (*shown.caption, shown.title, *shown.projection.axes):
        assert line in seen["text"], line
    assert "http" not in re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.DOTALL)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("done", "words"), [(0, "0 embedded proteins"), (1, "1 embedded protein "), (2, "2 embedded")])
def test_too_few_proteins_are_one_message(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], done: int, words: str
) -> None:
    path = Path(shutil.copy(made, tmp_path / "few.h5"))
    with h5py.File(path, "r+") as file:
        file["status"][done:] = store.SKIPPED
    with pytest.raises(SystemExit) as ended:
        cli.main(["map", str(path), "-o", str(tmp_path / "a.png")])
    told = capsys.readouterr()
    assert ended.value.code == 2 and words in told.err and "3 or more" in told.err and "Traceback" not in told.err


def test_umap_of_few_proteins_is_refused_if_named_and_else_pca(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(made, tmp_path / "few.h5"))
    with h5py.File(path, "r+") as file:
        file["status"][9:] = store.SKIPPED
    assert "PCA" in mapping.write_map(MapConfig(str(path), str(tmp_path / "a.png"))).title
    for method in ("umap", "tsne"):
        with pytest.raises(UserError, match="16 proteins or more"):
            mapping.write_map(MapConfig(str(path), str(tmp_path / "b.png"), method))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [("a.gif", {}, "must end in"), ("a", {}, "must end in"), ("no/a.png", {}, "cannot be written there"), ("a.png", {"method": "mds"}, "--method"),
     ("a.png", {"sample": 2}, "--sample"), ("a.png", {"seed": -1}, "--seed"), ("of.tsv", {"color": "of.tsv:class"}, "would overwrite")],
)  # fmt: skip
def test_a_map_that_cannot_be_is_one_message(
    drawn: Callable[..., Any], made: Path, name: str, options: dict[str, Any], words: str
) -> None:
    where = str(made.parent / "of.tsv") if name == "of.tsv" else name
    with pytest.raises(UserError, match=words):
        drawn(where, **options)


def test_a_map_that_is_there_is_not_replaced_unasked(drawn: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        drawn("a.png")
    assert (tmp_path / "a.png").read_text() == "mine"
    drawn("a.png", overwrite=True)
    assert (tmp_path / "a.png").stat().st_size > 5000 and [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("missing", "name", "method"),
    [
        ("plotly", "a.html", "pca"),
        ("matplotlib", "a.png", "pca"),
        ("umap", "a.png", "umap"),
        ("openTSNE", "a.png", "tsne"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    drawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, missing: str, name: str, method: str
) -> None:
    known = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda package: None if package == missing else known(package))
    with pytest.raises(UserError, match=rf"{missing}, which is not installed.*\n.*virnucpro\[maps\]"):
        drawn(name, method)


def test_without_umap_the_map_is_pca_and_says_why(
    drawn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(projection, "find_spec", lambda package: None)
    shown, _ = drawn("a.png", None)
    assert "PCA" in shown.title and "virnucpro[maps]" in capsys.readouterr().err
