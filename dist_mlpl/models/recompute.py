"""Owns tools for layers that work in blocks: products that all engines round alike, and recomputation in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Entries of a block in its widest tensor; computing a block takes the memory of some fifteen such tensors.
_CPU_ENTRIES = 2**18
_DEVICE_ENTRIES = 2**22


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer in autocast's type and return the result in the inputs' own.

    ZeRO-3's linear rounds before it adds the bias if inputs have more than two dimensions; given two, all engines agree
    in bf16 too.

    Args:
        inputs: (..., n), at least two dimensions.
        weight: (m, n).
        bias: (m,).

    Returns:
        (..., m).
    """
    return F.linear(inputs.flatten(0, -2), weight, bias).unflatten(0, inputs.shape[:-1]).to(inputs.dtype)


def inner_products(rows: Tensor, weight: Tensor) -> Tensor:
    """Compute the inner product of each class's row with its own weights, in float32 or wider under autocast too.

    Logits rounded to bfloat16 take only a few hundred values for any number of images: ties, which lower AP.

    Args:
        rows: (B, C, n), any floating type.
        weight: (C, n).

    Returns:
        (B, C), in the wider of both types.
    """
    first = next(blocks(rows.shape[1], rows.shape[0] * rows.shape[2], rows.device))
    # Split, not sliced: the gradient of a slice is as large as the whole.
    parts = zip(rows.split(first.stop, dim=1), weight.split(first.stop), strict=True)
    return torch.cat([(row * own).sum(dim=2) for row, own in parts], dim=1)


def pull_back(function: Callable[..., Tensor], slope: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Recompute a block and back-propagate a gradient from its result to its inputs.

    Args:
        function: differentiable; maps `inputs` to the block's result.
        slope: the gradient with respect to the result, same shape.
        inputs: tensors of floating type.

    Returns:
        The gradient with respect to each input; zeros for one that is not used.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, slope, materialize_grads=True)


def add(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add `parts` to `totals` in place, tensor by tensor."""
    for total, part in zip(totals, parts, strict=True):
        total += part


def blocks(num_rows: int, row_entries: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into blocks that bound the memory of a step.

    Args:
        num_rows: number of rows to cut.
        row_entries: numbers in a row of the widest tensor.
        device: the device of the tensors; blocks are smaller on a CPU.
    """
    entries = _CPU_ENTRIES if device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // max(1, row_entries))
    return (slice(start, start + step) for start in range(0, num_rows, step))
