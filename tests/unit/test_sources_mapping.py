"""Claims about changed classes: left out, renamed, merged, reordered; labels against a slow loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.errors import DataError
from shards.sources import mapping as mapping_module
from shards.sources.base import Record, Records, Source
from shards.sources.mapping import map_classes
from tests.support.sources import write_files

pytestmark = pytest.mark.unit

CLASSES = [("/m/1", "cat"), ("/m/2", "dog"), ("/m/3", "bird"), ("/m/4", "cat"), ("/m/5", "fish")]


def source_of(records: list[Record], *, unlisted: Any = "unknown", classes: list[tuple[str, str]] = CLASSES) -> Source:
    entries = tuple(ClassEntry(id=key, name=name) for key, name in classes)
    return Source("test", "/images", entries, unlisted, {"dropped": {"rows": 2}, "a": 1}, Records.of(records))


def mapped(folder: Path, source: Source, rows: str | None, order: str | None = None, **options: Any) -> Source:
    files = {} if rows is None else {"map.csv": "id,new_id,new_name\n" + rows}
    files |= {} if order is None else {"order.txt": order}
    root = write_files(folder, files)
    return map_classes(
        source,
        None if rows is None else f"{root}/map.csv",
        order=None if order is None else f"{root}/order.txt",
        **options,
    )


IMAGE = Record("a.jpg", "val", (0, 2), (1,), 7, (3, 4), (0.5, 0.25), 90)


def test_classes_are_renamed_merged_and_left_out_in_order_of_first_appearance(tmp_path: Path) -> None:
    rows = "bird,/m/3,\n/m/1,pet,a pet\ndog,pet,\n/m/4,,\n/m/5,swimmer,\n"
    source = mapped(tmp_path, source_of([IMAGE]), rows)
    assert [(entry.id, entry.name) for entry in source.classes] == [
        ("/m/3", "bird"), ("pet", "a pet"), ("swimmer", "fish"),
    ]  # fmt: skip
    assert source.records.row(0) == Record("a.jpg", "val", (0, 1), (), 7, (2,), (0.25,), 90)
    assert source.arguments["dropped"] == {"rows": 2, "labels_of_classes_left_out": 1}
    assert source.arguments["a"] == 1
    (told,) = source.arguments["mappings"]
    assert (told["others"], told["classes_before"]) == ("refuse", 5)
    assert len(told["mapping_sha256"]) == 64


def test_a_class_list_chooses_and_orders_classes_by_id_or_by_a_name_of_one(tmp_path: Path) -> None:
    source = mapped(tmp_path, source_of([IMAGE]), None, "fish\n/m/1\n\nbird\n")
    assert [entry.id for entry in source.classes] == ["/m/5", "/m/1", "/m/3"]
    assert source.records.row(0) == Record("a.jpg", "val", (1, 2), (), 7, (0,), (0.25,), 90)
    assert source.arguments["dropped"]["labels_of_classes_left_out"] == 2
    both = mapped(tmp_path, source_of([IMAGE]), "dog,pet,\n/m/1,pet,\n", "bird\npet\n", others="keep")
    assert [(entry.id, entry.name) for entry in both.classes] == [("/m/3", "bird"), ("pet", "pet")]
    assert both.records.row(0).positives == (0, 1)
    assert len(both.arguments["mappings"][0]["order_sha256"]) == 64


def test_classes_without_a_row_are_refused_kept_or_dropped(tmp_path: Path) -> None:
    source = source_of([IMAGE])
    with pytest.raises(DataError, match=r"no row for 4 of 5 classes: '/m/1', '/m/3', '/m/4', '/m/5'"):
        mapped(tmp_path, source, "dog,pet,\n")
    kept = mapped(tmp_path, source, "dog,pet,\n", others="keep")
    assert [entry.id for entry in kept.classes] == ["pet", "/m/1", "/m/3", "/m/4", "/m/5"]
    dropped = mapped(tmp_path, source, "dog,pet,\n", others="drop")
    assert [(entry.id, entry.name) for entry in dropped.classes] == [("pet", "dog")]
    assert dropped.records.row(0) == Record("a.jpg", "val", (), (0,), 7, (), (), 90)
    assert len(dropped.records) == 1


@pytest.mark.parametrize(
    ("rows", "order", "found", "where"),
    [
        ("dogg,a,\n", None, "unknown class 'dogg'", "map.csv, line 2"),
        ("cat,a,\n", None, "class 'cat', a name of several", "map.csv, line 2"),
        ("dog,a,\n/m/2,b,\n", None, "again, mapped in line 2", "map.csv, line 3"),
        ("dog,a,x\nbird,a,y\n", None, "name 'y' of 'a'", "map.csv, line 3"),
        ("dog,a\n", None, "2 cells", "map.csv, line 2"),
        ("dog,,\n", None, "0 classes", "map.csv"),
        ("dog,a,\n", "b\n", "unknown class 'b'", "order.txt, line 1"),
        ("dog,a,\n", "a\n\na\n", "class 'a' again", "order.txt, line 3"),
        ("dog,a,\n", "", "an empty file", "order.txt"),
    ],
)
def test_faulty_files_are_refused_with_their_place(
    tmp_path: Path, rows: str, order: str | None, found: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        mapped(tmp_path, source_of([IMAGE]), rows, order, others="drop")
    assert found in caught.value.found
    assert caught.value.where == f"{tmp_path}/{where}"


def test_two_mappings_are_both_told_and_their_counts_added(tmp_path: Path) -> None:
    once = mapped(tmp_path, source_of([IMAGE]), "dog,,\n", others="keep")
    twice = mapped(tmp_path, once, "bird,,\n", others="keep")
    assert len(twice.arguments["mappings"]) == 2
    assert twice.arguments["dropped"] == {"rows": 2, "labels_of_classes_left_out": 2}


NEW = ["a", "b", "c"]
NUM_OLD = 7


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    codes=st.lists(st.lists(st.integers(-1, 2), min_size=NUM_OLD, max_size=NUM_OLD), max_size=12),
    targets=st.lists(st.sampled_from([*NEW, ""]), min_size=NUM_OLD, max_size=NUM_OLD),
    unlisted=st.sampled_from(["absent", "unknown"]),
    block=st.integers(1, 5),
)
def test_labels_of_merged_classes_equal_a_loop(
    tmp_path_factory: pytest.TempPathFactory, codes: list[list[int]], targets: list[str], unlisted: Any, block: int
) -> None:
    """Codes of images by class: -1 verified absent, 0 not listed, 1 verified present, 2 called present by a machine."""
    if not any(targets):
        targets = ["a", *targets[1:]]
    confidence = [0.125 * (column + 1) for column in range(NUM_OLD)]
    listed = {code: [[c for c, value in enumerate(row) if value == code] for row in codes] for code in (-1, 1, 2)}
    num = len(codes)
    records = Records(
        images=pa.array([f"{row}.jpg" for row in range(num)], pa.string()),
        split_names=("train",),
        splits=np.zeros(num, dtype=np.uint8),
        source_rows=np.arange(num, dtype=np.uint64),
        positives=ClassLists.of(listed[1]),
        negatives=ClassLists.of(listed[-1]),
        machine=ClassLists.of(listed[2]),
        confidences=np.array([confidence[c] for row in listed[2] for c in row], dtype=np.float16),
    )
    entries = tuple(ClassEntry(id=f"old{c}", name=f"old{c}") for c in range(NUM_OLD))
    source = Source("test", "/images", entries, unlisted, {}, records)
    rows = "".join(f"old{c},{target},\n" for c, target in enumerate(targets))
    folder = tmp_path_factory.mktemp("mapping")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping_module, "_BLOCK_ROWS", block)
        found = mapped(folder, source, rows)

    ids = list(dict.fromkeys(filter(None, targets)))
    assert [entry.id for entry in found.classes] == ids
    lost = sum(1 for row in codes for c, value in enumerate(row) if value and not targets[c])
    assert found.arguments["dropped"].get("labels_of_classes_left_out", 0) == lost
    not_shared = 0
    for row, values in enumerate(codes):
        expected = Record(f"{row}.jpg", "train", (), (), row)
        for column, key in enumerate(ids):
            members = [c for c, target in enumerate(targets) if target == key]
            if any(values[c] == 1 for c in members):
                expected = expected._replace(positives=(*expected.positives, column))
                continue
            if all(values[c] == -1 for c in members):
                expected = expected._replace(negatives=(*expected.negatives, column))
            elif unlisted == "unknown":
                not_shared += sum(values[c] == -1 for c in members)
            called = [confidence[c] for c in members if values[c] == 2]
            if called:
                expected = expected._replace(
                    machine=(*expected.machine, column), confidences=(*expected.confidences, max(called))
                )
        assert found.records.row(row) == expected
    assert found.arguments["dropped"].get("negatives_that_merged_classes_do_not_share", 0) == not_shared
    for lists in (found.records.positives, found.records.negatives, found.records.machine):
        assert lists is not None
        assert lists.ascends()
        assert lists.values.dtype == np.uint16
