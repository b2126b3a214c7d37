"""Claims about the pair head: its logits are the printed ones, and only pairs asked for are computed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_mlpl.losses.cooccurrence import cooccurrence_loss
from dist_mlpl.methods.costs import pair_counts
from dist_mlpl.models import recompute
from dist_mlpl.models.cooccurrence import PairHead, PairSettings
from tests.support.losses import random_targets
from tests.support.semantic import pair_logit, pair_loss_oracle, pair_slots, random_pair_head

pytestmark = pytest.mark.unit

C, D = 7, 5
FORMS = (None, 1, 3)


def random_masks(seed: int, num_images: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(num_images, C, generator=generator) < 0.5 for _ in range(2))


def expected_pairs(head: PairHead, is_first: torch.Tensor, is_second: torch.Tensor) -> set[tuple[int, ...]]:
    found = set()
    for image in range(len(is_first)):
        for (i, j), slot in pair_slots(head).items():
            fits = is_first[image, i] and is_second[image, j]
            if head.num_neighbours is None:
                fits = fits or (is_first[image, j] and is_second[image, i])
            if fits:
                found.add((image, i, j, slot))
    return found


@pytest.mark.parametrize("num_neighbours", FORMS)
def test_pairs_join_the_one_kind_to_the_other_each_once(num_neighbours):
    head = random_pair_head(C, D, num_neighbours=num_neighbours)
    for seed in range(20):
        is_first, is_second = random_masks(seed)
        for second in (is_second, is_first):
            rows = list(zip(*(column.tolist() for column in head.pairs(is_first, second)), strict=True))
            assert len(rows) == len(set(rows))
            assert set(rows) == expected_pairs(head, is_first, second)


@pytest.mark.parametrize("entries", [1, 40, 2**18])
@pytest.mark.parametrize("num_neighbours", FORMS)
def test_logits_and_gradients_are_those_of_the_printed_equations(monkeypatch, num_neighbours, entries):
    monkeypatch.setattr(recompute, "_CPU_ENTRIES", entries)
    head = random_pair_head(C, D, num_neighbours=num_neighbours)
    features = torch.randn(4, C, D, generator=torch.Generator().manual_seed(0))
    pairs = head.pairs(*random_masks(0))

    def printed(features: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [pair_logit(head, features[b, i], features[b, j], s) for b, i, j, s in zip(*pairs, strict=True)]
        )

    torch.testing.assert_close(head(features, pairs), printed(features), rtol=1e-5, atol=1e-5)
    head, features = head.double(), features.double().requires_grad_()
    found, expected = head(features, pairs), printed(features)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs, slope = [features, *head.parameters()], torch.randn(len(found), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(output, inputs, slope) for output in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_no_pair_at_all_leaves_every_parameter_connected():
    head, features = random_pair_head(C, D), torch.randn(4, C, D, requires_grad=True)
    nothing = torch.zeros(4, C, dtype=torch.bool)
    logits = head(features, head.pairs(nothing, nothing))
    assert logits.shape == (0,)
    logits.sum().backward()
    for tensor in (features, *head.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_weights_grow_with_all_pairs_up_to_some_hundred_classes_and_linearly_above():
    settings = PairSettings(class_width=2, pair_width=3)
    assert len(PairHead(settings, 2, 80).pair_weight) == 3160
    assert len(PairHead(settings, 2, 601).pair_weight) == 601 * 32
    assert len(PairHead(settings, 2, 9605).pair_weight) == 9605 * 32


def test_before_any_labels_are_read_a_head_of_neighbours_has_no_pairs():
    head = PairHead(PairSettings(class_width=2, pair_width=3, num_neighbours=2), 4, 9)
    everything = torch.ones(3, 9, dtype=torch.bool)
    assert len(head.pairs(everything, everything).slot) == 0


@pytest.mark.parametrize("trains_all", [False, True])
@pytest.mark.parametrize("known", [0.05, 0.4, 1.0])
def test_the_plan_counts_pairs_and_their_ends_as_the_head_makes_them(known, trains_all):
    targets = random_targets((40, 12), known, torch.Generator().manual_seed(3))
    head = PairHead(PairSettings(class_width=5, pair_width=7), 4, 12)
    is_trained = torch.ones(40, 12, dtype=torch.bool) if trains_all else targets != 0
    pairs = head.pairs(is_trained, is_trained).joined(head.pairs(targets == 1, targets == 0))
    num_ends = sum(len((pairs.image * 12 + end).unique()) for end in (pairs.first, pairs.second))
    counted = pair_counts(targets.numpy(), None, trains_all=trains_all)
    assert counted == pytest.approx((len(pairs.slot) / 40, num_ends / 40))

    features = torch.randn(40, 12, 4, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = head(features, pairs)
        logits.sum().backward()
    assert counter.get_total_flops() == 6 * num_ends * 5 * (4 + 7)  # its products; those of pairs are elementwise
    parameters = {p.data_ptr() for p in head.parameters()}
    index = 8 * num_ends  # where each end's features came from
    found = sum(size for place, size in kept.items() if place not in parameters) - index
    assert found == num_ends * 4 * (4 + 5 + 7) + 24 * len(pairs.slot)
    assert len(logits) == len(pairs.slot)


def test_the_plan_of_neighbours_is_near_what_any_neighbours_give():
    generator = torch.Generator().manual_seed(5)
    targets = random_targets((64, 300), 0.1, generator)
    head = PairHead(PairSettings(num_neighbours=20, class_width=5, pair_width=7), 4, 300)
    others = torch.rand(300, 300, generator=generator).fill_diagonal_(-1.0).topk(20, dim=1).indices
    head.neighbours.copy_(others)
    pairs = head.pairs(targets != 0, targets != 0).joined(head.pairs(targets == 1, targets == 0))
    num_ends = sum(len((pairs.image * 300 + end).unique()) for end in (pairs.first, pairs.second))
    counted = pair_counts(targets.numpy(), 20, trains_all=False)
    assert counted == pytest.approx((len(pairs.slot) / 64, num_ends / 64), rel=0.05)


def test_the_loss_is_the_printed_one():
    generator = torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(50, generator=generator).double() * 4, torch.tensor([-40.0, 40.0])])
    is_together = random_targets((1, 52), 1.0, generator)[0] == 1
    expected = pair_loss_oracle(logits.sigmoid().tolist(), is_together.tolist())
    assert float(cooccurrence_loss(logits, is_together)) == pytest.approx(expected, rel=1e-10)
    assert float(cooccurrence_loss(logits.float(), is_together)) == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.gradcheck(lambda x: cooccurrence_loss(x, is_together[:50]), logits[:50].requires_grad_())
