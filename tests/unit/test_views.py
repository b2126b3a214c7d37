"""Partial-label views equal the published procedures, whatever order the shards hold the samples in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.data import views
from dist_mlpl.data.views import View
from dist_mlpl.errors import ConfigError, ManifestError
from tests.support import views as loops

pytestmark = pytest.mark.unit

RULES = [("bernoulli", 0.4), ("exact_count", 0.4), ("dense_subset", 0.4), ("single_positive", None)]


def packed_order(num_samples: int, seed: int) -> npt.NDArray[np.int64]:
    """A packing order: position in the manifest -> position in the source."""
    return np.random.default_rng(seed).permutation(num_samples)


def cut_sizes(num_samples: int, seed: int) -> list[int]:
    """Shard sizes that sum to N, empty shards among them."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, num_samples + 1, size=3))
    return np.diff([0, *cuts, num_samples]).tolist()


def make_view(
    source: npt.NDArray[np.int8],
    rule: str,
    fraction: float | None,
    *,
    seed: int | None = None,
    order: npt.NDArray[np.int64] | None = None,
    shard_sizes: list[int] | None = None,
    gaps: int = 1,
) -> View:
    """A view of `source`, (N, C) in source order, packed in `order`; source rows are spread `gaps` apart."""
    order = np.arange(len(source)) if order is None else order
    packed = source[order]
    return View(
        rule,
        fraction,
        seed,
        shard_sizes=[len(source)] if shard_sizes is None else shard_sizes,
        source_rows=(order * gaps + 5).astype(np.uint64),
        targets_of=lambda start, stop: packed[start:stop],
        num_classes=source.shape[1],
    )


def seen(view: View, source: npt.NDArray[np.int8], order: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int8]:
    """What a run sees through the view, in source order."""
    order = np.arange(len(source)) if order is None else order
    result = np.empty_like(source)
    result[order] = view.apply(source[order], np.arange(len(source)))
    return result


def expected(source: npt.NDArray[np.int8], rule: str, percent: int, seed: int) -> npt.NDArray[np.int8]:
    oracles: dict[str, Callable[[], npt.NDArray[np.int8]]] = {
        "bernoulli": lambda: loops.bernoulli(source, percent / 100, seed),
        "exact_count": lambda: loops.exact_count(source, percent, seed),
        "dense_subset": lambda: loops.dense_subset(source, percent / 100, seed),
        "single_positive": lambda: loops.single_positive(source, seed),
    }
    return oracles[rule]()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from([rule for rule, _ in RULES]),
    percent=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
    num_samples=st.integers(0, 40),
    num_classes=st.integers(1, 21),
    block_entries=st.sampled_from([1, 37, 4_000_000]),
    case=st.integers(0, 10_000),
)
def test_every_rule_equals_its_loop_in_any_packing_order_and_block_size(
    rule: str, percent: int, seed: int, num_samples: int, num_classes: int, block_entries: int, case: int
) -> None:
    source = loops.random_targets(num_samples, num_classes, seed=case)
    order, shard_sizes = packed_order(num_samples, case), cut_sizes(num_samples, case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "_BLOCK_ENTRIES", block_entries)
        fraction = None if rule == "single_positive" else percent / 100
        view = make_view(source, rule, fraction, seed=seed, order=order, shard_sizes=shard_sizes, gaps=3)
    kept = expected(source, rule, percent, seed)
    np.testing.assert_array_equal(seen(view, source, order), kept)
    assert view.num_hidden == np.count_nonzero(source) - np.count_nonzero(kept)
    assert view.digest == loops.digest(source[order], kept[order], shard_sizes)


def test_row_blocks_of_the_bernoulli_draw_equal_one_call_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_BLOCK_ENTRIES", 7 * 80)
    source = loops.random_targets(500, 80, seed=1, unknown=0.0)
    view = make_view(source, "bernoulli", 0.1)
    np.testing.assert_array_equal(seen(view, source), loops.bernoulli(source, 0.1, 0))


def test_the_kept_count_of_the_voc_sized_benchmark_mask_is_pinned() -> None:
    source = np.ones((5011, 20), dtype=np.int8)
    view = make_view(source, "bernoulli", 0.1)
    assert 5011 * 20 - view.num_hidden == np.count_nonzero(np.random.RandomState(0).random_sample((5011, 20)) < 0.1)
    assert 5011 * 20 - view.num_hidden == 10_108


@pytest.mark.parametrize("rule", ["bernoulli", "exact_count", "dense_subset"])
def test_smaller_fractions_are_nested_in_larger_ones(rule: str) -> None:
    source = loops.random_targets(200, 20, seed=2)
    known = [seen(make_view(source, rule, percent / 100), source) != 0 for percent in range(10, 101, 10)]
    for smaller, larger in pairwise(known):
        assert not (smaller & ~larger).any()
        assert larger.sum() > smaller.sum()


def test_exact_count_keeps_the_same_number_in_every_image() -> None:
    source = loops.random_targets(50, 20, seed=3, unknown=0.0)
    known = seen(make_view(source, "exact_count", 0.1), source) != 0
    assert (known.sum(axis=1) == 2).all()


@pytest.mark.parametrize("num_classes", [1, 3, 20, 80, 200, 601])
def test_exact_count_drops_what_whole_percents_say_without_binary_error(num_classes: int) -> None:
    source = np.ones((1, num_classes), dtype=np.int8)
    for percent in range(1, 101):
        view = make_view(source, "exact_count", percent / 100)
        assert view.num_hidden == (100 - percent) * num_classes // 100


