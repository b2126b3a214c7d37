"""Claims about PASCAL VOC: lists, XML files, what is difficult."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_mlpl.errors import DataError, StorageError
from shards.sources.base import Source
from shards.sources.voc import VOC_CLASSES, VocSettings, read_voc
from tests.support.sources import Seen, outside_data, seen, table_labels, write_files

pytestmark = pytest.mark.unit


def annotation(*objects: tuple[str, int]) -> str:
    entries = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, difficult in objects
    )
    return f"<annotation>\n<folder>VOC2007</folder><filename>x.jpg</filename>{entries}\n</annotation>"


FILES = {
    "VOC2007/ImageSets/Main/trainval.txt": "000007\n000005 \r\n",
    "VOC2007/ImageSets/Main/test.txt": "000001\n",
    "VOC2012/ImageSets/Main/trainval.txt": "2008_000002\n",
    "VOC2007/Annotations/000005.xml": annotation(("chair", 0), ("chair", 1), ("sofa", 1)),
    "VOC2007/Annotations/000007.xml": annotation(("car", 0)),
    "VOC2007/Annotations/000001.xml": annotation(),
    "VOC2012/Annotations/2008_000002.xml": annotation(("tvmonitor", 0)),
}


def voc(folder: Path, files: dict[str, str | bytes] | None = None, **options: Any) -> Source:
    return read_voc(VocSettings(images=write_files(folder, FILES | (files or {})), **options))


def test_images_follow_the_lists_and_a_class_with_difficult_objects_alone_is_absent(tmp_path: Path) -> None:
    source = voc(tmp_path)
    assert seen(source) == {
        "VOC2007/JPEGImages/000007.jpg": Seen("train", {"car"}, set()),
        "VOC2007/JPEGImages/000005.jpg": Seen("train", {"chair"}, set()),
        "VOC2007/JPEGImages/000001.jpg": Seen("test", set(), set()),
    }
    assert next(iter(seen(source))) == "VOC2007/JPEGImages/000007.jpg"
    assert [entry.id for entry in source.classes] == sorted(VOC_CLASSES)
    assert source.arguments["dropped"] == {"difficult_only_labels": 1}


def test_years_are_joined_by_naming_their_lists(tmp_path: Path) -> None:
    lists = {"train": "VOC2007/trainval, VOC2012/trainval", "test": "VOC2007/test"}
    assert [(image, row.split) for image, row in seen(voc(tmp_path, lists=lists)).items()] == [
        ("VOC2007/JPEGImages/000007.jpg", "train"),
        ("VOC2007/JPEGImages/000005.jpg", "train"),
        ("VOC2012/JPEGImages/2008_000002.jpg", "train"),
        ("VOC2007/JPEGImages/000001.jpg", "test"),
    ]


@pytest.mark.parametrize(
    ("difficult", "unlisted", "positives", "negatives"),
    [
        ("present", "absent", {"chair", "sofa"}, set()),
        ("unknown", "unknown", {"chair"}, set(VOC_CLASSES) - {"chair", "sofa"}),
    ],
)
def test_what_is_difficult_alone_is_what_the_option_says(
    tmp_path: Path, difficult: Any, unlisted: str, positives: set[str], negatives: set[str]
) -> None:
    source = voc(tmp_path, difficult=difficult)
    assert source.unlisted == unlisted
    assert seen(source)["VOC2007/JPEGImages/000005.jpg"] == Seen("train", positives, negatives)


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>' + annotation()


@pytest.mark.parametrize(
    ("files", "found", "where"),
    [
        ({"VOC2007/Annotations/000005.xml": "<annotation>"}, "not XML", "VOC2007/Annotations/000005.xml"),
        ({"VOC2007/Annotations/000005.xml": b"\xff<a/>"}, "not XML", "VOC2007/Annotations/000005.xml"),
        ({"VOC2007/Annotations/000005.xml": "<a/>"}, "<a>", "VOC2007/Annotations/000005.xml"),
        ({"VOC2007/Annotations/000005.xml": BOMB}, "a document type", "VOC2007/Annotations/000005.xml"),
        (
            {"VOC2007/Annotations/000005.xml": annotation(("car", 0), ("chiar", 0))},
            "unknown class 'chiar'",
            "VOC2007/Annotations/000005.xml, object 2",
        ),
        (
            {"VOC2007/Annotations/000005.xml": annotation(("car", 2))},
            "difficult '2'",
            "VOC2007/Annotations/000005.xml, object 1",
        ),
        (
            {"VOC2007/ImageSets/Main/test.txt": "000001\n\n000007\n"},
            "again, listed in trainval.txt, line 1",
            "VOC2007/ImageSets/Main/test.txt, line 3",
        ),
        ({"VOC2007/ImageSets/Main/test.txt": "../x\n"}, "../x.jpg", "VOC2007/ImageSets/Main/test.txt, line 1"),
        ({"VOC2007/ImageSets/Main/test.txt": "000001 -1\n"}, "000001 -1", "VOC2007/ImageSets/Main/test.txt, line 1"),
        ({"VOC2007/ImageSets/Main/test.txt": "\n"}, "an empty file", "VOC2007/ImageSets/Main/test.txt"),
    ],
)
def test_faulty_files_are_refused_with_their_place(
    tmp_path: Path, files: dict[str, str | bytes], found: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        voc(tmp_path, files)
    assert found in caught.value.found
    assert caught.value.where == f"{tmp_path}/{where}"
    if "chiar" in found:
        assert "'chair'" in caught.value.expected


def test_missing_lists_and_annotations_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"VOC2012/ImageSets/Main/test\.txt"):
        voc(tmp_path, lists={"test": "VOC2012/test"})
    with pytest.raises(StorageError, match=r"Annotations/000002\.xml"):
        voc(tmp_path, {"VOC2007/ImageSets/Main/test.txt": "000002\n"})


def test_the_annotations_of_364_blood_images_say_what_the_table_beside_them_says(tmp_path: Path) -> None:
    root = outside_data("bccd")
    labels = table_labels(root)
    (tmp_path / "Annotations").symlink_to(root / "annotations")
    for split in ("train", "val", "test"):
        names = [image.removesuffix(".jpg") for image, row in labels.items() if row[0] == split]
        write_files(tmp_path, {f"ImageSets/Main/{split}.txt": "\n".join(names) + "\n"})
    write_files(tmp_path, {"classes.txt": "WBC\nRBC\nPlatelets\n"})
    source = read_voc(
        VocSettings(
            images=str(tmp_path),
            lists={split: (split,) for split in ("train", "val", "test")},
            classes=str(tmp_path / "classes.txt"),
        )
    )
    found = {image.removeprefix("JPEGImages/"): (row.split, row.positives) for image, row in seen(source).items()}
    assert found == labels
    assert [entry.id for entry in source.classes] == ["WBC", "RBC", "Platelets"]


def test_the_20_classes_are_those_of_the_usual_list() -> None:
    assert list(VOC_CLASSES) == outside_data("meta", "voc", "voc_classes.txt").read_text().split()
