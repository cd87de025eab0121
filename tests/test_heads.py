"""VirNucPro's heads: read without running anything, known by their ids, and scored with the bits of PyTorch's module."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from conftest import ROOT
from heads import pickled_head
from virnucpro_cli.cli import machine
from virnucpro_cli.errors import UserError
from virnucpro_cli.predict import fetching, head, pickled

GOLDENS = ROOT / "tests" / "data" / "virnucpro_goldens.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pickled_head(tmp_path_factory.mktemp("heads"), 3328).parent


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head.pth", "state.pth", "saved.safetensors"])
def test_scores_have_the_bits_of_the_module_itself(folder: Path, tmp_path: Path, name: str) -> None:
    there = np.load(folder / "rows.npz")
    found = head.read(folder / ("head.pth" if name.startswith("saved") else name))
    if name.startswith("saved"):
        head.save(found, tmp_path / name)
        again = head.read(tmp_path / name)
        assert again.identity() == found.identity() and again.sha256 == found.sha256
        found = again
    assert found.features == 3328 and found.chunk is None
    assert (found.scores(there["rows"]) == there["scores"]).all()


def test_a_row_has_the_same_bits_in_any_company(folder: Path) -> None:
    rows, found = np.load(folder / "rows.npz")["rows"], head.read(folder / "head.pth")
    expected = found.scores(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    assert (found.scores(rows[order]) == expected[order]).all()
    for start, stop in ((0, 1), (17, 18), (3, 260), (255, 257), (0, 0)):
        assert (found.scores(rows[start:stop]) == expected[start:stop]).all()
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert (found.scores(rows) == expected).all()
    finally:
        torch.set_num_threads(before)


def real_heads() -> dict[int, head.Head]:
    return {chunk: there for chunk in head.PUBLISHED if (there := head.kept(chunk)) is not None}


def test_vectors_of_the_goldens_have_their_published_scores() -> None:
    """The published 500 head over vectors of both encoders, as the original computed them."""
    real = real_heads()
    if 500 not in real:
        pytest.skip("this machine has no VirNucPro head in its cache: virnucpro fetch virnucpro")
    there = np.load(GOLDENS)
    features = np.concatenate([there["dnabert_s"], there["esm2_3b_36"]], axis=1)
    assert np.abs(real[500].scores(features) - there["scores"]).max() < 1e-6


# --- files that are no heads -----------------------------------------------------------------------------------------


def rezipped(path: Path, to: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """The zip with members changed, or left out for None."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", **options) as new:
        for info in old.infolist():
            if (data := change(info.filename, old.read(info))) is not None:
                new.writestr(info.filename, data)
    return to


def with_pickle(path: Path, to: Path, data: bytes) -> Path:
    return rezipped(path, to, lambda name, old: data if name.endswith("data.pkl") else old)


class Hostile:
    def __init__(self, *reduced: Any):
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "what",
    [
        Hostile(os.system, ("touch {}",)), Hostile(eval, ("open('{}', 'w')",)), Hostile(exec, ("open('{}', 'w')",)),
        Hostile(torch.load, ("{}",)), Hostile(torch.nn.Sequential, ()), Hostile(Path, ("{}",)),
        {"hidden_layer.weight": Hostile(os.system, ("touch {}",))},
    ],
)  # fmt: skip
def test_a_pickle_that_names_anything_else_is_refused_and_nothing_is_called(
    folder: Path, tmp_path: Path, what: Any
) -> None:
    mark = tmp_path / "mark"
    hostile = what if isinstance(what, Hostile) else what["hidden_layer.weight"]
    hostile.reduced = hostile.reduced[0], tuple(each.format(mark) for each in hostile.reduced[1])
    path = with_pickle(folder / "head.pth", tmp_path / "bad.pth", pickle.dumps(what, 2))
    with pytest.raises(UserError, match=r"its pickle names .*nothing was called") as caught:
        head.read(path)
    assert not mark.exists() and "300_model.pth" in caught.value.remedy


def op(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80\x02", b"junk", op(b"]"), op(b"K\x01"), op(b"X\x01\x00\x00\x00a"), op(b"r\xff\xff\xff\x7f"),
        op(b"K\x01r\xff\xff\xff\xff"), op(b"B\xff\xff\xff\xff"), op(b"c__main__\nMLPClassifier\n"),
        op(b"c__main__\nMLPClassifier\n", b")\x81"), op(b"c__main__\nMLPClassifier\n", b")\x81", b"}b"),
        op(b"ctorch._utils\n_rebuild_tensor_v2\n", b")R"), op(b"ctorch._utils\n_rebuild_tensor_v2\n", b"}b"),
        op(b"(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQ"), op(b"}X\x01\x00\x00\x00aK\x01s"),
        op(b"c__builtin__\nset\n", b"]q\x00K\x01a\x85R"), op(b"\x82\x01"),
    ],
)  # fmt: skip
def test_damaged_and_odd_pickles_are_refused_in_words(folder: Path, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match="is not a head"):
        head.read(with_pickle(folder / "head.pth", tmp_path / "bad.pth", data))


