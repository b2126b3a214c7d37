"""Owns the mean and variance of a model's answers over passes with dropout, mirror images or several models.

Source: Gal and Ghahramani, ICML 2016 (dropout at inference); Durand et al., CVPR 2019, its last strategy.
Differs: the paper does not say which variance; ours is the unbiased variance of the logits over passes with dropout,
    without the difference between an image and its mirror image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dist_mlpl.errors import ConfigError


class Moments:
    """Running mean and variance of tensors of one shape, in float64.

    Values come in sets of equal size: the passes over an image, then those over its mirror image. The difference
    between the sets is no part of the variance, which is the mean of the variances within each.
    """

    def __init__(self) -> None:
        self.count = 0  # in the present set
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # summed squares of deviations from the mean
        self._before: list[tuple[Tensor, Tensor]] = []  # mean and summed squares of the sets before

    def begin_set(self) -> None:
        """Begin the next set; it and all others must get as many values as the first."""
        if self._mean is not None and self._squares is not None:
            self._before.append((self._mean, self._squares))
        self.count, self._mean, self._squares = 0, None, None

    def add(self, values: Tensor) -> None:
        """Add one tensor, of the same shape as those before.

        Source: Welford, Technometrics 1962.
        """
        values = values.double()
        self.count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = values.clone(), torch.zeros_like(values)
            return
        deviation = values - self._mean
        self._mean += deviation / self.count
        self._squares += deviation * (values - self._mean)

    @property
    def mean(self) -> Tensor:
        """Mean of all values added so far, at least one in every set; float64."""
        assert self._mean is not None
        return sum((mean for mean, _ in self._before), self._mean) / (len(self._before) + 1)

    @property
    def variance(self) -> Tensor:
        """Mean over the sets of the unbiased variance of a set's values, at least two; float64."""
        assert self._squares is not None
        assert self.count > 1
        total = sum((squares for _, squares in self._before), self._squares)
        return total / ((self.count - 1) * (len(self._before) + 1))


def dropouts(model: nn.Module) -> list[nn.Module]:
    """The model's dropout layers with a probability above 0."""
    return [layer for layer in model.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]


def check_dropout(model: nn.Module) -> None:
    """Refuse a model whose passes would all be equal.

    Raises:
        ConfigError: the model has no dropout layer with a probability above 0.
    """
    if not dropouts(model):
        raise ConfigError(
            "a model without dropout",
            expected="dropout, whose passes differ: their variance is what the strategy goes by",
            where="curriculum.strategy uncertainty, method.dropout",
            next_step="set method.dropout (0.5 is usual) from the start of a run, or choose another strategy",
        )


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """Keep dropout active while the block runs, even in evaluation mode; other layers keep their mode."""

    def switch_on(layer: nn.Module, inputs: Any) -> None:
        layer.training = True  # at every call, since callers set the model's mode first

    with ExitStack() as hooks:
        for layer in dropouts(model):
            hooks.callback(layer.register_forward_pre_hook(switch_on).remove)
            hooks.callback(layer.train, layer.training)
        yield


@contextmanager
def computed_once(trunk: nn.Module) -> Iterator[None]:
    """Let a trunk without dropout return its first result for every call in the block; the inputs must be equal."""
    if dropouts(trunk):
        yield
        return
    compute: Callable[..., Any] = trunk.forward
    answers: list[Any] = []

    def forward(*inputs: Any) -> Any:
        if not answers:
            answers.append(compute(*inputs))
        return answers[0]

    trunk.forward = forward
    try:
        yield
    finally:
        del trunk.forward
