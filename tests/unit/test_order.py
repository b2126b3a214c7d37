"""Claims about the order of samples: every sample once, found from any position, fair to ranks, mixed, and cheap."""

from __future__ import annotations

import re
import tracemalloc
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.data.order import PADDING, EpochOrder, check_global_batch, epoch_length, last_position
from dist_mlpl.errors import ConfigError
from shards.pack import cut_shards, packing_order

pytestmark = pytest.mark.unit


class Case(NamedTuple):
    """Arguments of an order, drawn at random."""

    shard_sizes: list[int]
    num_lanes: int
    window_samples: int
    group_size: int
    seed: int
    epoch: int

    def order(self) -> EpochOrder:
        return EpochOrder(
            self.shard_sizes,
            seed=self.seed,
            epoch=self.epoch,
            num_lanes=self.num_lanes,
            window_samples=self.window_samples,
            group_size=self.group_size,
        )


cases = st.builds(
    Case,
    shard_sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    num_lanes=st.integers(1, 9),
    window_samples=st.integers(1, 70),
    group_size=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
)


def lane_of(positions: npt.NDArray[np.int64], order: EpochOrder) -> npt.NDArray[np.int64]:
    return positions // order.group_size % order.num_lanes


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases)
def test_an_epoch_holds_every_sample_once(case: Case) -> None:
    found = case.order().indices(0, sum(case.shard_sizes))
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(sum(case.shard_sizes)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases, st.data())
def test_any_stretch_is_found_without_the_ones_before_it(case: Case, data: st.DataObject) -> None:
    num_samples = sum(case.shard_sizes)
    whole = case.order().indices(0, num_samples)
    start = data.draw(st.integers(0, num_samples))
    stop = data.draw(st.integers(start, num_samples))
    np.testing.assert_array_equal(case.order().indices(start, stop), whole[start:stop])
    anywhere = np.array(data.draw(st.lists(st.integers(-1, num_samples - 1), max_size=20)), dtype=np.int64)
    expected = np.where(anywhere == PADDING, PADDING, whole[anywhere])
    np.testing.assert_array_equal(case.order().at(anywhere), expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases)
def test_one_order_gives_the_same_however_it_is_cut_or_revisited(case: Case) -> None:
    num_samples = sum(case.shard_sizes)
    order = case.order()
    whole = order.indices(0, num_samples)
    for step in (1, 7, 64):
        pieces = [order.indices(begin, min(begin + step, num_samples)) for begin in range(0, num_samples, step)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    backwards = order.at(np.arange(num_samples)[::-1])
    np.testing.assert_array_equal(backwards[::-1], whole)


def windows_of(order: EpochOrder) -> list[tuple[int, int]]:
    """Lane and window, of all windows."""
    return [(lane, window) for lane in range(order.num_lanes) for window in range(order.num_windows(lane))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases)
def test_the_spans_of_all_windows_hold_every_sample_once_each_in_one_shard(case: Case) -> None:
    order, ends = case.order(), np.cumsum(case.shard_sizes)
    spans = [span for place in windows_of(order) for span in order.spans(*place)]
    held = [i for first, stop in spans for i in range(first, stop)]
    assert sorted(held) == list(range(sum(case.shard_sizes)))
    for first, stop in spans:
        assert first < stop
        assert np.searchsorted(ends, first, side="right") == np.searchsorted(ends, stop - 1, side="right")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases)
def test_the_positions_of_a_window_hold_the_samples_of_its_spans(case: Case) -> None:
    order, num_samples = case.order(), sum(case.shard_sizes)
    positions = np.arange(num_samples)
    found: dict[tuple[int, int], list[int]] = {place: [] for place in windows_of(order)}
    fractions: dict[tuple[int, int], list[float]] = {place: [] for place in found}
    for position, lane, index in zip(positions, lane_of(positions, order), order.at(positions), strict=True):
        window, used_fraction = order.window_at(int(position))
        found[int(lane), window].append(int(index))
        fractions[int(lane), window].append(used_fraction)
    for place, indices in found.items():
        assert sorted(indices) == sorted(i for span in order.spans(*place) for i in range(*span))
        assert fractions[place] == [number / len(indices) for number in range(len(indices))]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases, st.integers(1, 6), st.integers(0, 12), st.integers(0, 6), st.data())
