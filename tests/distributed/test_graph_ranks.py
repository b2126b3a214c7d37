"""Claims about the label graph and WELDON under every engine on two ranks, whatever labels a rank happens to get."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_mlpl.batch import Batch
from dist_mlpl.methods.base import Method
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import GROUP_SIZE, STAGES, Step, largest_difference, make_engine, train_on, whole_state

pytestmark = pytest.mark.distributed

KINDS = ("plain", *STAGES)
# The weights of the gates, 3 * 192 * 192, are above what stage 3 keeps gathered between uses.
VARIANTS: dict[str, dict[str, Any]] = {
    "sender": {"pooling": "weldon", "graph": {"width": 192, "identity": "learned"}},
    "sender in bf16": {"pooling": "weldon", "graph": {"width": 192, "identity": "learned"}},
    "pair": {"pooling": {"name": "weldon", "num_top": 3}, "graph": {"messages": "pair"}, "pseudo_weight": 0.5},
}
Found = dict[str | int, tuple[list[Step], dict[str, torch.Tensor], torch.Tensor]]


def graphed_method(variant: str) -> Method:
    method = tiny_method("partial_bce", **VARIANTS[variant])
    torch.nn.init.normal_(method.graph.output_weight, std=0.1)
    return method


def batches() -> list[Batch]:
    """Global batches of 16: as usual; a rank without labels; a rank without valid rows; beliefs beside labels."""
    batch = random_batch(16, seed=5)
    of_rank_1 = torch.arange(16) // GROUP_SIZE % 2 == 1
    return [
        batch,
        batch._replace(targets=torch.where(of_rank_1[:, None], 0, batch.targets)),
        batch._replace(valid=~of_rank_1),
        batch._replace(pseudo_targets=random_batch(16, seed=6).targets),
    ]


def train_every_kind(rank: int, world_size: int, variant: str) -> Found:
    found: Found = {}
    for kind in KINDS:
        keys = {"micro_batch": GROUP_SIZE, "optimizer": {"name": "sgd", "learning_rate": 0.01}}
        keys["precision"] = "bf16" if variant.endswith("bf16") else "fp32"
        engine = make_engine(kind, method=graphed_method(variant), **keys)
        steps = [train_on(engine, batch, number) for number, batch in enumerate(batches())]
        found[kind] = steps, whole_state(engine).model, engine.predict(random_batch(8, seed=9)).logits
    return found


@pytest.fixture(scope="module", params=VARIANTS)
def found(request: pytest.FixtureRequest) -> dict[int, Found]:
    return {num_ranks: run_ranks(train_every_kind, num_ranks, request.param)[0] for num_ranks in (1, 2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_engine_on_any_ranks_learns_what_the_plain_one_learns_alone(found, num_ranks, kind):
    (steps, model, logits), (expected_steps, expected_model, expected_logits) = (
        found[num_ranks][kind],
        found[1]["plain"],
    )
    for step, expected in zip(steps, expected_steps, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-5)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert largest_difference(model, expected_model) < 1e-5
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
