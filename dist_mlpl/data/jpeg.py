"""Owns how a JPEG becomes pixels: whole or its upper part, full size or smaller, on the host or the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import simplejpeg
import torch
from torch import Tensor
from torchvision import io
from torchvision.transforms.v2 import functional as F

from dist_mlpl.errors import ShardError

MAX_PIXELS: Final = 100_000_000  # 300 MB decoded; a larger image is taken for a decompression bomb
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where what is left of the crop is still so much larger than the
# image it becomes. With it the final crops differ from those of full decoding by 1 to 2 grey levels on average.
SCALED_MARGIN: Final = 1.1
_ROWS_BELOW: Final = 32  # pixels decoded below the last row needed: the tallest block of any JPEG


class Picture(Protocol):
    """An image whose size is known before its pixels are."""

    height: int
    width: int

    def factor(self, shrink: float) -> int:
        """By how much the pixels may be shrunk in decoding, for an image that becomes `shrink` times smaller."""

    def decode(self, factor: int, num_rows: int | None = None) -> Tensor:
        """(ceil(height / factor), ceil(width / factor), 3) uint8, RGB; at least its first `num_rows` rows if given."""


class Jpeg:
    """A JPEG whose header was read, to be decoded at the size that its use needs.

    An EXIF orientation is not applied: annotations and recorded crops refer to the pixels as stored. Damage inside
    the entropy-coded part may pass unseen, as with every JPEG reader; a missing end does not.

    Args:
        content: the file.
        is_scaled: whether it may be decoded smaller than it is.
        is_sound: these very bytes were decoded whole before, so nothing is lost by stopping at the last row needed;
            otherwise all of it is decoded each time, for the damage that this may show.

    Raises:
        ShardError: not a JPEG, or of no or more than MAX_PIXELS pixels; nothing was decoded.
    """

    def __init__(self, content: bytes, *, is_scaled: bool = False, is_sound: bool = False) -> None:
        frame = _frame_header(content)
        self.width, self.height = frame.width, frame.height
        if not 0 < self.width * self.height <= MAX_PIXELS:
            raise undecodable(f"{self.width} x {self.height} pixels")
        self._content, self._is_scaled = content, is_scaled
        self._height_at = frame.height_at if is_sound and frame.is_sequential else None

    def factor(self, shrink: float) -> int:
        """By how much the decoder may shrink an image that becomes `shrink` times smaller: 1, 2, 4 or 8."""
        if not self._is_scaled:
            return 1
        return next((factor for factor in (8, 4, 2) if shrink >= factor * SCALED_MARGIN), 1)

    def decode(self, factor: int = 1, num_rows: int | None = None) -> Tensor:
        """Decode it, or its upper part.

        Args:
            factor: 1, 2, 4 or 8; the result is so many times smaller, rounded up.
            num_rows: of the result, that are needed; None for all. The decoder reads the file from its beginning and
                is told that the image ends a little below them: those rows are the same, and about as much time is
                saved as rows are left out.

        Returns:
            (ceil(height / factor), ceil(width / factor), 3) uint8, RGB; of a sound JPEG perhaps only its first rows,
            `num_rows` or more.

        Raises:
            ShardError: corrupt or truncated.
        """
        content, full_height = self._content, self.height
        # Colours of a row are interpolated from those of the next block.
        end = self.height if num_rows is None else num_rows * factor + _ROWS_BELOW
        is_cut = self._height_at is not None and end < self.height
        if self._height_at is not None and is_cut:
            content = content[: self._height_at] + end.to_bytes(2, "big") + content[self._height_at + 2 :]
            full_height = end
        height, width = -(-full_height // factor), -(-self.width // factor)
        try:
            # Of an image cut short, strict decoding would complain about what is left of the file.
            pixels = torch.from_numpy(
                simplejpeg.decode_jpeg(content, min_height=height, min_width=width, strict=not is_cut)
            )
            if pixels.shape[:2] == (height, width):
                return pixels
        except (ValueError, KeyError):
            pass  # a colour space or sampling that this interface refuses, or damage: the other reader decides
        image = _decode_by_torchvision(self._content)
        if factor > 1:
            image = F.resize(image, [-(-self.height // factor), width], antialias=True)
        return image.permute(1, 2, 0).contiguous()


class Decoded:
    """A picture that is decoded already, on any device.

    Args:
        image: (3, H, W) uint8.
    """

    def __init__(self, image: Tensor) -> None:
        self._image = image
        self.height, self.width = image.shape[-2:]

    def factor(self, shrink: float) -> int:
        """Always 1: nothing is left to be saved."""
        return 1

    def decode(self, factor: int = 1, num_rows: int | None = None) -> Tensor:
        """(H, W, 3) uint8, a view."""
        return self._image.permute(1, 2, 0)


def decode_jpeg(content: bytes) -> Tensor:
    """Decode a JPEG of any colour space to RGB, at full size.

    Returns:
        (3, H, W) uint8, a view of pixels in rows.

    Raises:
        ShardError: as `Jpeg` and `Jpeg.decode`.
    """
    return Jpeg(content).decode().permute(2, 0, 1)


def decode_on(device: torch.device, contents: Sequence[bytes]) -> list[Decoded | ShardError]:
    """Decode JPEGs together where they will be used; on a GPU, torchvision hands them to nvJPEG.

    Returns:
        Pictures on the device, or why one cannot be decoded, in the order of `contents`.
    """
    found: list[Decoded | ShardError] = []
    whole: list[int] = []
    for number, content in enumerate(contents):
        try:
            Jpeg(content)
        except ShardError as error:
            found.append(error)
        else:
            found.append(Decoded(torch.empty(3, 0, 0)))  # its place
            whole.append(number)
    encoded = [torch.frombuffer(bytearray(contents[number]), dtype=torch.uint8) for number in whole]
    try:
        images = io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, device=device) if encoded else []
    except RuntimeError:  # one of them is damaged, or of a kind that nvJPEG does not read: one by one on the host
        images = []
    for place, number in enumerate(whole):
        try:
            image = images[place] if images else decode_jpeg(contents[number]).to(device)
            found[number] = Decoded(image)
        except ShardError as error:
            found[number] = error
    return found


def _decode_by_torchvision(content: bytes) -> Tensor:
    """(3, H, W) uint8."""
    try:
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB, apply_exif_orientation=False)
    except RuntimeError as error:
        raise undecodable(str(error).splitlines()[0].rsplit(", ", 1)[-1]) from error


def undecodable(reason: str) -> ShardError:
    return ShardError(
        f"an image cannot be decoded: {reason}",
        expected=f"a whole JPEG of at most {MAX_PIXELS:,} pixels",
        where="the image record of a sample",
        next_step="run `dist-mlpl shards verify`; a few such samples are skipped up to data.max_bad_fraction",
    )


class _Frame(NamedTuple):
    """What a JPEG's frame header says, and where."""

    width: int
    height: int
    height_at: int  # where the height's two bytes are
    is_sequential: bool  # baseline or extended: rows come from top to bottom


def _frame_header(content: bytes) -> _Frame:
    """The frame header, found marker by marker as libjpeg does it."""
    place = 2
    while content[:2] == b"\xff\xd8":
        place = content.find(b"\xff", place)  # anything between segments is skipped
        while 0 <= place < len(content) and content[place] == 0xFF:  # a marker may be filled with 0xFF
            place += 1
        if place < 0 or place + 8 > len(content):
            break
        marker, place = content[place], place + 1
        if marker == 0xDA or marker == 0xD9:  # scan or end before any frame header
            break
        if marker == 0x00 or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these have no length
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            height, width = (int.from_bytes(content[place + at : place + at + 2], "big") for at in (3, 5))
            return _Frame(width, height, place + 3, marker in (0xC0, 0xC1))
        place += max(2, int.from_bytes(content[place : place + 2], "big"))
    raise undecodable("no JPEG frame header")
