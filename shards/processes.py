"""Owns running work on processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from typing import Any, Protocol, TypeVar

from dist_mlpl import storage
from dist_mlpl.errors import ConfigError, RunError

T = TypeVar("T")

_WAITING = 2  # tasks queued per worker, besides the running one


class Mapper(Protocol):
    """Runs a function on many arguments somewhere, and yields (number of the call, its result) as calls finish.

    The function is sent to every worker once, and so are each call's arguments and result. Calls are taken from the
    iterable lazily. The first error cancels the rest and is raised; closing the generator cancels the rest too.
    """

    def __call__(
        self, task: Callable[..., T], calls: Iterable[tuple[Any, ...]], /
    ) -> Generator[tuple[int, T], None, None]: ...


def on_processes(workers: int | None) -> Mapper:
    """A mapper over processes of this machine.

    Args:
        workers: number of processes, at least 1; None for one per core that this process may use.

    Raises:
        ConfigError: fewer than 1.
    """
    num_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if num_workers < 1:
        raise ConfigError(f"workers {workers}", expected="at least 1", where="workers", next_step="correct the option")

    def run(task: Callable[..., T], calls: Iterable[tuple[Any, ...]], /) -> Generator[tuple[int, T], None, None]:
        return run_tasks(task, calls, num_workers)

    return run


def run_tasks(
    task: Callable[..., T], calls: Iterable[tuple[Any, ...]], workers: int
) -> Generator[tuple[int, T], None, None]:
    """Run a function on many arguments in worker processes; with one worker or one call, in this process.

    Workers are spawned, not forked, as a forked child would inherit the state of open connections. They end when this
    process does, however it ends, and ignore Ctrl-C.

    Args:
        task: a picklable function; arguments and results are pickled too.
        calls: arguments of each call.
        workers: most processes, at least 1.

    Yields:
        (number of the call, its result), as calls finish. The first error cancels the rest and is raised.

    Raises:
        RunError: a worker process died.
    """
    numbered = enumerate(calls)
    first = list(islice(numbered, workers * (1 + _WAITING)))
    if workers == 1 or len(first) <= 1:
        for number, call in chain(first, numbered):
            yield number, task(*call)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(first)),
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(task, storage.configuration()),
    )
    try:
        running: dict[Future[T], int] = {pool.submit(_call, call): number for number, call in first}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                running.update((pool.submit(_call, call), later) for later, call in islice(numbered, 1))
                yield number, future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died",
            expected="workers that live until they are told to stop",
            where=f"one of {min(workers, len(first))} workers",
            next_step="look for the out-of-memory killer in the system's log; run again with fewer workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_task: Callable[..., Any] | None = None  # set in worker processes


def _begin(task: Callable[..., Any], configuration: dict[str, Any]) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    storage.configure_storage(**configuration)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(call: tuple[Any, ...]) -> Any:
    assert _task is not None
    return _task(*call)
