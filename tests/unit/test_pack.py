"""Claims about what enters a shard: keys, CSV tables, packing order, boundaries, the bytes of tar and index."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.shard_index import ClassLists, ShardIndex, decode_index, encode_index
from dist_mlpl.errors import DataError, ManifestError, RunError, ShardError, StorageError
from shards.pack import TarWriter, cut_shards, packing_order, record_json, shortest, tar_header
from shards.processes import run_tasks
from shards.sources.base import Record, Records, Source, key_of, keys_of
from shards.sources.table import read_table

pytestmark = pytest.mark.unit

ENDINGS = [".jpg", ".JPEG", ".jpg.jpeg", "/.jpg", ".png", "%2E", ".jpg\n", ""]


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


@settings(deadline=None)
@given(names=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=8), ending=st.sampled_from(ENDINGS))
def test_keys_of_many_names_are_those_of_each(names: list[str], ending: str) -> None:
    names = [name + ending for name in names]
    assert keys_of(pa.array(names, pa.string())).to_pylist() == [key_of(name) for name in names]


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


def rows_of(source: Source) -> list[Record]:
    return source.records.rows(range(len(source.records)))


def test_a_table_of_labels_makes_records_in_row_order_with_sorted_classes(tmp_path: Path) -> None:
    source = table(tmp_path, 'image,labels\nb.jpg,tree|car\na/c.jpg,\n\n"x,y.jpg",sky\n')
    assert [entry.id for entry in source.classes] == ["car", "sky", "tree"]
    assert source.unlisted == "absent"
    assert source.images == str(Path("images").absolute())
    assert [tuple(record) for record in rows_of(source)] == [
        ("b.jpg", "train", (0, 2), (), 0, (), (), 0),
        ("a/c.jpg", "train", (), (), 1, (), (), 0),
        ("x,y.jpg", "train", (1,), (), 2, (), (), 0),
    ]
    assert [record.key for record in rows_of(source)] == ["b", "a%2Fc", "x,y"]


def test_a_table_of_classes_fixes_their_order_and_a_table_of_splits_the_split(tmp_path: Path) -> None:
    source = table(
        tmp_path,
        "image,labels\nb.jpg,tree\na.jpg,car\n",
        classes="class,images\ntree,1\nbus,0\ncar,1\n",
        splits="split,image\ntest,a.jpg\ntrain,b.jpg\n",
    )
    assert [entry.id for entry in source.classes] == ["tree", "bus", "car"]
    assert [(record.split, record.positives) for record in rows_of(source)] == [("train", (0,)), ("test", (2,))]


def test_positives_and_negatives_leave_the_rest_unknown(tmp_path: Path) -> None:
    source = table(tmp_path, "negatives,image,positives\ncar|bus,a.jpg,tree\n,b.jpg,\n")
    assert source.unlisted == "unknown"
    assert [(record.positives, record.negatives) for record in rows_of(source)] == [((2,), (0, 1)), ((), ())]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    source = table(tmp_path, b"\xef\xbb\xbfimage,labels\r\na.jpg,x\r\n")
    assert source.records.row(0).image == "a.jpg"


def test_blanks_around_cells_names_and_columns_are_left_out(tmp_path: Path) -> None:
    neat = table(tmp_path, "image,positives,negatives\na.jpg,car|house,tree\nb.jpg,house,\n")
    loose = table(tmp_path, 'image, positives , negatives\n a.jpg , car | house, tree\nb.jpg, "house ",  \n')
    assert loose.classes == neat.classes
    assert rows_of(loose) == rows_of(neat)
    listed = table(
        tmp_path, "image,labels\na.jpg,x | y\n", classes=" class \n y \nx\n", splits="image, split\na.jpg, val\n"
    )
    assert [entry.id for entry in listed.classes] == ["y", "x"]
    assert rows_of(listed)[0].split == "val"


def test_classes_that_no_list_fixes_are_told_with_those_that_look_like_typing_mistakes(tmp_path: Path) -> None:
    rows = [("bus|red car", 3), ("Bus", 2), ("red  car|redcar", 2), ("tre", 1)]
    lines = [f"{name}-{number}.jpg,{name}" for name, count in rows for number in range(count)]
    notes = table(tmp_path, "\n".join(["image,labels", *lines])).notes
    assert notes == (
        f"without a list of classes, 6 were found in {tmp_path}/labels.csv: Bus, bus, red  car, red car, redcar, tre",
        "classes that differ in case or blanks alone, yet count as different ones: 'Bus' and 'bus', "
        "'red  car' and 'red car' and 'redcar'",
        "present in one image at most, perhaps a typing mistake: tre",
    )
    many = "|".join(f"c{number:02d}" for number in range(30))
    (note,) = table(tmp_path, f"image,labels\na.jpg,{many}\nb.jpg,{many}\n").notes
    assert note.endswith("c18, c19 and 10 more")
    assert table(tmp_path, "image,labels\na.jpg,x\n", classes="class\nx\n").notes == ()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("image,positives", "rename `positives` to `labels` if classes not listed are absent; else add a column"),
        ("a.jpg,x", "correct the file"),
        ("image,label", "correct the file"),
    ],
)
def test_a_header_of_neither_form_is_told_both(tmp_path: Path, header: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path, f"{header}\na.jpg,x\n")
    assert "image,labels" in caught.value.expected
    assert "image,positives,negatives" in caught.value.expected
    assert caught.value.next_step.startswith(says)


def test_a_list_of_classes_whose_first_line_was_a_class_is_told_from_a_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path, "image,labels\na.jpg,birds\nb.jpg,tree|bird\n", classes="bird\nbirds\ntree\n")
    assert caught.value.found.endswith(f"first line of {tmp_path}/classes.csv, 'bird', was taken for the header")
    assert caught.value.where == f"{tmp_path}/labels.csv, line 3"
    assert "add a header line" in caught.value.next_step


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


@pytest.mark.parametrize("workers", [1, 2])
def test_calls_are_taken_as_they_are_needed_and_closing_ends_the_rest(workers: int) -> None:
    taken = count()
    results = run_tasks(key_of, ((f"{number}.jpg",) for number in taken), workers)
    assert all(text == str(number) for number, text in (next(results), next(results)))
    results.close()
    assert next(taken) < 20


def test_the_death_of_a_worker_is_a_run_error() -> None:
    with pytest.raises(RunError, match="a worker process died"):
        list(run_tasks(os._exit, [(1,), (1,)], 2))


@settings(deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda n: len(n.encode()) <= 100
    ),
    num_bytes=st.integers(0, 8**11 - 1),
)
def test_a_header_is_that_of_the_tarfile_library(name: str, num_bytes: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    try:
        oracle = member.tobuf(tarfile.USTAR_FORMAT, "utf-8")
    except ValueError:
        return  # a name that ends in slashes
    assert tar_header(name.encode(), num_bytes) == oracle


def test_a_tar_is_that_of_the_tarfile_library_also_when_the_system_writes_less_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    samples = [(f"key{n}", random.bytes(size), random.bytes(n)) for n, size in enumerate((0, 1, 511, 512, 513, 70_000))]
    oracle = io.BytesIO()
    with tarfile.open(fileobj=oracle, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, *parts in samples:
            for ending, content in zip(("jpg", "json"), parts, strict=True):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for limit in (1 << 30, 1000, 1):
        monkeypatch.setattr(os, "writev", lambda fd, parts, limit=limit: os.write(fd, b"".join(parts)[:limit]))
        with open(tmp_path / "out.tar", "wb", buffering=0) as file:
            writer = TarWriter(file)
            offsets = [writer.add(*sample) for sample in samples]
            sha256 = writer.close()
        content = (tmp_path / "out.tar").read_bytes()
        assert content == oracle.getvalue()
        assert (sha256, writer.num_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
        assert [content[at : at + len(sample[1])] for at, sample in zip(offsets, samples, strict=True)] == [
            sample[1] for sample in samples
        ]


RECORDS = [
    Record("b.jpg", "train", (0, 2), (1,), 3, (3, 4), (0.5, 0.75), 90),
    Record("a/c.jpg", "val", (), (), 4),
    Record("d.jpg", "train", (1,), (0, 2, 4), 9, (3,), (1.0,), 270),
]


BARE = [record._replace(machine=(), confidences=(), rotation=0) for record in RECORDS]


@pytest.mark.parametrize("records", [RECORDS, BARE, []])
def test_a_table_of_records_gives_them_back_row_by_row_in_a_run_and_as_a_choice(records: list[Record]) -> None:
    table = Records.of(records)
    assert list(table) == records
    assert table.rows(range(len(table))) == records
    rows = np.array([2, 0, 2] if records else [], dtype=np.int64)
    assert list(table.take(rows)) == [records[row] for row in rows]


def index_of(records: list[Record]) -> ShardIndex:
    table = Records.of(records)
    numbers = np.arange(len(table))
    return ShardIndex(
        keys=keys_of(table.images),
        offsets=numbers.astype(np.uint64),
        num_bytes=numbers.astype(np.uint32),
        source_rows=table.source_rows,
        positives=table.positives,
        negatives=table.negatives,
        machine=table.machine,
        confidences=table.confidences,
    )


def test_machine_labels_round_trip_through_an_index_and_stay_apart_from_what_people_said() -> None:
    index = decode_index(encode_index(index_of(RECORDS)), "index")
    found = [tuple(part.tolist()) for row in range(3) for part in index.machine_of(row)]
    assert found == [(3, 4), (0.5, 0.75), (), (), (3,), (1.0,)]
    targets = index.targets([0, 1, 2], 5, "unknown").tolist()
    assert targets == [[1, -1, 1, 0, 0], [0, 0, 0, 0, 0], [-1, 1, -1, 0, -1]]
    bare = decode_index(encode_index(index_of(BARE)), "")
    assert (bare.machine, bare.confidences) == (None, None)
    assert [len(part) for part in bare.machine_of(0)] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"confidences": np.array([0.5, 0.75, 1.5], np.float16)}, "confidence outside"),
        ({"confidences": np.array([0.5, 0.75, np.nan], np.float16)}, "confidence outside"),
        ({"machine": ClassLists.of([(4, 3), (), (3,)])}, "out of order"),
    ],
)
def test_machine_labels_that_are_wrong_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ShardError, match=says):
        decode_index(encode_index(dataclasses.replace(index_of(RECORDS), **changes)), "index")


def test_an_index_with_one_of_the_two_machine_columns_is_refused() -> None:
    table = pa.ipc.open_file(encode_index(index_of(RECORDS))).read_all().drop_columns(["confidences"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ShardError, match="confidences"):
        decode_index(sink.getvalue().to_pybytes(), "index")


def test_labels_in_json_name_machine_claims_with_confidences_of_few_digits() -> None:
    ids = ["/m/a", "b", "c", "d", "e"]
    record = RECORDS[0]._replace(confidences=(float(np.float16(0.7)), 1.0))
    assert json.loads(record_json("b", record, ids, has_machine=True)) == {
        "key": "b", "positives": ["/m/a", "c"], "negatives": ["b"], "source": {"image": "b.jpg", "row": 3},
        "machine": {"d": 0.7, "e": 1.0},
    }  # fmt: skip
    assert "machine" not in json.loads(record_json("b", record, ids, has_machine=False))


@settings(deadline=None)
@given(st.floats(0, 1, width=16))
def test_the_shortest_confidence_is_the_same_in_float16(confidence: float) -> None:
    assert float(np.float16(shortest(confidence))) == confidence
