"""Owns small JPEGs made on the spot, whole and damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torchvision import io


def tiny_jpeg(seed: int, *, height: int = 16, width: int = 16) -> bytes:
    """A colour JPEG of smooth random content; equal arguments give equal bytes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=generator).float()
    pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return io.encode_jpeg(pixels[0].round().to(torch.uint8), quality=90).numpy().tobytes()


def picture(height: int = 90, width: int = 120, *, channels: int = 3, seed: int = 0) -> Tensor:
    """(channels, H, W) uint8, smooth so that JPEG keeps it."""
    coarse = torch.rand(1, channels, 7, 9, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (smooth[0].clamp(0, 1) * 255).to(torch.uint8)


def jpeg(image: Tensor) -> bytes:
    """(channels, H, W) uint8 at quality 95."""
    return bytes(io.encode_jpeg(image, quality=95).numpy())


def write_images(folder: Path, names: Iterable[str]) -> None:
    """A different tiny JPEG under every name, sizes varied; names may hold folders."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny_jpeg(seed, height=16 + seed % 3 * 8, width=16 + seed % 5 * 8))


def truncated(content: bytes) -> bytes:
    """The first two thirds of an image."""
    return content[: len(content) * 2 // 3]


def undecodable(content: bytes) -> bytes:
    """All markers in place, but a Huffman table (FF C4) that no decoder accepts."""
    at = content.index(b"\xff\xc4") + 5
    return content[:at] + b"\xff" * 16 + content[at + 16 :]


def bomb(content: bytes) -> bytes:
    """The same image with a header that promises 60,000 x 60,000 pixels."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + (60_000).to_bytes(2, "big") * 2 + content[at + 4 :]
