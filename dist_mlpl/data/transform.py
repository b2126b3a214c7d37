"""Owns how a JPEG becomes an image of fixed size: crop, flip, augmentation and normalisation, and their record.

Every draw is keyed by (seed, epoch, position, purpose), so a sample looks the same whichever rank or thread decodes
it. Images stay uint8 until `Transform.normalise`, which runs on the device they are on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dist_mlpl.data.jpeg import MAX_PIXELS, Jpeg, Picture, undecodable
from dist_mlpl.errors import ConfigError
from dist_mlpl.keyed import key, permutation, uniform
from dist_mlpl.settings import Settings

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
_CROP_ATTEMPTS: Final = 10
_CROP_SIDES: Final = (1.0, 7 / 8, 3 / 4, 5 / 8, 1 / 2)  # 512, 448, 384, 320, 256 of 512

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Triple = tuple[Unit, Unit, Unit]
Box = tuple[int, int, int, int]  # left, top, width, height in pixels
Crop = tuple[float, float, float, float]  # left, top, width, height as fractions of the full image


class RandAugmentSettings(Settings):
    """RandAugment: operations drawn from a list of 14."""

    num_ops: int = Field(2, ge=1)  # operations drawn for each image
    magnitude: int = Field(9, ge=0, le=30)  # strength of each operation


class TransformSettings(Settings):
    """How images are decoded, cropped, augmented and normalised.

    Args:
        size: side of the square image the model sees, in pixels.
        resize: in pixels, at least `size`. With `multi_scale`, the side to which a training image is squashed before
            its crop is cut (None: size * 512 / 448); evaluation squashes to `size`. With the other crops, the shorter
            side of an evaluation image before its central crop (None: squash to `size`, no crop).
        crop: what training cuts out: a box of random area and shape, a square of one of five sides, or nothing.
        scale: smallest and largest area of a `random_resized` box, as fractions of the image.
        ratio: smallest and largest width / height of a `random_resized` box.
        interpolation: used by every resize, always antialiased.
        scaled_decode: decode at reduced size what is resized to much less anyway; see `SCALED_MARGIN`. Boxes then lie
            on whole pixels of the reduced image.
        flip: mirror half of the training images left to right.
        color_jitter: s in [0, 1]: brightness, contrast and saturation are scaled by factors in [1 - s, 1 + s], and hue
            is rotated by up to s / 10 of the half circle.
        rand_augment: None for no RandAugment.
        cutout: side of the square painted over, as a fraction of `size`, in [0, 1]; 0 for none.
        mean, std: per channel, on the scale [0, 1] of pixel values; both null for no normalisation (values are then in
            [0, 1]).
    """

    size: int = Field(224, ge=1)
    resize: int | None = Field(None, ge=1)
    crop: Literal["random_resized", "multi_scale", "none"] = "random_resized"
    scale: tuple[Positive, Unit] = (0.25, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    scaled_decode: bool = True
    flip: bool = True
    color_jitter: Unit = 0.0
    rand_augment: RandAugmentSettings | None = None
    cutout: Unit = 0.0
    mean: Triple | None = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] | None = IMAGENET_STD

    @model_validator(mode="after")
    def _check_together(self) -> TransformSettings:
        for name, (low, high) in {"scale": self.scale, "ratio": self.ratio}.items():
            if low > high:
                raise _wrong(name, f"[{low}, {high}]", "the smaller bound first", "swap the two numbers")
        if self.resize is not None and self.resize < self.size:
            raise _wrong(
                "resize", f"{self.resize}, below size {self.size}", "at least size", "raise resize or lower size"
            )
        if (self.mean is None) != (self.std is None):
            raise _wrong("mean and std", "one is null", "both null, or both of three numbers", "set or clear the other")
        return self

    @property
    def squashed_side(self) -> int:
        """Side of the squashed image that `multi_scale` cuts its crops from, in pixels."""
        return self.resize if self.resize is not None else round(self.size * 512 / 448)

    @property
    def resample(self) -> InterpolationMode:
        """`interpolation` as torchvision names it."""
        return InterpolationMode(self.interpolation)

    @property
    def fill(self) -> list[float]:
        """Mean colour, three whole numbers in [0, 255], with which cutout and RandAugment fill missing pixels."""
        return [float(round(255.0 * value)) for value in self.mean or IMAGENET_MEAN]


def _wrong(name: str, found: str, expected: str, next_step: str) -> ConfigError:
    return ConfigError(f"transform.{name}: {found}", expected=expected, where=f"transform.{name}", next_step=next_step)


class DecodedImage(NamedTuple):
    """One image as the model sees it, and which part of the full image it shows."""

    image: Tensor  # (3, size, size) uint8, in any layout
    crop: Tensor  # (4,) float32 in [0, 1], (left, top, width, height) as fractions of the full image, before the flip
    flipped: bool  # mirrored left to right after the crop


class Transform:
    """Turns the bytes of a JPEG into a `DecodedImage`. Holds no state: safe to call from any number of threads.

    Only the crop and the flip are recorded. RandAugment's five geometric operations (shear, translate, rotate) move
    pixels afterwards and are not recorded: leave it out where the method reads or writes maps through the crop.

    Args:
        settings: the config's `transform` section.
        seed: the run's seed.
        train: True for crop, flip and augmentation; False for the evaluation transform, which draws nothing.
    """

    def __init__(self, settings: TransformSettings, *, seed: int, train: bool) -> None:
        self.settings, self.seed, self.train = settings, seed, train
        self._crop = {"random_resized": _random_resized, "multi_scale": _multi_scale, "none": _whole}[settings.crop]

    def __call__(self, content: bytes, *, epoch: int, position: int, is_sound: bool = False) -> DecodedImage:
        """Decode and transform one image.

        Args:
            content: bytes of a JPEG.
            epoch: counted from 0; keys the draws together with `position`.
            position: position in the epoch's order.
            is_sound: these bytes were decoded whole before; see `Jpeg`.

        Raises:
            ShardError: the image cannot be decoded.
        """
        jpeg = Jpeg(content, is_scaled=self.settings.scaled_decode, is_sound=is_sound)
        return self.view(jpeg, epoch=epoch, position=position)

    def view(self, jpeg: Picture, *, epoch: int, position: int) -> DecodedImage:
        """Transform one image, decoded on any device; see `__call__`."""
        settings = self.settings
        if not self.train:
            image, crop = _evaluation(jpeg, settings)
            return DecodedImage(image, torch.tensor(crop, dtype=torch.float32), False)

        def chance(purpose: str) -> int:
            return key(self.seed, epoch, position, purpose)

        image, crop = self._crop(jpeg, settings, chance("crop"))
        flipped = settings.flip and float(uniform(chance("flip"), 1)[0]) < 0.5
        if flipped:
            image = image.flip(-1)
        if settings.color_jitter:
            image = _color_jitter(image, settings.color_jitter, chance("color_jitter"))
        if settings.rand_augment is not None:
            image = _rand_augment(image, settings.rand_augment, settings.fill, chance("rand_augment"))
        if settings.cutout:
            image = _cutout(image, settings.cutout, settings.fill, chance("cutout"))
        return DecodedImage(image, torch.tensor(crop, dtype=torch.float32), flipped)

    def normalise(self, images: Tensor) -> Tensor:
        """Convert uint8 images to the backbone's input, on the device they are on.

        Args:
            images: (B, 3, H, W) uint8, in any layout.

        Returns:
            (B, 3, H, W) float32, contiguous: (images / 255 - mean) / std, or images / 255 without mean and std.
        """
        scaled = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
        if self.settings.mean is None or self.settings.std is None:
            return scaled
        mean, std = _on_device(self.settings.mean, scaled.device), _on_device(self.settings.std, scaled.device)
        return scaled.sub_(mean).div_(std)


@functools.cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values as (3, 1, 1) float32 on a device, copied once: a copy from pageable memory makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def use_one_thread_here() -> None:
    """Limit torch's parallel loops to one thread, in the calling thread only; initialises the decoding pool's threads.

    `torch.set_num_threads` would change the whole process. OpenMP's own setting belongs to the calling thread, but
    torch overwrites it when a thread first asks for its number of threads, hence the call before it. Matrix products
    in MKL keep their own setting; among the transforms only rotate, shear and translate use one, a tiny one.
    """
    torch.get_num_threads()
    threadpool_limits(limits=1, user_api="openmp")


def _resize(pixels: Tensor, height: int, width: int, settings: TransformSettings) -> Tensor:
    """Resize (H, W, 3) to (3, height, width), antialiased, in channels-last memory.

    On a CPU torch's own function is called with unambiguous channels-last strides: it then neither converts to float
    nor rearranges, and gives the same result as torchvision's `resize`.
    """
    if pixels.device.type != "cpu":
        size = [height, width]
        return F.resize(pixels.permute(2, 0, 1), size, interpolation=settings.resample, antialias=True)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels.numpy()))  # copies a box three times as fast as torch
    full_height, full_width, _ = pixels.shape
    strides = (full_height * full_width * 3, 1, full_width * 3, 3)
    image = pixels.as_strided((1, 3, full_height, full_width), strides)
    return interpolate(image, size=(height, width), mode=settings.interpolation, antialias=True)[0]


def _cut(jpeg: Picture, box: Box, settings: TransformSettings) -> tuple[Tensor, Crop]:
    """Cut a box of pixels out of an image and resize it to (3, size, size)."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    factor = jpeg.factor(min(width, height) / settings.size)
    left, top, right, bottom = (round(side / factor) for side in (left, top, right, bottom))
    part = jpeg.decode(factor, bottom)[top:bottom, left:right]
    # The box as cut, in pixels of the full image; the last column of a reduced image may stand for fewer than `factor`.
    right, bottom = min(right * factor, jpeg.width), min(bottom * factor, jpeg.height)
    left, top = left * factor, top * factor
    crop = (left / jpeg.width, top / jpeg.height, (right - left) / jpeg.width, (bottom - top) / jpeg.height)
    return _resize(part, settings.size, settings.size, settings), crop