def test_the_lanes_that_ranks_read_are_those_of_their_shares(
    case: Case, size: int, more_groups: int, first_group: int, data: st.DataObject
) -> None:
    order = case.order()
    global_batch, start = (size + more_groups) * case.group_size, first_group * case.group_size
    first = data.draw(st.integers(0, size - 1))
    ranks = range(first, data.draw(st.integers(first + 1, size)))
    found = order.lanes_read(start, global_batch, ranks=ranks, size=size)

    def lanes_until(stop: int) -> list[int]:
        lanes = set()
        for begin in range(start, stop, global_batch):
            for rank in ranks:
                share = order.share(begin, global_batch, rank=rank, size=size)
                lanes |= set(lane_of(share[share != PADDING], order).tolist())
        return sorted(lanes)

    assert found == lanes_until(start + 5 * order.num_lanes * global_batch)  # if the epoch were so long
    end = last_position(start, global_batch=global_batch, num_samples=max(start, order.num_samples))
    assert set(lanes_until(end)) <= set(found)


def test_seed_and_epoch_each_change_the_order() -> None:
    sizes = [50, 70, 30, 90]
    orders = {
        EpochOrder(sizes, seed=seed, epoch=epoch, num_lanes=2, window_samples=64).indices(0, 240).tobytes()
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_a_position_outside_the_epoch_is_an_error() -> None:
    order = EpochOrder([10], seed=0, epoch=0)
    for start, stop in ((0, 11), (-1, 3), (-2, -1), (3, 2)):
        with pytest.raises(IndexError):
            order.indices(start, stop)
    with pytest.raises(IndexError):
        order.at(np.array([-2]))
    assert order.indices(10, 10).tolist() == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases)
def test_a_group_comes_from_one_stretch_of_the_track_about_two_windows_long(case: Case) -> None:
    """One shard stands for the whole track, so indices are places on it, up to the turn."""
    num_samples = sum(case.shard_sizes)
    order = case._replace(shard_sizes=[num_samples]).order()
    found = order.indices(0, num_samples)
    for first in range(0, num_samples, case.group_size):
        places = np.sort(found[first : first + case.group_size])
        gaps = np.diff(np.append(places, places[0] + num_samples))
        span = num_samples - int(gaps.max()) + 1  # on the circle that the track is
        assert span <= 2 * case.window_samples + case.group_size


def test_few_shards_are_open_at_any_time_and_each_is_read_in_one_go() -> None:
    num_lanes, window, shard = 4, 100, 100
    order = EpochOrder([shard] * 80, seed=1, epoch=0, num_lanes=num_lanes, window_samples=window, group_size=4)
    shards = order.indices(0, 8000) // shard
    for start in range(0, 8000 - num_lanes * window, 100):
        assert len(set(shards[start : start + num_lanes * window].tolist())) <= num_lanes * 4
    for number in range(80):
        places = np.flatnonzero(shards == number)
        # A shard that lies across the border of two lanes is read at the end of one and at the start of the other.
        gaps = np.diff(places)
        assert (gaps > num_lanes * 2 * window).sum() <= 1
        assert places[-1] - places[0] <= num_lanes * 3 * window or (gaps > num_lanes * 2 * window).any()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases, st.integers(1, 8), st.integers(1, 5))
