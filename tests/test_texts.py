"""Packed texts, and texts as they lie in a file."""

import os
import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from test_store import NAMES, layout
from virnucpro_cli.store import Extra, Names, Store, read_embeddings, schema
from virnucpro_cli.store.layout import LARGEST, texts_as_written
from virnucpro_cli.texts import Texts

DICE = random.Random(0)
ODD = [
    "",
    "a",
    "β-lactamase",
    "x" * (LARGEST - 40),
    "y" * (LARGEST - 16),
    "z" * LARGEST,
    "w" * 3 * LARGEST,
    "",
    "é" * 4090,
]
"""Texts around the sizes at which a collection of HDF5 is full."""
SETS = {
    "one": ["alone"],
    "empty ones": [""] * 10_000,
    "odd ones": ODD,
    "short ones": [f"p{i}" for i in range(schema.NAME_BLOCK + 1000)],
    "all lengths": ["n" * DICE.randrange(300) for _ in range(20_000)] + ODD + ["n" * size for size in range(200)],
}


def packed(texts: list[str]) -> Texts:
    return Texts.of([text.encode() for text in texts])


@pytest.mark.parametrize("name", SETS)
def test_hdf5_reads_texts_of_any_length_and_goes_on_writing_the_file(name: str, tmp_path: Path) -> None:
    texts = SETS[name]
    names = Names(len(texts), lambda start, stop: texts[start:stop], sum(len(text.encode()) for text in texts))
    laid_out = layout(extra=Extra(tables={"groups/ids": names, "groups/members": np.arange(len(texts))}))
    file = Store.create(tmp_path / "out.h5", laid_out, preallocate=False)
    file.close()
    size = file.path.stat().st_size
    assert size <= laid_out.file_bytes
    with h5py.File(file.path, "r+") as written:
        assert written["groups/ids"].asstr()[:].tolist() == texts and written["groups/ids"].dtype == h5py.string_dtype()
        assert written["groups/ids"][len(texts) // 2].decode() == texts[len(texts) // 2]
        written["more"] = np.array(["of others", "é"], object)
        written["groups/ids"][0] = "changed"
    with h5py.File(file.path) as written:
        assert written["groups/ids"].asstr()[:].tolist() == ["changed", *texts[1:]]
        assert written["more"].asstr()[:].tolist() == ["of others", "é"]
        assert written["sequence_ids"].asstr()[0] == "alpha" and written["groups/members"][-1] == len(texts) - 1


@pytest.mark.parametrize("name", SETS)
def test_texts_of_a_range_are_read_as_hdf5_reads_them_and_left_to_it_where_they_lie_otherwise(
    name: str, tmp_path: Path
) -> None:
    texts = SETS[name]
    names = Names(len(texts), lambda start, stop: texts[start:stop], sum(len(text.encode()) for text in texts))
    laid_out = layout(extra=Extra(tables={"groups/ids": names, "groups/members": np.arange(len(texts))}))
    file = Store.create(tmp_path / "out.h5", laid_out)
    at, dice = file.places["groups/ids"].offset, random.Random(1)
    ranges = [(0, len(texts)), (len(texts) - 1, len(texts))]
    ranges += [tuple(sorted(dice.sample(range(len(texts) + 1), 2))) for _ in range(20)]
    for start, stop in ranges:
        found = texts_as_written(file.fd, at, start, stop)
        assert found is not None and found.strings() == texts[start:stop]
        assert (found.hashes() == packed(texts[start:stop]).hashes()).all(), "words end in zeros"
    file.close()
    changed = [*texts]
    changed[len(texts) // 2] = "changed"
    with h5py.File(file.path, "r+") as written:
        written["groups/ids"][len(texts) // 2] = "changed"
    with open(file.path, "r+b") as other:
        for start, stop in (*ranges, (len(texts) // 2, len(texts) // 2 + 1)):
            found = texts_as_written(other.fileno(), at, start, stop)
            assert found is None or found.strings() == changed[start:stop]
        os.truncate(other.fileno(), at + 16 * len(texts))
        assert texts_as_written(other.fileno(), at, 0, len(texts)) is None


def test_names_are_the_same_packed_and_not_whoever_wrote_them(tmp_path: Path) -> None:
    file = Store.create(tmp_path / "out.h5", layout())
    file.mark(np.array([0, 1, 2, 4, 5]))
    file.finish("{}", overwrite=False)
    file.close()
    for rewritten in (False, True):
        if rewritten:
            with h5py.File(tmp_path / "out.h5", "r+") as written:
                written["sequence_ids"][...] = [*reversed(NAMES)]
        with read_embeddings(tmp_path / "out.h5") as there:
            assert there.name_texts(0, 6).strings() == (NAMES[::-1] if rewritten else NAMES)
            assert there.name_texts(2, 5).strings() == there.names_of(2, 5) and there.name_texts(3, 3).strings() == []


def test_a_text_with_a_nul_byte_is_refused_as_hdf5_would_cut_it_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NUL"):
        Store.create(tmp_path / "out.h5", layout(names=lambda start, stop: ["a\0b"] * (stop - start)))
    assert not [*tmp_path.iterdir()]


def test_equal_texts_and_no_others_have_equal_hashes() -> None:
    stems = ["", "a", "b", "ab", "ba", "protein_1", "protein_2", "ÿ"]
    texts = [stem + tail * count for stem in stems for tail in "a1_" for count in (*range(40), *range(250, 270))] + [
        "\0" * n for n in range(20)
    ]
    hashes = packed(texts).hashes().tolist()
    assert len(set(zip(texts, hashes, strict=True))) == len(set(texts)) == len(set(hashes))
    alone = [int(packed([text]).hashes()[0]) for text in texts]
    assert alone == hashes, "a neighbour changes nothing"


def test_packed_texts_are_the_same_texts() -> None:
    whole = Texts.joined([packed(ODD[:4]), packed([]), packed(ODD[4:])])
    assert whole.strings() == ODD and whole.lengths.tolist() == [len(text.encode()) for text in ODD]
    assert whole.take(np.array([5, 0, 2, 2])).strings() == [ODD[5], ODD[0], ODD[2], ODD[2]]


def test_a_text_that_is_damaged_by_a_nul_byte_is_the_one_that_hdf5_reads(tmp_path: Path) -> None:
    file = Store.create(
        tmp_path / "out.h5", layout(names=lambda start, stop: [f"name_{i}" for i in range(start, stop)])
    )
    file.close()
    data = file.path.read_bytes()
    assert data.count(b"name_3") == 1
    file.path.write_bytes(data.replace(b"name_3", b"na\0e_3"))
    with read_embeddings(file.path) as there:
        assert there.names_of(2, 5) == ["name_2", "na", "name_4"] and there.names_at([3]) == ["na"]