def _squashed(jpeg: Picture, height: int, width: int, settings: TransformSettings) -> Tensor:
    """The full image resized to (3, height, width), whatever its aspect ratio."""
    pixels = jpeg.decode(jpeg.factor(min(jpeg.height / height, jpeg.width / width)))
    return _resize(pixels, height, width, settings)


def _whole(jpeg: Picture, settings: TransformSettings, chance: int | None = None) -> tuple[Tensor, Crop]:
    """The full image, squashed to (3, size, size); nothing is drawn."""
    return _squashed(jpeg, settings.size, settings.size, settings), (0.0, 0.0, 1.0, 1.0)


def _random_resized(jpeg: Picture, settings: TransformSettings, chance: int) -> tuple[Tensor, Crop]:
    """Crop a box of random area and shape (Szegedy et al. 2015), by torchvision's rule: ten attempts, else central."""
    return _cut(jpeg, random_resized_box(jpeg.width, jpeg.height, settings.scale, settings.ratio, chance), settings)


def random_resized_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], chance: int
) -> Box:
    """Draw the box of a random resized crop.

    Source: torchvision `RandomResizedCrop.make_params`, with keyed draws.

    Args:
        width, height: size of the image in pixels.
        scale: smallest and largest area, as fractions of the image.
        ratio: smallest and largest width / height; its logarithm is drawn uniformly.
        chance: key of the draws.

    Returns:
        (left, top, width, height) in pixels, inside the image.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u_area, u_ratio, u_left, u_top in uniform(chance, 4 * _CROP_ATTEMPTS).reshape(-1, 4).tolist():
        area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
        shape = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(u_left * (width - w + 1)), int(u_top * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def _multi_scale(jpeg: Picture, settings: TransformSettings, chance: int) -> tuple[Tensor, Crop]:
    """Squash the full image to a square, then cut a square of one of five sides at a random place.

    Source: the HCP family's reference code: 512 x 512, sides 512, 448, 384, 320, 256, resized to 448.
    """
    full = settings.squashed_side
    squashed = _squashed(jpeg, full, full, settings)
    u_side, u_left, u_top = uniform(chance, 3).tolist()
    side = max(1, round(full * _CROP_SIDES[int(u_side * len(_CROP_SIDES))]))
    left, top = int(u_left * (full - side + 1)), int(u_top * (full - side + 1))
    return _recut(squashed, (left, top, side, side), settings)


def _recut(image: Tensor, box: Box, settings: TransformSettings) -> tuple[Tensor, Crop]:
    """Cut a box out of a resized image and resize it to (3, size, size)."""
    left, top, width, height = box
    full_height, full_width = image.shape[-2:]
    part = image[:, top : top + height, left : left + width]
    crop = (left / full_width, top / full_height, width / full_width, height / full_height)
    return _resize(part.permute(1, 2, 0), settings.size, settings.size, settings), crop


def _evaluation(jpeg: Picture, settings: TransformSettings) -> tuple[Tensor, Crop]:
    """The full image squashed, or its shorter side resized and the centre cut; see `TransformSettings.resize`."""
    if settings.resize is None or settings.crop == "multi_scale":
        return _whole(jpeg, settings)
    shorter = min(jpeg.height, jpeg.width)
    new_height, new_width = (settings.resize * side // shorter for side in (jpeg.height, jpeg.width))
    if new_height * new_width > MAX_PIXELS:
        raise undecodable(f"{jpeg.width} x {jpeg.height} pixels become {new_width} x {new_height}")
    resized = _squashed(jpeg, new_height, new_width, settings)
    size = settings.size
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    return _recut(resized, (left, top, size, size), settings)


def _color_jitter(image: Tensor, strength: float, chance: int) -> Tensor:
    """Change brightness, contrast, saturation and hue, in random order."""
    signs = (2.0 * uniform(chance, 4) - 1.0).tolist()  # in [-1, 1)
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: F.adjust_brightness(x, 1.0 + strength * signs[0]),
        lambda x: _adjust_contrast(x, 1.0 + strength * signs[1]),
        lambda x: F.adjust_saturation(x, 1.0 + strength * signs[2]),
        lambda x: F.adjust_hue(x, 0.05 * strength * signs[3]),  # 0.5 is half the circle
    ]
    for step in permutation(chance, len(steps)).tolist():
        image = steps[step](image)
    return image


def _adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Blend with the mean grey level.

    Differs: torchvision sums in float32, whose last bit depends on the number of threads; sums of whole numbers
    in float64 are exact.
    """
    grey = F.rgb_to_grayscale(image).to(torch.float64).mean().item()
    return (image * factor + grey * (1.0 - factor)).clamp_(0.0, 255.0).to(torch.uint8)


