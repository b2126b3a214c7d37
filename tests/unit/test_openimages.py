"""Claims about Open Images: files of every release are read as published, joined by rule, and refused by their line."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from dist_mlpl.errors import ConfigError, DataError, MlplError, StorageError
from shards.sources import csv_blocks, label_entries
from shards.sources.base import Record, Source
from shards.sources.openimages import OpenImagesSettings, read_openimages
from tests.support.openimages import (
    BOX_HEADER,
    CAT,
    DOG,
    IMAGE_HEADER,
    LABEL_HEADER,
    METADATA,
    PET,
    TREE,
    WHEEL,
    image_row,
    write,
)

pytestmark = pytest.mark.unit

A, B, C = "000026e7ee790996", "0000e12345678901", "fffffffffffffffe"  # the second is a number in a spreadsheet
MIDS = f"{TREE}\n{DOG}\n{PET}\n{CAT}\n"
COLUMNS = sorted([TREE, DOG, PET, CAT])


def read(folder: Path, **options: Any) -> Source:
    """A source of files written into a folder: options that hold text are contents, lists of text are several."""
    files = {"classes": MIDS} | options
    return read_openimages(
        OpenImagesSettings(images="images", **{key: write(folder, key, v) for key, v in files.items()})
    )


def labels(*rows: str) -> str:
    return LABEL_HEADER + "".join(f"{row}\n" for row in rows)


def images(*ids: str, subset: str = "train") -> str:
    return IMAGE_HEADER + "".join(image_row(image, subset=subset) for image in ids)


def named(source: Source) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Positives, negatives and machine labels of every image, by MID."""
    mids = [entry.id for entry in source.classes]
    rows = [source.records.row(row) for row in range(len(source.records))]
    return {
        re.split(r"[/.]", row.image)[1]: tuple(
            [mids[c] for c in part] for part in (row.positives, row.negatives, row.machine)
        )
        for row in rows
    }  # type: ignore[return-value]


def test_rows_as_published_become_verified_labels(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        human=labels(
            f"{A},verification,{DOG},1",
            f"{A},verification,{TREE},0",
            f"{B},verification,{CAT},0.0",
            f"{B},crowdsource-verification,{TREE},1.0",
        ),
        image_lists=images(B, A),
    )
    assert source.name == "openimages"
    assert source.unlisted == "unknown"
    assert source.images == str(Path("images").absolute())
    assert [entry.id for entry in source.classes] == COLUMNS
    tree, dog, cat = (COLUMNS.index(mid) for mid in (TREE, DOG, CAT))
    assert source.records.rows([0, 1]) == [
        Record(f"train/{B}.jpg", "train", (tree,), (cat,), 0),
        Record(f"train/{A}.jpg", "train", (dog,), (tree,), 1),
    ]
    assert source.records.machine is None
    assert source.records.rotations is None


def test_the_second_release_calls_verification_human(tmp_path: Path) -> None:
    source = read(tmp_path, human=labels(f"{A},human,{DOG},0"), image_lists=images(A))
    assert named(source) == {A: ([], [DOG], [])}


def test_professionals_count_before_the_crowd_and_those_who_disagree_leave_the_class_unknown(tmp_path: Path) -> None:
    both = "crowdsource-verification"
    source = read(
        tmp_path,
        human=[
            labels(f"{A},{both},{DOG},0", f"{A},{both},{DOG},0", f"{A},verification,{DOG},1", f"{A},{both},{DOG},1"),
            labels(f"{A},verification,{CAT},1", f"{A},verification,{CAT},0", f"{A},{both},{CAT},1"),
            labels(f"{B},{both},{TREE},0", f"{B},{both},{TREE},1", f"{B},{both},{PET},0", f"{B},{both},{PET},0.0"),
        ],
        image_lists=images(A, B),
    )
    assert named(source) == {A: ([DOG], [], []), B: ([], [PET], [])}
    assert source.arguments["rows"] == {"human": 11, "images": 2}
    assert source.arguments["dropped"] == {
        "verified_conflicting": 5,
        "verified_overruled": 2,
        "verified_repeated": 2,
    }


