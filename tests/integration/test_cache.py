"""Claims about a node's cache of extents: keyed as told, bounded, shared by threads and processes, never half there."""

from __future__ import annotations

import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from dist_mlpl.data import cache as cache_module
from dist_mlpl.data.cache import ExtentCache, cache_folder
from dist_mlpl.errors import ShardError
from tests.support.processes import call_forked, killed_at_the_end
from tests.support.sets import small_disk

pytestmark = pytest.mark.integration

EXTENT = 10_000  # bytes


def content_of(key: str) -> bytes:
    return np.random.default_rng(zlib.crc32(key.encode())).bytes(EXTENT)


def add(cache: ExtentCache, key: str) -> bool:
    return cache.add(key, EXTENT, lambda: content_of(key))


def never() -> bytes:
    raise AssertionError("fetched what is here already")


def names(folder: Path, suffix: str) -> list[str]:
    return sorted(path.stem for path in folder.iterdir() if path.suffix == suffix)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def age(folder: Path, *keys: str) -> None:
    """Let extents be read long ago, the first longest; the clock of files is too coarse to tell reads of one test."""
    for seconds, key in enumerate(keys, start=1_000):
        os.utime(folder / f"{key}.bytes", (seconds, seconds))


def test_any_part_of_an_extent_reads_back_and_it_is_fetched_once_even_over_restarts(tmp_path: Path) -> None:
    keys, random = ["a-000000", "a-000001", "b-000000"], np.random.default_rng(0)
    cache = ExtentCache(limit_bytes=100 * EXTENT, folder=tmp_path)
    assert not any(cache.has(key) or cache.read(key, 0, 1) for key in keys)
    assert all(add(cache, key) for key in keys)
    for again in (cache, ExtentCache(limit_bytes=100 * EXTENT, folder=tmp_path)):
        for key in keys:
            assert again.has(key)
            assert again.add(key, EXTENT, never)
            start, stop = sorted(random.integers(0, EXTENT + 1, size=2).tolist())
            assert again.read(key, start, stop - start) == content_of(key)[start:stop]
    assert names(tmp_path, ".bytes") == keys
    assert names(tmp_path, ".part") == []


def test_the_least_recently_read_extents_make_room(tmp_path: Path) -> None:
    cache = ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path)  # emptied to 7 when looked through
    keys = [f"k-{number}" for number in range(7)]
    for key in keys:
        add(cache, key)
    age(tmp_path, *keys)
    assert cache.read("k-0", 0, 1)
    assert cache.read("k-2", 0, 1)
    for number in range(7, 11):
        add(cache, f"k-{number}")
        assert bytes_in(tmp_path) <= 8 * EXTENT
    kept = names(tmp_path, ".bytes")
    assert {"k-0", "k-2", "k-7", "k-8", "k-9", "k-10"} <= set(kept)
    assert "k-1" not in kept
    assert "k-3" not in kept
    assert cache.read("k-1", 0, 1) is None
    assert add(cache, "k-1")
    assert cache.read("k-1", 0, EXTENT) == content_of("k-1")


def test_a_smaller_limit_holds_from_the_start(tmp_path: Path) -> None:
    cache = ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path)
    keys = [f"k-{number}" for number in range(6)]
    for key in keys:
        add(cache, key)
    age(tmp_path, *keys)
    ExtentCache(limit_bytes=3 * EXTENT, folder=tmp_path)
    assert names(tmp_path, ".bytes") == ["k-4", "k-5"]


def test_what_does_not_fit_the_limit_is_not_fetched(tmp_path: Path) -> None:
    cache = ExtentCache(limit_bytes=EXTENT, folder=tmp_path)
    assert not cache.add("k", EXTENT, never)
    assert bytes_in(tmp_path) == 0


def test_many_threads_that_fetch_at_once_stay_within_the_limit(tmp_path: Path) -> None:
    """All hold still inside their fetch: what lies in the folder then is what was let in."""
    num_threads = 12
    for round_number in range(20):
        folder = tmp_path / str(round_number)
        cache = ExtentCache(limit_bytes=8 * EXTENT, folder=folder)
        for number in range(4):
            add(cache, f"old-{number}")
        at_rest, state = threading.Condition(), {"inside": 0, "refused": 0, "bytes": 0}

        def fetch(state=state, at_rest=at_rest, folder=folder) -> bytes:
            with at_rest:
                state["inside"] += 1
                at_rest.notify_all()
                assert at_rest.wait_for(lambda: state["inside"] + state["refused"] == num_threads, 60)
                state["bytes"] = state["bytes"] or bytes_in(folder)
            return bytes(EXTENT)

        def work(number: int, cache=cache, state=state, at_rest=at_rest, fetch=fetch) -> None:
            if not cache.add(f"new-{number}", EXTENT, fetch):
                with at_rest:
                    state["refused"] += 1
                    at_rest.notify_all()

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, range(num_threads)))
        assert 1 <= state["inside"] <= 8
        assert 0 < state["bytes"] <= 8 * EXTENT


