"""The promises of the whole pipeline, end to end: on the CPU with the demo weights, and on a GPU with `-m gpu`."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, VIRAL, read_fasta, relative_l2
from virnucpro_cli import report
from virnucpro_cli.config import EmbedConfig
from virnucpro_cli.embed import run
from virnucpro_cli.store import TRUNCATED, read_embeddings
from virnucpro_cli.validation.fair_esm import ALPHABET, Reference

pytestmark = pytest.mark.demo
UNIPROT = ROOT / "tests" / "data" / "uniprot_5k.fasta.gz"

BOUNDS = {"cpu": (1e-5, 2e-5), "cuda": (5e-3, 1.5e-2)}
"""Relative L2 against fair-esm in fp32: pooled, and per record's residues. fp32 on the CPU, fp16 on CUDA."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hundred(tmp_path: Path) -> tuple[Path, list[tuple[str, str]]]:
    """100 real proteins of up to 300 residues but for three long ones, in random order."""
    generator = random.Random(7)
    short = [record for record in read_fasta(UNIPROT) if len(record[1]) <= 300]
    long = [record for record in read_fasta(VIRAL) if len(record[1]) > 1022][:3]
    records = generator.sample(short, 97) + long
    generator.shuffle(records)
    path = tmp_path / "hundred.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
    return path, records


@pytest.mark.slow
def test_a_hundred_proteins_from_fasta_to_file(hundred, device, demo, tmp_path, capsys) -> None:
    path, records = hundred
    out = tmp_path / "out.h5"
    config = EmbedConfig(
        inputs=(str(path),), output=str(out), model="demo", device=device, pool=("mean", "residue"), layers=(3, -1),
        store_dtype="fp32", token_budget=2048,
    )  # fmt: skip
    summary = run(config)
    said = capsys.readouterr()

    lengths = np.array([min(len(s), 1022) for _, s in records])
    tokens = int(lengths.sum()) + 2 * len(records)
    assert summary.counts["tokens"] == tokens
    assert -(-tokens // 2048) <= summary.packing["packs"] <= -(-tokens // 2048) + 1
    assert summary.packing["density"] > 0.9

    assert said.out == ""
    assert "3 of 100 proteins truncated" in said.err
    assert "--long window" in said.err

    pooled_bound, residue_bound = BOUNDS[device]
    reference = Reference(*demo)
    with read_embeddings(out) as file:
        assert file.names == [name for name, _ in records]
        assert file.lengths.tolist() == [len(s) for _, s in records]
        assert [bool(flag & TRUNCATED) for flag in file.flags] == [len(s) > 1022 for _, s in records]
        assert (file.status == 1).all()
        for row, (_, sequence) in enumerate(records):
            for layer, hidden in reference.embed(sequence[:1022], (3, 6)).items():
                assert relative_l2(file.dataset("mean", layer)[row], hidden[1:-1].mean(0)) <= pooled_bound
                assert relative_l2(file.residues(row, layer), hidden[1:-1]) <= residue_bound
        assert np.array_equal(file[:], file.dataset("mean", 6)[:])
    with capsys.disabled():
        report.console().print(
            f"\n{device}: {summary.rates['tokens/s']:,.0f} tokens/s, density {summary.packing['density']:.2%}"
        )


def test_packed_equals_an_ordinary_padded_batch(hundred, device, demo, tmp_path) -> None:
    """What users call unpacked: fair-esm over one padded batch, which is right as long as its mask is."""
    path, records = hundred
    few = [(name, sequence[:300]) for name, sequence in records[:12]]
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in few))
    out = tmp_path / "out.h5"
    run(EmbedConfig(inputs=(str(path),), output=str(out), model="demo", device=device, store_dtype="fp32", quiet=True))
    reference = Reference(*demo)
    _, _, tokens = ALPHABET.get_batch_converter()(few)
    with torch.inference_mode():
        padded = reference.model(tokens, repr_layers=[6])["representations"][6]
    with read_embeddings(out) as file:
        for row, (_, sequence) in enumerate(few):
            assert relative_l2(file[row], padded[row, 1 : len(sequence) + 1].mean(0)) <= BOUNDS[device][0]


@pytest.mark.slow
def test_the_same_file_in_any_order_and_budget_has_the_same_bits(hundred, device, tmp_path) -> None:
    path, records = hundred
    shuffled = tmp_path / "shuffled.fasta"
    order = random.Random(1).sample(range(len(records)), len(records))
    shuffled.write_text("".join(f">{records[i][0]}\n{records[i][1]}\n" for i in order))
    rows = []
    for source, budget in ((path, 1024), (shuffled, 4096)):
        out = tmp_path / f"{budget}.h5"
        run(
            EmbedConfig(
                inputs=(str(source),), output=str(out), model="demo", device=device, token_budget=budget, quiet=True
            )
        )
        with read_embeddings(out) as file:
            rows.append(file[:])
    assert np.array_equal(rows[0][order], rows[1])