def test_a_box_is_a_professionals_positive(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        boxes=BOX_HEADER
        + f"{A},xclick,{DOG},1,0.012500,0.195312,0.148438,0.587500,0,1,0,0,0\n"
        + f"{A},activemil,{DOG},1,0.025000,0.276563,0.714063,0.948438,0,1,0,0,0\n"
        + f"{B},freeform,{CAT},1,0.1,0.2,0.1,0.2,0,0,1,0,0\n",
        human=labels(
            f"{A},crowdsource-verification,{DOG},0", f"{B},verification,{CAT},0", f"{B},verification,{TREE},0"
        ),
        image_lists=images(A, B),
    )
    assert named(source) == {A: ([DOG], [], []), B: ([], [TREE], [])}


def test_machine_labels_stay_apart_with_their_confidence(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        human=labels(f"{A},verification,{DOG},0", f"{A},verification,{CAT},1", f"{A},verification,{CAT},0"),
        machine=labels(
            f"{A},machine,{DOG},0.9",
            f"{A},machine,{CAT},0.9",
            f"{A},machine,{TREE},0.5",
            f"{A},machine,{TREE},0.8",
            f"{B},machine,{PET},1",
            f"{B},machine,{DOG},0.6999",
        ),
        image_lists=images(A, B),
        min_confidence=0.7,
    )
    assert named(source) == {A: ([], [DOG], [TREE]), B: ([], [], [PET])}
    assert [source.records.row(row).confidences for row in (0, 1)] == [(float(np.float16(0.8)),), (1.0,)]
    assert source.arguments["dropped"] == {
        "machine_below_min_confidence": 2,
        "machine_judged_by_people": 2,
        "verified_conflicting": 2,
    }


def test_other_classes_and_other_images_are_dropped_and_counted(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        human=labels(
            f"{A},verification,/m/0zzzzz,1",
            f"{C},verification,/g/11zz_z,1",
            f"{C},verification,{DOG},1",
            f"{A},verification,{DOG},1",
        ),
        machine=labels(f"{A},machine,/m/0zzzzz,0.5", f"{C},machine,{DOG},0.5"),
        image_lists=images(A, B),
    )
    assert named(source) == {A: ([DOG], [], [])}
    assert source.arguments["dropped"] == {
        "human_image_not_listed": 1,
        "human_unknown_class": 2,
        "image_without_label": 1,
        "machine_image_not_listed": 1,
        "machine_unknown_class": 1,
    }
    assert source.arguments["unknown_classes"] == 2
    assert source.arguments["images"] == {"listed": 2, "with_verified_label": 1}


def test_images_without_a_label_may_be_kept_and_never_move_the_others(tmp_path: Path) -> None:
    files = {"human": labels(f"{C},verification,{DOG},1", f"{A},verification,{DOG},0"), "image_lists": images(C, B, A)}
    dropped, kept = read(tmp_path, **files), read(tmp_path, **files, unlabelled="keep")
    assert list(named(kept)) == [C, B, A]
    assert kept.records.source_rows.tolist() == [0, 1, 2]
    assert named(kept)[B] == ([], [], [])
    assert list(named(dropped)) == [C, A]
    assert dropped.records.source_rows.tolist() == [0, 2]
    assert {image: found for image, found in named(kept).items() if image != B} == named(dropped)


