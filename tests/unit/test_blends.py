"""Claims about both blends: what is mixed, what its label is, and that no known label ever changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_mlpl.methods.blends import (
    Blend,
    Coefficient,
    counted_bce,
    instance_blend,
    lendable,
    prototype_blend,
    quadrant,
)
from dist_mlpl.methods.drawn_prototypes import draw_classes, draw_numbers, quadrant_shrinkage
from tests.support.blending import (
    Mixed,
    mix_with_partners,
    mix_with_prototypes,
    quadrant_maps,
    quadrant_of_peak,
    soft_bce,
    weighted_maps,
)

pytestmark = pytest.mark.unit

C, D = 7, 5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def random_labels(num_images: int, generator: torch.Generator, known_fraction: float = 0.6) -> Tensor:
    """(B, C) int8; the first row has no unknown label, the last one nothing else."""
    present = torch.rand(num_images, C, generator=generator) < 0.5
    known = torch.rand(num_images, C, generator=generator) < known_fraction
    known[0], known[-1] = True, False
    return torch.where(known, torch.where(present, 1, -1), 0).to(torch.int8)


def random_choice(targets: Tensor, generator: torch.Generator, dtype: torch.dtype) -> dict[tuple[int, int], Tensor]:
    """Of some images one unknown label, with a prototype."""
    chosen = {}
    for n, row in enumerate(targets):
        unknown = (row == 0).nonzero().squeeze(1).tolist()
        if unknown and n % 3:
            chosen[n, unknown[n % len(unknown)]] = torch.randn(D, generator=generator).to(dtype)
    return chosen


def blended(
    features: Tensor, targets: Tensor, chosen: dict[tuple[int, int], Tensor], share: Tensor, *, faithful: bool = False
) -> Blend:
    rows, classes = torch.tensor(list(chosen)).long().reshape(-1, 2).unbind(1)
    prototypes = torch.stack([*chosen.values()]) if chosen else features.new_zeros(0, D)
    return prototype_blend(features, targets, rows, classes, prototypes, share, faithful=faithful)


def compare(blend: Blend, expected: Mixed, features: Tensor, share: Tensor, tolerance: float) -> None:
    """Values, labels, and the slopes of a random function of the mixtures."""
    torch.testing.assert_close(blend.features, expected.features, rtol=0, atol=tolerance)
    soft = torch.where(expected.is_counted, expected.targets, 0.0)
    torch.testing.assert_close(torch.where(blend.is_counted, blend.targets, 0.0).to(soft), soft, rtol=0, atol=tolerance)
    assert torch.equal(blend.is_counted, expected.is_counted)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(9)).to(features)
    slopes = torch.autograd.grad((blend.features * weights).sum(), (features, share))
    wanted = torch.autograd.grad((expected.features * weights).sum(), (features, share), materialize_grads=True)
    for slope, want in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(slope, want, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_both_blends_are_what_loops_over_images_and_classes_make(group_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(group_size)
    for _ in range(5):
        targets = random_labels(12, generator)
        believed = torch.where(torch.rand(12, C, generator=generator) < 0.1, 1, 0).to(torch.int8)
        believed = torch.where(targets != 0, targets, believed)  # pseudo-labels are neither blended nor lent
        valid = torch.rand(12, generator=generator) < 0.8
        y = torch.where(valid[:, None], believed, 0)
        features = torch.randn(12, C, D, generator=generator).to(dtype).requires_grad_()
        share = torch.rand(1, generator=generator).to(dtype).requires_grad_()
        is_lent = lendable((y == 0) & valid[:, None], (targets == 1) & valid[:, None], group_size=group_size)
        blend = instance_blend(features, y, is_lent, share, group_size=group_size)
        expected = mix_with_partners(features, y, targets, valid, share, group_size=group_size)
        compare(blend, expected, features, share, TOLERANCE[dtype])
        chosen = random_choice(y, generator, dtype)
        expected = mix_with_prototypes(features, y, chosen, share)
        compare(blended(features, y, chosen, share), expected, features, share, TOLERANCE[dtype])


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]), st.floats(0.0, 1.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_known_label_ever_changes(seed: int, group_size: int, known_fraction: float, faithful: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = random_labels(8, generator, known_fraction)
    features = torch.randn(8, C, D, generator=generator)
    share = torch.rand(1, generator=generator)
    is_lent = lendable(targets == 0, targets == 1, group_size=group_size)
    chosen = random_choice(targets, generator, torch.float32)
    for blend in (
        instance_blend(features, targets, is_lent, share, group_size=group_size, faithful=faithful),
        blended(features, targets, chosen, share, faithful=faithful),
    ):
        known = targets != 0
        assert torch.equal(blend.targets[known], targets[known].float())
        assert bool(blend.is_counted[known].all())
        assert torch.equal(blend.features[known], features[known])
        whole = known.all(dim=1)
        assert bool(whole[0])
        assert torch.equal(blend.features[whole], features[whole])
    drawn = draw_classes(targets == 0, torch.arange(8), seed, count=3)
    assert bool((targets.gather(1, drawn.clamp(min=0))[drawn >= 0] == 0).all())
    assert torch.equal((drawn >= 0).sum(dim=1), (targets == 0).sum(dim=1).clamp(max=3))


def test_a_share_of_one_leaves_features_as_they_are_and_of_zero_puts_the_source_there() -> None:
    generator = torch.Generator().manual_seed(1)
    targets, features = random_labels(8, generator), torch.randn(8, C, D, generator=generator)
    is_lent = lendable(targets == 0, targets == 1, group_size=8)
    assert bool(is_lent.any())
    chosen = random_choice(targets, generator, torch.float32)
    one, zero = torch.ones(1), torch.zeros(1)
    for blend in (
        instance_blend(features, targets, is_lent, one, group_size=8),
        blended(features, targets, chosen, one),
    ):
        assert torch.equal(blend.features, features)
        assert int(blend.is_counted.sum()) > int((targets != 0).sum()), "the mask is of what is mixed, not of targets"
    blend = instance_blend(features, targets, is_lent, zero, group_size=8)
    assert torch.equal(blend.features[is_lent], features.flip(0)[is_lent])
    assert torch.equal(blend.targets[is_lent], torch.ones(int(is_lent.sum())))
    blend = blended(features, targets, chosen, zero)
    for (n, c), prototype in chosen.items():
        assert torch.equal(blend.features[n, c], prototype)
        assert float(blend.targets[n, c]) == 1.0


def test_mixing_pooled_prototypes_is_mixing_maps_and_pooling() -> None:
    """DSRB as coded, on maps (B, C, h, w, D) with its prototypes of maps, to 1e-5; and with the code's row of zeros."""
    generator = torch.Generator().manual_seed(2)
    N, h, w = 30, 7, 6
    attention = torch.randn(N, C, h, w, generator=generator).flatten(2).softmax(2).unflatten(2, (h, w))
    cells = torch.randn(N, D, h, w, generator=generator)
    targets = random_labels(N, generator)
    maps = weighted_maps(attention, cells)
    peak = attention.flatten(2).argmax(2)
    quadrants = quadrant(peak, height=h, width=w)
    expected = torch.tensor([[quadrant_of_peak(attention[n, c]) for c in range(C)] for n in range(N)])
    assert torch.equal(quadrants, expected)
    assert len(quadrants.unique()) == 4
    features = maps.sum(dim=(2, 3))  # (N, C, D)
    share = torch.tensor([0.3])
    for counts_start in (False, True):
        map_prototypes = quadrant_maps(maps, targets, quadrants, counts_start=counts_start)
        pooled = quadrant_maps(maps.sum(dim=(2, 3), keepdim=True), targets, quadrants)[:, :, 0, 0]  # (C, 4, D)
        if counts_start:
            pooled = pooled * quadrant_shrinkage(bank_counts(targets, quadrants))[..., None]
        chosen = {}
        mixed = maps.clone()
        for n, c in random_choice(targets, generator, torch.float32):
            slot = int(quadrants[n, c] - 1 - n % 3) % 4
            chosen[n, c] = pooled[c, slot]
            mixed[n, c] = share * maps[n, c] + (1 - share) * map_prototypes[c, slot]
        assert len(chosen) > 10
        blend = blended(features, targets, chosen, share)
        torch.testing.assert_close(blend.features, mixed.sum(dim=(2, 3)), rtol=0, atol=1e-5)


