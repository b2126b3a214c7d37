from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.losses import threshold
from dist_mlpl.losses.threshold import kth_largest

pytestmark = pytest.mark.unit


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), max_size=40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    k=st.integers(0, 45),
)
def test_it_is_what_sorting_finds(values, dtype, k):
    found = kth_largest(torch.tensor(values, dtype=dtype), k)
    ordered = [math.inf, *sorted(values, reverse=True)]
    assert float(found) == (ordered[k] if k < len(ordered) else -math.inf)
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_numbers_are_told_apart_and_equal_ones_counted_each(dtype):
    one = torch.ones(1, dtype=dtype)
    above = torch.nextafter(one, 2 * one)
    values = torch.cat([one, above, one, -above, -one, one])
    assert [float(kth_largest(values, k)) for k in range(1, 7)] == [float(above), 1, 1, 1, -1, -float(above)]


def test_minus_zero_is_zero():
    values = torch.tensor([-0.0, 0.0, -1.0])
    assert int((values >= kth_largest(values, 1)).sum()) == 2


def test_counting_in_chunks_counts_everything(monkeypatch):
    monkeypatch.setattr(threshold, "_CHUNK", 7)
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    ordered = values.sort(descending=True).values
    assert all(kth_largest(values, k) == ordered[k - 1] for k in range(1, 101))


def test_ranks_that_hold_the_same_numbers_find_the_k_th_of_all():
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    ordered = values.sort(descending=True).values
    for k in (1, 3, 4, 70, 150):
        assert kth_largest(values, k, reduce=lambda counts: counts.mul_(3)) == ordered[(k - 1) // 3]
    assert kth_largest(values, 151, reduce=lambda counts: counts.mul_(3)) == -math.inf