def test_ranks_share_a_step_in_whole_groups_without_loss_or_overlap(
    case: Case, world_size: int, groups_a_rank: int
) -> None:
    order = case.order()
    for num_groups in {world_size * groups_a_rank, world_size * groups_a_rank + world_size // 2}:
        global_batch = num_groups * case.group_size
        for start in (0, global_batch, 3 * case.group_size):
            shares = [order.share(start, global_batch, rank=rank, size=world_size) for rank in range(world_size)]
            assert len({share.shape for share in shares}) == 1
            real = [share[share != PADDING] for share in shares]
            assert sorted(np.concatenate(real).tolist()) == list(range(start, start + global_batch))
            counts = [len(part) // case.group_size for part in real]
            assert max(counts) - min(counts) <= 1
            for share, part in zip(shares, real, strict=True):
                np.testing.assert_array_equal(share[: len(part)], part)  # padding is at the end
                groups = part.reshape(-1, case.group_size)
                assert (groups[:, 0] % case.group_size == 0).all()
                np.testing.assert_array_equal(
                    groups - groups[:, :1], np.arange(case.group_size)[None].repeat(len(groups), 0)
                )


def test_with_a_multiple_of_the_lanes_in_a_step_a_lane_stays_with_its_rank() -> None:
    for num_lanes in (1, 3, 8, 12):
        order = EpochOrder([5000], seed=0, epoch=0, num_lanes=num_lanes, window_samples=64, group_size=4)
        assert order.num_lanes == num_lanes
        for multiple in (1, 2, 3):
            global_batch = num_lanes * multiple * 4
            for world_size in range(1, 9):
                if global_batch < 4 * world_size:
                    continue
                for rank in range(world_size):
                    shares = [
                        order.share(step * global_batch, global_batch, rank=rank, size=world_size) for step in range(4)
                    ]
                    lanes = [sorted(lane_of(share[share != PADDING], order).tolist()) for share in shares]
                    assert all(found == lanes[0] for found in lanes)
                    if multiple == 1 or num_lanes % world_size == 0:
                        expected = {lane for lane in range(num_lanes) if lane * world_size // num_lanes == rank}
                        assert set(lanes[0]) == expected


def test_a_share_depends_on_the_rank_and_the_whole_step_on_nothing() -> None:
    order = EpochOrder([1000, 500, 900], seed=3, epoch=1, num_lanes=5, window_samples=128, group_size=8)
    for start in (0, 64, 8 * 37):
        steps = set()
        for world_size in range(1, 9):
            shares = [order.at(order.share(start, 64, rank=r, size=world_size)) for r in range(world_size)]
            held = np.concatenate(shares)
            steps.add(tuple(sorted(held[held != PADDING].tolist())))
        assert steps == {tuple(sorted(order.indices(start, start + 64).tolist()))}


@pytest.mark.parametrize("option", [{"num_lanes": 0}, {"window_samples": 0}, {"group_size": -1}])
def test_an_order_without_lanes_windows_or_groups_is_a_config_error(option: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} {next(iter(option.values()))}"):
        EpochOrder([10], seed=0, epoch=0, **option)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 9), st.integers(1, 200))
def test_a_refused_global_batch_comes_with_one_that_works(
    global_batch: int, group_size: int, world_size: int, num_samples: int
) -> None:
    def check(batch: int, ranks: int = world_size) -> None:
        check_global_batch(batch, group_size=group_size, world_size=ranks, num_samples=num_samples)

    works = [b for b in range(1, num_samples + 1) if b % group_size == 0 and b >= group_size * world_size]
    if global_batch in works:
        check(global_batch)
        return
    with pytest.raises(ConfigError) as caught:
        check(global_batch)
    number = int(re.findall(r"\d+", caught.value.next_step)[0])
    if works:
        assert number in works
        assert abs(number - global_batch) == min(abs(batch - global_batch) for batch in works)
        check(number)
    elif "ranks" in caught.value.next_step:
        check(num_samples // group_size * group_size, number)
    else:
        assert num_samples < group_size
        check_global_batch(number, group_size=number, world_size=1, num_samples=num_samples)


def test_the_plan_of_an_epoch_ends_at_the_last_whole_step() -> None:
    assert last_position(0, global_batch=64, num_samples=200) == 192
    assert last_position(192, global_batch=64, num_samples=200) == 192
    assert last_position(64, global_batch=100, num_samples=200) == 164  # after a change of the batch
    assert last_position(0, global_batch=64, num_samples=63) == 0


def test_nine_million_samples_need_little_memory_and_no_full_permutation() -> None:
    num_samples, num_shards = 9_011_219, 9_000
    sizes = np.full(num_shards, num_samples // num_shards)
    sizes[: num_samples % num_shards] += 1
    shard_sizes = sizes.tolist()
    tracemalloc.start()
    try:
        order = EpochOrder(shard_sizes, seed=0, epoch=3)
        first = order.indices(0, 1)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # a permutation of all would take 72 MB
        for start in range(0, num_samples - 4096, 64 * 4096):
            order.indices(start, start + 4096)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert order.num_lanes == 64
    assert 0 <= int(first[0]) < num_samples
    assert len(np.unique(order.indices(0, 1 << 20))) == 1 << 20


def histogram_spread(labels: npt.NDArray[np.int64], batch: int, num_classes: int) -> float:
    """Chi-square per degree of freedom of the class counts of batches against the whole's."""
    share = np.bincount(labels, minlength=num_classes) / len(labels)
    batches = labels[: len(labels) // batch * batch].reshape(-1, batch)
    counts = np.stack([np.bincount(row, minlength=num_classes) for row in batches])
    expected = batch * share
    return float(((counts - expected) ** 2 / expected).sum() / (counts.shape[0] * (num_classes - 1)))


def test_windows_of_shards_as_they_are_packed_mix_600_classes_like_a_full_shuffle() -> None:
    num_samples, num_classes, batch = 300_000, 600, 1024
    random = np.random.default_rng(0)
    source = np.sort(random.integers(0, num_classes, num_samples))  # sorted by class at the source
    rows = packing_order(0, "train", np.arange(num_samples))
    sizes = random.integers(50_000, 250_000, num_samples)[rows]  # bytes
    shard_sizes = [part.stop - part.start for part in cut_shards(sizes, int(sizes.sum()) // 300 + 1)]
    assert len(shard_sizes) == 300
    order = EpochOrder(shard_sizes, seed=0, epoch=0, num_lanes=64, window_samples=1024, group_size=8)
    assert order.num_lanes == 64
    found = histogram_spread(source[rows][order.indices(0, num_samples)], batch, num_classes)
    shuffled = histogram_spread(source[random.permutation(num_samples)], batch, num_classes)
    assert 0.95 <= found / shuffled <= 1.05


def test_windows_of_sorted_shards_do_not_mix_which_is_why_packing_shuffles() -> None:
    num_samples, num_classes = 120_000, 600
    source = np.sort(np.random.default_rng(0).integers(0, num_classes, num_samples))
    order = EpochOrder([1000] * 120, seed=0, epoch=0, num_lanes=16, window_samples=1024)
    assert histogram_spread(source[order.indices(0, num_samples)], 256, num_classes) > 2


def test_a_mixture_gives_each_sample_its_weight_and_fractions_their_turn() -> None:
    random = np.random.default_rng(5)
    for _ in range(20):
        counts = random.integers(1, 6, size=int(random.integers(1, 4)))
        sizes = random.integers(1, 40, size=int(counts.sum())).tolist()
        weights = random.choice([0.25, 0.5, 1.0, 1.5, 2.0, 3.25], size=len(counts)).tolist()
        parts = list(zip(counts.tolist(), weights, strict=True))
        part_of = np.repeat(np.repeat(np.arange(len(counts)), counts), sizes)
        seen = np.zeros((4, sum(sizes)), dtype=int)
        for epoch in range(4):
            order = EpochOrder(sizes, seed=3, epoch=epoch, num_lanes=4, window_samples=16, group_size=4, parts=parts)
            assert order.num_samples == epoch_length(sizes, parts)
            seen[epoch] = np.bincount(order.indices(0, order.num_samples), minlength=sum(sizes))
            spans = [order.spans(lane, w) for lane in range(order.num_lanes) for w in range(order.num_windows(lane))]
            held = np.zeros(sum(sizes), dtype=int)
            for first, stop in (span for window in spans for span in window):
                held[first:stop] += 1
            assert (held == seen[epoch]).all()
        for part, weight in enumerate(weights):
            own = seen[:, part_of == part]
            assert own.min() >= int(weight)
            assert own.max() <= int(weight) + 1
            assert own[0].sum() == int(weight) * own.shape[1] + round((weight - int(weight)) * own.shape[1])
            whole = own.sum(axis=0)  # over four epochs: 0.25 of the samples had one more turn each time
            assert whole.max() - whole.min() <= 1


def test_one_data_set_of_weight_one_has_the_order_of_no_mixture() -> None:
    sizes = [7, 30, 12, 5]
    for epoch in range(3):
        plain, mixed = (EpochOrder(sizes, seed=1, epoch=epoch, parts=parts) for parts in (None, [(4, 1.0)]))
        assert (plain.indices(0, 54) == mixed.indices(0, 54)).all()
