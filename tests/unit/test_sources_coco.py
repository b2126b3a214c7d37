"""Claims about COCO's instances files and about YOLO's folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_mlpl.errors import ConfigError, DataError, StorageError
from shards.sources.base import Source
from shards.sources.coco import CocoSettings, read_coco
from shards.sources.yolo import YoloSettings, read_yolo
from tests.support.sources import Seen, outside_data, seen, table_labels, write_files

pytestmark = pytest.mark.unit

OUTLINE = {"segmentation": [[1.0, 2.0, 3.0]], "bbox": [0, 0, 1, 1], "area": 1.0}
CROWD = {"segmentation": {"counts": [1, 2], "size": [4, 4]}, "bbox": [0, 0, 1, 1], "area": 1.0}
INSTANCES: dict[str, Any] = {
    "info": {"year": 2014},
    "images": [
        {"id": 9, "file_name": "b.jpg", "height": 4, "width": 4},
        {"id": 4, "file_name": "a.jpg", "height": 4, "width": 4},
        {"id": 7, "file_name": "c.jpg", "height": 4, "width": 4},
    ],
    "annotations": [
        {"id": 1, "image_id": 4, "category_id": 90, "iscrowd": 0, **OUTLINE},
        {"id": 2, "image_id": 4, "category_id": 90, "iscrowd": 1, **CROWD},
        {"id": 3, "image_id": 9, "category_id": 1, "iscrowd": 1, **CROWD},
        {"id": 4, "image_id": 9, "category_id": 90, "iscrowd": 0, **OUTLINE},
    ],
    "categories": [
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 2, "name": "bicycle", "supercategory": "vehicle"},
    ],
}


def coco(folder: Path, document: Any = INSTANCES, **options: Any) -> Source:
    text = document if isinstance(document, str) else json.dumps(document)
    write_files(folder, {"train.json": text})
    return read_coco(CocoSettings(images="images", annotations={"train": str(folder / "train.json")}, **options))


def test_classes_follow_the_category_ids_and_images_their_array(tmp_path: Path) -> None:
    source = coco(tmp_path, folders={"train": "train2014"})
    assert [(entry.id, entry.name) for entry in source.classes] == [
        ("1", "person"), ("2", "bicycle"), ("90", "toothbrush"),
    ]  # fmt: skip
    assert source.unlisted == "absent"
    assert seen(source) == {
        "train2014/b.jpg": Seen("train", {"1", "90"}, set()),
        "train2014/a.jpg": Seen("train", {"90"}, set()),
        "train2014/c.jpg": Seen("train", set(), set()),
    }
    assert list(seen(source)) == ["train2014/b.jpg", "train2014/a.jpg", "train2014/c.jpg"]
    assert source.arguments["dropped"] == {}


def test_images_without_objects_are_dropped_by_option_and_keep_their_place_in_the_order(tmp_path: Path) -> None:
    document = copy.deepcopy(INSTANCES)
    document["images"].insert(0, {"id": 1, "file_name": "bare.jpg"})
    kept, dropped = coco(tmp_path, document), coco(tmp_path, document, without_objects="drop")
    assert list(seen(kept)) == ["bare.jpg", "b.jpg", "a.jpg", "c.jpg"]
    assert list(seen(dropped)) == ["b.jpg", "a.jpg"]
    assert dropped.records.source_rows.tolist() == [1, 2]
    assert dropped.arguments["dropped"] == {"images_without_objects": 2}


@pytest.mark.parametrize(
    ("crowd", "unlisted", "positives", "negatives", "dropped"),
    [
        ("present", "absent", {"1", "90"}, set(), {}),
        ("absent", "absent", {"90"}, set(), {"crowd_only_labels": 1}),
        ("unknown", "unknown", {"90"}, {"2"}, {"crowd_only_labels": 1}),
    ],
)
def test_a_class_seen_as_a_crowd_alone_is_what_the_option_says(
    tmp_path: Path, crowd: Any, unlisted: str, positives: set[str], negatives: set[str], dropped: dict[str, int]
) -> None:
    source = coco(tmp_path, crowd=crowd)
    assert source.unlisted == unlisted
    assert seen(source)["b.jpg"] == Seen("train", positives, negatives)
    assert source.arguments["dropped"] == dropped
    assert (source.arguments["crowd"], source.arguments["without_objects"]) == (crowd, "keep")


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = copy.deepcopy(INSTANCES)
    change(document)
    return document


@pytest.mark.parametrize(
    ("document", "found", "where"),
    [
        ("{", "not JSON", "train.json, line 1, column 2"),
        ("[" * 100_000, "not JSON", "train.json"),
        ('{"images": [' + "1" * 5000 + "]}", "not JSON", "train.json"),
        ([], "no list `images`", "train.json"),
        (changed(lambda d: d.pop("annotations")), "no list `annotations`", "train.json"),
        (changed(lambda d: d.update(images=[])), "no image", "train.json, images"),
        (changed(lambda d: d["images"][2].pop("file_name")), "file_name None", "train.json, images[2]"),
        (changed(lambda d: d["images"][2].update(id=9)), "id 9 again", "train.json, images[2]"),
        (changed(lambda d: d["images"][2].update(file_name="a.jpg")), "'a.jpg' again", "train.json, images[2]"),
        (changed(lambda d: d["images"][2].update(file_name="../c.jpg")), "'../c.jpg'", "train.json, images[2]"),
        (changed(lambda d: d["images"][2].update(file_name="/c.jpg")), "'/c.jpg'", "train.json, images[2]"),
        (changed(lambda d: d["annotations"][1].pop("category_id")), "category_id None", "train.json, annotations[1]"),
        (changed(lambda d: d["annotations"][1].update(category_id=3)), "category_id 3", "train.json, annotations[1]"),
        (changed(lambda d: d["annotations"][1].update(image_id=5)), "image_id 5", "train.json, annotations[1]"),
        (changed(lambda d: d["annotations"][1].update(iscrowd=2)), "iscrowd 2", "train.json, annotations[1]"),
        (changed(lambda d: d["categories"][2].update(id=1)), "id 1 again", "train.json, categories[2]"),
        (changed(lambda d: d.update(categories=[], annotations=[])), "0 classes", "train.json"),
    ],
)
def test_a_faulty_instances_file_is_refused_with_its_place(
    tmp_path: Path, document: Any, found: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        coco(tmp_path, document)
    assert found in caught.value.found
    assert caught.value.where == f"{tmp_path}/{where}"


def test_files_of_other_categories_a_missing_file_and_a_strange_folder_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"val.json": json.dumps(changed(lambda d: d["categories"][0].update(name="brush")))})
    coco(tmp_path)
    both = {"train": str(tmp_path / "train.json"), "val": str(tmp_path / "val.json")}
    with pytest.raises(DataError, match="other categories"):
        read_coco(CocoSettings(images="images", annotations=both))
    with pytest.raises(StorageError, match="instances file not found"):
        read_coco(CocoSettings(images="images", annotations={"train": str(tmp_path / "none.json")}))
    with pytest.raises(ConfigError, match=r"folders\.trian"):
        coco(tmp_path, folders={"trian": "train2014"})
    with pytest.raises(DataError, match="no image with an object"):
        coco(tmp_path, changed(lambda d: d.update(annotations=[])), without_objects="drop")


def test_instances_of_coco_2017_say_what_the_table_beside_them_says() -> None:
    root = outside_data("coco256")
    files = {split: str(root / f"annotations/derived_instances_{split}2017.json") for split in ("train", "val")}
    source = read_coco(CocoSettings(images=str(root / "images"), annotations=files))
    names = {entry.id: entry.name for entry in source.classes}
    found = {image: (row.split, {names[key] for key in row.positives}) for image, row in seen(source).items()}
    assert found == table_labels(root)
    categories = json.loads(outside_data("meta", "coco", "coco80_categories.json").read_text())
    assert [(int(entry.id), entry.name) for entry in source.classes] == [(c["id"], c["name"]) for c in categories]


YOLO = {
    "images/train/b.jpg": "",
    "images/train/deep/a.png": "",
    "images/train/bare.jpg": "",
    "images/val/v.jpg": "",
    "images/train/notes.md": "",
    "labels/train/b.txt": "1 0.5 0.5 0.1 0.1\n\n0 0.1 0.2 0.3 0.4 0.5 0.6\n1 0 0 1 1\n",
    "labels/train/deep/a.txt": "",
    "labels/train/gone.txt": "1 0 0 1 1\n",
    "labels/val/v.txt": "2 0.5 0.5 0.1 0.1",
    "set.yaml": "path: x\ntrain: images/train\nnc: 3\nnames:\n  0: cat\n  1: dog\n  2: bird\n",
}


def yolo(folder: Path, *, classes: str = "set.yaml", **files: str) -> Source:
    root = Path(write_files(folder, YOLO | files))
    return read_yolo(
        YoloSettings(images=str(root / "images"), labels=str(root / "labels"), classes=str(root / classes))
    )


def test_yolo_folders_make_images_sorted_by_path_with_their_classes(tmp_path: Path) -> None:
    source = yolo(tmp_path)
    assert seen(source) == {
        "train/b.jpg": Seen("train", {"cat", "dog"}, set()),
        "train/bare.jpg": Seen("train", set(), set()),
        "train/deep/a.png": Seen("train", set(), set()),
        "val/v.jpg": Seen("val", {"bird"}, set()),
    }
    assert source.arguments["dropped"] == {"labels_without_image": 1, "other_files": 1}
    same = yolo(tmp_path, classes="names.txt", **{"names.txt": "cat\ndog\nbird\n"})
    assert seen(same) == seen(source)
    assert [entry.id for entry in same.classes] == ["cat", "dog", "bird"]


@pytest.mark.parametrize(
    ("files", "found", "where"),
    [
        ({"labels/val/v.txt": "3 0 0 1 1"}, "class 3", "labels/val/v.txt, line 1"),
        ({"labels/val/v.txt": "0 0 0 1 1\n-1 0 0 1 1"}, "class -1", "labels/val/v.txt, line 2"),
        ({"labels/val/v.txt": "0.5 0 0 1 1"}, "'0.5 0 0 1 1'", "labels/val/v.txt, line 1"),
        ({"labels/val/v.txt": "0 a"}, "'0 a'", "labels/val/v.txt, line 1"),
        ({"set.yaml": "names: [yes, cat]"}, "True for class 0", "set.yaml, names"),
        ({"set.yaml": "names: [cat, cat]"}, "class 'cat' twice", "set.yaml"),
        ({"set.yaml": "names: {0: cat, 2: dog}"}, "numbers [0, 2]", "set.yaml, names"),
        ({"set.yaml": "nc: 3"}, "None", "set.yaml, names"),
        ({"set.yaml": "a: [\nb"}, "not YAML", "set.yaml, line"),
    ],
)
def test_faulty_yolo_files_are_refused_with_their_place(
    tmp_path: Path, files: dict[str, str], found: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        yolo(tmp_path, **files)
    assert found in caught.value.found
    assert caught.value.where.startswith(f"{tmp_path}/{where}")


def test_the_yolo_folders_of_coco_2017_say_what_the_table_beside_them_says(tmp_path: Path) -> None:
    root = outside_data("coco256")
    labels = table_labels(root)
    for image, (split, _) in labels.items():
        path = tmp_path / "images" / split / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(root / "images" / image)
    (tmp_path / "labels").mkdir()
    for split in ("train", "val"):
        (tmp_path / "labels" / split).symlink_to(root / f"annotations/yolo_labels_{split}2017")
    names = [line.split(",")[0] for line in (root / "classes.csv").read_text().splitlines()[1:]]
    write_files(tmp_path, {"names.txt": "\n".join(names)})
    places = {key: str(tmp_path / key) for key in ("images", "labels")}
    source = read_yolo(YoloSettings(**places, classes=str(tmp_path / "names.txt")))
    found = {image.rpartition("/")[2]: (row.split, row.positives) for image, row in seen(source).items()}
    assert found == labels
