"""A transformed image is a pure function of bytes, seed, epoch and position, and its record says where it came from."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dist_mlpl.data import transform as module
from dist_mlpl.data.jpeg import decode_jpeg
from dist_mlpl.data.transform import (
    IMAGENET_MEAN,
    DecodedImage,
    Transform,
    TransformSettings,
    random_resized_box,
    use_one_thread_here,
)
from dist_mlpl.errors import ConfigError, ShardError
from dist_mlpl.keyed import key
from tests.support.images import jpeg, picture

pytestmark = pytest.mark.unit

EVERYTHING: dict[str, Any] = {"color_jitter": 0.4, "rand_augment": {"num_ops": 2, "magnitude": 9}, "cutout": 0.5}


def make(*, train: bool = True, seed: int = 0, **fields: Any) -> Transform:
    return Transform(TransformSettings(**{"size": 64, **fields}), seed=seed, train=train)


def same(one: DecodedImage, other: DecodedImage) -> bool:
    return torch.equal(one.image, other.image) and torch.equal(one.crop, other.crop) and one.flipped == other.flipped


def recut(full: Tensor, view: DecodedImage, size: int = 64) -> Tensor:
    """The oracle: cut the recorded box out of the full image, resize it, mirror it."""
    height, width = full.shape[-2:]
    left, top, w, h = (view.crop.double() * torch.tensor([width, height, width, height])).round().int().tolist()
    part = F.resize(full[:, top : top + h, left : left + w], [size, size], antialias=True)
    return part.flip(-1) if view.flipped else part


# Keys


@pytest.mark.parametrize("crop", ["random_resized", "multi_scale", "none"])
def test_a_view_depends_on_its_key_alone_not_on_order_or_threads(crop: str) -> None:
    contents = [jpeg(picture(seed=seed)) for seed in range(3)]
    transform = make(crop=crop, **EVERYTHING)
    tasks = [(contents[position % 3], 1, position) for position in range(24)]
    one_by_one = [transform(content, epoch=epoch, position=position) for content, epoch, position in tasks]
    shuffled = list(range(24))
    random.Random(0).shuffle(shuffled)
    with ThreadPoolExecutor(4, initializer=use_one_thread_here) as pool:
        jobs = {n: pool.submit(transform, tasks[n][0], epoch=1, position=tasks[n][2]) for n in shuffled}
    assert all(same(one_by_one[n], jobs[n].result()) for n in range(24))


def test_a_view_does_not_depend_on_how_many_threads_torch_uses() -> None:
    content, transform = jpeg(picture(300, 400)), make(size=256, **EVERYTHING)
    before, views = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            views.append([transform(content, epoch=0, position=position) for position in range(20)])
    finally:
        torch.set_num_threads(before)
    assert all(same(one, other) for one, other in zip(*views, strict=True))


def test_torchs_generator_is_neither_read_nor_moved() -> None:
    content, transform = jpeg(picture()), make(**EVERYTHING)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = transform(content, epoch=0, position=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, transform(content, epoch=0, position=3))


def test_seed_epoch_and_position_each_change_the_view() -> None:
    content = jpeg(picture())
    base = make()(content, epoch=0, position=0)
    assert not same(base, make(seed=1)(content, epoch=0, position=0))
    assert not same(base, make()(content, epoch=1, position=0))
    assert not same(base, make()(content, epoch=0, position=1))


def test_switching_one_augmentation_off_leaves_the_draws_of_the_others() -> None:
    content = jpeg(picture())
    with_flip, without = make(), make(flip=False)
    for position in range(10):
        crops = [transform(content, epoch=0, position=position).crop for transform in (with_flip, without)]
        assert torch.equal(*crops)


def test_a_view_is_uint8_of_the_set_size() -> None:
    content = jpeg(picture(70, 50))
    for train in (True, False):
        for fields in (EVERYTHING, {"crop": "multi_scale"}, {"crop": "none"}, {"resize": 80}):
            for position in range(4):
                view = make(train=train, **fields)(content, epoch=0, position=position)
                assert view.image.shape == (3, 64, 64)
                assert view.image.dtype == torch.uint8
                assert view.crop.dtype == torch.float32
                assert view.crop.shape == (4,)
                assert isinstance(view.flipped, bool)


# Scaled decoding

PHOTOGRAPHS = Path(os.environ.get("MLPL_TEST_DATA", Path(__file__).parents[2] / "../shared/data"), "coco256", "images")


def photographs(longer_side: int, count: int) -> list[bytes]:
    """Real photographs at a size, encoded as Open Images is: quality 90, colours at half size."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    contents = []
    for path in sorted(PHOTOGRAPHS.iterdir())[:count]:
        image = Image.open(path).convert("RGB")
        scale = longer_side / max(image.size)
        file = BytesIO()
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS).save(
            file, "JPEG", quality=90, subsampling="4:2:0"
        )
        contents.append(file.getvalue())
    return contents


