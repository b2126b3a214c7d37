"""Claims about bytes in an object store: the embedded S3 server, straight and through a proxy that breaks things."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from dist_mlpl import retry, storage
from dist_mlpl.errors import StorageError
from dist_mlpl.tools.object_store import EmbeddedS3
from tests.support.processes import call_forked
from tests.support.proxy import Fault, FaultyProxy

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _usual_storage() -> Iterator[None]:
    yield
    storage.configure_storage()


@pytest.fixture
def proxy(embedded_s3: EmbeddedS3) -> Iterator[FaultyProxy]:
    """This process's requests pass through it."""
    with FaultyProxy(embedded_s3.endpoint) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url})
        yield proxy


def test_the_endpoint_in_the_environment_is_honoured(embedded_s3: EmbeddedS3, s3_bucket: str) -> None:
    with FaultyProxy(embedded_s3.endpoint) as proxy:

        def write() -> None:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            storage.write_bytes(f"{s3_bucket}/x", b"content")

        call_forked(write)
        assert proxy.requests == [f"PUT /{s3_bucket.removeprefix('s3://')}/x"]
    assert storage.read_bytes(f"{s3_bucket}/x") == b"content"


def test_a_range_of_an_object_is_a_slice(s3_bucket: str) -> None:
    url, random = f"{s3_bucket}/folder/x", np.random.default_rng(0)
    content = random.bytes(1000)
    storage.write_bytes(url, content)
    assert storage.read_bytes(url) == content
    assert storage.size(url) == 1000
    for _ in range(10):
        start = int(random.integers(0, 999))
        end = int(random.integers(start + 1, 1001))
        assert storage.read_bytes(url, start, end) == content[start:end]
        assert storage.read_bytes(url, start) == content[start:]
    with pytest.raises(StorageError, match="bytes came back"):
        storage.read_bytes(url, 990, 1010)
    with pytest.raises(StorageError):
        storage.read_bytes(url, 2000, 2010)
    with storage.open_read(url) as stream:
        assert stream.read() == content


def test_objects_of_other_processes_are_seen_at_once(s3_bucket: str) -> None:
    folder = f"{s3_bucket}/run/commits"
    assert storage.list_names(folder) == []
    assert not storage.exists(f"{folder}/1")
    for number in range(1, 4):
        call_forked(lambda number=number: storage.write_bytes(f"{folder}/{number}", b"x" * number))
        assert storage.list_names(folder) == [str(n) for n in range(1, number + 1)]
        assert storage.exists(f"{folder}/{number}")
        assert list(storage.list_files(f"{s3_bucket}/run")) == [f"commits/{n}" for n in range(1, number + 1)]
    call_forked(lambda: storage.write_bytes(f"{folder}/3", b"longer"))
    assert storage.size(f"{folder}/3") == 6
    assert storage.read_bytes(f"{folder}/3") == b"longer"
    call_forked(lambda: storage.remove(f"{folder}/1"))
    assert storage.list_names(folder) == ["2", "3"]
    assert not storage.exists(f"{folder}/1")
    storage.remove(f"{folder}/1")
    storage.write_bytes(f"{folder}/.probe", b"x")
    assert storage.list_names(folder) == ["2", "3"]


