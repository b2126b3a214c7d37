"""Claims about where a sample's bytes come from: always the tar's, fetched two windows ahead and no further."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_mlpl import storage
from dist_mlpl.build import check_cache
from dist_mlpl.config import check_config
from dist_mlpl.data import fetch
from dist_mlpl.data.cache import ExtentCache
from dist_mlpl.data.fetch import FetchCounts, Fetcher, Spans, check_cache_limit, least_cache_bytes
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.order import EpochOrder
from dist_mlpl.data.shard_index import encode_index
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import ConfigError, ShardError, StorageError
from dist_mlpl.tools.object_store import EmbeddedS3
from dist_mlpl.world import World
from tests.support.proxy import FaultyProxy
from tests.support.runs import tiny_config, tiny_shards
from tests.support.sets import copy_set, fetch_ahead, images_of, is_running, wait_until

pytestmark = pytest.mark.integration

EXTENT = 8_000  # bytes: a few samples of a few kilobytes each


@pytest.fixture(autouse=True)
def _small_extents_and_usual_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fetch, "EXTENT_BYTES", EXTENT)
    yield
    storage.configure_storage()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """104 samples in shards of about 12."""
    return load_manifest(tiny_shards(tmp_path_factory.mktemp("fetch")))


@pytest.fixture(scope="module")
def images(local: Manifest) -> list[bytes]:
    return images_of(local, "train")


@pytest.fixture(scope="module")
def remote(local: Manifest, embedded_s3: EmbeddedS3) -> Manifest:
    return copy_set(local, embedded_s3.make_bucket("bucket-fetch") + "/set")


@pytest.fixture
def proxy(embedded_s3: EmbeddedS3) -> Iterator[FaultyProxy]:
    """This process's requests pass through it and are counted."""
    with FaultyProxy(embedded_s3.endpoint) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url})
        yield proxy


@pytest.fixture
def cache(tmp_path: Path) -> ExtentCache:
    return ExtentCache(limit_bytes=1 << 30, folder=tmp_path / "cache")


def taken(fetcher: Fetcher, indices: list[int]) -> list[bytes]:
    return list(fetcher.take(fetcher.begin(np.array(indices, dtype=np.int64))))


def tar_reads(proxy: FaultyProxy) -> int:
    return sum(request.startswith("GET") and request.endswith(".tar") for request in proxy.requests)


def keys(cache: ExtentCache) -> set[str]:
    return {path.stem for path in cache.folder.glob("*.bytes")}


def keys_of(index: SplitIndex, spans: Spans) -> set[str]:
    """Extents that hold the samples of some spans, one sample at a time."""
    fetcher = Fetcher(index)
    rows = [place for first, stop in spans for place in index.rows(np.arange(first, stop))]
    return {fetcher._extent(*place).key for place in rows}


class Rounds:
    """Rounds to follow that know how many were asked for: a fetcher asks for one more when it is done with the last."""

    def __init__(self, rounds: list[tuple[int, Spans]]) -> None:
        self.rounds, self.num_asked = rounds, 0

    def __iter__(self) -> Iterator[tuple[int, Spans]]:
        for number, spans in self.rounds:
            self.num_asked += 1
            yield number, spans
        self.num_asked += 1


def quarters(index: SplitIndex) -> Rounds:
    """All samples in four rounds, each of two parts that lie apart."""
    edges = np.linspace(0, index.num_samples, 9).astype(int).tolist()
    halves = [index.spans(*pair) for pair in pairwise(edges)]
    return Rounds([(number, halves[number] + halves[number + 4]) for number in range(4)])


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "s3"])
@pytest.mark.parametrize("is_cached", [False, True], ids=["bare", "cached"])
@pytest.mark.parametrize("extent_bytes", [1, 5_000, 8 << 20])
def test_any_samples_are_the_bytes_of_the_tar(
    is_remote: bool, is_cached: bool, extent_bytes: int, local: Manifest, remote: Manifest, images: list[bytes],
    cache: ExtentCache, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fetch, "EXTENT_BYTES", extent_bytes)
    index = SplitIndex(remote if is_remote else local, "train")
    fetcher = Fetcher(index, cache if is_cached else None)
    random, num_taken = np.random.default_rng(extent_bytes), 0
    fetcher.follow([(0, index.spans(0, index.num_samples))])  # while samples are taken, extents arrive
    for _ in range(12):
        indices = random.integers(0, index.num_samples, size=int(random.integers(0, 12))).tolist()
        assert taken(fetcher, indices) == [images[i] for i in indices]
        num_taken += len(indices)
    counts = fetcher.counts
    fetcher.close()
    assert sum(counts) == num_taken
    assert counts.local == (0 if is_remote else num_taken)
    assert is_cached or counts.cached == 0
    if not (is_remote and is_cached):
        assert keys(cache) == set()