def test_the_source_follows_the_image_lists_one_after_the_other(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        human=labels(*(f"{image},verification,{DOG},1" for image in (A, B, C))),
        image_lists=[images(C, subset="val"), images(B, subset="train"), images(A, subset="validation")],
    )
    assert [tuple(row)[:2] for row in source.records.rows(range(3))] == [
        (f"validation/{C}.jpg", "validation"),
        (f"train/{B}.jpg", "train"),
        (f"validation/{A}.jpg", "validation"),
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("oidv7-val-annotations-human-imagelabels.csv", "validation"),
        ("validation-annotations-human-imagelabels.csv", "validation"),
        ("train-annotations-human-imagelabels-boxable.csv", "train"),
        ("oidv6-train-annotations-human-imagelabels.csv", "train"),
        ("test/annotations-human.csv", "test"),
    ],
)
def test_without_image_lists_ids_are_sorted_and_names_tell_the_split(tmp_path: Path, name: str, split: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(labels(f"{C},verification,{DOG},1", f"{A},verification,{DOG},1", f"{C},verification,{CAT},0"))
    source = read(tmp_path, human=(str(path),))
    assert [tuple(row)[:2] for row in source.records.rows(range(2))] == [
        (f"{split}/{A}.jpg", split),
        (f"{split}/{C}.jpg", split),
    ]


def test_a_file_whose_name_tells_no_split_needs_an_image_list(tmp_path: Path) -> None:
    for name in ("labels.csv", "train-and-test.csv"):
        (tmp_path / name).write_text(labels(f"{A},verification,{DOG},1"))
        with pytest.raises(ConfigError, match="image_lists"):
            read(tmp_path, human=(str(tmp_path / name),))


def test_an_image_with_labels_in_two_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(labels(f"{A},verification,{DOG},1"))
    with pytest.raises(DataError, match=f"image {A} has labels in several splits"):
        read(tmp_path, human=(str(tmp_path / "train.csv"), str(tmp_path / "test.csv")))


def test_rotations_come_from_the_list_unless_the_images_are_upright(tmp_path: Path) -> None:
    turns = {A: "90.0", B: "", C: "270", "0" * 16: "nan", "1" * 16: "180.0"}
    files = {
        "human": labels(*(f"{image},verification,{DOG},1" for image in turns)),
        "image_lists": IMAGE_HEADER + "".join(image_row(image, rotation=turn) for image, turn in turns.items()),
    }
    assert [row.rotation for row in read(tmp_path, **files).records.rows(range(5))] == [90, 0, 270, 0, 180]
    assert read(tmp_path, **files, use_rotation=False).records.rotations is None


def test_lists_of_early_releases_have_no_rotation(tmp_path: Path) -> None:
    header, row = IMAGE_HEADER.replace(",Rotation", ""), image_row(A, rotation="0.0").replace(",0.0\n", "\n")
    source = read(tmp_path, human=labels(f"{A},verification,{DOG},1"), image_lists=header + row)
    assert source.records.rotations is None


def test_titles_may_hold_commas_quotes_and_line_ends_wherever_a_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"{number:016x}" for number in range(40)]
    titles = ["plain", "a, b", 'Fiat 500 "topolino"', "two\nlines", '"', 'x\n"\n",\n', "", "Spätzle"]
    rows = "".join(image_row(image, title=titles[place % len(titles)]) for place, image in enumerate(ids))
    files = {"human": labels(*(f"{image},verification,{DOG},1" for image in ids)), "image_lists": IMAGE_HEADER + rows}
    whole = read(tmp_path, **files)
    assert list(named(whole)) == ids
    for num_bytes in (1, 50, 333, 1000):
        monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", num_bytes)
        assert named(read(tmp_path, **files)) == named(whole)


def test_windows_line_ends_a_byte_order_mark_and_quoted_cells_are_read(tmp_path: Path) -> None:
    human = (
        "\ufeff"
        + LABEL_HEADER.replace("\n", "\r\n")
        + f'"{A}",verification,"{DOG}","1"\r\n\r\n{B},verification,{CAT},0'
    )
    source = read(tmp_path, human=human, image_lists=images(A, B).replace("\n", "\r\n"))
    assert named(source) == {A: ([DOG], [], []), B: ([], [CAT], [])}


