"""The packed forward against fair-esm's own class, bit for bit against itself, and proof that the gates bite."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import TINY, VIRAL, read_fasta, relative_l2
from packs import among_strangers, embeddings, of_segment, one_pack, random_protein
from sabotage import MISTAKES
from virnucpro_cli import alphabet
from virnucpro_cli.kinds import PROTEIN
from virnucpro_cli.model import attention, weights
from virnucpro_cli.model.families import build, reading
from virnucpro_cli.model.packed import PackedModel
from virnucpro_cli.model.spec import ModelSpec
from virnucpro_cli.plan.packing import SMALLEST_BUCKET
from virnucpro_cli.validation.fair_esm import Reference

GATE, RESIDUE_GATE = 1e-5, 2e-5
LAYERS = (0, 3, 6)
CPU = torch.device("cpu")

Rows = dict[tuple[str, int], torch.Tensor]
Demo = tuple[ModelSpec, dict[str, torch.Tensor]]


def packed_model(spec: ModelSpec, state: dict[str, torch.Tensor]) -> PackedModel:
    return build(spec, state, torch.float32, CPU, attention.resolve("sdpa", CPU, torch.float32))


def rows_of(sequences: list[str]) -> int:
    """Rows with a little filler; fewer than a bucket of the ladder, which only the bits depend on."""
    return -(-sum(len(sequence) + 3 for sequence in sequences) // 64) * 64


def embed(
    model: PackedModel,
    sequences: list[str],
    folder: Path,
    layers: tuple[int, ...] = LAYERS,
    pack: int = 10**9,
    rows: int = 0,
    kind: str = PROTEIN,
) -> list[Rows]:
    """What the fast path gives for each sequence, `pack` of them at a time, in the order given."""
    found: list[Rows] = []
    for start in range(0, len(sequences), pack):
        chunk = sequences[start : start + pack]
        batch = one_pack(folder, chunk, rows or rows_of(chunk), reading(model.spec, kind))
        result = embeddings(model, batch, layers)
        assert result.finite is not None and bool(result.finite.all())
        found += [of_segment(result, batch, i) for i in range(len(chunk))]
    return found


def expected(reference: Reference, sequence: str, layers: tuple[int, ...] = LAYERS) -> Rows:
    found: Rows = {}
    for layer, hidden in reference.embed(sequence, layers).items():
        found["mean", layer] = hidden[1:-1].double().mean(0)
        found["bos", layer] = hidden[0]
        found["residue", layer] = hidden[1:-1]
    return found


def worst(found: list[Rows], wanted: list[Rows]) -> dict[str, float]:
    """The largest relative L2 error of each kind over all records and layers; zeros must be zeros."""
    errors = {"mean": 0.0, "bos": 0.0, "residue": 0.0}
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key, rows in ours.items():
            assert rows.shape == theirs[key].shape
            if not theirs[key].any():
                assert not rows.any()
                continue
            errors[key[0]] = max(errors[key[0]], relative_l2(rows, theirs[key]))
    return errors


def assert_within_gates(found: list[Rows], wanted: list[Rows]) -> None:
    errors = worst(found, wanted)
    print("worst relative L2:", {kind: f"{error:.1e}" for kind, error in errors.items()})
    assert errors["mean"] <= GATE and errors["bos"] <= GATE and errors["residue"] <= RESIDUE_GATE


def same_bits(one: Rows, other: Rows) -> bool:
    return one.keys() == other.keys() and all(torch.equal(rows, other[key]) for key, rows in one.items())


# --- against fair-esm --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proteins() -> list[str]:
    """Nine real proteins over the whole range of lengths, the longest cut at 1022 as fair-esm does."""
    by_length = sorted((sequence[:1022] for _, sequence in read_fasta(VIRAL)), key=len)
    return [by_length[i * (len(by_length) - 1) // 8] for i in range(9)]


@pytest.fixture(scope="module")
def model(demo: Demo) -> PackedModel:
    return packed_model(*demo)


@pytest.fixture(scope="module")
def reference(demo: Demo) -> Reference:
    return Reference(*demo)


@pytest.fixture(scope="module")
def truth(reference: Reference, proteins: list[str]) -> list[Rows]:
    return [expected(reference, protein) for protein in proteins]


@pytest.fixture(scope="module")
def truth_of_three(reference: Reference, proteins: list[str]) -> list[Rows]:
    return [expected(reference, protein) for protein in proteins[:5:2]]


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize("pack", [1, 9], ids=["alone", "all-in-one"])
def test_real_proteins_match_fair_esm_however_they_are_packed(
    pack: int, model: PackedModel, proteins: list[str], truth: list[Rows], tmp_path: Path
) -> None:
    assert_within_gates(embed(model, proteins, tmp_path, pack=pack), truth)


@pytest.mark.slow
@pytest.mark.demo
def test_real_proteins_match_in_pairs_of_any_order(
    model: PackedModel, proteins: list[str], truth: list[Rows], tmp_path: Path
) -> None:
    order = random.Random(1).sample(range(len(proteins)), len(proteins))
    found = embed(model, [proteins[i] for i in order], tmp_path, pack=2)
    assert_within_gates(found, [truth[i] for i in order])


@pytest.mark.demo
def test_masked_residues_rescale_their_own_protein_only(
    model: PackedModel, reference: Reference, tmp_path: Path
) -> None:
    whole = "MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG"
    sequences = [
        whole,
        whole[:10] + "<mask>" + whole[11:],
        "<mask>" + whole[1:20] + "<mask><mask>" + whole[22:-1] + "<mask>",
        "<mask>" * 5,
        "<mask>",
        "M",
        whole[::-1],
    ]
    wanted = [expected(reference, sequence) for sequence in sequences]
    found = embed(model, sequences, tmp_path, rows=SMALLEST_BUCKET)
    assert all(row.isfinite().all() for rows in found for row in rows.values())
    assert_within_gates(found, wanted)
    assert not found[3]["residue", 0].any()  # masked rows are zero; <cls> is what is left of this one
    assert same_bits(found[0], embed(model, [whole], tmp_path, rows=SMALLEST_BUCKET)[0])


@pytest.mark.demo
def test_rare_and_ambiguous_residues_match(model: PackedModel, reference: Reference, tmp_path: Path) -> None:
    sequences = ["MKUBZOXV", "X" * 30, "OUZBX" * 20, "M.K-V", "MUKX<mask>BZ"]
    wanted = [expected(reference, sequence) for sequence in sequences]
    assert_within_gates(embed(model, sequences, tmp_path, rows=SMALLEST_BUCKET), wanted)


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        ModelSpec("head_dim_24", 2, 48, 2),
        ModelSpec("head_dim_24_of_many", 3, 120, 5),
        ModelSpec("head_dim_128", 1, 128, 1),
        ModelSpec("head_dim_2", 2, 8, 4),
    ],
    ids=lambda spec: spec.name,
)
def test_any_head_size_matches(spec: ModelSpec, tmp_path: Path) -> None:
    state = weights.random_state(spec, seed=3)
    generator = random.Random(0)
    sequences = [random_protein(length, generator) for length in (1, 2, 17, 17, 64, 300, 1022)]
    layers = tuple(range(spec.layers + 1))
    reference = Reference(spec, state)
    wanted = [expected(reference, sequence, layers) for sequence in sequences]
    assert_within_gates(embed(packed_model(spec, state), sequences, tmp_path, layers), wanted)


def test_a_protein_longer_than_1022_matches_when_embedded_whole(tmp_path: Path) -> None:
    state = weights.random_state(TINY, seed=4)
    sequence = random_protein(2500, random.Random(0))
    wanted = expected(Reference(TINY, state), sequence, (2,))
    assert_within_gates(embed(packed_model(TINY, state), ["MKV", sequence], tmp_path, (2,))[1:], [wanted])


# --- layer numbers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[PackedModel, dict[str, torch.Tensor]]:
    state = weights.random_state(TINY, seed=5)
    return packed_model(TINY, state), state


def test_layer_0_is_the_scaled_embedding(tiny: tuple[PackedModel, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    model, state = tiny
    (found,) = embed(model, ["MKV"], tmp_path, (0,))
    table = state["embed_tokens.weight"]
    ids = [alphabet.TOKENS.index(residue) for residue in "MKV"]
    assert relative_l2(found["residue", 0], table[ids] * 0.88) < 1e-7
    assert relative_l2(found["bos", 0], table[alphabet.CLS] * 0.88) < 1e-7


def test_only_the_last_layer_has_the_final_layer_norm(
    tiny: tuple[PackedModel, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, state = tiny
    sequences = ["MKVLAA", "GGW"]
    before = embed(model, sequences, tmp_path, (0, 1, 2))
    norm = {"emb_layer_norm_after.weight": torch.full((32,), 3.0), "emb_layer_norm_after.bias": torch.full((32,), 7.0)}
    after = embed(packed_model(TINY, {**state, **norm}), sequences, tmp_path, (0, 1, 2))
    for one, other in zip(before, after, strict=True):
        for kind in ("mean", "bos", "residue"):
            assert torch.equal(one[kind, 0], other[kind, 0]) and torch.equal(one[kind, 1], other[kind, 1])
            assert relative_l2(other[kind, 2], one[kind, 2]) > 0.1
        assert torch.allclose(other["residue", 2].mean(1), torch.tensor(7.0), atol=1e-4)


def test_a_layer_is_the_same_whichever_others_are_asked_for(
    tiny: tuple[PackedModel, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, _ = tiny
    (together,) = embed(model, ["MKVLAAGG"], tmp_path, (2, 0, 1))
    for layer in (0, 1, 2):
        (alone,) = embed(model, ["MKVLAAGG"], tmp_path, (layer,))
        assert alone and all(torch.equal(rows, together[key]) for key, rows in alone.items())


def test_each_wanted_layer_is_called_once_in_order(
    tiny: tuple[PackedModel, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, _ = tiny
    called: list[tuple[int, tuple[int, ...]]] = []
    batch = one_pack(tmp_path, ["MKV"], SMALLEST_BUCKET)
    model.forward(batch, (2, 0), lambda layer, hidden: called.append((layer, tuple(hidden.shape))))
    assert called == [(0, (1024, 32)), (2, (1024, 32))]


# --- bit for bit -------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_a_protein_has_the_same_bits_in_any_company(model: PackedModel, proteins: list[str], tmp_path: Path) -> None:
    probes = [proteins[6][:length] for length in (8, 63, 350)]
    alone = [embed(model, [probe], tmp_path, rows=1024)[0] for probe in probes]
    generator = random.Random(0)
    for rows in (1024, 2048, 4096):
        left = rows - 2 * sum(len(probe) + 2 for probe in probes)
        strangers, places = among_strangers(probes if left > 500 else [], left, generator)
        found = embed(model, [*probes, *strangers, *probes], tmp_path, rows=rows)
        for i in range(3):
            assert same_bits(alone[i], found[i]), f"probe {i} among the first of {rows} rows"
            assert same_bits(alone[i], found[i - 3]), f"probe {i} among the last of {rows} rows"
            if places:
                assert same_bits(alone[i], found[places[i] + 3]), f"probe {i} within {rows} rows"
        probes, alone = (
            [*probes[1:], probes[0]],
            [*alone[1:], alone[0]],
        )  # each is the very first and the very last once


@pytest.mark.demo
def test_equal_lengths_side_by_side_have_the_same_bits_as_alone(model: PackedModel, tmp_path: Path) -> None:
    generator = random.Random(2)
    twins = [random_protein(90, generator) for _ in range(11)]
    together = embed(model, twins, tmp_path, rows=1024)
    for i in (0, 10):
        assert same_bits(together[i], embed(model, [twins[i]], tmp_path, rows=1024)[0])


@pytest.mark.demo
def test_changing_a_neighbour_changes_no_other_bit(model: PackedModel, tmp_path: Path) -> None:
    generator = random.Random(3)
    sequences = [random_protein(length, generator) for length in (200, 30, 61, 61, 150)]
    before = embed(model, sequences, tmp_path, rows=1024)
    same_length, longer, masked = list(sequences), list(sequences), list(sequences)
    same_length[2] = random_protein(61, generator)
    longer[2] = random_protein(140, generator)
    masked[2] = "<mask>" * 3 + sequences[2][3:]
    for changed in (same_length, longer, masked):
        after = embed(model, changed, tmp_path, rows=1024)
        assert [same_bits(one, other) for one, other in zip(before, after, strict=True)] == [True, True, False, True, True]  # fmt: skip


def test_nothing_in_the_filler_reaches_a_protein(tmp_path: Path) -> None:
    state = weights.random_state(TINY, seed=6)
    unused = alphabet.TOKENS.index("<null_1>")
    state["embed_tokens.weight"][unused] = torch.nan
    model = packed_model(TINY, state)
    for sequences in (["MKVLAAGG", "WWK"], ["MK<mask>V", "A"]):
        batch = one_pack(tmp_path, sequences, SMALLEST_BUCKET)
        results = []
        for filler in (alphabet.PAD, alphabet.X, unused):
            tokens, positions = batch.tokens.clone(), batch.positions.clone()
            tokens[batch.used :] = filler
            positions[batch.used :] = 0 if filler == alphabet.PAD else batch.max_seqlen - 1
            found = embeddings(model, replace(batch, tokens=tokens, positions=positions), (0, 1, 2))
            assert found.finite is not None and found.finite.tolist() == [True, True]
            results.append([of_segment(found, batch, i) for i in range(2)])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# --- the gates bite ----------------------------------------------------------------------------------------------


@pytest.fixture
def sabotaged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    MISTAKES[request.param](monkeypatch)
    yield request.param


@pytest.mark.demo
@pytest.mark.parametrize("sabotaged", MISTAKES, indirect=True)
def test_the_gates_catch_each_mistake_that_others_made(
    sabotaged: str, demo: Demo, proteins: list[str], truth_of_three: list[Rows], tmp_path: Path
) -> None:
    errors = worst(embed(packed_model(*demo), proteins[:5:2], tmp_path), truth_of_three)
    print(sabotaged, {kind: f"{error:.1e}" for kind, error in errors.items()})
    assert errors["mean"] > GATE


@pytest.mark.demo
def test_the_gates_catch_a_mask_that_does_not_rescale(model: PackedModel, reference: Reference, tmp_path: Path) -> None:
    sequence = "MKTVRQERLKSIVRIL<mask>RSKEPVSGAQLAEEL"
    batch = one_pack(tmp_path, [sequence], SMALLEST_BUCKET)
    assert batch.mask_ratio is not None
    found = of_segment(embeddings(model, replace(batch, mask_ratio=None), LAYERS), batch, 0)
    assert worst([found], [expected(reference, sequence)])["mean"] > GATE


# --- less memory ---------------------------------------------------------------------------------------------------


def test_work_in_parts_changes_no_bit(tmp_path: Path) -> None:
    spec, generator = TINY, random.Random(3)
    state = weights.random_state(spec)
    backend = attention.resolve("sdpa", CPU, torch.float32)
    whole = build(spec, state, torch.float32, CPU, backend)
    sequences = [random_protein(n, generator) for n in (1500, 30, 700, 400)]
    expected_rows = embed(whole, sequences, tmp_path, (0, 1, 2), rows=3072)
    for other in (whole.in_parts(1024), whole.in_parts(2048)):
        found = embed(other, sequences, tmp_path, (0, 1, 2), rows=3072)
        assert all(same_bits(one, two) for one, two in zip(found, expected_rows, strict=True))
        assert embed(other, sequences, tmp_path, (1,), rows=3072)[0].keys() == {
            (k, 1) for k in ("mean", "bos", "residue")
        }
