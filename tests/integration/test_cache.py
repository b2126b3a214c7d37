"""Claims about a node's copy of shards: keyed by content, bounded, shared by processes, never half there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_mlpl import storage
from dist_mlpl.data.cache import ShardCache, cache_folder
from dist_mlpl.data.manifest import ClassEntry, Manifest, Packing, ShardEntry, SourceEntry, Split, classes_digest
from dist_mlpl.errors import ConfigError, ShardError, StorageError
from dist_mlpl.tools.object_store import EmbeddedS3
from tests.support.processes import call_forked, killed_at_the_end
from tests.support.proxy import FaultyProxy

pytestmark = pytest.mark.integration

SHARD_BYTES = 10_000


@pytest.fixture(autouse=True)
def _usual_storage() -> Iterator[None]:
    yield
    storage.configure_storage()


@pytest.fixture
def proxy(embedded_s3: EmbeddedS3) -> Iterator[FaultyProxy]:
    """Requests of this process and its children pass through it and are counted."""
    with FaultyProxy(embedded_s3.endpoint) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url})
        yield proxy


def content_of(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(SHARD_BYTES)


def set_at(url: str, seeds: range) -> Manifest:
    """A data set whose shards are plain noise: the cache never looks inside."""
    shards = []
    for number, seed in enumerate(seeds):
        content = content_of(seed)
        storage.write_bytes(f"{url}/train-{number:06d}.tar", content)
        shards.append(
            ShardEntry(
                file=f"train-{number:06d}.tar",
                index=f"train-{number:06d}.arrow",
                num_samples=1,
                num_bytes=len(content),
                sha256=storage.sha256_of_bytes(content),
                index_sha256="",
            )
        )
    classes = (ClassEntry(id="a", name="a"),)
    return Manifest(
        version="test",
        classes=classes,
        classes_sha256=classes_digest(classes),
        unlisted="unknown",
        splits={"train": Split(num_samples=len(shards), num_bytes=SHARD_BYTES * len(shards), shards=tuple(shards))},
        source=SourceEntry(name="test", arguments={}, digest=""),
        packing=Packing(seed=0, target_shard_bytes=1),
        url=url,
    )


def shards_of(manifest: Manifest) -> tuple[ShardEntry, ...]:
    return manifest.split("train").shards


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == suffix)


def downloads(proxy: FaultyProxy) -> list[str]:
    return [request for request in proxy.requests if request.startswith("GET") and request.endswith(".tar")]


def test_bytes_of_a_remote_shard_are_read_and_the_shard_is_fetched_once(
    s3_bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(2))
    cache = ShardCache(manifest, limit_bytes=10 * SHARD_BYTES, folder=tmp_path)
    random = np.random.default_rng(0)
    for _ in range(100):
        number, (start, end) = int(random.integers(2)), sorted(random.integers(0, SHARD_BYTES + 1, size=2).tolist())
        assert cache.read(shards_of(manifest)[number], start, end - start) == content_of(number)[start:end]
    assert len(downloads(proxy)) == 2
    again = ShardCache(manifest, limit_bytes=10 * SHARD_BYTES, folder=tmp_path)
    assert again.read(shards_of(manifest)[0], 5, 10) == content_of(0)[5:15]
    assert len(downloads(proxy)) == 2
    assert files(tmp_path, ".part") == []


def test_a_local_shard_is_read_where_it_is(tmp_path: Path) -> None:
    manifest = set_at(f"{tmp_path}/set", range(1))
    cache = ShardCache(manifest, limit_bytes=0, folder=tmp_path / "cache")
    assert cache.read(shards_of(manifest)[0], 100, 50) == content_of(0)[100:150]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ShardError, match="bytes at") as caught:
        cache.read(shards_of(manifest)[0], SHARD_BYTES - 10, 11)
    assert caught.value.where.endswith("train-000000.tar")
    os.unlink(tmp_path / "set" / "train-000000.tar")
    with pytest.raises(ShardError, match="not there") as caught:
        cache.read(shards_of(manifest)[0], 0, 1)
    assert caught.value.where.endswith("train-000000.tar")


def test_data_sets_with_the_same_file_names_do_not_mix(s3_bucket: str, tmp_path: Path) -> None:
    one, two = set_at(f"{s3_bucket}/one", range(2)), set_at(f"{s3_bucket}/two", range(2, 4))
    caches = [ShardCache(manifest, limit_bytes=10 * SHARD_BYTES, folder=tmp_path) for manifest in (one, two)]
    for _ in range(2):
        for number, (cache, manifest) in enumerate(zip(caches, (one, two), strict=True)):
            found = [cache.read(shard, 0, SHARD_BYTES) for shard in shards_of(manifest)]
            assert found == [content_of(2 * number), content_of(2 * number + 1)]


def test_a_set_built_anew_at_the_same_place_is_fetched_anew(s3_bucket: str, tmp_path: Path) -> None:
    for seeds in (range(1), range(7, 8)):
        manifest = set_at(f"{s3_bucket}/set", seeds)
        cache = ShardCache(manifest, limit_bytes=10 * SHARD_BYTES, folder=tmp_path)
        assert cache.read(shards_of(manifest)[0], 0, SHARD_BYTES) == content_of(seeds[0])


def test_the_folder_is_bounded_and_the_least_recently_read_shard_makes_room(
    s3_bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(6))
    shards = shards_of(manifest)
    cache = ShardCache(manifest, limit_bytes=3 * SHARD_BYTES + 10, folder=tmp_path)
    for number in (0, 1, 2, 0, 3, 0, 4, 0, 5):
        assert cache.read(shards[number], 0, 10) == content_of(number)[:10]
        assert len(files(tmp_path, ".tar")) <= 3
    assert len(downloads(proxy)) == 6  # 0 was never let go: it was always read last but one
    cache.read(shards[1], 0, 10)
    assert len(downloads(proxy)) == 7


def test_a_smaller_limit_holds_from_the_start(s3_bucket: str, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(5))
    cache = ShardCache(manifest, limit_bytes=5 * SHARD_BYTES, folder=tmp_path)
    for shard in shards_of(manifest):
        cache.read(shard, 0, 1)
    assert len(files(tmp_path, ".tar")) == 5
    ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
    assert len(files(tmp_path, ".tar")) == 2


def test_the_bound_holds_with_many_threads_downloading_at_once(s3_bucket: str, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(8))
    cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
    most, is_done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_done.is_set():
            sizes = []
            for path in tmp_path.iterdir():
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            most = max(most, sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        rows = np.random.default_rng(0).integers(0, 8, size=60).tolist()
        found = list(pool.map(lambda row: cache.read(shards_of(manifest)[row], 7, 9), rows))
    is_done.set()
    watcher.join()
    assert found == [content_of(row)[7:16] for row in rows]
    assert 0 < most <= 3 * SHARD_BYTES  # one more than the limit: listing a folder that changes is no snapshot of it
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * SHARD_BYTES


def test_processes_that_want_the_same_shard_fetch_it_once(s3_bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(3))

    def read_all() -> list[bytes]:
        cache = ShardCache(manifest, limit_bytes=10 * SHARD_BYTES, folder=tmp_path)
        return [cache.read(shard, 0, SHARD_BYTES) for shard in shards_of(manifest)]

    assert call_forked(*[read_all] * 4) == [[content_of(seed) for seed in range(3)]] * 4
    assert len(downloads(proxy)) == 3


def test_processes_that_push_one_another_out_still_read_right(s3_bucket: str, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(5))

    def read_some(seed: int) -> bool:
        cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
        rows = np.random.default_rng(seed).integers(0, 5, size=20).tolist()
        return all(cache.read(shards_of(manifest)[row], 0, SHARD_BYTES) == content_of(row) for row in rows)

    assert call_forked(*[lambda seed=seed: read_some(seed) for seed in range(3)]) == [True] * 3
    assert len(files(tmp_path, ".tar")) <= 2


def test_a_process_killed_while_it_downloads_leaves_nothing_usable_and_the_next_start_cleans_up(
    s3_bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(2))
    proxy.fail("stall", method="GET")

    def read() -> bytes:
        cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
        return cache.read(shards_of(manifest)[0], 0, SHARD_BYTES)

    with killed_at_the_end(read) as kill:
        assert proxy.is_stalled.wait(60)
        assert len(files(tmp_path, ".part")) == 1
        assert files(tmp_path, ".tar") == []
        ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
        assert len(files(tmp_path, ".part")) == 1, "a part that is being downloaded stays"
        kill()
    assert len(files(tmp_path, ".part")) == 1
    cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
    assert files(tmp_path, ".part") == []
    assert cache.read(shards_of(manifest)[0], 0, SHARD_BYTES) == content_of(0)
    assert read() == content_of(0)


def test_a_download_cut_short_is_made_again(s3_bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(1))
    proxy.fail("cut", times=2, method="GET")
    cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
    assert cache.read(shards_of(manifest)[0], 0, SHARD_BYTES) == content_of(0)
    assert proxy.num_faults_left == 0


def test_a_shard_of_another_digest_is_refused_by_name(s3_bucket: str, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(2))
    url = f"{s3_bucket}/set/train-000001.tar"
    damaged = bytearray(content_of(1))
    damaged[5000] ^= 1
    storage.write_bytes(url, bytes(damaged))
    cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
    for _ in range(2):
        with pytest.raises(ShardError, match="sha256") as caught:
            cache.read(shards_of(manifest)[1], 0, 1)
        assert caught.value.where == url
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    storage.write_bytes(url, content_of(1))
    assert cache.read(shards_of(manifest)[1], 0, 1) == content_of(1)[:1]


def test_a_shard_that_is_not_there_is_refused_by_name(s3_bucket: str, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(1))
    storage.remove(f"{s3_bucket}/set/train-000000.tar")
    cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
    with pytest.raises(ShardError, match="not there") as caught:
        cache.read(shards_of(manifest)[0], 0, 1)
    assert caught.value.where == f"{s3_bucket}/set/train-000000.tar"
    assert files(tmp_path, ".part") == []


def test_a_store_that_refuses_is_a_storage_error(s3_bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(1))
    cache = ShardCache(manifest, limit_bytes=2 * SHARD_BYTES, folder=tmp_path)
    proxy.fail("deny")
    with pytest.raises(StorageError, match="not allowed"):
        cache.read(shards_of(manifest)[0], 0, 1)
    assert files(tmp_path, ".part") == []
    assert cache.read(shards_of(manifest)[0], 0, 1) == content_of(0)[:1]


def test_a_limit_below_two_shards_is_a_config_error_with_the_number_that_works(s3_bucket: str, tmp_path: Path) -> None:
    manifest = set_at(f"{s3_bucket}/set", range(1))
    with pytest.raises(ConfigError) as caught:
        ShardCache(manifest, limit_bytes=2 * SHARD_BYTES - 1, folder=tmp_path / "cache")
    assert caught.value.found == "data.cache_bytes 19,999"
    assert "20,000" in caught.value.expected
    assert not (tmp_path / "cache").exists()


def test_the_environment_places_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPL_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MLPL_CACHE_DIR")
    assert str(os.getuid()) in cache_folder().name
