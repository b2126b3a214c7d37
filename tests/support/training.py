"""Owns how tests train: a tiny engine of any kind, shares of a global batch, and steps with all they changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_mlpl import comm
from dist_mlpl.batch import Batch, Progress, RunLength
from dist_mlpl.engine import Engine, EngineSettings, EngineState
from dist_mlpl.methods.base import Method
from dist_mlpl.optimizer import OptimizerSettings, ScheduleSettings
from dist_mlpl.world import World
from tests.support.methods import random_batch, tiny_method

GROUP_SIZE = 4
STAGES = (0, 1, 2, 3)
BATCH_NORM = {"name": "resnet_small"}
GROUP_NORM = {"name": "resnet_small_gn"}


class LayerNormTrunk(nn.Module):
    """Patches, then two pre-norm residual MLPs with torch's LayerNorm; as wide as the small residual net."""

    def __init__(self, num_features: int = 128) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, num_features, 8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(num_features), nn.Linear(num_features, 64), nn.GELU(), nn.Linear(64, num_features)
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(num_features)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).permute(0, 2, 3, 1)  # (B, h, w, F)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.norm(tokens).permute(0, 3, 1, 2)


def layer_norm_method() -> Method:
    """A `partial_bce` method on a trunk of LayerNorms."""
    method = tiny_method("partial_bce", backbone=GROUP_NORM)
    method.backbone = LayerNormTrunk(method.backbone.num_features)  # type: ignore[assignment]
    return method


LENGTH = RunLength(num_epochs=1, num_samples=10_000)


def make_engine(
    kind: str | int,
    *,
    backbone: dict[str, Any] = GROUP_NORM,
    method: Method | None = None,
    optimizer: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    global_batch: int = 16,
    **settings: Any,
) -> Engine:
    """An engine on this rank, seeded.

    Args:
        kind: `plain`, or DeepSpeed's ZeRO stage.
        backbone: of a `partial_bce` method, unless `method` is given.
        method: to train.
        optimizer: keys of its settings; AdamW at 1e-3 by default.
        schedule: keys of its settings; constant by default.
        global_batch: G.
        settings: of the engine.
    """
    which = {"kind": "plain"} if kind == "plain" else {"zero_stage": kind}
    return Engine(
        method or tiny_method("partial_bce", backbone=backbone),
        EngineSettings(**(which | settings)),
        OptimizerSettings(**(optimizer or {})),
        ScheduleSettings(**(schedule or {"name": "constant"})),
        length=LENGTH,
        world=World(rank=comm.rank(), size=comm.world_size(), local_rank=comm.rank(), local_size=comm.world_size()),
        global_batch=global_batch,
        group_size=GROUP_SIZE,
        seed=0,
    )


def own_share(batch: Batch) -> Batch:
    """This rank's share of a global batch: groups dealt in turn, short shares padded with rows that are not valid."""
    num_groups = batch.num_images // GROUP_SIZE
    longest = -(-num_groups // comm.world_size())
    owned = list(range(comm.rank(), num_groups, comm.world_size()))
    rows = [row for group in owned for row in range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)]
    padding = [0] * (longest * GROUP_SIZE - len(rows))
    share = Batch._make(None if field is None else field[rows + padding] for field in batch)
    share.valid[len(rows) :] = False
    share.index[len(rows) :] = -1
    return share


class Step(NamedTuple):
    """What one step told."""

    loss: float
    grad_norm: float
    terms: dict[str, float]


def train(engine: Engine, num_steps: int, *, start: int = 0, global_batch: int = 16) -> list[Step]:
    """Steps on random global batches, keyed by the step's number."""
    return [train_on(engine, random_batch(global_batch, seed=step), step) for step in range(start, start + num_steps)]


def train_on(engine: Engine, batch: Batch, step: int) -> Step:
    """One step of the first epoch on this rank's share of a global batch."""
    return train_at(engine, batch, Progress(step=step, samples_consumed=step * batch.num_images))


def train_at(engine: Engine, batch: Batch, progress: Progress) -> Step:
    """One step on this rank's share of a global batch."""
    share = own_share(batch)
    output = engine.train_step(share, engine.method.recall(share, progress), progress)
    engine.method.observe(share, output)
    terms = {name: float(term) for name, term in output.terms.items()}
    return Step(float(output.loss), output.extras["grad_norm"], terms)


def two_steps_thrice(*, known_fraction: float) -> list[Batch]:
    """Three epochs of two steps on the same 32 samples; some rows undecodable, a group of 4 all undecodable."""
    found = []
    for number in range(2):
        batch = random_batch(16, seed=number, known_fraction=known_fraction)
        valid = torch.ones(16, dtype=torch.bool)
        valid[[1, 8, 9, 10, 11]] = False
        found.append(batch._replace(valid=valid, index=batch.index * 31 % 97 + 97 * number))
    return found * 3


def train_epochs(engine: Engine, batches: Sequence[Batch]) -> list[Step]:
    """Epochs of two steps, each begun as a run begins it."""
    steps = []
    for step, batch in enumerate(batches):
        size = batch.num_images
        progress = Progress(
            epoch=step // 2, samples_consumed=size * (step % 2), step=step, fraction=step / len(batches)
        )
        if progress.samples_consumed == 0:
            engine.method.begin_epoch(progress)
        steps.append(train_at(engine, batch, progress))
    return steps


def memory_of(method: Method) -> dict[str, Tensor]:
    """The first 200 rows of every bank, on every rank."""
    found = {}
    for name, bank in method.banks().items():
        rows = torch.arange(min(200, bank.spec.num_rows))
        found |= {f"{name}/{column}": values for column, values in bank.read(rows).items()}
    return found


def whole_state(engine: Engine) -> EngineState:
    """The engine's state, on every rank."""
    state = comm.broadcast_object(engine.state())
    assert state is not None
    return state


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all tensors of two dictionaries with the same names and shapes."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in expected)


def is_same(found: EngineState, expected: EngineState) -> bool:
    """Equal to the bit, in every tensor and in the number of updates."""
    return (
        found.num_updates == expected.num_updates
        and is_equal(found.model, expected.model)
        and is_equal(found.moments, expected.moments)
    )


def is_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same names and the same bits."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
