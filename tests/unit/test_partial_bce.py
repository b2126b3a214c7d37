from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.errors import ConfigError
from dist_mlpl.losses.partial_bce import (
    image_mean_bce,
    masked_mean_bce,
    normaliser,
    partial_bce,
    solve_normaliser,
)
from tests.support.losses import (
    gradient_of,
    masked_mean_bce_oracle,
    partial_bce_gradient_oracle,
    partial_bce_oracle,
    random_targets,
)

pytestmark = pytest.mark.unit

PAPER = {"alpha": -4.45, "beta": 5.45, "gamma": 1.0}
PER_IMAGE_MEAN = {"alpha": 1.0, "beta": 0.0, "gamma": -1.0}
PLAIN = {"alpha": 0.0, "beta": 1.0, "gamma": 1.0}
NORMALISERS = [PAPER, PER_IMAGE_MEAN, PLAIN, {"alpha": -2.0, "beta": 3.0, "gamma": 0.5}]


def random_case(seed: int, shape: tuple[int, int] = (7, 11), known_fraction: float = 0.4, scale: float = 4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator)
    return logits, random_targets(shape, known_fraction, generator)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 6),
    C=st.integers(1, 30),
    known_fraction=st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.1]),
    g=st.sampled_from(NORMALISERS),
)
def test_value_and_gradient_agree_with_loops_in_float64(seed, B, C, known_fraction, g):
    logits, targets = random_case(seed, (B, C), known_fraction)
    value, gradient = gradient_of(lambda x: partial_bce(x, targets, **g), logits.double())
    assert math.isclose(float(value), partial_bce_oracle(logits, targets, **g), rel_tol=1e-12, abs_tol=1e-13)
    torch.testing.assert_close(gradient, partial_bce_gradient_oracle(logits, targets, **g), rtol=1e-12, atol=1e-14)
    mean = masked_mean_bce(logits.double(), targets)
    assert math.isclose(float(mean), masked_mean_bce_oracle(logits, targets), rel_tol=1e-12, abs_tol=1e-13)


@pytest.mark.parametrize("g", NORMALISERS)
def test_float32_agrees_with_the_float64_oracle(g):
    logits, targets = random_case(0)
    value, gradient = gradient_of(lambda x: partial_bce(x, targets, **g), logits)
    assert float(value) == pytest.approx(partial_bce_oracle(logits, targets, **g), rel=2e-6)
    expected = partial_bce_gradient_oracle(logits, targets, **g).float()
    torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("g", NORMALISERS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (64, 601), (5, 10007)])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_with_every_label_known_it_is_the_librarys_loss_bit_for_bit(g, shape, scale):
    logits, targets = random_case(1, shape, known_fraction=1.1, scale=scale)
    assert bool((targets != 0).all())
    ours = gradient_of(lambda x: partial_bce(x, targets, **g), logits)
    theirs = gradient_of(lambda x: F.binary_cross_entropy_with_logits(x, (targets == 1).float()), logits)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_inverse_proportion_is_the_per_image_mean_over_known_labels():
    logits, targets = random_case(2, known_fraction=0.3)
    means = []
    for x, y in zip(logits, targets, strict=True):
        known = y != 0
        means.append(F.softplus(-y[known] * x[known]).mean() if known.any() else torch.zeros(()))
    value = partial_bce(logits, targets, **PER_IMAGE_MEAN)
    torch.testing.assert_close(value, torch.stack(means).mean(), rtol=1e-6, atol=0)
    assert torch.equal(value, image_mean_bce(logits, targets))


@pytest.mark.parametrize("scale", [1.0, 0.25, 1 / 3])
def test_a_scaled_loss_has_the_librarys_gradient_bit_for_bit_too(scale):
    logits, targets = random_case(10, (64, 601), known_fraction=1.1)
    ours = gradient_of(lambda x: partial_bce(x, targets) * scale, logits)
    theirs = gradient_of(lambda x: F.binary_cross_entropy_with_logits(x, (targets == 1).float()) * scale, logits)
    assert torch.equal(ours[1], theirs[1])


def test_the_masked_mean_of_complete_labels_is_the_librarys_loss_bit_for_bit():
    logits, targets = random_case(11, (64, 601), known_fraction=1.1)
    ours = gradient_of(lambda x: masked_mean_bce(x, targets), logits)
    theirs = gradient_of(lambda x: F.binary_cross_entropy_with_logits(x, (targets == 1).float()), logits)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("g", NORMALISERS)
@pytest.mark.parametrize("known_fraction", [0.02, 0.09, 0.11, 0.6])
def test_few_and_many_known_labels_agree_with_the_same_oracle(g, known_fraction):
    logits, targets = random_case(12, (20, 60), known_fraction)
    value, gradient = gradient_of(lambda x: partial_bce(x, targets, **g), logits.double())
    assert float(value) == pytest.approx(partial_bce_oracle(logits, targets, **g), rel=1e-12)
    torch.testing.assert_close(gradient, partial_bce_gradient_oracle(logits, targets, **g), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("g", NORMALISERS)
def test_unknown_labels_change_no_bit_of_the_loss_and_get_exactly_no_gradient(g):
    logits, targets = random_case(3)
    other = torch.where(
        targets == 0, 1e4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)), logits
    )
    for loss in (lambda x: partial_bce(x, targets, **g), lambda x: masked_mean_bce(x, targets)):
        value, gradient = gradient_of(loss, logits)
        assert torch.equal(value, loss(other))
        assert not gradient[targets == 0].any()
        assert gradient[targets != 0].all()


