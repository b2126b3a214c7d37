"""Claims about the average of the weights: what it is, who sees it, and that every engine and resume has the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dist_mlpl.engine import Engine, EngineSettings
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import (
    BATCH_NORM,
    STAGES,
    is_equal,
    is_same,
    largest_difference,
    make_engine,
    train,
    whole_state,
)

pytestmark = pytest.mark.distributed

KINDS = ("plain", *STAGES)
DECAY = 0.7
SGD = {"name": "sgd", "learning_rate": 0.01}
KEYS: dict[str, Any] = {
    "backbone": BATCH_NORM | {"freeze": ("conv1", "bn1")},
    "optimizer": SGD,
    "weight_average": DECAY,
    "micro_batch": 4,
}
HEAD = {"embedding_width": 8, "attention_width": 16}
IMAGES = random_batch(8, seed=99)


def weights_of(engine: Engine) -> dict[str, Tensor]:
    """Parameters and floating buffers that training goes on with."""
    return {name: value for name, value in whole_state(engine).trained.items() if value.is_floating_point()}


def averages_of_every_kind(rank: int, world_size: int) -> dict[str | int, dict[str, Any]]:
    """Five steps with an evaluation in the middle, beside a run that keeps no average."""
    found = {}
    for kind in KINDS:
        engine, bare = make_engine(kind, **KEYS), make_engine(kind, **KEYS | {"weight_average": None})
        begun = engine.predict(IMAGES).logits
        seen = [weights_of(engine)]
        for step in range(5):
            train(engine, 1, start=step)
            train(bare, 1, start=step)
            if step == 2:
                engine.predict(IMAGES)  # without averaging buffers first; the next step must not notice
                bare.predict(IMAGES)
            seen.append(weights_of(engine))
            whole_state(bare)
        state = whole_state(engine)
        logits = engine.predict(IMAGES).logits
        alone = make_engine("plain", **KEYS | {"weight_average": None})  # what `evaluate` does
        alone.load_model(state.model)
        found[kind] = {
            "seen": seen,
            "state": state,
            "is_undisturbed": is_equal(state.trained, whole_state(bare).trained),
            "begins": torch.equal(begun, make_engine("plain", **KEYS).predict(IMAGES).logits),
            "logits": logits,
            "of file": alone.predict(IMAGES).logits,
            "trained": bare.predict(IMAGES).logits,
        }
    return found


@pytest.fixture(scope="module")
def averages() -> dict[str | int, dict[str, Any]]:
    return run_ranks(averages_of_every_kind, 2)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_is_the_bias_corrected_average_of_the_weights_after_each_update(averages, kind):
    seen, state = averages[kind]["seen"][1:], averages[kind]["state"]
    shares = [(1 - DECAY) * DECAY ** (4 - i) / (1 - DECAY**5) for i in range(5)]
    assert sum(shares) == pytest.approx(1.0)
    for name, tensor in state.model.items():
        if name in seen[0]:
            expected = sum(share * weights[name].double() for share, weights in zip(shares, seen, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-7)
    assert not torch.equal(state.model["head.linear.weight"], state.trained["head.linear.weight"])
    assert torch.equal(state.model["backbone.conv1.weight"], state.trained["backbone.conv1.weight"])  # frozen


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_changes_nothing_of_what_is_learned(averages, kind):
    assert averages[kind]["is_undisturbed"]


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_judged_by_the_average_which_is_also_what_the_model_file_holds(averages, kind):
    found = averages[kind]
    assert found["begins"]
    torch.testing.assert_close(found["logits"], found["of file"], rtol=0, atol=1e-6)
    assert float((found["logits"] - found["trained"]).abs().max()) > 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_keeps_the_plain_engines_average(averages, stage):
    found, expected = averages[stage]["state"], averages["plain"]["state"]
    assert largest_difference(found.model, expected.model) < 1e-5
    assert largest_difference(found.moments, expected.moments) < 1e-5
    torch.testing.assert_close(averages[stage]["logits"], averages["plain"]["logits"], rtol=0, atol=1e-4)


def resume_with_an_average(rank: int, world_size: int) -> dict[str | int, bool]:
    found = {}
    for kind in KINDS:

        def make(kind: str | int = kind) -> Engine:
            method = tiny_method("partial_bce", backbone=BATCH_NORM, dropout=0.3)
            return make_engine(kind, method=method, weight_average=0.99)

        engine, other = make(), make()
        train(engine, 3)
        train(other, 1)
        other.predict(IMAGES)  # a load while the average is shown
        other.load(whole_state(engine))
        steps = [train(e, 3, start=3) for e in (other, engine)]
        logits = [e.predict(IMAGES).logits for e in (other, engine)]
        found[kind] = steps[0] == steps[1] and torch.equal(*logits) and is_same(whole_state(other), whole_state(engine))
    return found


@pytest.mark.long
def test_a_resumed_average_goes_on_to_the_bit():
    for found in run_ranks(resume_with_an_average, 2):
        assert found == dict.fromkeys(KINDS, True)


def average_beside_tables(rank: int, world_size: int) -> dict[str, Tensor]:
    engine = make_engine(
        "plain", method=tiny_method("sst", backbone=BATCH_NORM, head=HEAD), optimizer=SGD, weight_average=DECAY
    )
    train(engine, 2)
    engine.average_buffers()
    engine.predict(IMAGES)  # shows the average
    return {name: buffer.clone() for name, buffer in engine.method.named_buffers()}


def test_statistics_are_averaged_over_ranks_and_tables_of_other_shapes_stay():
    one, other = run_ranks(average_beside_tables, 2)
    assert any(table.dim() == 2 for table in one.values())  # the label graph's
    begun = dict(tiny_method("sst", backbone=BATCH_NORM, head=HEAD).named_buffers())
    for name, buffer in one.items():
        assert torch.equal(buffer, other[name])
        assert torch.equal(buffer, begun[name]) == (buffer.dim() == 2), name


def save_or_load(rank: int, world_size: int, states: dict[str | int, Any]) -> dict[Any, Any]:
    if not states:
        engines = {kind: make_engine(kind, **KEYS) for kind in KINDS}
        return {kind: (train(engine, 3), whole_state(engine))[1] for kind, engine in engines.items()}
    is_whole = {}
    for kind in KINDS:
        engine = make_engine(kind, **KEYS)
        for source, state in states.items():
            engine.load(state)
            is_whole[source, kind] = is_same(whole_state(engine), state)
    return is_whole


@pytest.mark.long
def test_an_average_of_any_stage_and_rank_count_loads_at_any_other():
    states = run_ranks(save_or_load, 2, {})[0]
    for found in run_ranks(save_or_load, 3, states):
        assert all(found.values())
        assert len(found) == len(KINDS) ** 2


def test_an_average_can_be_taken_up_and_given_up_at_a_resume():
    keeping, bare = make_engine("plain", **KEYS), make_engine("plain", **KEYS | {"weight_average": None})
    train(keeping, 2)
    train(bare, 2)
    with_average, without = whole_state(keeping), whole_state(bare)
    bare.load(with_average)
    assert is_same(whole_state(bare), without)
    keeping.load(without)
    taken_up = whole_state(keeping)
    assert is_equal(taken_up.model, without.model)
    assert is_equal(taken_up.trained, without.model)


def test_a_model_taken_over_is_its_own_average():
    engine, other = make_engine("plain", **KEYS), make_engine("plain", **KEYS)
    train(engine, 2)
    model = whole_state(engine).model
    other.load_model(model)
    assert is_equal(whole_state(other).model, model)
    assert other.load_matching({"head.linear.bias": torch.ones(5)}) == (["head.linear.bias"], {})
    assert torch.equal(whole_state(other).model["head.linear.bias"], torch.ones(5))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValidationError):
        EngineSettings(weight_average=decay)
