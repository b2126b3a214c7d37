"""Claims that hold for every row of the method table on several ranks, whatever labels a rank happens to get."""

from __future__ import annotations

import math

import pytest
import torch

from dist_mlpl.batch import Batch
from dist_mlpl.methods.table import METHODS
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import GROUP_SIZE, STAGES, Step, largest_difference, make_engine, train_on, whole_state

pytestmark = pytest.mark.distributed

KINDS = ("plain", *STAGES)


def poor_batches() -> dict[str, Batch]:
    """Global batches of 16; on 2 ranks, groups 0 and 2 are rank 0's, 1 and 3 rank 1's, one group a micro-batch."""
    batch = random_batch(16, seed=5)
    group = torch.arange(16) // GROUP_SIZE
    of_rank_1, first = group % 2 == 1, group == 0
    targets, absent_or_unknown = batch.targets, batch.targets.clamp(max=0)
    unknown, everywhere = torch.zeros_like(targets), torch.ones(16, dtype=torch.bool)

    def labelled(rows: torch.Tensor, labels: torch.Tensor) -> Batch:
        return batch._replace(targets=torch.where(rows[:, None], labels, targets))

    return {
        "a rank without positives": labelled(of_rank_1, absent_or_unknown),
        "no positive anywhere": labelled(everywhere, absent_or_unknown),
        "a rank without known labels": labelled(of_rank_1, unknown),
        "no known label anywhere": labelled(everywhere, unknown),
        "a rank without valid rows": batch._replace(valid=~of_rank_1),
        "a micro-batch without valid rows": batch._replace(valid=~first),
        "no valid row anywhere": batch._replace(valid=~everywhere),
        "one rank without positives, the other without valid rows": labelled(~of_rank_1, absent_or_unknown)._replace(
            valid=~of_rank_1
        ),
    }


Found = dict[str | int, tuple[dict[str, Step], dict[str, torch.Tensor]]]


def train_on_poor_batches(rank: int, world_size: int, name: str) -> Found:
    found: Found = {}
    for kind in KINDS:
        engine = make_engine(
            kind, method=tiny_method(name), micro_batch=GROUP_SIZE, optimizer={"name": "sgd", "learning_rate": 0.01}
        )
        steps = {case: train_on(engine, batch, step) for step, (case, batch) in enumerate(poor_batches().items())}
        found[kind] = steps, whole_state(engine).model
    return found


@pytest.fixture(scope="module", params=METHODS)
def found(request: pytest.FixtureRequest) -> Found:
    return run_ranks(train_on_poor_batches, 2, request.param)[0]


@pytest.mark.parametrize("case", poor_batches())
@pytest.mark.parametrize("kind", KINDS)
def test_a_poor_batch_neither_hangs_nor_differs_between_engines(found, kind, case):
    step, expected = found[kind][0][case], found["plain"][0][case]
    assert math.isfinite(step.loss)
    assert step.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-5)
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5, abs=1e-5)
    assert step.terms == pytest.approx(expected.terms, rel=1e-5, abs=1e-5)
    assert sum(step.terms.values()) == pytest.approx(step.loss, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_after_poor_batches_all_engines_hold_the_same_model(found, kind):
    assert largest_difference(found[kind][1], found["plain"][1]) < 1e-5


def test_rows_that_are_not_valid_pull_nowhere(found):
    for steps, _ in found.values():
        assert steps["no valid row anywhere"].loss == steps["no valid row anywhere"].grad_norm == 0.0
