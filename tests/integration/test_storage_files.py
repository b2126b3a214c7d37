"""Claims about folders of many files: listed with sizes, filled without a trace of what failed, synced and removed."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dist_mlpl import storage, stores
from dist_mlpl.errors import StorageError
from shards.plan import image_sizes
from tests.support.web import WebServer

pytestmark = pytest.mark.integration

FILES = {f"{'ab'[n % 2]}/{n:03d} ü.jpg": b"x" * (n % 7) for n in range(60)} | {"top": b"123", "a.b/c/d": b"1"}


@pytest.fixture(params=["disk", "bucket", "bucket root", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "folder")
    elif request.param == "memory":
        url = f"memory://{tmp_path.name}/folder"
        yield url
        storage.remove_folder(url)
    else:
        bucket = request.getfixturevalue("s3_bucket")
        yield bucket if request.param == "bucket root" else storage.join(bucket, "folder")


def fill(folder: str) -> None:
    for name, content in FILES.items():
        storage.write_bytes(storage.join(folder, name), content, durable=False)


@pytest.mark.parametrize(
    ("page", "starts"), [(1000, []), (7, []), (3, ["a/020 ü.jpg", "b", "b/021 ü.jpg", "b/0", "zzz"])]
)
def test_a_listing_has_every_file_once_with_its_size_however_it_is_cut(
    folder: str, page: int, starts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_PAGE_KEYS", page)
    fill(folder)
    found = list(storage.list_sizes(folder, starts=sorted(starts)))
    assert sorted(found) == sorted((name, len(content)) for name, content in FILES.items())


def test_a_folder_that_is_not_there_is_not_found(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        list(storage.list_sizes(storage.join(folder, "nothing")))
    storage.remove_folder(storage.join(folder, "nothing"))


def test_markers_of_folders_and_neighbours_by_name_are_no_files_of_a_folder(s3_bucket: str) -> None:
    for key in ("in/x.jpg", "in/sub/", "input/y.jpg", "in.jpg"):
        filesystem, path = stores.remote(storage.join(s3_bucket, "x"))
        filesystem.call_s3("put_object", Bucket=path.split("/")[0], Key=key, Body=b"1")
    assert list(storage.list_sizes(storage.join(s3_bucket, "in"))) == [("x.jpg", 1)]


def test_removing_a_folder_removes_all_below_and_nothing_beside(folder: str) -> None:
    fill(folder)
    storage.remove_folder(storage.join(folder, "a"))
    left = {name for name, _ in storage.list_sizes(folder)}
    assert left == {name for name in FILES if not name.startswith("a/")}


@pytest.mark.parametrize("name", ["seed[12]", "seed*", "seed?"])
def test_a_folder_whose_name_looks_like_a_pattern_is_itself(folder: str, name: str) -> None:
    for run in (name, "seed1", "seed12"):
        storage.write_bytes(storage.join(folder, f"{run}/rounds/x"), run.encode())
    storage.remove_folder(storage.join(folder, name))
    assert sorted(path for path, _ in storage.list_sizes(folder)) == ["seed1/rounds/x", "seed12/rounds/x"]


def test_removing_a_folder_that_another_fills_leaves_what_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    remove = os.rmdir

    def late(path: Any, *rest: Any) -> None:
        Path(path, "new").touch()
        remove(path, *rest)

    monkeypatch.setattr(os, "rmdir", late)
    storage.remove_folder(str(tmp_path / "folder"))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


@pytest.mark.parametrize("num_bytes", [0, 10, 3_000_000])
def test_a_file_that_is_filled_appears_whole_at_the_end(folder: str, num_bytes: int) -> None:
    if folder.startswith("memory"):
        pytest.skip("its file system takes files by name alone")
    url, content = storage.join(folder, "sub/file.tar"), np.random.default_rng(0).bytes(num_bytes)
    with storage.create_file(url) as file:
        file.write(content)
        assert not storage.exists(url)
    assert storage.read_bytes(url) == content
    assert storage.list_names(storage.join(folder, "sub")) == ["file.tar"]


def test_after_an_error_or_a_kill_there_is_no_file(folder: str, tmp_path: Path) -> None:
    url, scratch = storage.join(folder, "file.tar"), str(tmp_path / "scratch")

    def half_fill(then: Callable[[], None]) -> None:
        with storage.create_file(url, scratch=scratch) as file:
            file.write(b"half")
            then()

    with pytest.raises(ZeroDivisionError):
        half_fill(lambda: divmod(1, 0))
    assert not storage.exists(url)
    child = get_context("fork").Process(target=half_fill, args=(lambda: os.kill(os.getpid(), signal.SIGKILL),))
    child.start()
    child.join()
    assert not storage.exists(url)
    if not storage.is_remote(folder):
        assert list(Path(folder).iterdir()) == []  # what is left lies in scratch


def test_a_disk_that_is_full_is_called_that(folder: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="found no room"), storage.create_file(storage.join(folder, "x")):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_local_file_can_be_synced_and_a_missing_one_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    storage.sync(str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError):
        storage.sync(str(tmp_path / "y"))


def test_another_process_can_be_told_how_storage_is_configured() -> None:
    before = storage.configuration()
    try:
        storage.configure_storage({"anon": True}, deadline_seconds=3.0, stall_seconds=4.0)
        told = storage.configuration()
        assert told == {"options": {"anon": True}, "deadline_seconds": 3.0, "stall_seconds": 4.0}
        storage.configure_storage()
        storage.configure_storage(**told)
        assert storage.configuration() == told
    finally:
        storage.configure_storage(**before)


def test_sizes_of_images_in_a_bucket_come_from_a_listing(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAGE_KEYS", 7)
    folder = storage.join(s3_bucket, "images")
    fill(folder)
    monkeypatch.setattr(storage, "size", None)
    names = [*reversed(FILES), "gone.jpg", "a/gone.jpg"]
    told: list[Any] = []
    found = image_sizes(folder, pa.array(names), lambda *step: told.append(step))
    assert found.tolist() == [*(len(FILES[name]) for name in reversed(FILES)), -1, -1]
    assert told[-1][:1] == ("listing images",)
    with pytest.raises(StorageError, match="the image folder not found"):
        image_sizes(storage.join(s3_bucket, "nothing"), pa.array(names), lambda *_: None)


def test_sizes_of_images_on_a_web_server_are_asked_for_one_by_one() -> None:
    with WebServer() as web:
        web.files = {f"/images/{n}.jpg": bytes(n) for n in range(40)}
        names = [f"{n}.jpg" for n in range(42)]
        found = image_sizes(f"{web.url}/images", pa.array(names), lambda *_: None)
        assert found.tolist() == [*range(40), -1, -1]
        with pytest.raises(StorageError, match="cannot be asked for a list"):
            list(storage.list_sizes(f"{web.url}/images"))


def test_a_file_that_its_maker_removed_was_not_made_by_us(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = storage.join(s3_bucket, "lease")
    assert storage.create_exclusive(url, b"theirs")
    read, is_first = storage.read_bytes, threading.Event()

    def late(*arguments: Any) -> bytes:
        if not is_first.is_set():
            is_first.set()
            storage.remove(url)
        return read(*arguments)

    monkeypatch.setattr(storage, "read_bytes", late)
    assert not storage.create_exclusive(url, b"ours")
