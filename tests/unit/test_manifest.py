"""Claims about manifest.json and the index beside each shard."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl import storage
from dist_mlpl.data.manifest import (
    ClassEntry,
    Manifest,
    Packing,
    ShardEntry,
    SourceEntry,
    Split,
    classes_digest,
    load_manifest,
    write_manifest,
)
from dist_mlpl.data.shard_index import ClassLists, ShardIndex, decode_index, encode_index, read_index
from dist_mlpl.errors import ManifestError, ShardError
from dist_mlpl.labels import dense_targets

pytestmark = pytest.mark.unit

NUM_CLASSES = 7


def make_manifest(**changes: Any) -> Manifest:
    classes = tuple(ClassEntry(id=f"/m/{i}", name=f"class {i}") for i in range(NUM_CLASSES))
    shards = tuple(
        ShardEntry(
            file=f"train-{i:06d}.tar", index=f"train-{i:06d}.arrow", num_samples=3 + i, num_bytes=10_240, sha256="a",
            index_sha256="b",
        )
        for i in range(2)
    )  # fmt: skip
    fields: dict[str, Any] = {
        "version": "0",
        "classes": classes,
        "classes_sha256": classes_digest(classes),
        "unlisted": "unknown",
        "splits": {"train": Split(num_samples=7, num_bytes=20_480, shards=shards)},
        "source": SourceEntry(name="table", arguments={}, digest="d"),
        "packing": Packing(seed=0, target_shard_bytes=1),
    }
    return Manifest(**{**fields, **changes})


def make_index(positives: list[list[int]], negatives: list[list[int]]) -> ShardIndex:
    n = len(positives)
    return ShardIndex(
        keys=pa.array([f"key {row}" for row in range(n)], pa.string()),
        offsets=np.arange(n, dtype=np.uint64) * 2048 + 512,
        num_bytes=np.arange(n, dtype=np.uint32) + 100,
        source_rows=np.arange(n, dtype=np.uint64)[::-1].copy(),
        positives=ClassLists.of(positives),
        negatives=ClassLists.of(negatives),
    )


def test_a_written_manifest_reads_back_equal_with_the_digest_of_its_bytes(tmp_path: Path) -> None:
    written = write_manifest(make_manifest(skipped={"not a JPEG": 2}), str(tmp_path))
    content = (tmp_path / "manifest.json").read_bytes()
    for url in (str(tmp_path), str(tmp_path) + "/", str(tmp_path / "manifest.json")):
        assert load_manifest(url) == written
    assert written.digest == storage.sha256_of_bytes(content)
    assert written.url == str(tmp_path)
    assert {"url", "digest"}.isdisjoint(json.loads(content))


def test_the_document_has_the_keys_of_the_format(tmp_path: Path) -> None:
    write_manifest(make_manifest(), str(tmp_path))
    document = json.loads((tmp_path / "manifest.json").read_bytes())
    assert list(document) == [
        "format", "version", "classes", "classes_sha256", "unlisted", "group_size_hint", "splits", "source", "packing",
        "skipped",
    ]  # fmt: skip
    assert document["format"] == 1
    assert document["group_size_hint"] == 8


def test_views_of_a_manifest_follow_its_document(tmp_path: Path) -> None:
    manifest = write_manifest(make_manifest(), str(tmp_path))
    entry = manifest.split("train").shards[1]
    assert manifest.num_classes == NUM_CLASSES
    assert manifest.class_ids[2] == "/m/2"
    assert manifest.shard_sizes("train") == [3, 4]
    assert manifest.shard_url(entry) == f"{tmp_path}/train-000001.tar"
    assert manifest.index_url(entry) == f"{tmp_path}/train-000001.arrow"


def test_an_unknown_split_lists_the_valid_ones() -> None:
    with pytest.raises(ManifestError, match="'train'"):
        make_manifest().split("trian")


def test_the_classes_digest_depends_on_ids_and_their_order_alone() -> None:
    one, two = ClassEntry(id="a", name="x"), ClassEntry(id="b", name="y")
    assert classes_digest([one, two]) == classes_digest([ClassEntry(id="a", name="other"), two])
    assert classes_digest([one, two]) != classes_digest([two, one])


def change(path: tuple[str | int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        inner: Any = document
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change(("format",), 2), "format 2"),
        (change(("classes_sha256",), "0"), "classes_sha256"),
        (change(("classes", 0, "id"), "/m/1"), "occurs twice"),
        (change(("splits", "train", "num_samples"), 8), "num_samples is 8"),
        (change(("splits", "train", "num_bytes"), 1), "num_bytes is 1"),
        (change(("splits", "train", "shards", 0, "num_samples"), 4), "num_samples is 7"),
        (change(("splits", "train", "shards", 0, "file"), "train-000001.tar"), "listed twice"),
        (change(("splits", "train", "shards", 0, "file"), "../train-000000.tar"), "file"),
        (change(("splits", "train", "shards", 0, "sha256"), None), "sha256"),
        (change(("unlisted",), "maybe"), "unlisted"),
        (change(("surprise",), 1), "surprise"),
        (change(("classes",), []), "classes"),
    ],
)
def test_a_manifest_that_is_wrong_somewhere_is_refused_by_name(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], says: str
) -> None:
    write_manifest(make_manifest(), str(tmp_path))
    file = tmp_path / "manifest.json"
    document = json.loads(file.read_bytes())
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises(ManifestError) as caught:
        load_manifest(str(tmp_path))
    assert says in caught.value.found
    assert str(file) in caught.value.where


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match="JSON"):
        load_manifest(str(tmp_path))


def test_a_missing_manifest_is_a_manifest_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest"):
        load_manifest(str(tmp_path / "nowhere"))


def test_a_manifest_at_odds_with_itself_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestError):
        write_manifest(make_manifest(classes_sha256="0"), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


columns = st.integers(0, NUM_CLASSES - 1)
label_rows = st.lists(st.tuples(st.sets(columns), st.sets(columns)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(labels=label_rows, data=st.data(), unlisted=st.sampled_from(["absent", "unknown"]))
def test_an_index_round_trips_and_its_targets_equal_a_loop(labels: Any, data: Any, unlisted: Any) -> None:
    positives = [sorted(present) for present, _ in labels]
    negatives = [sorted(absent - present) for present, absent in labels]
    index = make_index(positives, negatives)
    content = encode_index(index)
    assert encode_index(index) == content
    decoded = decode_index(content, "index")
    assert encode_index(decoded) == content
    assert decoded.num_samples == len(labels)
    assert decoded.keys.to_pylist() == [f"key {row}" for row in range(len(labels))]
    for name in ("offsets", "num_bytes", "source_rows"):
        np.testing.assert_array_equal(getattr(decoded, name), getattr(index, name))
        assert getattr(decoded, name).dtype == getattr(index, name).dtype
    for row in range(len(labels)):
        assert decoded.positives_of(row).tolist() == positives[row]
        assert decoded.negatives_of(row).tolist() == negatives[row]
    rows = data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=20)) if labels else []
    oracle = dense_targets(
        [np.array(positives[row], dtype=np.int64) for row in rows],
        [np.array(negatives[row], dtype=np.int64) for row in rows],
        num_classes=NUM_CLASSES,
        unlisted=unlisted,
    )
    targets = decoded.targets(np.array(rows, dtype=np.int64), NUM_CLASSES, unlisted)
    assert targets.dtype == np.int8
    np.testing.assert_array_equal(targets, oracle)


def test_checksums_round_trip_and_an_index_without_them_keeps_its_bytes() -> None:
    index = make_index([[0], [6], []], [[1], [], []])
    assert decode_index(encode_index(index), "index").crc32 is None
    assert "crc32" not in as_table(index).column_names
    checksums = np.array([0, 1, 2**32 - 1], dtype=np.uint32)
    checked = dataclasses.replace(index, crc32=checksums)
    decoded = decode_index(encode_index(checked), "index")
    assert decoded.crc32 is not None
    assert (decoded.crc32.tolist(), decoded.crc32.dtype) == (checksums.tolist(), np.uint32)
    assert as_table(checked).drop_columns(["crc32"]).equals(as_table(index))
    assert encode_index(dataclasses.replace(decoded, crc32=None)) == encode_index(index)


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [([1, 2], pa.int64(), "type int64"), ([1, None], pa.uint32(), "empty cell")],
)
def test_checksums_that_are_wrong_are_refused(values: list[int | None], kind: pa.DataType, says: str) -> None:
    table = as_table(make_index([[1], []], [[], [2]])).append_column("crc32", pa.array(values, kind))
    with pytest.raises(ShardError) as caught:
        decode_index(as_bytes(table), "index")
    assert says in caught.value.found
    assert "crc32" in caught.value.found


@pytest.mark.parametrize("rows", [[3], [-1], [0, 99]])
def test_rows_outside_an_index_are_refused(rows: list[int]) -> None:
    with pytest.raises(ShardError, match="rows in"):
        make_index([[0], [], [1]], [[], [], []]).targets(rows, NUM_CLASSES, "absent")


def as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def as_table(index: ShardIndex) -> pa.Table:
    return pa.ipc.open_file(pa.BufferReader(encode_index(index))).read_all()


def with_column(name: str, values: Any, kind: pa.DataType) -> bytes:
    table = as_table(make_index([[1], [2, 3]], [[0], []]))
    return as_bytes(table.set_column(table.column_names.index(name), name, pa.array(values, kind)))


LISTS = pa.list_(pa.uint16())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not read"),
        (b"ARROW1 but not really", "does not read"),
        (as_bytes(as_table(make_index([[1]], [[]])).drop_columns(["positives"])), "columns key, offset"),
        (with_column("offset", [512, 2560], pa.int32()), "type int32"),
        (with_column("positives", [[3, 2], []], LISTS), "out of order"),
        (with_column("negatives", [[], [4, 4]], LISTS), "out of order"),
        (with_column("negatives", [[], None], LISTS), "empty cell"),
        (with_column("negatives", [[], [None]], LISTS), "empty cell"),
        (with_column("key", ["a", None], pa.string()), "empty cell"),
        (with_column("offset", [2560, 512], pa.uint64()), "do not rise"),
    ],
)
def test_an_index_that_is_wrong_somewhere_is_refused_by_name(content: bytes, says: str) -> None:
    with pytest.raises(ShardError) as caught:
        decode_index(content, "s3://bucket/train-000000.arrow")
    assert says in caught.value.found
    assert caught.value.where == "s3://bucket/train-000000.arrow"


def test_a_damaged_index_is_refused_or_read_and_never_crashes() -> None:
    whole = encode_index(make_index([[1, 2], [], [3]] * 20, [[0], [5], []] * 20))
    random = np.random.default_rng(0)
    refused = 0
    for case in range(2000):
        damaged = bytearray(whole)
        for place in random.integers(len(whole), size=int(random.integers(1, 6))):
            damaged[place] ^= int(random.integers(1, 256))
        if case % 5 == 0:
            del damaged[int(random.integers(len(damaged))) :]
        try:
            decode_index(bytes(damaged), "index")
        except ShardError:
            refused += 1
    assert refused > 400


def test_a_list_may_end_above_the_start_of_the_next_with_empty_lists_between() -> None:
    lists = [[], [5, 6], [], [], [0], []]
    assert ClassLists.of(lists).ascends()
    assert [ClassLists.of(lists).row(row).tolist() for row in range(6)] == lists
    assert not ClassLists.of([[], [6, 5], []]).ascends()


def test_columns_beyond_the_format_and_several_batches_are_read(tmp_path: Path) -> None:
    table = as_table(make_index([[1], [2, 3]], [[0], []]))
    table = table.append_column("sources", pa.array([[1], [1, 1]], pa.list_(pa.uint8())))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
    decoded = decode_index(sink.getvalue().to_pybytes(), "index")
    assert [decoded.positives_of(row).tolist() for row in (0, 1)] == [[1], [2, 3]]
    assert [decoded.negatives_of(row).tolist() for row in (0, 1)] == [[0], []]


def listed(folder: Path, index: ShardIndex, **changes: Any) -> tuple[Manifest, ShardEntry]:
    content = encode_index(index)
    (folder / "train-000000.arrow").write_bytes(content)
    manifest = make_manifest().model_copy(update={"url": str(folder)})
    facts = {"num_samples": index.num_samples, "index_sha256": storage.sha256_of_bytes(content), **changes}
    return manifest, manifest.split("train").shards[0].model_copy(update=facts)


def test_read_index_checks_digest_count_and_classes_against_the_manifest(tmp_path: Path) -> None:
    index = make_index([[0], [6], []], [[1], [], []])
    assert read_index(*listed(tmp_path, index)).positives_of(1).tolist() == [6]
    with pytest.raises(ShardError, match="sha256"):
        read_index(*listed(tmp_path, index, index_sha256="0"))
    with pytest.raises(ShardError, match="3 rows"):
        read_index(*listed(tmp_path, index, num_samples=4))
    with pytest.raises(ShardError, match="class column 7"):
        read_index(*listed(tmp_path, make_index([[7]], [[]])))
    manifest, entry = listed(tmp_path, index)
    (tmp_path / "train-000000.arrow").unlink()
    with pytest.raises(ShardError, match="no index"):
        read_index(manifest, entry)


def test_messages_about_a_manifest_keep_the_secrets_of_its_url() -> None:
    manifest = make_manifest(url="https://me:PASSWORD@host/one?sig=SIGNATURE, s3://bucket/two")
    assert manifest.place == "https://***@host/one?sig=***, s3://bucket/two"
    with pytest.raises(ManifestError) as caught:
        manifest.split("trian")
    assert "PASSWORD" not in str(caught.value)
    assert "SIGNATURE" not in str(caught.value)
    assert "https://***@host/one" in str(caught.value)
