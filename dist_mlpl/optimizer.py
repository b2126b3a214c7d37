"""Owns the optimiser's settings, its parameter groups, and the learning rate as a function of samples seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from dist_mlpl.settings import Settings

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


class OptimizerSettings(Settings):
    """Which update rule."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)  # not on one-dimensional parameters (biases, norms)
    head_multiplier: float = Field(1.0, gt=0.0)  # learning rate of the head, times
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    momentum: float = Field(0.9, ge=0.0, lt=1.0)  # sgd


class ScheduleSettings(Settings):
    """How the learning rate moves; stretched over samples, so it survives a change of the global batch."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_samples: int = Field(0, ge=0)  # linear from 0
    final_fraction: float = Field(0.0, ge=0.0, le=1.0)  # cosine: of the learning rate, at the end
    drop_every_samples: int | None = Field(None, gt=0)  # step: samples between drops
    drop_factor: float = Field(0.1, gt=0.0, lt=1.0)  # step

    @model_validator(mode="after")
    def _step_needs_its_length(self) -> ScheduleSettings:
        if self.name == "step" and self.drop_every_samples is None:
            raise ValueError("schedule.name step needs schedule.drop_every_samples")
        return self


def learning_rate_factor(settings: ScheduleSettings, samples_seen: int, total_samples: int) -> float:
    """What the learning rate is multiplied by before an update.

    Args:
        settings: the schedule.
        samples_seen: since the run began, 0 .. total_samples.
        total_samples: of the whole run.

    Returns:
        A factor in [0, 1].
    """
    if samples_seen < settings.warmup_samples:
        return (samples_seen + 1) / (settings.warmup_samples + 1)
    if settings.name == "constant":
        return 1.0
    if settings.name == "step":
        assert settings.drop_every_samples is not None
        return settings.drop_factor ** (samples_seen // settings.drop_every_samples)
    length = max(1, total_samples - settings.warmup_samples)
    done = min(1.0, (samples_seen - settings.warmup_samples) / length)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.final_fraction + (1.0 - settings.final_fraction) * cosine


def build_optimizer(
    settings: OptimizerSettings, parameter_groups: Mapping[str, Sequence[nn.Parameter]]
) -> torch.optim.Optimizer:
    """The optimiser over a method's parameters; group key `base_learning_rate` is what the schedule scales.

    Args:
        settings: which rule.
        parameter_groups: trainable parameters by group name; `head` gets its multiplier.
    """
    groups = []
    for name, parameters in parameter_groups.items():
        rate = settings.learning_rate * (settings.head_multiplier if name == "head" else 1.0)
        for is_decayed in (True, False):
            chosen = [p for p in parameters if (_num_dimensions(p) > 1) == is_decayed]
            if chosen:
                decay = settings.weight_decay if is_decayed else 0.0
                groups.append({"params": chosen, "lr": rate, "base_learning_rate": rate, "weight_decay": decay})
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def _num_dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def moment_names(settings: OptimizerSettings) -> tuple[str, ...]:
    """Per-parameter tensors that the rule keeps: what a checkpoint holds beside the parameters."""
    if settings.name == "sgd" and settings.momentum == 0.0:
        return ()
    return MOMENTS[settings.name]