def test_zips_that_torch_does_not_write_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, data = folder / "head.pth", (folder / "head.pth").read_bytes()

    def refused(content: bytes | Path, words: str) -> None:
        path = tmp_path / "bad.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            head.read(path)

    for size in (0, 3, 1000, len(data) // 2, len(data) - 10):
        refused(data[:size], "is not a head")
    spoilt = bytearray(data)
    spoilt[len(spoilt) // 2] ^= 1
    refused(bytes(spoilt), "damaged")
    bomb = rezipped(good, tmp_path / "bad.pth", lambda name, old: old, compression=zipfile.ZIP_DEFLATED)
    refused(bomb, "compressed")
    refused(rezipped(good, tmp_path / "bad.pth", lambda n, old: None if n.endswith("data/0") else old), "not there")
    refused(rezipped(good, tmp_path / "bad.pth", lambda n, old: old[:-4] if n.endswith("/0") else old), "do not fit")
    big = rezipped(good, tmp_path / "bad.pth", lambda n, old: b"big" if n.endswith("byteorder") else old)
    refused(big, "little-endian")
    nothing = rezipped(good, tmp_path / "bad.pth", lambda n, old: None if n.endswith(".pkl") else old)
    refused(nothing, "one data.pkl")
    monkeypatch.setattr(pickled, "MOST_BYTES", 1000)
    refused(data, "too large")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state.pth", weights_only=True)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda there: there.update({name: there.pop(name)}) or there.__delitem__(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("bn1.bias"), "has no bn1.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "a tensor extra"),
        (lambda s: s.update({"output_layer.weight": torch.zeros(3, 512)}), r"output_layer.weight has the shape \[3"),
        (lambda s: s.update({"bn1.bias": torch.zeros(511)}), "has the shape"),
        (lambda s: s.update({"bn1.bias": torch.zeros(512, 1)}), "has the shape"),
        (lambda s: s.update({"bn1.bias": torch.zeros(512, dtype=torch.float64)}), "float64, not float32"),
        (lambda s: s.update({"bn1.bias": torch.full((512,), torch.nan)}), "cannot be"),
        (lambda s: s.update({"bn1.running_var": torch.full((512,), -1.0)}), "cannot be"),
        (lambda s: s.update({"hidden_layer.weight": s["hidden_layer.weight"].T.contiguous().T}), "not contiguous"),
        (lambda s: s.update({"bn1.bias": 3}), "other things than tensors"),
        (lambda s: s.update({"bn1.bias": torch.zeros(512, dtype=torch.int32)}), "names torch.IntStorage"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_heads_are_refused_in_words(
    folder: Path, tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    there = state(folder)
    change(there)
    torch.save(there, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=words):
        head.read(tmp_path / "bad.pth")


def test_a_head_of_any_width_is_read(tmp_path: Path) -> None:
    found = head.read(pickled_head(tmp_path, 40, hidden=7))
    there = np.load(tmp_path / "rows.npz")
    assert found.features == 40 and (found.scores(there["rows"]) == there["scores"]).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "There is no file"), (b"x" * 100, "no zip file"), (b"", "no zip file")],
)
def test_what_is_no_head_at_all_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "head.pth").write_bytes(content)
    with pytest.raises(UserError, match=words):
        head.read(tmp_path / "head.pth")


def test_safetensors_are_checked_too(folder: Path, tmp_path: Path) -> None:
    tensors = {name: each.numpy() for name, each in state(folder).items()}
    for notes, words in (
        ({"classes": "virus,others"}, "classes"), ({"chunk": "400"}, "chunk length"), ({"eps": "x"}, "safetensors"),
        ({"eps": "7"}, "eps"),
    ):  # fmt: skip
        save_file(tensors, tmp_path / "bad.safetensors", notes)
        with pytest.raises(UserError, match=words):
            head.read(tmp_path / "bad.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10" + bytes(40))
    with pytest.raises(UserError, match=r"safetensors"):
        head.read(tmp_path / "bad.safetensors")
    save_file(tensors, tmp_path / "own.safetensors")
    assert head.read(tmp_path / "own.safetensors").eps == 1e-5


