"""Claims about `dist-mlpl plan`: what it says of memory and traffic is what ranks hold and send, within a tenth."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.replica import Replica
from dist_mlpl.batch import Progress
from dist_mlpl.methods.base import Method
from dist_mlpl.methods.costs import Scale
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import make_engine, own_share

pytestmark = pytest.mark.distributed

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "role": ("single_positive", {"loss": "role", "expected_positives": 1.5}),
    "en": ("single_positive", {"loss": "en", "expected_positives": 1.5}),
    "csl": ("csl", {"mode": "ignore"}),
    "scl": ("spatial_consistency", {}),
    "sst": ("sst", {"head": {"feature_width": 64}, "ring_capacity": 10}),
    "dsrb": ("blending", {"head": {"feature_width": 64}, "start_epoch": 1, "renew_every_epochs": 1}),
    "sarb": (
        "blending",
        {"head": {"feature_width": 64}, "prototypes": "kmeans", "num_prototypes": 3, "start_epoch": 1,
         "renew_every_epochs": 1},
    ),
}  # fmt: skip
GLOBAL_BATCH, NUM_STEPS = 64, 4


class Measured(NamedTuple):
    """Of one rank."""

    sent_bytes: float  # a step, around recall and observe
    held_bytes: int


def measure(rank: int, world_size: int, name: str, keys: dict[str, Any]) -> Measured:
    engine = make_engine("plain", method=tiny_method(name, **keys), global_batch=GLOBAL_BATCH)
    method, sent = engine.method, 0
    for step in range(2 * NUM_STEPS):  # of two epochs; prototypes that the first one gathers are used in the second
        batch, progress = random_batch(GLOBAL_BATCH, seed=step), Progress(step=step, epoch=1 + step // NUM_STEPS)
        if step % NUM_STEPS == 0:
            method.begin_epoch(progress)
            flush(method)
            sent = 0
        share = own_share(batch._replace(index=batch.index + GLOBAL_BATCH * step))
        before = sum(comm.traffic().values())
        recalled = method.recall(share, progress)
        sent += sum(comm.traffic().values()) - before
        output = engine.train_step(share, recalled, progress)
        before = sum(comm.traffic().values())
        method.observe(share, output)
        sent += sum(comm.traffic().values()) - before
    before = sum(comm.traffic().values())
    flush(method)  # what the last step left waiting is its own
    sent += sum(comm.traffic().values()) - before
    held = sum(tensor.nbytes for bank in method.banks().values() for tensor in memory_of(bank))
    return Measured(sent / NUM_STEPS, held)


def flush(method: Method) -> None:
    """Hand over what waits in its banks, as a checkpoint does."""
    for bank in method.banks().values():
        bank.flush()


def memory_of(bank: Bank) -> list[torch.Tensor]:
    """Its rows on this rank, and the tables that every rank keeps beside them."""
    replicas = [part for part in vars(bank).values() if isinstance(part, Replica)]
    return [*bank._memory().values(), *(column for replica in replicas for column in replica._columns or [])]


def predicted(method: Method, world_size: int) -> tuple[float, float]:
    """Bytes sent by an average rank a step, and held by the one that holds most."""
    targets = np.concatenate([random_batch(GLOBAL_BATCH, seed=step).targets.numpy() for step in range(50)])
    scale = Scale(world_size=world_size, global_batch=GLOBAL_BATCH, num_cells=16, targets=targets)
    costs = method.costs(scale)
    return sum(cost.sent_bytes for cost in costs), sum(cost.held_bytes for cost in costs)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_and_send_what_the_plan_says(case: str, world_size: int) -> None:
    name, keys = CASES[case]
    found: list[Measured] = run_ranks(measure, world_size, name, keys)
    method = tiny_method(name, **keys)
    method.begin_run(num_samples=10_000, epoch_samples=10_000, group_size=4, seed=0)
    sent, held = predicted(method, world_size)
    control = 1024.0  # a few reductions of single numbers
    assert sum(one.sent_bytes for one in found) / world_size == pytest.approx(sent, rel=0.1, abs=control)
    assert max(one.held_bytes for one in found) == pytest.approx(held, rel=0.1)


def send_of_every_kind(rank: int, world_size: int) -> dict[str, int]:
    rows = torch.zeros(3 * world_size, 5)
    comm.exchange(rows, [3] * world_size)
    comm.reduce_sum(torch.zeros(10))
    comm.reduce_max(torch.zeros(10))
    comm.gather_rows(torch.zeros(rank + 1, 2))
    comm.broadcast_tensor(torch.zeros(world_size))
    return comm.traffic()


def test_traffic_is_counted_by_verb() -> None:
    R = 4
    for found in run_ranks(send_of_every_kind, R):
        assert found == {
            "exchange": (R - 1) * (comm.HEAD_BYTES + comm.SHORT_BYTES),  # the rows fit in
            "reduce": 2 * (2 * (R - 1) * 40 // R),
            "gather": (R - 1) * (8 + R * 2 * 4),
            "broadcast": (R - 1) * 4,
        }


def test_one_rank_sends_nothing() -> None:
    assert send_of_every_kind(0, 1) == {}
