from __future__ import annotations

import csv
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_mlpl.errors import ConfigError
from dist_mlpl.keyed import key
from dist_mlpl.tools import scenes
from dist_mlpl.tools.scenes import CLASS_NAMES, Placement, SceneSet, draw_scene, hold_apart, load_digits, write_scenes
from shards.sources.table import read_table

pytestmark = pytest.mark.unit

NUM_TRAIN, NUM_TEST = 60, 25


@pytest.fixture(scope="module")
def scene_set(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=NUM_TRAIN, num_test=NUM_TEST)


def label_rows(scene_set: SceneSet) -> Iterator[tuple[Path, list[int]]]:
    """Each image's path and its classes, as the CSV has them."""
    with open(scene_set.labels, newline="") as file:
        for row in csv.DictReader(file):
            yield Path(scene_set.images, row["image"]), [CLASS_NAMES.index(name) for name in row["labels"].split("|")]


def grey(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L")).astype(float)


def test_the_sharding_tool_reads_the_tables(scene_set):
    source = read_table(scene_set.images, scene_set.labels, classes=scene_set.classes, splits=scene_set.splits)
    splits = [record.split for record in source.records]
    assert (splits.count("train"), splits.count("test")) == (NUM_TRAIN, NUM_TEST) == (60, 25)
    assert (scene_set.num_train, scene_set.num_test) == (NUM_TRAIN, NUM_TEST)
    assert [entry.name for entry in source.classes] == [f"digit {digit}" for digit in range(10)]
    assert source.unlisted == "absent"
    assert all(record.positives for record in source.records)
    assert {Path(record.image) for record in source.records} == {
        path.relative_to(scene_set.images) for path in Path(scene_set.images).iterdir()
    }


def test_images_are_colour_jpegs_of_the_asked_size(scene_set, tmp_path):
    larger = write_scenes(tmp_path, num_train=1, num_test=1, size=50)
    for made, side in ((scene_set, 48), (larger, 50)):
        for path in Path(made.images).iterdir():
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (side, side))


def test_as_many_cells_are_lit_as_there_are_labels(scene_set):
    for path, present in label_rows(scene_set):
        centres = grey(path).reshape(3, 16, 3, 16)[:, 2:14, :, 2:14].mean((1, 3))  # (3, 3)
        assert (centres > 25).sum() == len(present), path.name


def test_labels_name_the_digits_that_were_painted_and_no_digit_image_serves_both_splits(tmp_path, monkeypatch):
    painted: list[tuple[list[Placement], np.ndarray]] = []

    def remember(scene, *args, **kwargs):
        canvas = render(scene, *args, **kwargs)
        painted.append((scene, canvas))
        return canvas

    render = scenes.render
    monkeypatch.setattr(scenes, "render", remember)
    made = write_scenes(tmp_path, num_train=300, num_test=100, seed=3)
    from sklearn.datasets import load_digits as original

    classes = original().target
    rows = list(label_rows(made))
    assert len(rows) == len(painted) == 400
    for (path, present), (scene, canvas) in zip(rows, painted, strict=True):
        assert present == sorted({int(classes[placement.row]) for placement in scene})
        assert len(scene) == len(present)
        assert np.abs(grey(path) - canvas).mean() < 4, "the file holds another picture"
    used = {
        split: {placement.row for (path, _), (scene, _) in zip(rows, painted, strict=True) for placement in scene
                if path.name.startswith(split)}
        for split in ("train", "test")
    }  # fmt: skip
    assert used["train"]
    assert used["test"]
    assert not used["train"] & used["test"]


@pytest.mark.parametrize("seed", [0, 1])
def test_1400_digit_images_are_for_training_and_the_other_397_for_testing(seed):
    digits = load_digits()
    rows = {split: np.concatenate(pools) for split, pools in hold_apart(digits, seed=seed).items()}
    assert {split: len(part) for split, part in rows.items()} == {"train": 1400, "test": 397}
    assert sorted(np.concatenate([rows["train"], rows["test"]])) == list(range(1797))
    for pools in hold_apart(digits, seed=seed).values():
        for digit, pool in enumerate(pools):
            assert set(digits.classes[pool]) == {digit}