# --- which head ------------------------------------------------------------------------------------------------------


def test_a_head_is_of_its_chunk_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = head.read(folder / "head.pth")
    with pytest.raises(UserError, match="does not say") as caught:
        head.for_chunk(found, None)
    assert "--chunk 300" in caught.value.remedy
    assert head.for_chunk(found, 300).chunk == 300
    monkeypatch.setitem(head.PUBLISHED, 300, found.git_blob)
    known = head.read(folder / "head.pth")
    assert known.is_published and head.for_chunk(known, None).chunk == 300
    with pytest.raises(UserError, match="the head for chunks of 300 bases, not 500"):
        head.for_chunk(known, 500)


def test_a_safetensors_is_a_published_head_by_its_own_word(folder: Path, tmp_path: Path) -> None:
    tensors = {name: np.array(tensor) for name, tensor in head.read(folder / "head.pth").tensors.items()}
    save_file(tensors, tmp_path / "h.safetensors", {"chunk": "300", "git_blob": head.PUBLISHED[300]})
    assert head.read(tmp_path / "h.safetensors").name.startswith("by its own word VirNucPro's 300 head (")


@pytest.fixture
def published(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The file that stands for both published heads, at their addresses."""
    data = (folder / "head.pth").read_bytes()
    blob = head.read(folder / "head.pth").git_blob
    served = {fetching.url_of(chunk): data for chunk in head.PUBLISHED}
    for chunk in head.PUBLISHED:
        monkeypatch.setitem(head.PUBLISHED, chunk, blob)

    def at(url: str) -> bytes:
        if url not in served:
            raise OSError("no network")
        return served[url]

    monkeypatch.setattr(fetching, "_bytes_at", at)
    return served


def test_a_fetched_head_is_checked_and_kept_as_safetensors(published: dict[str, bytes], folder: Path) -> None:
    said: list[str] = []
    found = fetching.fetched(300, said.append)
    assert found.is_published and "MIT" in said[0] and found.name.startswith("VirNucPro's 300 head (")
    assert [path.name for path in head.folder().iterdir()] == ["300_model.safetensors"]
    published.clear()
    again = fetching.fetched(300, said.append)
    assert again.identity() == found.identity() and len(said) == 1 and again.name.startswith("VirNucPro's 300 head (")


def test_another_file_at_the_address_is_refused(published: dict[str, bytes]) -> None:
    published[fetching.url_of(500)] = published[fetching.url_of(500)] + b"\0"
    with pytest.raises(UserError, match="is not VirNucPro's 500 head"):
        fetching.fetched(500, lambda text: None)
    assert list(head.folder().iterdir()) == []


def test_a_head_that_was_put_there_is_used(published: dict[str, bytes], folder: Path) -> None:
    data = published[fetching.url_of(300)]
    published.clear()
    with pytest.raises(UserError, match="could not be fetched") as caught:
        fetching.fetched(300, lambda text: None)
    place = head.folder() / "300_model.pth"
    assert f"at {place}." in caught.value.remedy and head.PUBLISHED[300] in caught.value.remedy
    place.write_bytes(data)
    assert fetching.fetched(300, lambda text: None).place == str(place)
    place.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"not a head|is not VirNucPro"):
        fetching.fetched(300, lambda text: None)


@pytest.fixture
def no_network(published: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor heads can be fetched."""
    published.clear()

    def no_weights(model: str, say: Any, accepted: bool = False) -> None:
        raise UserError(f"{model} could not be fetched.", "Bring it.")

    monkeypatch.setattr(fetching.locate, "fetch", no_weights)


@pytest.mark.usefixtures("no_network")
def test_fetch_names_every_file_to_bring() -> None:
    with pytest.raises(UserError) as caught:
        fetching.fetch_all(lambda text: None)
    assert "dnabert-s could not be fetched" in caught.value.what
    for words in (
        "pytorch_model.bin (SHA-256 f3cfc3d0",
        "tokenizer.json (SHA-256 667f5a0e",
        "300_model.pth",
        "500_model.pth",
    ):
        assert words in caught.value.remedy
    assert io.StringIO(caught.value.remedy).readline().strip() == "Bring it."


@pytest.mark.usefixtures("no_network")
def test_fetch_says_what_is_missing_of_every_name() -> None:
    with pytest.raises(UserError) as caught:
        machine.fetch(["3B", "virnucpro", "650M"])
    for words in ("3B could not", "dnabert-s could not", "500 head is not", "650M could not"):
        assert words in caught.value.what
    assert "--head" not in caught.value.remedy and "500_model.pth" in caught.value.remedy
