"""Claims about tars without an index: what batches hold, what every rank gets, what stops them, and whole runs."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_mlpl import comm, storage
from dist_mlpl.batch import Batch
from dist_mlpl.chain import read_chain
from dist_mlpl.config import load_config, with_absolute_paths
from dist_mlpl.data.order import PADDING, EpochOrder
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import EVALUATION_BLOCK
from dist_mlpl.data.tar_stream import TarStream
from dist_mlpl.data.tars import LIMITS, TarSample, TarSet, TarSettings, mixed, open_tars, read_tar
from dist_mlpl.data.transform import Transform, TransformSettings
from dist_mlpl.errors import CheckpointError, ConfigError, DataError, MlplError, ShardError, StorageError
from dist_mlpl.labels import dense_targets
from dist_mlpl.progress import Report, Row
from dist_mlpl.tools.audit import audit
from dist_mlpl.tools.judge import judge
from dist_mlpl.train import train
from dist_mlpl.world import World
from shards.index import index_tars
from tests.support.images import tiny_jpeg, undecodable
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same_end, tiny_config, write_config
from tests.support.tars import Member, as_json, tar_bytes, write_tar

pytestmark = pytest.mark.integration

CLASSES = tuple(f"c{column}" for column in range(40))
SETTINGS = TransformSettings(size=16, color_jitter=0.3)
SEED = 3
NO_LABELS: Any = None  # what a stream is given whose labels come with the images


def sample(number: int) -> list[Member]:
    """Sample number n has the classes that are set in its binary digits."""
    present = [CLASSES[bit] for bit in range(10) if number >> bit & 1]
    return [(f"{number:05d}.jpg", tiny_jpeg(number)), (f"{number:05d}.json", as_json(labels=present))]


def number_in(targets: torch.Tensor) -> int:
    """Which sample these (C,) labels belong to."""
    return sum(1 << bit for bit in range(10) if targets[bit] == 1)


def make_tars(folder: Path, sizes: list[int]) -> TarSet:
    """Tars of so many samples each, numbered through."""
    starts = np.cumsum([0, *sizes])
    for number, (start, stop) in enumerate(pairwise(starts.tolist())):
        write_tar(folder / f"train-{number:03d}.tar", [m for n in range(start, stop) for m in sample(n)])
    (folder / "classes.csv").write_text("class\n" + "\n".join(CLASSES) + "\n")
    return opened(folder)


def opened(folder: Path | str, **changes: Any) -> TarSet:
    fields = {"tars": {"train": str(folder)}, "classes": f"{folder}/classes.csv", "epoch_samples": 1, **changes}
    return open_tars(TarSettings(**fields), "train")


def stream_over(
    tars: TarSet, *, rank: int = 0, size: int = 1, train: bool = True, epoch_samples: int = 48, shuffle_buffer: int = 7,
    **options: Any,
) -> TarStream:  # fmt: skip
    settings = tars.settings.model_copy(update={"epoch_samples": epoch_samples, "shuffle_buffer": shuffle_buffer})
    given: dict[str, Any] = {"num_workers": 0, "max_bad_fraction": 1.0} | options
    return TarStream(
        replace(tars, settings=settings),
        Transform(SETTINGS, seed=SEED, train=train),
        world=World(rank=rank, size=size),
        seed=SEED,
        device=torch.device("cpu"),
        **given,
    )


def epoch_over(
    stream: TarStream, epoch_samples: int = 48, *, epoch: int, start: int, global_batch: int
) -> Iterator[Batch]:
    """Training on any order of so many places in the epoch: only the ranks' shares of it matter."""
    order = EpochOrder([epoch_samples], seed=0, epoch=0, group_size=4)
    return stream.train_batches(order, NO_LABELS, epoch=epoch, start=start, global_batch=global_batch)


def train_batches(
    tars: TarSet, *, epoch: int = 0, start: int = 0, global_batch: int = 16, epoch_samples: int = 48, **options: Any
) -> list[Batch]:
    stream = stream_over(tars, epoch_samples=epoch_samples, **options)
    try:
        return list(epoch_over(stream, epoch_samples, epoch=epoch, start=start, global_batch=global_batch))
    finally:
        stream.close()


