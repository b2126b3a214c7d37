"""Claims about tars of other people's, indexed where they lie: found, read by headers alone, refused when wrong."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from typer.testing import CliRunner

from dist_mlpl import storage
from dist_mlpl.cli import app
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.shard_index import read_index
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.tar_members import expand_tars, read_classes, split_name
from dist_mlpl.errors import ConfigError, DataError, ManifestError, MlplError, ShardError, StorageError
from dist_mlpl.tools.object_store import EmbeddedS3
from shards.index import index_tars
from shards.scan import READ_AHEAD_BYTES, scan_tar
from shards.verify import verify
from tests.support.images import tiny_jpeg, truncated
from tests.support.proxy import FaultyProxy
from tests.support.runs import run, tiny_config, tiny_shards, write_config
from tests.support.tars import Member, as_json, fake_jpeg, tar_bytes, write_tar

pytestmark = pytest.mark.integration

CLASSES = ["cat", "dog", "emu", "fox"]


@pytest.fixture(autouse=True)
def _usual_storage() -> Iterator[None]:
    yield
    storage.configure_storage()


def sample(key: str, seed: int = 0, labels: bytes | None = None) -> list[Member]:
    content = as_json(labels=[CLASSES[seed % 4]]) if labels is None else labels
    return [(f"{key}.jpg", tiny_jpeg(seed)), (f"{key}.json", content)]


def samples(start: int, stop: int) -> list[Member]:
    return [member for seed in range(start, stop) for member in sample(f"img{seed:04d}", seed)]


def class_list(folder: Path, names: list[str] = CLASSES) -> str:
    path = folder / "classes.csv"
    path.write_text("\n".join(["class", *names]) + "\n")
    return str(path)


def rows_of(manifest: Manifest, split: str) -> list[tuple[str, bytes, list[str], list[str]]]:
    """Key, image, present and absent classes of every sample, as manifest and indexes say."""
    rows = []
    for entry in manifest.split(split).shards:
        table = read_index(manifest, entry)
        for row, key in enumerate(table.keys.to_pylist()):
            start, stop = int(table.offsets[row]), int(table.offsets[row] + table.num_bytes[row])
            image = storage.read_bytes(manifest.shard_url(entry), start, stop)
            sides = (table.positives_of(row), table.negatives_of(row))
            rows.append((key, image, *([manifest.class_ids[column] for column in side] for side in sides)))
    return rows


# What is found


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_points_at_every_image_whatever_the_tar_format_and_the_order_of_members(
    tmp_path: Path, tar_format: int
) -> None:
    long = "/".join(["folder"] * 12) + "/" + "k" * 90  # beyond the 100 bytes of a plain header
    jpegs = [tiny_jpeg(seed, width=16 + seed) for seed in range(5)]
    label = [as_json(labels=[CLASSES[seed % 4]], caption="left alone") for seed in range(5)]
    members: list[Member] = [
        ("folder", None),
        ("folder/a.jpg", jpegs[0]), ("folder/a.json", label[0]),
        ("folder/b.json", label[1]), ("folder/b.JPEG", jpegs[1]),
        (f"{long}.json", label[2]), (f"{long}.txt", b"a caption"), (f"{long}.jpg", jpegs[2]),
        ("README", b"no ending"), ("__meta__/x.jpg", b"passed over"), ("d.seg.jpg", jpegs[0]),
        ("nör.jpeg", jpegs[3]), ("nör.json", label[3]),
        ("only.json", label[0]), ("only.png", b"\x89PNG"),
        ("z.jpg", jpegs[4]), ("z.txt", b""), ("z.json", label[4]),
        ("not.jpg", b"\x89PNG, whatever it is called"), ("not.json", label[0]),
        ("empty.json", label[0]), ("empty.jpg", b""),
    ]  # fmt: skip
    write_tar(tmp_path / "train-000000.tar", members, tar_format=tar_format, mtime=1.5)
    summary = index_tars(str(tmp_path), classes=class_list(tmp_path))
    expected = [
        (key, jpegs[seed], [CLASSES[seed % 4]], [])
        for seed, key in enumerate(["folder/a", "folder/b", long, "nör", "z"])
    ]
    assert rows_of(summary.manifest, "train") == expected
    assert summary.ignored == {"folder": 1, "image that is no JPEG": 2, "labels without a JPEG": 1, "other member": 6}
    assert summary.manifest.skipped == {"image that is no JPEG": 2, "labels without a JPEG": 1}
    assert summary.manifest.unlisted == "absent"
    assert verify(summary.manifest.url, workers=1).faults == ()


def test_samples_are_those_that_the_webdataset_library_reads(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(3):
        with wds.TarWriter(str(tmp_path / f"val-{number}.tar")) as writer:
            for row in range(int(random.integers(1, 7))):
                seed = 10 * number + row
                writer.write({"__key__": f"{seed:03d}", "jpg": tiny_jpeg(seed), "cls": seed % 4, "txt": "words"})
    manifest = index_tars(str(tmp_path / "val-{0..2}.tar"), classes=class_list(tmp_path)).manifest
    read = wds.WebDataset(expand_tars(str(tmp_path)), shardshuffle=False)
    expected = [(found["__key__"], found["jpg"], [CLASSES[int(found["cls"])]], []) for found in read]
    assert rows_of(manifest, "val") == expected


def test_our_own_tars_get_the_index_that_packing_gave_them(tmp_path: Path) -> None:
    packed = load_manifest(tiny_shards(tmp_path))
    again = index_tars(packed.url, out=str(tmp_path / "out"), classes=str(tmp_path / "classes.csv"), unlisted="absent")
    assert again.manifest.class_ids == packed.class_ids
    assert again.manifest.tars == packed.url
    for split in packed.splits:
        assert again.manifest.shard_sizes(split) == packed.shard_sizes(split)
        assert rows_of(again.manifest, split) == rows_of(packed, split)
        for one, other in zip(again.manifest.split(split).shards, packed.split(split).shards, strict=True):
            np.testing.assert_array_equal(read_index(again.manifest, one).offsets, read_index(packed, other).offsets)
    assert verify(again.manifest.url, workers=1).faults == ()


def test_source_rows_number_the_samples_over_all_tars(tmp_path: Path) -> None:
    for number, (start, stop) in enumerate([(0, 3), (3, 4), (4, 9)]):
        write_tar(tmp_path / f"{'ab'[number % 2]}-{number}.tar", samples(start, stop))
    manifest = index_tars(str(tmp_path)).manifest
    rows = np.concatenate([SplitIndex(manifest, split).source_rows() for split in ("a", "b")])
    assert sorted(rows.tolist()) == list(range(9))
    assert SplitIndex(manifest, "a").source_rows().tolist() == [0, 1, 2, *range(3, 8)]  # a-0, a-2, b-1 by name


# Labels and classes


def test_labels_are_read_in_every_documented_form(tmp_path: Path) -> None:
    forms: list[tuple[list[Member], list[str], list[str]]] = [
        ([("json", as_json(positives=["cat", "fox"], negatives=["dog"]))], ["cat", "fox"], ["dog"]),
        ([("json", as_json(positives=["fox", "cat"]))], ["cat", "fox"], []),
        ([("json", as_json(labels=["emu", "emu"]))], ["emu"], []),
        ([("json", as_json(labels=[])), ("cls", b"dog")], [], []),
        ([("json", as_json(caption="words")), ("cls", b"dog\n")], ["dog"], []),
        ([("json", b"[1, 2]"), ("cls", b"3")], ["fox"], []),
        ([("cls", b"0")], ["cat"], []),
    ]
    members = [
        member
        for key, (labels, _, _) in enumerate(forms)
        for member in [(f"{key}.jpg", tiny_jpeg(key)), *((f"{key}.{ending}", content) for ending, content in labels)]
    ]
    write_tar(tmp_path / "train-0.tar", members)
    summary = index_tars(str(tmp_path), classes=class_list(tmp_path))
    assert [row[2:] for row in rows_of(summary.manifest, "train")] == [
        (positives, negatives) for _, positives, negatives in forms
    ]
    assert summary.manifest.unlisted == "unknown"  # some sample lists negatives


def test_without_a_list_classes_are_the_ids_found_and_numbers_keep_their_order(tmp_path: Path) -> None:
    for name, ids in (("words", ["b", "a", "10"]), ("numbers", [10, 9, 2])):
        members = [member for seed, id_ in enumerate(ids) for member in sample(str(seed), seed, as_json(labels=[id_]))]
        write_tar(tmp_path / name / "train-0.tar", members)
    assert index_tars(str(tmp_path / "words")).manifest.class_ids == ("10", "a", "b")
    assert index_tars(str(tmp_path / "numbers")).manifest.class_ids == ("2", "9", "10")


def test_the_meaning_of_unlisted_classes_can_be_given(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(0, 4))
    for number, unlisted in enumerate(("absent", "unknown")):
        manifest = index_tars(str(tmp_path), out=str(tmp_path / str(number)), unlisted=unlisted).manifest
        targets = SplitIndex(manifest, "train").targets(np.arange(4))
        np.testing.assert_array_equal(targets, 2 * np.eye(4) - 1 if unlisted == "absent" else np.eye(4))


# Names


def test_patterns_name_tars_by_braces_wildcards_and_folders(tmp_path: Path) -> None:
    for name in ("a-000.tar", "a-001.tar", "b-10.tar", "b-9.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")

    def found(pattern: str) -> list[str]:
        return [storage.name(url) for url in expand_tars(f"{tmp_path}{pattern}")]

    assert found("") == found("/") == ["a-000.tar", "a-001.tar", "b-10.tar", "b-9.tar"]
    assert found("/a-*.tar") == found("/a-{000..001}.tar") == found("/a-00[01].tar") == ["a-000.tar", "a-001.tar"]
    assert found("/b-{9..10}.tar") == ["b-9.tar", "b-10.tar"]
    assert found("/{b-9,a-000}.tar") == ["b-9.tar", "a-000.tar"]
    assert found("/x-{008..011}-{a,b}.tar") == [f"x-{n:03d}-{c}.tar" for n in range(8, 12) for c in "ab"]
    assert expand_tars("s3://nobody/never-listed-{0..1}.tar") == [f"s3://nobody/never-listed-{n}.tar" for n in (0, 1)]
    with pytest.raises(DataError, match="no tar"):
        found("/c-*.tar")


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("x/a.b.JPG", ("x/a", "b.jpg")),
        ("./x.y/a.json", ("./x.y/a", "json")),
        ("a", None),
        (".hidden.jpg", None),
        ("__meta__", None),
        ("__meta__/a.jpg", None),
    ],
)
def test_a_member_is_cut_where_webdataset_cuts_it(member: str, expected: tuple[str, str] | None) -> None:
    assert split_name(member) == expected


def test_the_split_is_told_by_the_name_an_option_or_a_pattern(tmp_path: Path) -> None:
    for name in ("in-train-0", "in-train-1", "in-val-0"):
        write_tar(tmp_path / f"{name}.tar", samples(0, 2))

    def splits(out: str, **options: str) -> dict[str, int]:
        manifest = index_tars(str(tmp_path), out=str(tmp_path / out), **options).manifest  # type: ignore[arg-type]
        return {name: len(split.shards) for name, split in manifest.splits.items()}

    assert splits("1") == {"in-train": 2, "in-val": 1}
    assert splits("2", split="all") == {"all": 3}
    assert splits("3", split_pattern=r"in-(\w+)-\d+") == {"train": 2, "val": 1}


# Where it works, and what it costs


def test_tars_in_a_bucket_are_indexed_by_few_small_reads_and_are_never_written_to(
    embedded_s3: EmbeddedS3, s3_bucket: str, tmp_path: Path
) -> None:
    num_samples, image_bytes = 20, 100_000
    images = {f"k{n:02d}": fake_jpeg(n, image_bytes) for n in range(2 * num_samples)}
    for number in range(2):
        members: list[Member] = []
        for key in sorted(images)[number * num_samples : (number + 1) * num_samples]:
            members += [(f"{key}.jpg", images[key]), (f"{key}.json", as_json(labels=["cat"]))]
        content = tar_bytes(members, tar_format=tarfile.PAX_FORMAT, mtime=0.5)
        storage.write_bytes(f"{s3_bucket}/in/train-{number}.tar", content)
    with FaultyProxy(embedded_s3.endpoint) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url})
        before = storage.traffic().bytes_read
        summary = index_tars(f"{s3_bucket}/in/train-{{0..1}}.tar", out=str(tmp_path / "out"), workers=4)
        num_read = storage.traffic().bytes_read - before
        requests = list(proxy.requests)
        assert {request.split()[0] for request in requests} <= {"GET", "HEAD"}
        assert len(requests) <= 2 * (num_samples + 5)
        assert num_read <= 2 * (num_samples + 3) * READ_AHEAD_BYTES < 2 * num_samples * image_bytes / 10

        proxy.requests.clear()
        again = index_tars(f"{s3_bucket}/in/train-{{0..1}}.tar", out=str(tmp_path / "out"), workers=4)
        assert {request.split()[0] for request in proxy.requests} == {"HEAD"}
        assert (again.num_reused, again.was_complete) == (2, True)
        assert again.manifest == summary.manifest
    storage.configure_storage()
    assert summary.manifest.tars == f"{s3_bucket}/in"
    assert {key: image for key, image, _, _ in rows_of(summary.manifest, "train")} == images
    report = verify(summary.manifest.url, workers=1)
    assert (report.faults, report.num_without_digest) == ((), 2)


def test_the_index_may_lie_in_the_bucket_beside_the_tars(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/train-0.tar", tar_bytes(samples(0, 5)))
    storage.write_bytes(f"{s3_bucket}/val-0.tar", tar_bytes(samples(5, 7)))
    manifest = index_tars(f"{s3_bucket}/*.tar").manifest
    assert manifest.tars == ""
    assert load_manifest(s3_bucket) == manifest
    assert [row[:2] for row in rows_of(manifest, "val")] == [(f"img{n:04d}", tiny_jpeg(n)) for n in (5, 6)]


def test_a_broken_connection_is_tried_again(embedded_s3: EmbeddedS3, s3_bucket: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_bucket}/train-0.tar", tar_bytes(samples(0, 20)))
    with FaultyProxy(embedded_s3.endpoint) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url})
        proxy.fail("cut", times=1, method="GET")
        proxy.fail("busy", times=1, method="GET")
        manifest = index_tars(f"{s3_bucket}/train-0.tar", out=str(tmp_path)).manifest
        assert proxy.num_faults_left == 0
    assert manifest.split("train").num_samples == 20


def test_a_run_trains_on_tars_in_a_bucket_through_an_index_on_this_disk(s3_bucket: str, tmp_path: Path) -> None:
    for split, (start, stop) in {"train": (0, 40), "test": (40, 56)}.items():
        for number, first in enumerate(range(start, stop, 8)):
            content = tar_bytes(samples(first, first + 8), tar_format=tarfile.GNU_FORMAT)
            storage.write_bytes(f"{s3_bucket}/{split}-{number}.tar", content)
    manifest = index_tars(s3_bucket, out=str(tmp_path / "index")).manifest
    assert storage.list_names(s3_bucket) == [
        *(f"test-{n}.tar" for n in range(2)),
        *(f"train-{n}.tar" for n in range(5)),
    ]
    config = tiny_config(manifest.url, num_epochs=1, engine={"kind": "plain"})
    run("train", write_config(tmp_path / "config.yaml", config), "--out", str(tmp_path / "run"), "--local")
    audit = json.loads(run("audit", str(tmp_path / "run"), "--json").stdout)
    assert (audit["is_exact"], audit["step"]) == (True, 2)
    judged = json.loads(run("evaluate", str(tmp_path / "run"), "--json").stdout)
    assert judged["num_images"] == 16


# Going on, and changes


def test_an_interrupted_indexing_goes_on_with_the_tars_that_are_left(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train-{number}.tar", samples(10 * number, 10 * number + 4))
    whole = (tmp_path / "train-2.tar").read_bytes()
    (tmp_path / "train-2.tar").write_bytes(whole[:1500])
    with pytest.raises(ShardError):
        index_tars(str(tmp_path), workers=1)
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / "train-2.tar").write_bytes(whole)
    summary = index_tars(str(tmp_path), workers=1)
    assert (summary.num_reused, summary.was_complete) == (2, False)
    fresh = index_tars(str(tmp_path), out=str(tmp_path / "fresh"), workers=3).manifest
    assert [entry.index_sha256 for entry in fresh.split("train").shards] == [
        entry.index_sha256 for entry in summary.manifest.split("train").shards
    ]


def test_a_scan_of_another_state_of_the_tar_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-0.tar", samples(0, 4))
    index_tars(str(path))
    (tmp_path / "manifest.json").unlink()
    write_tar(path, samples(4, 8))  # the same size, other keys
    summary = index_tars(str(path))
    assert summary.num_reused == 0
    assert rows_of(summary.manifest, "train")[0][0] == "img0004"
    scan = tmp_path / "scans" / "train-0.arrow"
    scan.write_bytes(scan.read_bytes()[:-100])
    assert index_tars(str(path)).num_reused == 0
    assert index_tars(str(path)).num_reused == 1


def test_a_manifest_is_never_changed_by_indexing_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(0, 4))
    first = index_tars(str(tmp_path)).manifest
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    write_tar(tmp_path / "train-1.tar", samples(4, 6))
    with pytest.raises(ManifestError, match=r"train-1\.tar is not as the manifest says"):
        index_tars(str(tmp_path))
    with pytest.raises(ManifestError, match="meaning of unlisted"):
        index_tars(str(tmp_path / "train-0.tar"), unlisted="unknown")
    with pytest.raises(ManifestError):
        index_tars(str(tmp_path / "train-0.tar"), split="other")
    (tmp_path / "train-1.tar").unlink()
    assert index_tars(str(tmp_path)).was_complete
    assert load_manifest(str(tmp_path)) == first
    assert kept == {path: path.read_bytes() for path in tmp_path.glob("*.*")}


def test_a_packed_set_is_not_indexed_over(tmp_path: Path) -> None:
    packed = tiny_shards(tmp_path, num_train=8, num_test=4)
    with pytest.raises(ManifestError, match="packed from source 'table'"):
        index_tars(packed)


# What is refused


def damaged_header(content: bytes, name: bytes) -> bytes:
    at = content.index(name)
    return content[: at + 5] + b"?" + content[at + 6 :]


GOOD = samples(0, 3)
REFUSED: list[tuple[Callable[[], bytes], type[MlplError], str]] = [
    (lambda: b"words, no tar" * 100, ShardError, "not a tar"),
    (lambda: b"", ShardError, "not a tar"),
    (lambda: b"\x1f\x8b" + b"x" * 1000, ShardError, "compressed by gzip"),
    (lambda: tar_bytes([]), ShardError, "no JPEG inside"),
    (lambda: tar_bytes([("a.png", b"png"), ("a.json", as_json(labels=[]))]), ShardError, "no JPEG inside"),
    (lambda: tar_bytes(GOOD)[: 512 + 300], ShardError, "truncated"),
    (lambda: tar_bytes(GOOD)[: tar_bytes(GOOD).index(b"img0002.jpg")], ShardError, "truncated"),
    (lambda: tar_bytes(GOOD)[: tar_bytes(GOOD).index(b"img0001.json") + 520], ShardError, "truncated"),
    (lambda: damaged_header(tar_bytes(GOOD), b"img0001.jpg"), ShardError, "damaged or truncated"),
    (lambda: tar_bytes(GOOD) + tar_bytes(GOOD), ShardError, "damaged or truncated"),  # joined with cat
    (lambda: tar_bytes(GOOD + sample("img0001", 1)), ShardError, "two samples of one key"),
    (lambda: tar_bytes([*GOOD, ("img0001.jpeg", tiny_jpeg(1))]), ShardError, "two samples of one key"),
    (lambda: tar_bytes([*GOOD, ("img0001.json", b"{}")]), ShardError, "two members img0001.json"),
    (lambda: tar_bytes([*GOOD, ("b.jpg", tiny_jpeg(9))]), DataError, "without labels"),
    (lambda: tar_bytes([*GOOD, *sample("b", 1, as_json(caption="words"))]), DataError, "without labels"),
    (lambda: tar_bytes(sample("b", 1, b"{")), DataError, "labels in KEY.json that do not read"),
    (lambda: tar_bytes(sample("b", 1, b"\xff\xfe\xff")), DataError, "labels in KEY.json that do not read"),
    (lambda: tar_bytes(sample("b", 1, as_json(labels="cat, dog"))), DataError, "no list of class ids"),
    (lambda: tar_bytes(sample("b", 1, as_json(labels=[1.5]))), DataError, "no list of class ids"),
    (lambda: tar_bytes(sample("b", 1, as_json(labels=["cow"]))), DataError, "unknown class 'cow'"),
    (lambda: tar_bytes(sample("b", 1, as_json(positives=["cat"], negatives=["cow"]))), DataError, "class 'cow'"),
    (lambda: tar_bytes(sample("b", 1, as_json(positives=["cat"], negatives=["cat"]))), DataError, "both present and"),
    (lambda: tar_bytes([("b.jpg", tiny_jpeg(1)), ("b.cls", b" ")]), DataError, "it is empty"),
    (lambda: tar_bytes([("b.jpg", tiny_jpeg(1)), ("b.cls", b"4")]), DataError, "unknown class '4'"),
    (lambda: tar_bytes(sample("b", 1, b" " * (1 << 20) + b"{}")), ShardError, "1,048,578 bytes of json"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_tar_that_cannot_be_indexed_is_refused_by_name_and_leaves_no_manifest(tmp_path: Path, number: int) -> None:
    make, kind, says = REFUSED[number]
    (tmp_path / "train-0.tar").write_bytes(make())
    with pytest.raises(kind, match=says) as caught:
        index_tars(str(tmp_path), classes=class_list(tmp_path))
    assert "train-0.tar" in caught.value.where
    assert all((caught.value.found, caught.value.expected, caught.value.next_step))
    assert not (tmp_path / "manifest.json").exists()


def test_more_classes_than_the_index_can_number_are_refused(tmp_path: Path) -> None:
    ids = [f"c{number}" for number in range(65_537)]
    write_tar(tmp_path / "train-0.tar", sample("a", 0, as_json(labels=ids)))
    with pytest.raises(DataError, match="65,537 classes"):
        index_tars(str(tmp_path))
    with pytest.raises(DataError, match="65,537 classes"):
        index_tars(str(tmp_path), classes=class_list(tmp_path, ids))
    write_tar(tmp_path / "train-0.tar", sample("a", 0, as_json(labels=ids[1:])))
    assert index_tars(str(tmp_path)).manifest.num_classes == 65_536


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("a/train-0.tar", "b/train-0.tar", "c/00000.tar", "d/a b-0.tar"):
        write_tar(tmp_path / name, samples(0, 1))
    folder = str(tmp_path / "a")
    wrong: list[tuple[str, dict[str, Any], str]] = [
        (f"{tmp_path}/{{a,b}}", {}, "tars in 2 folders"),
        (f"{tmp_path}/c", {}, "no split in the name '00000'"),
        (f"{tmp_path}/d", {}, "a tar named 'a b-0.tar'"),
        (folder, {"split": "x", "split_pattern": "(x)"}, "both a split and a split pattern"),
        (folder, {"split_pattern": "("}, "missing \\)"),
        (folder, {"split_pattern": "train.*"}, "without a group"),
        (folder, {"unlisted": "maybe"}, "unlisted 'maybe'"),
        (folder, {"workers": 0}, "workers 0"),
    ]
    for tars, options, says in wrong:
        with pytest.raises(ConfigError, match=says):
            index_tars(tars, **options)
    secret = "https://user:hidden-word@example.test/a-0.tar"
    with pytest.raises(ConfigError, match="password or a query") as caught:
        index_tars(secret)
    assert "hidden-word" not in str(caught.value)
    with pytest.raises(StorageError, match="the tar not found"):
        index_tars(f"{folder}/train-7.tar")
    with pytest.raises(StorageError, match="list of classes not found"):
        index_tars(folder, classes=str(tmp_path / "no.csv"))


def test_a_list_of_classes_without_a_header_line_is_refused_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(0, 4))
    (tmp_path / "classes.csv").write_text("\n".join(CLASSES))
    with pytest.raises(DataError, match=f"first line of .*classes.csv, {CLASSES[0]!r}, was taken for the header"):
        index_tars(str(tmp_path), classes=str(tmp_path / "classes.csv"))
    write_tar(tmp_path / "val-0.tar", [("a.jpg", tiny_jpeg(0)), ("a.cls", b"0")])
    (tmp_path / "numbers.csv").write_text("0\n1\n2\n")  # the label 0 would count as the column of class 1
    with pytest.raises(DataError, match="'0', was taken for the header"):
        index_tars(str(tmp_path / "val-0.tar"), classes=str(tmp_path / "numbers.csv"))
    assert not (tmp_path / "manifest.json").exists()


def test_of_several_missing_tars_the_first_is_named(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train-{number:06d}.tar", samples(number, number + 1))
    with pytest.raises(StorageError) as caught:
        index_tars(f"{tmp_path}/train-{{000000..000019}}.tar")
    assert caught.value.where == f"{tmp_path}/train-000003.tar"


@pytest.mark.parametrize(
    ("text", "says"),
    [("class\n", "0 classes"), ("class\na\nb\na\n", "class 'a'"), ("class\na\n''\n\n,x\n", "class ''"),
     ('class\n"a\n', "do not read"), ("class\n\xff\n", "do not read")],
)  # fmt: skip
def test_a_list_of_classes_that_is_wrong_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "classes.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=says):
        read_classes(str(tmp_path / "classes.csv"))


def test_random_damage_gives_a_scan_or_a_typed_error(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    wholes = [
        tar_bytes([("x" * 120 + ".txt", b"words"), *GOOD], tar_format=tar_format, mtime=0.5)
        for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[1:]
    ]
    outcomes = set()
    for number in range(400):
        content = bytearray(wholes[number % 2])
        if number % 4 == 0:
            content = content[: int(random.integers(0, len(content)))]
        else:
            for at in random.integers(0, len(content) - 10_240, size=3):
                content[at] = int(random.integers(0, 256))
            fix_checksums(content)
        path = tmp_path / "x.tar"
        path.write_bytes(content)
        try:
            outcomes.add(len(scan_tar(str(path), len(content)).keys))
        except DataError as error:
            outcomes.add(type(error).__name__)
    assert {3, "ShardError", "DataError"} <= outcomes


def fix_checksums(content: bytearray) -> None:
    """Make damage inside headers pass their checksum, so that the fields themselves are what is wrong."""
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            total = sum(content[at : at + 148]) + 8 * 32 + sum(content[at + 156 : at + 512])
            content[at + 148 : at + 156] = b"%06o\0 " % total


# Verifying


def test_verify_finds_what_headers_labels_and_markers_show_and_says_what_it_cannot_know(tmp_path: Path) -> None:
    def rewritten(change: Callable[[list[Member]], list[Member]]) -> list[tuple[str, str]]:
        write_tar(tmp_path / "train-0.tar", change(samples(0, 4)))
        return [(fault.where, fault.found) for fault in verify(str(tmp_path), workers=1).faults]

    write_tar(tmp_path / "train-0.tar", samples(0, 4))
    write_tar(tmp_path / "unlisted-0.tar", samples(0, 1))  # other tars may lie there
    index_tars(str(tmp_path / "train-*.tar"), classes=class_list(tmp_path))
    assert rewritten(lambda members: members) == []
    report = verify(str(tmp_path), decode=True, workers=1)
    assert (report.faults, report.num_without_digest) == ((), 1)

    cut = rewritten(lambda members: [(members[0][0], truncated(tiny_jpeg(0))), *members[1:]])
    assert ("img0000", "truncated JPEG") in cut
    other = rewritten(lambda members: [members[0], (members[1][0], as_json(labels=["fox"])), *members[2:]])
    assert other == [("img0000", "classes ((3,), ()) in the tar")]
    assert rewritten(lambda members: members[2:])[-1] == ("row 0", "keys ['img0001']")
    renamed = rewritten(lambda members: [*members[:6], *sample("other", 3)])
    assert renamed == [("row 3", "keys ['other']")]
    (tmp_path / "train-0.tar").write_bytes(tar_bytes(samples(0, 4))[:3000])
    assert any("truncated" in fault.found for fault in verify(str(tmp_path), workers=1).faults)
    (tmp_path / "train-0.tar").unlink()
    assert [fault.found for fault in verify(str(tmp_path), workers=1).faults] == ["no such file"]


def test_the_verbs_index_and_verify(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "train-0.tar", [("README", b""), *samples(0, 5)])
    out = str(tmp_path / "out")

    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["shards", *arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return " ".join(done.stdout.split())

    assert json.loads(told("index", str(tmp_path / "in"), "--out", out, "--workers", "2", "--json")) == {
        "url": out, "digest": hashlib.sha256((tmp_path / "out" / "manifest.json").read_bytes()).hexdigest(),
        "num_classes": 4, "unlisted": "absent", "splits": {"train": {"num_samples": 5, "num_tars": 1}},
        "ignored": {"other member": 1}, "num_reused": 0, "was_complete": False,
    }  # fmt: skip
    again = told("index", str(tmp_path / "in"), "--out", out)
    assert "train: 5 images, 1 tar passed over: 1 of kind 'other member'" in again
    assert "was complete already" in again
    assert "1 tar was indexed where it lies and its digest was never known" in told("verify", out)
    assert json.loads(told("verify", out, "--json"))["num_without_digest"] == 1
    with pytest.raises(DataError, match="no tar"):
        told("index", str(tmp_path / "none"))


def test_links_are_no_samples(tmp_path: Path) -> None:
    stream = io.BytesIO(tar_bytes(GOOD))
    with tarfile.open(fileobj=stream, mode="a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "img0000.jpg"
        tar.addfile(link)
    (tmp_path / "train-0.tar").write_bytes(stream.getvalue())
    assert index_tars(str(tmp_path)).ignored == {"link or device": 1}
