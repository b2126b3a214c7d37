"""Owns a small generated multi-label data set: real handwritten digits pasted together, several per image.

Co-occurrence is planted: an image belongs to one of four scenes, whose own digits are likely to be in it. So there is
co-occurrence to learn, and it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dist_mlpl.errors import ConfigError
from dist_mlpl.keyed import key, permutation, uniform

# A scene's own digits, and the probability that each of them is present; lower in larger scenes, so that all have
# about the same number of digits.
SCENES: Final = (((0, 1, 2), 0.75), ((3, 4, 5), 0.75), ((6, 7, 8, 9), 0.6), ((1, 4, 7), 0.75))
OUTSIDE_PROBABILITY: Final = 0.06  # probability of every other digit
CLASS_NAMES: Final = tuple(f"digit {digit}" for digit in range(10))

_NUM_TRAIN_DIGITS: Final = 1400  # train digits out of 1,797; test images use the other 397
_CELLS_A_SIDE: Final = 3
_SMALLEST_DIGIT: Final = 0.875  # smallest side of a digit, as a fraction of its cell's; the largest fills the cell
_JITTER: Final = 0.0625  # how far a digit may reach out of its cell, as a fraction of the cell's side
_FAINTEST: Final = 0.7  # smallest gain of a digit; the largest is 1
_NOISE: Final = 16.0  # most grey levels, out of 255, by which a pixel is raised or lowered
_JPEG_QUALITY: Final = 92
_MIN_SIZE: Final = 24  # cells of 8 pixels, the size the digits were scanned at


@dataclass(frozen=True, slots=True)
class SceneSet:
    """Where a scene set lies: the arguments of `shards.sources.table.read_table`.

    Args:
        images: folder of the JPEGs.
        labels: CSV `image,labels`, names joined by `|`.
        classes: CSV `class`, the ten names in order.
        splits: CSV `image,split`, `train` or `test`.
        num_train: number of images in the train split.
        num_test: number of images in the test split.
    """

    images: str
    labels: str
    classes: str
    splits: str
    num_train: int
    num_test: int


class Digits(NamedTuple):
    """Handwritten digits as scanned."""

    images: npt.NDArray[np.uint8]  # (1797, 8, 8) grey levels, white on black
    classes: npt.NDArray[np.int64]  # (1797,) 0 .. 9


class Placement(NamedTuple):
    """One digit on the canvas."""

    row: int  # row of `Digits`
    left: int  # in pixels, like `top` and `side`; the whole digit lies on the canvas
    top: int
    side: int
    gain: float  # in [0.7, 1)


def write_scenes(
    folder: Path, *, num_train: int = 3000, num_test: int = 600, seed: int = 0, size: int = 48
) -> SceneSet:
    """Compose the images and write them with their CSV files. Equal arguments give equal bytes with one Pillow version.

    An image has about 2.7 of the 10 classes. A digit image is used for either training or testing, never both. The CSV
    files are written last.

    Args:
        folder: created if missing; files of the same names in it are replaced.
        num_train, num_test: number of images in each split, at least 1.
        seed: seed of all random draws.
        size: side of the square images, in pixels, at least 24.

    Raises:
        ConfigError: scikit-learn is not installed, or a number is too small.
    """
    for name, value, least in (("num_train", num_train, 1), ("num_test", num_test, 1), ("size", size, _MIN_SIZE)):
        if value < least:
            raise ConfigError(f"{name} {value}", expected=f"at least {least}", where=name, next_step=f"raise {name}")
    digits = load_digits()
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    labels, splits = ["image,labels"], ["image,split"]
    pools_of = hold_apart(digits, seed=seed)
    for split, count in (("train", num_train), ("test", num_test)):
        for number in range(count):
            draw = key("scenes", seed, split, number)
            scene = draw_scene(pools_of[split], draw, size=size)
            name = f"{split}-{number:05d}.jpg"
            (images / name).write_bytes(_jpeg(render(scene, digits, draw, size=size)))
            present = sorted(int(digits.classes[placement.row]) for placement in scene)
            labels.append(f"{name},{'|'.join(CLASS_NAMES[digit] for digit in present)}")
            splits.append(f"{name},{split}")
    return SceneSet(
        images=str(images),
        labels=_write_lines(folder / "labels.csv", labels),
        classes=_write_lines(folder / "classes.csv", ["class", *CLASS_NAMES]),
        splits=_write_lines(folder / "splits.csv", splits),
        num_train=num_train,
        num_test=num_test,
    )


def load_digits() -> Digits:
    """Load the 1,797 digits that come with scikit-learn.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (1998), its test part, 13 writers.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            f"scikit-learn cannot be imported: {error}",
            expected="the digits it carries, which the demo's images are made of",
            where="the demo's images",
            next_step="pip install -e '.[demo]' in the checkout",
        ) from error
    bunch = datasets.load_digits()
    return Digits(np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64))