@pytest.mark.parametrize(("longer_side", "size"), [(640, 112), (640, 160), (1024, 112), (1024, 224), (1024, 448)])
def test_photographs_decoded_small_differ_by_two_grey_levels_at_most(longer_side: int, size: int) -> None:
    differences, num_scaled = [], 0
    scaled, full = make(size=size), make(size=size, scaled_decode=False)
    for content in photographs(longer_side, 24):
        for position in range(6):
            view = scaled(content, epoch=0, position=position)
            # What full decoding gives for the very box that was cut.
            image = decode_jpeg(content)
            expected = recut(image, view, size)
            differences.append((view.image.float() - expected.float()).abs().mean().item())
            num_scaled += not torch.equal(view.image, expected)
            wanted = full(content, epoch=0, position=position)
            pixels = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
            assert ((view.crop - wanted.crop) * pixels).abs().max() <= 8  # the box moved to whole pixels of 1/8 at most
            assert view.flipped == wanted.flipped
    assert num_scaled > 0 or size == 448
    assert sum(differences) / len(differences) <= 2.0


def test_photographs_look_the_same_whether_or_not_they_are_known_to_be_sound() -> None:
    transform = make(size=96)
    for content in photographs(320, 8):
        for position in range(8):
            views = [transform(content, epoch=0, position=position, is_sound=is_sound) for is_sound in (False, True)]
            assert same(*views)


# Geometry


@pytest.mark.parametrize("shape", [(90, 120), (131, 67), (40, 40), (1, 9), (300, 7)])
def test_cutting_the_recorded_box_and_resizing_it_gives_the_view(shape: tuple[int, int]) -> None:
    content = jpeg(picture(*shape))
    full, transform = decode_jpeg(content), make()
    for position in range(20):
        view = transform(content, epoch=0, position=position)
        assert torch.equal(recut(full, view), view.image)


@pytest.mark.parametrize(
    ("train", "fields"),
    [(True, {"crop": crop}) for crop in ("random_resized", "multi_scale", "none")]
    + [(False, {}), (False, {"resize": 80})],
)
def test_every_pixel_of_a_view_comes_from_where_crop_and_flip_say(train: bool, fields: dict[str, Any]) -> None:
    across, down = torch.linspace(0, 255, 400).expand(300, 400), torch.linspace(0, 255, 300)[:, None].expand(300, 400)
    content = jpeg(torch.stack([across, down, across]).round().to(torch.uint8))
    transform = make(train=train, **fields)
    for position in range(20):
        view = transform(content, epoch=0, position=position)
        left, top, width, height = view.crop.tolist()
        centres = (torch.arange(64) + 0.5) / 64
        columns = 255 * (left + width * (1 - centres if view.flipped else centres))
        rows = 255 * (top + height * centres)
        assert (view.image[0].float() - columns).abs().max() < 4.0  # JPEG's colours are off by up to 2
        assert (view.image[1].float() - rows[:, None]).abs().max() < 4.0
        assert (view.image[0].float() - columns).mean().abs() < 0.5


