"""Claims about the stream over a store that fails, dawdles or lies: batches of a local run to the bit, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dist_mlpl import retry, storage
from dist_mlpl.batch import Batch
from dist_mlpl.data import fetch
from dist_mlpl.data.cache import ExtentCache
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import DataError, ShardError
from dist_mlpl.tools.object_store import EmbeddedS3
from tests.support.processes import killed_at_the_end
from tests.support.proxy import Fault, FaultyProxy
from tests.support.runs import tiny_shards
from tests.support.sets import (
    assert_same_batches,
    copy_set,
    fetch_ahead,
    order_over,
    small_disk,
    stream_over,
    wait_until,
    wait_until_quiet,
    whole_epoch,
)

pytestmark = pytest.mark.integration

EXTENT = 8_000  # bytes


@pytest.fixture(autouse=True)
def _small_extents_short_pauses_and_usual_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fetch, "EXTENT_BYTES", EXTENT)
    monkeypatch.setattr(retry, "_MAX_PAUSE_SECONDS", 0.02)
    yield
    storage.configure_storage()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(tiny_shards(tmp_path_factory.mktemp("bad")))


@pytest.fixture(scope="module")
def expected(local: Manifest) -> list[Batch]:
    """Of the local set, whole."""
    return whole_epoch(local)


@pytest.fixture(scope="module")
def remote(local: Manifest, embedded_s3: EmbeddedS3) -> Manifest:
    """Never changed."""
    return copy_set(local, embedded_s3.make_bucket("bucket-bad-storage") + "/set")


@pytest.fixture
def proxy(embedded_s3: EmbeddedS3) -> Iterator[FaultyProxy]:
    """This process's requests pass through it."""
    with FaultyProxy(embedded_s3.endpoint, slow_seconds=0.05) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url}, stall_seconds=0.5)
        yield proxy