def test_columns_may_stand_in_any_order_with_others_between(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        human=f"Confidence,Extra,LabelName,ImageID,Source\n1,x,{DOG},{A},verification\n",
        image_lists=images(A),
    )
    assert named(source) == {A: ([DOG], [], [])}


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n"])
def test_classes_may_be_descriptions_with_or_without_a_header(tmp_path: Path, header: str) -> None:
    classes = f'{header}{TREE},Tree\n{DOG},"Dog, ""puppy"""\n{CAT},Tree\n'
    source = read(tmp_path, classes=classes, human=labels(f"{A},verification,{DOG},1"), image_lists=images(A))
    names = {TREE: "Tree", DOG: 'Dog, "puppy"', CAT: "Tree"}
    assert [(entry.id, entry.name) for entry in source.classes] == sorted(names.items())


def test_names_come_from_the_descriptions_and_a_class_without_one_is_named_by_its_mid(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        classes=f"{TREE}\n{DOG}\n",
        descriptions=f"LabelName,DisplayName\n{DOG},Dog\n{CAT},Cat\n",
        human=labels(f"{A},verification,{DOG},1"),
        image_lists=images(A),
    )
    assert {entry.id: entry.name for entry in source.classes} == {TREE: TREE, DOG: "Dog"}


HIERARCHY = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [
        {"LabelName": TREE},
        {"LabelName": PET, "Subcategory": [{"LabelName": DOG, "Part": [{"LabelName": WHEEL}]}, {"LabelName": CAT}]},
    ],
}


def test_presence_rises_and_absence_sinks_along_kinds_and_parts_imply_nothing(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        classes=f"{MIDS}{WHEEL}\n/m/0bl9f\n",
        hierarchy=json.dumps(HIERARCHY),
        human=labels(
            f"{A},verification,{DOG},1",
            f"{B},verification,{PET},0",
            f"{C},verification,{WHEEL},1",
            "0000000000000000,verification,/m/0bl9f,0",
        ),
        machine=labels(f"{A},machine,{PET},0.9", f"{A},machine,{CAT},0.9"),
        image_lists=images(A, B, C, "0" * 16),
    )
    assert named(source) == {
        A: (sorted([DOG, PET]), [], [CAT]),
        B: ([], sorted([PET, DOG, CAT]), []),
        C: ([WHEEL], [], []),
        "0" * 16: ([], ["/m/0bl9f"], []),
    }
    assert source.arguments["implied"] == {"contradicted": 0, "negatives": 2, "positives": 1}
    assert source.arguments["dropped"] == {"machine_judged_by_people": 1}


def test_what_is_verified_stands_against_what_is_implied(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        hierarchy=json.dumps(HIERARCHY),
        human=labels(f"{A},verification,{DOG},1", f"{A},verification,{PET},0"),
        image_lists=images(A),
    )
    assert named(source) == {A: ([DOG], sorted([CAT, PET]), [])}
    assert source.arguments["implied"] == {"contradicted": 2, "negatives": 1, "positives": 0}


