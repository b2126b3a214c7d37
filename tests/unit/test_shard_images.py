"""Claims about images on their way into a shard: which may enter, which are made anew, and what comes of them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_mlpl.data import jpeg
from dist_mlpl.data.manifest import Packing
from shards import images
from shards.images import check_image, fit_image, orientation_of
from tests.support.images import bomb, tiny_jpeg, truncated, undecodable

pytestmark = pytest.mark.unit

ORIENTATION = 0x0112


def packing(**options: Any) -> Packing:
    return Packing(seed=0, target_shard_bytes=1, **{"decode": False, **options})


def quadrants(height: int = 48, width: int = 96) -> npt.NDArray[np.uint8]:
    """Four plain colours: any turn or mirror shows."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = (250, 10, 10)
    pixels[: height // 2, width // 2 :] = (10, 250, 10)
    pixels[height // 2 :, : width // 2] = (10, 10, 250)
    pixels[height // 2 :, width // 2 :] = (250, 250, 250)
    return pixels


def encoded(pixels: npt.NDArray[Any], kind: str = "JPEG", *, orientation: int | None = None, **options: Any) -> bytes:
    target, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    Image.fromarray(pixels).save(target, kind, **options)
    return target.getvalue()


def decoded(content: bytes) -> npt.NDArray[np.uint8]:
    """Pixels as they lie in the file, EXIF left aside."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB"))


def difference(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


WHOLE = tiny_jpeg(0, height=64, width=64)

# What makes each EXIF orientation upright, from the standard's description of row 0 and column 0.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (WHOLE, None),
        (WHOLE + b"\0" * 20, None),
        (encoded(quadrants(), progressive=True), None),
        (encoded(quadrants()[..., 0]), None),
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n" + WHOLE, "not a JPEG"),
        (b"<html>Not found</html>", "not a JPEG"),
        (b"\xff\xd8", "not a JPEG"),
        (b"\xff\xd8\xff", "truncated JPEG"),
        (truncated(WHOLE), "truncated JPEG"),
        (truncated(encoded(quadrants(), progressive=True)), "truncated JPEG"),
        (WHOLE[:-1], "truncated JPEG"),
        (WHOLE[:20] + WHOLE[-2:] + truncated(WHOLE)[20:], "truncated JPEG"),  # a thumbnail's end marker in the header
    ],
)
def test_markers_alone_tell_whole_images_from_others(content: bytes, fault: str | None) -> None:
    assert check_image(content, decode=False) == fault
    assert fit_image(content, 0, packing()) == ((content, None) if fault is None else (b"", fault))


def test_a_thumbnail_in_the_header_does_not_hide_a_truncation() -> None:
    inside = b"\xff\xe1" + (len(WHOLE) + 2).to_bytes(2, "big") + WHOLE
    with_thumbnail = WHOLE[:2] + inside + WHOLE[2:]
    assert check_image(with_thumbnail, decode=True) is None
    assert check_image(with_thumbnail[: 2 + len(inside) + 200], decode=False) == "truncated JPEG"


def test_decoding_finds_what_the_markers_do_not_show() -> None:
    assert check_image(WHOLE, decode=True) is None
    assert check_image(undecodable(WHOLE), decode=False) is None
    assert check_image(undecodable(WHOLE), decode=True) == "undecodable JPEG"
    assert fit_image(undecodable(WHOLE), 0, packing(decode=True)) == (b"", "undecodable JPEG")
    assert fit_image(undecodable(WHOLE), 0, packing(max_side=32)) == (b"", "undecodable JPEG")


@pytest.mark.parametrize("options", [{}, {"decode": True}, {"max_side": 64}, {"convert": True}])
def test_a_decompression_bomb_is_left_out_before_it_is_decoded(options: dict[str, Any]) -> None:
    assert fit_image(bomb(WHOLE), 90, packing(**options)) == (b"", "too many pixels")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_001, 10_000)])  # above and below Pillow's limit
def test_a_bomb_in_another_format_is_left_out_before_it_is_decoded(width: int, height: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    png += struct.pack(">I", 10) + b"IDAT" + bytes(14)
    assert fit_image(png, 0, packing(convert=True)) == (b"", "too many pixels")


def test_the_largest_image_is_that_of_training() -> None:
    assert images.MAX_PIXELS == jpeg.MAX_PIXELS


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (50, 50)])
def test_an_image_within_the_limit_stays_byte_for_byte(shape: tuple[int, int]) -> None:
    content = encoded(quadrants(*shape), quality=31, comment=b"kept")
    assert fit_image(content, 0, packing(max_side=96)) == (content, None)
    upright = encoded(quadrants(*shape), orientation=1)
    assert fit_image(upright, 0, packing(max_side=96)) == (upright, None)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("max_side", [160, 4096])
def test_orientation_then_rotation_are_applied_and_the_orientation_is_gone(
    orientation: int, rotation: int, max_side: int
) -> None:
    content = encoded(quadrants(240, 480), orientation=orientation, quality=95)
    image, fault = fit_image(content, rotation, packing(max_side=max_side, quality=95))
    assert fault is None
    wanted = np.rot90(UPRIGHT[orientation](quadrants(240, 480)), rotation // 90)  # it turns counter-clockwise
    if max_side == 160:
        wanted = wanted[1::3, 1::3]
    assert difference(decoded(image), wanted) < 4  # colours run at the edges
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.getexif().get(ORIENTATION, 1) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_read_from_the_header_in_either_byte_order(orientation: int) -> None:
    content = encoded(quadrants(), orientation=orientation)
    assert orientation_of(content) == orientation
    entry = struct.pack(">HHIHH", ORIENTATION, 3, 1, orientation, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    plain = encoded(quadrants())
    assert orientation_of(plain[:2] + segment + plain[2:]) == orientation
    assert orientation_of(plain[:20] + segment + plain[20:]) == orientation  # after the JFIF segment
    assert orientation_of(plain) == 1


@settings(max_examples=300, deadline=None)
@given(start=st.integers(0, 60), noise=st.binary(max_size=30), keep=st.integers(0, 120))
def test_a_damaged_header_has_an_orientation_too(start: int, noise: bytes, keep: int) -> None:
    content = encoded(quadrants(), orientation=6)
    assert 1 <= orientation_of((content[:start] + noise + content[start + len(noise) :])[:keep]) <= 8


def test_without_a_limit_only_the_rotated_images_are_made_anew() -> None:
    content = encoded(quadrants(), orientation=6)
    assert fit_image(content, 0, packing()) == (content, None)
    turned, _ = fit_image(encoded(quadrants(240, 480)), 90, packing())
    assert difference(decoded(turned), np.rot90(quadrants(240, 480))) < 4


@pytest.mark.parametrize(("height", "width", "size"), [(100, 200, (64, 32)), (301, 50, (11, 64)), (65, 65, (64, 64))])
def test_the_longer_side_becomes_the_limit_and_the_shape_stays(height: int, width: int, size: tuple[int, int]) -> None:
    image, _ = fit_image(tiny_jpeg(1, height=height, width=width), 0, packing(max_side=64))
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.size == size


@pytest.mark.parametrize("max_side", [64, 200, 448])
def test_photographs_are_resized_as_by_pillow_from_the_full_image(max_side: int) -> None:
    data = Path(os.environ.get("MLPL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    paths = sorted((data / "coco256" / "images").glob("*.jpg"))[:12]
    if not paths:
        pytest.skip(f"no photographs in {data}; set MLPL_TEST_DATA to the folder that holds coco256")
    for path in paths:
        content = path.read_bytes()
        image, _ = fit_image(content, 0, packing(max_side=max_side, quality=100))
        with Image.open(path) as full:
            found = decoded(image)
            oracle = full.convert("RGB").resize(found.shape[1::-1], Image.Resampling.LANCZOS)
            again = decoded(encoded(np.asarray(oracle), quality=100))
            assert abs(found.shape[1] / found.shape[0] - full.width / full.height) < 0.05
        assert max(found.shape[:2]) == max_side
        assert difference(found, again) < 1.0
        assert fit_image(content, 0, packing(max_side=max_side, quality=100))[0] == image


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_other_formats_are_reported_or_on_request_converted(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(quadrants(), kind, **options)
    assert fit_image(content, 0, packing()) == (b"", "not a JPEG")
    image, fault = fit_image(content, 180, packing(convert=True, quality=95))
    assert fault is None
    assert difference(decoded(image), np.rot90(quadrants(), 2)) < 4
    half = fit_image(content, 0, packing(convert=True, max_side=48))[0]
    assert decoded(half).shape == (24, 48, 3)
    assert fit_image(content[: len(content) // 2], 0, packing(convert=True))[0] == b""


def test_transparency_becomes_white_and_palettes_and_grey_levels_their_colours() -> None:
    clear = np.dstack([quadrants(), np.zeros((48, 96), np.uint8)])
    assert (
        difference(decoded(fit_image(encoded(clear, "PNG"), 0, packing(convert=True))[0]), np.full((48, 96, 3), 255))
        < 1
    )
    palette = io.BytesIO()
    Image.fromarray(quadrants()).quantize(4).save(palette, "PNG")
    assert difference(decoded(fit_image(palette.getvalue(), 0, packing(convert=True))[0]), quadrants()) < 8
    grey = fit_image(encoded(quadrants()[..., 0], "PNG"), 0, packing(convert=True))[0]
    with Image.open(io.BytesIO(grey)) as image:
        assert image.mode == "L"
    oriented = encoded(quadrants(), "PNG", orientation=6)
    assert difference(decoded(fit_image(oriented, 0, packing(convert=True))[0]), UPRIGHT[6](quadrants())) < 8


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"GIF89a" + bytes(50), "not an image"),
        (b"plain text", "not an image"),
        (encoded(np.zeros((8, 8), np.uint16), "PNG"), "pixels of more than 8 bits"),
        (encoded(quadrants(), "PNG")[:60], "undecodable image"),
    ],
)
def test_what_cannot_be_converted_is_reported(content: bytes, fault: str) -> None:
    assert fit_image(content, 0, packing(convert=True)) == (b"", fault)


@settings(max_examples=300, deadline=None)
@given(
    start=st.integers(0, len(WHOLE) - 1),
    noise=st.binary(min_size=1, max_size=40),
    keep=st.integers(0, len(WHOLE)),
    options=st.sampled_from([{}, {"max_side": 24}, {"convert": True, "decode": True}]),
)
def test_no_damage_of_any_bytes_raises(start: int, noise: bytes, keep: int, options: dict[str, Any]) -> None:
    damaged = (WHOLE[:start] + noise + WHOLE[start + len(noise) :])[:keep]
    image, fault = fit_image(damaged, 0, packing(**options))
    assert (fault is None) == bool(image)