@pytest.mark.parametrize(
    "faults",
    [("busy", "broken"), ("cut",), ("refuse", "slow"), ("stall",)],
    ids=["500 and 503", "cut in the middle", "closed or late", "silent in the middle"],
)
def test_requests_that_fail_now_and_then_do_not_show(
    faults: Sequence[Fault], remote: Manifest, expected: list[Batch], proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.fail_fraction(0.1, faults, seed=3)
    found = whole_epoch(remote, tmp_path)
    assert_same_batches(found, expected)
    assert all(proxy.struck[fault] for fault in faults)
    wait_until_quiet()
    assert list(tmp_path.glob("*.part")) == []
    assert list(tmp_path.glob("*.bytes"))


def test_without_a_cache_they_do_not_show_either(remote: Manifest, expected: list[Batch], proxy: FaultyProxy) -> None:
    faults: list[Fault] = ["busy", "broken", "cut", "refuse"]
    proxy.fail_fraction(0.1, faults, seed=5)
    assert_same_batches(whole_epoch(remote), expected)
    assert all(proxy.struck[fault] for fault in faults)


def test_a_throttled_store_gives_the_same_batches(
    remote: Manifest, expected: list[Batch], proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.bytes_per_second = 60_000
    assert_same_batches(whole_epoch(remote, tmp_path), expected)


def test_what_a_killed_process_left_half_fetched_is_never_read(
    remote: Manifest, expected: list[Batch], embedded_s3: EmbeddedS3, tmp_path: Path
) -> None:
    index = SplitIndex(remote, "train")
    for _ in index.shard_indexes():
        pass  # so that what the child asks for first is a tar
    with FaultyProxy(embedded_s3.endpoint) as proxy:
        proxy.fail("stall", times=1000, method="GET")

        def train() -> None:
            storage.configure_storage({"endpoint_url": proxy.url})
            stream = stream_over(index, ExtentCache(limit_bytes=1 << 30, folder=tmp_path))
            next(stream.train_batches(order_over(index), LabelStore(index).at(0), epoch=0, start=0, global_batch=16))

        with killed_at_the_end(train) as kill:
            wait_until(lambda: proxy.is_stalled.is_set() and any(tmp_path.glob("*.part")))
            kill()
    (left, *_) = tmp_path.glob("*.part")
    assert left.stat().st_size > 0
    assert_same_batches(whole_epoch(remote, tmp_path), expected)
    wait_until_quiet()
    assert list(tmp_path.glob("*.part")) == []


def test_a_full_cache_disk_is_said_and_the_run_goes_on(
    remote: Manifest, expected: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as folder:
        assert_same_batches(whole_epoch(remote, folder), expected)
        wait_until_quiet()
        assert "no room on the disk of the cache" in caplog.text
        assert list(folder.glob("*.bytes"))
        assert list(folder.glob("*.part")) == []


# A store that no longer holds what was packed ------------------------------------------------------------------------

SHARD = 3  # of the train split


def other_images(tar: bytes, index: SplitIndex) -> bytes:
    """A tar of the same size and names; every image is that of another row, cut or padded to the same length."""
    table, content = index.shard_index(SHARD), bytearray(tar)
    for row in range(table.num_samples):
        other = (row + 1) % table.num_samples
        image = tar[int(table.offsets[other]) :][: int(table.num_bytes[other])]
        length = int(table.num_bytes[row])
        start = int(table.offsets[row])
        content[start : start + length] = image[:length].ljust(length, b"\xd9")
    assert len(content) == len(tar)
    return bytes(content)


DAMAGE: dict[str, Callable[[bytes, SplitIndex], bytes | None]] = {
    "gone": lambda tar, index: None,
    "replaced": other_images,
    "truncated": lambda tar, index: tar[: len(tar) * 2 // 3],
    "empty": lambda tar, index: b"",
}


def damaged(manifest: Manifest, url: str, kind: str) -> Manifest:
    """A copy with one shard of the train split damaged."""
    copied = copy_set(manifest, url)
    index = SplitIndex(copied, "train")
    tar = copied.shard_url(index.shards[SHARD])
    content = DAMAGE[kind](storage.read_bytes(tar), index)
    if content is None:
        storage.remove(tar)
    else:
        storage.write_bytes(tar, content)
    return copied


@pytest.mark.parametrize("is_cached", [False, True], ids=["bare", "cached"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_shard_that_is_not_what_was_packed_stops_the_run_and_is_named(
    kind: str, is_cached: bool, local: Manifest, expected: list[Batch], s3_bucket: str, tmp_path: Path
) -> None:
    manifest = damaged(local, f"{s3_bucket}/set", kind)
    index = SplitIndex(manifest, "train")
    cache = ExtentCache(limit_bytes=1 << 30, folder=tmp_path) if is_cached else None
    stream, found = stream_over(index, cache), []
    batches = stream.train_batches(order_over(index), LabelStore(index).at(0), epoch=0, start=0, global_batch=16)
    with pytest.raises(DataError) as caught:
        found.extend(batches)  # what came before the error stays
    stream.close()
    assert caught.value.where == manifest.shard_url(index.shards[SHARD])
    assert "shards verify" in caught.value.next_step
    assert {"gone": "not there", "replaced": "other bytes than were packed"}.get(kind, "") in caught.value.found
    assert isinstance(caught.value, ShardError) == (kind in ("gone", "replaced"))
    assert_same_batches(found, expected[: len(found)])  # nothing was left out before
    assert all(batch.valid.all() for batch in found)


def test_a_shard_replaced_while_its_extents_are_kept_is_trained_on_as_it_was_packed(
    local: Manifest, expected: list[Batch], s3_bucket: str, tmp_path: Path
) -> None:
    manifest = copy_set(local, f"{s3_bucket}/set")
    for split in ("train", "test"):
        index = SplitIndex(manifest, split)
        stream = stream_over(index, ExtentCache(limit_bytes=1 << 30, folder=tmp_path))
        fetch_ahead(stream.fetcher, index.spans(0, index.num_samples))
        stream.close()
    damaged(local, f"{s3_bucket}/set", "replaced")
    assert_same_batches(whole_epoch(manifest, tmp_path), expected)


def test_a_local_shard_replaced_by_one_of_the_same_size_stops_the_run_and_is_named(
    local: Manifest, tmp_path: Path
) -> None:
    index = SplitIndex(damaged(local, f"{tmp_path}/set", "replaced"), "train")
    stream = stream_over(index)
    with pytest.raises(ShardError, match="other bytes than were packed") as caught:
        list(stream.train_batches(order_over(index), LabelStore(index).at(0), epoch=0, start=0, global_batch=16))
    stream.close()
    assert caught.value.where == index.manifest.shard_url(index.shards[SHARD])
