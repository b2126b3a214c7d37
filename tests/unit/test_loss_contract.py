"""Claims that hold for every loss of the room."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dist_mlpl.losses.asymmetric import asymmetric_loss
from dist_mlpl.losses.large_loss import group_thresholds, hill_loss, large_loss, splc_loss
from dist_mlpl.losses.partial_bce import image_mean_bce, masked_mean_bce, partial_bce
from dist_mlpl.losses.rowwise import precise
from dist_mlpl.losses.selective import selective_loss
from dist_mlpl.losses.single_positive import (
    assume_negative_loss,
    count_penalty,
    entropy_loss,
    estimator_loss,
    expected_negative_loss,
    observed_loss,
)
from tests.support.losses import gradient_of, random_case

pytestmark = pytest.mark.unit

Loss = Callable[[Tensor, Tensor], Tensor]
GAMMAS = {"gamma_pos": 1.0, "gamma_neg": 2.0, "gamma_unknown": 7.0}


def selective(**keys) -> Loss:
    return lambda x, y: selective_loss(x, y, **(GAMMAS | keys))


def large(scheme: str, fraction: float) -> Loss:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        thresholds = group_thresholds(x, y, num_large=[math.ceil(y.numel() * fraction)], group_sizes=[len(y)])
        return large_loss(x, y, thresholds, scheme=scheme)

    return loss


KNOWN_ONLY: dict[str, Loss] = {
    "partial_bce": partial_bce,
    "masked_mean_bce": masked_mean_bce,
    "image_mean_bce": image_mean_bce,
    "csl_ignore": selective(mode="ignore"),
    "observed": observed_loss,
}
ADDITIVE: dict[str, Loss] = {
    "csl_ignore": KNOWN_ONLY["csl_ignore"],
    "observed": observed_loss,
    "asl": lambda x, y: asymmetric_loss(x, y, gamma_pos=0.0, gamma_neg=4.0, gamma_unknown=4.0, clip=0.05),
    "csl_negative": selective(mode="negative"),
    "csl_image": selective(mode="selective", top_k=2),
    "an": assume_negative_loss,
    "an_ls": lambda x, y: assume_negative_loss(x, y, smoothing=0.1),
    "role": lambda x, y: estimator_loss(x, 0.5 * x.detach().to(precise(x)) - 1, y),
    "en": lambda x, y: expected_negative_loss(x, y, x, expected_positives=2.9),
    "em": lambda x, y: entropy_loss(x, y, entropy_weight=0.1),
    "ll_none": large("reject", 0.0),
    "hill": hill_loss,
    "splc": lambda x, y: splc_loss(x, y, is_correcting=True),
}
LOSSES: dict[str, Loss] = {
    **KNOWN_ONLY,
    **ADDITIVE,
    "csl_clip": selective(mode="ignore", clip=0.05),
    "csl_batch": selective(mode="selective", top_k=2, scope="batch"),
    "csl_gamma_below_one": selective(mode="negative", gamma_pos=0.3, gamma_neg=0.3, gamma_unknown=0.3),
    "count": lambda x, y: count_penalty(x, expected_positives=1.9),
    "ll_r": large("reject", 0.1),
    "ll_ct": large("correct", 0.1),
    "hill_gamma_below_one": lambda x, y: hill_loss(x, y, gamma=0.3),
}

# CSL and ASL hold their focal weight constant, ROLE its teachers.
DIFFERENTIATED_WHOLE = {name: loss for name, loss in LOSSES.items() if not name.startswith(("csl", "asl", "role"))}

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
known_only = pytest.mark.parametrize("loss", KNOWN_ONLY.values(), ids=KNOWN_ONLY.keys())
differentiated_whole = pytest.mark.parametrize("loss", DIFFERENTIATED_WHOLE.values(), ids=DIFFERENTIATED_WHOLE.keys())
additive = pytest.mark.parametrize("loss", ADDITIVE.values(), ids=ADDITIVE.keys())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4, 100.0, -100.0, 20.0, -20.0, 0.0])
def test_value_and_gradient_are_finite_at_any_logit(loss, dtype, size):
    _, targets = random_case(0, (4, 9))
    value, gradient = gradient_of(lambda x: loss(x, targets), torch.full((4, 9), size, dtype=dtype))
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())


@every_loss
def test_a_batch_with_nothing_known_is_finite_and_one_without_images_is_a_connected_zero(loss):
    logits, targets = random_case(1, (4, 9), known_fraction=0.0)
    value, gradient = gradient_of(lambda x: loss(x, targets), logits)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
    value, gradient = gradient_of(lambda x: loss(x, targets[:0]), logits[:0])
    assert float(value) == 0.0
    assert gradient.shape == (0, 9)


@known_only
def test_without_known_labels_value_and_gradient_are_exactly_zero(loss):
    logits, targets = random_case(2, (4, 9), known_fraction=0.0)
    value, gradient = gradient_of(lambda x: loss(x, targets), logits)
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros_like(logits))


@known_only
@pytest.mark.parametrize("known_fraction", [0.03, 0.5])
def test_unknown_labels_change_no_bit_and_get_exactly_no_gradient(loss, known_fraction):
    logits, targets = random_case(3, (10, 30), known_fraction)
    noise = 1e4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    value, gradient = gradient_of(lambda x: loss(x, targets), logits)
    assert torch.equal(value, loss(torch.where(targets == 0, noise, logits), targets))
    assert not gradient[targets == 0].any()
    assert gradient[targets != 0].all()


@additive
def test_a_loss_and_its_gradient_are_sums_over_images(loss):
    logits, targets = random_case(4, (7, 9))
    logits = logits.double()
    value, gradient = gradient_of(lambda x: loss(x, targets), logits)
    parts = [gradient_of(lambda x, i=i: loss(x, targets[i : i + 1]), logits[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(value, torch.stack([part[0] for part in parts]).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.cat([part[1] for part in parts]), rtol=1e-12, atol=1e-15)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(loss, dtype):
    logits, targets = random_case(5, (4, 9))
    half = loss(logits.to(dtype), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(logits.to(dtype).float(), targets), rtol=1e-6, atol=0)


@differentiated_whole
def test_the_gradient_is_the_slope_in_finite_differences_where_no_weight_is_held_constant(loss):
    logits, targets = random_case(6, (3, 5), known_fraction=0.6, scale=1.0)
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), leaf)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, targets), leaf)


@every_loss
def test_second_derivatives_exist_and_are_finite(loss):
    logits, targets = random_case(7, (3, 5))
    leaf = logits.double().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf, targets), leaf, create_graph=True)
    (second,) = torch.autograd.grad(slope.pow(2).sum(), leaf)
    assert bool(torch.isfinite(second).all())
    assert second.any()
