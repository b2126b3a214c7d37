"""Claims about decoding: sizes, rows, colour spaces, and what is refused."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision import io
from torchvision.transforms.v2 import functional as F

from dist_mlpl.data import jpeg as module
from dist_mlpl.data.jpeg import Jpeg, decode_jpeg
from dist_mlpl.errors import ShardError
from tests.support.images import jpeg, picture

pytestmark = pytest.mark.unit


def test_an_image_is_decoded_small_only_where_a_tenth_more_pixels_than_needed_are_left() -> None:
    jpeg_of = Jpeg(jpeg(picture()), is_scaled=True)
    assert [jpeg_of.factor(shrink) for shrink in (0.5, 1.0, 2.19, 2.21, 4.39, 4.41, 8.79, 8.81, 50)] == [
        1, 1, 1, 2, 2, 4, 4, 8, 8
    ]  # fmt: skip
    assert Jpeg(jpeg(picture())).factor(50) == 1


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "how",
    [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2", "restart_marker_blocks": 5},
     {"progressive": True}, {"optimize": True, "quality": 98}],
)  # fmt: skip
def test_the_rows_decoded_of_a_sound_image_are_those_of_the_whole(how: dict[str, Any], factor: int) -> None:
    file = BytesIO()
    pixels = np.random.default_rng(3).integers(0, 256, (301, 203, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **how)
    whole = Jpeg(file.getvalue()).decode(factor)
    sound = Jpeg(file.getvalue(), is_sound=True)
    sizes = set()
    for num_rows in range(1, len(whole) + 1):
        part = sound.decode(factor, num_rows)
        assert len(part) >= num_rows
        assert torch.equal(part[:num_rows], whole[:num_rows])
        sizes.add(len(part))
    assert len(sizes) == 1 if "progressive" in how else len(sizes) > (300 - 32) // factor - 2


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_colour_space_is_decoded_at_every_size(mode: str, factor: int) -> None:
    def encoded(height: int, width: int) -> bytes:
        file = BytesIO()
        image = Image.fromarray(picture(height, width).permute(1, 2, 0).numpy()).convert(mode)
        image.save(file, "JPEG", quality=95)
        return file.getvalue()

    assert Jpeg(encoded(91, 123)).decode(factor).shape == (-(-91 // factor), -(-123 // factor), 3)
    content = encoded(384, 512)
    full, small = decode_jpeg(content), Jpeg(content).decode(factor)
    wanted = F.resize(full, [*small.shape[:2]], antialias=True).permute(1, 2, 0)
    assert (small.float() - wanted.float()).abs().mean() < 3.0


def test_grey_images_become_rgb() -> None:
    decoded = decode_jpeg(jpeg(picture(channels=1)))
    assert decoded.shape == (3, 90, 120)
    assert torch.equal(decoded[0], decoded[1])


def test_cmyk_images_become_rgb() -> None:
    file = BytesIO()
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(file, "JPEG")
    decoded = decode_jpeg(file.getvalue())
    assert decoded.shape == (3, 8, 16)
    assert (decoded.float() - torch.tensor([255.0, 0.0, 0.0]).view(3, 1, 1)).abs().max() <= 3.0


def test_segments_and_filling_before_the_frame_header_are_skipped() -> None:
    content = jpeg(picture(90, 120))
    padded = content[:2] + b"\xff\xe1\x00\x10" + b"\xff\xc0" * 7 + b"\xff\xff\xfe\x00\x04hi" + content[2:]
    assert module._frame_header(content)[:2] == (120, 90)
    assert module._frame_header(padded)[:2] == (120, 90)
    assert torch.equal(decode_jpeg(padded), decode_jpeg(content))


def test_the_stored_orientation_is_kept_whatever_exif_says() -> None:
    content = jpeg(picture(90, 120))
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    segment = b"Exif\x00\x00" + tiff
    turned = content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:]
    data = torch.frombuffer(bytearray(turned), dtype=torch.uint8)
    assert io.decode_jpeg(data, apply_exif_orientation=True).shape == (3, 120, 90)
    assert torch.equal(decode_jpeg(turned), decode_jpeg(content))


def test_bytes_that_are_no_whole_jpeg_are_a_shard_error_saying_so() -> None:
    content = jpeg(picture())
    broken = [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"no image at all", b"\x89PNG" + content]
    broken += [content[:at] for at in (10, 100, len(content) // 2, len(content) - 2, len(content) - 1)]
    broken += [content[:300] + bytes(len(content) - 300)]
    for wrong in broken:
        with pytest.raises(ShardError, match="an image cannot be decoded"):
            decode_jpeg(wrong)


def test_a_decompression_bomb_is_refused_by_its_header_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(jpeg(picture()))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    for decoder in (io, simplejpeg):
        monkeypatch.setattr(decoder, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ShardError, match="60000 x 60000"):
        decode_jpeg(bytes(content))


@pytest.mark.parametrize("side", ["width", "height"])
def test_an_image_without_pixels_is_refused_by_its_header(side: str) -> None:
    content = bytearray(jpeg(picture()))
    at = content.index(b"\xff\xc0") + (7 if side == "width" else 5)
    content[at : at + 2] = b"\0\0"
    with pytest.raises(ShardError, match="cannot be decoded"):
        Jpeg(bytes(content))
