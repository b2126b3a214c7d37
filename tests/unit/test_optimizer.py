from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_mlpl.optimizer import (
    OptimizerSettings,
    ScheduleSettings,
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    make_moments,
    moment_names,
    set_num_updates,
)

pytestmark = pytest.mark.unit

RULES = [{}, {"betas": (0.8, 0.99), "weight_decay": 0.1}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.0}]


def factors_by_counting(schedule: ScheduleSettings, total_samples: int) -> list[float]:
    """The factor at every sample of a run, by walking through it one sample at a time."""
    factors = []
    warm, dropped = 0.0, 1.0
    position = 1 + 0j  # walks half a turn around the unit circle from the end of the warm-up to the end of the run
    turn = cmath.exp(1j * math.pi / max(1, total_samples - schedule.warmup_samples))
    for sample in range(total_samples):
        if schedule.drop_every_samples and sample and sample % schedule.drop_every_samples == 0:
            dropped *= schedule.drop_factor
        if sample < schedule.warmup_samples:
            warm += 1 / (schedule.warmup_samples + 1)
            factors.append(warm)
            continue
        height = (1 + position.real) / 2
        rest = schedule.final_fraction
        factors.append({"constant": 1.0, "step": dropped, "cosine": rest + (1 - rest) * height}[schedule.name])
        position *= turn
    return factors


@pytest.mark.parametrize("warmup_samples", [0, 1, 37, 400])
@pytest.mark.parametrize(
    "keys",
    [
        {"name": "constant"},
        {"name": "cosine"},
        {"name": "cosine", "final_fraction": 0.2},
        {"name": "step", "drop_every_samples": 90, "drop_factor": 0.3},
        {"name": "step", "drop_every_samples": 1000},
    ],
)
def test_the_learning_rate_is_what_walking_sample_by_sample_gives(keys, warmup_samples):
    schedule = ScheduleSettings(warmup_samples=warmup_samples, **keys)
    found = [learning_rate_factor(schedule, sample, 400) for sample in range(400)]
    assert found == pytest.approx(factors_by_counting(schedule, 400), rel=1e-9, abs=1e-9)


@given(
    name=st.sampled_from(["constant", "cosine", "step"]),
    warmup_samples=st.integers(0, 300),
    total_samples=st.integers(1, 300),
)
@settings(deadline=None, derandomize=True)
def test_the_learning_rate_stays_in_bounds_and_falls_after_warm_up(name, warmup_samples, total_samples):
    drops = {"drop_every_samples": 70} if name == "step" else {}
    schedule = ScheduleSettings(name=name, warmup_samples=warmup_samples, **drops)
    found = [learning_rate_factor(schedule, sample, total_samples) for sample in range(total_samples + 1)]
    assert all(0.0 <= factor <= 1.0 for factor in found)
    assert found[0] > 0.0
    rising, falling = found[: warmup_samples + 1], found[warmup_samples:]
    assert name == "step" or rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_cosine_ends_at_its_final_fraction_and_stays_there():
    schedule = ScheduleSettings(warmup_samples=10, final_fraction=0.25)
    assert learning_rate_factor(schedule, 10, 100) == 1.0
    assert learning_rate_factor(schedule, 100, 100) == learning_rate_factor(schedule, 130, 100) == 0.25


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (OptimizerSettings, {"momentum": 0.5}, "momentum set, but 'adamw' does not use it"),
        (OptimizerSettings, {"name": "sgd", "betas": (0.5, 0.9)}, "betas set, but 'sgd' does not use it"),
        (OptimizerSettings, {"betas": (0.9, 1.0)}, "less than 1"),
        (OptimizerSettings, {"learning_rate": 0.0}, "greater than 0"),
        (ScheduleSettings, {"name": "step"}, "needs schedule.drop_every_samples"),
        (ScheduleSettings, {"drop_every_samples": 5}, "drop_every_samples set, but 'cosine' does not use it"),
        (ScheduleSettings, {"name": "constant", "final_fraction": 0.5}, "final_fraction set, but 'constant'"),
        (ScheduleSettings, {"warmup_samples": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(kind, keys, message):
    with pytest.raises(ValidationError, match=message):
        kind(**keys)


def make_parameters(seed: int = 0) -> dict[str, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"backbone": [(3, 2), (3,), (2, 2, 2)], "head": [(4, 3), (4,)]}
    return {
        name: [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in group]
        for name, group in shapes.items()
    }


def give_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_groups_hold_each_parameter_once_with_its_decay_and_rate():
    groups = make_parameters()
    optimizer = build_optimizer(OptimizerSettings(learning_rate=0.01, weight_decay=0.1, head_multiplier=5.0), groups)
    found = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(found) == 5
    for name, parameters in groups.items():
        for parameter in parameters:
            group = found[id(parameter)]
            assert group["base_learning_rate"] == group["lr"] == pytest.approx(0.05 if name == "head" else 0.01)
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)


def test_a_frozen_backbone_leaves_no_empty_group():
    groups = make_parameters() | {"backbone": []}
    assert len(build_optimizer(OptimizerSettings(), groups).param_groups) == 2


@pytest.mark.parametrize("keys", RULES)
def test_moments_made_in_advance_change_no_bit_of_training(keys):
    results = []
    for is_advance in (False, True):
        groups = make_parameters()
        parameters = [p for group in groups.values() for p in group]
        optimizer = build_optimizer(OptimizerSettings(**keys), groups)
        if is_advance:
            make_moments(optimizer, parameters)
        for step in range(4):
            give_gradients(parameters, step)
            optimizer.step()
        moments = [optimizer.state[p][name] for p in parameters for name in moment_names(optimizer)]
        results.append([*(p.detach() for p in parameters), *moments])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("keys", RULES)
def test_moments_and_the_count_of_updates_are_all_there_is_to_carry_over(keys):
    groups = make_parameters()
    parameters = [p for group in groups.values() for p in group]
    optimizer = build_optimizer(OptimizerSettings(**keys), groups)
    make_moments(optimizer, parameters)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()

    copies = {name: [torch.nn.Parameter(p.detach().clone()) for p in group] for name, group in groups.items()}
    copied = [p for group in copies.values() for p in group]
    other = build_optimizer(OptimizerSettings(**keys), copies)
    make_moments(other, copied)
    for old, new in zip(parameters, copied, strict=True):
        for name in moment_names(optimizer):
            other.state[new][name].copy_(optimizer.state[old][name])
    set_num_updates(other, 3)

    for step in range(3, 6):
        give_gradients(parameters, step)
        give_gradients(copied, step)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, copied, strict=True))


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_clipping_does_what_torch_does_and_tells_the_norm_before_it(clip_norm):
    parameters = [p for group in make_parameters().values() for p in group]
    give_gradients(parameters, 7)
    before = [p.grad.clone() for p in parameters]
    expected_norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in before))
    assert clip_gradients([p.grad for p in parameters], clip_norm) == pytest.approx(expected_norm, rel=1e-6)
    found = [p.grad.clone() for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    for gradient, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_told_and_left_alone(bad):
    gradients = [torch.ones(3), torch.tensor([1.0, bad])]
    assert not math.isfinite(clip_gradients(gradients, 0.5))
    assert torch.equal(gradients[0], torch.ones(3))
