"""Claims about packed sets that grow and that are mended: what is there stays, and the digests are those promised."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.shard_index import read_index
from dist_mlpl.errors import ConfigError, DataError, ManifestError
from shards.build import build
from shards.extend import ExtendSummary, extend
from shards.repair import repair
from shards.sources.base import Record, Records, Source
from shards.verify import verify
from tests.support.images import tiny_jpeg, undecodable
from tests.support.packing import CLASS_NAMES, NAMES, contents, flip_byte, packed, source_at, write_inputs

pytestmark = pytest.mark.integration

NEW = [f"new/{n:02d}.jpg" for n in range(20)]


def more(folder: Path, *, classes: Any = None, unlisted: Any = "unknown", old: int = 5) -> Source:
    """New images of splits train and extra, and some old ones among them."""
    source = source_at(str(folder))
    (folder / "images" / "new").mkdir(exist_ok=True)
    for n, name in enumerate(NEW):
        if not (folder / "images" / name).exists():
            (folder / "images" / name).write_bytes(tiny_jpeg(1000 + n, height=16 + n % 3 * 8))
    names = [*NEW[:10], *NAMES[:old], *NEW[10:]]
    records = [
        Record(name, "extra" if n % 4 == 0 else "train", (n % 5,), ((n + 1) % 5,) if n % 5 < 4 else (), 3 * n)
        for n, name in enumerate(names)
    ]
    return Source("more", source.images, classes or source.classes, unlisted, {"lot": 2}, Records.of(records))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs")


@pytest.fixture
def out(inputs: Path, tmp_path: Path) -> Path:
    packed(inputs, tmp_path / "out")
    return tmp_path / "out"


def grown(folder: Path, out: Path, **options: Any) -> ExtendSummary:
    return extend(more(folder), str(out), **{"workers": 1, **options})


def rows_and_keys(manifest: Manifest) -> dict[int, str]:
    found = {}
    for split in manifest.splits.values():
        for entry in split.shards:
            index = read_index(manifest, entry)
            found.update(zip(index.source_rows.tolist(), index.keys.to_pylist(), strict=True))
    return found


def test_a_refused_extension_goes_on_when_the_image_is_repaired(inputs: Path, out: Path, tmp_path: Path) -> None:
    quiet = tmp_path / "quiet"
    packed(inputs, quiet)
    grown(inputs, quiet)
    bad = inputs / "images" / NEW[3]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-40])
    with pytest.raises(DataError, match="of 20 images cannot be packed so far"):
        grown(inputs, out)
    bad.write_bytes(whole)
    assert grown(inputs, out).num_added == 20
    assert contents(str(out)) == contents(str(quiet))


def test_an_extension_adds_what_is_lacking_behind_what_is_there_and_changes_none_of_it(inputs: Path, out: Path) -> None:
    before, old = contents(str(out)), load_manifest(str(out))
    summary = grown(inputs, out)
    after, manifest = contents(str(out)), summary.manifest
    assert summary.num_added == 20
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    for name, split in old.splits.items():
        assert manifest.splits[name].shards[: len(split.shards)] == split.shards
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"val": 6, "train": 38, "extra": 6}
    assert manifest == load_manifest(str(out))
    assert verify(str(out), workers=1, decode=True).faults == ()
    assert not (out / "build").exists()


def test_source_rows_go_on_behind_those_of_the_set_in_the_order_of_the_new_source(inputs: Path, out: Path) -> None:
    before = rows_and_keys(load_manifest(str(out)))
    manifest = grown(inputs, out).manifest
    after = rows_and_keys(manifest)
    first = max(before) + 1
    assert {row: key for row, key in after.items() if row < first} == before
    names = [*NEW[:10], *NAMES[:5], *NEW[10:]]
    expected = {first + 3 * n: name[:-4].replace("/", "%2F") for n, name in enumerate(names) if name in NEW}
    assert {row: key for row, key in after.items() if row >= first} == expected
    (extension,) = manifest.extensions
    assert (extension.name, extension.arguments, extension.first_source_row) == ("more", {"lot": 2}, first)
    assert extension.first_shards == {"extra": 0, "train": len(load_manifest(str(out)).before(0).split("train").shards)}


def test_a_second_call_adds_nothing_and_a_second_lot_comes_behind_the_first(inputs: Path, out: Path) -> None:
    grown(inputs, out)
    before = contents(str(out))
    again = grown(inputs, out)
    assert again.num_added == 0
    assert contents(str(out)) == before
    (inputs / "images" / "last.jpg").write_bytes(tiny_jpeg(7))
    records = Records.of([Record("last.jpg", "val", (), (), 0)])
    last = dataclasses.replace(more(inputs), name="last", records=records)
    manifest = extend(last, str(out), workers=1).manifest
    assert [extension.name for extension in manifest.extensions] == ["more", "last"]
    assert max(rows_and_keys(manifest)) == manifest.extensions[1].first_source_row
    assert verify(str(out), workers=1).faults == ()


def test_further_classes_may_be_added_where_unlisted_ones_are_unknown(inputs: Path, out: Path) -> None:
    old = load_manifest(str(out))
    further = (*old.classes, old.classes[0].model_copy(update={"id": "boat", "name": "boat"}))
    manifest = extend(more(inputs, classes=further), str(out), workers=1).manifest
    assert manifest.class_ids == (*CLASS_NAMES, "boat")
    assert verify(str(out), workers=1).faults == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda source: {"classes": source.classes[::-1]}, "'house' in column 0"),
        (lambda source: {"classes": source.classes[:4]}, "4 classes"),
        (lambda source: {"unlisted": "absent"}, "does not list are absent"),
    ],
)
def test_labels_that_would_not_mean_the_same_are_refused_untouched(
    inputs: Path, out: Path, change: Callable[[Source], dict[str, Any]], says: str
) -> None:
    before = contents(str(out))
    with pytest.raises(DataError, match=says):
        extend(more(inputs, **change(more(inputs))), str(out), workers=1)
    assert contents(str(out)) == before


def test_further_classes_are_refused_where_unlisted_ones_are_absent(inputs: Path, tmp_path: Path) -> None:
    source = source_at(str(inputs))
    records = Records.of([record._replace(negatives=()) for record in source.records])
    full = Source("full", source.images, source.classes, "absent", {}, records)
    build(full, str(tmp_path / "out"), workers=1, decode=False)
    further = (*source.classes, source.classes[0].model_copy(update={"id": "boat"}))
    with pytest.raises(DataError, match="nobody looked for those"):
        extend(more(inputs, classes=further, unlisted="absent"), str(tmp_path / "out"), workers=1)


def test_there_must_be_a_set_to_extend(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest"):
        grown(inputs, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        grown(inputs, tmp_path / "nothing", max_bad_fraction=2.0)


def listed(out: Path) -> list[list[str]]:
    with open(out / "skipped.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def test_unfit_images_of_an_extension_stop_it_or_are_listed_and_counted_beside_the_old_ones(
    inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (inputs / "images" / NAMES[3]).unlink()  # is mended and added later
    (inputs / "images" / NAMES[7]).unlink()
    packed(inputs, out, max_bad_fraction=0.1)
    (inputs / "images" / NAMES[3]).write_bytes(tiny_jpeg(3))
    source = more(inputs)
    (inputs / "images" / NEW[2]).write_bytes(b"GIF89a")
    before = contents(str(out))
    with pytest.raises(DataError, match="1 of 21 images cannot be packed"):
        extend(source, str(out), workers=1)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in before} == before
    summary = extend(source, str(out), workers=1, max_bad_fraction=0.05)
    assert summary.num_added == 20
    assert listed(out) == [[NAMES[7], "missing file"], [NEW[2], "not a JPEG"]]
    assert summary.manifest.skipped == {"missing file": 1, "not a JPEG": 1}
    again = extend(source, str(out), workers=1, max_bad_fraction=0.05)
    assert (again.num_added, again.manifest.digest) == (0, summary.manifest.digest)


def test_an_extension_killed_between_shards_goes_on_and_another_one_is_refused_meanwhile(
    inputs: Path, tmp_path: Path
) -> None:
    quiet, out = tmp_path / "quiet", tmp_path / "out"
    for folder in (quiet, out):
        packed(inputs, folder, target_shard_bytes=6_000)
    source = more(inputs)
    fewer = dataclasses.replace(source, records=source.records.take(np.arange(9)))
    grown(inputs, quiet)

    def tell(doing: str, *rest: int) -> None:
        if doing == "packing":
            os.kill(os.getpid(), signal.SIGKILL)

    child = get_context("fork").Process(target=lambda: grown(inputs, out, on_progress=tell))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert packed(inputs, out, target_shard_bytes=6_000).was_complete  # and leaves the records alone
    with pytest.raises(ManifestError, match="unfinished build"):
        extend(fewer, str(out), workers=1)
    assert extend(source, str(out), workers=1).num_added == 20
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in quiet.iterdir()
    }


def damage(out: Path, manifest: Manifest, seed: int) -> set[str]:
    """Spoil some shards, each in a way of chance. Returns their tars."""
    random = np.random.default_rng(seed)
    entries = [entry for split in manifest.splits.values() for entry in split.shards]
    chosen = [entries[n] for n in random.permutation(len(entries))[: int(random.integers(1, len(entries)))]]
    for entry in chosen:
        path = out / (entry.file if random.random() < 0.6 else entry.index)
        way = random.integers(3)
        if way == 0:
            path.unlink()
        elif way == 1:
            os.truncate(path, int(random.integers(path.stat().st_size)))
        else:
            flip_byte(path, int(random.integers(path.stat().st_size)))
    return {entry.file for entry in chosen}


@pytest.mark.parametrize("seed", range(4))
def test_a_repair_rewrites_the_damaged_shards_alone_to_the_bytes_they_had(
    inputs: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "out"
    manifest = packed(inputs, out, target_shard_bytes=8_000).manifest
    before = contents(str(out))
    bad = damage(out, manifest, seed)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    summary = repair(str(out), source_at(str(inputs)), workers=1)
    assert set(summary.rewritten) == bad
    assert summary.faults == ()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    kept = [name for name in before if name.split(".")[0] + ".tar" not in bad]
    assert all((out / name).stat().st_mtime_ns == stamps[name] for name in kept)


def test_a_whole_set_is_left_alone_and_its_source_not_even_looked_at(out: Path) -> None:
    nowhere = Source("table", "/nowhere", load_manifest(str(out)).classes, "unknown", {}, Records.of([]))
    summary = repair(str(out), nowhere, workers=1)
    assert (summary.rewritten, summary.faults) == ((), ())


@pytest.mark.parametrize("change", ["labels", "image size", "image content", "unfit"])
def test_inputs_that_changed_are_named_and_nothing_is_written(inputs: Path, out: Path, change: str) -> None:
    entry = load_manifest(str(out)).split("train").shards[0]
    flip_byte(out / entry.file, 700)
    index = read_index(load_manifest(str(out)), entry)
    name = list(source_at(str(inputs)).records)[int(index.source_rows[2])].image
    image, source = inputs / "images" / name, source_at(str(inputs))
    if change == "labels":
        labels = inputs / "labels.csv"
        labels.write_text(labels.read_text().replace("sky", "dog", 1))
        source = source_at(str(inputs))
    elif change == "image size":
        image.write_bytes(image.read_bytes() + b"\0")
    elif change == "image content":
        flip_byte(image, image.stat().st_size - 10)
    else:
        image.write_bytes(b"GIF89a" + bytes(image.stat().st_size - 6))
    before = contents(str(out))
    with pytest.raises(DataError, match=r"inputs that changed|another shard came out"):
        repair(str(out), source, workers=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_extended_set_is_repaired_from_the_source_of_each_part(inputs: Path, out: Path) -> None:
    manifest = grown(inputs, out).manifest
    before = contents(str(out))
    old, new = manifest.split("train").shards[0], manifest.split("train").shards[-1]
    (out / old.file).unlink()
    (out / new.index).unlink()
    with pytest.raises(ManifestError, match="not of this source"):
        packed(inputs, out)  # mends its own part
    flip_byte(out / old.file, 600)
    first = repair(str(out), source_at(str(inputs)), workers=1)
    assert (first.rewritten, [fault.file for fault in first.faults]) == ((old.file,), [new.index])
    second = repair(str(out), more(inputs), workers=1)
    assert (second.rewritten, second.faults) == ((new.file,), ())
    assert contents(str(out)) == before


def test_what_no_source_can_mend_stays_a_fault(inputs: Path, out: Path) -> None:
    (out / "stray-000000.tar").write_bytes(b"")
    (out / load_manifest(str(out)).split("val").shards[0].file).unlink()
    summary = repair(str(out), source_at(str(inputs)), workers=1)
    assert [(fault.file, fault.found) for fault in summary.faults] == [
        ("stray-000000.tar", "a file that the manifest lacks")
    ]


def test_a_repair_leaves_out_the_images_that_the_build_left_out(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (inputs / "images" / NAMES[6]).write_bytes(undecodable(tiny_jpeg(6)))
    manifest = packed(inputs, out, decode=True, max_bad_fraction=0.1).manifest
    assert manifest.skipped == Counter({"undecodable JPEG": 1})
    before = contents(str(out))
    for entry in manifest.split("train").shards:
        (out / entry.file).unlink()
    assert repair(str(out), source_at(str(inputs)), workers=1).faults == ()
    assert contents(str(out)) == before


def test_a_set_in_a_bucket_grows_and_is_mended_there(inputs: Path, out: Path, s3_bucket: str) -> None:
    url = storage.join(s3_bucket, "set")
    packed(inputs, url)
    extend(more(inputs), url, workers=1)
    grown(inputs, out)
    assert contents(url) == contents(str(out))
    assert list(storage.list_files(url)) == sorted(contents(url))
    storage.remove(storage.join(url, "train-000000.tar"))
    assert repair(url, source_at(str(inputs)), workers=1).faults == ()
    assert contents(url) == contents(str(out))
