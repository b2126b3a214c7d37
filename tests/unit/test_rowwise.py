from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.losses import rowwise
from dist_mlpl.losses.rowwise import row_blocks, sum_of_rows, top_of_rows
from tests.support.losses import gradient_of, random_case

pytestmark = pytest.mark.unit


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.sigmoid(logits) ** 2 * (targets + 2)


def cut_into_rows(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(rowwise, "_CPU_ENTRIES_PER_THREAD", entries // torch.get_num_threads())


@pytest.mark.parametrize("entries", [1, 7, 14, 30, 10_000])
def test_blocks_change_no_bit_of_value_or_gradient(monkeypatch, entries):
    logits, targets = random_case(0, (13, 7))
    whole = gradient_of(lambda x: sum_of_rows(squared, x, targets), logits)
    cut_into_rows(monkeypatch, entries)
    blocks = gradient_of(lambda x: sum_of_rows(squared, x, targets), logits)
    assert len(list(row_blocks(logits))) > 1 or entries > 13 * 7
    assert torch.equal(whole[0], blocks[0])
    torch.testing.assert_close(whole[1], blocks[1], rtol=1e-6, atol=0)


def test_value_and_gradient_are_those_of_the_formula_on_all_rows(monkeypatch):
    cut_into_rows(monkeypatch, 14)
    logits, targets = random_case(1, (9, 7))
    ours = gradient_of(lambda x: 3 * sum_of_rows(squared, x, targets), logits.double())
    plain = gradient_of(lambda x: 3 * squared(x, targets).sum(), logits.double())
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)


def test_second_and_third_derivatives_are_right(monkeypatch):
    cut_into_rows(monkeypatch, 4)
    logits, targets = random_case(2, (3, 4), scale=1.0)
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sum_of_rows(squared, x, targets) ** 2, leaf)

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(sum_of_rows(squared, x, targets), x, create_graph=True)[0].pow(2).sum()

    assert torch.autograd.gradgradcheck(slope, leaf)


def test_a_second_backward_through_the_same_graph_gives_the_same_gradient():
    logits, targets = random_case(3, (4, 5))
    leaf = logits.requires_grad_()
    value = sum_of_rows(squared, leaf, targets)
    first = torch.autograd.grad(value, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, leaf)[0])


def test_only_one_buffer_of_the_logits_size_is_kept_for_the_backward_pass():
    logits, targets = random_case(4, (16, 32))
    loss = sum_of_rows(squared, logits.requires_grad_(), targets)
    kept = loss.grad_fn.saved_tensors
    new = [tensor for tensor in kept if tensor.data_ptr() not in (logits.data_ptr(), targets.data_ptr())]
    assert sum(tensor.numel() for tensor in new) == logits.numel()


def test_without_a_gradient_wanted_none_is_computed():
    logits, targets = random_case(5, (4, 5))

    def refuses_gradient(x: Tensor, y: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return squared(x, y)

    assert float(sum_of_rows(refuses_gradient, logits, targets)) == pytest.approx(float(squared(logits, targets).sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_has_a_gradient_of_its_own_type(dtype):
    logits, targets = random_case(6, (4, 5))
    half = gradient_of(lambda x: sum_of_rows(squared, x, targets), logits.to(dtype))
    full = gradient_of(lambda x: sum_of_rows(squared, x, targets), logits.to(dtype).float())
    assert torch.equal(half[0], full[0])
    assert torch.equal(half[1], full[1].to(dtype))


def test_no_rows_make_a_connected_zero():
    value, gradient = gradient_of(lambda x: sum_of_rows(F.relu, x), torch.zeros(0, 5))
    assert float(value) == 0.0
    assert gradient.shape == (0, 5)


def test_top_of_rows_takes_what_sorting_takes():
    scores, targets = random_case(7, (50, 9))
    for k in (0, 1, 4, 9, 20):
        chosen = top_of_rows(scores, targets.abs().float(), k)
        for row in range(50):
            candidates = [c for c in range(9) if int(targets[row, c]) == 0]
            best = sorted(candidates, key=lambda c: -float(scores[row, c]))[:k]
            assert chosen[row].nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize("C", [640, 643, 647])
def test_top_of_many_classes_is_found_among_groups_of_them(C):
    scores, targets = random_case(8, (20, C))
    for k in (1, 7, 39, 40, 41, 600):
        expected = scores.masked_fill(targets != 0, -torch.inf).topk(k, dim=1)
        chosen = torch.zeros_like(scores).scatter_(1, expected.indices, expected.values.isfinite().float())
        assert torch.equal(top_of_rows(scores, targets.abs().float(), k), chosen)


def test_top_of_rows_counts_used_places_and_breaks_ties_somehow():
    scores = torch.zeros(3, 6)
    chosen = top_of_rows(scores, torch.zeros(3, 6), 4, used=torch.tensor([[0], [3], [9]]))
    assert chosen.sum(dim=1).tolist() == [4, 1, 0]
