"""Owns a small web server of files in memory, which honours ranges, or does not, as simple servers do."""

from __future__ import annotations

import base64
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class WebServer:
    """Serves `files` on loopback until it is left.

    Args:
        honours_range: answer 206 with the part asked for, else 200 with the whole.
        honours_head: answer HEAD, else 403, as a URL does that is signed for GET alone.
        has_etag: tell an ETag, else the time of change alone.
        password: ask for `user` with this password; empty for nobody.
    """

    def __init__(
        self, *, honours_range: bool = True, honours_head: bool = True, has_etag: bool = True, password: str = ""
    ) -> None:
        self.files: dict[str, bytes] = {}  # by path, `/folder/x`
        self.changed = "Thu, 01 Jan 2026 00:00:00 GMT"
        self.honours_range, self.honours_head, self.has_etag = honours_range, honours_head, has_etag
        self.authorization = "Basic " + base64.b64encode(f"user:{password}".encode()).decode() if password else ""
        self.num_body_bytes = 0  # written so far
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": self}))
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.address}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small bodies wait for the head to be acknowledged
    web: WebServer

    def do_GET(self) -> None:
        content = self.web.files.get(self.path.split("?")[0])
        if self.web.authorization and self.headers.get("Authorization") != self.web.authorization:
            self._answer(401, b"")
        elif self.command == "HEAD" and not self.web.honours_head:
            self._answer(403, b"")
        elif content is None:
            self._answer(404, b"no")
        elif self.web.honours_range and (wanted := self._range(len(content))):
            start, end = wanted
            if start >= len(content):
                self._answer(416, b"", content_range=f"bytes */{len(content)}")
            else:
                self._answer(206, content[start:end], content_range=f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self._answer(200, content)

    do_HEAD = do_GET  # noqa: N815 - a name that the base class asks for

    def _range(self, num_bytes: int) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(found[1]), min(int(found[2] or num_bytes) + 1, num_bytes)) if found else None

    def _answer(self, status: int, body: bytes, *, content_range: str = "") -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", self.web.changed)
        if self.web.has_etag:
            self.send_header("ETag", f'"{hash(body)}"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.web.num_body_bytes += len(body)
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
