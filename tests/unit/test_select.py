"""Claims about which answers are believed: every strategy and guard against loops over dense scores."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_mlpl.curriculum import caps
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import (
    NUM_KEYS,
    NUM_SIGNED_BINS,
    Candidates,
    class_cuts,
    fraction_cut,
    key_above,
    key_from,
    keys_of,
    rounded,
    signed_bins,
    value_of,
)
from dist_mlpl.errors import ConfigError
from dist_mlpl.rounds import commit as round_commit
from tests.support.relabelling import beliefs_of, expected_beliefs, round_from_table
from tests.support.views import random_targets

pytestmark = pytest.mark.unit

N, C = 23, 6
SHARDS = [9, 1, 13]

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "score_threshold"},
    {"strategy": "score_threshold", "threshold": 0.0},
    {"strategy": "ensemble", "threshold": 0.5},
    {"strategy": "positive_only", "threshold": 0.7},
    {"strategy": "uncertainty", "max_variance": 0.25},
    {"strategy": "score_fraction", "fraction": 0.3},
    {"strategy": "score_fraction", "fraction": 1.0},
    {"strategy": "class_precision", "precision": 0.6, "min_known": 3},
    {"strategy": "class_precision", "precision": 0.9, "min_known": 40},
]
GUARDS: list[dict[str, Any]] = [
    {}, {"max_per_image": 1}, {"max_per_class": 2}, {"prior_quota": 0.7},
    {"max_per_image": 2, "max_per_class": 3, "prior_quota": 1.5},
]  # fmt: skip


def table(seed: int, *, has_ties: bool) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Scores, variances, targets and which images decode; with ties, few different scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2.0 * torch.randn(N, C, generator=generator)
    variances = torch.rand(N, C, generator=generator)
    if has_ties:
        scores, variances = (scores * 2).round() / 2, (variances * 8).round() / 8
    targets = random_targets(N, C, seed=seed, unknown=0.6, present=0.2)
    return scores, variances, targets, torch.rand(N, generator=generator).numpy() > 0.1


@pytest.fixture(autouse=True)
def several_pieces_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_commit, "piece_samples", lambda num_samples: 8)


@pytest.mark.parametrize("num_samples", [1, 31, 1680, 82_783, 1_700_000, 9_011_219])
def test_pieces_are_whole_blocks_and_neither_too_few_nor_too_many(
    num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    length = round_commit.piece_samples(num_samples)
    assert length % 32 == 0
    assert 256 <= length <= 4096
    assert num_samples // length <= 2200


def test_work_is_dealt_in_order_and_nearly_even() -> None:
    sizes = [40, 256, 256, 17, 256, 256, 256, 3]
    for world_size in (1, 2, 3, 5, 20):
        dealt = round_commit.deal(range(8), sizes, world_size=world_size)
        assert [thing for own in dealt for thing in own] == list(range(8))
        loads = [sum(sizes[thing] for thing in own) for own in dealt]
        assert max(loads) <= sum(sizes) / world_size + 256


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda keys: "-".join(map(str, keys.values())))
@pytest.mark.parametrize("guard", GUARDS, ids=lambda keys: "-".join(keys) or "free")
def test_a_round_believes_what_loops_over_dense_scores_believe(
    strategy: dict[str, Any], guard: dict[str, Any], tmp_path: Path
) -> None:
    settings = CurriculumSettings(**strategy, **guard)
    for seed in (1, 2):
        scores, variances, targets, valid = table(seed, has_ties=seed == 2)
        spread = variances if settings.strategy == "uncertainty" else None
        run = tmp_path / str(seed)
        commit = round_from_table(run, settings, scores, targets, shard_sizes=SHARDS, variances=spread, valid=valid)
        expected = expected_beliefs(settings, scores, targets, variances=spread, valid=valid)
        assert beliefs_of(run, commit, SHARDS, C) == expected
        assert commit.counts["num_present"] == sum(value > 0 for value in expected.values())
        assert commit.counts["num_samples"] == valid.sum()
        assert commit.counts["num_undecodable"] == (~valid).sum()


@pytest.mark.parametrize("is_cumulative", [False, True])
@pytest.mark.parametrize("agree_rounds", [1, 2, 3])
@pytest.mark.parametrize("cap", [{}, {"max_per_class": 2}])
def test_rounds_in_a_row_keep_and_agree_as_loops_say(
    is_cumulative: bool, agree_rounds: int, cap: dict[str, int], tmp_path: Path
) -> None:
    settings = CurriculumSettings(
        strategy="score_threshold", threshold=0.5, cumulative=is_cumulative, agree_rounds=agree_rounds, **cap
    )
    targets = random_targets(N, C, seed=5, unknown=0.6, present=0.2)
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(N, C, generator=generator)
    signs: list[dict[tuple[int, int], int]] = []
    before: dict[tuple[int, int], int] = {}
    for _ in range(4):
        scores = base + 0.5 * torch.randn(N, C, generator=generator)
        commit = round_from_table(tmp_path, settings, scores, targets, shard_sizes=SHARDS)
        kept = {at: value for at, value in before.items() if value} if is_cumulative else {}
        expected = expected_beliefs(settings, scores, targets, earlier=signs, kept=kept)
        found = beliefs_of(tmp_path, commit, SHARDS, C)
        assert found == expected
        assert commit.counts["num_kept"] == len(kept)
        now = {at: 1 if scores[at] >= 0 else -1 for at in found}
        signs, before = [{at: kept.get(at, now[at]) for at in found}, *signs], found


def test_score_fraction_takes_exactly_its_share_of_all_unknown_labels(tmp_path: Path) -> None:
    scores = torch.zeros(N, C)  # all alike: order alone decides
    targets = random_targets(N, C, seed=3, unknown=0.5)
    num_unknown = int((targets == 0).sum())
    for number, fraction in enumerate((0.1, 0.37, 0.5, 1.0)):
        settings = CurriculumSettings(strategy="score_fraction", fraction=fraction)
        commit = round_from_table(tmp_path / str(number), settings, scores, targets, shard_sizes=SHARDS)
        assert commit.counts["num_present"] == round(fraction * num_unknown)


def test_magnitudes_of_float16_are_counted_without_loss() -> None:
    keys = np.arange(NUM_KEYS, dtype=np.uint16)
    values = keys.view(np.float16)
    assert np.isfinite(values).all()
    assert (np.diff(values.astype(np.float64)) > 0).all()
    assert (keys_of(values) == keys).all()
    assert (keys_of(rounded(torch.from_numpy(-values.astype(np.float32)))) == keys).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 2.0, 2.0001, 5.0, 65504.0])
def test_a_threshold_falls_between_two_magnitudes(value: float) -> None:
    magnitudes = np.arange(NUM_KEYS, dtype=np.uint16).view(np.float16).astype(np.float64)
    assert key_from(value) == int((magnitudes < value).sum())
    assert key_above(value) == int((magnitudes <= value).sum())


def test_bins_rise_with_the_score_and_zero_begins_the_upper_half() -> None:
    scores = np.sort(rounded(3.0 * torch.randn(2000, generator=torch.Generator().manual_seed(1))))
    bins = signed_bins(scores)
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < NUM_SIGNED_BINS
    assert ((bins >= NUM_SIGNED_BINS // 2) == (scores >= 0)).all()
    assert signed_bins(rounded(torch.tensor([-0.0])))[0] == NUM_SIGNED_BINS // 2


def test_scores_beyond_float16_become_its_largest() -> None:
    assert rounded(torch.tensor([1e6, -1e6])).tolist() == [65504.0, -65504.0]


def test_a_global_cut_leaves_as_many_as_asked() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = np.where(generator.random(NUM_KEYS) < 0.01, generator.integers(0, 40, NUM_KEYS), 0)
        fraction = float(generator.uniform(0.001, 1.0))
        cut = fraction_cut(counts, fraction)
        wanted = round(fraction * counts.sum())
        assert counts[cut.key + 1 :].sum() + cut.num_at_key == wanted
        assert 0 <= cut.num_at_key <= (counts[cut.key] if cut.key < NUM_KEYS else 0)


def test_precision_of_labels_of_one_kind_cannot_be_measured() -> None:
    counts = np.zeros((2, 2, NUM_SIGNED_BINS), dtype=np.int32)
    counts[:, 1, 700] = 5
    with pytest.raises(ConfigError, match="precision"):
        class_cuts(counts, precision=0.9, min_known=1)


@pytest.mark.parametrize("num_classes", [1, 31, 32, 33, 75])  # thresholds are found for 32 classes at a time
def test_class_thresholds_are_the_lowest_edges_at_which_answers_were_right_often_enough(num_classes: int) -> None:
    generator = np.random.default_rng(num_classes)
    precision, min_known, middle = 0.7, 30, NUM_SIGNED_BINS // 2
    counts = np.zeros((num_classes, 2, NUM_SIGNED_BINS), dtype=np.int32)
    for column in range(num_classes):  # of various precision; some classes with few known labels
        for _ in range(int(generator.integers(0, 120))):
            code = int(generator.integers(0, 2))
            spread = generator.normal(60.0 * (2 * code - 1), 40.0 + 4 * column)
            counts[column, code, int(np.clip(middle + spread, 0, NUM_SIGNED_BINS - 1))] += 1
    cuts = class_cuts(counts, precision=precision, min_known=min_known)

    def threshold(answers: list[tuple[int, int]]) -> int:
        """Lowest bin from the middle on; answers are (wrong, right) from the middle outwards."""
        for first in range(middle):
            wrong, right = (sum(pair[side] for pair in answers[first:]) for side in (0, 1))
            if right > 0 and right >= precision * (wrong + right):
                return first
        return middle

    sides = []
    for code, bins in ((1, range(middle, NUM_SIGNED_BINS)), (0, range(middle - 1, -1, -1))):
        by_class = [[(int(one[1 - code, b]), int(one[code, b])) for b in bins] for one in counts]
        of_all = threshold([tuple(map(sum, zip(*pairs, strict=True))) for pairs in zip(*by_class, strict=True)])  # type: ignore[misc]
        enough = [sum(map(sum, answers)) >= min_known for answers in by_class]
        sides.append([threshold(own) if is_own else of_all for own, is_own in zip(by_class, enough, strict=True)])
        if num_classes > 1:
            assert any(enough)
            assert not all(enough)
    assert (cuts.present - middle).tolist() == sides[0]
    assert (middle - cuts.absent).tolist() == sides[1]


def test_quotas_are_those_of_shares_that_few_labels_hardly_move() -> None:
    """Four labels with the share of all classes, 1 present to 4 absent, are added to each class's own."""
    settings = CurriculumSettings(strategy="score_threshold", prior_quota=0.5)
    nothing = np.zeros((4, 2), dtype=np.int64)
    known = np.array([[0, 0], [0, 1], [1, 0], [79, 19]])
    found = caps.class_limits(
        settings, num_known=known, num_unknown=np.array([1000, 999, 999, 10**6]), num_kept=nothing
    )  # fmt: skip
    expected = [
        [0.5 * 0.8 * 1000, 0.5 * 0.2 * 1000],  # the share of all
        [0.5 * 3.2 / 5 * 999, 0.5 * 1.8 / 5 * 999],  # not 0 and 499
        [0.5 * 4.2 / 5 * 999, 0.5 * 0.8 / 5 * 999],  # not 499 and 0
        [0.5 * 82.2 / 102 * 1e6, 0.5 * 19.8 / 102 * 1e6],
    ]
    assert found.tolist() == [[math.floor(quota + 1e-9) for quota in row] for row in expected]
    limits = caps.class_limits(settings, num_known=nothing, num_unknown=np.full(4, 9), num_kept=nothing)
    assert (limits == np.iinfo(np.int64).max).all()  # nothing is known of any class