def test_files_go_up_and_come_down_whole(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 1 << 20)
    content = np.random.default_rng(1).bytes(2_500_000)
    (tmp_path / "up").write_bytes(content)
    storage.upload(tmp_path / "up", f"{s3_bucket}/x")
    digest = storage.download(f"{s3_bucket}/x", tmp_path / "down")
    assert digest == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "down").read_bytes() == content
    storage.write_bytes(f"{s3_bucket}/empty", b"")
    storage.download(f"{s3_bucket}/empty", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b""


def test_of_racing_processes_one_creates_an_object(s3_bucket: str) -> None:
    names = [f"{s3_bucket}/commits/{number}" for number in range(10)]

    def create_all(writer: int) -> list[bool]:
        return [storage.create_exclusive(name, f"writer {writer}".encode()) for name in names]

    won = call_forked(*[lambda writer=writer: create_all(writer) for writer in range(4)])
    for row, name in enumerate(names):
        winners = [writer for writer in range(4) if won[writer][row]]
        assert [f"writer {writer}".encode() for writer in winners] == [storage.read_bytes(name)]


def test_exclusive_create_is_proven_and_leaves_nothing(s3_bucket: str) -> None:
    storage.check_exclusive_create(f"{s3_bucket}/run")
    assert storage.list_names(s3_bucket) == []


def test_a_forked_child_uses_storage_after_its_parent_did(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/x", b"content")
    read = [lambda: storage.read_bytes(f"{s3_bucket}/x")] * 3
    assert call_forked(*read) == [b"content"] * 3
    assert storage.read_bytes(f"{s3_bucket}/x") == b"content"


def test_a_forked_child_leaves_the_connections_of_its_parent_alone(embedded_s3: EmbeddedS3, s3_bucket: str) -> None:
    def use() -> None:
        storage.write_bytes(f"{s3_bucket}/x", b"content")
        storage.read_bytes(f"{s3_bucket}/x")

    with FaultyProxy(embedded_s3.endpoint) as earlier:  # its sockets close, and their numbers are used again
        storage.configure_storage({"endpoint_url": earlier.url})
        use()
    for _ in range(2):
        with FaultyProxy(embedded_s3.endpoint) as proxy:
            storage.configure_storage({"endpoint_url": proxy.url})
            use()
            call_forked(use)
            proxy.requests.clear()
            assert storage.size(f"{s3_bucket}/x") == 7
            assert len(proxy.requests) == 1  # one whose answer is never noticed is repeated when its time is up


def test_a_bucket_that_is_not_there_is_named(s3_bucket: str) -> None:
    url = f"{s3_bucket}-not/x"
    with pytest.raises(StorageError, match="bucket") as caught:
        storage.write_bytes(url, b"x")
    assert caught.value.where == url
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        storage.read_bytes(url)
    with pytest.raises(FileNotFoundError, match="key does not exist"):
        storage.read_bytes(f"{s3_bucket}/x", 0, 5)


WORK: dict[str, Callable[[str, Path], object]] = {
    "read": lambda url, path: storage.read_bytes(url),
    "range": lambda url, path: storage.read_bytes(url, 1, 3),
    "size": lambda url, path: storage.size(url),
    "list": lambda url, path: storage.list_names(url.rsplit("/", 1)[0]),
    "write": lambda url, path: storage.write_bytes(url, b"content"),
    "create": lambda url, path: storage.create_exclusive(url + "-new", b"mine"),
    "download": lambda url, path: storage.download(url, path),
    "upload": lambda url, path: storage.upload(path, url),
    "remove": lambda url, path: storage.remove(url),
}


@pytest.mark.parametrize("fault", ["refuse", "busy", "broken", "cut"])
def test_faults_that_pass_do_not_show(fault: Fault, s3_bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    works = ["read", "range", "list", "download"] if fault == "cut" else list(WORK)  # a body is what can be cut

    def outcomes(num_faults: int) -> list[object]:
        storage.write_bytes(f"{s3_bucket}/folder/x", b"content")
        found = []
        for work in works:
            (tmp_path / "file").write_bytes(b"content")
            proxy.fail(fault, times=num_faults, method="GET" if fault == "cut" else "")
            found.append(WORK[work](f"{s3_bucket}/folder/x", tmp_path / "file"))
            assert proxy.num_faults_left == 0
        storage.remove(f"{s3_bucket}/folder/x-new")
        return found

    assert outcomes(num_faults=2) == outcomes(num_faults=0)


@pytest.mark.parametrize("num_bytes", [100, 40_000_000, 150_000_000])
@pytest.mark.parametrize("work", ["write", "create", "upload"])
def test_a_write_to_a_store_that_goes_silent_ends(
    work: str, num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_mlpl.stores._SLOWEST_WRITE", 1 << 40)
    path, kept = tmp_path / "file", []
    path.write_bytes(bytes(num_bytes))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept_and_read_no_more() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    kept.append(server.accept()[0])

        thread = Thread(target=accept_and_read_no_more)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        storage.configure_storage({"endpoint_url": endpoint, "key": "k", "secret": "s"}, deadline_seconds=0.5,
                                  stall_seconds=0.5)  # fmt: skip
        writes = {"write": lambda: storage.write_bytes("s3://bucket/x", path.read_bytes()),
                  "create": lambda: storage.create_exclusive("s3://bucket/x", path.read_bytes()),
                  "upload": lambda: storage.upload(path, "s3://bucket/x")}  # fmt: skip
        with pytest.raises(StorageError, match="writing"):
            writes[work]()
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert kept
    for connection in kept:
        connection.close()


def test_a_folder_whose_files_may_not_be_deleted_is_not_called_deleted(s3_bucket: str, proxy: FaultyProxy) -> None:
    storage.write_bytes(f"{s3_bucket}/folder/x", b"content")
    proxy.fail("deny", times=100, method="DELETE")
    with pytest.raises(StorageError, match="not allowed"):
        storage.remove_folder(f"{s3_bucket}/folder")
    assert storage.exists(f"{s3_bucket}/folder/x")


@pytest.mark.parametrize("work", ["read", "write", "create"])
@pytest.mark.parametrize("fault", ["deny", "expired", "unsupported"])
def test_faults_that_stay_fail_at_the_first_answer(
    work: str, fault: Fault, s3_bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.fail(fault, times=100)
    with pytest.raises(StorageError) as caught:
        WORK[work](f"{s3_bucket}/x", tmp_path / "file")
    assert len(proxy.requests) == 1
    assert s3_bucket in caught.value.where
    assert ("not allowed" in caught.value.found) == (fault != "unsupported")
    assert ("have expired" in caught.value.found) == (fault == "expired")


@pytest.mark.parametrize("num_losses", [1, 3, 7])
def test_a_conditional_put_whose_answer_was_lost_is_still_ours(
    num_losses: int, s3_bucket: str, proxy: FaultyProxy
) -> None:
    proxy.fail("lose", times=num_losses, method="PUT")
    assert storage.create_exclusive(f"{s3_bucket}/x", b"mine")
    assert proxy.num_faults_left == 0
    proxy.fail("lose", times=num_losses, method="PUT")
    assert not storage.create_exclusive(f"{s3_bucket}/x", b"another's")
    assert storage.read_bytes(f"{s3_bucket}/x") == b"mine"


def test_an_endpoint_that_nobody_serves_is_given_up_at_the_deadline() -> None:
    with socket.socket() as unused:  # bound, never listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        options = {"endpoint_url": f"http://127.0.0.1:{unused.getsockname()[1]}", "key": "a", "secret": "b"}
        storage.configure_storage(options, deadline_seconds=0.5)
        with pytest.raises(StorageError) as caught:
            storage.read_bytes("s3://bucket/x")
    assert "Could not connect" in caught.value.found
    assert "AWS_ENDPOINT_URL" in caught.value.next_step


def test_a_version_is_the_etag_of_what_is_stored_now(s3_bucket: str, proxy: FaultyProxy) -> None:
    url = f"{s3_bucket}/folder/x"
    storage.write_bytes(url, b"content")
    proxy.requests.clear()
    first = storage.version(url)
    assert len(proxy.requests) == 1
    assert first == hashlib.md5(b"content").hexdigest()
    assert storage.version(url) == first
    call_forked(lambda: storage.write_bytes(url, b"another"))
    assert storage.version(url) == hashlib.md5(b"another").hexdigest()
    assert storage.written_at(url) is not None
    storage.remove(url)
    with pytest.raises(FileNotFoundError):
        storage.version(url)


@pytest.mark.parametrize("seed", [0, 1])
def test_many_threads_read_right_bytes_from_a_store_that_fails_often(
    seed: int, embedded_s3: EmbeddedS3, proxy: FaultyProxy
) -> None:
    bucket = embedded_s3.make_bucket(f"fails-often-{seed}")  # the name is part of what decides which requests fail
    url, content = f"{bucket}/x", np.random.default_rng(seed).bytes(100_000)
    storage.write_bytes(url, content)
    starts = np.random.default_rng(seed).integers(0, 99_000, size=200).tolist()
    proxy.fail_fraction(0.1, ["busy", "broken", "cut", "slow"], seed=seed)
    before = storage.traffic()

    def read(start: int) -> bool:
        return storage.read_bytes(url, start, start + 1000) == content[start : start + 1000]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, starts))
    num_failed = sum(times for fault, times in proxy.struck.items() if fault != "slow")
    assert num_failed >= 5
    assert set(proxy.struck) == {"busy", "broken", "cut", "slow"}
    assert storage.traffic() == (
        before.bytes_read + 200_000,
        before.requests + 200 + num_failed,
        before.retries + num_failed,
    )


def test_the_same_requests_fail_whatever_the_order(embedded_s3: EmbeddedS3) -> None:
    def struck(order: list[int], seed: int) -> set[int]:
        with FaultyProxy(embedded_s3.endpoint) as proxy:
            proxy.fail_fraction(0.2, ["busy", "cut"], seed=seed)
            return {number for number in order if proxy.fault_for("GET", f"/bucket/{number}", "")}

    numbers = list(range(500))
    assert struck(numbers, 0) == struck(numbers[::-1], 0) != struck(numbers, 1)
    assert 60 < len(struck(numbers, 0)) < 140


def test_a_connection_that_falls_silent_is_given_up_and_tried_again(embedded_s3: EmbeddedS3, s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/x", b"content")
    with FaultyProxy(embedded_s3.endpoint, slow_seconds=60.0) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url}, stall_seconds=0.3)
        faults: list[Fault] = ["stall", "slow"]
        for fault in faults:
            proxy.fail(fault, method="GET")
            before = storage.traffic()
            assert storage.read_bytes(f"{s3_bucket}/x", 1, 5) == b"onte"
            assert storage.traffic().retries == before.retries + 1


def test_a_slow_store_and_a_narrow_line_are_no_faults(embedded_s3: EmbeddedS3, s3_bucket: str) -> None:
    content = np.random.default_rng(0).bytes(50_000)
    storage.write_bytes(f"{s3_bucket}/x", content)
    with FaultyProxy(embedded_s3.endpoint, slow_seconds=0.3, bytes_per_second=100_000) as proxy:
        storage.configure_storage({"endpoint_url": proxy.url}, stall_seconds=2.0)
        proxy.fail("slow")
        before = storage.traffic()
        assert storage.read_bytes(f"{s3_bucket}/x", 0, 50_000) == content
        assert storage.traffic() == (before.bytes_read + 50_000, before.requests + 1, before.retries)


def test_a_store_that_asks_for_patience_gets_it(
    embedded_s3: EmbeddedS3, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3_bucket}/x", b"content")
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    with FaultyProxy(embedded_s3.endpoint, retry_after="3") as proxy:
        storage.configure_storage({"endpoint_url": proxy.url})
        for ask in (storage.size, storage.read_bytes):
            proxy.fail("busy")
            assert ask(f"{s3_bucket}/x")
    assert len(pauses) == 2
    assert all(3.0 < pause < 4.0 for pause in pauses)


def test_keys_are_not_printed_when_the_store_cannot_be_reached(s3_bucket: str) -> None:
    options = {"key": "AKIA12345678", "secret": "s/12345678+", "token": "t/12345678="}
    user = f"s3://{options['key']}:{options['secret']}@bucket/x"
    for url, endpoint in ((f"{s3_bucket}/x", "http://127.0.0.1:9"), (user, "http://127.0.0.1:9"), (user, None)):
        storage.configure_storage({"endpoint_url": endpoint, **options}, deadline_seconds=0.0)
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(url)
        printed = "".join(traceback.format_exception(caught.value))
        assert not [secret for secret in options.values() if secret in printed]
