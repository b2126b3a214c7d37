"""Claims about the multi-label subsets of Visual Genome."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_mlpl.errors import DataError, StorageError
from shards.sources.base import Source
from shards.sources.vg import VgSettings, read_vg
from tests.support.sources import Seen, seen, write_files

pytestmark = pytest.mark.unit

LABELS = {"2.jpg": [3, 0, 3], "1.jpg": [], "7.jpg": [1], "9.jpg": [2]}
FILES = {"train.txt": "2.jpg\n7.jpg\n", "test.txt": "1.jpg\r\n"}


def vg(folder: Path, labels: Any = LABELS, files: dict[str, str] | None = None, **options: Any) -> Source:
    written = FILES | {"labels.json": json.dumps(labels)} | (files or {})
    root = write_files(folder, written)
    settings = VgSettings(
        images=root,
        labels=f"{root}/labels.json",
        lists={"train": f"{root}/train.txt", "test": f"{root}/test.txt"},
        **{"num_classes": 4, **options},
    )
    return read_vg(settings)


def test_images_follow_the_lists_and_classes_are_numbers_or_names(tmp_path: Path) -> None:
    source = vg(tmp_path)
    assert seen(source) == {
        "2.jpg": Seen("train", {"0", "3"}, set()),
        "7.jpg": Seen("train", {"1"}, set()),
        "1.jpg": Seen("test", set(), set()),
    }
    assert list(seen(source)) == ["2.jpg", "7.jpg", "1.jpg"]
    assert source.unlisted == "absent"
    named = vg(tmp_path, files={"names.txt": "tree\nman\nsky\nroad\n"}, classes=str(tmp_path / "names.txt"))
    assert seen(named)["2.jpg"].positives == {"tree", "road"}


def test_images_are_found_in_the_folders_that_share_them(tmp_path: Path) -> None:
    files = {"VG_100K/2.jpg": "", "VG_100K/1.jpg": "", "VG_100K_2/7.jpg": ""}
    source = vg(tmp_path, files=files, folders="VG_100K,VG_100K_2")
    assert list(seen(source)) == ["VG_100K/2.jpg", "VG_100K_2/7.jpg", "VG_100K/1.jpg"]
    with pytest.raises(DataError) as caught:
        vg(tmp_path, files={"test.txt": "1.jpg\n9.jpg\n"}, folders="VG_100K,VG_100K_2")
    assert (caught.value.found, caught.value.where) == ("image '9.jpg'", f"{tmp_path}/test.txt, line 2")
    with pytest.raises(StorageError, match="VG_100K_3"):
        vg(tmp_path, folders="VG_100K,VG_100K_3")


@pytest.mark.parametrize(
    ("labels", "files", "found", "where"),
    [
        ([1], {}, "a JSON list", "labels.json"),
        (LABELS | {"2.jpg": [4]}, {}, "[4]", "labels.json, image '2.jpg'"),
        (LABELS | {"2.jpg": [-1]}, {}, "[-1]", "labels.json, image '2.jpg'"),
        (LABELS | {"2.jpg": ["a"]}, {}, "['a']", "labels.json, image '2.jpg'"),
        (LABELS | {"2.jpg": 3}, {}, "3", "labels.json, image '2.jpg'"),
        (LABELS, {"test.txt": "1.jpg\n\n5.jpg\n"}, "image '5.jpg'", "test.txt, line 3"),
        (LABELS, {"test.txt": "7.jpg\n"}, "again, listed in train.txt, line 2", "test.txt, line 1"),
        (LABELS | {"../1.jpg": []}, {"test.txt": "../1.jpg\n"}, "image '../1.jpg'", "test.txt, line 1"),
    ],
)
def test_faulty_files_are_refused_with_their_place(
    tmp_path: Path, labels: Any, files: dict[str, str], found: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        vg(tmp_path, labels, files)
    assert found in caught.value.found
    assert caught.value.where == f"{tmp_path}/{where}"


def test_another_number_of_names_than_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 names"):
        vg(tmp_path, files={"names.txt": "tree\nman\nsky\n"}, classes=str(tmp_path / "names.txt"))