def numbers_in(batches: list[Batch]) -> list[int]:
    """The samples of valid rows, in order."""
    return [number_in(row) for batch in batches for row in batch.targets[batch.valid]]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name, ours, theirs in zip(Batch._fields, one, other, strict=True):
            assert ours is None if theirs is None else torch.equal(ours, theirs), name


# Training


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_with_equal_tars_see_every_sample_once_in_an_epoch_of_their_number(tmp_path: Path, size: int) -> None:
    tars = make_tars(tmp_path, [8] * 6)
    by_rank = [train_batches(tars, rank=rank, size=size, global_batch=24) for rank in range(size)]
    assert {len(batches) for batches in by_rank} == {2}
    assert len({batch.num_images for batches in by_rank for batch in batches}) == 1
    assert sorted(number for batches in by_rank for number in numbers_in(batches)) == list(range(48))
    index = torch.cat([batch.index for batches in by_rank for batch in batches])
    assert sorted(index[index != PADDING].tolist()) == list(range(48))


def test_a_row_is_its_sample_transformed_as_its_place_in_the_epoch_says(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [9, 4, 12])
    transform = Transform(SETTINGS, seed=SEED, train=True)
    for batch in train_batches(tars, epoch=2, epoch_samples=24, global_batch=12):
        for row in range(batch.num_images):
            number = number_in(batch.targets[row])
            decoded = transform(tiny_jpeg(number), epoch=2, position=int(batch.index[row]))
            torch.testing.assert_close(batch.images[row], transform.normalise(decoded.image[None])[0], rtol=0, atol=0)
            torch.testing.assert_close(batch.crop[row], decoded.crop, rtol=0, atol=0)
            assert bool(batch.flipped[row]) == decoded.flipped
            bits = [np.array([bit for bit in range(10) if number >> bit & 1], dtype=int)]
            expected = dense_targets(bits, [np.array([], dtype=int)], num_classes=40, unlisted="absent")
            np.testing.assert_array_equal(batch.targets[row].numpy(), expected[0])


def test_ranks_of_unequal_tars_run_the_same_number_of_equal_steps_and_deal_anew_when_through(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [1, 20, 3])
    by_rank = [train_batches(tars, rank=rank, size=2, epoch_samples=80, global_batch=8) for rank in range(2)]
    assert [len(batches) for batches in by_rank] == [10, 10]
    assert all(bool(batch.valid.all()) and batch.num_images == 4 for batches in by_rank for batch in batches)
    counts = Counter(number for batches in by_rank for number in numbers_in(batches))
    assert set(counts) == set(range(24))  # nobody is left out for good


def test_a_short_share_is_padded(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [8, 8, 8])
    by_rank = [train_batches(tars, rank=rank, size=2, epoch_samples=12, global_batch=12) for rank in range(2)]
    assert [batch.valid.tolist() for (batch,) in by_rank] == [[True] * 8, [True] * 4 + [False] * 4]
    padding = by_rank[1][0].rows(4, 8)
    assert padding.index.tolist() == [PADDING] * 4
    assert not padding.targets.any()


def test_an_epoch_is_the_same_again_on_any_number_of_threads_and_others_are_mixed_anew(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [8] * 6)
    first = train_batches(tars)
    for num_workers in (1, 3):
        assert_same(train_batches(tars, num_workers=num_workers), first)
    other = numbers_in(train_batches(tars, epoch=1))
    assert other != numbers_in(first)
    assert sorted(other) == sorted(numbers_in(first)) == list(range(48))


def test_a_resume_goes_on_at_its_place_in_the_epoch_with_whole_tars_dealt_anew(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [8] * 6)
    rest = train_batches(tars, start=16, shuffle_buffer=1)
    assert [batch.index.tolist() for batch in rest] == [list(range(16, 32)), list(range(32, 48))]
    numbers = numbers_in(rest)
    assert len(set(numbers)) == 32
    runs = [numbers[at : at + 8] for at in range(0, 32, 8)]
    assert all(run == list(range(run[0], run[0] + 8)) and run[0] % 8 == 0 for run in runs)
    assert numbers != numbers_in(train_batches(tars, shuffle_buffer=1))[16:]


