"""Claims about Large Loss, Hill and SPLC."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_mlpl.errors import ConfigError
from dist_mlpl.losses.large_loss import (
    group_thresholds,
    hill_loss,
    large_loss,
    permanent_corrections,
    splc_loss,
)
from tests.support.losses import (
    assert_agrees,
    gradient_of,
    hill_oracle,
    large_loss_oracle,
    random_case,
    splc_oracle,
)

pytestmark = pytest.mark.unit

LOGITS = torch.tensor([[2, -1, 0.5, -3], [0, 1.5, -2, 0.25]], dtype=torch.float64)
TARGETS = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int8)
SIZE = 8  # B * C


def batch_thresholds(logits: Tensor, targets: Tensor, *, fraction: float) -> Tensor:
    """Of the paper's k in one group of the whole batch."""
    k = math.ceil(targets.numel() * fraction)
    return group_thresholds(logits, targets, num_large=[k], group_sizes=[len(targets)])


cases = given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    known_fraction=st.sampled_from([0.0, 0.2, 0.6, 1.1]),
)


@pytest.mark.parametrize(("scheme", "expected"), [("reject", 0.188783), ("correct", 0.320035)])
def test_large_loss_takes_the_published_values(scheme, expected):
    thresholds = batch_thresholds(LOGITS, TARGETS, fraction=0.25)
    assert float(large_loss(LOGITS, TARGETS, thresholds, scheme=scheme)) / SIZE == pytest.approx(expected, abs=6e-7)


def test_hill_and_splc_take_the_published_values():
    assert float(hill_loss(LOGITS, TARGETS)) == pytest.approx(1.088561, abs=6e-7)
    assert float(splc_loss(LOGITS, TARGETS, is_correcting=False)) == pytest.approx(0.926533, abs=6e-7)
    assert float(splc_loss(LOGITS, TARGETS, is_correcting=True)) == pytest.approx(0.616695, abs=6e-7)


@settings(max_examples=40, deadline=None)
@cases
def test_large_loss_agrees_with_loops(seed, shape, known_fraction):
    logits, targets = random_case(seed, shape, known_fraction)
    for scheme in ("reject", "correct"):
        for fraction in (0.0, 0.1, 0.4, 1.0):
            assert_agrees(
                lambda x, scheme=scheme, fraction=fraction: large_loss(
                    x, targets, batch_thresholds(x, targets, fraction=fraction), scheme=scheme
                ),
                lambda x, scheme=scheme, fraction=fraction: large_loss_oracle(
                    x, targets, fraction=fraction, scheme=scheme
                ),
                logits,
            )


@settings(max_examples=40, deadline=None)
@cases
def test_hill_and_splc_agree_with_loops(seed, shape, known_fraction):
    logits, targets = random_case(seed, shape, known_fraction)
    assert_agrees(lambda x: hill_loss(x, targets), lambda x: hill_oracle(x, targets), logits)
    for is_correcting in (False, True):
        assert_agrees(
            lambda x, on=is_correcting: splc_loss(x, targets, is_correcting=on),
            lambda x, on=is_correcting: splc_oracle(x, targets, is_correcting=on),
            logits,
        )


def test_a_fraction_of_nothing_is_plain_cross_entropy_and_known_absent_labels_are_never_doubted():
    logits, targets = random_case(0, (5, 8))
    nothing, everything = (batch_thresholds(logits, targets, fraction=fraction) for fraction in (0.0, 1.0))
    assert bool((nothing == math.inf).all())
    _, gradient = gradient_of(lambda x: large_loss(x, targets, everything, scheme="reject"), logits.double())
    assert torch.equal(gradient != 0, targets != 0)
    assert torch.equal(large_loss(logits, targets, nothing, scheme="reject"),
                       large_loss(logits, targets, nothing, scheme="correct"))  # fmt: skip


def test_the_number_of_doubted_labels_is_the_fraction_of_all_entries_rounded_up():
    logits, targets = random_case(1, (10, 13), known_fraction=0.2)
    for fraction in (0.001, 0.05, 0.2):
        thresholds = batch_thresholds(logits, targets, fraction=fraction)
        assert int(((targets == 0) & (logits >= thresholds)).sum()) == math.ceil(130 * fraction)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match="correct"):
        large_loss(LOGITS, TARGETS, torch.tensor(0.0), scheme="rejekt")


def largest_of_groups(logits: Tensor, targets: Tensor, num_large: list[int], group_sizes: list[int]) -> Tensor:
    """(B, C) bool, the unknown labels of each group with the k largest losses, the first of equal ones; by sorting."""
    found, start = torch.zeros(targets.shape, dtype=torch.bool), 0
    for k, size in zip(num_large, group_sizes, strict=True):
        cells = [
            (-float(logits[b, c]), b, c)
            for b in range(start, start + size) for c in range(targets.shape[1]) if int(targets[b, c]) == 0
        ]  # fmt: skip
        for _, b, c in sorted(cells)[:k]:
            found[b, c] = True
        start += size
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_classes=st.integers(1, 7),
    group_sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    known_fraction=st.sampled_from([0.0, 0.2, 0.6, 1.1]),
    decimals=st.sampled_from([0, 1, 7]),  # with few, many are equal
    data=st.data(),
)
def test_exactly_k_losses_of_each_group_are_large_whatever_groups_stand_beside_it(
    seed, num_classes, group_sizes, known_fraction, decimals, data
):
    logits, targets = random_case(seed, (sum(group_sizes), num_classes), known_fraction)
    logits = logits.round(decimals=decimals)
    num_large = [data.draw(st.integers(0, size * num_classes)) for size in group_sizes]
    expected = largest_of_groups(logits, targets, num_large, group_sizes)
    thresholds = group_thresholds(logits, targets, num_large=num_large, group_sizes=group_sizes)
    assert torch.equal((targets == 0) & (logits >= thresholds), expected)
    assert torch.equal(permanent_corrections(logits, targets, thresholds), expected)
    start = 0
    for k, size in zip(num_large, group_sizes, strict=True):
        mine = slice(start, start := start + size)
        alone = group_thresholds(logits[mine], targets[mine], num_large=[k], group_sizes=[size])
        assert torch.equal((targets[mine] == 0) & (logits[mine] >= alone), expected[mine])


def test_a_likely_missing_positive_has_no_slope_under_hill():
    logits = torch.tensor([[-12.0, 0.0, 12.0]], dtype=torch.float64)
    _, gradient = gradient_of(lambda x: hill_loss(x, torch.zeros(1, 3, dtype=torch.int8)), logits)
    p = torch.sigmoid(logits)
    torch.testing.assert_close(gradient, 3 * p**2 * (1 - p) ** 2, rtol=1e-9, atol=1e-14)