# RandAugment's operations: (image, strength in [0, 1], sign, fill colour) -> image.
# Source: Cubuk et al. 2020; list, ranges and fill of torchvision's RandAugment, nearest-neighbour geometry.
_OPERATIONS: Final[dict[str, Callable[[Tensor, float, float, list[float]], Tensor]]] = {
    "identity": lambda x, m, s, fill: x,
    "shear_x": lambda x, m, s, fill: _shear(x, [s * math.degrees(math.atan(0.3 * m)), 0.0], fill),
    "shear_y": lambda x, m, s, fill: _shear(x, [0.0, s * math.degrees(math.atan(0.3 * m))], fill),
    "translate_x": lambda x, m, s, fill: _translate(x, [int(s * m * 150 / 331 * x.shape[-1]), 0], fill),
    "translate_y": lambda x, m, s, fill: _translate(x, [0, int(s * m * 150 / 331 * x.shape[-2])], fill),
    "rotate": lambda x, m, s, fill: F.rotate(x, s * 30.0 * m, fill=fill),
    "brightness": lambda x, m, s, fill: F.adjust_brightness(x, 1.0 + s * 0.9 * m),
    "color": lambda x, m, s, fill: F.adjust_saturation(x, 1.0 + s * 0.9 * m),
    "contrast": lambda x, m, s, fill: _adjust_contrast(x, 1.0 + s * 0.9 * m),
    "sharpness": lambda x, m, s, fill: F.adjust_sharpness(x, 1.0 + s * 0.9 * m),
    "posterize": lambda x, m, s, fill: F.posterize(x, 8 - round(4 * m)),
    "solarize": lambda x, m, s, fill: F.solarize(x, 255.0 * (1.0 - m)),
    "auto_contrast": lambda x, m, s, fill: F.autocontrast(x),
    "equalize": lambda x, m, s, fill: F.equalize(x),
}