def bank_counts(targets: Tensor, quadrants: Tensor) -> Tensor:
    """(C, 5) as the bank counts: positives by quadrant and in all; an empty quadrant counts all five."""
    counts = torch.zeros(C, 5, dtype=torch.int64)
    for n, c in (targets == 1).nonzero().tolist():
        counts[c, quadrants[n, c]] += 1
        counts[c, 4] += 1
    return torch.where(counts > 0, counts, counts.sum(dim=1, keepdim=True))


def test_the_loss_counts_known_and_mixed_labels_with_soft_targets() -> None:
    generator = torch.Generator().manual_seed(3)
    for dtype, tolerance in TOLERANCE.items():
        targets = random_labels(8, generator)
        logits = torch.randn(8, C, generator=generator).to(dtype).requires_grad_()
        chosen = random_choice(targets, generator, dtype)
        blend = blended(torch.zeros(8, C, D, dtype=dtype), targets, chosen, torch.tensor([0.3], dtype=dtype))
        found, expected = counted_bce(logits, blend.targets, blend.is_counted), soft_bce(logits, *blend[1:])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        slopes = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=tolerance, atol=tolerance)
    nothing = counted_bce(logits, torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool))
    assert float(nothing.detach()) == 0.0
    assert not torch.autograd.grad(nothing, logits)[0].any()


