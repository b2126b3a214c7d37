"""Claims about an epoch cut at random: on any ranks, workers and batches, each sample once, and as it was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dist_mlpl.batch import Batch
from dist_mlpl.config import load_config
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.order import PADDING, EpochOrder, check_global_batch, last_position
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.local import train_here
from dist_mlpl.tools.audit import audit
from tests.support.ranks import run_ranks
from tests.support.runs import tiny_config, tiny_shards, write_config
from tests.support.sets import order_over, stream_over

pytestmark = pytest.mark.integration

RANKS, WORKERS = (1, 2, 3, 4, 8), (0, 1, 3)
EPOCH = 3
NUM_CASES, NUM_LONG_CASES = 8, 40


class Attempt(NamedTuple):
    """One life of a run, from a commit to the next crash, resize or end of the epoch."""

    num_ranks: int
    num_workers: int
    global_batch: int
    num_steps: int  # that are committed
    num_lost: int  # that were made after the last commit, and are lost with it


def attempts_of(random: np.random.Generator, order: EpochOrder) -> list[Attempt]:
    """Random attempts that go through an epoch; some have no commit, the last finds no step left."""
    change = int(random.integers(1, 4))  # the attempt from which on the other batch holds
    batches = [order.group_size * int(random.integers(4, 9)) for _ in range(2)]
    attempts: list[Attempt] = []
    position = 0
    while True:
        batch = batches[len(attempts) >= change]
        left = (order.num_samples - position) // batch
        ranks = [count for count in RANKS if count * order.group_size <= batch]
        steps = min(left, int(random.integers(0, 4)))
        lost = min(left - steps, int(random.integers(0, 3)))
        attempts.append(Attempt(int(random.choice(ranks)), int(random.choice(WORKERS)), batch, steps, lost))
        position += steps * batch
        if not left:
            return attempts


Row = tuple[int, bytes, bytes, bytes, bool]  # index, image, targets, crop, flipped


class Step(NamedTuple):
    """What all ranks were handed for one step."""

    rows: dict[int, Row]  # by position
    indices: list[int]  # with repeats, if there were any
    shapes: set[Any]


def steps_of(index: SplitIndex, order: EpochOrder, attempt: Attempt, start: int, num_steps: int) -> list[Step]:
    """The first steps of an attempt, on every rank in turn; more are read ahead and thrown away."""
    steps = [Step({}, [], set()) for _ in range(num_steps)]
    labels = LabelStore(index).at(0)
    for rank in range(attempt.num_ranks):
        stream = stream_over(index, rank=rank, size=attempt.num_ranks, num_workers=attempt.num_workers)
        batches = stream.train_batches(order, labels, epoch=EPOCH, start=start, global_batch=attempt.global_batch)
        for step in steps:
            add_share(step, next(batches), stream.take_consumed().positions[0])
        batches.close()
        stream.close()
    return steps


def add_share(step: Step, batch: Batch, positions: np.ndarray) -> None:
    step.shapes.add(batch.images.shape)
    for row, position in enumerate(positions.tolist()):
        assert bool(batch.valid[row]) == (position != PADDING) == (int(batch.index[row]) != PADDING)
        if position == PADDING:
            continue
        assert position not in step.rows, "two ranks were handed one position"
        fields = (batch.images[row], batch.targets[row], batch.crop[row])
        image, targets, crop = (field.contiguous().numpy().tobytes() for field in fields)
        step.rows[position] = (int(batch.index[row]), image, targets, crop, bool(batch.flipped[row]))
        step.indices.append(int(batch.index[row]))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SplitIndex:
    """233 tiny images in about 18 shards: no round number of anything."""
    url = tiny_shards(tmp_path_factory.mktemp("exactly"), num_train=233, num_test=1)
    return SplitIndex(load_manifest(url), "train")


class Undisturbed(NamedTuple):
    """An epoch on one rank, decoded in the step itself."""

    order: EpochOrder
    rows: dict[int, Row]


@pytest.fixture(scope="module")
def undisturbed(index: SplitIndex) -> dict[int, Undisturbed]:
    """By group size."""
    found = {}
    for group_size, num_lanes, window_samples in ((4, 3, 16), (8, 5, 24)):
        options = {"group_size": group_size, "num_lanes": num_lanes, "window_samples": window_samples}
        order = order_over(index, epoch=EPOCH, **options)
        whole = order.num_samples // group_size
        steps = steps_of(index, order, Attempt(1, 0, group_size, whole, 0), 0, whole)
        found[group_size] = Undisturbed(order, {p: row for step in steps for p, row in step.rows.items()})
    return found


@pytest.mark.parametrize(
    "seed", [*range(NUM_CASES), *(pytest.param(s, marks=pytest.mark.long) for s in range(NUM_CASES, NUM_LONG_CASES))]
)
def test_through_crashes_resizes_and_a_change_of_batch_every_planned_sample_comes_once_and_the_same(
    seed: int, index: SplitIndex, undisturbed: dict[int, Undisturbed]
) -> None:
    random = np.random.default_rng(seed)
    order, expected = undisturbed[int(random.choice([4, 8]))]
    attempts = attempts_of(random, order)
    position, committed = 0, []
    for attempt in attempts:
        check_global_batch(
            attempt.global_batch,
            group_size=order.group_size,
            world_size=attempt.num_ranks,
            num_samples=order.num_samples,
        )
        steps = steps_of(index, order, attempt, position, attempt.num_steps + attempt.num_lost)
        for number, step in enumerate(steps):
            start = position + number * attempt.global_batch
            planned = range(start, start + attempt.global_batch)
            assert sorted(step.rows) == list(planned), "a step is its stretch of positions, on any ranks"
            assert sorted(step.indices) == sorted(order.indices(planned.start, planned.stop).tolist())
            assert len(step.shapes) == 1, "every rank runs the same shapes"
            different = [p for p in planned if step.rows[p] != expected[p]]
            assert different == [], "a sample is made as its position says, by whomever and whenever"
        committed += [i for step in steps[: attempt.num_steps] for i in step.indices]
        position += attempt.num_steps * attempt.global_batch
    assert position == last_position(position, global_batch=attempts[-1].global_batch, num_samples=order.num_samples)
    assert order.num_samples - position < attempts[-1].global_batch
    assert len(committed) == len(set(committed)) == position
    assert sorted(committed) == sorted(order.indices(0, position).tolist())


def test_the_cases_cover_all_ranks_workers_and_a_change_of_batch(undisturbed: dict[int, Undisturbed]) -> None:
    for num_cases in (NUM_CASES, NUM_LONG_CASES):
        every: list[list[Attempt]] = []
        for seed in range(num_cases):
            random = np.random.default_rng(seed)
            every.append(attempts_of(random, undisturbed[int(random.choice([4, 8]))].order))
        attempts = [attempt for case in every for attempt in case]
        assert {attempt.num_ranks for attempt in attempts} == set(RANKS)
        assert {attempt.num_workers for attempt in attempts} == set(WORKERS)
        assert any(attempt.num_lost for attempt in attempts)
        assert sum(len({attempt.global_batch for attempt in case}) == 2 for case in every) > num_cases / 2


@pytest.mark.parametrize(
    "engine",
    [
        {"kind": "plain"},
        pytest.param({"kind": "deepspeed", "zero_stage": 1}, marks=pytest.mark.long),
        pytest.param({"kind": "deepspeed", "zero_stage": 2}, marks=pytest.mark.long),
    ],
    ids=lambda engine: f"{engine['kind']}-{engine.get('zero_stage', '')}".strip("-"),
)
def test_a_run_that_goes_from_two_ranks_to_one_to_three_proves_exact(engine: dict[str, Any], tmp_path: Path) -> None:
    document = tiny_config(tiny_shards(tmp_path / "tiny"), group_size=4, engine=engine)
    path, out = write_config(tmp_path / "run.yaml", document), str(tmp_path / "run")

    def attempt(rank: int, world_size: int, max_steps: int | None) -> None:
        train_here(load_config(path, out=out), max_steps=max_steps)

    for num_ranks, max_steps in ((2, 3), (1, 4), (3, None)):
        run_ranks(attempt, num_ranks, max_steps, use_group=False)
    found = audit(out)
    assert found.faults == []
    assert [epoch.num_distinct for epoch in found.epochs] == [96, 96]
    assert (found.head.attempt, found.head.step, found.head.epoch) == ("0003", 12, 2)