def test_samples_are_mixed_within_the_buffer_and_none_is_lost() -> None:
    read = [TarSample(str(number), b"", np.empty(0, dtype=np.int8)) for number in range(100)]
    for shuffle_buffer in (1, 10, 1000):
        drawn = [int(found.name) for found in mixed(iter(read), shuffle_buffer=shuffle_buffer, key=5)]
        assert sorted(drawn) == list(range(100))
        assert (drawn == list(range(100))) == (shuffle_buffer == 1)
        assert all(number <= place + shuffle_buffer for place, number in enumerate(drawn))  # none before it was read


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_undecodable_sample_keeps_its_place_is_listed_and_counted(tmp_path: Path, num_workers: int) -> None:
    members = [member for number in range(1, 9) for member in sample(number)]
    members[4] = (members[4][0], undecodable(tiny_jpeg(3)))
    write_tar(tmp_path / "train-0.tar", members)
    (tmp_path / "classes.csv").write_text("class\n" + "\n".join(CLASSES) + "\n")
    stream = stream_over(opened(tmp_path), epoch_samples=8, num_workers=num_workers, max_bad_fraction=0.1)
    (batch,) = epoch_over(stream, 8, epoch=0, start=0, global_batch=8)
    consumed = stream.take_consumed()
    (bad,) = consumed.bad
    assert bad.name == f"{tmp_path}/train-0.tar: 00003"
    assert batch.valid.tolist() == [place != bad.index for place in range(8)]
    assert not batch.targets[bad.index].any()
    assert np.concatenate(consumed.positions).tolist() == list(range(8))
    assert stream.take_consumed().positions == []
    with pytest.raises(DataError, match="1 undecodable samples"):
        stream.stop_if_bad(1)
    stream.close()


def test_a_stream_left_in_the_middle_ends_and_serves_the_next_epoch(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [8] * 6)
    stream = stream_over(tars, num_workers=2)
    batches = epoch_over(stream, epoch=0, start=0, global_batch=8)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    again = list(epoch_over(stream, epoch=1, start=0, global_batch=16))
    stream.close()
    assert_same(again, train_batches(tars, epoch=1))


def test_tars_in_a_bucket_give_the_batches_of_tars_on_disk(tmp_path: Path, s3_bucket: str) -> None:
    tars = make_tars(tmp_path, [8] * 6)
    for path in tmp_path.iterdir():
        storage.upload(path, f"{s3_bucket}/{path.name}")
    remote = opened(s3_bucket, tars={"train": f"{s3_bucket}/train-{{000..005}}.tar"})
    assert remote.manifest.digest == tars.manifest.digest
    assert_same(train_batches(remote, num_workers=1), train_batches(tars))


# Evaluation


def evaluated(rank: int, size: int, folder: str, num_workers: int) -> list[Batch]:
    assert (comm.rank(), comm.world_size()) == (rank, size)
    stream = stream_over(opened(folder), rank=rank, size=size, train=False, num_workers=num_workers)
    try:
        return list(stream.evaluation_batches(NO_LABELS))
    finally:
        stream.close()


