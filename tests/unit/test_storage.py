"""Claims about bytes at URLs that need no server: local files, a store in memory, faults injected below."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import ssl
import string
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
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
    SSLError,
)
from botocore.parsers import ResponseParserError
from hypothesis import given, settings
from hypothesis import strategies as st
from s3fs.errors import translate_boto_error

from dist_mlpl import local_files, retry, storage, stores
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
    monkeypatch.setattr(retry, "time", clock)
    return clock


@pytest.fixture
def use_store(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[[FaultyStore], FaultyStore]:
    def use(store: FaultyStore) -> FaultyStore:
        monkeypatch.setattr(stores, "remote", lambda url, **_: (store, url.removeprefix("memory:/")))
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

    monkeypatch.setattr(local_files, "write_durably", write_half)
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
        assert clock.now == pytest.approx(deadline)  # the last pause ends there, for one more try
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


def client_error(code: str, status: int, **headers: str) -> ClientError:
    told = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": told}, "PutObject")


@pytest.mark.parametrize("translate", [lambda error: error, translate_boto_error])
@pytest.mark.parametrize(
    ("code", "status", "is_transient"),
    [
        ("SlowDown", 503, True),
        ("ServiceUnavailable", 503, True),
        ("InternalError", 500, True),
        ("500", 500, True),
        ("BadGateway", 502, True),
        ("RequestTimeout", 400, True),
        ("RequestTimeout", 408, True),
        ("IncompleteBody", 400, True),
        ("ConditionalRequestConflict", 409, True),
        ("TooManyRequests", 429, True),
        ("NotImplemented", 501, False),
        ("AccessDenied", 403, False),
        ("InvalidAccessKeyId", 403, False),
        ("ExpiredToken", 400, False),
        ("NoSuchBucket", 404, False),
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
        (ResponseParserError("not XML"), True),
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


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("cause", ["TLS", "cut TLS", "no such host", "no name server"])
@pytest.mark.parametrize("library", [SSLError, EndpointConnectionError])
def test_what_lies_behind_a_failed_connection_says_whether_it_passes(library: Any, cause: str) -> None:
    behind = {
        "TLS": ssl.SSLCertVerificationError("self-signed certificate"),
        "cut TLS": ssl.SSLEOFError("unexpected end"),
        "no such host": socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        "no name server": socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    }[cause]
    fault = caused(library(endpoint_url="https://x", error="x"), caused(OSError("aiohttp's"), behind))
    assert storage.is_transient(fault) is (cause in ("cut TLS", "no name server"))


@pytest.mark.parametrize("translate", [lambda error: error, translate_boto_error])
def test_expired_credentials_are_said_to_have_expired(
    translate: Callable[[ClientError], Exception], use_store: Callable[[FaultyStore], FaultyStore], clock: Clock
) -> None:
    use_store(FaultyStore(translate(client_error("ExpiredToken", 400))))
    with pytest.raises(StorageError, match="credentials have expired") as caught:
        storage.read_bytes("memory://x")
    assert "get new ones" in caught.value.next_step
    assert clock.pauses == []


@pytest.mark.parametrize("translate", [lambda error: error, translate_boto_error])
@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_busy_store_is_left_alone_for_as_long_as_it_asks(
    kind: str,
    translate: Callable[[ClientError], Exception],
    use_store: Callable[[FaultyStore], FaultyStore],
    clock: Clock,
) -> None:
    asked = "7" if kind == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=9), usegmt=True)
    store = use_store(FaultyStore(translate(client_error("SlowDown", 503, **{"retry-after": asked}))))
    store.inner.pipe_file("/x", b"content")
    assert storage.read_bytes("memory://x") == b"content"
    assert len(clock.pauses) == 1
    assert 7.0 < clock.pauses[0] < 9.5


@pytest.mark.parametrize(("asked", "num_calls"), [("1000", 2), ("Wed, 21 Oct 2015 07:28:00 GMT", None), ("soon", None)])
def test_no_pause_goes_beyond_the_deadline(
    asked: str, num_calls: int | None, use_store: Callable[[FaultyStore], FaultyStore], clock: Clock
) -> None:
    busy = client_error("SlowDown", 503, **{"retry-after": asked})
    store = use_store(FaultyStore(*[busy] * 1000))
    with pytest.raises(StorageError, match="SlowDown"):
        storage.read_bytes("memory://x")
    assert clock.now <= storage.DEADLINE_SECONDS
    assert num_calls is None or len(store.calls) == num_calls


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


def test_a_file_where_a_folder_is_needed_is_no_matter_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,labels\n")
    for wrong in (
        lambda: storage.read_bytes(f"{tmp_path}/labels.csv/manifest.json"),
        lambda: storage.write_bytes(f"{tmp_path}/labels.csv/x", b"1"),
        lambda: storage.read_bytes(str(tmp_path)),
    ):
        with pytest.raises(StorageError) as caught:
            wrong()
        assert "correct the path" in caught.value.next_step
    storage.configure_storage({"key": "k", "secret": "s"}, deadline_seconds=0.0)
    with pytest.raises(StorageError, match="no name in a store") as caught:
        storage.read_bytes("s3://user:pw@bucket/x")
    assert "pw@" not in str(caught.value)
    storage.configure_storage()


def test_a_disk_without_hard_links_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what FAT answers

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="no hard link can be made") as caught:
        storage.create_exclusive(f"{tmp_path}/x", b"mine")
    assert "another disk" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_a_link_whose_answer_a_network_disk_lost_was_made_by_this_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def lose(file: Path, path: Path) -> None:
        link(file, path)
        raise FileExistsError(errno.EEXIST, "File exists")  # NFS has repeated the request

    monkeypatch.setattr(os, "link", lose)
    assert storage.create_exclusive(f"{tmp_path}/x", b"mine")
    monkeypatch.undo()
    assert not storage.create_exclusive(f"{tmp_path}/x", b"another's")
    assert storage.read_bytes(f"{tmp_path}/x") == b"mine"


def test_a_download_into_no_folder_is_not_called_a_missing_object(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/x", b"1")
    with pytest.raises(StorageError, match="folder to write to not found"):
        storage.download(f"{tmp_path}/x", tmp_path / "none" / "copy")


def test_a_local_file_that_may_not_be_read_is_no_matter_of_cloud_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **options: object) -> Any:
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
    storage.configure_storage(given, stall_seconds=2.0)
    for _ in range(2):
        with pytest.raises(ConfigError):
            storage.read_bytes("s3://bucket/x")
        expected = {"max_pool_connections": 3, "retries": {"total_max_attempts": 1}, "changed": True}
        expected |= {"connect_timeout": 2.0, "read_timeout": 2.0}
        assert seen.pop() == {"endpoint_url": "http://x", "config_kwargs": expected, "skip_instance_cache": True}
    assert given == {"endpoint_url": "http://x", "config_kwargs": {"max_pool_connections": 3}}


@pytest.mark.parametrize(("url", "extra"), [("gs://bucket/x", "gcs"), ("abfs://container@account/x", "azure")])
def test_a_scheme_whose_package_is_not_installed_names_its_extra(
    url: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(url: str, **options: Any) -> Any:
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", not_installed)
    with pytest.raises(ConfigError) as caught:
        storage.read_bytes(url)
    assert caught.value.next_step == f"pip install -e '.[{extra}]' in the checkout"


def test_options_of_one_scheme_reach_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def url_to_fs(url: str, **options: Any) -> Any:
        seen[url.split("://")[0]] = options
        raise ValueError("seen enough")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    storage.configure_storage({"s3": {"anon": True}, "https": {"headers": {"X": "y"}}})
    for scheme in ("s3", "https", "gs"):
        with pytest.raises(ConfigError):
            storage.read_bytes(f"{scheme}://bucket/x")
    assert seen["https"] == {"headers": {"X": "y"}, "skip_instance_cache": True}
    assert seen["gs"] == {"skip_instance_cache": True}
    assert seen["s3"]["anon"]
    assert "headers" not in seen["s3"]


@pytest.mark.parametrize("root", ["", "memory:/"])
def test_a_version_changes_with_the_content_and_only_then(tmp_path: Path, root: str) -> None:
    url = f"{root}{tmp_path}/x"
    with pytest.raises(FileNotFoundError):
        storage.version(url)
    storage.write_bytes(url, b"one")
    first = storage.version(url)
    assert first
    assert storage.version(url) == first
    assert storage.read_bytes(url) == b"one"
    assert storage.version(url) == first
    storage.write_bytes(url, b"two")
    assert storage.version(url) != first


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ({"size": 3, "ETag": '"abc"', "LastModified": "today"}, "abc"),
        ({"size": 3, "etag": "0x8D", "last_modified": "today"}, "0x8D"),
        ({"size": 3, "ETag": None, "LastModified": "today"}, "3-today"),
        ({"size": 3, "updated": "2026-01-01"}, "3-2026-01-01"),
        ({"size": 3, "ETag": ""}, ""),
    ],
)
def test_a_version_is_the_etag_else_size_and_time_else_nothing(
    told: dict[str, Any], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "look_up", lambda url: told)
    assert storage.version("s3://bucket/x") == version


_MOMENT = datetime(2026, 1, 2, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    ("told", "moment"),
    [
        ({"LastModified": datetime(2026, 1, 2, 4, tzinfo=timezone(timedelta(hours=1)))}, _MOMENT),
        ({"LastModified": None, "created": datetime(2026, 1, 2, 3)}, _MOMENT),
        ({"updated": "2026-01-02T03:00:00.000Z"}, _MOMENT),
        ({"LastModified": "Fri, 02 Jan 2026 03:00:00 GMT"}, _MOMENT),
        ({"ETag": "abc"}, None),
    ],
)
def test_when_something_was_written_is_told_in_utc_whatever_the_store_says_it_in(
    told: dict[str, Any], moment: datetime | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "look_up", lambda url: told)
    assert storage.written_at("s3://bucket/x") == moment


def test_traffic_is_what_remote_stores_were_asked_for(
    tmp_path: Path, use_store: Callable[[FaultyStore], FaultyStore]
) -> None:
    before = storage.traffic()
    storage.write_bytes(f"{tmp_path}/x", b"1234567")
    assert storage.read_bytes(f"{tmp_path}/x") == b"1234567"
    assert storage.traffic() == before  # a local file is no traffic
    store = use_store(FaultyStore())
    store.inner.pipe_file("/x", b"1234567")
    store.faults = [ConnectionResetError(), TimeoutError()]
    storage.read_bytes("memory://x", 2, 5)
    assert storage.traffic() == (before.bytes_read + 3, before.requests + 3, before.retries + 2)
    storage.download("memory://x", tmp_path / "copy")
    with storage.open_read("memory://x") as stream:
        assert stream.read() == b"1234567"
    assert storage.traffic() == (before.bytes_read + 17, before.requests + 7, before.retries + 2)


def test_traffic_of_many_threads_adds_up_and_a_child_begins_at_nothing() -> None:
    storage.write_bytes("memory://x", bytes(100))
    before = storage.traffic()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: storage.read_bytes("memory://x", 0, number % 7 + 1), range(700)))
    assert storage.traffic() == (before.bytes_read + 2800, before.requests + 700, before.retries)
    assert call_forked(storage.traffic) == [(0, 0, 0)]


def test_a_stream_is_the_object_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_STREAM_BYTES", 64)
    for num_bytes in (0, 1, 63, 64, 65, 1000):
        content = np.random.default_rng(num_bytes).bytes(num_bytes).replace(b"a", b"\n")
        storage.write_bytes("memory://x", content)
        with storage.open_read("memory://x") as stream:
            assert list(stream) == content.splitlines(keepends=True) or b"\r" in content
        for piece in (1, 7, 64, 100, -1):
            with storage.open_read("memory://x") as stream:
                assert b"".join(iter(lambda stream=stream, piece=piece: stream.read(piece), b"")) == content


def test_a_fault_in_the_middle_of_a_stream_does_not_show(use_store: Callable[[FaultyStore], FaultyStore]) -> None:
    store = use_store(FaultyStore())
    content = np.random.default_rng(0).bytes(9 << 20)
    store.inner.pipe_file("/x", content)
    with storage.open_read("memory://x") as stream:
        assert stream.read(5) == content[:5]
        store.faults = [ConnectionResetError()]
        assert stream.read() == content[5:]
    assert store.faults == []


SECRETS = st.text(string.ascii_letters + string.digits + "/+=&?:@#% \"'\\\n", min_size=12, max_size=40).map(
    lambda text: f"{text[:6]}Zq9{text[6:]}"  # no message has that by itself; hypothesis draws words of the sources, too
)


class LeakyError(Exception):
    """An error as careless libraries make them: it holds whatever it was made with."""


@settings(max_examples=60, deadline=None)
@given(
    secret=SECRETS,
    option=st.sampled_from(["key", "secret", "token", "account_key", "sas_token", "connection_string", "password"]),
    kind=st.sampled_from(
        [LeakyError, FileNotFoundError, PermissionError, ImportError, ConnectionError, FileExistsError]
    ),
)
def test_secrets_among_the_options_are_never_printed(secret: str, option: str, kind: type[Exception]) -> None:
    def leaks() -> None:
        try:
            raise LeakyError(f"while trying {secret!r} and {secret}")
        except LeakyError as error:
            raise kind(f"connection with {secret} to s3://bucket/x failed") from error

    storage.configure_storage({option: secret, "client_kwargs": {"headers": {option: secret}}}, deadline_seconds=0.0)
    try:
        with pytest.raises((StorageError, OSError)) as caught:
            storage.retried(leaks, url="s3://bucket/x", doing="reading")
    finally:
        storage.configure_storage()
    assert_hidden(caught.value, secret)


QUOTED = st.text(string.ascii_letters + string.digits + "-._~%", min_size=12, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    user=QUOTED,
    password=QUOTED,
    signature=QUOTED,
    kind=st.sampled_from([LeakyError, FileNotFoundError, PermissionError, ValueError, ConnectionError]),
)
def test_secrets_in_a_url_are_never_printed(user: str, password: str, signature: str, kind: type[Exception]) -> None:
    url = f"https://{user}:{password}@host/path?X-Amz-Signature={signature}&sig={signature}&{signature}"

    def leaks() -> None:
        raise kind(f"{url} ({password}) <{signature}> as {user} failed")

    storage.configure_storage(deadline_seconds=0.0)
    with pytest.raises((StorageError, OSError)) as caught:
        storage.retried(leaks, url=url, doing="reading")
    for secret in (user, password, signature):
        assert_hidden(caught.value, secret)
        assert secret not in storage.shown(url)
    for verb in (lambda: storage.write_bytes(url, b""), lambda: storage.remove(url)):
        with pytest.raises(StorageError, match="cannot be written") as caught:
            verb()
        assert_hidden(caught.value, signature)


def assert_hidden(error: BaseException, secret: str) -> None:
    """Neither the error nor anything that a traceback prints of it holds the secret, nor does its copy elsewhere."""
    assert isinstance(error, Exception)
    for text in (str(error), repr(error), *traceback.format_exception_only(error), str(error.__dict__)):
        assert secret not in text
    printed = [str(part) for part in retry._chain(error)]
    assert not any(secret in text for text in printed)


def test_a_harmless_cause_stays_for_who_reads_the_traceback() -> None:
    def fails() -> None:
        raise ValueError("harmless")

    with pytest.raises(StorageError) as caught:
        storage.retried(fails, url="s3://bucket/x", doing="reading")
    assert isinstance(caught.value.__cause__, ValueError)
