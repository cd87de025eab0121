"""Pooled and residue rows against a loop in float64; windows; what is flagged as not finite."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import relative_l2
from packs import one_pack, random_protein
from virnucpro_cli import fasta
from virnucpro_cli.batch import Embeddings, PackedBatch
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.kinds import KINDS, POOLED
from virnucpro_cli.model import pooling
from virnucpro_cli.model.pooling import Pooler
from virnucpro_cli.plan.packing import first_fit_decreasing, windowed_segments

D = 24
LENGTHS = [300, 61, 61, 1, 2, 140]


@pytest.fixture
def batch(tmp_path: Path) -> PackedBatch:
    generator = random.Random(0)
    return one_pack(tmp_path, [random_protein(length, generator) for length in LENGTHS], 1024)


@pytest.fixture
def hidden() -> torch.Tensor:
    """Rows with one channel far from zero, as ESM-2's have."""
    rows = torch.randn(1024, D, generator=torch.Generator().manual_seed(0))
    rows[:, 5] += 50
    return rows


def pool(hidden: torch.Tensor, batch: PackedBatch, store_dtype: torch.dtype = torch.float32) -> Embeddings:
    found = Embeddings()
    Pooler(KINDS, store_dtype).add(found, 1, hidden, batch)
    return found


def residues_of(hidden: torch.Tensor) -> list[torch.Tensor]:
    """The residue rows of each segment, in float64."""
    found, at = [], 0
    for length in LENGTHS:
        found.append(hidden[at + 1 : at + 1 + length].double())
        at += length + 2
    return found


def test_the_mean_leaves_out_cls_and_eos(hidden: torch.Tensor, batch: PackedBatch) -> None:
    found = pool(hidden, batch).pooled["mean", 1]
    assert found.dtype == torch.float32 and found.shape == (len(LENGTHS), D)
    for row, residues in zip(found, residues_of(hidden), strict=True):
        assert relative_l2(row, residues.mean(0)) < 1e-6
    bounds = batch.cu_seqlens.long()
    for special in (bounds[:-1], bounds[1:] - 1):
        hidden[special] = 1e4
    assert torch.equal(pool(hidden, batch).pooled["mean", 1], found)


def test_bos_is_the_cls_row_itself(hidden: torch.Tensor, batch: PackedBatch) -> None:
    starts = np.cumsum([0, *(length + 2 for length in LENGTHS[:-1])])
    assert torch.equal(pool(hidden, batch).pooled["bos", 1], hidden[starts])


def test_eos_is_the_eos_row_itself(hidden: torch.Tensor, batch: PackedBatch) -> None:
    ends = np.cumsum([length + 2 for length in LENGTHS]) - 1
    assert torch.equal(pool(hidden, batch).pooled["eos", 1], hidden[ends])


def test_max_and_std_leave_out_cls_and_eos(hidden: torch.Tensor, batch: PackedBatch) -> None:
    bounds = batch.cu_seqlens.long()
    for special in (bounds[:-1], bounds[1:] - 1):
        hidden[special] = 1e4
    found = pool(hidden, batch).pooled
    for i, residues in enumerate(residues_of(hidden)):
        assert torch.equal(found["max", 1][i].double(), residues.amax(0))
        expected = residues.std(0, correction=0)
        assert relative_l2(found["std", 1][i], expected) < 1e-6 if len(residues) > 1 else not found["std", 1][i].any()


def test_a_deviation_far_from_zero_loses_no_digits(hidden: torch.Tensor, batch: PackedBatch) -> None:
    hidden += 3000  # squares of sums would leave two digits in float32
    found = pool(hidden, batch).pooled["std", 1]
    for row, residues in zip(found, residues_of(hidden), strict=True):
        assert len(residues) == 1 or relative_l2(row, residues.std(0, correction=0)) < 1e-6


