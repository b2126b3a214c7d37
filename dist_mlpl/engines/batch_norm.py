"""Owns BatchNorm's running statistics: which each rank gathers by itself, and which stay as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_mlpl import comm


def batch_norms(method: nn.Module) -> Iterator[_BatchNorm]:
    """Every BatchNorm layer."""
    return (module for module in method.modules() if isinstance(module, _BatchNorm))


def running_statistics(method: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by name, the buffers themselves."""
    own = {id(b) for layer in batch_norms(method) for b in (layer.running_mean, layer.running_var)}
    return {name: buffer for name, buffer in method.named_buffers() if id(buffer) in own}


def average_over_ranks(buffers: list[Tensor]) -> None:
    """Make buffers (n,) of floating numbers the mean over ranks, in place.

    Summed in float64, so that those which are equal already, frozen statistics say, keep their bits.

    Collective: all ranks, one all-reduce of the buffers.
    """
    if comm.world_size() == 1 or not buffers:
        return
    flat = comm.reduce_sum(torch.cat(buffers).double()) / comm.world_size()
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part)
