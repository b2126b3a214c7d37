"""Owns the plain engine: a torch optimiser and one all-reduce. The oracle that every ZeRO stage is held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dist_mlpl import comm
from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.methods.base import Method


class PlainEngine:
    """Data parallel training with whole parameters on every rank.

    Args:
        method: on its device; its parameters are made equal to rank 0's.
        optimizer: over the method's parameters.
        clip_norm: largest gradient norm, 0 for none.
        use_bfloat16: autocast the forward.
    """

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, *, clip_norm: float, use_bfloat16: bool
    ) -> None:
        self.method, self.optimizer = method, optimizer
        self._clip_norm, self._use_bfloat16 = clip_norm, use_bfloat16
        for tensor in method.state_dict().values():
            comm.broadcast_tensor(tensor)

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        """The method's forward under the engine's precision."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._use_bfloat16):
            return self.method(batch, recalled)

    def backward(self, loss: Tensor, *, num_micro_batches: int, is_last: bool) -> None:
        """Add this micro-batch's gradients.

        Args:
            loss: () this micro-batch's additive share of the global batch's loss.
            num_micro_batches: of the step.
            is_last: whether the step's gradients are then complete.

        Collective: with is_last, all ranks, one all-reduce of the gradients.
        """
        loss.backward()
        if is_last and comm.world_size() > 1:
            gradients = [p.grad for p in self._trained() if p.grad is not None]
            flat = comm.reduce_sum(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def update(self) -> float:
        """Clip and step unless the gradient norm is not finite, then forget the gradients.

        Returns:
            The norm before clipping, the same on every rank; NaN or infinity when nothing moved.
        """
        gradients = [p.grad for p in self._trained() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if norm < float("inf"):  # False for NaN
            if self._clip_norm > 0.0:
                for gradient in gradients:
                    gradient.mul_(min(1.0, self._clip_norm / (norm + 1e-6)))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self.method.parameters() if p.requires_grad)

    def read_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole value, float32."""
        return parameter.detach()

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The whole of one optimiser tensor of a parameter."""
        return self.optimizer.state[parameter][name]

    def write_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter to a whole value that every rank holds."""
        with torch.no_grad():
            parameter.copy_(value)

    def write_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor], *, num_updates: int) -> None:
        """Set a parameter's optimiser tensors to whole values that every rank holds."""
        state = self.optimizer.state[parameter]
        state.update({name: value.to(parameter.device, copy=True) for name, value in moments.items()})
        if "exp_avg" in moments:
            state["step"] = torch.tensor(float(num_updates))
