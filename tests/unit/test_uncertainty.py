"""Claims about the mean and spread of a model's answers over passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_mlpl.batch import Batch
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.uncertainty import Moments, check_dropout, computed_once, dropouts, dropping
from dist_mlpl.data.overlays import RoundModel
from dist_mlpl.errors import ConfigError
from dist_mlpl.rounds.models import Model
from dist_mlpl.rounds.relabel import Scorer
from tests.support.methods import random_batch, tiny_method

pytestmark = pytest.mark.unit

UNCERTAIN = CurriculumSettings(strategy="uncertainty", num_passes=5)


def scorer_of(method: nn.Module, settings: CurriculumSettings, *, keeps_trunk: bool = True) -> Scorer:
    def predict(batch: Batch) -> torch.Tensor:
        method.eval()  # as the engine does
        with torch.no_grad():
            return method(batch, None).logits

    model = Model(RoundModel(step=1, sha256=""), predict)
    return Scorer(settings, [model], method, seed=3, keeps_trunk=keeps_trunk)  # type: ignore[arg-type]


def test_moments_are_mean_and_unbiased_variance() -> None:
    values = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(1)) * 3 + 100
    moments = Moments()
    for value in values:
        moments.add(value)
    oracle = values.double().numpy()
    assert np.allclose(moments.mean, oracle.mean(axis=0), rtol=1e-14)
    assert np.allclose(moments.variance, oracle.var(axis=0, ddof=1), rtol=1e-10)


def test_mirror_images_that_are_answered_otherwise_add_nothing_to_the_variance_over_passes() -> None:
    method, batch = tiny_method("partial_bce", dropout=0.5), random_batch(4, seed=2)
    answers: dict[bool, list[np.ndarray]] = {False: [], True: []}

    def predict(shown: Batch) -> torch.Tensor:
        is_mirrored = bool(shown.flipped[0])
        answers[is_mirrored].append((torch.randn(4, 5) + (7.0 if is_mirrored else -3.0)).numpy())
        return torch.from_numpy(answers[is_mirrored][-1])

    settings = CurriculumSettings(strategy="uncertainty", num_passes=5, flips=True)
    scorer = Scorer(settings, [Model(RoundModel(step=1, sha256=""), predict)], method, seed=3)  # type: ignore[arg-type]
    with scorer.scoring(1) as score:
        found = score(batch, 32)
    sides = np.array([answers[False], answers[True]], dtype=np.float64)  # (2, passes, B, C)
    assert sides.shape == (2, 5, 4, 5)
    assert np.allclose(found.mean, sides.mean(axis=(0, 1)), rtol=1e-12)
    assert np.allclose(found.variance, sides.var(axis=1, ddof=1).mean(axis=0), rtol=1e-12)


def test_only_dropout_wakes_and_it_sleeps_again() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Dropout(0.0), nn.Linear(4, 4))
    seen: list[list[bool]] = []
    model[3].register_forward_hook(lambda *_: seen.append([layer.training for layer in model]))
    model.eval()
    with dropping(model):
        model(torch.ones(3, 4))
        model.eval()
        model(torch.ones(3, 4))
    model(torch.ones(3, 4))
    assert seen == [[False, True, False, False]] * 2 + [[False] * 4]
    assert dropouts(model) == [model[1]]
    assert not any(layer._forward_pre_hooks for layer in model)


def test_a_model_that_drops_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="dropout"):
        check_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


def test_uncertainty_equals_a_loop_over_seeded_passes_and_repeats_itself() -> None:
    method, batch = tiny_method("partial_bce", dropout=0.5), random_batch(8, seed=2)
    with scorer_of(method, UNCERTAIN).scoring(1) as score:
        first, again, elsewhere = score(batch, 32), score(batch, 32), score(batch, 64)
    assert first.variance is not None
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.variance, again.variance)  # type: ignore[arg-type]
    assert not torch.equal(first.mean, elsewhere.mean)
    method.eval()
    quiet = method(batch, None).logits
    assert float(first.variance.min()) > 0.0
    assert float((first.mean - quiet).abs().mean()) < 1.5 * float(first.variance.sqrt().mean())


def test_a_trunk_that_drops_nothing_answers_from_memory_with_the_same_bits() -> None:
    method, batch = tiny_method("partial_bce", dropout=0.5), random_batch(8, seed=2)
    calls: list[int] = []
    method.backbone.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for keeps_trunk in (True, False):
        with scorer_of(method, UNCERTAIN, keeps_trunk=keeps_trunk).scoring(1) as score:
            results.append(score(batch, 0))
    assert torch.equal(results[0].mean, results[1].mean)
    assert torch.equal(results[0].variance, results[1].variance)  # type: ignore[arg-type]
    assert "forward" not in vars(method.backbone)


def test_a_trunk_with_dropout_is_computed_each_time() -> None:
    trunk = nn.Sequential(nn.Dropout(0.5))
    with dropping(trunk), computed_once(trunk):
        torch.manual_seed(0)
        assert not torch.equal(trunk(torch.ones(64)), trunk(torch.ones(64)))


def test_mirror_images_are_averaged() -> None:
    method, batch = tiny_method("partial_bce"), random_batch(8, seed=4)
    with scorer_of(method, CurriculumSettings(strategy="score_threshold", flips=True)).scoring(1) as score:
        found = score(batch, 0)
    method.eval()
    with torch.no_grad():
        sides = [method(batch._replace(images=images), None).logits for images in (batch.images, batch.images.flip(-1))]
    assert torch.allclose(found.mean, torch.stack(sides).double().mean(0), atol=1e-12)
    assert found.variance is None


def test_scoring_moves_no_weight_and_no_statistic() -> None:
    method = tiny_method("partial_bce", dropout=0.5, backbone={"name": "resnet_small"})
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with scorer_of(method, UNCERTAIN).scoring(1) as score:
        score(random_batch(8, seed=2), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())


@pytest.mark.parametrize("pooling", ["average", "max", "weldon", {"name": "weldon", "num_top": 2, "num_bottom": 2}])
def test_passes_of_every_pooling_differ(pooling: str | dict[str, Any]) -> None:
    method = tiny_method("partial_bce", dropout=0.5, pooling=pooling).eval()
    images = random_batch(4, seed=0)
    with dropping(method), torch.no_grad():
        first, second = (method(images, None).logits for _ in range(2))
    assert not torch.isclose(first, second).all(dim=1).any()