def test_the_round_in_use_and_the_next_are_fetched_and_none_further(
    remote: Manifest, cache: ExtentCache, proxy: FaultyProxy
) -> None:
    index = SplitIndex(remote, "train")
    rounds, fetcher = quarters(index), Fetcher(index, cache)
    wanted: set[str] = set()
    fetcher.follow(rounds)
    for used in (0, 1):
        wanted |= keys_of(index, rounds.rounds[0][1] if used == 0 else []) | keys_of(index, rounds.rounds[used + 1][1])
        wait_until(lambda used=used: rounds.num_asked == used + 3)
        assert keys(cache) == wanted
        assert tar_reads(proxy) == len(wanted)
        fetcher.use(used + 1)
    wait_until(lambda: rounds.num_asked == 5)
    fetcher.close()
    assert keys(cache) == keys_of(index, index.spans(0, index.num_samples))


def test_a_hit_needs_no_request_and_a_sample_never_fetched_one_of_its_own(
    remote: Manifest, images: list[bytes], cache: ExtentCache, proxy: FaultyProxy
) -> None:
    index = SplitIndex(remote, "train")
    fetcher = Fetcher(index, cache)
    assert fetcher.counts == FetchCounts(local=0, cached=0, direct=0)
    fetch_ahead(fetcher, [(0, 12)])
    num_requests = len(proxy.requests)
    assert taken(fetcher, [11, 3, 3, 0]) == [images[i] for i in (11, 3, 3, 0)]
    assert len(proxy.requests) == num_requests
    assert fetcher.counts == FetchCounts(local=0, cached=4, direct=0)
    far = index.num_samples - 1
    index.name(far)  # reads the index of its shard
    num_requests = len(proxy.requests)
    assert taken(fetcher, [far, 5, far]) == [images[i] for i in (far, 5, far)]
    assert len(proxy.requests) == num_requests + 2
    assert fetcher.counts == FetchCounts(local=0, cached=5, direct=2)
    fetcher.close()


def test_an_extent_that_made_room_or_was_damaged_meanwhile_is_read_from_the_store(
    remote: Manifest, images: list[bytes], cache: ExtentCache
) -> None:
    index = SplitIndex(remote, "train")
    fetcher = Fetcher(index, cache)
    fetch_ahead(fetcher, [(0, 12)])
    ticket = fetcher.begin(np.arange(12))
    wait_until(lambda: all(read.done() for read in ticket.reads))
    paths = sorted(cache.folder.glob("*.bytes"))
    assert len(paths) >= 3
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    assert list(fetcher.take(ticket)) == images[:12]
    assert fetcher.counts.direct >= 2
    assert paths[1] not in set(cache.folder.glob("*.bytes")), "a damaged extent would be read again and again"
    fetch_ahead(fetcher, [(0, 12)])
    assert sorted(cache.folder.glob("*.bytes")) == paths
    fetcher.close()


def test_following_anew_leaves_what_was_followed_before(remote: Manifest, cache: ExtentCache) -> None:
    index = SplitIndex(remote, "train")
    old, new, fetcher = quarters(index), Rounds([(0, [(0, 12)])]), Fetcher(index, cache)
    fetcher.follow(old)
    wait_until(lambda: old.num_asked == 3)
    before = keys(cache)
    fetcher.follow(new)
    wait_until(lambda: new.num_asked == 2)
    fetcher.use(3)
    wait_until(lambda: not is_running("follow"))
    assert old.num_asked == 3
    assert keys(cache) == before | keys_of(index, [(0, 12)])
    fetcher.close()


def test_a_closed_fetcher_fetches_no_more(remote: Manifest, cache: ExtentCache) -> None:
    index = SplitIndex(remote, "train")
    rounds, fetcher = quarters(index), Fetcher(index, cache)
    fetcher.follow(rounds)
    wait_until(lambda: rounds.num_asked == 3)
    fetcher.close()
    fetcher.use(3)
    wait_until(lambda: not is_running("follow"))
    assert rounds.num_asked == 3


