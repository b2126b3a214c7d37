"""Claims about the engine on several ranks. One start of processes runs many cases; the tests read what came back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_mlpl import comm
from dist_mlpl.batch import StepOutput
from dist_mlpl.engine import Engine, EngineSettings, EngineState, start
from dist_mlpl.engines.state import gather_state
from dist_mlpl.errors import RunError
from dist_mlpl.methods.base import Method
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import (
    BATCH_NORM,
    GROUP_NORM,
    STAGES,
    Step,
    is_equal,
    is_same,
    largest_difference,
    layer_norm_method,
    make_engine,
    train,
    train_on,
    whole_state,
)

pytestmark = pytest.mark.distributed

KINDS = ("plain", *STAGES)
SGD = {"name": "sgd", "learning_rate": 1e-3}


def assert_steps_close(found: list[Step], expected: list[Step], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=tolerance, abs=tolerance)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerance, abs=tolerance)


# Against the plain engine --------------------------------------------------------------------------------------------


def steps_of_every_kind(rank: int, world_size: int) -> dict[str, dict[str | int, Any]]:
    for _ in range(2):  # the second finds the group already there
        assert start(EngineSettings()).size == dist.get_world_size() == world_size
    names = ("batch_norm", "predicted", "bf16", "group_norm", "layer_norm", "first_rank", "average")
    found: dict[str, dict[str | int, Any]] = {name: {} for name in names}
    schedule = {"name": "cosine", "warmup_samples": 64}
    for kind in KINDS:
        keys = {"head_multiplier": 3.0, "weight_decay": 0.05}
        engine = make_engine(kind, backbone=BATCH_NORM, optimizer=keys)
        images = random_batch(8, seed=99)
        logits = [engine.predict(images).logits]
        found["batch_norm"][kind] = []
        for number in range(2):  # evaluation and training take turns, as epochs do
            found["batch_norm"][kind] += train(engine, 1, start=number)
            logits.append(engine.predict(images).logits)
        found["predicted"][kind] = torch.stack(logits)
        found["bf16"][kind] = train(make_engine(kind, backbone=BATCH_NORM, precision="bf16"), 2)
        engine = make_engine(kind, optimizer=SGD | keys, schedule=schedule)
        found["group_norm"][kind] = train(engine, 10), whole_state(engine).model
        torch.manual_seed(0)
        engine = make_engine(kind, method=layer_norm_method(), optimizer=SGD)
        found["layer_norm"][kind] = train(engine, 10), whole_state(engine).model
        found["first_rank"][kind] = starts_with_the_first_ranks_tensors(kind, rank)
        found["average"][kind] = averages_statistics(kind)
    return found


def starts_with_the_first_ranks_tensors(kind: str | int, rank: int) -> bool:
    method = tiny_method("partial_bce", backbone=BATCH_NORM)
    expected = {name: tensor.clone() for name, tensor in [*method.named_parameters(), *method.named_buffers()]}
    with torch.no_grad():
        for tensor in [*method.parameters(), *method.buffers()]:
            tensor.add_(rank)
    engine = make_engine(kind, method=method)
    state = gather_state(engine._backend, num_updates=0, keep=True)
    return state is not None and is_equal(state.model, expected)


def averages_statistics(kind: str | int) -> bool:
    engine = make_engine(kind, backbone=BATCH_NORM | {"freeze": ("conv1", "bn1")})
    train(engine, 1)
    statistics = {n: b for n, b in engine.method.named_buffers() if b.is_floating_point()}
    every = comm.gather_objects({name: buffer.clone() for name, buffer in statistics.items()})
    engine.average_buffers()
    for name, buffer in statistics.items():
        values = [rank[name].double() for rank in every]
        if name.startswith("backbone.bn1.") != torch.equal(values[0], values[-1]):
            return False  # frozen statistics are alike on all ranks, others are not
        if not torch.equal(buffer, torch.stack(values).mean(0).float()):
            return False
    return True


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str | int, Any]]:
    return run_ranks(steps_of_every_kind, 2, use_group=False)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_steps_equal_the_plain_engines(steps, stage):
    assert_steps_close(steps["batch_norm"][stage], steps["batch_norm"]["plain"], 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_before_between_and_after_steps_equal_the_plain_engines(steps, stage):
    torch.testing.assert_close(steps["predicted"][stage], steps["predicted"]["plain"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_under_autocast_too_gradients_are_summed_in_float32(steps, stage):
    assert_steps_close(steps["bf16"][stage], steps["bf16"]["plain"], 1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm"])
@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_with_layer_or_group_norm_and_sgd_equal_the_plain_engines(steps, stage, norm):
    (losses, model), (expected_losses, expected_model) = steps[norm][stage], steps[norm]["plain"]
    assert_steps_close(losses, expected_losses, 1e-5)
    assert largest_difference(model, expected_model) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_starts_with_the_first_ranks_parameters_and_buffers(steps, kind):
    assert steps["first_rank"][kind]


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_statistics_are_the_mean_over_ranks_and_frozen_ones_keep_their_bits(steps, kind):
    assert steps["average"][kind]


def one_step_from_plain_states(rank: int, world_size: int) -> dict[tuple[int, int], tuple[float, float]]:
    """Ten states of a plain run, each handed to every stage for one step; every second one clips."""
    keys = {"backbone": BATCH_NORM, "micro_batch": 4}  # two micro-batches a rank
    plain = [make_engine("plain", clip_norm=clip_norm, **keys) for clip_norm in (0.0, 0.3)]
    states = [whole_state(plain[0])]
    for number in range(10):
        engine = plain[number % 2]
        engine.load(states[-1])
        step = train(engine, 1, start=number)
        assert step[0].grad_norm > 0.3, "nothing to clip"
        states.append(whole_state(engine))
    found = {}
    for stage in STAGES:
        engines = [make_engine(stage, clip_norm=clip_norm, **keys) for clip_norm in (0.0, 0.3)]
        for number in range(10):
            engine = engines[number % 2]
            engine.load(states[number])
            train(engine, 1, start=number)
            after, expected = whole_state(engine), states[number + 1]
            assert after.num_updates == expected.num_updates == number + 1
            found[stage, number] = (
                largest_difference(after.model, expected.model),
                largest_difference(after.moments, expected.moments),
            )
    return found


def test_one_step_from_any_plain_state_ends_where_the_plain_engine_does():
    for found in run_ranks(one_step_from_plain_states, 2):
        assert len(found) == 40
        for case, (of_model, of_moments) in found.items():
            assert of_model < 1e-5, case
            assert of_moments < 1e-5, case


# Numbers that are not finite -----------------------------------------------------------------------------------------

POISONED = 13  # an index of the last group, which rank 1 of 2 owns


class Poisoned(type(tiny_method("partial_bce"))):  # type: ignore[misc]
    """A method in which one image makes the loss, or only its gradient, NaN."""

    fault = "loss"

    def forward(self, batch: Any, recalled: Any) -> StepOutput:
        output = super().forward(batch, recalled)
        if recalled is None or not bool((batch.index == POISONED).any()):
            return output
        if self.fault == "loss":
            return output._replace(loss=output.loss * torch.nan, terms={"bce": output.terms["bce"] * torch.nan})
        return output._replace(
            loss=output.loss + (output.loss * 0.0).sqrt()
        )  # adds 0; its gradient is infinity times 0


def poison(rank: int, world_size: int) -> dict[tuple[str | int, str], tuple[str, str, bool]]:
    found = {}
    for kind in KINDS:
        for fault in ("loss", "gradient"):
            method: Method = tiny_method("partial_bce", backbone=GROUP_NORM)
            method.__class__ = type("Poisoned", (Poisoned,), {"fault": fault})
            engine = make_engine(kind, method=method, micro_batch=4)
            healthy = random_batch(16, seed=0)
            train_on(engine, healthy._replace(index=healthy.index + 100), 0)
            before = whole_state(engine)
            with pytest.raises(RunError) as caught:
                train_on(engine, random_batch(16, seed=1), 7)
            found[kind, fault] = str(caught.value.found), str(caught.value.where), is_same(whole_state(engine), before)
    return found


@pytest.fixture(scope="module")
def faults() -> list[dict[tuple[str | int, str], tuple[str, str, bool]]]:
    return run_ranks(poison, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_one_ranks_loss_stops_all_before_anything_moves(faults, kind):
    for found, where, is_unmoved in (rank[kind, "loss"] for rank in faults):
        assert found == "the loss is not finite at step 7"
        assert where == "rank 1: loss=nan, bce=nan"
        assert is_unmoved


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_one_ranks_gradient_alone_stops_all_before_anything_moves(faults, kind):
    for found, where, is_unmoved in (rank[kind, "gradient"] for rank in faults):
        assert found == "the gradient norm is not finite at step 7"
        assert where.startswith("rank 1: loss=0.")
        assert "bce=0." in where
        assert "gradient of head.linear." in where
        assert "rank 0" not in where
        assert is_unmoved


# Saving and loading --------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "adamw": {"freeze": ("conv1", "bn1", "layer1"), "dropout": 0.3, "clip_norm": 0.5, "micro_batch": 4},
    "sgd": {"optimizer": {"name": "sgd", "learning_rate": 0.05}},
    "bf16": {"precision": "bf16", "global_batch": 8},
}
RESUMED_CASES = [(stage, name) for stage in STAGES for name in RESUMED if name != "bf16" or stage in (0, 2)]


def resume(rank: int, world_size: int) -> dict[tuple[int, str], tuple[bool, bool]]:
    """For each case: whether five steps after a load equal five steps without, and whether the end does."""
    return {(stage, name): resume_case(stage, **RESUMED[name]) for stage, name in RESUMED_CASES}


def resume_case(
    stage: int, *, freeze: tuple[str, ...] = (), dropout: float = 0.0, global_batch: int = 16, **keys: Any
) -> tuple[bool, bool]:
    def make() -> Engine:
        method = tiny_method("partial_bce", backbone=BATCH_NORM | {"freeze": freeze}, dropout=dropout)
        return make_engine(stage, method=method, global_batch=global_batch, **keys)

    engine, other = make(), make()
    train(engine, 3, global_batch=global_batch)
    train(other, 1, global_batch=global_batch)  # a load replaces everything, even after other steps
    other.load(whole_state(engine))
    steps = [train(e, 5, start=3, global_batch=global_batch) for e in (other, engine)]
    return steps[0] == steps[1], is_same(whole_state(other), whole_state(engine))


@pytest.fixture(scope="module")
def resumed() -> dict[tuple[int, str], tuple[bool, bool]]:
    return run_ranks(resume, 2)[0]


@pytest.mark.parametrize("case", RESUMED_CASES, ids=lambda case: f"{case[1]}-{case[0]}")
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(resumed, case):
    assert resumed[case] == (True, True)


UNEVEN_BATCH = 20  # five groups: no even share on 2 or 3 ranks, nor in micro-batches
NEXT_STEPS = 2


def load_and_save(rank: int, world_size: int, folder: str) -> dict[tuple[str, int], tuple[bool, float]]:
    """At every stage, load what other numbers of ranks saved, then save for them.

    Files are called RANKS-STAGE-STEPS. Each is loaded at two stages, the even or the odd ones; over the files of all
    rank counts every stage meets every other.

    Returns:
        For each file and stage: whether the load was whole, and how far the next losses are from the saver's.
    """
    files = sorted(path for path in Path(folder).iterdir() if not path.name.startswith(f"{world_size}-"))
    dist.barrier()  # before anybody adds to the folder
    found = {}
    for stage in STAGES:
        engine = make_engine(stage, global_batch=UNEVEN_BATCH)
        for path in files:
            if sum(map(int, path.name.split("-")[:2])) % 2 == stage % 2:
                state, expected = torch.load(path, weights_only=False)
                engine.load(EngineState(*state))
                is_whole = is_same(whole_state(engine), EngineState(*state))
                steps = train(engine, NEXT_STEPS, start=state[2], global_batch=UNEVEN_BATCH)
                difference = max(abs(step.loss - loss) for step, loss in zip(steps, expected, strict=True))
                found[path.name, stage] = is_whole, difference
        for num_steps in (0, 3) if stage == 3 else (3,):
            engine = make_engine(stage, global_batch=UNEVEN_BATCH)
            train(engine, num_steps, global_batch=UNEVEN_BATCH)
            saved = whole_state(engine)
            steps = train(engine, NEXT_STEPS, start=num_steps, global_batch=UNEVEN_BATCH)
            if rank == 0:
                torch.save((tuple(saved), [step.loss for step in steps]), f"{folder}/{world_size}-{stage}-{num_steps}")
    return found


def cut_in_every_way(rank: int, world_size: int) -> dict[Any, tuple[list[Step], dict[str, torch.Tensor]]]:
    keys = {"global_batch": UNEVEN_BATCH, "optimizer": {"name": "sgd", "learning_rate": 0.01}}
    found = {}
    for kind in ("plain", 2):
        for micro_batch in (None, 8, 4):
            engine = make_engine(kind, micro_batch=micro_batch, **keys)
            steps = train(engine, 2, global_batch=UNEVEN_BATCH)
            found[kind, micro_batch] = steps, whole_state(engine).model
    return found


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, dict, bool]]:
    """What 2, 3, 1 and again 2 ranks found, each in the folder that those before it filled."""

    def all_of_it(rank: int, world_size: int, folder: str, name: str) -> tuple[dict, dict, bool]:
        cuts = {} if name == "two again" else cut_in_every_way(rank, world_size)
        return load_and_save(rank, world_size, folder), cuts, world_size != 3 or averages_statistics("plain")

    folder = str(tmp_path_factory.mktemp("states"))
    order = {"two": 2, "three": 3, "one": 1, "two again": 2}
    return {name: run_ranks(all_of_it, size, folder, name)[0] for name, size in order.items()}


@pytest.mark.parametrize(("name", "num_sources"), [("three", 1), ("one", 2), ("two again", 2)], ids=str)
def test_a_state_of_any_stage_and_rank_count_loads_at_any_other(by_ranks, name, num_sources):
    loaded = by_ranks[name][0]
    assert len(loaded) == num_sources * (len(STAGES) + 1) * 2
    for case, (is_whole, difference) in loaded.items():
        assert is_whole, case
        assert difference < 1e-6, case


def test_neither_ranks_nor_micro_batches_change_a_step(by_ranks):
    expected_steps, expected_model = by_ranks["one"][1]["plain", None]
    for name, (_, cuts, _) in by_ranks.items():
        for case, (steps, model) in cuts.items():
            assert_steps_close(steps, expected_steps, 1e-6)
            assert largest_difference(model, expected_model) < 1e-6, (name, case)


def test_three_ranks_average_without_moving_a_bit_of_what_is_equal(by_ranks):
    assert by_ranks["three"][2]


# Compilation ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["partial_bce", "sst", "blending"])
def test_a_compiled_method_trains_as_it_does_without(name):
    semantic = {"head": {"attention_width": 8, "embedding_width": 6, "feature_width": 12}, "start_epoch": 0}
    keys = {} if name == "partial_bce" else semantic

    def compiled(rank: int, world_size: int) -> dict[str | int, tuple[list[Step], bool]]:
        found = {}
        for kind in ("plain", 0, 1, 2):
            engine = make_engine(kind, method=tiny_method(name, **keys), compile=True)
            steps = train(engine, 3)
            prediction = engine.predict(random_batch(8, seed=0))
            found[kind] = steps, bool(torch.isfinite(prediction.logits).all())
        return found | {"eager": (train(make_engine("plain", method=tiny_method(name, **keys)), 3), True)}

    found = run_ranks(compiled, 1, timeout_seconds=500.0)[0]
    for steps, is_finite in found.values():
        assert_steps_close(steps, found["eager"][0], 1e-4)
        assert is_finite