@pytest.mark.parametrize(("size", "sizes"), [(1, [40, 3]), (2, [70, 3, 20]), (3, [5, 40])])
def test_an_evaluation_sees_every_sample_once_in_as_many_blocks_on_every_rank(
    tmp_path: Path, size: int, sizes: list[int]
) -> None:
    make_tars(tmp_path, sizes)
    by_rank = run_ranks(evaluated, size, str(tmp_path), 2) if size > 1 else [evaluated(0, 1, str(tmp_path), 0)]
    most = max(sum(sizes[rank::size]) for rank in range(size))
    assert {len(batches) for batches in by_rank} == {-(-most // EVALUATION_BLOCK)}
    assert {batch.num_images for batches in by_rank for batch in batches} == {EVALUATION_BLOCK}
    assert sorted(number for batches in by_rank for number in numbers_in(batches)) == list(range(sum(sizes)))
    index = torch.cat([batch.index[batch.valid] for batches in by_rank for batch in batches])
    assert len(set(index.tolist())) == sum(sizes)
    assert all((batch.index[~batch.valid] == PADDING).all() for batches in by_rank for batch in batches)


# Reading


def test_reading_from_front_to_back_finds_what_the_index_finds(tmp_path: Path) -> None:
    labels = [as_json(positives=["c1", "c3"], negatives=["c0"]), as_json(labels=[]), as_json(caption="words")]
    members: list[Member] = [
        ("x", None), ("x/a.json", labels[0]), ("x/a.JPEG", tiny_jpeg(0)), ("x/a.txt", b"words"),
        ("x/b.jpg", tiny_jpeg(1)), ("x/b.json", labels[1]), ("x/b.cls", b"5"),
        ("x/c.jpg", tiny_jpeg(2)), ("x/c.json", labels[2]), ("x/c.cls", b"7\n"), ("d.png", b""), ("d.cls", b"1"),
        ("k" * 150 + ".cls", b"c9"), ("k" * 150 + ".jpg", tiny_jpeg(3)), ("README", b""),
    ]  # fmt: skip
    write_tar(tmp_path / "train-0.tar", members, tar_format=tarfile.GNU_FORMAT)
    (tmp_path / "classes.csv").write_text("class\n" + "\n".join(CLASSES) + "\n")
    ignored: Counter[str] = Counter()
    read = list(read_tar(f"{tmp_path}/train-0.tar", opened(tmp_path, unlisted="unknown"), ignored))
    assert ignored == {"other member": 3, "labels without a JPEG": 1}
    manifest = index_tars(str(tmp_path), classes=f"{tmp_path}/classes.csv").manifest
    index = SplitIndex(manifest, "train")
    np.testing.assert_array_equal([found.targets for found in read], index.targets(np.arange(4)))
    assert [found.image for found in read] == [tiny_jpeg(number) for number in range(4)]
    assert [found.name.split(": ")[1] for found in read] == [index.shard_index(0).keys[row].as_py() for row in range(4)]


GOOD = [member for number in range(60) for member in sample(number)]


def damaged(content: bytes) -> bytes:
    at = content.index(b"00010.jpg")
    return content[:at] + b"?" + content[at + 1 :]


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"", ShardError, "without the end mark"),
        (b"words, no tar" * 100, ShardError, "without the end mark"),
        (b"words, no tar" * 100 + bytes(1024), ShardError, "does not read"),
        (b"\x1f\x8b" + b"x" * 100, ShardError, "compressed by gzip"),
        (tar_bytes([]), ShardError, "no JPEG inside"),
        (tar_bytes(GOOD)[:2000], ShardError, "without the end mark"),
        (tar_bytes(GOOD)[: tar_bytes(GOOD).index(b"00007.jpg")], ShardError, "without the end mark"),
        (damaged(tar_bytes(GOOD)), ShardError, "damaged header"),
        (tar_bytes([*GOOD, *GOOD[-2:]]), ShardError, "duplicate file name"),
        (tar_bytes([*GOOD, ("00059.jpeg", tiny_jpeg(1))]), ShardError, "two images of one key"),
        (tar_bytes([*GOOD, ("b.jpg", tiny_jpeg(1))]), DataError, "without labels"),
        (tar_bytes([("b.jpg", tiny_jpeg(1)), ("b.cls", b"c40")]), DataError, "unknown class 'c40'"),
        (tar_bytes([("b.jpg", tiny_jpeg(1)), ("b.json", b"{")]), DataError, "do not read"),
        (
            tar_bytes([("b.jpg", tiny_jpeg(1)), ("b.json", as_json(positives=[], negatives=["c1"]))]),
            DataError,
            "a sample that lists negatives",
        ),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_tar_that_does_not_read_stops_the_stream_with_its_name(
    tmp_path: Path, content: bytes, kind: type[MlplError], says: str, num_workers: int
) -> None:
    (tmp_path / "train-0.tar").write_bytes(content)
    (tmp_path / "classes.csv").write_text("class\n" + "\n".join(CLASSES) + "\n")
    with pytest.raises(kind, match=says) as caught:
        train_batches(opened(tmp_path), epoch_samples=200, num_workers=num_workers)
    assert "train-0.tar" in str(caught.value)
    assert str(caught.value).count("\n") == 3  # the four parts, as nobody changed them on the way


def test_a_tar_that_is_not_there_stops_the_stream_with_its_name(tmp_path: Path) -> None:
    make_tars(tmp_path, [8])
    tars = opened(tmp_path, tars={"train": f"{tmp_path}/train-{{000..001}}.tar"})
    with pytest.raises(StorageError, match="the tar not found"):
        train_batches(tars)


def test_fewer_tars_than_ranks_are_refused_in_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 tars for 3 ranks"):
        stream_over(make_tars(tmp_path, [8, 8]), size=3)


def test_a_split_without_tars_is_refused_by_name(tmp_path: Path) -> None:
    make_tars(tmp_path, [8])
    settings = TarSettings(tars={"train": str(tmp_path)}, classes=f"{tmp_path}/classes.csv", epoch_samples=8)
    with pytest.raises(ConfigError, match="'train'"):
        open_tars(settings, "trian")


def test_classes_have_the_digest_of_a_manifest_with_the_same_classes(tmp_path: Path) -> None:
    tars = make_tars(tmp_path, [8])
    indexed = index_tars(str(tmp_path), classes=f"{tmp_path}/classes.csv").manifest
    assert tars.manifest.classes_sha256 == indexed.classes_sha256


def test_the_digest_is_of_the_tars_names_the_classes_and_the_meaning_of_labels(tmp_path: Path) -> None:
    digests = [make_tars(tmp_path / "a", [1, 2]).manifest.digest, make_tars(tmp_path / "b", [3, 1]).manifest.digest]
    digests.append(opened(tmp_path / "a", unlisted="unknown").manifest.digest)
    digests.append(opened(tmp_path / "a", tars={"train": f"{tmp_path}/a/*1.tar"}).manifest.digest)
    (tmp_path / "a" / "classes.csv").write_text("class\n" + "\n".join(reversed(CLASSES)) + "\n")
    digests.append(opened(tmp_path / "a").manifest.digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_labels_by_index_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.unindexed"):
        make_tars(tmp_path, [8]).targets(np.arange(2))


# Runs


def make_run(folder: Path, url: str, **unindexed: Any) -> str:
    """Tars of both splits and the config of a run over them, 6 steps an epoch, the tars to be found at `url`."""
    make_tars(folder / "train", [40, 26, 35])
    make_tars(folder / "test", [20, 13])
    where = {"tars": {"train": f"{url}/train", "test": f"{url}/test/train-{{000..001}}.tar"},
             "classes": f"{url}/train/classes.csv", "epoch_samples": 104, "shuffle_buffer": 9}  # fmt: skip
    data = {"known_fraction": None, "num_lanes": 5, "window_samples": 16, "unindexed": where | unindexed}
    return write_config(folder / "run.yaml", tiny_config("", group_size=4, data=data))


class Rows(list[Row]):
    """A sink that keeps its rows."""

    row = list.append

    def flush(self) -> None:
        pass

    close = flush


def train_on(path: str, out: str, max_steps: int | None = None) -> Rows:
    """One attempt in this process; returns what it told."""
    rows = Rows()
    train(load_config(path, out=out), Report(lambda *_: [rows]), max_steps=max_steps)
    return rows


def test_a_run_over_tars_stops_in_an_epoch_goes_on_evaluates_and_is_refused_by_audit(tmp_path: Path) -> None:
    path, out = make_run(tmp_path, str(tmp_path)), str(tmp_path / "run")
    notes = [row["text"] for row in train_on(path, out, 3) if row["event"] == "note"]
    assert set(LIMITS) <= set(notes)
    train_on(path, out)
    chain = read_chain(out)
    assert [commit.step for commit in chain] == [2, 3, 4, 6, 8, 10, 12]
    assert [commit.attempt for commit in chain] == ["0001"] * 2 + ["0002"] * 5
    assert (chain[1].samples_consumed, chain[-1].epoch) == (48, 2)

    found = judge(out)
    assert (found["num_images"], found["split"], found["step"]) == (33, "test", 12)
    record = json.loads((tmp_path / "run" / "evaluations" / "00000012.json").read_text())
    assert found["mAP"] == record["mAP"]
    classes = f"{tmp_path}/train/classes.csv"
    indexed = index_tars(f"{tmp_path}/test", out=f"{tmp_path}/index", classes=classes, split="test").manifest
    by_index = judge(out, manifest_url=indexed.url)
    assert by_index["num_images"] == 33
    assert by_index["mAP"] == pytest.approx(found["mAP"], abs=1e-6)

    with pytest.raises(CheckpointError, match=r"data\.unindexed") as caught:
        audit(out)
    assert "shards index" in caught.value.next_step


def test_a_run_over_tars_in_a_bucket_ends_bit_equal_to_one_over_the_same_tars_on_disk(
    tmp_path: Path, s3_bucket: str
) -> None:
    local, remote = make_run(tmp_path / "local", str(tmp_path / "local")), make_run(tmp_path / "remote", s3_bucket)
    for path in tmp_path.glob("remote/t*/*"):
        storage.upload(path, f"{s3_bucket}/{path.parent.name}/{path.name}")
    for path, out in ((local, str(tmp_path / "run")), (remote, f"{s3_bucket}/run")):
        train_on(path, out, 7)
        _, *rows = (
            row for row in train_on(path, out) if row["event"] == "step"
        )  # the first counts all that was before
        assert any(row["bytes_read_per_second"] > 0 for row in rows) == (path == remote)
    assert_same_end(str(tmp_path / "run"), f"{s3_bucket}/run")


def test_a_run_over_tars_goes_from_two_ranks_to_one_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    path, out = make_run(tmp_path, str(tmp_path)), str(tmp_path / "run")

    def attempt(rank: int, world_size: int) -> None:
        train_on(path, out, 7)

    run_ranks(attempt, 2, use_group=False)
    train_on(path, out)
    chain = read_chain(out)
    assert [(commit.step, commit.world_size) for commit in chain] == [
        (2, 2), (4, 2), (6, 2), (7, 2), (8, 1), (10, 1), (12, 1)
    ]  # fmt: skip
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("run/evaluations/*.json"))]
    assert [(record["step"], record["num_images"]) for record in records] == [(6, 33), (12, 33)]


