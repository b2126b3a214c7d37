"""Owns a small HTTP proxy before an object store, which answers wrongly, late or not at all when told to."""

from __future__ import annotations

import http.client
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal

Fault = Literal[
    "refuse",  # close the connection unanswered; the store never sees the request
    "lose",  # pass the request on, then close the connection: done, and nobody told
    "cut",  # pass on the first half of the answer's body, then close the connection
    "stall",  # the same, but keep the connection open in silence until `release`
    "busy",  # 503 SlowDown
    "broken",  # 500 InternalError
    "deny",  # 403 AccessDenied
    "unsupported",  # 501 NotImplemented
]
_ANSWERS = {
    "busy": (503, "SlowDown"),
    "broken": (500, "InternalError"),
    "deny": (403, "AccessDenied"),
    "unsupported": (501, "NotImplemented"),
}


class FaultyProxy:
    """Passes requests to `target` but for the faults ordered with `fail`, which strike the next requests in turn.

    Args:
        target: http://HOST:PORT of the store.
    """

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.requests: list[str] = []  # "GET /bucket/key" of every request
        self.is_stalled = threading.Event()  # half a body has been sent
        self._faults: deque[tuple[str, Fault]] = deque()
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, fault: Fault, *, times: int = 1, method: str = "") -> None:
        """Order faults for the next `times` requests, of `method` alone if it is given."""
        with self._lock:
            self._faults.extend([(method, fault)] * times)

    def release(self) -> None:
        """End every stalled answer."""
        self._released.set()

    @property
    def num_faults_left(self) -> int:
        """Ordered and not yet used."""
        return len(self._faults)

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Note a request and take its fault."""
        with self._lock:
            self.requests.append(f"{method} {path.split('?')[0]}")
            if self._faults and self._faults[0][0] in ("", method):
                return self._faults.popleft()[1]
            return None

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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault_for(self.command, self.path)
        if fault == "refuse":
            self.close_connection = True
            return
        if fault in _ANSWERS:
            self._answer_error(*_ANSWERS[fault])
            return
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
            self.wfile.write(content[: len(content) // 2])
            if fault == "stall":
                self.proxy.wait_for_release()
            self.close_connection = True
            return
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815 - names that the base class asks for

    def _answer_error(self, status: int, code: str) -> None:
        content = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
