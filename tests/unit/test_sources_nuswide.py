"""Claims about NUS-WIDE: the official lists and the CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dist_mlpl.errors import DataError, StorageError
from shards.sources.base import Source
from shards.sources.nuswide import NusWideSettings, read_nuswide
from tests.support.sources import Seen, seen, write_files

pytestmark = pytest.mark.unit

MARKS = "Groundtruth/TrainTestLabels/Labels"
FILES = {
    "Concepts81.txt": "sky\nairport\n",
    "ImageList/TrainImagelist.txt": "actor\\0001_21.jpg\r\nzoo\\0002_3.jpg\r\nactor\\0003_4.jpg\r\n",
    "ImageList/TestImagelist.txt": "actor\\0009_5.jpg\r\n",
    f"{MARKS}_airport_Train.txt": "0\n0\n1\n",
    f"{MARKS}_airport_Test.txt": "1\n",
    f"{MARKS}_sky_Train.txt": "1\n0\n1\n",
    f"{MARKS}_sky_Test.txt": "0\n",
}


def nuswide(folder: Path, files: dict[str, str] | None = None, **options: Any) -> Source:
    root = write_files(folder, FILES | (files or {}))
    places = {"annotations": root, "classes": f"{root}/Concepts81.txt"}
    return read_nuswide(NusWideSettings(images="Flickr", **(places | options)))


def test_the_official_lists_make_train_then_test_with_the_concepts_in_their_order(tmp_path: Path) -> None:
    source = nuswide(tmp_path)
    assert [entry.id for entry in source.classes] == ["sky", "airport"]
    assert seen(source) == {
        "actor/0001_21.jpg": Seen("train", {"sky"}, set()),
        "zoo/0002_3.jpg": Seen("train", set(), set()),
        "actor/0003_4.jpg": Seen("train", {"sky", "airport"}, set()),
        "actor/0009_5.jpg": Seen("test", {"airport"}, set()),
    }
    assert source.unlisted == "absent"
    assert list(seen(nuswide(tmp_path, flat=True))) == ["0001_21.jpg", "0002_3.jpg", "0003_4.jpg", "0009_5.jpg"]


def test_images_without_labels_are_dropped_by_option(tmp_path: Path) -> None:
    source = nuswide(tmp_path, without_labels="drop")
    assert list(seen(source)) == ["actor/0001_21.jpg", "actor/0003_4.jpg", "actor/0009_5.jpg"]
    assert source.records.source_rows.tolist() == [0, 2, 3]
    assert source.arguments["dropped"] == {"images_without_labels": 1}


@pytest.mark.parametrize(
    ("files", "found", "where"),
    [
        ({f"{MARKS}_sky_Train.txt": "1\n0\n"}, "2 lines", f"{MARKS}_sky_Train.txt"),
        ({f"{MARKS}_sky_Train.txt": "1\n0\n2\n"}, "'2'", f"{MARKS}_sky_Train.txt, line 3"),
        ({"ImageList/TestImagelist.txt": "zoo\\0002_3.jpg"}, "again", "ImageList/TestImagelist.txt, line 1"),
        ({"ImageList/TestImagelist.txt": "C:\\..\\2.jpg"}, "C:/../2.jpg", "ImageList/TestImagelist.txt, line 1"),
        ({"Concepts81.txt": "sky\nsky\n"}, "class 'sky' twice", "Concepts81.txt"),
    ],
)
def test_faulty_lists_are_refused_with_their_place(
    tmp_path: Path, files: dict[str, str], found: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        nuswide(tmp_path, files)
    assert found in caught.value.found
    assert caught.value.where == f"{tmp_path}/{where}"


def test_a_concept_without_its_labels_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Labels_sun_Train"):
        nuswide(tmp_path, {"Concepts81.txt": "sky\nsun\n"})


CSV = "filepath,label,split_name\nimages/2_1.jpg,\"['sky', 'sun']\",train\nimages/1_7.jpg,['dog'],val\n"


def from_csv(folder: Path, text: str, **options: Any) -> Source:
    root = write_files(folder, {"nus_wid_data.csv": text, "names.txt": "sun\nsky\ndog\n"})
    return read_nuswide(NusWideSettings(images="nus", labels=f"{root}/nus_wid_data.csv", **options))


def test_the_csv_makes_images_in_row_order_with_sorted_or_listed_concepts(tmp_path: Path) -> None:
    source = from_csv(tmp_path, CSV)
    assert [entry.id for entry in source.classes] == ["dog", "sky", "sun"]
    assert seen(source) == {
        "images/2_1.jpg": Seen("train", {"sky", "sun"}, set()),
        "images/1_7.jpg": Seen("val", {"dog"}, set()),
    }
    listed = from_csv(tmp_path, CSV, classes=str(tmp_path / "names.txt"), flat=True)
    assert [entry.id for entry in listed.classes] == ["sun", "sky", "dog"]
    assert seen(listed)["2_1.jpg"] == seen(source)["images/2_1.jpg"]


@pytest.mark.parametrize(
    ("row", "found", "line"),
    [
        ("a.jpg,sky,train", "label 'sky'", 4),
        ("a.jpg,\"['sky', 3]\",train", "label \"['sky', 3]\"", 4),
        ("a.jpg,['owl'],train", "unknown concept 'owl'", 4),
        ("images/1_7.jpg,['dog'],train", "listed in nus_wid_data.csv, line 3", 4),
        ("a.jpg,['dog']", "2 cells", 4),
        ("a.jpg,\"['dog'],train", "not CSV", 4),
    ],
)
def test_faulty_rows_are_refused_with_their_line(tmp_path: Path, row: str, found: str, line: int) -> None:
    with pytest.raises(DataError) as caught:
        from_csv(tmp_path, CSV + row + "\n", classes=str(tmp_path / "names.txt"))
    assert found in caught.value.found
    assert caught.value.where == f"{tmp_path}/nus_wid_data.csv, line {line}"


def test_a_column_that_names_no_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="300 splits"):
        from_csv(tmp_path, "filepath,label,split_name\n" + "".join(f"{n}.jpg,['sky'],s{n}\n" for n in range(300)))


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        from_csv(tmp_path, CSV.replace("split_name", "split"))
    assert caught.value.where.endswith("line 1")
    assert "split_name" in caught.value.expected


def test_one_form_of_labels_must_be_given_and_the_lists_need_their_concepts() -> None:
    for options in ({}, {"annotations": "a", "labels": "b"}, {"annotations": "a"}):
        with pytest.raises(ValidationError, match="give `"):
            NusWideSettings(images="x", **options)  # type: ignore[arg-type]
