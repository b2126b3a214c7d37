"""Claims about bytes at URLs that need no server: local files, a store in memory, faults injected below."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ResponseStreamingError,
)
from s3fs.errors import translate_boto_error

from dist_mlpl import storage
from dist_mlpl.errors import ConfigError, StorageError
from tests.support.processes import call_forked, killed_at_the_end

pytestmark = pytest.mark.unit


class Clock:
    """Stands in for `time`: sleeping moves it on at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class FaultyStore:
    """A store in memory whose calls raise the given errors first, one a call; they are counted by name."""

    def __init__(self, *faults: BaseException, after: bool = False) -> None:
        self.inner = fsspec.filesystem("memory")
        self.faults, self.after = list(faults), after
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)
        if name == "invalidate_cache":
            return call

        def faulty(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if self.faults and not self.after:
                raise self.faults.pop(0)
            answer = call(*args, **options)
            if self.faults:
                raise self.faults.pop(0)
            return answer

        return faulty


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    fsspec.filesystem("memory").store.clear()
    yield
    storage.configure_storage()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(storage, "time", clock)
    return clock


@pytest.fixture
def use_store(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[[FaultyStore], FaultyStore]:
    def use(store: FaultyStore) -> FaultyStore:
        monkeypatch.setattr(storage, "_remote", lambda url: (store, url.removeprefix("memory:/")))
        return store

    return use


def test_urls_and_paths_are_told_apart_and_joined() -> None:
    assert storage.is_remote("s3://bucket/key")
    assert storage.is_remote("memory://x")
    assert not storage.is_remote("/a/b")
    assert not storage.is_remote("a/b")
    assert not storage.is_remote("file:///a/b")
    assert storage.join("s3://bucket/", "/a/", "b.txt") == "s3://bucket/a/b.txt"
    assert storage.join("/a", "b") == "/a/b"
    assert storage.name("s3://bucket/a/b/") == "b"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.absolute("a") == str(Path.cwd() / "a")
    assert storage.absolute("file:///a/b") == "/a/b"


def test_an_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no way to open 'nosuch://x'"):
        storage.read_bytes("nosuch://x")


@pytest.mark.parametrize("kind", ["disk", "file URL", "memory"])
def test_a_range_is_a_slice(tmp_path: Path, kind: str) -> None:
    url = {"disk": f"{tmp_path}/x", "file URL": f"file://{tmp_path}/x", "memory": "memory://x"}[kind]
    random = np.random.default_rng(0)
    content = random.bytes(1000)
    storage.write_bytes(url, content)
    assert storage.read_bytes(url) == content
    assert storage.size(url) == 1000
    for _ in range(50):
        start, end = sorted(random.integers(0, 1001, size=2).tolist())
        assert storage.read_bytes(url, start, end) == content[start:end]
        assert storage.read_bytes(url, start) == content[start:]
    with pytest.raises(StorageError, match="bytes came back") as caught:
        storage.read_bytes(url, 990, 1010)
    assert "20 bytes at [990, 1010)" in caught.value.expected
    with storage.open_read(url) as stream:
        assert stream.read(5) == content[:5]


@pytest.mark.parametrize("root", ["", "memory:/"])
def test_what_is_not_there_is_not_found(tmp_path: Path, root: str) -> None:
    url = f"{root}{tmp_path}/nothing"
    for ask in (storage.read_bytes, storage.size, storage.open_read):
        with pytest.raises(FileNotFoundError):
            ask(url)
    with pytest.raises(FileNotFoundError):
        storage.download(url, tmp_path / "copy")
    assert not storage.exists(url)
    assert storage.list_names(url) == []
    storage.remove(url)
    with pytest.raises(FileNotFoundError):
        list(storage.list_files(url))


@pytest.mark.parametrize("root", ["", "memory:/"])
def test_names_are_sorted_and_dot_files_hidden(tmp_path: Path, root: str) -> None:
    folder = f"{root}{tmp_path}/folder"
    for name in ("b", "a", ".hidden", "deep/c", "deep/d"):
        storage.write_bytes(storage.join(folder, name), b"x")
    assert storage.list_names(folder) == ["a", "b", "deep"]
    assert storage.list_names(folder + "/") == ["a", "b", "deep"]
    assert [name for name in storage.list_files(folder) if name != ".hidden"] == ["a", "b", "deep/c", "deep/d"]
    storage.remove(storage.join(folder, "a"))
    assert storage.list_names(folder) == ["b", "deep"]


def test_a_write_makes_its_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    url = f"{tmp_path}/a/b/x"
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert os.listdir(tmp_path / "a" / "b") == ["x"]
    assert Path(url).read_bytes() == b"two"
    (tmp_path / "source").write_bytes(b"three")
    storage.upload(tmp_path / "source", url)
    assert os.listdir(tmp_path / "a" / "b") == ["x"]
    assert Path(url).read_bytes() == b"three"


def test_a_reader_never_sees_part_of_a_write_even_when_the_writer_is_killed(tmp_path: Path) -> None:
    url, versions = f"{tmp_path}/x", [bytes([letter]) * 3_000_001 for letter in b"ab"]

    def write_for_ever() -> None:
        while True:
            for content in versions:
                storage.write_bytes(url, content)

    storage.write_bytes(url, versions[0])
    for _ in range(4):
        with killed_at_the_end(write_for_ever) as kill:
            seen = {storage.read_bytes(url)[:1] for _ in range(30) if storage.read_bytes(url) in versions}
            kill()
        assert seen <= {b"a", b"b"}
        assert storage.read_bytes(url) in versions
        assert storage.list_names(str(tmp_path)) == ["x"]


def test_a_writer_killed_before_its_end_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{tmp_path}/x"
    storage.write_bytes(url, b"old")
    at_half = tmp_path / "at-half"

    def write_half(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        at_half.mkdir()
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(storage, "_write_durably", write_half)
    for write in (storage.write_bytes, storage.create_exclusive):
        with killed_at_the_end(lambda write=write: write(url, b"new and longer")) as kill:
            while not at_half.exists():
                pass
            kill()
        assert storage.read_bytes(url) == b"old"
        assert storage.list_names(str(tmp_path)) == ["at-half", "x"]
        at_half.rmdir()


def test_of_racing_processes_one_creates_a_file(tmp_path: Path) -> None:
    def create_all(writer: int) -> list[bool]:
        return [storage.create_exclusive(f"{tmp_path}/{name}", f"writer {writer}".encode()) for name in range(40)]

    won = call_forked(*[lambda writer=writer: create_all(writer) for writer in range(6)])
    for name in range(40):
        winners = [writer for writer in range(6) if won[writer][name]]
        assert [f"writer {writer}".encode() for writer in winners] == [storage.read_bytes(f"{tmp_path}/{name}")]
    assert len(storage.list_names(str(tmp_path))) == len(os.listdir(tmp_path)) == 40


@pytest.mark.parametrize("root", ["", "memory:/"])
def test_exclusive_create_never_replaces(tmp_path: Path, root: str) -> None:
    url = f"{root}{tmp_path}/x"
    assert storage.create_exclusive(url, b"first")
    assert not storage.create_exclusive(url, b"second")
    assert storage.read_bytes(url) == b"first"
    storage.check_exclusive_create(f"{root}{tmp_path}")
    assert storage.list_names(f"{root}{tmp_path}") == ["x"]


def test_a_store_that_ignores_the_condition_is_refused(use_store: Callable[[FaultyStore], FaultyStore]) -> None:
    class Ignorant(FaultyStore):
        def pipe_file(self, path: str, content: bytes, mode: str = "overwrite") -> None:
            self.inner.pipe_file(path, content)

    use_store(Ignorant())
    with pytest.raises(StorageError, match="two writers both created"):
        storage.check_exclusive_create("memory://folder")


WORK = {
    "read": (lambda url, path: storage.read_bytes(url), b"content"),
    "range": (lambda url, path: storage.read_bytes(url, 2, 5), b"nte"),
    "size": (lambda url, path: storage.size(url), 7),
    "exists": (lambda url, path: storage.exists(url), True),
    "write": (lambda url, path: storage.write_bytes(url, b"new"), None),
    "list": (lambda url, path: storage.list_names("memory://folder"), ["x"]),
    "files": (lambda url, path: list(storage.list_files("memory://folder")), ["x"]),
    "remove": (lambda url, path: storage.remove(url), None),
    "create": (lambda url, path: storage.create_exclusive("memory://folder/y", b"mine"), True),
    "download": (lambda url, path: storage.download(url, path), hashlib.sha256(b"content").hexdigest()),
    "upload": (lambda url, path: storage.upload(path, url), None),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("num_faults", [1, 4])
def test_faults_that_pass_are_waited_out(
    work: str, num_faults: int, use_store: Callable[[FaultyStore], FaultyStore], clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"local")
    store = use_store(FaultyStore())
    store.inner.pipe_file("/folder/x", b"content")
    store.faults = [ConnectionResetError("reset"), TimeoutError(), OSError(errno.EIO, "io"), ConnectionError()][
        :num_faults
    ]
    act, expected = WORK[work]
    assert act("memory://folder/x", tmp_path / "file") == expected
    assert store.faults == []
    assert len(clock.pauses) == num_faults


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("fault", [PermissionError("no"), ValueError("bad"), NoCredentialsError()])
def test_faults_that_stay_fail_at_once(
    work: str, fault: Exception, use_store: Callable[[FaultyStore], FaultyStore], clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"local")
    store = use_store(FaultyStore(fault))
    store.inner.pipe_file("/folder/x", b"content")
    with pytest.raises(StorageError) as caught:
        WORK[work][0]("memory://folder/x", tmp_path / "file")
    assert clock.pauses == []
    assert caught.value.where.startswith("memory://folder")
    assert "not allowed" in caught.value.found if not isinstance(fault, ValueError) else "1 tries" in caught.value.found


def test_a_store_that_stays_away_is_given_up_at_the_deadline(
    use_store: Callable[[FaultyStore], FaultyStore], clock: Clock
) -> None:
    store = use_store(FaultyStore(*[ConnectionRefusedError("refused")] * 1000))
    for deadline in (60.0, 5.0):
        clock.now, store.calls = 0.0, []
        storage.configure_storage(deadline_seconds=deadline)
        with pytest.raises(StorageError) as caught:
            storage.read_bytes("memory://x")
        assert 0.4 * deadline < clock.now <= deadline
        assert f"failed after {len(store.calls)} tries" in caught.value.found
        assert "ConnectionRefusedError: refused" in caught.value.found


def test_the_deadline_counts_from_the_first_fault_not_from_the_start_of_a_long_transfer(clock: Clock) -> None:
    tries: list[float] = []

    def transfer() -> str:
        tries.append(clock.now)
        clock.now += 1000.0
        if len(tries) == 1:
            raise ConnectionResetError
        return "done"

    assert storage.retried(transfer, url="x", doing="writing") == "done"
    assert len(tries) == 2


def test_a_put_that_succeeded_unheard_is_still_ours(use_store: Callable[[FaultyStore], FaultyStore]) -> None:
    store = use_store(FaultyStore(ConnectionResetError("after the put"), after=True))
    assert storage.create_exclusive("memory://ours", b"mine")
    assert store.calls.count("pipe_file") == 2
    # The library below may have repeated the put by itself: then the first answer we hear is "exists".
    store.inner.pipe_file("/again", b"mine")
    assert storage.create_exclusive("memory://again", b"mine")
    assert not storage.create_exclusive("memory://again", b"another's")


def client_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


@pytest.mark.parametrize("translate", [lambda error: error, translate_boto_error])
@pytest.mark.parametrize(
    ("code", "status", "is_transient"),
    [
        ("SlowDown", 503, True),
        ("ServiceUnavailable", 503, True),
        ("InternalError", 500, True),
        ("500", 500, True),
        ("BadGateway", 502, True),
        ("RequestTimeout", 408, True),
        ("ConditionalRequestConflict", 409, True),
        ("TooManyRequests", 429, True),
        ("NotImplemented", 501, False),
        ("AccessDenied", 403, False),
        ("InvalidAccessKeyId", 403, False),
        ("SomethingNew", 400, False),
        ("InvalidRange", 416, False),
        ("PreconditionFailed", 412, False),
        ("NoSuchKey", 404, False),
    ],
)
def test_an_answer_of_the_store_says_whether_to_try_again(
    translate: Callable[[ClientError], Exception], code: str, status: int, is_transient: bool
) -> None:
    assert storage.is_transient(translate(client_error(code, status))) is is_transient


@pytest.mark.parametrize(
    ("fault", "is_transient"),
    [
        (EndpointConnectionError(endpoint_url="x"), True),
        (ConnectTimeoutError(endpoint_url="x"), True),
        (ResponseStreamingError(error="x"), True),
        (BrokenPipeError(), True),
        (OSError(errno.EHOSTUNREACH, "x"), True),
        (OSError(errno.ENOSPC, "x"), False),
        (OSError(errno.EINVAL, "x"), False),
        (FileExistsError(), False),
        (NotADirectoryError(), False),
        (KeyError("Timeout"), False),
    ],
)
def test_faults_of_the_connection_pass_and_others_stay(fault: Exception, is_transient: bool) -> None:
    assert storage.is_transient(fault) is is_transient


def test_a_failed_condition_is_understood_from_any_store(use_store: Callable[[FaultyStore], FaultyStore]) -> None:
    unnamed = translate_boto_error(client_error("PreconditionFailed", 412))  # s3fs wants a Condition field in it
    assert not isinstance(unnamed, FileExistsError)
    store = use_store(FaultyStore(unnamed))
    store.inner.pipe_file("/x", b"another's")
    assert not storage.create_exclusive("memory://x", b"mine")


@pytest.mark.parametrize("root", ["", "memory:/"])
def test_a_download_is_the_object_block_by_block(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 100)
    for num_bytes in (0, 1, 99, 100, 101, 1234):
        content = np.random.default_rng(num_bytes).bytes(num_bytes)
        storage.write_bytes(f"{root}{tmp_path}/x", content)
        path = tmp_path / "copy"
        assert storage.download(f"{root}{tmp_path}/x", path) == hashlib.sha256(content).hexdigest()
        assert path.read_bytes() == content
        assert storage.sha256_of_file(path) == storage.sha256_of_bytes(content)


def test_a_fault_late_in_a_download_does_not_start_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_store: Callable[[FaultyStore], FaultyStore]
) -> None:
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 10)
    store = use_store(FaultyStore())
    store.inner.pipe_file("/x", bytes(range(100)))
    storage.download("memory://x", tmp_path / "whole")
    num_calls = len(store.calls)
    answers = iter(range(1000))
    cat_file = store.inner.cat_file

    def breaks_once(*args: Any, **options: Any) -> bytes:
        if next(answers) == 8:
            raise ConnectionResetError
        return cat_file(*args, **options)

    monkeypatch.setattr(store.inner, "cat_file", breaks_once)
    store.calls = []
    storage.download("memory://x", tmp_path / "broken")
    assert (tmp_path / "broken").read_bytes() == bytes(range(100))
    assert len(store.calls) == num_calls + 1


def test_a_full_disk_is_called_a_full_disk(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/x", b"1" * 100_000)
    with pytest.raises(StorageError, match="no room"):
        storage.download(f"{tmp_path}/x", Path("/dev/full"))


def test_a_local_file_that_may_not_be_read_is_no_matter_of_cloud_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any) -> Any:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(StorageError, match="not allowed") as caught:
        storage.read_bytes(f"{tmp_path}/x")
    assert "AWS" not in caught.value.next_step


def test_options_are_handed_to_the_filesystem_and_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def url_to_fs(url: str, **options: Any) -> tuple[Any, str]:
        seen.append(options)
        options["config_kwargs"]["changed"] = True  # botocore does this
        raise ValueError("seen enough")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    given = {"endpoint_url": "http://x", "config_kwargs": {"max_pool_connections": 3}}
    storage.configure_storage(given)
    for _ in range(2):
        with pytest.raises(ConfigError):
            storage.read_bytes("s3://bucket/x")
        expected = {"max_pool_connections": 3, "retries": {"total_max_attempts": 1}, "changed": True}
        assert seen.pop() == {"endpoint_url": "http://x", "config_kwargs": expected}
    assert given == {"endpoint_url": "http://x", "config_kwargs": {"max_pool_connections": 3}}
