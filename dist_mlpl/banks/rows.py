"""Owns rows of several tensors as rows of bytes, the form in which they travel between ranks at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Kind = tuple[torch.dtype, tuple[int, ...]]  # type and shape of one row's part


def as_bytes(parts: Sequence[Tensor]) -> Tensor:
    """Tensors side by side.

    Args:
        parts: (n, *shape) each, at least one.

    Returns:
        (n, bytes of a row) uint8.
    """
    flat = [part.reshape(len(part), math.prod(part.shape[1:])).contiguous().view(torch.uint8) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def from_bytes(rows: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """What `as_bytes` joined.

    Args:
        rows: (n, bytes of a row) uint8, on the CPU.
        kinds: of each part, in order.

    Returns:
        (n, *shape) by part, in memory of their own.
    """
    parts, start, given = [], 0, rows.numpy()
    for dtype, shape in kinds:
        stop = start + math.prod(shape) * dtype.itemsize
        # Copied: bytes are seen as another type only from an aligned start.
        part = torch.empty(len(rows), stop - start, dtype=torch.uint8)
        part.numpy()[:] = given[:, start:stop]
        parts.append(part.view(dtype).view(len(rows), *shape))
        start = stop
    return parts


def no_rows(kinds: Sequence[Kind]) -> Tensor:
    """(0, bytes of a row) uint8: what `as_bytes` makes of parts without rows."""
    return as_bytes([torch.empty(0, *shape, dtype=dtype) for dtype, shape in kinds])


def kind_of(rows: Tensor) -> Kind:
    """Of rows (n, *shape)."""
    return rows.dtype, tuple(rows.shape[1:])
