"""Claims: losses that look at the batch of all ranks sum, over ranks, to what one rank gives for the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.losses.selective import selective_loss
from dist_mlpl.losses.single_positive import count_penalty
from tests.support.losses import gradient_of, random_case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

B, C = 11, 40


def shares(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """Each loss's value, summed over ranks, and the gradient of this rank's images, in rank order."""
    logits, targets = random_case(0, (B, C), known_fraction=0.2)
    logits = logits.round(decimals=1).double()  # many equal ones
    prior = torch.rand(C, generator=torch.Generator().manual_seed(1))
    edges = [*(i * i for i in range(world_size)), B]  # uneven shares
    mine = slice(edges[rank], edges[rank + 1])
    x, y = logits[mine], targets[mine]

    def selective(x: Tensor, **keys: object) -> Tensor:
        return selective_loss(
            x, y, mode="selective", gamma_pos=1, gamma_neg=2, gamma_unknown=4, top_k=3, scope="batch",
            reduce=comm.reduce_sum, **keys,
        )  # fmt: skip

    found = [
        gradient_of(selective, x),
        gradient_of(lambda x: selective(x, prior=prior, prior_threshold=0.7), x),
        gradient_of(lambda x: selective(x, prior=prior, prior_threshold=0.7, exclude_prior_ignored=False), x),
        gradient_of(lambda x: count_penalty(x, expected_positives=2.9, reduce=comm.reduce_sum), x),
    ]
    return [(comm.reduce_sum(value), comm.gather_rows(gradient)) for value, gradient in found]


def test_shares_of_any_number_of_ranks_sum_to_the_loss_and_gradient_of_the_whole_batch() -> None:
    expected = shares(0, 1)
    for world_size in (1, 2, 3, 4):
        for found in run_ranks(shares, world_size):
            for (value, gradient), (whole, whole_gradient) in zip(found, expected, strict=True):
                torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-14)
                torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-15)


def test_a_rank_without_images_takes_part_in_the_selection_of_the_others() -> None:
    def share(rank: int, world_size: int) -> Tensor:
        logits, targets = random_case(2, (4, 9), known_fraction=0.2)
        mine = slice(0, 4) if rank == 0 else slice(0, 0)
        value, gradient = gradient_of(
            lambda x: selective_loss(
                x, targets[mine], mode="selective", gamma_pos=0, gamma_neg=0, gamma_unknown=0, top_k=2, scope="batch",
                reduce=comm.reduce_sum,
            )
            + count_penalty(x, expected_positives=1.5, reduce=comm.reduce_sum),
            logits[mine],
        )  # fmt: skip
        assert bool(torch.isfinite(gradient).all())
        return comm.reduce_sum(value)

    alone = share(0, 1)
    for value in run_ranks(share, 2):
        torch.testing.assert_close(value, alone, rtol=1e-6, atol=0)
