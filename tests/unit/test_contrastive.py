"""Claims about the contrastive loss: it is the loop over pairs, and its random draw is replaced by what it expects."""

from __future__ import annotations

import pytest
import torch

from dist_mlpl.losses.contrastive import contrastive_loss, num_contrasted
from tests.support.losses import random_targets
from tests.support.semantic import contrastive_oracle

pytestmark = pytest.mark.unit


def case(seed: int, *, known: float, num_images: int = 12, num_classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = random_targets((num_images, num_classes), known, generator)
    return torch.randn(num_images, num_classes, 6, generator=generator), targets


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("known", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("group_size", [1, 3, 4, 12])
def test_value_gradient_and_count_are_those_of_the_loop_over_pairs(group_size, known, keep):
    for seed in range(3):
        features, targets = case(seed, known=known)
        expected, count = contrastive_oracle(features.double(), targets, group_size, keep_negatives_alone=keep)
        found = contrastive_loss(features, targets, group_size=group_size, keep_negatives_alone=keep)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert int(num_contrasted(targets, group_size=group_size, keep_negatives_alone=keep)) == count
        leaf = features.double().requires_grad_()
        expected, _ = contrastive_oracle(leaf, targets, group_size, keep_negatives_alone=keep)
        found = contrastive_loss(leaf, targets, group_size=group_size, keep_negatives_alone=keep)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        ours, theirs = torch.autograd.grad(found, leaf)[0], torch.autograd.grad(expected, leaf)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_shared_weight_is_what_the_codes_random_draw_expects():
    features, targets = case(1, known=1.0, num_images=6, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    i, j = torch.triu_indices(6, 6, 1)
    unit = torch.nn.functional.normalize(features, dim=2)
    s = (unit[i] * unit[j]).sum(dim=2)
    first, second = targets[i], targets[j]
    present = (1 - s)[(first == 1) & (second == 1)]
    kinds = [(1 + s)[first * second == -1], (1 + s)[(first == -1) & (second == -1)]]
    a = len(present)
    assert all(len(losses) > 2 * a > 0 for losses in kinds)
    draws = []
    for _ in range(4000):
        kept = [losses[torch.randperm(len(losses), generator=generator)[: 2 * a]].sum() for losses in kinds]
        draws.append(present.sum() + sum(kept) + sum(losses.topk(a).values.sum() for losses in kinds))
    drawn = torch.stack(draws)
    found = contrastive_loss(features, targets, group_size=6)
    assert abs(float(found - drawn.mean())) < 4 * float(drawn.std()) / 4000**0.5
    assert int(num_contrasted(targets, group_size=6)) == 7 * a


def test_groups_add_up_and_do_not_see_one_another():
    features, targets = case(2, known=0.6)
    whole = contrastive_loss(features, targets, group_size=4)
    parts = [contrastive_loss(f, t, group_size=4) for f, t in zip(features.split(4), targets.split(4), strict=True)]
    torch.testing.assert_close(sum(parts), whole)


def test_a_feature_of_length_zero_gives_finite_gradients():
    features, targets = case(3, known=1.0)
    features[0] = 0.0
    leaf = features.requires_grad_()
    contrastive_loss(leaf, targets, group_size=4).backward()
    assert bool(leaf.grad.isfinite().all())
