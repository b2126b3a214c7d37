"""Owns which images may enter a shard, and what is made of those that may not stay as they are."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from dist_mlpl.data.manifest import Packing
from dist_mlpl.errors import ShardError

MAX_PIXELS: Final = 100_000_000  # as training has it (`dist_mlpl.data.jpeg`), without loading torch

FORMATS: Final = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # that `convert` reads

_JPEG = b"\xff\xd8\xff"
_SCAN, _END = 0xDA, 0xD9
_FRAME = struct.Struct(">HH")  # height, width
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_REDUCING_GAP = 3.0  # Pillow: indistinguishable from resizing the full image, several times as fast
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}  # counter-clockwise
_DEEP = ("I", "F")  # modes of more than 8 bits a channel begin with these


def check_image(content: bytes, *, decode: bool) -> str | None:
    """Why an image may not be packed as it is, or None.

    Args:
        content: the file's bytes.
        decode: decode every pixel too; finds what the markers do not show.
    """
    if not content:
        return "empty file"
    if not content.startswith(_JPEG):
        return "not a JPEG"
    scan, width, height = _find_scan(content)
    # A thumbnail in the header has an end marker of its own, so it counts behind the first scan's start alone. Some
    # cameras append bytes to the end.
    if scan < 0 or content.rfind(b"\xff\xd9", scan) < 0:
        return "truncated JPEG"
    if width * height > MAX_PIXELS:
        return "too many pixels"
    if decode:
        from dist_mlpl.data.jpeg import decode_jpeg  # brings torch, which a run without decoding does not need

        try:
            decode_jpeg(content)
        except ShardError:
            return "undecodable JPEG"
    return None


def _find_scan(content: bytes) -> tuple[int, int, int]:
    """Where the first scan of a JPEG begins (-1: nowhere), width, height; markers are found as libjpeg finds them."""
    place, width, height = 2, 0, 0
    end = len(content) - 8  # no scan is shorter
    while place < end:
        if content[place] != 0xFF:  # anything between segments is skipped
            place = content.find(b"\xff", place)
            if place < 0:
                break
        marker = content[place + 1]
        if marker == 0xFF:  # a marker may be filled with 0xFF
            place += 1
        elif marker == _SCAN:
            return place, width, height
        elif marker == _END:
            break
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD7:  # these have no length
            place += 2
        else:
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
                height, width = _FRAME.unpack_from(content, place + 5)
            place += 2 + max(2, content[place + 2] << 8 | content[place + 3])
    return -1, width, height


def fit_image(content: bytes, rotation: int, packing: Packing) -> tuple[bytes, str | None]:
    """An image as it enters the shard: byte for byte, or, where `packing` or the rotation asks for it, encoded anew.

    Encoded anew is a JPEG that is larger than `packing.max_side` (then also one whose EXIF orientation is not upright),
    one that has to be turned, and with `packing.convert` any image in another format. Its EXIF orientation is applied
    first, then the rotation; metadata are dropped. Equal input gives equal bytes under one version of Pillow.

    Args:
        content: the file's bytes.
        rotation: degrees counter-clockwise: 0, 90, 180 or 270.
        packing: of the set.

    Returns:
        The JPEG, and why there is none (then it is empty).
    """
    if packing.convert and content and not content.startswith(_JPEG):
        return _encoded(content, rotation, packing)
    if fault := check_image(content, decode=False):
        return b"", fault
    if rotation or (packing.max_side is not None and _is_to_change(content, packing.max_side)):
        return _encoded(content, rotation, packing)
    if packing.decode and (fault := check_image(content, decode=True)):
        return b"", fault
    return content, None


def _is_to_change(content: bytes, max_side: int) -> bool:
    """True for what is too large, lies on its side, or does not open (which encoding it will tell)."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return max(image.size) > max_side or image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:
        return True


def _encoded(content: bytes, rotation: int, packing: Packing) -> tuple[bytes, str | None]:
    is_jpeg = content.startswith(_JPEG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, and of odd metadata, which are dropped
            with Image.open(io.BytesIO(content), formats=("JPEG",) if is_jpeg else FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    return b"", "too many pixels"
                if image.mode.startswith(_DEEP):
                    return b"", "pixels of more than 8 bits"
                return _as_jpeg(image if is_jpeg else _opaque(image), rotation, packing), None
    except Image.DecompressionBombError:
        return b"", "too many pixels"
    except UnidentifiedImageError:
        return b"", "not an image"
    except MemoryError:
        raise
    except Exception:  # Pillow's readers raise whatever a damaged file leads them to
        return b"", "undecodable JPEG" if is_jpeg else "undecodable image"


def _as_jpeg(image: Image.Image, rotation: int, packing: Packing) -> bytes:
    if packing.max_side is not None:  # leaves smaller ones alone; JPEGs are decoded at a fraction of their size
        box = (packing.max_side, packing.max_side)
        image.thumbnail(box, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    image = ImageOps.exif_transpose(image)
    if rotation:
        image = image.transpose(_TURNS[rotation])
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    image.info.clear()
    target = io.BytesIO()
    image.save(target, "JPEG", quality=packing.quality)
    return target.getvalue()


def _opaque(image: Image.Image) -> Image.Image:
    """The image in RGB or grey levels, on white where it is transparent; its EXIF orientation stays.

    This comes before it shrinks: palettes and masks have no means.
    """
    exif = image.getexif()
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.info["exif"] = exif.tobytes()
    return image