@pytest.mark.parametrize(
    ("hierarchy", "says"),
    [
        ("{", "not JSON"),
        ("[]", "the root has no LabelName"),
        ('{"name": "Entity", "children": []}', "the root has no LabelName"),
        ('{"LabelName": "/m/0", "Subcategory": {}}', "Subcategory of /m/0 is no list"),
        ('{"LabelName": "/m/0", "Part": [{"Subcategory": []}]}', "an entry in Part of /m/0 has no LabelName"),
        (
            '{"LabelName": "/m/0", "Subcategory": [{"LabelName": "/m/1", "Subcategory": [{"LabelName": "/m/1"}]}]}',
            "a circle: /m/1 in /m/1",
        ),
    ],
)
def test_what_is_no_hierarchy_is_refused(tmp_path: Path, hierarchy: str, says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        read(tmp_path, hierarchy=hierarchy, human=labels(f"{A},verification,{DOG},1"), image_lists=images(A))


GOOD = f"{A},verification,{DOG},1"


@pytest.mark.parametrize(
    ("option", "content", "says", "place"),
    [
        ("human", "", "an empty file", "line 1"),
        ("human", LABEL_HEADER, "no row of data", "line 1"),
        ("human", "ImageID,Source,LabelName\n" + GOOD, "columns ImageID, Source, LabelName", "line 1"),
        ("human", "ImageID,ImageID,Source,LabelName,Confidence\n" + GOOD, "columns ImageID, ImageID", "line 1"),
        ("human", "\x1f\x8b\x08\x00binary", "columns", "line 1"),
        ("human", labels(GOOD, f"{A},verification,{DOG}"), "3 cells", "line 3"),
        ("human", labels(GOOD, f'{A},verification,"{DOG},1', GOOD), "does not read as CSV", "line 3"),
        ("human", labels(GOOD, f'{A},"verification"s,{DOG},1', GOOD), "does not read as CSV", "line 3"),
        ("human", labels(GOOD, "", f"{A[:15]},verification,{DOG},1"), f"image id {A[:15]!r}", "line 4"),
        ("human", labels(GOOD, f"{A.upper()},verification,{DOG},1"), f"image id {A.upper()!r}", "line 3"),
        ("human", labels(GOOD, f"1.2345E+15{A[:6]},verification,{DOG},1"), "image id '1.2345E+15", "line 3"),
        ("human", labels(GOOD, f",verification,{DOG},1"), "image id ''", "line 3"),
        ("human", labels(GOOD, f"{A},machine,{DOG},1"), "source 'machine'", "line 3"),
        ("human", labels(GOOD, f"{A},,{DOG},1"), "source ''", "line 3"),
        ("human", labels(GOOD, f"{A},verification,Dog,1"), "class 'Dog'", "line 3"),
        ("human", labels(GOOD, f"{A},verification,,1"), "class ''", "line 3"),
        ("human", labels(GOOD, f"{A},verification,{DOG},0.9"), "confidence '0.9'", "line 3"),
        ("human", labels(GOOD, f"{A},verification,{DOG},-1"), "confidence '-1'", "line 3"),
        ("human", labels(GOOD, f"{A},verification,{DOG},"), "confidence ''", "line 3"),
        ("human", labels(GOOD, f"{A},verification,{DOG},nan"), "confidence 'nan'", "line 3"),
        ("human", labels(GOOD, f"{A},verification,{DOG},yes"), "confidence 'yes'", "line 3"),
        ("human", labels(GOOD).encode() + b"\xff\n", "not UTF-8", "line 3"),
        ("machine", labels(f"{A},machine,{DOG},1.01"), "confidence '1.01'", "line 2"),
        ("machine", labels(f"{A},verification,{DOG},1"), "source 'verification'", "line 2"),
        ("boxes", BOX_HEADER + f"{A},machine,{DOG},1,0,1,0,1,0,0,0,0,0\n", "source 'machine'", "line 2"),
        ("image_lists", images(A, A), f"image {A} again, listed in image_lists.csv, line 2", "line 3"),
        ("image_lists", images(A, subset="trian"), "subset 'trian'", "line 2"),
        ("image_lists", IMAGE_HEADER + image_row(A, rotation="45.0"), "rotation '45.0'", "line 2"),
        ("image_lists", IMAGE_HEADER + image_row(A, rotation="left"), "rotation 'left'", "line 2"),
        (
            "image_lists",
            images(A) + image_row(B, title='never "closed').replace('closed"', "closed"),
            "not read",
            "line 3",
        ),
        ("classes", "", "no class", "line 1"),
        ("classes", f"{DOG}\nDog\n", "class 'Dog'", "line 2"),
        ("classes", f"{DOG},Dog\n\n{DOG},Puppy\n", f"class {DOG!r} again", "line 3"),
        ("classes", f"{DOG},Dog, puppy\n", "3 cells", "line 1"),
        ("classes", f'{DOG},"Dog\n', "does not read as CSV", "line 1"),
    ],
)
def test_faults_are_named_by_file_and_line(
    tmp_path: Path, option: str, content: str | bytes, says: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, Any] = {"human": labels(GOOD), "image_lists": images(A)} | {option: content}
    for num_bytes in (csv_blocks.BLOCK_BYTES, 40):
        monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", num_bytes)
        with pytest.raises(DataError) as caught:
            read(tmp_path, **files)
        assert says in caught.value.found
        assert caught.value.where == f"{tmp_path / option}.csv, {place}"


def test_the_first_wrong_row_is_named_among_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [GOOD] * 1000
    rows[700], rows[900] = f"{A},verification,{DOG},2", "x"
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 600)
    with pytest.raises(DataError, match="confidence '2'") as caught:
        read(tmp_path, human=labels(*rows), image_lists=images(A))
    assert caught.value.where.endswith("line 702")