def test_a_multi_scale_crop_is_cut_from_the_squashed_image_pixel_by_pixel() -> None:
    content = jpeg(picture(300, 400))
    transform = make(crop="multi_scale", size=56, interpolation="bicubic", scaled_decode=False)
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    squashed = F.resize(decode_jpeg(content), [64, 64], **bicubic)
    for position in range(20):
        view = transform(content, epoch=0, position=position)
        left, top, side, other = (view.crop * 64).int().tolist()
        assert side == other
        part = F.resize(squashed[:, top : top + side, left : left + side], [56, 56], **bicubic)
        assert torch.equal(part.flip(-1) if view.flipped else part, view.image)


def test_multi_scale_sides_are_the_five_of_the_recipe_equally_often_at_every_place() -> None:
    content = jpeg(picture(24, 24))
    transform = make(size=14, crop="multi_scale")
    crops = torch.stack([transform(content, epoch=0, position=position).crop for position in range(1000)]) * 16
    sides, counts = crops[:, 2].round().int().unique(return_counts=True)
    assert sides.tolist() == [8, 10, 12, 14, 16]
    assert ((counts - 200.0) ** 2 / 200.0).sum() < 18.5  # 0.999 quantile, 4 degrees of freedom
    smallest = crops[crops[:, 2].round() == 8]
    assert smallest[:, 0].round().unique().tolist() == list(range(9))
    assert smallest[:, 1].round().unique().tolist() == list(range(9))


def test_the_recipe_at_448_crops_512_448_384_320_256_of_512() -> None:
    settings = TransformSettings(size=448, crop="multi_scale")
    assert settings.squashed_side == 512
    assert [round(512 * side) for side in module._CROP_SIDES] == [512, 448, 384, 320, 256]
    assert TransformSettings(size=448, resize=640, crop="multi_scale").squashed_side == 640


def test_without_a_crop_the_whole_image_is_squashed() -> None:
    content = jpeg(picture())
    view = make(crop="none", flip=False)(content, epoch=0, position=0)
    assert torch.equal(view.image, F.resize(decode_jpeg(content), [64, 64], antialias=True))
    assert view.crop.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert view.flipped is False


def test_half_of_the_images_are_mirrored_after_the_crop_and_say_so() -> None:
    content = jpeg(picture())
    mirrored, straight = make(), make(flip=False)
    flips = 0
    for position in range(400):
        view, plain = (transform(content, epoch=0, position=position) for transform in (mirrored, straight))
        flips += view.flipped
        assert torch.equal(view.crop, plain.crop)
        assert torch.equal(view.image, plain.image.flip(-1) if view.flipped else plain.image)
    assert abs(flips - 200) < 40  # four standard deviations


@pytest.mark.parametrize("shape", [(90, 120), (60, 200), (200, 40)])
def test_crop_areas_shapes_and_places_are_distributed_like_torchvisions(shape: tuple[int, int]) -> None:
    scale, ratio, num_draws = (0.25, 1.0), (3 / 4, 4 / 3), 3000
    height, width = shape
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(num_draws)]
    ours = [random_resized_box(width, height, scale, ratio, key("boxes", n)) for n in range(num_draws)]
    reference = torch.tensor([(left, top, w, h) for top, left, h, w in theirs], dtype=torch.float64)
    boxes = torch.tensor(ours, dtype=torch.float64)
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        one, other = quantity(boxes), quantity(reference)
        grid = torch.cat([one, other]).unique()
        gap = torch.searchsorted(one.sort()[0], grid, right=True) - torch.searchsorted(
            other.sort()[0], grid, right=True
        )
        assert gap.abs().max() / num_draws < 1.95 * (2 / num_draws) ** 0.5  # Kolmogorov-Smirnov, 0.999


