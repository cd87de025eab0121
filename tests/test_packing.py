"""Lengths to segments to packs: laws that hold for all inputs, and the packs of a real length distribution."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import read_fasta
from virnucpro_cli.plan.packing import (
    SPECIAL_TOKENS,
    Segments,
    buckets,
    first_fit_decreasing,
    in_blocks,
    numbers_below,
    subset,
    whole_segments,
    window_weights,
    windowed_segments,
    worst_first,
)

UNIPROT = Path(__file__).parent / "data" / "uniprot_5k.fasta.gz"

budgets = st.one_of(st.integers(2, 60), st.integers(1000, 5000))
lengths_lists = st.one_of(
    st.lists(st.integers(0, 50), max_size=60),
    st.lists(st.sampled_from([1, 2, 3, 20]), max_size=60),  # many ties
    st.lists(st.integers(0, 6000), max_size=40),
)
windows = st.integers(1, 40).flatmap(lambda window: st.tuples(st.just(window), st.integers(0, window - 1)))


def naive_first_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    rooms: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        cost = lengths[number] + 2
        fitting = [pack for pack, room in enumerate(rooms) if room >= cost]
        if not fitting:
            packs.append([])
            rooms.append(budget)
        pack = fitting[0] if fitting else -1
        packs[pack].append(number)
        rooms[pack] -= cost
    return packs


@given(lengths_lists, budgets)
def test_packs_are_those_of_the_textbook_algorithm(lengths: list[int], budget: int) -> None:
    plan = first_fit_decreasing(np.array(lengths, np.int64), budget)
    assert [plan.pack(i).tolist() for i in range(len(plan))] == naive_first_fit_decreasing(lengths, budget)


@given(lengths_lists, budgets, st.integers(1, 12))
def test_blocks_hold_every_segment_once_in_packs_that_fit(lengths: list[int], budget: int, block: int) -> None:
    plan = in_blocks(np.array(lengths, np.int32), budget, block)
    assert sorted(plan.segments.tolist()) == list(range(len(lengths)))
    tokens = [int(sum(lengths[s] + 2 for s in plan.pack(i).tolist())) for i in range(len(plan))]
    assert plan.tokens.tolist() == tokens
    assert all(used <= max(budget, lengths[plan.pack(i)[0]] + 2) for i, used in enumerate(tokens))
    assert (plan.bucket >= plan.tokens).all() and (np.diff(plan.offsets) > 0).all()
    if len(lengths) < 2 * block:
        whole = first_fit_decreasing(np.array(lengths, np.int32), budget)
        assert (whole.segments == plan.segments).all() and (whole.offsets == plan.offsets).all()


def test_what_is_longer_than_the_budget_comes_first_of_all_blocks() -> None:
    lengths = np.random.default_rng(0).integers(60, 166, 2000)
    lengths[[1500, 900]] = 35_000, 9_000
    plan = in_blocks(lengths, 4096, 100)
    assert plan.pack(0).tolist() == [1500] and plan.pack(1).tolist() == [900]


def test_packs_that_nothing_fits_into_any_more_are_not_carried_on() -> None:
    """150 residues at a budget of 2048: 13 in a pack, .965 of it, and no better pack to be had."""
    plan = in_blocks(np.full(5000, 150), 2048, 130)
    assert all(np.ptp(plan.pack(i)) < 200 for i in range(len(plan)))


def test_numbers_are_kept_in_32_bits_where_they_fit_and_computed_with_in_64() -> None:
    assert [numbers_below(n) for n in (5000, 1 << 31, (1 << 31) + 1)] == [np.int32, np.int32, np.int64]
    plan = in_blocks(np.full(5000, 150), 2048, 130)
    assert plan.segments.dtype == np.int32 and plan.pack(0).dtype == np.int64
    segments = windowed_segments(np.array([1, 3], np.int32), np.array([10, 95]), 30, 10)
    first, last = segments.bounds_of(np.array([1, 2, 3]))
    assert (first.tolist(), last.tolist()) == ([0, 1, 1], [1, 1, 6]) and segments.record.dtype == np.int32


@pytest.mark.parametrize(("low", "high", "budget"), [(60, 166, 131072), (60, 166, 16384), (30, 1023, 32768)])
def test_blocks_cost_no_density_and_keep_neighbours_together(low: int, high: int, budget: int) -> None:
    lengths = np.random.default_rng(0).integers(low, high, 200_000)
    block = 1 << 14
    plan, whole = in_blocks(lengths, budget, block), first_fit_decreasing(lengths, budget)
    assert len(plan) <= len(whole) * 1.001 + 1
    spread = [int(np.ptp(plan.pack(i))) for i in range(len(plan))]
    assert np.quantile(spread, 0.9) <= 2 * block, "all but those of the left-overs"


@given(lengths_lists, budgets)
def test_every_segment_is_in_exactly_one_pack(lengths: list[int], budget: int) -> None:
    plan = first_fit_decreasing(np.array(lengths, np.int32), budget)
    assert sorted(plan.segments.tolist()) == list(range(len(lengths)))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(lengths)
    assert (np.diff(plan.offsets) > 0).all(), "a pack is never empty"


@given(lengths_lists, budgets)
def test_only_a_segment_longer_than_the_budget_exceeds_it_and_alone(lengths: list[int], budget: int) -> None:
    plan = first_fit_decreasing(np.array(lengths, np.int64), budget)
    for i in range(len(plan)):
        tokens = sum(lengths[number] + SPECIAL_TOKENS for number in plan.pack(i))
        assert plan.tokens[i] == tokens
        assert tokens <= budget or len(plan.pack(i)) == 1


@given(lengths_lists, budgets)
def test_the_rows_of_a_pack_cover_its_tokens_and_are_a_rung(lengths: list[int], budget: int) -> None:
    plan = first_fit_decreasing(np.array(lengths, np.int64), budget)
    ladder = buckets(budget)
    for tokens, bucket in zip(plan.tokens.tolist(), plan.bucket.tolist(), strict=True):
        assert bucket >= tokens
        if tokens <= ladder[-1]:
            assert bucket == min(step for step in ladder if step >= tokens)
        else:
            assert bucket % 1024 == 0 and bucket - tokens < 1024


def test_a_pack_that_fills_a_rung_stays_on_it() -> None:
    tokens_to_bucket = {1023: 1024, 1024: 1024, 1025: 2048, 4096: 4096, 4097: 5120, 5120: 5120, 5121: 6144}
    for tokens, bucket in tokens_to_bucket.items():
        assert first_fit_decreasing(np.array([tokens - SPECIAL_TOKENS]), 4096).bucket.tolist() == [bucket]


def test_the_ladder_doubles_up_to_the_budget_itself() -> None:
    assert buckets(16384) == [1024, 2048, 4096, 8192, 16384]
    assert buckets(5000) == [1024, 2048, 4096, 5000]
    assert buckets(1024) == [1024]
    assert buckets(10) == [1024], "results are batch-invariant from 1024 rows up only"


@given(lengths_lists, budgets)
def test_density_is_used_rows_over_computed_rows(lengths: list[int], budget: int) -> None:
    plan = first_fit_decreasing(np.array(lengths, np.int64), budget)
    used = sum(lengths) + 2 * len(lengths)
    assert plan.density == (pytest.approx(used / plan.bucket.sum()) if lengths else 0)
    if len(plan) > 1:
        last = sum(lengths[number] + 2 for number in plan.pack(len(plan) - 1))
        assert plan.density_without_last == pytest.approx((used - last) / plan.bucket[:-1].sum())


def test_five_thousand_proteins_of_uniprot_fill_127_packs() -> None:
    lengths = np.array([len(sequence) for _, sequence in read_fasta(UNIPROT)])
    assert len(lengths) == 5000
    segments = whole_segments(np.arange(5000), lengths, longest=1022)
    plan = first_fit_decreasing(segments.length, 16384)
    assert len(plan) == 127 == -(-int(plan.tokens.sum()) // 16384), "no plan can have fewer"
    assert plan.density_without_last > 0.999


@given(st.lists(st.integers(0, 5000), max_size=30), st.integers(1, 3000))
def test_a_whole_segment_is_the_record_cut_after_the_longest(lengths: list[int], longest: int) -> None:
    records = np.arange(len(lengths)) * 3
    uncut = whole_segments(records, np.array(lengths, np.int32))
    cut = whole_segments(records, np.array(lengths, np.int32), longest)
    assert uncut.length.tolist() == lengths
    assert cut.length.tolist() == [min(length, longest) for length in lengths]
    assert cut.record.tolist() == uncut.record.tolist() == records.tolist()
    assert not cut.start.any() and not uncut.start.any()


def of_record(segments: Segments, record: int) -> list[tuple[int, int]]:
    return [
        (int(a), int(n))
        for r, a, n in zip(segments.record, segments.start, segments.length, strict=True)
        if r == record
    ]


@given(st.lists(st.integers(0, 300), max_size=8), windows)
def test_windows_cover_every_residue_and_overlap_enough(lengths: list[int], shape: tuple[int, int]) -> None:
    window, overlap = shape
    segments = windowed_segments(np.arange(len(lengths)), np.array(lengths, np.int32), window, overlap)
    assert segments.record.tolist() == sorted(segments.record.tolist())
    for record, total in enumerate(lengths):
        pieces = of_record(segments, record)
        if total <= window:
            assert pieces == [(0, total)]
            continue
        assert {length for _, length in pieces} == {window}
        starts = [start for start, _ in pieces]
        assert starts[0] == 0 and starts[-1] == total - window
        steps = np.diff(starts)
        assert (steps > 0).all() and (steps <= window - overlap).all()
        assert steps.max() - steps.min() <= 1, "windows are spread evenly"
        assert len(pieces) == 1 + -(-(total - window) // (window - overlap)), "and are as few as can be"


@given(st.integers(1, 300), windows)
def test_the_weights_of_all_windows_sum_to_one_at_every_residue(beyond: int, shape: tuple[int, int]) -> None:
    window, overlap = shape
    total = window + beyond
    segments = windowed_segments(np.array([7]), np.array([total]), window, overlap)
    found = np.zeros(total)
    weights = window_weights(total, tuple(segments.start.tolist()), window)
    for start, weight in zip(segments.start, weights, strict=True):
        assert weight.dtype == np.float32 and (weight > 0).all()
        found[start : start + window] += weight
    np.testing.assert_allclose(found, 1, atol=1e-6)


def test_the_edge_of_a_window_weighs_less_than_the_middle_of_its_neighbour() -> None:
    first, second = window_weights(15, (0, 5), 10)
    assert (first[:5] == 1).all() and (second[5:] == 1).all()
    assert (np.diff(first[5:]) < 0).all() and (np.diff(second[:5]) > 0).all()


def test_window_starts_do_not_overflow_in_the_longest_record_that_fits() -> None:
    segments = windowed_segments(np.array([0]), np.array([2**31 - 1], np.int32), 1 << 20, 256)
    assert segments.start[-1] == 2**31 - 1 - (1 << 20)
    assert (np.diff(segments.start) > 0).all()


@given(lengths_lists, budgets, st.data())
def test_a_subset_is_the_packs_that_hold_a_wanted_segment(lengths: list[int], budget: int, data: st.DataObject) -> None:
    plan = first_fit_decreasing(np.array(lengths, np.int64), budget)
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))), np.bool_)
    assert subset(plan, wanted).tolist() == [i for i in range(len(plan)) if any(wanted[s] for s in plan.pack(i))]
    chosen = subset(plan, wanted)
    tried = worst_first(plan, chosen, np.asarray(lengths, np.int64)).tolist()
    assert sorted(tried) == chosen.tolist() and tried[1:] == sorted(tried[1:])
    needs = [(plan.bucket[i], max(lengths[s] for s in plan.pack(i))) for i in tried]
    assert all(needs[0] >= other for other in needs)
