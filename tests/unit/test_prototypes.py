"""Claims about prototypes on one rank: what they hold is in the bank suite; here, what they are worth."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dist_mlpl.banks.prototypes import Metric, Prototypes

pytestmark = pytest.mark.unit


def blobs(num_rows: int, *, seed: int) -> Tensor:
    """Five clouds in eight dimensions, mixed."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4.0 * torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    return centres[torch.randint(0, 5, (num_rows,), generator=generator)] + torch.randn(
        num_rows, 8, generator=generator
    )


def inertia(rows: Tensor, centres: Tensor) -> float:
    return float(torch.cdist(rows.double(), centres.double()).min(dim=1).values.square().mean())


@pytest.mark.parametrize("seed", range(4))
def test_mini_batches_and_renewals_come_near_to_what_a_full_k_means_finds(seed: int) -> None:
    rows = blobs(2000, seed=seed)
    bank = Prototypes("x", 1, 10, 8, seed=seed)
    found = []
    for _ in range(3):
        for number, part in enumerate(rows.split(16)):
            bank.add(torch.zeros(len(part), dtype=torch.int64), part, position=torch.arange(len(part)) + 16 * number)
        bank.renew()
        found.append(inertia(rows, bank.table()[0][0]))
    full = KMeans(10, n_init=3, random_state=0).fit(rows.numpy()).inertia_ / len(rows)
    one = inertia(rows, rows.mean(dim=0, keepdim=True))
    assert found[0] - full < 0.15 * (one - full)
    assert found[2] <= found[0] + 1e-6
    assert found[2] - full < 0.12 * (one - full)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_class_with_fewer_features_than_slots_fills_the_others_with_its_mean(metric: Metric) -> None:
    bank = Prototypes("x", 3, 4, 2, seed=0, metric=metric)
    rows = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    bank.add(torch.tensor([1, 1]), rows, position=torch.tensor([0, 1]))
    bank.renew()
    table, counts = bank.table()
    scale = 2.0 if metric == "euclidean" else 1.0
    own = sorted(table[1, :2].tolist())
    assert own == [[0.0, scale], [scale, 0.0]]
    mean = torch.tensor([1.0, 1.0]) if metric == "euclidean" else torch.tensor([0.5, 0.5]).sqrt()
    torch.testing.assert_close(table[1, 2:], mean.expand(2, 2))
    assert counts.tolist() == [[0] * 4, [1, 1, 2, 2], [0] * 4]
    assert torch.equal(bank.counts(), counts)
    assert not table[[0, 2]].any()


def test_a_class_without_new_features_keeps_its_prototypes_and_momentum_mixes_the_others() -> None:
    bank = Prototypes("x", 2, 1, 2, seed=0)
    first, slot = torch.tensor([[1.0, 0.0], [5.0, 5.0]]), torch.tensor([0, 0])
    bank.add(torch.tensor([0, 1]), first, slot=slot, position=torch.tensor([0, 1]))
    bank.renew(momentum=0.75)  # nothing to mix with yet
    bank.add(torch.tensor([0]), torch.tensor([[0.0, 2.0]]), slot=slot[:1], position=torch.tensor([0]))
    bank.renew(momentum=0.75)
    assert bank.read(torch.tensor([1, 0]), slot).tolist() == [[5.0, 5.0], [0.75, 0.5]]
    assert bank.counts().tolist() == [[1], [1]]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("P", "spread"), [(5, 1.0), (5, 1e-7), (5, 1e30), (1, 1.0)])
def test_the_nearest_centre_is_that_of_float64_however_near_the_next_one_is(
    metric: Metric, P: int, spread: float
) -> None:
    """Small whole numbers are equally near to several centres; tiny spreads and products beyond float32 leave doubt."""
    generator = torch.Generator().manual_seed(1)
    C, D = 7, 4
    bank = Prototypes("x", C, P, D, seed=0, metric=metric)
    if spread == 1.0:
        centres = torch.randint(-1, 2, (C * P, D), generator=generator) + 0.0
        rows = torch.randint(-1, 2, (300, D), generator=generator) + 0.0
    else:
        centres = (min(spread, 1.0) * torch.randn(C * P, D, generator=generator) + 1.0) * max(spread, 1.0)
        rows = torch.randn(300, D, generator=generator) * max(spread, 1.0)
    classes = torch.arange(C).repeat_interleave(P)
    bank.add(classes, centres, slot=torch.arange(P).repeat(C), position=torch.arange(C * P))
    bank.renew()
    chosen = torch.randint(0, C, (300,), generator=generator)
    bank.add(chosen, rows, position=torch.arange(300))
    prototypes = bank.table()[0].double()[chosen]  # (n, P, D)
    given = rows.double()
    if metric == "cosine":
        given = given / given.norm(dim=1, keepdim=True).clamp(min=1e-9)
        distances = -(prototypes * given[:, None]).sum(dim=2) / prototypes.norm(dim=2).clamp(min=1e-9)
    else:
        distances = (prototypes - given[:, None]).square().sum(dim=2)
    expected = torch.zeros(C, P, dtype=torch.int64)
    expected.index_put_((chosen, distances.argmin(dim=1)), torch.ones(300, dtype=torch.int64), accumulate=True)
    assert torch.equal(bank.read(torch.arange(C))["num_added"], expected)