def test_a_run_over_tars_goes_on_where_they_lie_now_but_not_over_others(tmp_path: Path) -> None:
    path, out = make_run(tmp_path, str(tmp_path)), str(tmp_path / "run")
    train_on(path, out, 2)
    moved = make_run(tmp_path / "moved", str(tmp_path / "moved"))
    train_on(moved, out, 1)
    for change, word in (
        ({"epoch_samples": 120}, "epoch_samples"),
        ({"unlisted": "unknown"}, "unlisted"),
        ({"tars": {"train": f"{tmp_path}/train/*1.tar", "test": f"{tmp_path}/test"}}, "manifest"),
    ):
        with pytest.raises(CheckpointError, match=word):
            train_on(make_run(tmp_path / "other", str(tmp_path / "other"), **change), out)
    classes = tmp_path / "moved" / "train" / "classes.csv"
    classes.write_text("class\n" + "\n".join(reversed(CLASSES)) + "\n")
    with pytest.raises(CheckpointError, match="classes"):
        train_on(moved, out)
    with pytest.raises(CheckpointError, match="40 classes"):
        judge(out)


def test_the_driver_finds_tars_from_any_folder_and_too_few_of_them_before_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_mlpl.cluster import check_before_start  # imports Ray

    monkeypatch.chdir(tmp_path)
    path = make_run(tmp_path, "tars/..")
    (tmp_path / "tars").mkdir()
    config = with_absolute_paths(load_config(path, out="run", overrides=["cluster.num_workers=3"]))
    monkeypatch.chdir("/")
    check_before_start(config, allow_change=False)
    more = config.cluster.model_copy(update={"num_workers": (1, 4)})
    with pytest.raises(ConfigError, match="3 tars for 4 ranks"):
        check_before_start(config.model_copy(update={"cluster": more}), allow_change=False)
    data = config.data.model_copy(update={"eval_split": "tset"})
    with pytest.raises(ConfigError, match="'test'"):
        check_before_start(config.model_copy(update={"data": data}), allow_change=False)