@pytest.mark.parametrize("store_dtype", [torch.float16, torch.float32])
def test_residue_rows_are_the_hidden_rows_in_the_store_dtype(
    store_dtype: torch.dtype, hidden: torch.Tensor, batch: PackedBatch
) -> None:
    found = pool(hidden, batch, store_dtype).residue[1]
    assert found.dtype == store_dtype and torch.equal(found, hidden.to(store_dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_half_precision_rows_is_accumulated_in_fp32(
    dtype: torch.dtype, hidden: torch.Tensor, batch: PackedBatch
) -> None:
    rows = hidden.to(dtype)
    found = pool(rows, batch).pooled["mean", 1]
    assert found.dtype == torch.float32
    for row, residues in zip(found, residues_of(rows), strict=True):
        assert relative_l2(row, residues.mean(0)) < 1e-6


def test_only_what_was_asked_for_is_kept(hidden: torch.Tensor, batch: PackedBatch) -> None:
    for kinds in (*((kind,) for kind in KINDS), ("bos", "residue")):
        found = Embeddings()
        pooler = Pooler(kinds, torch.float32)
        for layer in (3, 1):
            pooler.add(found, layer, hidden, batch)
        assert set(found.pooled) == {(kind, layer) for kind in kinds if kind != "residue" for layer in (3, 1)}
        assert set(found.residue) == ({3, 1} if "residue" in kinds else set())
        assert found.finite is not None and found.finite.tolist() == [True] * len(LENGTHS)


def test_the_windows_of_a_long_protein_add_up_to_the_whole(tmp_path: Path) -> None:
    lengths = np.array([950, 100, 333])
    path = tmp_path / "long.fasta"
    generator = random.Random(1)
    path.write_text("".join(f">p{i}\n{random_protein(n, generator)}\n" for i, n in enumerate(lengths.tolist())))
    table = fasta.index(fasta.open_sources([str(path)], tmp_path))
    segments = windowed_segments(np.arange(3), lengths, window=200, overlap=50)
    plan = first_fit_decreasing(segments.length, 1024)
    collate = VarlenCollator(table, segments, lengths.astype(np.int32), plan)
    whole = [torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in lengths.tolist()]

    mean = torch.zeros(3, D, dtype=torch.float64)
    residue = [torch.zeros(n, D, dtype=torch.float64) for n in lengths.tolist()]
    windows = 0
    for number in range(len(plan)):
        batch = collate(number)
        hidden = torch.full((len(batch.tokens), D), 1e3)  # <cls>, <eos> and filler must count for nothing
        spans = []
        for i, segment in enumerate(batch.segments.tolist()):
            record, start, n = (int(x[segment]) for x in (segments.record, segments.start, segments.length))
            first = int(batch.cu_seqlens[i]) + 1
            spans.append((record, start, slice(first, first + n)))
            hidden[spans[-1][2]] = whole[record][start : start + n]
        found = pool(hidden, batch)
        for i, (record, start, rows) in enumerate(spans):
            windows += batch.seqlens[i] - 2 < lengths[record]
            mean[record] += found.pooled["mean", 1][i].double()
            residue[record][start : start + rows.stop - rows.start] += found.residue[1][rows].double()
    assert windows >= 7
    for record in range(3):
        assert relative_l2(residue[record], whole[record]) < 1e-6
        assert relative_l2(mean[record], whole[record].double().mean(0)) < 1e-5


def only(*broken: int) -> list[bool]:
    return [i not in broken for i in range(len(LENGTHS))]


def row_of(batch: PackedBatch, segment: int, row: int) -> int:
    return int(batch.cu_seqlens[segment]) + row


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("segment", range(len(LENGTHS)))
def test_a_value_that_is_not_finite_flags_its_own_segment_only(
    segment: int, value: float, hidden: torch.Tensor, batch: PackedBatch
) -> None:
    clean = pool(hidden, batch)
    hidden[row_of(batch, segment, LENGTHS[segment]), 3] = value  # its last residue
    found = pool(hidden, batch)
    assert found.finite is not None and found.finite.tolist() == only(segment)
    for key, rows in found.pooled.items():
        for i, kept in enumerate(only(segment)):
            if kept:
                assert torch.equal(rows[i], clean.pooled[key][i])


def test_opposite_infinities_do_not_hide_each_other(hidden: torch.Tensor, batch: PackedBatch) -> None:
    hidden[row_of(batch, 1, 1), 3] = torch.inf
    hidden[row_of(batch, 1, 2), 3] = -torch.inf
    for kinds in (("mean",), ("residue",)):
        found = Embeddings()
        Pooler(kinds, torch.float16).add(found, 1, hidden, batch)
        assert found.finite is not None and found.finite.tolist() == only(1)


def test_what_overflows_the_store_dtype_is_flagged(hidden: torch.Tensor, batch: PackedBatch) -> None:
    hidden[row_of(batch, 0, 7), 3] = 7e4  # above fp16's 65504; the mean of 300 residues is not
    hidden[row_of(batch, 2, 0), 3] = -7e4
    hidden[row_of(batch, 3, 1), 3] = 7e4  # the only residue
    expected = {"mean": only(3), "bos": only(2), "max": only(0, 3), "residue": only(0, 3)}
    for kind, finite in expected.items():
        found = Embeddings()
        Pooler((kind,), torch.float16).add(found, 1, hidden, batch)
        assert found.finite is not None and found.finite.tolist() == finite, kind
    found = pool(hidden, batch, torch.float32)
    assert found.finite is not None and bool(found.finite.all())


def test_a_flag_of_one_layer_is_not_lost_to_the_next(hidden: torch.Tensor, batch: PackedBatch) -> None:
    broken = hidden.clone()
    broken[row_of(batch, 4, 1), 0] = torch.nan
    for layers in ((broken, hidden), (hidden, broken)):
        found = Embeddings()
        for number, rows in enumerate(layers):
            Pooler(("mean",), torch.float16).add(found, number, rows, batch)
        assert found.finite is not None and found.finite.tolist() == only(4)


def test_filler_that_is_not_finite_flags_nobody(hidden: torch.Tensor, batch: PackedBatch) -> None:
    hidden[batch.used :] = torch.nan
    found = pool(hidden, batch)
    assert found.finite is not None and bool(found.finite.all())
    assert all(bool(rows.isfinite().all()) for rows in found.pooled.values())


@pytest.mark.parametrize("kind", POOLED)
def test_the_bits_of_a_pool_do_not_depend_on_the_company(kind: str, tmp_path: Path) -> None:
    generator = random.Random(5)
    probe = random_protein(333, generator)
    rows = torch.randn(335, D, generator=torch.Generator().manual_seed(7))
    found = []
    for before in ([], [10], [200, 200, 7]):
        batch = one_pack(tmp_path, [*(random_protein(n, generator) for n in before), probe], 1024)
        hidden = torch.randn(1024, D)
        start = int(batch.cu_seqlens[-2])
        hidden[start : start + 335] = rows
        found.append(pooling.POOLS[kind](hidden, batch)[-1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_every_kind_has_its_function() -> None:
    assert list(pooling.POOLS) == list(POOLED)