def test_ranks_of_one_node_fetch_an_extent_once(remote: Manifest, tmp_path: Path, proxy: FaultyProxy) -> None:
    index = SplitIndex(remote, "train")
    caches = [ExtentCache(limit_bytes=1 << 30, num_processes=3, folder=tmp_path) for _ in range(3)]
    fetchers, rounds = [Fetcher(index, cache) for cache in caches], [quarters(index) for _ in range(3)]
    for fetcher, mine in zip(fetchers, rounds, strict=True):
        fetcher.follow(mine)
    for mine in rounds:
        wait_until(lambda mine=mine: mine.num_asked == 3)
    assert tar_reads(proxy) == len(keys(caches[0])) > 0
    for fetcher in fetchers:
        fetcher.close()


def test_a_fetch_ahead_that_fails_is_said_and_what_is_needed_is_read_by_itself(
    remote: Manifest, images: list[bytes], cache: ExtentCache, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    index = SplitIndex(remote, "train")
    assert index.name(0)  # reads the index of its shard
    fetcher = Fetcher(index, cache)
    proxy.fail("deny")
    fetch_ahead(fetcher, [(0, 3)])
    assert "could not be fetched ahead" in caplog.text
    assert list(cache.folder.glob("*.part")) == []
    assert taken(fetcher, [0, 1, 2]) == images[:3]
    fetcher.close()


def without_checksums(manifest: Manifest, url: str) -> Manifest:
    """A copy whose indexes were made from tar headers alone."""
    copied = copy_set(manifest, url)
    entries = []
    for number, entry in enumerate(copied.split("train").shards):
        table = SplitIndex(copied, "train").shard_index(number)
        content = encode_index(table.__class__(**{**{n: getattr(table, n) for n in table.__slots__}, "crc32": None}))
        storage.write_bytes(copied.index_url(entry), content)
        entries.append(entry.model_copy(update={"index_sha256": storage.sha256_of_bytes(content), "sha256": ""}))
    split = copied.split("train").model_copy(update={"shards": tuple(entries)})
    return copied.model_copy(update={"splits": {"train": split}})


def test_without_checksums_a_sample_must_at_least_be_a_jpeg(
    local: Manifest, images: list[bytes], s3_bucket: str, cache: ExtentCache
) -> None:
    manifest = without_checksums(local, f"{s3_bucket}/set")
    index = SplitIndex(manifest, "train")
    assert index.shard_index(0).crc32 is None
    fetcher = Fetcher(index, cache)
    assert taken(fetcher, [0, 1, 2]) == images[:3]
    url = manifest.shard_url(index.shards[0])
    tar = storage.read_bytes(url)
    storage.write_bytes(url, b"\0" * 512 + tar[:-512])
    with pytest.raises(ShardError, match="other bytes than were packed") as caught:
        taken(fetcher, [0])
    assert caught.value.where == url
    fetcher.close()


@pytest.mark.parametrize("window_samples", [4, 12, 30])
@pytest.mark.parametrize("extent_bytes", [3_000, 20_000])
def test_the_least_cache_holds_two_windows_of_every_lane(
    local: Manifest, window_samples: int, extent_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two consecutive windows lie in, whole extents at their ends included, survives every look for room."""
    monkeypatch.setattr(fetch, "EXTENT_BYTES", extent_bytes)
    index, fetcher = SplitIndex(local, "train"), Fetcher(SplitIndex(local, "train"))
    for epoch in range(6):
        order = EpochOrder(index.shard_sizes, seed=0, epoch=epoch, num_lanes=3, window_samples=window_samples)
        least = least_cache_bytes(index, num_lanes=order.num_lanes, window_samples=window_samples)
        for window in range(max(order.num_windows(lane) for lane in range(order.num_lanes)) - 1):
            extents = {
                fetcher._extent(*place)
                for lane in range(order.num_lanes)
                for number in (window, window + 1)
                if number < order.num_windows(lane)
                for span in order.spans(lane, number)
                for place in index.rows(np.arange(*span))
            }
            assert sum(extent.stop - extent.start for extent in extents) <= least * 7 / 8


def test_a_cache_below_the_least_is_refused_with_numbers_that_work(local: Manifest) -> None:
    index = SplitIndex(local, "train")
    order = {"num_lanes": 6, "window_samples": 8}
    least = least_cache_bytes(index, **order)
    assert least > 2 * 6 * 8 * index.num_bytes // index.num_samples
    assert least > least_cache_bytes(index, num_lanes=3, window_samples=8)
    assert least > least_cache_bytes(index, num_lanes=6, window_samples=2)
    for limit in (least, 10 * least, 0):
        assert check_cache_limit(limit, index, **order) == least
    least_of_one = least_cache_bytes(index, num_lanes=1, window_samples=8)
    for limit in (1, least_of_one - 1, least_of_one, least_of_one + least // 4, least - 1):
        with pytest.raises(ConfigError) as caught:
            check_cache_limit(limit, index, **order)
        error = caught.value
        assert error.found == f"data.cache_bytes {limit:,}"
        assert f"at least {least:,} on this node: two windows of 8 samples of 6 lanes" in error.expected
        assert "set it to 0" in error.next_step
        advised = [int(number) for number in re.findall(r"num_lanes to (\d+)", error.next_step)]
        assert bool(advised) == (limit >= least_of_one)
        for num_lanes in advised:
            check_cache_limit(limit, index, num_lanes=num_lanes, window_samples=8)


def test_lost_nodes_cost_a_run_its_small_cache_and_not_its_life(
    local: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SplitIndex(local, "train")
    monkeypatch.setattr(SplitIndex, "is_remote", True)
    data = {"num_lanes": 8, "window_samples": 4}
    enough = least_cache_bytes(index, num_lanes=4, window_samples=4)  # of the two ranks' 8 lanes, as dealt to one
    assert enough < least_cache_bytes(index, num_lanes=8, window_samples=4)
    config = check_config(tiny_config(local.url, data=data | {"cache_bytes": enough}, group_size=4), where="test")
    told, is_used = check_cache(config, index, World(rank=0, size=2, local_rank=0, local_size=1))
    assert is_used
    assert "for 4 lanes" in told[0]
    with pytest.raises(ConfigError, match=r"data\.cache_bytes"):
        check_cache(config, index, World(rank=0, size=1, local_rank=0, local_size=1))
    told, is_used = check_cache(config, index, World(rank=0, size=1, local_rank=0, local_size=1), is_shrunk=True)
    assert not is_used
    assert "too small for 1 ranks, fewer than before" in told[0]


def test_no_split_needs_more_cache_than_it_has_bytes(local: Manifest) -> None:
    index = SplitIndex(local, "train")
    least = least_cache_bytes(index, num_lanes=64, window_samples=4096)
    assert index.num_bytes < least <= index.num_bytes * 8 // 7 + 2 * EXTENT


def test_a_network_disk_that_fails_over_is_read_again(
    local: Manifest, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = Fetcher(SplitIndex(local, "train"))
    pread, faults = os.pread, [OSError(errno.ESTALE, "stale file handle")]

    def fail_once(*arguments: int) -> bytes:
        if faults:
            raise faults.pop()
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fail_once)
    found = taken(fetcher, list(range(len(images))))
    fetcher.close()
    assert not faults
    assert found == images


def test_a_network_disk_that_fails_over_is_opened_again(
    local: Manifest, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher, faults = Fetcher(SplitIndex(local, "train")), [OSError(errno.ESTALE, "stale file handle")]

    def fail_once(*arguments: Any, **options: Any) -> Any:
        if faults:
            raise faults.pop()
        return open(*arguments, **options)

    monkeypatch.setattr("dist_mlpl.data.fetch.open", fail_once, raising=False)
    found = taken(fetcher, list(range(len(images))))
    fetcher.close()
    assert not faults
    assert found == images


def test_a_shard_that_may_not_be_opened_is_a_storage_error(local: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = Fetcher(SplitIndex(local, "train"))

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("dist_mlpl.data.fetch.open", refuse, raising=False)
    monkeypatch.setattr("dist_mlpl.storage.open", refuse, raising=False)
    with pytest.raises(StorageError, match="not allowed"):
        taken(fetcher, [0])
    fetcher.close()


def test_a_shard_deleted_under_a_kept_handle_of_a_network_disk_is_named(
    local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_set(local, str(tmp_path / "set"))
    fetcher = Fetcher(SplitIndex(copied, "train"))
    taken(fetcher, [0])
    (tmp_path / "set" / "train-000000.tar").unlink()

    def fail(*arguments: int) -> bytes:
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ShardError, match="train-000000"):
        taken(fetcher, [0])
    fetcher.close()
