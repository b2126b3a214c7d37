"""Claims about SRN's stages on several ranks and under ZeRO: the model of one rank, frozen parts untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.methods import tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import GROUP_SIZE, STAGES, Step, largest_difference, make_engine, train, whole_state

pytestmark = pytest.mark.distributed

# Without a norm over images: its statistics are a micro-batch's own. Two classes at a time, made again backward.
SPATIAL = {"layer": "layer2", "attention_width": 16, "mixed_width": 8, "kernels": 2, "chunk": 2}
SRN_STAGES = ("attention", "branch", "joint")
FROZEN = {
    "attention": ("backbone.", "head."),
    "branch": ("backbone.", "head.", "spatial.hidden.", "spatial.maps.attention_", "spatial.maps.confidence_"),
    "joint": (),
}

Found = dict[str | int, tuple[list[Step], dict[str, torch.Tensor], dict[str, torch.Tensor]]]


def train_stage(rank: int, world_size: int, stage: str, kinds: tuple[str | int, ...], micro_batch: int | None) -> Found:
    """Three steps: what they told, the model before and after."""
    found: Found = {}
    for kind in kinds:
        method = tiny_method("srn", stage=stage, spatial=SPATIAL, init_from="elsewhere")
        engine = make_engine(kind, method=method, micro_batch=micro_batch)
        before = whole_state(engine).model
        found[kind] = train(engine, 3), before, whole_state(engine).model
    return found


@pytest.fixture(scope="module", params=SRN_STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(stage: str) -> Any:
    return run_ranks(train_stage, 1, stage, ("plain",), None)[0]["plain"]


@pytest.fixture(scope="module")
def on_two(stage: str) -> Found:
    return run_ranks(train_stage, 2, stage, ("plain", *STAGES), GROUP_SIZE)[0]


@pytest.mark.parametrize("kind", ["plain", *STAGES])
def test_two_ranks_in_micro_batches_give_what_one_rank_gives(stage: str, alone: Any, on_two: Found, kind: Any) -> None:
    assert_same(on_two[kind], alone)


def test_three_ranks_of_which_two_are_padded_give_what_one_rank_gives(stage: str, alone: Any) -> None:
    assert_same(run_ranks(train_stage, 3, stage, ("plain",), None)[0]["plain"], alone)


def test_frozen_parts_keep_their_bits_and_all_others_move(stage: str, on_two: Found) -> None:
    for _, before, after in on_two.values():
        for name, value in before.items():
            assert torch.equal(value, after[name]) == name.startswith(FROZEN[stage]), name


def assert_same(found: Any, expected: Any) -> None:
    for step, other in zip(found[0], expected[0], strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-5)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert step.terms == pytest.approx(other.terms, rel=1e-5)
    assert largest_difference(found[2], expected[2]) < 1e-4
