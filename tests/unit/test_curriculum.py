"""Claims about what a curriculum is told: its schedule, its keys, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dist_mlpl.config import check_config, compare_configs
from dist_mlpl.curriculum.schedule import CurriculumSettings, check_bounded, is_due
from dist_mlpl.errors import ConfigError

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "num_epochs": 8,
    "global_batch": 32,
    "data": {"manifest": "shards"},
    "method": {"name": "partial_bce", "backbone": {"name": "resnet_small"}},
}


def due(**keys: Any) -> list[int]:
    settings = CurriculumSettings(strategy="score_threshold", **keys)
    return [epoch for epoch in range(12) if is_due(settings, epoch)]


def test_rounds_are_due_when_the_schedule_says() -> None:
    assert due() == [1]
    assert due(start_epoch=4) == [4]
    assert due(start_epoch=2, every_epochs=3) == [2, 5, 8, 11]
    assert due(start_epoch=2, every_epochs=3, num_rounds=2) == [2, 5]
    assert due(every_epochs=1, num_rounds=3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"strategy": "score_threshold", "threshold": -1.0}, "threshold"),
        ({"strategy": "score_threshold", "threshold": 1e9}, "threshold"),
        ({"strategy": "score_fraction", "fraction": 0.0}, "fraction"),
        ({"strategy": "score_fraction", "fraction": 1.2}, "fraction"),
        ({"strategy": "uncertainty", "max_variance": 0.0}, "max_variance"),
        ({"strategy": "uncertainty", "num_passes": 1}, "num_passes"),
        ({"strategy": "class_precision", "precision": 0.5}, "precision"),
        ({"strategy": "ensemble", "checkpoints": 1}, "ensemble of one"),
        ({"strategy": "score_threshold", "fraction": 0.5}, "does not use it"),
        ({"strategy": "score_fraction", "threshold": 1.0}, "does not use it"),
        ({"strategy": "score_threshold", "num_rounds": 3}, "every_epochs"),
        ({"strategy": "score_threshold", "start_epoch": 8}, "beyond the run's last epoch"),
        ({"strategy": "ensemble", "checkpoints": 5}, "keep_checkpoints"),
        ({"strategy": "score_threshold", "max_per_image": 0}, "max_per_image"),
        ({"strategy": "guesses"}, "strategy"),
        ({"strategy": "score_threshold", "treshold": 2.0}, "nearest: 'threshold'"),
    ],
)
def test_impossible_settings_are_refused_by_name(keys: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(BASE | {"curriculum": keys}, where="test")
    assert word in str(caught.value)
    assert "curriculum" in str(caught.value)


def test_a_curriculum_over_tars_without_an_index_is_refused() -> None:
    tars = {"tars": {"train": "a.tar", "test": "b.tar"}, "classes": "c.csv", "epoch_samples": 64}
    with pytest.raises(ConfigError, match="shards index"):
        check_config(
            BASE | {"data": {"unindexed": tars}, "curriculum": {"strategy": "score_threshold"}}, where="test"
        )  # fmt: skip


def test_uncertainty_and_compilation_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="compile"):
        check_config(BASE | {"curriculum": {"strategy": "uncertainty"}, "engine": {"compile": True}}, where="test")


def test_only_what_is_used_decides_a_round() -> None:
    settings = CurriculumSettings(strategy="uncertainty", start_epoch=3, every_epochs=2)
    assert set(settings.parameters) == {
        "max_variance", "num_passes", "flips", "keep_soft", "cumulative", "agree_rounds", "max_per_image",
        "max_per_class", "prior_quota",
    }  # fmt: skip
    assert CurriculumSettings(strategy="positive_only").parameters["threshold"] == 5.0
    assert CurriculumSettings(strategy="score_threshold").parameters["threshold"] == 2.0


def test_a_round_that_could_fill_the_disk_is_refused_with_a_bound_that_works() -> None:
    size = {"num_samples": 9_011_219, "num_classes": 9605}
    with pytest.raises(ConfigError, match="max_per_image to 55") as caught:
        check_bounded(CurriculumSettings(strategy="score_threshold"), **size)
    assert caught.value.where == "curriculum.max_per_image"
    check_bounded(CurriculumSettings(strategy="score_threshold", max_per_image=55), **size)
    check_bounded(CurriculumSettings(strategy="positive_only", max_per_image=110), **size)
    check_bounded(CurriculumSettings(strategy="score_threshold"), num_samples=82_783, num_classes=80)


def test_a_resumed_run_may_stop_measuring_freely_and_change_its_curriculum_when_allowed() -> None:
    old = check_config(BASE | {"curriculum": {"strategy": "score_threshold"}}, where="test")
    new = check_config(
        BASE | {"curriculum": {"strategy": "score_threshold", "threshold": 3.0, "measure_hidden": False}}, where="test"
    )
    assert {name: kind for name, _, _, kind in compare_configs(old, new)} == {
        "curriculum.measure_hidden": "free", "curriculum.threshold": "allowed",
    }  # fmt: skip


def test_scores_do_not_depend_on_where_a_run_lies_or_what_it_began_with() -> None:
    one, other, third = (
        check_config(BASE | {"method": BASE["method"] | keys}, where="test")
        for keys in ({}, {"init_from": "runs/x"}, {"dropout": 0.5})
    )
    assert one.scoring_digest == other.scoring_digest != third.scoring_digest


def test_settings_survive_their_own_document() -> None:
    settings = CurriculumSettings(strategy="ensemble", runs=("a", "b@3"), keep_soft=True)
    assert CurriculumSettings.model_validate(settings.model_dump(mode="json")) == settings
    with pytest.raises(ValidationError):
        CurriculumSettings(strategy="ensemble", surprise=1)  # type: ignore[call-arg]
