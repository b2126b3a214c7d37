from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.errors import ConfigError
from dist_mlpl.losses.single_positive import (
    assume_negative_loss,
    count_penalty,
    entropy_loss,
    estimator_loss,
    expected_negative_loss,
    observed_loss,
)
from tests.support.losses import (
    assert_agrees,
    assume_negative_oracle,
    count_penalty_oracle,
    entropy_oracle,
    estimator_oracle,
    expected_negative_oracle,
    gradient_of,
    observed_oracle,
    random_case,
)

pytestmark = pytest.mark.unit

LOGITS = torch.tensor([[2, -1, 0.5, -3], [0, 1.5, -2, 0.25]], dtype=torch.float64)
TARGETS = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int8)
SIZE = 8  # B * C

cases = given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    known_fraction=st.sampled_from([0.0, 0.2, 0.6, 1.1]),
)


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, 0.413769), ({"smoothing": 0.1}, 0.523139), ({"unknown_weight": 1 / 3}, 0.165283)]
)
def test_an_an_ls_and_wan_take_the_published_values(keys, expected):
    assert float(assume_negative_loss(LOGITS, TARGETS, **keys)) / SIZE == pytest.approx(expected, abs=6e-7)


def test_epr_takes_the_published_value():
    value = observed_loss(LOGITS, TARGETS) / SIZE + count_penalty(LOGITS, expected_positives=1.9)
    assert float(value) == pytest.approx(0.041045, abs=6e-7)


def test_role_takes_the_published_value():
    estimates = torch.tensor([[0.995, 0.4, 0.6, 0.35], [0.5, 0.995, 0.45, 0.62]], dtype=torch.float64).logit()
    value = estimator_loss(LOGITS, estimates, TARGETS) / SIZE
    value += 0.5 * sum(count_penalty(x, expected_positives=1.9) for x in (LOGITS, estimates))
    assert float(value) == pytest.approx(0.692002, abs=6e-7)


def test_em_and_apl_take_the_published_values():
    assert float(entropy_loss(LOGITS, TARGETS, entropy_weight=0.1)) / SIZE == pytest.approx(0.001294, abs=6e-7)
    pseudo_targets, soft_targets = torch.zeros_like(TARGETS), torch.zeros(2, 4)
    pseudo_targets[0, 3] = pseudo_targets[1, 2] = -1
    soft_targets[0, 3], soft_targets[1, 2] = 0.03, 0.1
    value = entropy_loss(
        LOGITS,
        TARGETS,
        entropy_weight=0.1,
        pseudo_targets=pseudo_targets,
        soft_targets=soft_targets,
        pseudo_weight=0.9,
    )
    assert float(value) / SIZE == pytest.approx(0.060612, abs=6e-7)


@settings(max_examples=25, deadline=None)
@cases
def test_assuming_negatives_agrees_with_loops(seed, shape, known_fraction):
    logits, targets = random_case(seed, shape, known_fraction)
    for keys in ({}, {"smoothing": 0.1}, {"unknown_weight": 0.25}, {"smoothing": 0.2, "unknown_weight": 0.5}):
        assert_agrees(
            lambda x, keys=keys: assume_negative_loss(x, targets, **keys),
            lambda x, keys=keys: assume_negative_oracle(x, targets, **keys),
            logits,
        )
    assert_agrees(lambda x: observed_loss(x, targets), lambda x: observed_oracle(x, targets), logits)


@settings(max_examples=25, deadline=None)
@cases
def test_the_count_penalty_agrees_with_loops(seed, shape, known_fraction):
    logits, _ = random_case(seed, shape, known_fraction)
    assert_agrees(lambda x: count_penalty(x, expected_positives=1.9), lambda x: count_penalty_oracle(x, 1.9), logits)


@settings(max_examples=25, deadline=None)
@cases
def test_the_label_estimators_loss_agrees_with_loops_in_both_its_arguments(seed, shape, known_fraction):
    logits, targets = random_case(seed, shape, known_fraction)
    estimates, _ = random_case(seed + 1, shape)
    assert_agrees(
        lambda x: estimator_loss(x, estimates.to(x.dtype), targets),
        lambda x: estimator_oracle(x, estimates.to(x.dtype), targets),
        logits,
    )
    assert_agrees(
        lambda t: estimator_loss(logits.to(t.dtype), t, targets),
        lambda t: estimator_oracle(logits.double(), t, targets),
        estimates,
    )


@settings(max_examples=40, deadline=None)
@cases
def test_expected_negatives_agree_with_loops(seed, shape, known_fraction):
    logits, targets = random_case(seed, shape, known_fraction)
    scores, _ = random_case(seed + 1, shape)
    for expected_positives in (0, 1.5, 2.9, 31.4):
        keys = {"scores": scores, "expected_positives": expected_positives}
        assert_agrees(
            lambda x, keys=keys: expected_negative_loss(x, targets, **keys),
            lambda x, keys=keys: expected_negative_oracle(x, targets, **keys),
            logits,
        )


@settings(max_examples=25, deadline=None)
@cases
def test_entropy_and_pseudo_labels_agree_with_loops(seed, shape, known_fraction):
    logits, targets = random_case(seed, shape, known_fraction)
    _, pseudo_targets = random_case(seed + 1, shape, 0.5)  # beliefs about known labels too, which must not count
    soft_targets = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    beliefs = {"pseudo_targets": pseudo_targets, "soft_targets": soft_targets, "pseudo_weight": 0.9}
    for keys in ({"entropy_weight": 0.1}, {"entropy_weight": 0.2} | beliefs):
        assert_agrees(
            lambda x, keys=keys: entropy_loss(x, targets, **keys),
            lambda x, keys=keys: entropy_oracle(x, targets, **keys),
            logits,
        )


@pytest.mark.parametrize(("expected", "num_left_out"), [(0.5, 1), (1.4, 1), (1.5, 2), (2.5, 3), (2.9, 3)])
def test_expected_positives_are_rounded_halves_up(expected, num_left_out):
    logits, targets = torch.arange(6.0)[None], torch.zeros(1, 6, dtype=torch.int8)
    _, gradient = gradient_of(
        lambda x: expected_negative_loss(x, targets, logits, expected_positives=expected), logits.double()
    )
    assert int((gradient == 0).sum()) == num_left_out


def test_labels_that_are_not_expected_negatives_get_exactly_no_gradient():
    logits, targets = random_case(0, (6, 10), known_fraction=0.3)
    scores, _ = random_case(1, (6, 10))
    _, gradient = gradient_of(
        lambda x: expected_negative_loss(x, targets, scores, expected_positives=2.9), logits.double()
    )
    for row in range(6):
        room = max(0, 3 - int((targets[row] == 1).sum()))
        silent = (gradient[row] == 0).nonzero()[:, 0].tolist()
        assert len(silent) == min(room, int((targets[row] == 0).sum()))
        assert all(int(targets[row, c]) == 0 for c in silent)


def test_pseudo_labels_without_their_scores_are_refused():
    with pytest.raises(ConfigError, match="pseudo_targets alone"):
        entropy_loss(LOGITS, TARGETS, entropy_weight=0.1, pseudo_targets=TARGETS)


def test_the_entropy_of_unknown_labels_is_maximised_where_it_is_largest():
    targets = torch.zeros(1, 3, dtype=torch.int8)
    _, gradient = gradient_of(lambda x: entropy_loss(x, targets, entropy_weight=1.0), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert gradient[0, 0] < 0 < gradient[0, 2]
    assert float(gradient[0, 1]) == pytest.approx(0.0, abs=1e-6)