def test_the_coefficient_is_moved_by_features_alone_unless_faithful() -> None:
    """With weights that ignore features only the label could move it."""
    targets, features = torch.zeros(2, C, dtype=torch.int8), torch.randn(2, C, D)
    for faithful in (False, True):
        share = torch.tensor([0.4], requires_grad=True)
        blend = blended(features, targets, {(0, 1): torch.ones(D)}, share, faithful=faithful)
        logits = (blend.features * 0.0).sum(dim=2) + 2.0
        (slope,) = torch.autograd.grad(counted_bce(logits, blend.targets, blend.is_counted), share)
        assert float(slope) == (2.0 if faithful else 0.0)  # d BCE / d t is -x, and t is 1 - share


def test_a_faithful_share_of_one_makes_labels_unknown_and_can_never_change() -> None:
    targets, features = torch.zeros(2, C, dtype=torch.int8), torch.randn(2, C, D)
    share = torch.ones(1, requires_grad=True)
    blend = blended(features, targets, {(0, 1): torch.ones(D)}, share, faithful=True)
    assert not blend.is_counted.any()
    (slope,) = torch.autograd.grad(counted_bce(features.sum(dim=2), blend.targets, blend.is_counted), share)
    assert float(slope) == 0.0


def test_coefficients_begin_where_told_and_keep_off_the_ends() -> None:
    features = torch.zeros(1)
    for start in (0.5, 0.9):
        free, clamped = Coefficient(start, is_clamped=False), Coefficient(start, is_clamped=True)
        assert float(free(features).detach()) == pytest.approx(start, abs=1e-6)
        assert float(clamped(features).detach()) == pytest.approx(start, abs=1e-7)
        for coefficient in (free, clamped):
            assert coefficient.share.shape == (1,)
    with torch.no_grad():
        free.share.fill_(8.0)
        clamped.share.fill_(8.0)
    assert 0.999 < float(free(features).detach()) < 1.0
    assert float(clamped(features).detach()) == 1.0
    free(features).backward()
    clamped(features).backward()
    assert float(free.share.grad) > 0.0
    assert float(clamped.share.grad) == 1.0  # as if it had been cut in place


def test_draws_are_uniform_over_candidates_and_keyed_by_sample() -> None:
    index = torch.arange(4000)
    candidates = torch.zeros(4000, C, dtype=torch.bool)
    candidates[:, [1, 2, 5]] = True
    drawn = draw_classes(candidates, index, 11, count=2)
    assert bool((drawn[:, 0] != drawn[:, 1]).all())
    for column in drawn.T:
        found = torch.bincount(column, minlength=C)
        assert found[[0, 3, 4, 6]].sum() == 0
        assert int((found[[1, 2, 5]] - 4000 / 3).abs().max()) < 5 * (4000 * 2 / 9) ** 0.5
    some = torch.tensor([17, 3, 3999])
    assert torch.equal(draw_classes(candidates[some], some, 11, count=2), drawn[some])
    assert not torch.equal(draw_classes(candidates, index, 12, count=2), drawn)
    numbers = draw_numbers(index, 5, count=2, num_values=10)
    assert numbers.min() == 0
    assert numbers.max() == 9
    assert int((torch.bincount(numbers[:, 1]) - 400).abs().max()) < 5 * 360**0.5
    assert torch.equal(draw_numbers(some, 5, count=2, num_values=10), numbers[some])


def test_faithful_draws_go_on_with_the_first_known_labels() -> None:
    candidates = torch.zeros(2, C, dtype=torch.bool)
    candidates[1, 4] = True
    index = torch.arange(2)
    assert draw_classes(candidates, index, 1, count=2, fills_up=True).tolist() == [[0, 1], [4, 0]]
    assert draw_classes(candidates, index, 1, count=2).tolist() == [[-1, -1], [4, -1]]
