"""Owns an embedded S3 server for the demo and the tests: real requests, over loopback only."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from types import TracebackType
from typing import IO

from dist_mlpl.errors import ConfigError, StorageError

_TRIES_PER_SECOND = 20
_START_SECONDS = 60
_ENVIRONMENT = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


class EmbeddedS3:
    """A `moto_server` child process on a free loopback port, to which this process's AWS variables point.

    As a context manager it starts on entry and stops on exit. Child processes started in between reach it too, since
    they inherit the environment. Contents live in the server's memory and end with it. A process keeps its connection
    to its first server, so start only one server per process.
    """

    def __init__(self) -> None:
        self.endpoint = ""  # http://127.0.0.1:PORT while it runs
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._environment_before: dict[str, str | None] = {}

    def __enter__(self) -> EmbeddedS3:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, wait until it answers, and point the AWS variables at it.

        Raises:
            ConfigError: moto is not installed.
            StorageError: the server ended, or did not answer within a minute.
        """
        if importlib.util.find_spec("moto") is None:
            raise ConfigError(
                "moto is not installed",
                expected="the embedded S3 server",
                where=sys.executable,
                next_step="pip install -e '.[demo]' in the checkout",
            )
        port = _free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        self._child = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait_until_it_answers(self._child)
        except BaseException:
            self.stop()
            raise
        self._environment_before = {name: os.environ.pop(name, None) for name in _ENVIRONMENT}
        os.environ.update(AWS_ENDPOINT_URL=self.endpoint, AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="demo")

    def stop(self) -> None:
        """End the child process of `start`, and restore the environment."""
        for name, value in self._environment_before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._environment_before = {}
        if self._child is not None:
            self._child.terminate()
            try:
                self._child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child = None
        if self._log is not None:
            self._log.close()
            self._log = None
        self.endpoint = ""

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its URL, `s3://NAME`.

        Args:
            name: 3 to 63 lower-case letters, digits and `-`.

        Raises:
            StorageError: the server refused.
        """
        try:
            _ask(urllib.request.Request(f"{self.endpoint}/{name}", method="PUT"))
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise StorageError(
                f"bucket {name!r} was not created: {error}",
                expected="3 to 63 lower-case letters, digits and `-`, and a server that runs",
                where=self.endpoint or "an embedded server that is not running",
                next_step="correct the name, or start the server first",
            ) from error
        return f"s3://{name}"

    def _wait_until_it_answers(self, child: subprocess.Popen[bytes]) -> None:
        for _ in range(_START_SECONDS * _TRIES_PER_SECOND):
            with contextlib.suppress(urllib.error.URLError, OSError):
                _ask(urllib.request.Request(f"{self.endpoint}/moto-api/"))
                if child.poll() is None:  # else another server took the port first
                    return
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1 / _TRIES_PER_SECOND)
                break
        found = "has ended" if child.poll() is not None else f"did not answer in {_START_SECONDS} s"
        raise StorageError(
            f"the embedded S3 server {found}: {self._last_words()}",
            expected="a moto server that answers",
            where=self.endpoint,
            next_step="run `python -m moto.server` by hand to see why; `pip install -e '.[demo]' in the checkout`",
        )

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-300:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(request: urllib.request.Request) -> None:
    """Send one request, ignoring proxies set in the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=5) as answer:
        answer.read()