def _shear(image: Tensor, degrees: list[float], fill: list[float]) -> Tensor:
    return F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0], fill=fill)


def _translate(image: Tensor, pixels: list[int], fill: list[float]) -> Tensor:
    return F.affine(image, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0], fill=fill)


def _rand_augment(image: Tensor, settings: RandAugmentSettings, fill: list[float], chance: int) -> Tensor:
    """Apply randomly drawn operations one after the other, each with a random sign."""
    operations = list(_OPERATIONS.values())
    for u_operation, u_sign in uniform(chance, 2 * settings.num_ops).reshape(-1, 2).tolist():
        sign = -1.0 if u_sign < 0.5 else 1.0
        operation = operations[int(u_operation * len(operations))]
        image = operation(image, settings.magnitude / 30, sign, fill)
    return image


def _cutout(image: Tensor, side_fraction: float, fill: list[float], chance: int) -> Tensor:
    """Paint a square of the mean colour around a random pixel, clipped to the image.

    Source: DeVries and Taylor 2017.
    """
    height, width = image.shape[-2:]
    side = round(side_fraction * width)
    u_x, u_y = uniform(chance, 2).tolist()
    left, top = int(u_x * width) - side // 2, int(u_y * height) - side // 2
    colour = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)
    painted = image.clone()
    painted[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = colour
    return painted