def test_a_box_that_never_fits_falls_back_to_torchvisions_central_one() -> None:
    for width, height in ((1000, 10), (10, 1000), (1000, 1), (1, 1000)):
        image = torch.empty(3, height, width)
        top, left, h, w = transforms.RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
        assert random_resized_box(width, height, (0.9, 1.0), (3 / 4, 4 / 3), key(0)) == (left, top, w, h)


def test_boxes_lie_inside_every_image_however_thin() -> None:
    for n in range(2000):
        width, height = 1 + key("width", n) % 40, 1 + key("height", n) % 40
        left, top, w, h = random_resized_box(width, height, (0.01, 1.0), (0.1, 10.0), key("box", n))
        assert 0 <= left < left + w <= width
        assert 0 <= top < top + h <= height


# Evaluation


@pytest.mark.parametrize(
    "fields", [{}, {"crop": "none"}, {"crop": "multi_scale"}, {"crop": "multi_scale", "resize": 80}]
)
def test_evaluation_squashes_the_full_image_and_draws_nothing(fields: dict[str, Any]) -> None:
    content = jpeg(picture())
    transform = make(train=False, **EVERYTHING, **fields)
    view = transform(content, epoch=0, position=0)
    assert torch.equal(view.image, F.resize(decode_jpeg(content), [64, 64], antialias=True))
    assert view.crop.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert same(view, transform(content, epoch=3, position=9))


@pytest.mark.parametrize("shape", [(90, 120), (131, 67), (80, 80), (64, 300)])
def test_evaluation_with_resize_equals_torchvisions_resize_and_center_crop(shape: tuple[int, int]) -> None:
    content = jpeg(picture(*shape))
    full = decode_jpeg(content)
    view = make(train=False, resize=80)(content, epoch=0, position=0)
    oracle = v2.Compose([v2.Resize(80, antialias=True), v2.CenterCrop(64)])
    assert torch.equal(view.image, oracle(full))
    left, top, width, height = view.crop.tolist()
    assert abs(left + width / 2 - 0.5) < 0.02
    assert abs(top + height / 2 - 0.5) < 0.02
    assert abs(width * shape[1] / min(shape) - 64 / 80) < 0.02
    assert abs(height * shape[0] / min(shape) - 64 / 80) < 0.02


def test_an_image_so_thin_that_resizing_would_explode_is_a_shard_error() -> None:
    content = jpeg(picture(1, 60_000))
    with pytest.raises(ShardError, match="cannot be decoded"):
        make(train=False, resize=80)(content, epoch=0, position=0)


# Augmentation


def test_cutout_paints_a_square_of_mean_colour_cut_at_the_border() -> None:
    content = jpeg(picture())
    plain, cut = make(crop="none", flip=False), make(crop="none", flip=False, cutout=0.5)
    colour = torch.tensor([round(255 * value) for value in IMAGENET_MEAN], dtype=torch.uint8).view(3, 1, 1)
    areas = []
    for position in range(300):
        before, after = (transform(content, epoch=0, position=position).image for transform in (plain, cut))
        painted = (after == colour).all(0)
        assert torch.equal(after[:, ~painted], before[:, ~painted])
        rows, columns = (before != after).any(0).nonzero().T
        box = (slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1))
        assert painted[box].all()
        assert max(box[0].stop - box[0].start, box[1].stop - box[1].start) <= 32
        areas.append(int(painted[box].sum()))
    assert max(areas) == 32 * 32
    # A centre anywhere leaves 7/8 of each side of a half-size square on average.
    assert abs(sum(areas) / len(areas) / (32 * 32) - (7 / 8) ** 2) < 0.06


