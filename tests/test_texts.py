"""Packed texts, and texts as they lie in a file."""

import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from test_store import layout
from virnucpro_cli.store import Extra, Names, Store, schema
from virnucpro_cli.store.layout import LARGEST
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
