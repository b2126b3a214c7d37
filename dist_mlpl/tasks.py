"""Owns Ray tasks: one function mapped over many arguments on a cluster, with lost tasks retried."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError, RayTaskError

from dist_mlpl import storage
from dist_mlpl.errors import MlplError, RunError

T = TypeVar("T")

_MAX_LOSSES = 5  # how often one task may be lost to dying workers or nodes
_WAITING = 2  # tasks queued per CPU of the cluster, besides the running one
_REACH_SECONDS = 10.0  # timeout for connecting to a cluster's port


def map_tasks(
    task: Callable[..., T], calls: Iterable[tuple[Any, ...]], *, address: str
) -> Generator[tuple[int, T], None, None]:
    """Run a function on many arguments on a Ray cluster, one CPU per call.

    The package must be installed on every node, and its inputs and outputs must be reachable from there: a bucket or a
    shared disk. Nodes may come and go meanwhile.

    Args:
        task: a picklable function; it must be safe to repeat, since a lost worker's task runs again.
        calls: arguments of each call, consumed lazily.
        address: address of a running cluster (`auto`, `HOST:6379`, `ray://HOST:10001`), or `local` to start one here.

    Yields:
        (number of the call, its result), as calls finish. The first error cancels the rest and is raised.

    Raises:
        MlplError: raised by the function.
        RunError: a task was lost too often, the function raised another error, or no cluster at the address.
    """
    numbered = enumerate(calls)
    with _joined(address):
        shared = ray.put(task)
        remote = ray.remote(_run).options(num_cpus=1, max_retries=_MAX_LOSSES)
        configuration = storage.configuration()
        running: dict[Any, int] = {}
        try:
            while True:
                room = (1 + _WAITING) * max(1, math.ceil(ray.cluster_resources().get("CPU", 1))) - len(running)
                for number, call in islice(numbered, max(0, room)):
                    running[remote.remote(shared, configuration, call)] = number
                if not running:
                    return
                for reference in ray.wait(list(running))[0]:
                    yield running.pop(reference), _result(reference)
        finally:
            for reference in running:
                ray.cancel(reference)


def _run(task: Callable[..., T], configuration: dict[str, Any], call: tuple[Any, ...]) -> T:
    storage.configure_storage(**configuration)
    return task(*call)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MlplError):
            raise cause from None
        raise _failed(error, "the log of that worker says more") from error
    except RayError as error:
        raise _failed(
            error, "run the same command again, it goes on; check the nodes' memory and `ray status`"
        ) from error


def _failed(error: Exception, next_step: str) -> RunError:
    text = str(error).strip().splitlines()
    return RunError(
        f"a Ray task failed: {text[-1] if text else type(error).__name__}",
        expected=f"tasks that end, lost {_MAX_LOSSES} times at most",
        where="ray",
        next_step=next_step,
    )


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    """Join a cluster while the block runs, unless this process has joined one already."""
    if ray.is_initialized():
        yield
        return
    join(address, where=f"--ray-address {address}")
    try:
        yield
    finally:
        ray.shutdown()


def join(address: str, *, where: str) -> None:
    """Join a Ray cluster, failing fast if there is none; Ray itself would try for minutes.

    Args:
        address: see `map_tasks`.
        where: name of the setting, for messages.

    Raises:
        RunError: no cluster at the address.
    """
    try:
        place = urlsplit(address if "//" in address else f"//{address}")
        if place.hostname is not None and place.port is not None:  # otherwise `auto` or `local`
            socket.create_connection((place.hostname, place.port), timeout=_REACH_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"no Ray cluster: {' '.join(str(error).split())[:300]}",
            expected="a running cluster, or `local` to start one here",
            where=where,
            next_step="check the address and `ray status`; the head's port is 6379 unless it was told another",
        ) from error