def test_a_quote_that_never_closes_ends_the_reading_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 200)
    monkeypatch.setattr(csv_blocks, "_MAX_ROW_BYTES", 1000)
    rows = [GOOD] * 500
    rows[20] = f'{A},verification,"{DOG},1'
    (path,) = write(tmp_path, "human", labels(*rows))
    file = csv_blocks.CsvFile(path, ("ImageID",), what="the file", option="human")
    with pytest.raises(DataError, match="does not read as CSV") as caught:
        list(file.map(lambda block: block.line))
    assert caught.value.where == f"{path}, line 22"
    assert file.sha256 == hashlib.sha256(labels(*rows).encode()[:2000]).hexdigest()


def test_a_missing_file_is_named_with_its_option(tmp_path: Path) -> None:
    for option in ("human", "machine", "boxes", "image_lists", "classes", "descriptions", "hierarchy"):
        files: dict[str, Any] = {"human": labels(GOOD), "image_lists": images(A)}
        absent = str(tmp_path / "absent.csv")
        with pytest.raises(StorageError, match=r"absent\.csv") as caught:
            read(
                tmp_path,
                **files | {option: absent if option in ("classes", "descriptions", "hierarchy") else (absent,)},
            )
        assert f"`{option}`" in caught.value.next_step


def test_a_set_without_any_label_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="human_image_not_listed") as caught:
        read(tmp_path, human=labels(GOOD), image_lists=images(B))
    assert "no label on any of 1 images" in caught.value.found


def test_arguments_name_contents_and_not_places(tmp_path: Path) -> None:
    train, test = labels(GOOD), labels(f"{B},verification,{CAT},0")
    files = {"image_lists": images(A, B), "classes": MIDS}
    (tmp_path / "x").mkdir()
    first, second = read(tmp_path, human=[train, test], **files), read(tmp_path / "x", human=[test, train], **files)
    assert first.arguments == second.arguments
    digest = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    both = sorted(hashlib.sha256(text.encode()).hexdigest() for text in (train, test))
    assert first.arguments["sha256"] == {
        "human": both, "image_lists": [digest["image_lists"]], "classes": digest["classes"]
    }  # fmt: skip
    assert json.loads(json.dumps(first.arguments)) == first.arguments
    assert str(tmp_path) not in json.dumps(first.arguments)


def test_a_pattern_says_where_the_images_lie(tmp_path: Path) -> None:
    files = {"human": labels(GOOD), "image_lists": images(A, subset="val")}
    assert read(tmp_path, **files, image_pattern="all/{id}.jpg").records.row(0).image == f"all/{A}.jpg"
    assert read(tmp_path, **files, image_pattern="{id}_{split}.JPEG").records.row(0).image == f"{A}_validation.JPEG"


@pytest.mark.parametrize(
    "pattern",
    ["x.jpg", "{id}{id}.jpg", "/{id}.jpg", "../{id}.jpg", "{id}", "{name}/{id}.jpg", "a//{id}.jpg", "s3://{id}.jpg"],
)
def test_a_pattern_that_names_no_path_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError):
        OpenImagesSettings(images="i", classes="c", human=("h",), image_pattern=pattern)


def test_a_source_needs_a_label_file() -> None:
    with pytest.raises(ValidationError, match="human, machine and boxes"):
        OpenImagesSettings(images="i", classes="c", image_lists=("l",))


def test_several_files_are_joined_by_commas_in_an_option() -> None:
    settings = OpenImagesSettings.model_validate({"images": "i", "classes": "c", "human": "a.csv,b.csv"})
    assert settings.human == ("a.csv", "b.csv")


