"""Claims about what enters a shard: keys, CSV tables, image checks, packing order, boundaries."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.errors import DataError, ManifestError, RunError, StorageError
from shards.pack import check_image, cut_shards, packing_order, run_tasks
from shards.sources.base import Source, key_of
from shards.sources.table import read_table
from tests.support.images import tiny_jpeg, truncated, undecodable

pytestmark = pytest.mark.unit


@given(stem=st.text(st.characters(codec="utf-8"), min_size=1))
def test_keys_hold_no_dot_or_slash_and_unquote_to_the_name(stem: str) -> None:
    key = key_of(f"{stem}.png")
    assert "." not in key
    assert "/" not in key
    assert unquote(key, errors="strict") == f"{stem}.png"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.jpg", "a"),
        ("a.JPEG", "a"),
        ("a/b.c.jpg", "a%2Fb%2Ec"),
        ("a%2Fb.jpg", "a%252Fb"),
        (".jpg", "%2Ejpg"),
        ("a/.jpg", "a%2F%2Ejpg"),
        ("a.png", "a%2Epng"),
    ],
)
def test_keys_of_known_names(name: str, key: str) -> None:
    assert key_of(name) == key


def table(folder: Path, labels: str | bytes, *, classes: str | None = None, splits: str | None = None) -> Source:
    def write(name: str, text: str | bytes | None) -> str | None:
        if text is None:
            return None
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(folder / name)

    return read_table(
        "images",
        write("labels.csv", labels) or "",
        classes=write("classes.csv", classes),
        splits=write("splits.csv", splits),
    )


def test_a_table_of_labels_makes_records_in_row_order_with_sorted_classes(tmp_path: Path) -> None:
    source = table(tmp_path, 'image,labels\nb.jpg,tree|car\na/c.jpg,\n\n"x,y.jpg",sky\n')
    assert [entry.id for entry in source.classes] == ["car", "sky", "tree"]
    assert source.unlisted == "absent"
    assert source.images == str(Path("images").absolute())
    assert [tuple(record) for record in source.records] == [
        ("b.jpg", "train", (0, 2), (), 0, "b"),
        ("a/c.jpg", "train", (), (), 1, "a%2Fc"),
        ("x,y.jpg", "train", (1,), (), 2, "x,y"),
    ]


def test_a_table_of_classes_fixes_their_order_and_a_table_of_splits_the_split(tmp_path: Path) -> None:
    source = table(
        tmp_path,
        "image,labels\nb.jpg,tree\na.jpg,car\n",
        classes="class,images\ntree,1\nbus,0\ncar,1\n",
        splits="split,image\ntest,a.jpg\ntrain,b.jpg\n",
    )
    assert [entry.id for entry in source.classes] == ["tree", "bus", "car"]
    assert [(record.split, record.positives) for record in source.records] == [("train", (0,)), ("test", (2,))]


def test_positives_and_negatives_leave_the_rest_unknown(tmp_path: Path) -> None:
    source = table(tmp_path, "negatives,image,positives\ncar|bus,a.jpg,tree\n,b.jpg,\n")
    assert source.unlisted == "unknown"
    assert [(record.positives, record.negatives) for record in source.records] == [((2,), (0, 1)), ((), ())]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    source = table(tmp_path, b"\xef\xbb\xbfimage,labels\r\na.jpg,x\r\n")
    assert source.records[0].image == "a.jpg"


def test_arguments_name_contents_and_not_places(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    text = "image,labels\na.jpg,x\n"
    assert table(first, text).arguments == table(second, text).arguments
    assert table(first, text).arguments == {"labels_sha256": hashlib.sha256(text.encode()).hexdigest()}


ONE = "image,labels\na.jpg,x\nb.jpg,y\n"


@pytest.mark.parametrize(
    ("labels", "classes", "splits", "says", "where"),
    [
        ("", None, None, "an empty file", "labels.csv, line 1"),
        ("image,labels\n", None, None, "no row", "labels.csv, line 1"),
        ("picture,labels\na.jpg,x\n", None, None, "columns picture, labels", "labels.csv, line 1"),
        ("image,label\na.jpg,x\n", None, None, "columns image, label", "labels.csv, line 1"),
        ("image,positives\na.jpg,x\n", None, None, "columns image, positives", "labels.csv, line 1"),
        ("image,labels,positives,negatives\na.jpg,x,x,\n", None, None, "both `labels`", "labels.csv, line 1"),
        ("image,image,labels\na.jpg,a.jpg,x\n", None, None, "columns image, image", "labels.csv, line 1"),
        ("image,labels\na.jpg,x\nb.jpg,x,y\n", None, None, "3 cells", "labels.csv, line 3"),
        ('image,labels\na.jpg,x\n"b.jpg,x\n', None, None, "does not read as CSV", "labels.csv, line 3"),
        ('image,labels\n"a"b.jpg,x\n', None, None, "does not read as CSV", "labels.csv, line 2"),
        (b"image,labels\na.jpg,x\n\xff.jpg,x\n", None, None, "not UTF-8", "labels.csv, line 3"),
        (ONE, "class\nx\n", None, "unknown class 'y'", "labels.csv, line 3"),
        (ONE, "class\nx\nx\n", None, "class 'x'", "classes.csv, line 3"),
        (ONE, "class\nx|y\n", None, "class 'x|y'", "classes.csv, line 2"),
        ("image,labels\na.jpg,\n", None, None, "0 classes", "labels.csv, line 1"),
        ("image,labels\na.jpg,x||y\n", None, None, "an empty class name", "labels.csv, line 2"),
        ("image,labels\na.jpg,x|y|x\n", None, None, "listed twice", "labels.csv, line 2"),
        ("image,positives,negatives\na.jpg,x|y,y\n", None, None, "both present and absent", "labels.csv, line 2"),
        ("image,labels\na.jpg,x\na.jpg,y\n", None, None, "same image", "labels.csv, line 3"),
        ("image,labels\na.jpg,x\na.jpeg,y\n", None, None, "same key", "labels.csv, line 3"),
        ("image,labels\n../a.jpg,x\n", None, None, "'../a.jpg'", "labels.csv, line 2"),
        ("image,labels\nb/../../a.jpg,x\n", None, None, "image", "labels.csv, line 2"),
        ("image,labels\n/a.jpg,x\n", None, None, "image '/a.jpg'", "labels.csv, line 2"),
        ("image,labels\ns3://b/a.jpg,x\n", None, None, "image 's3", "labels.csv, line 2"),
        ("image,labels\n,x\n", None, None, "image ''", "labels.csv, line 2"),
        (ONE, None, "image,split\na.jpg,train\n", "lacks: 'b.jpg' (line 3)", "labels.csv, line 3"),
        (ONE, None, "image,split\na.jpg,t\nb.jpg,t\nc.jpg,t\n", "lacks: 'c.jpg' (line 4)", "splits.csv, line 4"),
        (ONE, None, "image,split\na.jpg,t\na.jpg,v\n", "again", "splits.csv, line 3"),
        (ONE, None, "image,part\na.jpg,t\n", "columns image, part", "splits.csv, line 1"),
    ],
)
def test_a_fault_in_a_table_is_refused_with_file_and_line(
    tmp_path: Path, labels: str | bytes, classes: str | None, splits: str | None, says: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path, labels, classes=classes, splits=splits)
    assert says in caught.value.found
    assert caught.value.where == f"{tmp_path}/{where}"


def test_an_unknown_class_lists_the_nearest_names(tmp_path: Path) -> None:
    names = ["airplane", "bare-soil", "buildings", "cars", "chaparral", "court", "dock", "field"]
    with pytest.raises(DataError) as caught:
        table(tmp_path, "image,labels\na.jpg,airplain\n", classes="class\n" + "\n".join(names))
    assert caught.value.expected.startswith("nearest: 'airplane'")


def test_a_missing_table_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not found"):
        read_table("images", str(tmp_path / "labels.csv"))
    with pytest.raises(StorageError, match="cannot be read"):
        read_table("images", str(tmp_path))


WHOLE = tiny_jpeg(0, height=64, width=64)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (WHOLE, None),
        (WHOLE + b"\0" * 20, None),
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n" + WHOLE, "not a JPEG"),
        (b"\xff\xd8", "not a JPEG"),
        (truncated(WHOLE), "truncated JPEG"),
        (WHOLE[:-1], "truncated JPEG"),
        (WHOLE[:20] + WHOLE[-2:] + truncated(WHOLE)[20:], "truncated JPEG"),  # a thumbnail's end marker in the header
    ],
)
def test_markers_alone_tell_whole_images_from_others(content: bytes, fault: str | None) -> None:
    assert check_image(content, decode=False) == fault


def test_decoding_finds_what_the_markers_do_not_show() -> None:
    assert check_image(WHOLE, decode=True) is None
    assert check_image(undecodable(WHOLE), decode=False) is None
    assert check_image(undecodable(WHOLE), decode=True) == "undecodable JPEG"


def splitmix64(start: int, count: int) -> list[int]:
    """The published generator, in Python integers."""
    mask, state, outputs = 2**64 - 1, start, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_the_reference_generator_gives_its_published_first_outputs() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_packing_order_equals_the_reference_generator() -> None:
    for seed, split in ((0, "train"), (0, "val"), (7, "train"), (-3, "train")):
        start = int.from_bytes(hashlib.sha256(f"{seed}:{split}".encode()).digest()[:8], "little")
        ranks = splitmix64(start, 500)
        rows = np.array([3, 499, 0, 250, 17])
        oracle = sorted(range(len(rows)), key=lambda place: ranks[rows[place]])
        assert packing_order(seed, split, rows).tolist() == oracle


def test_packing_order_is_the_same_forever() -> None:
    assert packing_order(0, "train", np.arange(12)).tolist() == [6, 0, 4, 11, 7, 5, 1, 3, 8, 2, 10, 9]


def test_leaving_records_out_does_not_change_the_order_of_the_rest() -> None:
    rows = np.arange(300)
    kept = np.flatnonzero(rows % 7 != 3)
    whole = packing_order(5, "train", rows)
    np.testing.assert_array_equal(kept[packing_order(5, "train", kept)], whole[whole % 7 != 3])


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    target=st.integers(1, 20_000),
)
def test_shards_cover_all_samples_in_order_and_exceed_the_target_by_one_sample_at_most(
    sizes: list[int], target: int
) -> None:
    parts = cut_shards(np.array(sizes), target)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(sizes)))
    assert all(part.stop > part.start for part in parts)
    assert all(sum(sizes[part]) < target + max(sizes[part]) for part in parts)
    assert len(parts) <= -(-sum(sizes) // target)


def test_equal_samples_make_shards_that_differ_by_one_sample() -> None:
    counts = [part.stop - part.start for part in cut_shards(np.full(1000, 2048), 100_000)]
    assert len(counts) == 21
    assert max(counts) - min(counts) <= 1


def test_tasks_give_their_results_and_their_errors_from_other_processes(tmp_path: Path) -> None:
    names = ["a.jpg", "b/c.jpg", "d.e.jpg"]
    for workers in (1, 2):
        keys = dict(run_tasks(key_of, [(name,) for name in names], workers))
        assert [keys[number] for number in range(3)] == ["a", "b%2Fc", "d%2Ee"]
        with pytest.raises(ManifestError, match="no manifest"):
            list(run_tasks(load_manifest, [(str(tmp_path),), (str(tmp_path),)], workers))


def test_the_death_of_a_worker_is_a_run_error() -> None:
    with pytest.raises(RunError, match="a worker process died"):
        list(run_tasks(os._exit, [(1,), (1,)], 2))