def hold_apart(digits: Digits, *, seed: int) -> dict[str, list[npt.NDArray[np.int64]]]:
    """Deal the digit images to the splits: 1,400 to `train`, the rest to `test`.

    Returns:
        By split, ten arrays: the rows of each digit.
    """
    order = permutation(key("scenes", seed, "hold apart"), len(digits.classes))
    parts = {"train": order[:_NUM_TRAIN_DIGITS], "test": order[_NUM_TRAIN_DIGITS:]}
    return {
        split: [rows[digits.classes[rows] == digit] for digit in range(len(CLASS_NAMES))]
        for split, rows in parts.items()
    }


def draw_scene(pools: Sequence[npt.NDArray[np.int64]], draw: int, *, size: int) -> list[Placement]:
    """Draw one image's digits and their places.

    Args:
        pools: for each digit, the rows of `Digits` to choose from.
        draw: key of the image's random draws.
        size: side of the canvas in pixels.

    Returns:
        One placement for each digit present, in ascending order of digits, each in its own cell.
    """
    cell = size // _CELLS_A_SIDE
    reach = round(_JITTER * cell)
    sides = np.arange(round(_SMALLEST_DIGIT * cell), cell + 1)
    present = _present_digits(draw)
    cells = permutation(key(draw, "cells"), _CELLS_A_SIDE**2)
    placements = []
    for digit, place in zip(present, cells, strict=False):
        row, side, x, y, gain = uniform(key(draw, "digit", digit), 5)
        pixels = int(_pick(sides, side))
        offsets = np.arange(-reach, cell - pixels + reach + 1)
        row_of_cell, column = divmod(int(place), _CELLS_A_SIDE)
        placements.append(
            Placement(
                row=int(_pick(pools[digit], row)),
                left=min(max(column * cell + int(_pick(offsets, x)), 0), size - pixels),
                top=min(max(row_of_cell * cell + int(_pick(offsets, y)), 0), size - pixels),
                side=pixels,
                gain=float(_FAINTEST + (1.0 - _FAINTEST) * gain),
            )
        )
    return placements


def render(scene: Sequence[Placement], digits: Digits, draw: int, *, size: int) -> npt.NDArray[np.uint8]:
    """Paint a scene: where digits overlap the brighter pixel shows, and noise is added everywhere.

    Returns:
        (size, size) uint8 grey levels.
    """
    canvas = np.zeros((size, size))
    for placement in scene:
        side = placement.side
        digit = Image.fromarray(digits.images[placement.row]).resize((side, side), Image.Resampling.BICUBIC)
        window = canvas[placement.top : placement.top + side, placement.left : placement.left + side]
        np.maximum(window, placement.gain * np.asarray(digit), out=window)
    noise = _NOISE * (2.0 * uniform(key(draw, "noise"), size * size) - 1.0)
    return np.rint(np.clip(canvas + noise.reshape(size, size), 0.0, 255.0)).astype(np.uint8)


def _present_digits(draw: int) -> list[int]:
    """Draw the digits of one image, ascending: at least one, at most one per cell; other draws are rejected."""
    attempt = 0
    while True:
        which, *chances = uniform(key(draw, "present", attempt), 1 + len(CLASS_NAMES))
        inside, probability = SCENES[int(which * len(SCENES))]
        present = [
            digit
            for digit, chance in enumerate(chances)
            if chance < (probability if digit in inside else OUTSIDE_PROBABILITY)
        ]
        if 1 <= len(present) <= _CELLS_A_SIDE**2:
            return present
        attempt += 1


def _pick(values: npt.NDArray[np.int64], chance: float) -> np.int64:
    """One of `values`, all equally likely, for a `chance` in [0, 1)."""
    return values[int(chance * len(values))]


def _jpeg(canvas: npt.NDArray[np.uint8]) -> bytes:
    stream = BytesIO()
    Image.fromarray(canvas).convert("RGB").save(stream, format="JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _write_lines(path: Path, lines: Sequence[str]) -> str:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return str(path)
