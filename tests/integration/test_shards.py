"""Claims about packed data sets as they lie on disk and in a bucket: built, read by others, verified, refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from dist_mlpl import storage
from dist_mlpl.data.manifest import load_manifest, write_manifest
from dist_mlpl.data.shard_index import ClassLists, ShardIndex, encode_index, read_index
from dist_mlpl.errors import ConfigError, DataError, ManifestError
from dist_mlpl.labels import dense_targets
from shards.build import build
from shards.pack import packing_order
from shards.sources.base import Record, Records, Source
from shards.sources.table import read_table
from shards.verify import VerifyReport, verify, verify_shard
from tests.support.images import bomb, tiny_jpeg, truncated, undecodable
from tests.support.packing import (
    CLASS_NAMES,
    NAMES,
    TARGET,
    contents,
    flip_byte,
    packed,
    records_at,
    source_at,
    write_inputs,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs")


def test_shards_are_byte_identical_on_every_run_and_for_any_number_of_workers(inputs: Path, tmp_path: Path) -> None:
    runs = [contents(packed(inputs, tmp_path / f"out{run}", workers=w).manifest.url) for run, w in enumerate((1, 2, 4))]
    assert len(runs[0]) > 2 * 3
    assert "manifest.json" in runs[0]
    assert all(run == runs[0] for run in runs[1:])


def test_input_and_output_in_a_bucket_give_the_same_bytes_as_on_disk(
    inputs: Path, tmp_path: Path, s3_bucket: str
) -> None:
    for path in storage.list_files(str(inputs)):
        storage.upload(inputs / path, storage.join(s3_bucket, "in", path))
    remote = build(
        source_at(storage.join(s3_bucket, "in")),
        storage.join(s3_bucket, "out"),
        target_shard_bytes=TARGET,
        workers=2,
        decode=False,
    )
    local = packed(inputs, tmp_path / "out")
    assert contents(remote.manifest.url) == contents(local.manifest.url)
    assert remote.manifest.digest == local.manifest.digest
    assert verify(remote.manifest.url, workers=1).faults == ()


def test_the_seed_orders_samples_and_nothing_else(inputs: Path, tmp_path: Path) -> None:
    one, two = (packed(inputs, tmp_path / str(seed), seed=seed).manifest for seed in (0, 1))
    keys = []
    for manifest in (one, two):
        indexes = [read_index(manifest, entry) for entry in manifest.split("train").shards]
        keys.append([key for index in indexes for key in index.keys.to_pylist()])
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])


def test_samples_lie_in_packing_order_with_the_row_they_came_from(inputs: Path, tmp_path: Path) -> None:
    manifest = packed(inputs, tmp_path / "out", seed=3).manifest
    for split in ("train", "val"):
        rows = np.array([i for i in range(30) if (i % 5 == 0) == (split == "val")])
        found = np.concatenate([read_index(manifest, entry).source_rows for entry in manifest.split(split).shards])
        np.testing.assert_array_equal(found, rows[packing_order(3, split, rows)])


def test_the_webdataset_library_reads_the_shards_as_they_are(inputs: Path, tmp_path: Path) -> None:
    manifest = packed(inputs, tmp_path / "out").manifest
    seen = {}
    for split in manifest.splits.values():
        urls = [manifest.shard_url(entry) for entry in split.shards]
        for sample in wds.WebDataset(urls, shardshuffle=False):
            seen[sample["__key__"]] = (sample["jpg"], json.loads(sample["json"]))
    assert len(seen) == len(NAMES)
    for row, record in enumerate(records_at(inputs)):
        image, labels = seen[record.key]
        assert image == (inputs / "images" / record.image).read_bytes()
        assert labels == {
            "key": record.key,
            "positives": [CLASS_NAMES[c] for c in record.positives],
            "negatives": [CLASS_NAMES[c] for c in record.negatives],
            "source": {"image": record.image, "row": row},
        }


def test_the_index_finds_every_image_and_its_labels(inputs: Path, tmp_path: Path) -> None:
    manifest = packed(inputs, tmp_path / "out").manifest
    records = records_at(inputs)
    for split in manifest.splits.values():
        for entry in split.shards:
            index = read_index(manifest, entry)
            found = [records[int(row)] for row in index.source_rows]
            assert index.keys.to_pylist() == [record.key for record in found]
            for row, record in enumerate(found):
                start, end = int(index.offsets[row]), int(index.offsets[row] + index.num_bytes[row])
                image = storage.read_bytes(manifest.shard_url(entry), start, end)
                assert image == (inputs / "images" / record.image).read_bytes()
            lists = [[np.array(getattr(r, side), dtype=int) for r in found] for side in ("positives", "negatives")]
            oracle = dense_targets(*lists, num_classes=5, unlisted="unknown")
            rows = np.arange(len(found))
            np.testing.assert_array_equal(index.targets(rows, manifest.num_classes, manifest.unlisted), oracle)


def test_tars_are_ustar_without_times_owners_or_folders(inputs: Path, tmp_path: Path) -> None:
    manifest = packed(inputs, tmp_path / "out").manifest
    path = manifest.shard_url(manifest.split("train").shards[0])
    assert Path(path).read_bytes()[257:265] == b"ustar\x0000"
    with tarfile.open(path) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isfile()) for m in tar} == {
            (0, 0, 0, "", "", 0o644, True)
        }


def test_the_manifest_says_what_is_there(inputs: Path, tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    summary = packed(inputs, tmp_path / "out", on_progress=lambda *step: told.append(step))
    manifest = summary.manifest
    assert load_manifest(str(tmp_path / "out")) == manifest
    assert not summary.was_complete
    assert manifest.class_ids == tuple(CLASS_NAMES)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"val": 6, "train": 24}
    assert manifest.skipped == {}
    assert (manifest.packing.seed, manifest.packing.target_shard_bytes) == (0, TARGET)
    for entry in manifest.split("train").shards:
        content = storage.read_bytes(manifest.shard_url(entry))
        assert (len(content), storage.sha256_of_bytes(content)) == (entry.num_bytes, entry.sha256)
    assert ("looking up images", 30, 30) in told
    total = sum(split.num_bytes for split in manifest.splits.values())
    assert [step for step in told if step[0] == "packing"][-1] == ("packing", 30, 30, total)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.is_file()] == []


@pytest.mark.parametrize("damage", ["missing tar", "short tar", "missing index"])
def test_the_same_inputs_again_are_found_complete_and_a_shard_that_is_not_whole_is_written_anew(
    inputs: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    packed(inputs, out)
    before = contents(str(out))
    assert packed(inputs, out).was_complete
    path = out / ("train-000000.arrow" if damage == "missing index" else "train-000000.tar")
    content = path.read_bytes()
    path.unlink()
    if damage == "short tar":
        path.write_bytes(content[:-512])
    assert not packed(inputs, out).was_complete
    assert contents(str(out)) == before
    assert sorted(path.name for path in out.iterdir()) == sorted(before)


@pytest.mark.parametrize("other", ["image", "labels", "seed", "target"])
def test_a_folder_that_holds_another_data_set_is_refused_untouched(inputs: Path, tmp_path: Path, other: str) -> None:
    out = tmp_path / "out"
    packed(inputs, out)
    before = contents(str(out))
    options = {"seed": {"seed": 1}, "target": {"target_shard_bytes": TARGET + 1}}.get(other, {})
    if other == "image":
        (inputs / "images" / NAMES[4]).write_bytes(tiny_jpeg(99))
    if other == "labels":
        labels = inputs / "labels.csv"
        labels.write_text(labels.read_text().replace("sky", "dog", 1))
    with pytest.raises(ManifestError, match="another data set"):
        packed(inputs, out, **options)
    assert contents(str(out)) == before


def damage_inputs(inputs: Path) -> None:
    images = inputs / "images"
    (images / NAMES[1]).write_bytes(b"")
    (images / NAMES[2]).write_bytes(truncated(tiny_jpeg(2, height=64, width=64)))
    (images / NAMES[3]).write_bytes(b"\x89PNG\r\n\x1a\n")
    (images / NAMES[4]).unlink()
    (images / NAMES[6]).write_bytes(undecodable(tiny_jpeg(6)))
    (images / NAMES[8]).write_bytes(bomb(tiny_jpeg(8)))


SKIPPED = [
    [NAMES[1], "empty file"],
    [NAMES[2], "truncated JPEG"],
    [NAMES[3], "not a JPEG"],
    [NAMES[4], "missing file"],
    [NAMES[6], "undecodable JPEG"],
    [NAMES[8], "too many pixels"],
]


def listed(folder: Path) -> list[list[str]]:
    with open(folder / "skipped.csv", newline="") as file:
        return list(csv.reader(file))


def test_images_known_to_be_missing_or_empty_stop_the_build_before_anything_else_is_written(
    inputs: Path, tmp_path: Path
) -> None:
    damage_inputs(inputs)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="2 of 30 images cannot be packed") as caught:
        packed(inputs, out)
    assert caught.value.exit_code == 3
    assert [path.name for path in out.iterdir()] == ["skipped.csv"]
    assert listed(out) == [["image", "reason"], SKIPPED[0], SKIPPED[3]]


def test_unfit_images_stop_the_build_as_soon_as_they_are_too_many_and_a_higher_limit_lets_it_go_on(
    inputs: Path, tmp_path: Path
) -> None:
    damage_inputs(inputs)
    out, whole = tmp_path / "out", tmp_path / "whole"
    with pytest.raises(DataError, match=r"[3456] of 30 images cannot be packed"):
        packed(inputs, out, decode=True, max_bad_fraction=0.07)
    assert not (out / "manifest.json").exists()
    assert all(row in SKIPPED for row in listed(out)[1:])
    kept = [path.name for path in out.glob("*.tar")]
    packed(inputs, whole, decode=True, max_bad_fraction=0.2)
    packed(inputs, out, decode=True, max_bad_fraction=0.2)
    assert contents(str(out)) == contents(str(whole))
    assert set(kept) <= contents(str(out)).keys()


def test_below_the_allowed_fraction_unfit_images_are_left_out_listed_and_counted(inputs: Path, tmp_path: Path) -> None:
    damage_inputs(inputs)
    manifest = packed(inputs, tmp_path / "out", decode=True, max_bad_fraction=0.2).manifest
    assert manifest.skipped == dict.fromkeys(sorted(reason for _, reason in SKIPPED), 1)
    assert listed(tmp_path / "out") == [["image", "reason"], *SKIPPED]
    indexes = [read_index(manifest, entry) for split in manifest.splits.values() for entry in split.shards]
    rows = sorted(int(row) for index in indexes for row in index.source_rows)
    assert rows == [row for row in range(30) if row not in (1, 2, 3, 4, 6, 8)]
    assert verify(manifest.url, decode=True, workers=1).faults == ()


def test_a_list_of_skipped_images_goes_when_the_inputs_are_repaired(inputs: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "out", inputs / "images" / NAMES[1]
    whole = image.read_bytes()
    image.write_bytes(b"")
    with pytest.raises(DataError):
        packed(inputs, out)
    image.write_bytes(whole)
    packed(inputs, out)
    assert not (out / "skipped.csv").exists()


def test_a_split_without_a_readable_image_is_refused(inputs: Path, tmp_path: Path) -> None:
    for name in NAMES[::5]:
        (inputs / "images" / name).unlink()
    with pytest.raises(DataError, match="an image that can be packed in every split"):
        packed(inputs, tmp_path / "out", max_bad_fraction=1.0)


def test_a_split_whose_images_all_turn_out_to_be_unfit_is_refused(inputs: Path, tmp_path: Path) -> None:
    for name in NAMES[::5]:
        (inputs / "images" / name).write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"6 of 30 (.|\n)* in every split"):
        packed(inputs, tmp_path / "out", max_bad_fraction=1.0)


def test_a_shard_whose_images_are_all_unfit_is_not_there(inputs: Path, tmp_path: Path) -> None:
    packed(inputs, tmp_path / "whole", target_shard_bytes=1)  # a shard for each image
    (inputs / "images" / NAMES[1]).write_bytes(b"GIF89a")
    manifest = packed(inputs, tmp_path / "out", target_shard_bytes=1, max_bad_fraction=0.1).manifest
    assert len(manifest.split("train").shards) == 23
    assert verify(manifest.url, workers=1).faults == ()


@pytest.mark.parametrize("change", ["another size", "vanished"])
def test_an_image_that_changes_while_the_set_is_packed_stops_the_build(
    inputs: Path, tmp_path: Path, change: str
) -> None:
    path = inputs / "images" / NAMES[7]

    def meddle(doing: str, done: int, total: int, num_bytes: int = 0) -> None:
        if (doing, done) == ("looking up images", total):
            path.unlink() if change == "vanished" else path.write_bytes(tiny_jpeg(77))

    with pytest.raises(DataError, match=r"changed|vanished"):
        packed(inputs, tmp_path / "out", on_progress=meddle)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": "x.jpeg"}, "also that of"),
        ({"image": ""}, "image ''"),
        ({"image": "/y.jpg"}, "image '/y.jpg'"),
        ({"image": "a/../y.jpg"}, "image 'a/../y.jpg'"),
        ({"image": "a//y.jpg"}, "image 'a//y.jpg'"),
        ({"image": "a\\y.jpg"}, "image"),
        ({"image": "s3://b/y.jpg"}, "image 's3"),
        ({"image": "k" * 96}, "key 'kkk"),
        ({"source_row": 0}, "source row"),
        ({"rotation": 45}, "rotation 45"),
        ({"machine": (0,), "confidences": (1.5,)}, "confidence 1.5"),
        ({"machine": (0,)}, "different number"),
        ({"machine": (2,), "confidences": (0.5,)}, "both present and present by machine"),
        ({"split": "../train"}, "split"),
        ({"split": ""}, "split"),
        ({"positives": (1, 0)}, "class columns"),
        ({"positives": (5,)}, "class columns"),
        ({"negatives": (2,)}, "both present and absent"),
    ],
)
def test_records_that_the_format_cannot_hold_are_refused_before_any_image_is_read(
    inputs: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    source = source_at(str(inputs))
    first, second = Record("x.jpg", "train", (), (), 0), Record("y.jpg", "train", (2,), (), 1)
    second = second._replace(**changes)
    broken = Source("test", "nowhere", source.classes, "unknown", {}, Records.of([first, second]))
    with pytest.raises(DataError) as caught:
        build(broken, str(tmp_path / "out"), workers=1)
    assert says in caught.value.found
    assert "different number" in says or repr(second.image) in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"workers": 0}, {"target_shard_bytes": 0}, {"max_bad_fraction": 1.5}])
def test_options_out_of_range_are_config_errors(inputs: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        packed(inputs, tmp_path / "out", **option)


def relist(out: Path, change_index: Callable[[ShardIndex], dict[str, Any]]) -> None:
    """Change the first train index and list its new digest, so that nothing but its content is wrong."""
    manifest = load_manifest(str(out))
    split = manifest.split("train")
    index = read_index(manifest, split.shards[0])
    fields = {name: getattr(index, name) for name in ShardIndex.__slots__}
    content = encode_index(ShardIndex(**{**fields, **change_index(index)}))
    (out / split.shards[0].index).write_bytes(content)
    entry = split.shards[0].model_copy(update={"index_sha256": storage.sha256_of_bytes(content)})
    changed = split.model_copy(update={"shards": (entry, *split.shards[1:])})
    write_manifest(manifest.model_copy(update={"splits": {**manifest.splits, "train": changed}}), str(out))


@pytest.fixture
def out(inputs: Path, tmp_path: Path) -> Iterator[Path]:
    packed(inputs, tmp_path / "out")
    return tmp_path / "out"


def faults_of(out: Path, **options: Any) -> list[tuple[str, str]]:
    report: VerifyReport = verify(str(out), workers=1, **options)
    return [(fault.file, fault.found) for fault in report.faults]


def test_verify_finds_nothing_in_a_whole_set(out: Path) -> None:
    assert faults_of(out, decode=True) == []


def test_verify_finds_a_flipped_byte_in_an_image_and_in_labels(out: Path) -> None:
    index = read_index(manifest := load_manifest(str(out)), manifest.split("train").shards[0])
    flip_byte(out / "train-000000.tar", int(index.offsets[0]))
    found = faults_of(out)
    assert [file for file, _ in found] == ["train-000000.tar"] * 3
    assert found[0][1].startswith("sha256")
    assert [text for _, text in found[1:]] == ["not a JPEG", "another image"]
    flip_byte(out / "train-000000.tar", int(index.offsets[0]))
    content = (out / "train-000000.tar").read_bytes()
    flip_byte(out / "train-000000.tar", content.index(b'"positives":["') + 14)
    assert [text for _, text in faults_of(out)][1].startswith("positives")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.95])
def test_verify_finds_a_truncated_tar(out: Path, kept: float) -> None:
    path = out / "train-000000.tar"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    found = [text for file, text in faults_of(out) if file == path.name]
    assert any(text.endswith("bytes") for text in found)
    assert any(text.startswith("sha256") for text in found)


def test_verify_finds_a_missing_shard_and_a_missing_index_and_one_too_many(out: Path) -> None:
    (out / "train-000000.tar").unlink()
    (out / "val-000000.arrow").unlink()
    (out / "old-000000.tar").write_bytes(b"")
    assert faults_of(out) == [
        ("val-000000.arrow", "no index"),
        ("train-000000.tar", "no such file"),
        ("old-000000.tar", "a file that the manifest lacks"),
    ]


def test_verify_finds_the_index_of_another_shard(out: Path) -> None:
    os.replace(out / "train-000001.arrow", out / "train-000000.arrow")
    assert [file for file, _ in faults_of(out)] == ["train-000000.arrow", "train-000001.arrow"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: {"offsets": index.offsets + np.uint64(1)}, "offset and length"),
        (lambda index: {"num_bytes": index.num_bytes - np.uint32(1)}, "truncated JPEG"),
        (lambda index: {"source_rows": index.source_rows[::-1]}, "source row"),
        (lambda index: {"negatives": ClassLists.of([[]] * index.num_samples)}, "negatives"),
        (lambda index: {"keys": index.keys[::-1]}, "members"),
    ],
)
def test_verify_finds_an_index_that_disagrees_with_its_tar(
    out: Path, change: Callable[[ShardIndex], dict[str, Any]], says: str
) -> None:
    relist(out, change)
    found = faults_of(out)
    assert {file for file, _ in found} == {"train-000000.tar"}
    assert any(text.startswith(says) for _, text in found)
    assert len(found) <= 20


def test_verify_finds_a_wrong_count(out: Path) -> None:
    document = json.loads((out / "manifest.json").read_bytes())
    train = document["splits"]["train"]
    train["shards"][0]["num_samples"] += 1
    (out / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="num_samples"):
        verify(str(out), workers=1)
    train["num_samples"] += 1
    (out / "manifest.json").write_text(json.dumps(document))
    count = train["shards"][0]["num_samples"]
    assert faults_of(out) == [("train-000000.arrow", f"{count - 1} rows")]


def test_any_damaged_byte_of_a_tar_or_index_is_a_fault_and_never_a_crash(out: Path) -> None:
    manifest = load_manifest(str(out))
    entry = manifest.split("train").shards[0]
    random = np.random.default_rng(0)
    for file in (entry.file, entry.index):
        whole = (out / file).read_bytes()
        for _ in range(100):
            start = int(random.integers(len(whole)))
            damaged = bytearray(whole)
            noise = random.integers(0, 256, size=int(random.integers(1, 64)), dtype=np.uint8).tobytes()
            damaged[start : start + len(noise)] = noise[: len(whole) - start]
            (out / file).write_bytes(damaged)
            assert bool(verify_shard(manifest, entry, False)) == (bytes(damaged) != whole)
        (out / file).write_bytes(whole)


def test_machine_labels_and_rotations_go_from_the_source_to_json_index_and_pixels(inputs: Path, tmp_path: Path) -> None:
    plain = records_at(inputs)
    records = [
        record._replace(
            machine=tuple(c for c in range(5) if c not in record.positives + record.negatives),
            confidences=tuple((7 * n + c) % 10 / 10 for c in range(5) if c not in record.positives + record.negatives),
            rotation=90 * (n % 4),
        )
        for n, record in enumerate(plain)
    ]
    source = dataclasses.replace(source_at(str(inputs)), records=Records.of(records))
    manifest = build(source, str(tmp_path / "out"), target_shard_bytes=TARGET, workers=1).manifest
    assert verify(manifest.url, workers=1, decode=True).faults == ()
    for split in manifest.splits.values():
        for entry in split.shards:
            index = read_index(manifest, entry)
            with tarfile.open(manifest.shard_url(entry)) as tar:
                for row, source_row in enumerate(index.source_rows.tolist()):
                    record = records[source_row]
                    labels = json.loads(tar.extractfile(f"{record.key}.json").read())  # type: ignore[union-attr]
                    said = {CLASS_NAMES[c]: x for c, x in zip(record.machine, record.confidences, strict=True)}
                    assert labels["machine"] == said
                    columns, confidences = index.machine_of(row)
                    assert (tuple(columns), confidences.tolist()) == (
                        record.machine, np.array(record.confidences, np.float16).tolist(),
                    )  # fmt: skip
                    image = tar.extractfile(f"{record.key}.jpg").read()  # type: ignore[union-attr]
                    before = (inputs / "images" / record.image).read_bytes()
                    assert (image == before) == (record.rotation == 0)
                    assert size_of(image) == size_of(before)[:: -1 if record.rotation % 180 else 1]


def size_of(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        return image.size


def test_verify_finds_machine_labels_that_differ_from_the_tar(inputs: Path, tmp_path: Path) -> None:
    records = [record._replace(machine=(), confidences=()) for record in records_at(inputs)]
    records[1] = records[1]._replace(positives=(), negatives=(), machine=(0, 4), confidences=(0.5, 0.25))
    source, out = dataclasses.replace(source_at(str(inputs)), records=Records.of(records)), tmp_path / "out"
    build(source, str(out), workers=1, decode=False)
    assert faults_of(out) == []
    relist(out, lambda index: {"confidences": index.confidences[::-1]})
    assert [text for _, text in faults_of(out)] == ["machine {'sky': 0.5, 'house': 0.25} in the tar"]


def test_images_in_other_formats_are_converted_on_request_alone(inputs: Path, tmp_path: Path) -> None:
    for n in (1, 2):
        path = inputs / "images" / NAMES[n]
        with Image.open(path) as image:
            image.save(path, "PNG")
    with pytest.raises(DataError, match="not a JPEG"):
        packed(inputs, tmp_path / "out")
    manifest = packed(inputs, tmp_path / "converted", convert=True).manifest
    assert manifest.packing is not None
    assert manifest.packing.convert
    assert manifest.split("train").num_samples == 24
    assert verify(manifest.url, workers=1, decode=True).faults == ()


def test_resized_sets_say_how_and_their_shards_are_as_large_as_asked(inputs: Path, tmp_path: Path) -> None:
    for n, name in enumerate(NAMES):
        (inputs / "images" / name).write_bytes(tiny_jpeg(n, height=300, width=400))
    manifest = packed(inputs, tmp_path / "out", max_side=64, quality=80, workers=2).manifest
    assert manifest.packing is not None
    assert (manifest.packing.max_side, manifest.packing.quality) == (64, 80)
    assert contents(str(tmp_path / "out")) == contents(
        packed(inputs, tmp_path / "again", max_side=64, quality=80).manifest.url
    )
    for entry in manifest.split("train").shards:
        index = read_index(manifest, entry)
        start, end = int(index.offsets[0]), int(index.offsets[0] + index.num_bytes[0])
        assert size_of(storage.read_bytes(manifest.shard_url(entry), start, end)) == (64, 48)
        assert entry.num_bytes < 2 * TARGET


def test_a_real_data_set_packs_and_verifies(tmp_path: Path) -> None:
    root = (
        Path(os.environ.get("MLPL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "ucm_multilabel"
    )
    if not root.is_dir():
        pytest.skip(f"no data set at {root}; set MLPL_TEST_DATA to the folder that holds ucm_multilabel")
    lines = (root / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([lines[0], *lines[1::20]]) + "\n")
    source = read_table(str(root / "images"), str(tmp_path / "labels.csv"), classes=str(root / "classes.csv"))
    manifest = build(source, str(tmp_path / "out"), target_shard_bytes=1 << 19, workers=1).manifest
    assert manifest.num_classes == 17
    assert manifest.split("train").num_samples == 105
    assert manifest.skipped == {}
    assert len(manifest.split("train").shards) == 4
    assert verify(manifest.url, decode=True, workers=1).faults == ()
