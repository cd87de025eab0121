"""Batches of packs against the same batches built token by token."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from esm.data import Alphabet
from hypothesis import given
from hypothesis import strategies as st

from virnucpro_cli import fasta
from virnucpro_cli.batch import PackedBatch
from virnucpro_cli.engine.collate import VarlenCollator
from virnucpro_cli.errors import UserError
from virnucpro_cli.fasta import RecordTable
from virnucpro_cli.plan.packing import Segments, first_fit_decreasing, whole_segments, window_weights, windowed_segments

ESM = Alphabet.from_architecture("ESM-1b")
MANY = [1, 7, 30, 30, 55, 200, 2, 90, 33, 61, 5, 450] * 4


def read(path: Path) -> RecordTable:
    return fasta.index(fasta.open_sources([str(path)], path.parent))


def collator(table: RecordTable, budget: int, segments: Segments | None = None, cut: int = 10**6) -> VarlenCollator:
    embedded = np.minimum(table.length, cut)
    if segments is None:
        segments = whole_segments(np.arange(len(table)), table.length, cut)
    return VarlenCollator(table, segments, embedded, first_fit_decreasing(segments.length, budget))


def batches(collate: VarlenCollator) -> list[PackedBatch]:
    return [collate(pack) for pack in range(len(collate.plan))]


def naive(collate: VarlenCollator, pack: int) -> PackedBatch:
    """What the batch of this pack must be, one token after the other."""
    segments, embedded = collate.segments, collate.embedded
    numbers = collate.plan.pack(pack)
    tokens, positions, bounds, divisor, ratio, weights, lengths = [], [], [0], [], [], [], []
    any_window = False
    for number in numbers.tolist():
        record, start, n = (int(column[number]) for column in (segments.record, segments.start, segments.length))
        residues = collate.table.token_ids(np.array([record]))[0][start : start + n]
        ids = [ESM.cls_idx, *residues, ESM.eos_idx]
        tokens += ids
        positions += range(n + 2)
        bounds.append(len(tokens))
        lengths.append(n + 2)
        divisor.append(float(embedded[record]))
        ratio += [1 - ids.count(ESM.mask_idx) / len(ids)] * len(ids)
        own = [1.0] * n
        if n < embedded[record]:
            any_window = True
            siblings = np.flatnonzero(segments.record == record).tolist()
            starts = tuple(int(segments.start[sibling]) for sibling in siblings)
            own = window_weights(int(embedded[record]), starts, n)[siblings.index(number)].tolist()
        weights += [1.0, *own, 1.0]
    tiles = [[row, a, b] for a, b in pairwise(bounds) for row in range(a, b, 64)]
    filler = int(collate.plan.bucket[pack]) - len(tokens)
    assert filler >= 0
    any_mask = ESM.mask_idx in tokens
    return PackedBatch(
        torch.tensor(tokens + [ESM.padding_idx] * filler, dtype=torch.int32),
        torch.tensor(positions + [0] * filler, dtype=torch.int32),
        torch.tensor(bounds, dtype=torch.int32),
        torch.tensor(divisor, dtype=torch.float32),
        torch.tensor(tiles, dtype=torch.int32),
        torch.tensor(ratio + [1.0] * filler, dtype=torch.float32) if any_mask else None,
        torch.tensor(weights + [1.0] * filler, dtype=torch.float32) if any_window else None,
        numbers, np.array(lengths), max(lengths),
    )  # fmt: skip


def assert_as_built_by_hand(collate: VarlenCollator) -> None:
    assert len(collate.plan)
    for pack, found in enumerate(batches(collate)):
        expected = naive(collate, pack)
        for field in ("tokens", "positions", "cu_seqlens", "divisor", "query_tiles", "mask_ratio", "weights"):
            torch.testing.assert_close(
                getattr(found, field), getattr(expected, field), rtol=0, atol=1e-7, msg=lambda m, f=field: f"{f}: {m}"
            )
        assert found.segments.tolist() == expected.segments.tolist()
        assert found.seqlens.tolist() == expected.seqlens.tolist()
        assert found.max_seqlen == expected.max_seqlen
        assert found.used == int(expected.cu_seqlens[-1])


@pytest.mark.parametrize("lengths", [[50], [50, 20], [1], MANY], ids=["one", "two", "one residue", "many"])
@pytest.mark.parametrize("budget", [64, 1024, 16384])
def test_a_batch_is_its_segments_one_behind_the_other(
    make_fasta: Callable[..., Path], lengths: list[int], budget: int
) -> None:
    assert_as_built_by_hand(collator(read(make_fasta(lengths)), budget))


def test_a_batch_written_out(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMK\n>b\nacd*\n")
    (batch,) = batches(collator(read(tmp_path / "in.fasta"), 1024))
    assert batch.tokens[:10].tolist() == [0, 5, 23, 13, 2, 0, 20, 15, 2, 1]
    assert batch.positions[:10].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 9]
    assert batch.segments.tolist() == [1, 0]
    assert batch.divisor.tolist() == [3, 2]
    assert (batch.max_seqlen, batch.used) == (5, 9)
    assert (batch.mask_ratio, batch.weights) == (None, None)


def test_a_batch_has_as_many_rows_as_its_rung_and_only_filler_past_the_last_segment(
    make_fasta: Callable[..., Path],
) -> None:
    collate = collator(read(make_fasta(MANY)), 2048)
    for pack, batch in enumerate(batches(collate)):
        assert len(batch.tokens) == len(batch.positions) == collate.plan.bucket[pack]
        assert (batch.tokens[batch.used :] == ESM.padding_idx).all()
        assert not (batch.tokens[: batch.used] == ESM.padding_idx).any()


def test_every_residue_of_every_record_is_in_some_batch_once(make_fasta: Callable[..., Path]) -> None:
    table = read(make_fasta(MANY))
    found: dict[int, bytes] = {}
    for batch in batches(collator(table, 1024)):
        for segment, first, last in zip(
            batch.segments.tolist(), batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True
        ):
            assert segment not in found
            found[segment] = bytes(batch.tokens[first + 1 : last - 1].tolist())
    assert [found[record] for record in range(len(table))] == table.token_ids(np.arange(len(table)))


def test_a_long_record_is_cut_and_its_mean_divides_by_what_is_left(make_fasta: Callable[..., Path]) -> None:
    collate = collator(read(make_fasta([300, 40])), 1024, cut=100)
    assert_as_built_by_hand(collate)
    (batch,) = batches(collate)
    assert batch.seqlens.tolist() == [102, 42]
    assert batch.divisor.tolist() == [100, 40]
    assert batch.weights is None, "a cut record is no window"


def test_masks_scale_only_the_segments_that_hold_them(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMK<mask>LVAG<mask>\n>b\nMKV\n>c\n<mask>\n")
    collate = collator(read(tmp_path / "in.fasta"), 1024)
    assert_as_built_by_hand(collate)
    (batch,) = batches(collate)
    assert batch.mask_ratio is not None
    expected = [1 - 2 / 10] * 10 + [1] * 5 + [1 - 1 / 3] * 3 + [1] * (1024 - 18)
    torch.testing.assert_close(batch.mask_ratio, torch.tensor(expected), rtol=0, atol=1e-7)


def test_a_batch_without_masks_has_no_mask_ratio_even_if_its_neighbour_has(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(f">a\n{'MK' * 500}\n>b\n<mask>{'M' * 900}\n")
    first, second = batches(collator(read(tmp_path / "in.fasta"), 1024))
    assert first.mask_ratio is None
    assert second.mask_ratio is not None


@pytest.mark.parametrize("budget", [64, 1024])
def test_windows_carry_blending_weights_and_whole_records_weigh_one(
    make_fasta: Callable[..., Path], budget: int
) -> None:
    table = read(make_fasta([20, 130, 45, 60, 46, 5]))
    segments = windowed_segments(np.arange(6), table.length, 45, 10)
    collate = collator(table, budget, segments)
    assert_as_built_by_hand(collate)
    found = [np.zeros(length) for length in table.length]
    for batch in batches(collate):
        weights = torch.ones(len(batch.tokens)) if batch.weights is None else batch.weights
        for segment, first, last in zip(
            batch.segments.tolist(), batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True
        ):
            start, n = segments.start[segment], segments.length[segment]
            found[segments.record[segment]][start : start + n] += weights[first + 1 : last - 1].numpy()
    for total in found:
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_a_batch_of_whole_records_has_no_weights_even_if_its_neighbour_has(make_fasta: Callable[..., Path]) -> None:
    table = read(make_fasta([1000, 1010, 1500]))
    collate = collator(table, 1024, windowed_segments(np.arange(3), table.length, 1010, 0))
    has_weights = {int(batch.divisor[0]): batch.weights is not None for batch in batches(collate)}
    assert has_weights == {1000: False, 1010: False, 1500: True}


def test_masks_count_for_the_window_that_shows_them(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(f">a\n{'MKVLA' * 6}<mask><mask>\n")
    table = read(tmp_path / "in.fasta")
    collate = collator(table, 1024, windowed_segments(np.arange(1), table.length, 16, 0))
    assert_as_built_by_hand(collate)
    (batch,) = batches(collate)
    assert batch.mask_ratio is not None
    assert sorted(set(batch.mask_ratio.tolist())) == pytest.approx([1 - 2 / 18, 1])


def test_records_left_out_shift_nothing(make_fasta: Callable[..., Path]) -> None:
    table = read(make_fasta([30, 80, 20, 90, 10]))
    kept = np.array([1, 3, 4])
    assert_as_built_by_hand(collator(table, 256, windowed_segments(kept, table.length[kept], 32, 8)))


def test_a_batch_does_not_depend_on_what_was_collated_before(make_fasta: Callable[..., Path]) -> None:
    collate = collator(read(make_fasta(MANY)), 512)
    forwards = batches(collate)
    for pack in reversed(range(len(collate.plan))):
        assert torch.equal(collate(pack).tokens, forwards[pack].tokens)


def test_a_batch_moves_to_a_device_whole(make_fasta: Callable[..., Path]) -> None:
    (batch,) = batches(collator(read(make_fasta([30, 20])), 1024))
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.tokens, moved.positions, moved.cu_seqlens, moved.divisor)} == {"meta"}
    assert (moved.mask_ratio, moved.weights, moved.max_seqlen, moved.used) == (None, None, batch.max_seqlen, batch.used)


def test_a_file_that_changes_between_two_packs_is_an_error(make_fasta: Callable[..., Path]) -> None:
    path = make_fasta(MANY)
    collate = collator(read(path), 512)
    collate(0)
    with open(path, "a") as file:
        file.write(">late\nMKV\n")
    with pytest.raises(UserError, match=r"in\.fasta was changed"):
        collate(1)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 2000))
def test_parts_of_a_pack_keep_its_segments_and_their_order(lengths: list[int], tokens: int) -> None:
    segments = whole_segments(np.arange(len(lengths)), np.asarray(lengths, np.int64))
    plan = first_fit_decreasing(segments.length, 4096)
    collate = VarlenCollator(None, segments, segments.length, plan)  # type: ignore[arg-type]
    for pack in range(len(plan)):
        parts = collate.parts(pack, tokens)
        numbers = [plan.pack(part) if isinstance(part, int) else part for part in parts]
        assert np.concatenate(numbers).tolist() == plan.pack(pack).tolist()
        sizes = [int((segments.length[each] + 2).sum()) for each in numbers]
        assert all(size <= tokens or len(each) == 1 for size, each in zip(sizes, numbers, strict=True))
        assert (len(parts) == 1) == (sum(sizes) <= tokens or len(plan.pack(pack)) == 1)
        assert [p for part in parts for p in collate.parts(part, tokens)][-1] is parts[-1]
