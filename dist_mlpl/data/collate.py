"""Owns how decoded samples become one `Batch`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dist_mlpl.batch import Batch
from dist_mlpl.data.transform import DecodedImage


def collate(
    decoded: Sequence[DecodedImage | None],
    targets: npt.NDArray[np.int8],
    indices: npt.NDArray[np.int64],
    image_size: int,
) -> Batch:
    """Stack one rank's share of a step.

    Args:
        decoded: B decoded samples; None for padding and for what could not be decoded.
        targets: (B, C) int8 in the one code; rows without an image become unknown throughout.
        indices: (B,) int64, -1 on padding.
        image_size: side of the square images.

    Returns:
        A batch on the CPU whose images are still uint8 (B, 3, size, size): a quarter of the bytes to move.
    """
    num_images = len(decoded)
    valid = torch.tensor([image is not None for image in decoded], dtype=torch.bool)
    images = torch.zeros(num_images, 3, image_size, image_size, dtype=torch.uint8)
    crop = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(num_images, 1)
    flipped = torch.zeros(num_images, dtype=torch.bool)
    for row, image in enumerate(decoded):
        if image is not None:
            images[row] = image.image
            crop[row] = image.crop
            flipped[row] = image.flipped
    known = torch.from_numpy(targets) * valid[:, None]
    return Batch(images, known, None, None, torch.from_numpy(indices), crop, flipped, valid)
