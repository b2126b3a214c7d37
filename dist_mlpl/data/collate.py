"""Owns the memory of one batch on the host: made empty, filled row by row from many threads, moved in one copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl.batch import Batch
from dist_mlpl.data.transform import DecodedImage

Indices = npt.NDArray[np.int64]


class BadSample(NamedTuple):
    """A sample that kept its place with `valid` False."""

    index: int  # type: ignore[assignment]
    name: str
    reason: str


class HostBatch(NamedTuple):
    """One rank's share of a step on the host, and what `audit` will want to know of it."""

    batch: Batch  # images uint8, (B, 3, size, size) in rows of pixels: a quarter of the bytes of float32 to move
    positions: Indices  # (B,) int64 of the epoch's order, -1 on padding
    indices: Indices  # (B,) int64, those of `batch.index`
    bad: list[BadSample]


def empty_batch(indices: Indices, *, num_classes: int, image_size: int, is_pinned: bool) -> Batch:
    """A batch in which no row is valid yet; `put` and `clear` make its rows.

    Args:
        indices: (B,) int64, -1 on padding.
        num_classes: C.
        image_size: side of the square images.
        is_pinned: page-locked, so that a copy to a GPU needs nobody's attention; torch reuses such memory.
    """
    num_images = len(indices)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=is_pinned)

    return Batch(
        images=empty(num_images, image_size, image_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
        targets=empty(num_images, num_classes, dtype=torch.int8),
        pseudo_targets=None,
        soft_targets=None,
        index=empty(num_images, dtype=torch.int64).copy_(torch.from_numpy(indices)),
        crop=empty(num_images, 4, dtype=torch.float32),
        flipped=empty(num_images, dtype=torch.bool),
        valid=empty(num_images, dtype=torch.bool).fill_(False),
    )


def put(batch: Batch, row: int, decoded: DecodedImage, targets: npt.NDArray[np.int8]) -> None:
    """Fill one row with a sample: its image and its (C,) labels."""
    batch.images[row].copy_(decoded.image)
    batch.targets[row].copy_(torch.from_numpy(targets))
    batch.crop[row].copy_(decoded.crop)
    batch.flipped[row] = decoded.flipped
    batch.valid[row] = True


def clear(batch: Batch, row: int) -> None:
    """Make one row that of padding, or of a sample that could not be decoded: black, nothing known."""
    batch.images[row].zero_()
    batch.targets[row].zero_()
    batch.crop[row].copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    batch.flipped[row] = False


def to_device(
    batches: Iterable[HostBatch], device: torch.device, normalise: Callable[[Tensor], Tensor]
) -> Iterator[HostBatch]:
    """Batches on `device`, their images normalised there.

    On a GPU each batch is copied and normalised on a stream of its own while the step before it computes: one batch
    ahead, which costs the memory of one more batch.

    Args:
        batches: on the host, pinned if the device is a GPU.
        device: where the step runs.
        normalise: uint8 images to float32.
    """
    if device.type != "cuda":
        for host in batches:
            batch = host.batch.to(device)
            yield host._replace(batch=batch._replace(images=normalise(batch.images)))
        return
    copies = torch.cuda.Stream(device)
    ahead: tuple[HostBatch, torch.cuda.Event] | None = None
    for host in batches:
        with torch.cuda.stream(copies):
            batch = host.batch.to(device)
            batch = batch._replace(images=normalise(batch.images))
            copied = torch.cuda.Event()
            copied.record(copies)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = host._replace(batch=batch), copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(host: HostBatch, copied: torch.cuda.Event) -> HostBatch:
    """Let the computing stream wait for the copy, and the allocator know that it uses the memory."""
    computing = torch.cuda.current_stream()
    computing.wait_event(copied)
    for field in host.batch:
        if field is not None:
            field.record_stream(computing)
    return host
