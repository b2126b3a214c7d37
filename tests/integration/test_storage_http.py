"""Claims about bytes over HTTP: a web server of this machine's own, straight and through a proxy that breaks things."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dist_mlpl import storage
from dist_mlpl.errors import StorageError
from tests.support.processes import call_forked
from tests.support.proxy import Fault, FaultyProxy
from tests.support.web import WebServer

pytestmark = pytest.mark.integration

CONTENT = np.random.default_rng(0).bytes(1000)


@pytest.fixture(autouse=True)
def _usual_storage() -> Iterator[None]:
    yield
    storage.configure_storage()


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as web:
        web.files["/folder/x"] = CONTENT
        yield web


def test_a_range_over_http_is_a_slice(web: WebServer, tmp_path: Path) -> None:
    url, random = f"{web.url}/folder/x", np.random.default_rng(0)
    assert storage.read_bytes(url) == CONTENT
    assert storage.size(url) == 1000
    for _ in range(30):
        start, end = sorted(random.integers(0, 1001, size=2).tolist())
        assert storage.read_bytes(url, start, end) == CONTENT[start:end]
        if start < 1000:
            assert storage.read_bytes(url, start) == CONTENT[start:]
    assert storage.download(url, tmp_path / "copy") == hashlib.sha256(CONTENT).hexdigest()
    with storage.open_read(url) as stream:
        assert stream.read() == CONTENT


def test_bytes_behind_the_end_are_an_error(web: WebServer) -> None:
    with pytest.raises(StorageError, match="10 bytes came back"):
        storage.read_bytes(f"{web.url}/folder/x", 990, 1010)
    with pytest.raises(StorageError, match="behind its end") as caught:
        storage.read_bytes(f"{web.url}/folder/x", 2000, 2010)
    assert "shards verify" in caught.value.next_step


@pytest.mark.parametrize(("start", "end"), [(0, 500), (0, 1000), (10, 1010), (10, None), (999, 1000)])
def test_a_server_that_ignores_ranges_is_found_out_and_its_whole_file_not_awaited(start: int, end: int | None) -> None:
    with WebServer(honours_range=False) as web:
        web.files["/x"] = CONTENT
        with pytest.raises(StorageError, match="the server ignores Range") as caught:
            storage.read_bytes(f"{web.url}/x", start, end)
        assert caught.value.where == f"{web.url}/x"
        assert storage.read_bytes(f"{web.url}/x") == CONTENT  # the whole needs no range
        assert storage.size(f"{web.url}/x") == 1000


@pytest.mark.parametrize("honours_range", [True, False])
def test_a_url_that_allows_no_head_is_looked_up_by_its_first_byte(honours_range: bool) -> None:
    with WebServer(honours_head=False, honours_range=honours_range) as web:
        web.files.update({"/x": CONTENT, "/empty": b""})
        assert storage.size(f"{web.url}/x") == 1000
        assert storage.size(f"{web.url}/empty") == 0
        assert storage.exists(f"{web.url}/x")
        assert not storage.exists(f"{web.url}/y")


@pytest.mark.parametrize("has_etag", [True, False])
def test_a_version_changes_with_the_file(has_etag: bool) -> None:
    with WebServer(has_etag=has_etag) as web:
        web.files["/x"] = CONTENT
        first = storage.version(f"{web.url}/x")
        assert first
        assert storage.version(f"{web.url}/x") == first
        web.files["/x"] = CONTENT[::-1]
        web.changed = "Fri, 02 Jan 2026 00:00:00 GMT"
        assert storage.version(f"{web.url}/x") != first
        with pytest.raises(FileNotFoundError):
            storage.version(f"{web.url}/y")


def test_what_is_not_there_is_not_found_and_nothing_can_be_written(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    url = f"{web.url}/folder/y?sig=SECRET1234"
    asks: list[Callable[[str], object]] = [storage.read_bytes, storage.size, storage.open_read, storage.version]
    for ask in asks:
        with pytest.raises(FileNotFoundError) as caught:
            ask(url)
        assert "SECRET1234" not in str(caught.value)
    writes: list[Callable[[str], object]] = [
        lambda url: storage.write_bytes(url, b""),
        lambda url: storage.create_exclusive(url, b""),
        lambda url: storage.upload(tmp_path / "file", url),
        storage.remove,
    ]
    for write in writes:
        with pytest.raises(StorageError, match="cannot be written"):
            write(url)


def test_a_user_in_the_url_may_read_and_another_is_told_so_without_the_password() -> None:
    with WebServer(password="SECRET1234") as web:
        web.files["/x"] = CONTENT
        assert storage.read_bytes(f"http://user:SECRET1234@{web.address}/x", 5, 10) == CONTENT[5:10]
        with pytest.raises(StorageError, match="not allowed") as caught:
            storage.read_bytes(f"http://user:WRONG56789@{web.address}/x?sig=SIGNED1234")
        assert caught.value.where == f"http://***@{web.address}/x?sig=***"
        for secret in ("WRONG56789", "SIGNED1234"):
            assert secret not in f"{caught.value} {caught.value!r}"
        storage.configure_storage({"http": {"headers": {"Authorization": web.authorization}}})
        assert storage.read_bytes(f"{web.url}/x") == CONTENT


def test_options_of_another_store_are_called_that(web: WebServer) -> None:
    storage.configure_storage({"endpoint_url": "http://elsewhere"})
    with pytest.raises(StorageError, match="endpoint_url") as caught:
        storage.read_bytes(f"{web.url}/folder/x")
    assert "under its name" in caught.value.next_step


@pytest.mark.parametrize("fault", ["refuse", "busy", "broken", "cut"])
def test_faults_that_pass_do_not_show_over_http(fault: Fault, web: WebServer, tmp_path: Path) -> None:
    with FaultyProxy(web.url) as proxy:
        url = f"{proxy.url}/folder/x"
        asks: list[Callable[[], object]] = [
            lambda: storage.read_bytes(url),
            lambda: storage.read_bytes(url, 100, 900),
            lambda: storage.download(url, tmp_path / "copy"),
        ]
        if fault != "cut":  # a look-up has no body
            asks += [lambda: storage.size(url), lambda: storage.version(url)]
        for ask in asks:
            expected = ask()
            proxy.fail(fault, times=2, method="GET" if fault == "cut" else "")
            assert ask() == expected
            assert proxy.num_faults_left == 0


@pytest.mark.parametrize("fault", ["deny", "unsupported"])
def test_faults_that_stay_fail_at_the_first_answer_over_http(fault: Fault, web: WebServer) -> None:
    with FaultyProxy(web.url) as proxy:
        proxy.fail(fault, times=100)
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(f"{proxy.url}/folder/x", 1, 2)
        assert len(proxy.requests) == 1
        assert ("not allowed" in caught.value.found) == (fault == "deny")


def test_a_server_that_falls_silent_is_asked_again(web: WebServer) -> None:
    storage.configure_storage(stall_seconds=0.3)
    with FaultyProxy(web.url) as proxy:
        proxy.fail("stall")
        assert storage.read_bytes(f"{proxy.url}/folder/x", 100, 900) == CONTENT[100:900]
        assert len(proxy.requests) == 2


def test_an_outage_is_not_taken_for_a_missing_file(web: WebServer) -> None:
    storage.configure_storage(deadline_seconds=0.0)
    with FaultyProxy(web.url) as proxy:
        proxy.fail("busy", times=100)
        with pytest.raises(StorageError, match="503"):
            storage.exists(f"{proxy.url}/folder/x")


def test_a_server_without_tls_is_given_up_at_once(web: WebServer) -> None:
    before = storage.traffic()
    with pytest.raises(StorageError, match="no common TLS"):
        storage.read_bytes(f"https://{web.address}/folder/x")
    assert storage.traffic().retries == before.retries


def test_a_host_that_no_name_server_knows_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **options: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    before = storage.traffic()
    with pytest.raises(StorageError, match="no such host"):
        storage.read_bytes("http://no-such-host.invalid/x")
    assert storage.traffic().retries == before.retries


def test_threads_and_forked_children_read_at_once(web: WebServer) -> None:
    url = f"{web.url}/folder/x"

    def read(number: int) -> bool:
        start = number * 7 % 900
        return storage.read_bytes(url, start, start + 50) == CONTENT[start : start + 50]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(200)))
    assert call_forked(*[lambda number=number: read(number) for number in range(3)]) == [True] * 3
    assert read(4)
