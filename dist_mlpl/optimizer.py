"""Owns the optimiser's settings, its parameter groups, and the learning rate as a function of samples seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_mlpl.settings import Settings

AVERAGE: Final = "weight_average"  # key in the optimiser's state, so that ZeRO partitions the tensor like a moment

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSettings(Settings):
    """The update rule and its constants."""

    name: Literal["adamw", "sgd"] = "adamw"  # the update rule
    learning_rate: float = Field(1e-3, gt=0.0)  # the highest of the schedule
    weight_decay: float = Field(0.0, ge=0.0)  # not applied to one-dimensional parameters (biases, norms)
    head_multiplier: float = Field(1.0, gt=0.0)  # the head's learning rate is `learning_rate` times this
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # adamw
    momentum: Decay = 0.9  # sgd

    @model_validator(mode="after")
    def _refuse_what_the_rule_ignores(self) -> OptimizerSettings:
        _refuse_changed(self, {"adamw": ("momentum",), "sgd": ("betas",)}[self.name])
        return self


class ScheduleSettings(Settings):
    """How the learning rate changes, as a function of samples seen, so that it does not depend on the global batch."""

    name: Literal["cosine", "step", "constant"] = "cosine"  # how the rate falls after the warm-up
    warmup_samples: int = Field(0, ge=0)  # linear from 0
    final_fraction: float = Field(0.0, ge=0.0, le=1.0)  # cosine: share of the learning rate left at the end
    drop_every_samples: int | None = Field(None, gt=0)  # step: samples between drops, counted from the run's start
    drop_factor: float = Field(0.1, gt=0.0, lt=1.0)  # step

    @model_validator(mode="after")
    def _check_keys_of_the_rule(self) -> ScheduleSettings:
        drops = ("drop_every_samples", "drop_factor")
        unused = {"cosine": drops, "step": ("final_fraction",), "constant": ("final_fraction", *drops)}
        _refuse_changed(self, unused[self.name])
        if self.name == "step" and self.drop_every_samples is None:
            raise ValueError("schedule.name step needs schedule.drop_every_samples")
        return self


def _refuse_changed(settings: OptimizerSettings | ScheduleSettings, keys: Sequence[str]) -> None:
    """Raise ValueError for keys that are set but not read by the chosen rule, and so would silently do nothing."""
    fields = type(settings).model_fields
    changed = [key for key in keys if getattr(settings, key) != fields[key].default]
    if changed:
        raise ValueError(f"{', '.join(changed)} set, but {settings.name!r} does not use it")


def learning_rate_factor(settings: ScheduleSettings, samples_seen: int, total_samples: int) -> float:
    """The factor of the learning rate for the next update.

    Args:
        settings: the schedule.
        samples_seen: samples since the run began, 0 .. total_samples.
        total_samples: samples of the whole run.

    Returns:
        A factor in [0, 1]; above 0 at the first update, so that warm-up wastes no update.
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
    """Build the optimiser over a method's parameters; the schedule scales each group's `base_learning_rate`.

    Args:
        settings: the update rule.
        parameter_groups: trainable parameters by group name; `head_multiplier` applies to `head`.
    """
    groups = []
    for name, parameters in parameter_groups.items():
        rate = settings.learning_rate * (settings.head_multiplier if name == "head" else 1.0)
        for is_decayed in (True, False):
            chosen = [p for p in parameters if (p.dim() > 1) == is_decayed]
            if chosen:
                decay = settings.weight_decay if is_decayed else 0.0
                groups.append({"params": chosen, "lr": rate, "base_learning_rate": rate, "weight_decay": decay})
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that the rule keeps for every parameter; a checkpoint holds them beside the parameters."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] > 0.0 else ()


def make_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Create the state that torch would create at the first update, all zeros, so that it can be read or loaded before.

    Args:
        optimizer: with an empty state.
        tensors: the tensors that it updates: parameters, or ZeRO's flat parts of them.
    """
    for tensor in tensors:
        state = optimizer.state[tensor]
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros(())
        for name in moment_names(optimizer):
            state[name] = torch.zeros_like(tensor)


def make_averages(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Keep a copy of every tensor beside its moments, for an average of the weights.

    Args:
        optimizer: its rule ignores entries of the state that it does not know.
        tensors: see `make_moments`.
    """
    for tensor in tensors:
        optimizer.state[tensor][AVERAGE] = tensor.detach().clone()


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Set the number of updates by which AdamW corrects the bias of its moments; no effect on SGD."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(num_updates))


def clip_gradients(gradients: Sequence[Tensor], clip_norm: float) -> float:
    """Scale gradients down, in place, to a norm of at most `clip_norm`.

    Args:
        gradients: those of all parameters.
        clip_norm: the largest norm; 0: no clipping.

    Returns:
        The norm before clipping. If it is not finite, no gradient is changed.
    """
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if 0.0 < clip_norm < norm < math.inf:  # False for NaN
        torch._foreach_mul_(list(gradients), clip_norm / (norm + 1e-6))
    return norm
