"""Claims about the consistency losses: what they cost, where they pull, and that what has no history has no part."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_mlpl.losses.consistency import consistency_loss, spatial_consistency_loss

pytestmark = pytest.mark.unit


def slow_mean_distance(logits: list[float], memory: list[float], told: list[bool]) -> float:
    """One image: the mean of |sigmoid(x) - h| over told entries."""
    distances = [
        abs(1 / (1 + 2.718281828459045**-x) - h) for x, h, is_told in zip(logits, memory, told, strict=True) if is_told
    ]
    return sum(distances) / len(distances) if distances else 0.0


@given(seed=st.integers(0, 10**6), n=st.integers(0, 4), M=st.integers(1, 5), G=st.integers(1, 3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_losses_are_those_of_loops_over_images(seed, n, M, G):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator, dtype=torch.float64)

    logits, scores, told = 8 * draw(M) - 4, draw(M), draw(M) < 0.6
    expected = sum(slow_mean_distance(*(part[row].tolist() for part in (logits, scores, told))) for row in range(n))
    assert float(consistency_loss(logits, scores, told)) == pytest.approx(expected, abs=1e-10)
    map_logits, history = 8 * draw(M, G, G) - 4, draw(M, G, G)
    history[draw(M, G, G) < 0.4] = torch.nan
    rows = [(map_logits[row].flatten(), history[row].flatten()) for row in range(n)]
    expected = sum(slow_mean_distance(x.tolist(), h.tolist(), (~h.isnan()).tolist()) for x, h in rows)
    assert float(spatial_consistency_loss(map_logits, history)) == pytest.approx(expected, abs=1e-10)


def test_gradients_are_those_of_finite_differences_and_zero_without_history():
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    history = torch.rand(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    history[0, 1] = torch.nan
    history[1] = torch.nan
    assert torch.autograd.gradcheck(lambda x: spatial_consistency_loss(x, history), (x,))
    (gradient,) = torch.autograd.grad(spatial_consistency_loss(x, history), x)
    assert bool((gradient[history.isnan()] == 0).all())
    assert bool((gradient[~history.isnan()] != 0).all())
    y = x.detach()[:, :, 0, 0].requires_grad_()
    told = torch.tensor([[True, False, True], [False, False, False]])
    (gradient,) = torch.autograd.grad(consistency_loss(y, history[:, :, 0, 0].nan_to_num(0.5), told), y)
    assert torch.equal(gradient != 0, told)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_compared_in_float32_and_extremes_stay_finite(dtype):
    x = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    loss = consistency_loss(x, torch.tensor([[0.0, 0.0, 0.5]]), torch.ones(1, 3, dtype=torch.bool))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(1 / 3)
    loss.backward()
    assert bool(x.grad.isfinite().all())