def exact_joint() -> np.ndarray:
    """P(both digits present) of every pair, and of every digit on the diagonal, by summing over all label sets."""
    joint, total = np.zeros((10, 10)), 0.0
    for inside, probability in scenes.SCENES:
        chances = [probability if digit in inside else 0.06 for digit in range(10)]
        for bits in itertools.product((0, 1), repeat=10):
            if 1 <= sum(bits) <= 9:
                weight = math.prod(p if bit else 1.0 - p for bit, p in zip(bits, chances, strict=True))
                # Sets that are redrawn are redrawn with their scene, so one normaliser serves all scenes.
                joint += weight * np.outer(bits, bits)
                total += weight
    return joint / total


def test_the_planted_co_occurrence_is_strong():
    joint = exact_joint()
    assert joint.trace() == pytest.approx(2.7, abs=0.05)  # labels an image
    assert joint[0, 1] / joint[0, 0] == pytest.approx(0.67, abs=0.02)
    assert joint[0, 3] / joint[0, 0] == pytest.approx(0.11, abs=0.02)


def test_labels_occur_and_meet_as_often_as_the_scenes_say():
    digits, count = load_digits(), 3000
    pools = hold_apart(digits, seed=0)["train"]
    present = np.zeros((count, 10))
    for number in range(count):
        scene = draw_scene(pools, key("test", number), size=48)
        present[number, [digits.classes[placement.row] for placement in scene]] = 1
    expected = exact_joint()
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(present.T @ present / count - expected) < 4.5 * deviation).all()  # 55 comparisons


@pytest.mark.parametrize("size", [24, 48, 50, 97])
def test_digits_lie_whole_on_the_canvas_in_cells_of_their_own(size):
    pools = hold_apart(load_digits(), seed=0)["test"]
    cell, reach = size // 3, round(size // 3 / 16)
    for number in range(200):
        taken = set()
        for row, left, top, side, gain in draw_scene(pools, key("test", size, number), size=size):
            assert 0 <= row < 1797
            assert 0.7 <= gain < 1.0
            assert round(0.75 * cell) <= side <= cell
            assert 0 <= left <= size - side
            assert 0 <= top <= size - side
            column, line = (min(int((start + side / 2) // cell), 2) for start in (left, top))
            assert column * cell - reach <= left <= (column + 1) * cell + reach - side
            assert line * cell - reach <= top <= (line + 1) * cell + reach - side
            taken.add((line, column))
        assert len(taken) == len(draw_scene(pools, key("test", size, number), size=size))


def test_where_digits_overlap_the_brighter_pixel_shows_under_noise_of_16_levels():
    digits = load_digits()
    scene = [Placement(5, 3, 2, 13, 0.9), Placement(77, 10, 6, 16, 0.7)]
    expected = np.zeros((48, 48))
    for row, left, top, side, gain in scene:
        digit = np.asarray(Image.fromarray(digits.images[row]).resize((side, side), Image.Resampling.BICUBIC))
        for y, x in itertools.product(range(side), range(side)):
            expected[top + y, left + x] = max(expected[top + y, left + x], gain * float(digit[y, x]))
    difference = scenes.render(scene, digits, key("test"), size=48).astype(float) - expected
    assert np.abs(difference).max() <= 16.5
    assert difference.max() > 14
    assert difference.min() < -14


def test_equal_arguments_give_equal_bytes_and_another_seed_other_images(scene_set, tmp_path):
    again = write_scenes(tmp_path / "again", num_train=NUM_TRAIN, num_test=NUM_TEST)
    other = write_scenes(tmp_path / "other", num_train=NUM_TRAIN, num_test=NUM_TEST, seed=1)

    def contents(made: SceneSet) -> dict[str, bytes]:
        folder = Path(made.images).parent
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first, second, third = contents(scene_set), contents(again), contents(other)
    assert first == second
    assert first.keys() == third.keys()
    assert not any(first[name] == third[name] for name in first if name.endswith(".jpg"))


def test_a_smaller_set_is_the_beginning_of_a_larger_one(scene_set, tmp_path):
    smaller = write_scenes(tmp_path, num_train=5, num_test=2)
    for path in Path(smaller.images).iterdir():
        assert path.read_bytes() == Path(scene_set.images, path.name).read_bytes()


def test_without_scikit_learn_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[demo\]'"):
        write_scenes(tmp_path / "never", num_train=1, num_test=1)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(("name", "value"), [("num_train", 0), ("num_test", 0), ("size", 23)])
def test_numbers_too_small_are_refused(tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name} {value}") as caught:
        write_scenes(tmp_path, **{name: value})
    assert caught.value.where == name