@pytest.mark.parametrize("rule", ["bernoulli", "exact_count", "dense_subset"])
def test_the_whole_fraction_hides_nothing(rule: str) -> None:
    source = loops.random_targets(30, 9, seed=4)
    view = make_view(source, rule, 1.0)
    assert view.num_hidden == 0
    np.testing.assert_array_equal(seen(view, source), source)


def test_an_image_without_a_positive_keeps_nothing_and_draws_nothing() -> None:
    source = loops.random_targets(12, 6, seed=5, unknown=0.0)
    without = source.copy()
    without[4] = -1
    shorter = np.delete(without, 4, axis=0)
    through = seen(make_view(without, "single_positive", None), without)
    assert not through[4].any()
    np.testing.assert_array_equal(
        np.delete(through, 4, axis=0), seen(make_view(shorter, "single_positive", None), shorter)
    )


def test_every_positive_is_kept_equally_often() -> None:
    source = np.tile(np.array([1, -1, 1, 0, 1, 1], dtype=np.int8), (8000, 1))
    counts = (seen(make_view(source, "single_positive", None), source) == 1).sum(axis=0)
    assert counts[[1, 3]].sum() == 0
    chi_square = ((counts[[0, 2, 4, 5]] - 2000.0) ** 2 / 2000.0).sum()
    assert chi_square < 16.3  # 0.999 quantile, 3 degrees of freedom


@pytest.mark.parametrize(("rule", "fraction"), RULES)
def test_labels_seen_are_source_labels_or_unknown(rule: str, fraction: float | None) -> None:
    source = loops.random_targets(60, 11, seed=6)
    through = seen(make_view(source, rule, fraction), source)
    assert ((through == source) | (through == 0)).all()


@pytest.mark.parametrize(("rule", "fraction"), RULES)
def test_packing_order_changes_the_digest_and_not_what_is_seen(rule: str, fraction: float | None) -> None:
    source = loops.random_targets(40, 7, seed=7)
    order = packed_order(40, 8)
    plain, packed = make_view(source, rule, fraction), make_view(source, rule, fraction, order=order)
    np.testing.assert_array_equal(seen(plain, source), seen(packed, source, order))
    assert plain.num_hidden == packed.num_hidden
    assert plain.digest != packed.digest


def test_the_digest_depends_on_shard_bounds_and_seed_and_is_pinned() -> None:
    source = loops.random_targets(40, 7, seed=9)
    digests = {
        make_view(source, "bernoulli", 0.5).digest,
        make_view(source, "bernoulli", 0.5, shard_sizes=[10, 30]).digest,
        make_view(source, "bernoulli", 0.5, shard_sizes=[30, 10]).digest,
        make_view(source, "bernoulli", 0.5, seed=1).digest,
    }
    assert len(digests) == 4
    fixed = np.array([[1, -1, 0], [0, 1, 1]], dtype=np.int8)
    assert (
        make_view(fixed, "single_positive", None).digest
        == "1d8266d2dc6cf29f0f971f817b087f33e05bfae4ba976deb094057c215f95742"
    )


@pytest.mark.parametrize(("rule", "fraction"), RULES)
def test_no_seed_means_the_customary_one(rule: str, fraction: float | None) -> None:
    source = loops.random_targets(40, 7, seed=10)
    customary = 1 if rule == "exact_count" else 0
    assert make_view(source, rule, fraction).seed == customary
    assert make_view(source, rule, fraction).digest == make_view(source, rule, fraction, seed=customary).digest


def test_apply_takes_any_samples_in_any_order_and_leaves_its_input_alone() -> None:
    source = loops.random_targets(25, 10, seed=11)
    view = make_view(source, "bernoulli", 0.3)
    indices = np.array([7, 3, 3, 24, 0])
    before = source[indices]
    targets = before.copy()
    np.testing.assert_array_equal(view.apply(targets, indices), loops.bernoulli(source, 0.3, 0)[indices])
    np.testing.assert_array_equal(targets, before)
    assert view.apply(targets, indices).dtype == np.int8
    np.testing.assert_array_equal(view.hidden(indices), (before != 0) & (view.apply(before, indices) == 0))


def test_more_than_a_thousand_million_entries_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="smaller"):
        View(
            "bernoulli",
            0.1,
            None,
            shard_sizes=[1_000_001],
            source_rows=np.arange(1_000_001, dtype=np.uint64),
            targets_of=lambda start, stop: pytest.fail("no label may be read"),
            num_classes=1000,
        )


@pytest.mark.parametrize(
    ("rule", "fraction"),
    [("bernoulli", None), ("bernoulli", 0.0), ("exact_count", 1.5), ("dense_subset", -0.1), ("single_positive", 0.5)],
)
def test_a_fraction_the_rule_cannot_take_is_refused(rule: str, fraction: float | None) -> None:
    with pytest.raises(ConfigError, match="known_fraction"):
        make_view(np.ones((2, 2), dtype=np.int8), rule, fraction)


def test_an_unknown_rule_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="'single_positive'"):
        make_view(np.ones((2, 2), dtype=np.int8), "single", 0.5)


@pytest.mark.parametrize("source_rows", [[0, 1, 1], [0, 1]])
def test_source_rows_that_repeat_or_do_not_fit_are_refused(source_rows: list[int]) -> None:
    with pytest.raises(ManifestError, match="source row"):
        View(
            "bernoulli",
            0.5,
            None,
            shard_sizes=[3],
            source_rows=np.array(source_rows, dtype=np.uint64),
            targets_of=lambda start, stop: np.ones((stop - start, 2), dtype=np.int8),
            num_classes=2,
        )
