"""Owns access to BatchNorm layers and their running statistics, and the averaging of these over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_mlpl import comm


def batch_norms(method: nn.Module) -> Iterator[_BatchNorm]:
    """Every BatchNorm layer of a method."""
    return (module for module in method.modules() if isinstance(module, _BatchNorm))


def running_statistics(method: nn.Module) -> dict[str, Tensor]:
    """BatchNorm's running means and variances by name, the buffers themselves."""
    own = {id(b) for layer in batch_norms(method) for b in (layer.running_mean, layer.running_var)}
    return {name: buffer for name, buffer in method.named_buffers() if id(buffer) in own}


def average_over_ranks(buffers: list[Tensor]) -> None:
    """Replace floating buffers (n,) by their means over ranks, in place.

    Sums are float64, so that buffers already equal on all ranks, such as frozen statistics, keep their bits.

    Collective: all ranks, one all-reduce of the buffers.
    """
    if comm.world_size() == 1 or not buffers:
        return
    flat = comm.reduce_sum(torch.cat(buffers).double()) / comm.world_size()
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part)