def test_several_processes_together_stay_within_the_limit(tmp_path: Path) -> None:
    num_processes, limit, context = 3, 24 * EXTENT, get_context("fork")
    most = context.Value("q", 0)

    def look() -> None:  # by one of them, while all stand inside a fetch
        most.value = max(most.value, bytes_in(tmp_path))

    barrier = context.Barrier(num_processes, action=look)

    def work(process: int) -> int:
        cache = ExtentCache(limit_bytes=limit, num_processes=num_processes, folder=tmp_path)
        return sum(
            cache.add(f"{process}-{number}", EXTENT, lambda: (barrier.wait(60), bytes(EXTENT))[1])
            for number in range(15)
        )

    added = call_forked(*[lambda process=process: work(process) for process in range(num_processes)])
    assert added == [15] * num_processes
    assert 18 * EXTENT < most.value <= limit
    assert bytes_in(tmp_path) <= limit


@pytest.mark.parametrize("are_threads", [True, False], ids=["threads", "processes"])
def test_of_several_that_ask_at_once_one_fetches_and_all_read(tmp_path: Path, are_threads: bool) -> None:
    num_askers, keys = 4, ["a", "b", "c"]
    context = get_context("fork")
    askers = {key: context.Semaphore(0) for key in keys}
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def fetch(key: str) -> bytes:
        for _ in range(num_askers):
            assert askers[key].acquire(timeout=60)  # nobody is done before all have come
        os.write(log, f"{key}\n".encode())
        return content_of(key)

    def ask() -> bool:
        cache = ExtentCache(limit_bytes=100 * EXTENT, num_processes=num_askers, folder=tmp_path / "cache")
        for key in keys:
            askers[key].release()
            assert cache.add(key, EXTENT, lambda key=key: fetch(key))
        return all(cache.read(key, 0, EXTENT) == content_of(key) for key in keys)

    if are_threads:
        with ThreadPoolExecutor(num_askers) as pool:
            found = list(pool.map(lambda _: ask(), range(num_askers)))
    else:
        found = call_forked(*[ask] * num_askers)
    os.close(log)
    assert found == [True] * num_askers
    assert (tmp_path / "log").read_text().split() == keys


def test_processes_that_push_one_another_out_read_right_or_not_at_all(tmp_path: Path) -> None:
    def work(seed: int) -> bool:
        cache = ExtentCache(limit_bytes=4 * EXTENT, num_processes=3, folder=tmp_path)
        for number in np.random.default_rng(seed).integers(0, 6, size=150).tolist():
            key = f"k-{number}"
            add(cache, key)
            if cache.read(key, 0, EXTENT) not in (None, content_of(key)):
                return False
        return True

    assert call_forked(*[lambda seed=seed: work(seed) for seed in range(3)]) == [True] * 3
    assert bytes_in(tmp_path) <= 4 * EXTENT
    assert names(tmp_path, ".part") == []


def test_the_name_of_a_part_is_let_go_with_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an extent has its own name, a part of the same key is another process's."""
    cache, replace = ExtentCache(limit_bytes=100 * EXTENT, folder=tmp_path), os.replace

    def replace_and_begin_anew(part: Path, path: Path) -> None:
        replace(part, path)
        part.write_bytes(b"begun by another process")

    monkeypatch.setattr(cache_module.os, "replace", replace_and_begin_anew)
    assert add(cache, "k")
    assert names(tmp_path, ".part") == ["k"]


def test_an_extent_that_came_between_the_look_and_the_lock_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, locked = ExtentCache(limit_bytes=100 * EXTENT, folder=tmp_path), cache_module._locked

    def locked_too_late(path: Path) -> object:
        (tmp_path / "k.bytes").write_bytes(content_of("k"))
        return locked(path)

    monkeypatch.setattr(cache_module, "_locked", locked_too_late)
    assert cache.add("k", EXTENT, never)
    assert names(tmp_path, ".part") == []
    assert cache.read("k", 0, EXTENT) == content_of("k")