def test_quotas_are_exact_however_large_the_counts() -> None:
    generator = np.random.default_rng(2)
    for quota in (0.1, 0.7, 1.0, 3.3, 1e-7, 1e12):
        known = generator.integers(0, 10 ** generator.integers(0, 10, (50, 1)), (50, 2))
        unknown = generator.integers(0, 10**10, 50)
        settings = CurriculumSettings(strategy="score_threshold", prior_quota=quota)
        found = caps.class_limits(settings, num_known=known, num_unknown=unknown, num_kept=np.zeros_like(known))
        for column, side in product(range(50), range(2)):
            overall = Fraction(int(known[:, side].sum()), int(known.sum()))
            share = (int(known[column, side]) + 4 * overall) / (int(known[column].sum()) + 4)
            exact = Fraction(str(quota)) * share * int(unknown[column])
            assert found[column, side] == min(int(exact), 2**63 - 1)


def test_class_caps_are_never_passed_and_leave_out_no_more_than_one_strength() -> None:
    generator = np.random.default_rng(1)
    for spread in (3, 40, NUM_KEYS):
        size = 400
        beliefs = Candidates(
            np.arange(size, dtype=np.int32), generator.integers(0, C, size).astype(np.uint16),
            np.where(generator.random(size) < 0.5, 1, -1).astype(np.float16),
            generator.integers(0, spread, size).astype(np.uint16),
        )  # fmt: skip
        limits = generator.integers(0, 60, (C, 2))
        coarse = caps.coarse_counts(beliefs, C)
        crossing = caps.crossing_bins(coarse, limits)
        least = caps.least_strengths(coarse, caps.fine_counts(beliefs, crossing), crossing, limits)
        stays = caps.within_caps(beliefs, least)
        for column in range(C):
            for side, sign in enumerate((-1, 1)):
                own = (beliefs.classes == column) & (beliefs.signs == sign)
                count, limit = int((stays & own).sum()), int(limits[column, side])
                assert count <= limit
                left_out = beliefs.strengths[own & ~stays]
                if len(left_out):  # one strength more would be too many
                    assert count + int((left_out == left_out.max()).sum()) > limit


def test_values_of_keys_past_the_last_are_infinite() -> None:
    assert value_of(NUM_KEYS) == float("inf")
