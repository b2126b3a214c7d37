"""Claims about ImageNet: class folders, and ReaL labels for validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_mlpl.errors import ConfigError, DataError, StorageError
from shards.sources.base import Source
from shards.sources.imagenet import ImageNetSettings, read_imagenet
from tests.support.sources import Seen, seen, write_files

pytestmark = pytest.mark.unit

TRAIN = {"train/n02/n02_1.JPEG": "", "train/n01/n01_9.JPEG": "", "train/n01/n01_10.JPEG": "", "train/n01/.x": ""}
IDS = [f"n{number:08d}" for number in range(1000)]
NAMES = "".join(f"{key} thing {key[-3:]}, other\n" for key in reversed(IDS))  # against the order of real.json
REAL = {
    "train/n00000001/a.JPEG": "",
    "val/ILSVRC2012_val_00000003.JPEG": "",
    "val/ILSVRC2012_val_00000001.JPEG": "",
    "val/n00000000/ILSVRC2012_val_00000002_n00000000.JPEG": "",
    "names.txt": NAMES,
}


def imagenet(folder: Path, files: dict[str, str], **options: Any) -> Source:
    return read_imagenet(ImageNetSettings(images=write_files(folder, files), **options))


@pytest.mark.parametrize("unlisted", ["absent", "unknown"])
def test_folders_are_classes_and_the_rest_is_what_the_option_says(tmp_path: Path, unlisted: Any) -> None:
    source = imagenet(tmp_path, TRAIN, unlisted=unlisted)
    assert [(entry.id, entry.name) for entry in source.classes] == [("n01", "n01"), ("n02", "n02")]
    assert source.unlisted == unlisted
    assert list(seen(source).items()) == [
        ("train/n01/n01_10.JPEG", Seen("train", {"n01"}, set())),
        ("train/n01/n01_9.JPEG", Seen("train", {"n01"}, set())),
        ("train/n02/n02_1.JPEG", Seen("train", {"n02"}, set())),
    ]
    assert source.arguments["dropped"] == {"other_files": 1}


def test_a_list_of_classes_gives_their_order_and_names(tmp_path: Path) -> None:
    files = TRAIN | {"names.txt": "n02 goldfish, Carassius auratus\nn01\n"}
    source = imagenet(tmp_path, files, classes=str(tmp_path / "names.txt"))
    assert [(entry.id, entry.name) for entry in source.classes] == [
        ("n02", "goldfish, Carassius auratus"), ("n01", "n01"),
    ]  # fmt: skip


def real(folder: Path, lists: Any, files: dict[str, str] | None = None, **options: Any) -> Source:
    written = REAL | {"real.json": json.dumps(lists)} | (files or {})
    defaults = {
        "folders": {"train": "train", "val": "val"},
        "real": str(folder / "real.json"),
        "classes": str(folder / "names.txt"),
    }
    return imagenet(folder, written, **(defaults | options))


@pytest.mark.parametrize("unlisted", ["absent", "unknown"])
def test_real_labels_count_over_sorted_ids_and_are_whole(tmp_path: Path, unlisted: Any) -> None:
    source = real(tmp_path, [[0, 999], [], [5]], unlisted=unlisted)
    assert source.classes[0].id == IDS[-1]

    def expected(*numbers: int) -> Seen:
        present = {IDS[number] for number in numbers}
        return Seen("val", present, set(IDS) - present if unlisted == "unknown" else set())

    assert seen(source) == {
        "train/n00000001/a.JPEG": Seen("train", {IDS[1]}, set()),
        "val/ILSVRC2012_val_00000001.JPEG": expected(0, 999),
        "val/ILSVRC2012_val_00000003.JPEG": expected(5),
    }
    assert source.records.source_rows.tolist() == [0, 1, 2]
    assert source.arguments["dropped"] == {"images_without_real_labels": 1}
    kept = real(tmp_path, [[0, 999], [], [5]], unlisted=unlisted, real_empty="keep")
    assert seen(kept)["val/n00000000/ILSVRC2012_val_00000002_n00000000.JPEG"] == expected()
    assert kept.records.source_rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("lists", "files", "found", "where"),
    [
        ({}, {}, "a JSON dict", "real.json"),
        ([[0], [1000], [5]], {}, "[1000]", "real.json, list 1"),
        ([[0], [-1], [5]], {}, "[-1]", "real.json, list 1"),
        ([[0], 1, [5]], {}, "1", "real.json, list 1"),
        ([[0], [1]], {}, "ILSVRC2012_val_00000003.JPEG", "val"),
        ([[0], [1], [5]], {"val/x.JPEG": ""}, "x.JPEG", "val"),
        ([[0], [1], [5]], {"names.txt": NAMES.partition("\n")[2]}, "999 classes", "real.json"),
        ([[0], [1], [5]], {"names.txt": NAMES + NAMES[:10]}, "twice", "names.txt"),
        ([[0], [1], [5]], {"train/n1/a.JPEG": ""}, "class 'n1'", "train, n1/a.JPEG"),
        ([[0], [1], [5]], {"train/a.JPEG": ""}, "an image in no folder", "train, a.JPEG"),
    ],
)
def test_faulty_files_are_refused_with_their_place(
    tmp_path: Path, lists: Any, files: dict[str, str], found: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        real(tmp_path, lists, files)
    assert found in caught.value.found
    assert caught.value.where == f"{tmp_path}/{where}"


def test_missing_folders_and_a_split_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the folder not found"):
        imagenet(tmp_path, TRAIN, folders={"train": "training"})
    with pytest.raises(DataError, match="no image among 1 files"):
        imagenet(tmp_path, TRAIN | {"val/a.txt": ""}, folders={"train": "train", "val": "val"})
    with pytest.raises(ConfigError, match="real_split 'val'"):
        imagenet(tmp_path, TRAIN, real="real.json")
