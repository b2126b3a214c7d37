"""Claims about rings on one rank: what they hold is in the bank suite; here, their means."""

from __future__ import annotations

import pytest
import torch

from dist_mlpl.banks.ring import Ring

pytestmark = pytest.mark.unit


def newest_means(ring: Ring) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all that was pushed: what the last call but one saw."""
    ring.means()
    return ring.means()


def test_the_mean_of_cosines_with_every_stored_feature_is_one_product_with_the_mean_unit_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    ring, pushed = Ring("x", 6, 20, 32), {c: torch.empty(0, 32) for c in range(4)}
    for step in range(30):
        class_id = torch.randint(0, 4, (9,), generator=generator)
        features = 10.0 ** (step % 7 - 3) * torch.randn(9, 32, generator=generator)
        ring.push(class_id, features, torch.arange(9))
        pushed = {c: torch.cat([old, features[class_id == c]])[-20:] for c, old in pushed.items()}
    means, counts = newest_means(ring)
    assert counts.tolist() == [20, 20, 20, 20, 0, 0]
    queries = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    stored = torch.stack(list(pushed.values())).double()  # (4, K, D)
    one_by_one = torch.cosine_similarity(queries[:, None, None], stored[None], dim=3).mean(dim=2)  # (5, 4)
    at_once = torch.nn.functional.normalize(queries, dim=1) @ means[:4].double().T
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=2e-7)
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
    rows = ring.read(torch.tensor([1]))
    assert torch.equal(rows["sums"], fresh.read(torch.tensor([1]))["sums"])
    assert torch.equal(rows["sums"], rows["units"].double().sum(dim=1))
    assert torch.equal(newest_means(ring)[0], newest_means(fresh)[0])


def test_a_zero_feature_counts_and_points_nowhere() -> None:
    ring = Ring("x", 1, 4, 2)
    ring.push(torch.tensor([0, 0]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 1]))
    means, counts = newest_means(ring)
    assert counts.tolist() == [2]
    torch.testing.assert_close(means, torch.tensor([[0.3, 0.4]]))


def test_means_are_over_what_was_pushed_before_the_previous_call() -> None:
    generator = torch.Generator().manual_seed(2)
    ring = Ring("x", 3, 4, 8)
    given: list[torch.Tensor] = []
    for step in range(9):
        means, counts = ring.means(torch.tensor([1]))
        seen = torch.nn.functional.normalize(torch.cat([torch.zeros(0, 8), *given[:-1]][-4:]), dim=1)
        assert counts.tolist() == [0, len(seen), 0]
        torch.testing.assert_close(means[1], seen.sum(dim=0) / max(1, len(seen)))
        given.append(torch.randn(1, 8, generator=generator))
        ring.push(torch.tensor([1]), given[-1], torch.tensor([step]))


def test_means_on_a_device_are_a_copy_that_follows_the_table_also_when_a_commit_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cpu:0")  # not equal to the CPU that the table is on: stands for an accelerator
    ring, generator = Ring("x", 5, 4, 8), torch.Generator().manual_seed(3)
    saved = ring.pack(ring.changed_shards() or list(ring.held_shards))
    first, _ = ring.means(device=device)
    moved: list[int] = []
    copy_rows = torch.Tensor.index_copy_

    def counting(self: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        moved.append(len(index))
        return copy_rows(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy_", counting)
    for step in range(12):
        if step == 8:
            ring.unpack(saved, ring.held_shards)
            ring.mark_loaded()
        ring.push(torch.tensor([step % 3]), torch.randn(1, 8, generator=generator), torch.tensor([step]))
        means, counts = ring.means(device=device)
        assert torch.equal(means, ring._replica.columns[0])
        assert torch.equal(counts, ring._replica.columns[1])
    assert means.data_ptr() == first.data_ptr() != ring._replica.columns[0].data_ptr()
    assert max(moved) == 5, "all at the load"
    assert sorted(moved)[-3:-2] == [1], "else the class whose mean changed"