def slow_labels(
    human: list[tuple[str, str, str, int]],
    machine: list[tuple[str, str, float]],
    parents: dict[str, set[str]],
    listed: list[str],
    mids: list[str],
) -> dict[str, tuple[list[str], list[str], list[tuple[str, float]]]]:
    """The rules, label by label."""

    def above(mid: str) -> set[str]:
        return set().union(*({parent} | above(parent) for parent in parents.get(mid, set())))

    said: dict[tuple[str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for image, source, mid, value in human:
        said[image, mid][source].add(value)
    verdicts = {pair: by["verification"] or by["crowdsource-verification"] for pair, by in said.items()}
    found = {}
    for image in listed:
        known = {mid: next(iter(verdicts[image, mid])) for mid in mids if len(verdicts.get((image, mid), ())) == 1}
        rises = {higher for mid, value in known.items() if value for higher in above(mid)}
        sinks = {mid for mid in mids if any(known.get(higher) == 0 for higher in above(mid))}
        labels = {mid: 1 for mid in rises - sinks - known.keys() if mid in mids}
        labels |= {mid: 0 for mid in sinks - rises - known.keys()} | known
        claims: dict[str, float] = {}
        for claimed, mid, confidence in machine:
            if claimed == image and mid in mids and (image, mid) not in said and mid not in labels:
                claims[mid] = max(confidence, claims.get(mid, 0.0))
        present, absent = (sorted(mid for mid in labels if labels[mid] == value) for value in (1, 0))
        found[image] = (present, absent, sorted(claims.items()))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_files_give_what_the_rules_give_label_by_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    every = [f"/m/0{number:02d}" for number in range(12)]
    mids = sorted(chance.sample(every, 9))
    listed = [f"{chance.getrandbits(64):016x}" for _ in range(15)]
    strangers = [f"{chance.getrandbits(64):016x}" for _ in range(3)]
    parents = {
        mid: set(chance.sample(every[:place], min(place, chance.randrange(3)))) for place, mid in enumerate(every)
    }
    sources = ("verification", "crowdsource-verification")
    human = [
        (chance.choice(listed + strangers), chance.choice(sources), chance.choice(every), chance.randrange(2))
        for _ in range(120)
    ]
    machine = [(chance.choice(listed), chance.choice(every), chance.randrange(5, 11) / 10) for _ in range(120)]
    nested = [
        {"LabelName": mid, "Subcategory": [{"LabelName": m} for m in every if mid in parents[m]]} for mid in every
    ]
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 500)
    monkeypatch.setattr(label_entries, "_WINDOW_ROWS", 4)
    monkeypatch.setattr(label_entries, "_GROWTH", 7)
    source = read(
        tmp_path,
        classes="".join(f"{mid}\n" for mid in chance.sample(mids, 9)),
        hierarchy=json.dumps({"LabelName": "/m/root", "Subcategory": nested}),
        human=labels(*(f"{image},{source},{mid},{value}" for image, source, mid, value in human)),
        machine=labels(*(f"{image},machine,{mid},{confidence}" for image, mid, confidence in machine)),
        image_lists=images(*listed),
        unlabelled="keep",
    )
    expected = slow_labels(human, machine, parents, listed, mids)
    assert list(named(source)) == listed
    for place, image in enumerate(listed):
        record = source.records.row(place)
        assert named(source)[image][:2] == expected[image][:2]
        claims = [(mids[column], value) for column, value in zip(record.machine, record.confidences, strict=True)]
        assert claims == [(mid, float(np.float16(value))) for mid, value in expected[image][2]]
    check_counts(source)


def check_counts(source: Source) -> None:
    """Every row read is a label or was dropped for one reason."""
    told = source.arguments
    dropped: dict[str, int] = defaultdict(int)
    rows = {reason: count for reason, count in told["dropped"].items() if reason != "image_without_label"}
    for reason, count in rows.items():
        dropped["machine" if reason.startswith("machine") else "verified"] += count
    verified = told["labels"]["positives"] + told["labels"]["negatives"]
    implied = told["implied"].get("positives", 0) + told["implied"].get("negatives", 0)
    assert told["rows"]["human"] == verified - implied + dropped["verified"]
    assert told["rows"].get("machine", 0) == told["labels"]["machine"] + dropped["machine"]


needs_metadata = pytest.mark.skipif(
    not METADATA.is_dir(), reason=f"no metadata at {METADATA}; set MLPL_TEST_DATA to the folder that holds meta"
)


@needs_metadata
def test_the_published_hierarchy_is_read_as_a_graph_by_mid() -> None:
    from shards.sources.hierarchy import read_hierarchy

    hierarchy = read_hierarchy(str(METADATA / "bbox_labels_600_hierarchy.json"))
    edges = [(mid, parent) for mid, parents in hierarchy.parents.items() for parent in parents]
    nodes = {mid for edge in edges for mid in edge} | set(hierarchy.wholes)
    assert hierarchy.root == "/m/0bl9f"
    assert len(nodes) == 602
    assert len(edges) == 647
    assert sum(hierarchy.root in parents for parents in hierarchy.parents.values()) == 90
    assert sum(len(parents) > 1 for parents in hierarchy.parents.values()) == 45
    with open(METADATA / "hierarchy_edges.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert set(edges) == {(row["child_mid"], row["parent_mid"]) for row in rows if row["relation"] == "Subcategory"}
    name_of = {row[f"{side}_mid"]: row[side] for row in rows for side in ("child", "parent")}
    mids = sorted(nodes)
    closure = hierarchy.closure(mids)
    of_teddy = {
        name_of[mids[column]]
        for place, mid in enumerate(mids)
        if name_of[mid] == "Teddy bear"
        for column in closure.ancestors.row(place)
    }
    assert of_teddy == {"Toy", "Bear", "Carnivore", "Mammal", "Animal"}
    assert closure.ancestors.ascends()
    assert closure.descendants.ascends()
    assert len(closure.ancestors.values) == len(closure.descendants.values)


@needs_metadata
def test_the_published_descriptions_and_label_rows_are_read(tmp_path: Path) -> None:
    sample = METADATA / "human_imagelabels_sample.csv"
    settings = OpenImagesSettings(
        images="images",
        classes=str(METADATA / "oidv6-class-descriptions.csv"),
        human=(str(sample),),
        image_lists=(write(tmp_path, "image_lists", [images("000002b66c9c498e")])),
    )
    source = read_openimages(settings)
    names = {entry.id: entry.name for entry in source.classes}
    assert len(names) == 19_994
    assert names["/m/02wvth"] == 'Fiat 500 "topolino"'
    assert len(set(names.values())) == len(names) - 12
    assert source.arguments["rows"]["human"] == 4
    (found,) = named(source).values()
    assert found == (["/m/014sv8"], ["/m/014j1m", "/m/01599", "/m/015p6"], [])


@needs_metadata
def test_class_lists_of_the_first_releases_are_read(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        classes=(METADATA / "v1v3-dict.csv").read_text(),
        human=labels("000002b66c9c498e,human,/m/01g317,1"),
        image_lists=images("000002b66c9c498e"),
    )
    assert len(source.classes) == 7_881


def test_a_changed_byte_is_read_or_refused_by_a_typed_error(tmp_path: Path) -> None:
    chance = random.Random(3)
    content = labels(GOOD, f"{B},verification,{CAT},0").encode()
    outcomes = set()
    for _ in range(150):
        place, value = chance.randrange(len(content)), chance.choice(b'",\n\r0aZ\xff\x00')
        changed = content[:place] + bytes([value]) + content[place + 1 :]
        try:
            check_counts(read(tmp_path, human=changed, image_lists=images(A, B)))
            outcomes.add("read")
        except MlplError as error:
            outcomes.add(type(error).__name__)
    assert outcomes == {"read", "DataError"}
