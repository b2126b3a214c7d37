"""Owns how a JPEG is decoded: whole or its upper part, at full or reduced size, on the host or the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import simplejpeg
import torch
from torch import Tensor
from torchvision import io
from torchvision.transforms.v2 import functional as F

from dist_mlpl.errors import ShardError

MAX_PIXELS: Final = 100_000_000  # 300 MB decoded; a larger image is treated as a decompression bomb
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the reduced crop is still at least this factor larger than the
# final image. At this margin the final crops differ from those of full decoding by 1 to 2 grey levels on average.
SCALED_MARGIN: Final = 1.1
_ROWS_BELOW: Final = 32  # rows of pixels decoded below the last one needed: the tallest block of any JPEG


class Picture(Protocol):
    """An image whose size is known before it is decoded."""

    height: int
    width: int

    def factor(self, shrink: float) -> int:
        """The factor by which decoding may shrink an image that will be resized to be `shrink` times smaller."""

    def decode(self, factor: int, num_rows: int | None = None) -> Tensor:
        """(ceil(height / factor), ceil(width / factor), 3) uint8, RGB; at least its first `num_rows` rows if given."""


class Jpeg:
    """A JPEG whose header has been read, to be decoded at the size needed.

    An EXIF orientation is not applied: annotations and recorded crops refer to the pixels as stored. Damage inside
    the entropy-coded part may pass unseen, as with every JPEG reader; a missing end does not.

    Args:
        content: bytes of the file.
        is_scaled: allow decoding at reduced size.
        is_sound: these very bytes were decoded whole before, so decoding may stop below the last row needed;
            otherwise the whole image is decoded every time, to detect damage.

    Raises:
        ShardError: not a JPEG, or 0 or more than MAX_PIXELS pixels; nothing was decoded.
    """

    def __init__(self, content: bytes, *, is_scaled: bool = False, is_sound: bool = False) -> None:
        frame = _frame_header(content)
        self.width, self.height = frame.width, frame.height
        if not 0 < self.width * self.height <= MAX_PIXELS:
            raise undecodable(f"{self.width} x {self.height} pixels")
        self._content, self._is_scaled = content, is_scaled
        self._height_at = frame.height_at if is_sound and frame.is_sequential else None

    def factor(self, shrink: float) -> int:
        """The factor by which the decoder may shrink an image that becomes `shrink` times smaller: 1, 2, 4 or 8."""
        if not self._is_scaled:
            return 1
        return next((factor for factor in (8, 4, 2) if shrink >= factor * SCALED_MARGIN), 1)

    def decode(self, factor: int = 1, num_rows: int | None = None) -> Tensor:
        """Decode the image, or its upper part.

        Args:
            factor: 1, 2, 4 or 8; each side of the result is this many times smaller, rounded up.
            num_rows: rows of the result that are needed; None for all. The decoder is given a header whose height ends
                a little below them: those rows come out the same, and time is saved about in proportion to the rows
                left out.

        Returns:
            (ceil(height / factor), ceil(width / factor), 3) uint8, RGB; with `is_sound`, perhaps only the first rows,
            `num_rows` or more.

        Raises:
            ShardError: the image is corrupt or truncated.
        """
        content, full_height = self._content, self.height
        # A row's chroma is interpolated with the next block's, hence the margin below.
        end = self.height if num_rows is None else num_rows * factor + _ROWS_BELOW
        is_cut = self._height_at is not None and end < self.height
        if self._height_at is not None and is_cut:
            content = content[: self._height_at] + end.to_bytes(2, "big") + content[self._height_at + 2 :]
            full_height = end
        height, width = -(-full_height // factor), -(-self.width // factor)
        try:
            # Strict decoding of a shortened image would complain about the rest of the file.
            pixels = torch.from_numpy(
                simplejpeg.decode_jpeg(content, min_height=height, min_width=width, strict=not is_cut)
            )
            if pixels.shape[:2] == (height, width):
                return pixels
        except (ValueError, KeyError):
            pass  # a colour space or subsampling that simplejpeg refuses, or damage: torchvision's decoder decides
        image = _decode_by_torchvision(self._content)
        if factor > 1:
            image = F.resize(image, [-(-self.height // factor), width], antialias=True)
        return image.permute(1, 2, 0).contiguous()


class Decoded:
    """An image that is decoded already, on any device.

    Args:
        image: (3, H, W) uint8.
    """

    def __init__(self, image: Tensor) -> None:
        self._image = image
        self.height, self.width = image.shape[-2:]

    def factor(self, shrink: float) -> int:
        """Always 1: there is no decoding left to save."""
        return 1

    def decode(self, factor: int = 1, num_rows: int | None = None) -> Tensor:
        """The image as (H, W, 3) uint8, a view; both arguments are ignored."""
        return self._image.permute(1, 2, 0)


def decode_jpeg(content: bytes) -> Tensor:
    """Decode a JPEG of any colour space to RGB, at full size.

    Returns:
        (3, H, W) uint8, a view in channels-last memory.

    Raises:
        ShardError: see `Jpeg` and `Jpeg.decode`.
    """
    return Jpeg(content).decode().permute(2, 0, 1)


def decode_on(device: torch.device, contents: Sequence[bytes]) -> list[Decoded | ShardError]:
    """Decode several JPEGs at once on the device that uses them; on a GPU, torchvision uses nvJPEG.

    Returns:
        For each JPEG, in the order of `contents`, the image on the device, or the error if it cannot be decoded.
    """
    found: list[Decoded | ShardError] = []
    whole: list[int] = []
    for number, content in enumerate(contents):
        try:
            Jpeg(content)
        except ShardError as error:
            found.append(error)
        else:
            found.append(Decoded(torch.empty(3, 0, 0)))  # a placeholder
            whole.append(number)
    encoded = [torch.frombuffer(bytearray(contents[number]), dtype=torch.uint8) for number in whole]
    try:
        images = io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, device=device) if encoded else []
    except RuntimeError:  # one is damaged, or nvJPEG does not support it: decode one by one on the host
        images = []
    for place, number in enumerate(whole):
        try:
            image = images[place] if images else decode_jpeg(contents[number]).to(device)
            found[number] = Decoded(image)
        except ShardError as error:
            found[number] = error
    return found


def _decode_by_torchvision(content: bytes) -> Tensor:
    """Decode a JPEG at full size with torchvision, (3, H, W) uint8 RGB."""
    try:
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, apply_exif_orientation=False)
    except RuntimeError as error:
        raise undecodable(str(error).splitlines()[0].rsplit(", ", 1)[-1]) from error


def undecodable(reason: str) -> ShardError:
    """The error for an image that cannot be decoded; the caller raises it."""
    return ShardError(
        f"an image cannot be decoded: {reason}",
        expected=f"a whole JPEG of at most {MAX_PIXELS:,} pixels",
        where="the image record of a sample",
        next_step="run `dist-mlpl shards verify`; a few such samples are skipped up to data.max_bad_fraction",
    )


class _Frame(NamedTuple):
    """The contents of a JPEG's frame header, and where the height is stored."""

    width: int
    height: int
    height_at: int  # offset of the height's two bytes in the file
    is_sequential: bool  # baseline or extended sequential, whose rows are stored from top to bottom


def _frame_header(content: bytes) -> _Frame:
    """Find the frame header marker by marker, as libjpeg does.

    Raises:
        ShardError: there is none.
    """
    place = 2
    while content[:2] == b"\xff\xd8":
        place = content.find(b"\xff", place)  # anything between segments is skipped
        while 0 <= place < len(content) and content[place] == 0xFF:  # 0xFF fill bytes may precede a marker
            place += 1
        if place < 0 or place + 8 > len(content):
            break
        marker, place = content[place], place + 1
        if marker == 0xDA or marker == 0xD9:  # start of scan or end of image before any frame header
            break
        if marker == 0x00 or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these have no length field
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            height, width = (int.from_bytes(content[place + at : place + at + 2], "big") for at in (3, 5))
            return _Frame(width, height, place + 3, marker in (0xC0, 0xC1))
        place += max(2, int.from_bytes(content[place : place + 2], "big"))
    raise undecodable("no JPEG frame header")
