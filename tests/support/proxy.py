"""Owns a small HTTP proxy before an object store, which answers wrongly, late or not at all when told to."""

from __future__ import annotations

import http.client
import random
import sys
import threading
from collections import Counter, deque
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

Fault = Literal[
    "refuse",  # close the connection unanswered; the store never sees the request
    "lose",  # pass the request on, then close the connection: done, and nobody told
    "cut",  # pass on the first half of the answer's body, then close the connection
    "stall",  # the same, but keep the connection open in silence until `release`
    "slow",  # hold the answer back for `slow_seconds`, then give it whole
    "busy",  # 503 SlowDown
    "broken",  # 500 InternalError
    "deny",  # 403 AccessDenied
    "expired",  # 400 ExpiredToken
    "unsupported",  # 501 NotImplemented
]
_ANSWERS = {
    "busy": (503, "SlowDown"),
    "broken": (500, "InternalError"),
    "deny": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "unsupported": (501, "NotImplemented"),
}


class FaultyProxy:
    """Passes requests to `target` but for faults: those ordered with `fail` strike the next requests in turn, then
    those of `fail_fraction` a part of the rest.

    Args:
        target: http://HOST:PORT of the store.
        slow_seconds: how long a "slow" answer is held back.
        retry_after: what a "busy" answer says in its Retry-After header; empty for no such header.
        bytes_per_second: at most, for the body of each answer; None for no limit.
    """

    def __init__(
        self, target: str, *, slow_seconds: float = 0.2, retry_after: str = "", bytes_per_second: float | None = None
    ) -> None:
        self.target = target.removeprefix("http://")
        self.slow_seconds, self.retry_after, self.bytes_per_second = slow_seconds, retry_after, bytes_per_second
        self.requests: list[str] = []  # "GET /bucket/key" of every request
        self.struck: Counter[Fault] = Counter()  # faults that happened
        self.is_stalled = threading.Event()  # half a body has been sent
        self._faults: deque[tuple[str, Fault]] = deque()
        self._fraction, self._choice, self._seed = 0.0, tuple[Fault, ...](), 0
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, fault: Fault, *, times: int = 1, method: str = "") -> None:
        """Order faults for the next `times` requests, of `method` alone if it is given."""
        with self._lock:
            self._faults.extend([(method, fault)] * times)

    def fail_fraction(self, fraction: float, faults: Sequence[Fault], *, seed: int = 0) -> None:
        """From now on a fraction in [0, 1] of all requests fails, with one of `faults` each; 0 ends it.

        Which ones follows from the seed, what is asked for and how often it was asked before, not from the order in
        which threads come.
        """
        with self._lock:
            self._fraction, self._choice, self._seed = fraction, tuple(faults), seed
            self._asked.clear()

    def release(self) -> None:
        """End every stalled answer."""
        self._released.set()

    @property
    def num_faults_left(self) -> int:
        """Ordered and not yet used."""
        return len(self._faults)

    def fault_for(self, method: str, path: str, byte_range: str) -> Fault | None:
        """Note a request and take its fault."""
        with self._lock:
            self.requests.append(f"{method} {path.split('?')[0]}")
            fault = self._next_fault(method, f"{method} {path} {byte_range}")
            if fault:
                self.struck[fault] += 1
            return fault

    def _next_fault(self, method: str, asked: str) -> Fault | None:
        if self._faults and self._faults[0][0] in ("", method):
            return self._faults.popleft()[1]
        self._asked[asked] += 1
        chance = random.Random(f"{self._seed} {asked} {self._asked[asked]}")
        return chance.choice(self._choice) if chance.random() < self._fraction else None

    def wait(self, seconds: float) -> None:
        """Block for a while, or until `release`."""
        self._released.wait(seconds)

    def wait_for_release(self) -> None:
        """Say that an answer is stalled, and block."""
        self.is_stalled.set()
        self._released.wait()

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up and gone is no fault of the proxy; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small bodies wait for the head to be acknowledged
    proxy: FaultyProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault_for(self.command, self.path, self.headers.get("Range", ""))
        if fault == "refuse":
            self.close_connection = True
            return
        if fault in _ANSWERS:
            self._answer_error(*_ANSWERS[fault], retry_after=self.proxy.retry_after if fault == "busy" else "")
            return
        if fault == "slow":
            self.proxy.wait(self.proxy.slow_seconds)
        connection = http.client.HTTPConnection(self.proxy.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lose":
            self.close_connection = True
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault in ("cut", "stall"):
            self._write_body(content[: len(content) // 2])
            if fault == "stall":
                self.proxy.wait_for_release()
            self.close_connection = True
            return
        self._write_body(content)

    def _write_body(self, content: bytes) -> None:
        """At `bytes_per_second`, twenty pieces a second."""
        rate = self.proxy.bytes_per_second
        piece = max(1, int(rate / 20)) if rate else max(1, len(content))
        for start in range(0, len(content), piece):
            self.wfile.write(content[start : start + piece])
            if rate:
                self.proxy.wait(piece / rate)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815 - names that the base class asks for

    def _answer_error(self, status: int, code: str, *, retry_after: str) -> None:
        content = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