def test_a_process_killed_while_it_fetches_leaves_nothing_usable_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    is_inside = get_context("fork").Event()

    def fetch_and_hang() -> bytes:
        is_inside.set()
        threading.Event().wait()
        return b""

    def work() -> None:
        ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path).add("k", EXTENT, fetch_and_hang)

    def part_left() -> list[str]:
        return names(tmp_path, ".part")

    with killed_at_the_end(work) as kill:
        assert is_inside.wait(60)
        other = ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path)
        assert part_left() == ["k"], "a part that is being fetched stays"
        assert bytes_in(tmp_path) == EXTENT, "and takes its room from the start"
        assert not other.has("k")
        kill()
    assert part_left() == ["k"]
    assert other.read("k", 0, 1) is None
    cache = ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path)
    assert part_left() == []
    assert add(cache, "k")
    assert cache.read("k", 0, EXTENT) == content_of("k")


def test_one_that_waits_for_a_process_that_is_killed_fetches_by_itself(tmp_path: Path) -> None:
    is_inside = get_context("fork").Event()

    def fetch_and_hang() -> bytes:
        is_inside.set()
        threading.Event().wait()
        return b""

    cache = ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path)
    with ThreadPoolExecutor(1) as pool, killed_at_the_end(lambda: cache.add("k", EXTENT, fetch_and_hang)) as kill:
        assert is_inside.wait(60)
        waiting = pool.submit(add, cache, "k")
        kill()
        assert waiting.result(timeout=60)
    assert cache.read("k", 0, EXTENT) == content_of("k")
    assert names(tmp_path, ".part") == []


def test_a_fetch_that_fails_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    cache = ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path)
    error = ShardError("not there", expected="a shard", where="s3://b/x.tar", next_step="restore it")

    def fail() -> bytes:
        raise error

    for _ in range(2):
        with pytest.raises(ShardError) as caught:
            cache.add("k", EXTENT, fail)
        assert caught.value is error
        assert bytes_in(tmp_path) == 0
        assert not cache.has("k")
    assert add(cache, "k")
    assert cache.read("k", 0, EXTENT) == content_of("k")


def test_after_a_failed_fetch_another_that_waited_fetches_by_itself(tmp_path: Path) -> None:
    cache = ExtentCache(limit_bytes=8 * EXTENT, folder=tmp_path)
    is_inside, may_fail = threading.Event(), threading.Event()

    def fail() -> bytes:
        is_inside.set()
        assert may_fail.wait(60)
        raise RuntimeError("cut")

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(cache.add, "k", EXTENT, fail)
        assert is_inside.wait(60)
        waiting = pool.submit(add, cache, "k")
        may_fail.set()
        with pytest.raises(RuntimeError, match="cut"):
            failing.result(timeout=60)
        assert waiting.result(timeout=60)
    assert cache.read("k", 0, EXTENT) == content_of("k")


def test_a_full_disk_refuses_extents_before_they_are_fetched_and_keeps_those_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", 3 * EXTENT) as folder:
        cache = ExtentCache(limit_bytes=1 << 30, folder=folder)
        assert add(cache, "a")
        assert add(cache, "b")
        for _ in range(2):
            assert not cache.add("c", EXTENT, never)
        assert caplog.text.count("no room on the disk") == 1, "a full disk is left alone for a while"
        assert str(folder) in caplog.text
        assert (names(folder, ".bytes"), names(folder, ".part")) == (["a", "b"], [])
        assert [cache.read(key, 0, EXTENT) for key in "abc"] == [content_of("a"), content_of("b"), None]
        (folder / "a.bytes").unlink()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 61)
        assert add(cache, "c")
        assert cache.read("c", 0, EXTENT) == content_of("c")


def test_a_disk_that_fills_while_an_extent_is_written_never_keeps_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems that give no room in advance."""
    monkeypatch.setattr(cache_module.os, "posix_fallocate", lambda file, start, length: os.ftruncate(file, length))
    with small_disk(tmp_path / "disk", 3 * EXTENT) as folder:
        cache = ExtentCache(limit_bytes=1 << 30, folder=folder)
        assert [add(cache, key) for key in "abc"] == [True, True, False]
        assert [cache.read(key, 0, EXTENT) for key in "abc"] == [content_of("a"), content_of("b"), None]
        assert names(folder, ".part") == []


def test_the_environment_places_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPL_CACHE_DIR", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    assert ExtentCache(limit_bytes=EXTENT).folder.is_dir()
    monkeypatch.delenv("MLPL_CACHE_DIR")
    assert str(os.getuid()) in cache_folder().name
