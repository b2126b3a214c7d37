"""Owns which images may enter a shard, and the re-encoding of those that cannot be copied as they are."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from dist_mlpl.data.manifest import Packing
from dist_mlpl.errors import ShardError

MAX_PIXELS: Final = 100_000_000  # equal to `dist_mlpl.data.jpeg.MAX_PIXELS`, without loading torch

FORMATS: Final = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # formats that `convert` reads

NOT_JPEG: Final = "not a JPEG"  # the reason why an image in another format is left out

_JPEG = b"\xff\xd8\xff"
_SCAN, _END = 0xDA, 0xD9
_FRAME = struct.Struct(">HH")  # height, width
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_EXIF = b"Exif\0\0"
_REDUCING_GAP = 3.0  # Pillow: indistinguishable from resizing the full image, several times as fast
# By degrees counter-clockwise.
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
_DEEP = ("I", "F")  # modes with more than 8 bits per channel begin with these


def check_image(content: bytes, *, decode: bool) -> str | None:
    """The reason why an image cannot be packed as it is; None if it can.

    Args:
        content: the file's bytes.
        decode: also decode every pixel, which finds damage that the markers do not show.
    """
    if not content:
        return "empty file"
    if not content.startswith(_JPEG):
        return NOT_JPEG
    scan, width, height = _find_scan(content)
    # A thumbnail in the header has its own end marker, so only one after the start of the first scan counts. Some
    # cameras append bytes after it.
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
    """Offset of a JPEG's first scan (-1 without one), width and height; markers are found as libjpeg finds them."""
    place, width, height = 2, 0, 0
    end = len(content) - 8  # no scan is shorter
    while place < end:
        if content[place] != 0xFF:  # anything between segments is skipped
            place = content.find(b"\xff", place)
            if place < 0:
                break
        marker = content[place + 1]
        if marker == 0xFF:  # 0xFF fill bytes may precede a marker
            place += 1
        elif marker == _SCAN:
            return place, width, height
        elif marker == _END:
            break
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD7:  # these have no length field
            place += 2
        else:
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
                height, width = _FRAME.unpack_from(content, place + 5)
            place += 2 + max(2, content[place + 2] << 8 | content[place + 3])
    return -1, width, height


def orientation_of(content: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 to 8; 1 (upright) where it says none. Reads the header's first segments."""
    place = 2
    while content[place : place + 1] == b"\xff" and 0xE0 <= int.from_bytes(content[place + 1 : place + 2]) <= 0xEF:
        length = int.from_bytes(content[place + 2 : place + 4])
        if content[place + 1] == 0xE1 and content.startswith(_EXIF, place + 4):
            return _orientation_in(content[place + 4 + len(_EXIF) : place + 2 + length])
        place += 2 + max(2, length)
    return 1


def _orientation_in(tiff: bytes) -> int:
    """The orientation in the first directory of an EXIF segment; 1 where there is none or it makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    count = struct.unpack_from(f"{order}H", tiff, start)[0] if start + 2 <= len(tiff) else 0
    for place in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, place)
        if tag == _ORIENTATION:
            return int(value) if kind == 3 and 1 <= value <= 8 else 1  # kind 3: an unsigned integer of 16 bits
    return 1


def fit_image(content: bytes, rotation: int, packing: Packing) -> tuple[bytes, str | None]:
    """An image as it enters the shard: unchanged, or re-encoded where `packing` or the rotation requires it.

    Re-encoded are, with `packing.max_side`, JPEGs that are larger or whose EXIF orientation is not upright; JPEGs to be
    rotated; and with `packing.convert`, images in other formats. The EXIF orientation is applied first, then the
    rotation; metadata are dropped. Equal input gives equal bytes with one version of Pillow.

    Args:
        content: the file's bytes.
        rotation: degrees counter-clockwise: 0, 90, 180 or 270.
        packing: the set's packing.

    Returns:
        The JPEG and None; or empty bytes and the reason why the image cannot be packed.
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
    """Whether a JPEG is too large, not upright, or does not open (re-encoding will then report the fault)."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return max(image.size) > max_side or image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:
        return True


def _encoded(content: bytes, rotation: int, packing: Packing) -> tuple[bytes, str | None]:
    is_jpeg = content.startswith(_JPEG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images and odd metadata; metadata are dropped
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
    if packing.max_side is not None:  # smaller ones stay; JPEGs are decoded at reduced size
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
    """The image in RGB or grey levels, with transparency on white; its EXIF orientation is kept.

    This must come before resizing, since palettes and masks cannot be averaged.
    """
    exif = image.getexif()
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    image.info["exif"] = exif.tobytes()
    return image
