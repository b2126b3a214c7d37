"""Claims about rings on one rank: what they hold is in the bank suite; here, their means."""

from __future__ import annotations

import pytest
import torch

from dist_mlpl.banks.ring import Ring

pytestmark = pytest.mark.unit


def test_the_mean_of_cosines_with_every_stored_feature_is_one_product_with_the_mean_unit_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    ring = Ring("x", 6, 20, 32)
    for step in range(30):
        class_id = torch.randint(0, 4, (9,), generator=generator)
        ring.push(class_id, 10.0 ** (step % 7 - 3) * torch.randn(9, 32, generator=generator), torch.arange(9))
    means, counts = ring.means()
    assert counts.tolist() == [20, 20, 20, 20, 0, 0]
    queries = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    stored = ring.read(torch.arange(4))["features"].double()  # (4, K, D)
    one_by_one = torch.cosine_similarity(queries[:, None, None], stored[None], dim=3).mean(dim=2)  # (5, 4)
    at_once = torch.nn.functional.normalize(queries, dim=1) @ means[:4].double().T
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=1e-7)
    assert not means[4:].any()


def test_the_kept_sum_never_drifts_from_the_sum_over_the_ring() -> None:
    generator = torch.Generator().manual_seed(1)
    ring, fresh = Ring("x", 2, 7, 16), Ring("x", 2, 7, 16)
    newest = []
    for step in range(3000):
        features = torch.randn(1, 16, generator=generator) * (1e6 if step % 5 else 1e-6)
        ring.push(torch.tensor([1]), features, torch.tensor([step]))
        newest = [*newest[-6:], features]
    fresh.push(torch.ones(7, dtype=torch.int64), torch.cat(newest), torch.arange(7))
    assert torch.equal(ring.read(torch.tensor([1]))["sums"], fresh.read(torch.tensor([1]))["sums"])
    assert torch.equal(ring.means()[0], fresh.means()[0])


def test_a_zero_feature_counts_and_points_nowhere() -> None:
    ring = Ring("x", 1, 4, 2)
    ring.push(torch.tensor([0, 0]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 1]))
    means, counts = ring.means()
    assert counts.tolist() == [2]
    torch.testing.assert_close(means, torch.tensor([[0.3, 0.4]]))
