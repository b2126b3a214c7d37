"""Owns how a loss that is a sum over rows is evaluated: a few rows at a time, value and gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

Losses = Callable[..., Tensor]

# Entries of a block. On a CPU a formula's intermediate results stay in the cache; elsewhere blocks only bound memory.
_CPU_ENTRIES_PER_THREAD = 2**17
_DEVICE_ENTRIES = 2**22
_GROUP = 8  # columns in a group of `_largest`
# Below every score: never chosen. Added to scores rather than filled in, which is slow on a CPU where labels are mixed.
NEVER: Final = -1e30


def sum_of_rows(losses: Losses, logits: Tensor, *rows: Tensor) -> Tensor:
    """Sum of `losses(logits, *rows)` over all entries, evaluated block by block of rows.

    Besides the inputs, only the gradient, (B, C), is kept for the backward pass; intermediate results of `losses` live
    as long as their block. A second derivative evaluates `losses` again on all rows at once.

    Args:
        losses: differentiable torch code that maps (b, C) logits, float32 or float64, and the same b rows of every
            `rows` to (b, C) losses. A row of the result must depend on that row only.
        logits: (B, C), any floating type; B may be 0.
        rows: tensors of B rows, constants of the loss: none may require a gradient.

    Returns:
        () float32, or float64 for such logits; 0 and connected for B = 0. Its bits do not depend on the blocks.
    """
    total: Tensor = _SumOfRows.apply(losses, logits, *rows)
    return total


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Cut the rows of (B, C) logits into the blocks that `sum_of_rows` takes."""
    entries = _CPU_ENTRIES_PER_THREAD * torch.get_num_threads() if logits.device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def precise(logits: Tensor) -> torch.dtype:
    """The type that losses are computed in: float32, or float64 for such logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def top_of_rows(scores: Tensor, barred: Tensor, k: int, used: Tensor | int = 0) -> Tensor:
    """Choose the likeliest candidates of each row: k - used of them, or all where there are fewer.

    Args:
        scores: (b, C) float, of magnitude below 1e29, or NEVER; of equal ones any may come first.
        barred: (b, C) of the same type, 0 for a candidate, 1 for any other entry.
        k: places in each row, >= 0.
        used: (b, 1) or one number, places that are taken already.

    Returns:
        (b, C) of the same type, 1 where chosen, 0 elsewhere.
    """
    num_places = min(k, scores.shape[1])
    values, classes = _largest(scores.add(barred, alpha=NEVER), num_places)  # (b, num_places)
    is_chosen = (values > 0.5 * NEVER) & (torch.arange(num_places, device=scores.device) < k - used)
    return torch.zeros_like(scores).scatter_(1, classes, is_chosen.to(scores.dtype))


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(b, k) the largest values of each row, largest first, and their columns.

    The k largest lie in the k groups of columns with the largest maxima; searching only there takes a third of the
    time.
    """
    b, C = values.shape
    num_groups = C // _GROUP
    if 2 * k > num_groups:
        return values.topk(k, dim=1)
    grouped = values[:, : _GROUP * num_groups].view(b, _GROUP, num_groups)  # a group is every num_groups-th column
    groups = grouped.amax(dim=1).topk(k, dim=1).indices  # (b, k)
    members = torch.arange(_GROUP, device=values.device)[:, None] * num_groups  # (_GROUP, 1)
    rest = torch.arange(_GROUP * num_groups, C, device=values.device).expand(b, -1)
    columns = torch.cat([(groups[:, None] + members).flatten(1), rest], dim=1)
    best, places = values.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, places)


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Losses, logits: Tensor, *rows: Tensor) -> Tensor:
        wants_slope = ctx.needs_input_grad[1]
        slope = torch.empty_like(logits, dtype=precise(logits)) if wants_slope else None  # (B, C)
        sums = torch.empty(logits.shape[0], dtype=precise(logits), device=logits.device)  # (B,)
        for part in row_blocks(logits):
            block = logits[part].to(precise(logits)).detach().requires_grad_(wants_slope)
            with torch.set_grad_enabled(wants_slope):
                block_sums = losses(block, *(row[part] for row in rows)).sum(dim=1)
            sums[part] = block_sums.detach()
            if slope is not None:
                slope[part] = torch.autograd.grad(block_sums, block, torch.ones_like(block_sums))[0]
        ctx.losses = losses
        if slope is not None:
            ctx.save_for_backward(slope, logits, *rows)
        return sums.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        slope, logits, *rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: the gradient as a function of the logits
            again = logits.to(slope.dtype)
            (slope,) = torch.autograd.grad(ctx.losses(again, *rows).sum(), again, create_graph=True)
        return None, (slope * grad_outputs[0]).to(logits.dtype), *(None for _ in rows)
