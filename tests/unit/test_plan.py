"""Claims about plans: made from records and file sizes alone, the same for the same, and another for anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dist_mlpl.data.manifest import ClassEntry, Packing
from dist_mlpl.errors import DataError, StorageError
from shards.check import check_records
from shards.images import fit_image
from shards.plan import Plan, image_sizes, input_digest, make_plan
from shards.sources.base import Record, Records, Source
from tests.support.images import tiny_jpeg

pytestmark = pytest.mark.unit

CLASSES = tuple(ClassEntry(id=name, name=name.upper()) for name in ("a", "b", "c"))


def source_of(records: Records, images: str = "nowhere", **changes: Any) -> Source:
    return dataclasses.replace(Source("test", images, CLASSES, "unknown", {"x": 1}, records), **changes)


def records_of(num_records: int, *, machine: bool = True) -> list[Record]:
    random = np.random.default_rng(0)
    return [
        Record(
            image=f"{'xy'[n % 2]}/{n:04d}.jpg",
            split=("train", "val", "test")[int(random.integers(3))],
            positives=(n % 3,),
            negatives=((n + 1) % 3,),
            source_row=2 * n,
            machine=((n + 2) % 3,) if machine and n % 4 == 0 else (),
            confidences=(0.25,) if machine and n % 4 == 0 else (),
            rotation=90 * (n % 4),
        )
        for n in range(num_records)
    ]


def plan_of(folder: Path, sizes: list[int], target: int, **packing: Any) -> Plan:
    """A plan over files of these sizes, -1 for one that is missing."""
    (folder / "images").mkdir(exist_ok=True)
    for n, size in enumerate(sizes):
        if size >= 0:
            (folder / "images" / f"{n:04d}.jpg").write_bytes(bytes(size))
    records = [Record(f"{n:04d}.jpg", "train" if n % 3 else "val", (), (), n) for n in range(len(sizes))]
    source = source_of(Records.of(records), str(folder / "images"))
    return make_plan(source, Packing(seed=1, target_shard_bytes=target, **packing), tell=lambda *_: None)


def test_every_image_that_is_there_is_planned_once_in_its_split_and_the_others_are_named(tmp_path: Path) -> None:
    sizes = [3000, 0, 500, -1, 4000, 10, 10, 2000, 700, -1, 123]
    plan = plan_of(tmp_path, sizes, 6_000)
    planned = [int(row) for shard in plan.shards for row in shard.rows]
    assert sorted(planned) == [row for row, size in enumerate(sizes) if size > 0]
    assert [(row, reason) for row, _, reason in plan.skipped] == [
        (1, "empty file"), (3, "missing file"), (9, "missing file"),
    ]  # fmt: skip
    for shard in plan.shards:
        assert {plan.source.records[int(row)].split for row in shard.rows} == {shard.split}
    assert [shard.stem for shard in plan.shards][:2] == ["val-000000", "val-000001"]  # row 0 is of val


def test_a_plan_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("read_bytes", "open_read", "download"):
        monkeypatch.setattr(f"dist_mlpl.storage.{name}", None)
    assert len(plan_of(tmp_path, [10] * 5, 1).shards) == 5


@pytest.mark.parametrize("quality", [50, 75, 90, 95])
def test_with_resizing_shards_are_planned_for_what_will_be_left_of_large_images(tmp_path: Path, quality: int) -> None:
    packing = Packing(seed=0, target_shard_bytes=1, max_side=256, quality=quality, decode=False)
    made = len(fit_image(tiny_jpeg(0, height=900, width=1200), 0, packing)[0])
    plan = plan_of(tmp_path, [10_000_000] * 40, 400_000, max_side=256, quality=quality)
    assert made < 400_000 * len(plan.shards) / 40 < 60_000  # planned for one; photographs have more in them than this
    assert (
        len(plan_of(tmp_path, [100] * 40, 400_000, max_side=256, quality=quality).shards) == 2
    )  # those stay as they are


CHANGES: dict[str, Callable[[Source], dict[str, Any]]] = {
    "name": lambda source: {"name": "other"},
    "arguments": lambda source: {"arguments": {"x": 2}},
    "class": lambda source: {"classes": (*CLASSES[:2], ClassEntry(id="d", name="C"))},
    "class name": lambda source: {"classes": (*CLASSES[:2], ClassEntry(id="c", name="D"))},
    "unlisted": lambda source: {"unlisted": "absent"},
}
FIELDS: dict[str, Any] = {
    "image": "x/9999.jpg", "split": "test2", "positives": (1, 2), "negatives": (), "source_row": 13, "rotation": 180,
    "machine": (0,), "confidences": (0.5,),
}  # fmt: skip


def test_the_digest_is_another_for_any_change_of_what_the_output_depends_on() -> None:
    records = records_of(12)
    source, sizes = source_of(Records.of(records)), np.arange(12) + 1
    digests = {input_digest(source, sizes)}
    digests |= {input_digest(dataclasses.replace(source, **change(source)), sizes) for change in CHANGES.values()}
    digests.add(input_digest(source, sizes + (np.arange(12) == 5)))
    for field, value in FIELDS.items():
        changed = [record._replace(**{field: value}) if n == 8 else record for n, record in enumerate(records)]
        digests.add(input_digest(source_of(Records.of(changed)), sizes))
    shifted = [record._replace(positives=(0,) if n == 1 else record.positives) for n, record in enumerate(records)]
    digests.add(input_digest(source_of(Records.of(shifted)), sizes))
    assert len(digests) == 1 + len(CHANGES) + 1 + len(FIELDS) + 1


def test_the_digest_knows_neither_where_images_lie_nor_how_the_table_is_stored() -> None:
    records = records_of(12)
    table, sizes = Records.of(records), np.arange(12) + 1
    digest = input_digest(source_of(table), sizes)
    assert input_digest(source_of(table, "s3://elsewhere"), sizes) == digest
    other_order = dataclasses.replace(
        table, split_names=("unused", *table.split_names[::-1]),
        splits=(len(table.split_names) - table.splits).astype(np.uint8),
    )  # fmt: skip
    assert input_digest(source_of(other_order), sizes) == digest
    sliced = dataclasses.replace(table, images=pa.array(["z", *(record.image for record in records)])[1:])
    assert input_digest(source_of(sliced), sizes) == digest


def test_names_that_run_into_each_other_differ() -> None:
    one, other = (
        source_of(Records.of([Record(first, "train", (), (), 0), Record(second, "train", (), (), 1)]))
        for first, second in (("ab", "c"), ("a", "bc"))
    )
    assert input_digest(one, np.ones(2, int)) != input_digest(other, np.ones(2, int))


def test_a_class_in_two_lists_is_found_in_any_row() -> None:
    for row in (0, 1, 77, 199):
        records = [Record(f"{n}.jpg", "train", (0,), (2,), n) for n in range(200)]
        records[row] = records[row]._replace(negatives=(0, 2))
        with pytest.raises(DataError) as caught:
            check_records(source_of(Records.of(records)))
        assert caught.value.found == "a class both present and absent"
        assert f"'{row}.jpg'" in caught.value.where


def test_sizes_are_those_of_files_and_missing_ones_and_folders_are_absent(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"123")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a" / "x.jpg")
    names = pa.array(["a/x.jpg", "a", "empty.jpg", "gone.jpg", "link.jpg", "a/x.jpg/y.jpg"])
    told: list[Any] = []
    found = image_sizes(str(tmp_path), names, lambda *step: told.append(step))
    assert found.tolist() == [3, -1, 0, -1, 3, -1]
    assert told[-1] == ("looking up images", 6, 6)
    assert image_sizes(f"file://{tmp_path}", names, lambda *_: None).tolist() == found.tolist()
    with pytest.raises(StorageError, match="the image folder not found"):
        image_sizes(str(tmp_path / "nowhere"), names, lambda *_: None)
    with pytest.raises(StorageError, match="the image folder not found"):
        image_sizes(str(tmp_path / "empty.jpg"), names, lambda *_: None)
