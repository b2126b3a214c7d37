"""Owns the plain engine: a torch optimiser and one all-reduce; the reference that every ZeRO stage is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dist_mlpl import comm
from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.methods.base import Method
from dist_mlpl.optimizer import clip_gradients, make_averages, make_moments


class PlainEngine:
    """Data-parallel training with whole parameters on every rank.

    Args:
        method: on its device; its parameters and buffers are made equal to rank 0's.
        optimizer: over the method's trainable parameters.
        clip_norm: largest gradient norm; 0: no clipping.
        use_bfloat16: True: run the forward under autocast.
        keeps_average: True: keep tensors for an average of the weights beside the moments.

    Collective: all ranks, one broadcast of each tensor.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        use_bfloat16: bool,
        keeps_average: bool,
    ) -> None:
        self.method, self.optimizer = method, optimizer
        self._clip_norm, self._use_bfloat16 = clip_norm, use_bfloat16
        broadcast_tensors(method)
        make_moments(optimizer, self.updated_tensors())
        if keeps_average:
            make_averages(optimizer, self.updated_tensors())

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        """Run the method's forward in the engine's precision; see `Method.forward`."""
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self._use_bfloat16):
            return self.method(batch, recalled)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this micro-batch's gradients.

        Args:
            loss: () this micro-batch's additive share of the global batch's loss.
            is_last: True if this completes the step's gradients.

        Collective: with is_last, all ranks, one all-reduce of the gradients.
        """
        loss.backward()
        if is_last and comm.world_size() > 1:
            gradients = self._gradients()
            flat = comm.reduce_sum(torch.cat([g.flatten() for g in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def update(self) -> float:
        """Clip and step unless the gradient norm is not finite, then drop the gradients.

        Returns:
            The norm before clipping, the same on every rank; NaN or infinity when nothing moved.
        """
        norm = clip_gradients(self._gradients(), self._clip_norm)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def read_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole value of a parameter, float32."""
        return parameter.detach()

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The whole of one tensor of a trainable parameter's optimiser state."""
        return self.optimizer.state[parameter][name]

    def write_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter to a whole value that every rank holds."""
        parameter.detach().copy_(value)

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Set one tensor of a trainable parameter's optimiser state to a whole value that every rank holds."""
        self.optimizer.state[parameter][name].copy_(value)

    def updated_tensors(self) -> list[Tensor]:
        """The tensors that the optimiser updates: the trainable parameters."""
        return [p for p in self.method.parameters() if p.requires_grad]

    def seen_part(self, parameter: nn.Parameter) -> Tensor:
        """The tensor of a parameter that forward reads; writing to it changes what forward computes."""
        return parameter.detach()

    def seen_part_of_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The part of an optimiser tensor that corresponds to `seen_part`."""
        return self.read_moment(parameter, name)

    def forget_gathered(self, parameter: nn.Parameter) -> None:
        """Do nothing: parameters are whole on every rank. See `ZeroEngine.forget_gathered`."""

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.updated_tensors() if p.grad is not None]


def broadcast_tensors(method: Method) -> None:
    """Make every parameter and buffer equal to rank 0's.

    Collective: all ranks, one broadcast of each tensor.
    """
    for tensor in [*method.parameters(), *method.buffers()]:
        comm.broadcast_tensor(tensor.detach())
