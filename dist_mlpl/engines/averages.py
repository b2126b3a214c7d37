"""Owns the running average of the weights: updated after each step, put in the weights' place for inference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_mlpl.engines.plain import PlainEngine
from dist_mlpl.engines.zero import ZeroEngine
from dist_mlpl.optimizer import AVERAGE


class WeightAverage:
    """An exponential average of trainable parameters and floating buffers.

    After n updates it is sum_i (1 - d) d^(n - i) w_i / (1 - d^n) over the weights w_1 .. w_n after each update: the
    initial weights have no part in it, however close d is to 1.

    Args:
        engine: made with `keeps_average`; its optimiser state holds the averages of parameters.
        decay: d in (0, 1), a memory of about 1 / (1 - d) updates.

    Source: the bias correction of Adam (Kingma and Ba, ICLR 2015, section 3), for weights.
    Differs: most training scripts leave the correction out, which gives the initial weights a share of d^n.
    """

    def __init__(self, engine: PlainEngine | ZeroEngine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self.buffers = {name: b.clone() for name, b in engine.method.named_buffers() if b.is_floating_point()}
        # While the average is shown: each overwritten tensor, its parameter (None: a buffer), and the trained values.
        self._hidden: list[tuple[Tensor, nn.Parameter | None, Tensor]] = []

    def update(self, num_updates: int) -> None:
        """Include the weights after an update in the average.

        Args:
            num_updates: number of updates since training began, this one included.
        """
        share = (1.0 - self._decay) / (1.0 - self._decay**num_updates)
        updated = self._engine.updated_tensors()
        averages = [self._engine.optimizer.state[tensor][AVERAGE] for tensor in updated]
        torch._foreach_lerp_(averages, [tensor.detach() for tensor in updated], share)
        for name, buffer in self._current_buffers():
            self.buffers[name].lerp_(buffer, share)

    def show(self) -> None:
        """Put the average in the weights' place for forward. Training must not go on before `hide`.

        Collective: at stages 1 and 2, all ranks; each parameter is gathered in turn.
        """
        if self._hidden:
            return
        for parameter in self._engine.method.parameters():
            if parameter.requires_grad:
                place = self._engine.seen_part(parameter)
                self._hidden.append((place, parameter, place.clone()))
                place.copy_(self._engine.seen_part_of_moment(parameter, AVERAGE))
                self._engine.forget_gathered(parameter)
        for name, buffer in self._current_buffers():
            self._hidden.append((buffer, None, buffer.clone()))
            buffer.copy_(self.buffers[name])

    def hide(self) -> None:
        """Put the trained weights back; no effect if the average is not shown."""
        for place, parameter, trained in self._hidden:
            place.copy_(trained)
            if parameter is not None:
                self._engine.forget_gathered(parameter)
        self._hidden.clear()

    def take(self, model: Mapping[str, Tensor]) -> None:
        """Set averages from whole tensors by name, which every rank holds; those not in `model` stay."""
        for name, parameter in self._engine.method.named_parameters():
            if name in model and parameter.requires_grad:
                self._engine.write_moment(parameter, AVERAGE, model[name])
        for name, buffer in self.buffers.items():
            if name in model:
                buffer.copy_(model[name])

    def _current_buffers(self) -> list[tuple[str, Tensor]]:
        return [(name, buffer) for name, buffer in self._engine.method.named_buffers() if name in self.buffers]