@pytest.mark.parametrize("g", NORMALISERS)
def test_an_image_with_nothing_known_adds_zero_and_counts_in_the_mean(g):
    logits, targets = random_case(4)
    targets[2] = 0
    value, gradient = gradient_of(lambda x: partial_bce(x, targets, **g), logits)
    keep = torch.arange(7) != 2
    torch.testing.assert_close(value, partial_bce(logits[keep], targets[keep], **g) * 6 / 7, rtol=1e-6, atol=0)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("g", NORMALISERS)
def test_with_nothing_known_at_all_value_and_gradient_are_exactly_zero_and_connected(g):
    logits, targets = random_case(5, known_fraction=0.0)
    for loss in (lambda x: partial_bce(x, targets, **g), lambda x: masked_mean_bce(x, targets)):
        value, gradient = gradient_of(loss, logits)
        assert float(value) == 0.0
        assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("g", NORMALISERS)
def test_logits_of_ten_thousand_stay_finite(g):
    _, targets = random_case(6)
    for size in (1e4, -1e4):
        logits = torch.full(targets.shape, size)
        for loss in (lambda x: partial_bce(x, targets, **g), lambda x: masked_mean_bce(x, targets)):
            value, gradient = gradient_of(loss, logits)
            assert bool(torch.isfinite(value))
            assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("g", NORMALISERS)
def test_second_derivatives_are_right(g):
    logits, targets = random_case(7, (2, 4))
    targets[0] = 0
    leaf = logits.double().requires_grad_()
    few = torch.zeros_like(targets)
    few[1, 2] = 1
    few = torch.cat([few, torch.zeros(4, 4, dtype=torch.int8)])
    for case, x in ((targets, leaf), (few, leaf.detach().repeat(3, 1).requires_grad_())):
        assert torch.autograd.gradgradcheck(lambda x, case=case: partial_bce(x, case, **g), x)
        assert torch.autograd.gradgradcheck(lambda x, case=case: masked_mean_bce(x, case), x)


def test_many_known_labels_keep_nothing_for_the_backward_pass_but_logits_and_targets():
    logits, targets = random_case(14, (8, 9), known_fraction=0.6)
    loss = partial_bce(logits.requires_grad_(), targets)
    kept = loss.grad_fn.saved_tensors
    assert {tensor.data_ptr() for tensor in kept} == {logits.data_ptr(), targets.data_ptr()}


@pytest.mark.parametrize("known_fraction", [0.02, 0.5])
def test_a_batch_without_images_costs_nothing_and_stays_connected(known_fraction):
    logits, targets = random_case(13, (0, 5), known_fraction)
    for loss in (partial_bce, masked_mean_bce, image_mean_bce):
        value, gradient = gradient_of(lambda x, loss=loss: loss(x, targets), logits)
        assert float(value) == 0.0
        assert gradient.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, targets = random_case(8)
    half = logits.to(dtype)
    assert torch.equal(partial_bce(half, targets), partial_bce(half.float(), targets))
    assert partial_bce(half, targets).dtype == masked_mean_bce(half, targets).dtype == torch.float32


def test_the_normaliser_takes_the_published_values():
    p = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.05, 0.02, 0.009, 0.0])
    g = normaliser(p, **PAPER)
    torch.testing.assert_close(
        g, torch.tensor([1.0, 1.445, 3.225, 5.005, 5.2275, 5.361, 5.40995, 5.45]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        p * g, torch.tensor([1.0, 1.300, 1.613, 0.501, 0.261, 0.107, 0.049, 0.0]), rtol=0, atol=6e-4
    )


@settings(max_examples=50, deadline=None)
@given(
    gamma=st.floats(-3, 3).filter(lambda v: abs(v) > 0.05),
    p0=st.floats(0.01, 0.95),
    g0=st.floats(0.1, 20),
)
def test_a_solved_normaliser_passes_through_both_its_points(gamma, p0, g0):
    alpha, beta = solve_normaliser(gamma, p0, g0)
    one, at_p0 = normaliser(torch.tensor([1.0, p0], dtype=torch.float64), alpha, beta, gamma).tolist()
    assert one == pytest.approx(1.0, abs=1e-6)
    assert at_p0 == pytest.approx(g0, rel=1e-6)


def test_the_weight_of_all_known_labels_together_peaks_where_published():
    p = torch.arange(1, 1000) / 1000
    total = p * normaliser(p, **PAPER)
    assert float(p[total.argmax()]) == pytest.approx(0.612, abs=1e-3)
    assert float(total.max()) == pytest.approx(1.669, abs=1e-3)


def test_the_papers_constants_are_solved_ones_rounded():
    alpha, beta = solve_normaliser(1.0, 0.1, 5.0)
    assert (alpha, beta) == (pytest.approx(-40 / 9), pytest.approx(49 / 9))


@pytest.mark.parametrize(("gamma", "p0"), [(0.0, 0.1), (1.0, 0.0), (1.0, 1.0), (-1.0, 1.5)])
def test_a_normaliser_that_cannot_exist_is_refused(gamma, p0):
    with pytest.raises(ConfigError, match="p0"):
        solve_normaliser(gamma, p0, 5.0)
