"""Claims about blending on several ranks: poor batches, what the plan says of it, any number of classes.

That ranks change neither what is learned nor what is remembered is claimed for all methods with memory at once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.methods.costs import Scale
from dist_mlpl.methods.table import METHODS
from tests.support.losses import random_targets
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import STAGES, make_engine, own_share, train_at, train_epochs, two_steps_thrice

pytestmark = pytest.mark.distributed

SMALL = {"head": {"attention_width": 8, "embedding_width": 6, "feature_width": 12}, "start_epoch": 1}
CASES: dict[str, dict[str, Any]] = {
    "sarb": {"prototypes": "kmeans", "num_prototypes": 3, "renew_every_epochs": 1},
    "dsrb": {"renew_every_epochs": 1},
}
NUM_SENT = 16  # steps; known positives, all that is sent, are few in each
WIDE = {"head": {"attention_width": 8, "embedding_width": 6, "feature_width": 128}, "start_epoch": 1}


def poor_batches() -> list[Batch]:
    """Batches for 2 ranks of which one has nothing to mix, or nothing at all, while the other has."""
    batch = random_batch(16, seed=5)
    of_rank_1 = torch.arange(16) // 4 % 2 == 1

    def labelled(labels: Tensor) -> Batch:
        return batch._replace(targets=torch.where(of_rank_1[:, None], labels, batch.targets))

    everywhere = torch.zeros(16, dtype=torch.bool)
    return [
        labelled(torch.ones_like(batch.targets)),
        labelled(torch.zeros_like(batch.targets)),
        labelled(batch.targets.clamp(max=0)),
        batch._replace(valid=~of_rank_1),
        batch._replace(valid=everywhere),
    ]


def train_poor(rank: int, world_size: int) -> dict[Any, list[float]]:
    found = {}
    for kind in ("plain", *STAGES):
        method = tiny_method("blending", **SMALL | CASES["sarb"])
        engine = make_engine(kind, method=method, micro_batch=4, optimizer={"name": "sgd", "learning_rate": 0.01},
                             batch_norm="frozen")  # fmt: skip
        train_epochs(engine, two_steps_thrice(known_fraction=0.4))
        steps = [train_at(engine, batch, Progress(epoch=4, step=10 + n)) for n, batch in enumerate(poor_batches())]
        found[kind] = [number for step in steps for number in (step.loss, step.grad_norm)]
    return found


def test_a_rank_with_nothing_to_mix_neither_hangs_nor_differs_between_engines() -> None:
    found = run_ranks(train_poor, 2)[0]
    for losses in found.values():
        assert all(math.isfinite(loss) for loss in losses)
        assert losses == pytest.approx(found["plain"], rel=1e-5, abs=1e-5)
        assert losses[-2:] == [0.0, 0.0]


def send(rank: int, world_size: int, case: str) -> tuple[float, float]:
    """Bytes that this rank sends in recall and observe of a step that gathers and mixes, and bytes that it holds."""
    engine = make_engine("plain", method=tiny_method("blending", **CASES[case] | WIDE), global_batch=64)
    method, sent = engine.method, []
    for step in range(NUM_SENT):
        progress = Progress(epoch=step, step=step)
        method.begin_epoch(progress)
        batch = random_batch(64, seed=step)
        share = own_share(batch._replace(index=batch.index + 64 * step))
        before = sum(comm.traffic().values())
        recalled = method.recall(share, progress)
        between = sum(comm.traffic().values())
        output = engine.train_step(share, recalled, progress)
        after = sum(comm.traffic().values())
        method.observe(share, output)
        bank = method.banks()["prototypes"]
        bank.flush()  # an epoch is one step here: nothing follows with which its features would go
        sent.append(between - before + sum(comm.traffic().values()) - after)
    held = sum(rows.nbytes for name, rows in bank.pack(bank.held_shards).items() if name != "shards")
    return sum(sent[2:]) / len(sent[2:]), held + sum(part.nbytes for part in bank.table())  # type: ignore[attr-defined]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", ["sarb", "dsrb"])
def test_ranks_hold_and_send_what_the_plan_says(case: str, world_size: int) -> None:
    found = run_ranks(send, world_size, case)
    method = tiny_method("blending", **CASES[case] | WIDE)
    targets = np.concatenate([random_batch(64, seed=step).targets.numpy() for step in range(50)])
    prototypes, mixtures = method.costs(Scale(world_size=world_size, global_batch=64, num_cells=16, targets=targets))
    control = 256.0  # reductions of single numbers
    sent = sum(one for one, _ in found) / world_size
    assert sent == pytest.approx(prototypes.sent_bytes, rel=0.1, abs=control)
    assert prototypes.sent_bytes > 10 * control
    assert max(held for _, held in found) == pytest.approx(prototypes.held_bytes, rel=0.1)
    assert mixtures.flops > 0


def large_step(rank: int, world_size: int, num_classes: int) -> list[float]:
    """Two epochs of one step at C classes: one that gathers prototypes, one that mixes."""
    torch.manual_seed(0)
    head = {"attention_width": 32, "embedding_width": 32, "feature_width": 32}
    settings = METHODS["blending"](
        name="blending", backbone={"name": "resnet_small_gn"}, head=head, start_epoch=1, prototypes="quadrants"
    )
    method = settings.build(num_classes=num_classes, image_size=32)
    engine = make_engine("plain", method=method, global_batch=8, batch_norm="frozen")
    batch = random_batch(8, seed=0)
    targets = random_targets((8, num_classes), 20 / num_classes, torch.Generator().manual_seed(1))
    share = own_share(batch._replace(targets=targets))
    losses = []
    for epoch in range(2):
        progress = Progress(epoch=epoch, step=epoch)
        method.begin_epoch(progress)
        recalled = method.recall(share, progress)
        output = engine.train_step(share, recalled, progress)
        method.observe(share, output)
        losses += [float(output.loss), *(float(comm.reduce_sum(recalled[n].clone())) for n in ("num_known",))]
    drawn = comm.reduce_sum((recalled["drawn_classes"] >= 0).sum())
    return [*losses, float(drawn)]


@pytest.mark.parametrize("num_classes", [80, 601, pytest.param(9605, marks=pytest.mark.long)])
def test_steps_run_at_any_number_of_classes_on_one_and_two_ranks(num_classes: int) -> None:
    one, two = run_ranks(large_step, 1, num_classes)[0], run_ranks(large_step, 2, num_classes)[0]
    assert [one[0], one[2]] == pytest.approx([two[0], two[2]], rel=1e-4)
    assert one[-1] == two[-1] > 0