def test_full_colour_jitter_changes_colours_and_no_geometry() -> None:
    content = jpeg(picture())
    plain, jittered = make(), make(color_jitter=1.0)
    changed = 0
    for position in range(10):
        before, after = (transform(content, epoch=0, position=position) for transform in (plain, jittered))
        assert torch.equal(before.crop, after.crop)
        assert before.flipped == after.flipped
        changed += not torch.equal(before.image, after.image)
    assert changed == 10


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
def test_contrast_is_torchvisions_to_one_grey_level(factor: float) -> None:
    image = picture()
    difference = module._adjust_contrast(image, factor).int() - F.adjust_contrast(image, factor).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.02


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_rand_augments_operations_equal_torchvisions(magnitude: int, sign: float) -> None:
    image, fill = picture(64, 64), [124.0, 116.0, 104.0]
    theirs = v2.RandAugment(fill=fill)
    names = {"color": "Color", "auto_contrast": "AutoContrast", "shear_x": "ShearX", "shear_y": "ShearY"}
    names |= {"translate_x": "TranslateX", "translate_y": "TranslateY"}
    assert {names.get(name, name.title()) for name in module._OPERATIONS} == set(theirs._AUGMENTATION_SPACE)
    for name, operation in module._OPERATIONS.items():
        title = names.get(name, name.title())
        strengths, signed = theirs._AUGMENTATION_SPACE[title]
        values = strengths(31, 64, 64)
        strength = 0.0 if values is None else float(values[magnitude]) * (sign if signed else 1.0)
        expected = theirs._apply_image_or_video_transform(
            image, title, strength, interpolation=InterpolationMode.NEAREST, fill=theirs._fill
        )
        got = operation(image, magnitude / 30, sign, fill)
        wrong = (got.int() - expected.int()).abs()
        assert (wrong > 1).float().mean() < 0.002, name  # float32 against float64 strengths


def test_rand_augment_draws_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []

    def recorder(name: str) -> Callable[[Tensor, float, float, list[float]], Tensor]:
        def note(image: Tensor, strength: float, sign: float, fill: list[float]) -> Tensor:
            drawn.append((name, sign))
            return image

        return note

    for name in list(module._OPERATIONS):
        monkeypatch.setitem(module._OPERATIONS, name, recorder(name))
    transform, content = make(rand_augment={"num_ops": 3, "magnitude": 5}), jpeg(picture(16, 16))
    for position in range(300):
        transform(content, epoch=0, position=position)
    assert len(drawn) == 900
    assert len(set(drawn)) == 28  # 14 operations, two signs
    assert abs(sum(sign for _, sign in drawn)) < 120


# Normalisation and settings


def test_normalise_equals_torchvisions() -> None:
    images = torch.stack([picture(seed=seed) for seed in range(4)])
    expected = F.normalize(images.float() / 255, list(IMAGENET_MEAN), [0.229, 0.224, 0.225])
    kept = images.clone()
    torch.testing.assert_close(make().normalise(images), expected, rtol=0, atol=1e-6)
    assert torch.equal(images, kept)


def test_normalise_without_mean_and_std_maps_to_the_unit_interval() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    scaled = make(mean=None, std=None).normalise(images)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.flatten(), torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize(
    "fields",
    [{"mean": None}, {"std": None}, {"resize": 63}, {"scale": (0.8, 0.5)}, {"ratio": (2.0, 1.0)}],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="transform"):
        make(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 1.5)},
        {"cutout": 1.5},
        {"color_jitter": -0.1},
        {"rand_augment": {"magnitude": 31}},
        {"rand_augment": {"num_ops": 0}},
        {"std": (0.1, 0.0, 0.1)},
        {"mean": (0.5, 0.5)},
        {"crop": "center"},
        {"interpolation": "nearest"},
        {"colour_jitter": 0.1},
    ],
)
def test_settings_out_of_range_or_unknown_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make(**fields)


# Threads


def test_a_pool_thread_is_limited_to_one_loop_thread_and_the_main_thread_is_not() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1, initializer=use_one_thread_here) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
