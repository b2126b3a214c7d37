"""Owns how a test runs a function on several gloo processes of this machine.

Children are forked from a server (`forks`), so a rank starts in a fraction of a second. The function travels by value
(cloudpickle): the child does not import the test module, and functions defined inside a test work too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from tests.support import forks

_HUNG = "Timeout ("  # how faulthandler begins the stacks that it prints when time is up
_ALARM_SECONDS = 5.0  # for the alarms of hung children to arrive
_GRACE_SECONDS = 1.0  # after the first failure
_LOG_TAIL = 4000  # characters of a rank's output in the message of a failure


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
    use_group: bool = True,
) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` new processes and return what each returned.

    Every child has this process's environment and folder, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT, one thread, and a gloo process group. What children print is printed here when they have ended.

    Args:
        function: anything cloudpickle takes; what it returns must pickle.
        world_size: number of processes, R; 1 is a process group of one.
        args: passed on by value.
        env: variables set on top of the environment, in every child.
        timeout_seconds: for the whole call; a child that outlives it prints its stack and ends, parent or not.
        use_group: False leaves starting the process group to the function (the variables are set).

    Returns:
        R results in rank order.

    Raises:
        The first exception raised in a child, with the child's traceback and output as notes.
        RuntimeError: a child died without an exception.
        TimeoutError: not all children ended in time.
    """
    payload = _by_value(function, args)
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    variables = dict(os.environ) | forks.one_thread() | forks.rendezvous(world_size) | dict(env or {})
    deadline = time.monotonic() + timeout_seconds
    children: list[_Child] = []
    try:
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(_start(payload, variables | place, str(folder), deadline, use_group))
        _collect(children, folder, deadline + _ALARM_SECONDS)
    finally:
        for child in children:
            child.end()  # these processes and what they started, nothing else
        for rank in range(world_size):
            if log := _read_log(folder, rank):
                print(f"--- rank {rank} of {world_size}\n{log}")
        shutil.rmtree(folder, ignore_errors=True)
    return [child.result for child in children]


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
    result: Any = None

    def end(self) -> None:
        forks.end(self.process)
        self.pipe.close()


def _by_value(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickle the function with what it refers to in its own module, which a child may not be able to import."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or module.__name__ == "__main__" or not getattr(module, "__file__", ""):
        return cloudpickle.dumps((function, args))
    listed = cloudpickle.list_registry_pickle_by_value()
    cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps((function, args))
    finally:
        if module.__name__ not in listed:
            cloudpickle.unregister_pickle_by_value(module)


def _start(payload: bytes, variables: dict[str, str], folder: str, deadline: float, use_group: bool) -> _Child:
    ours, theirs = Pipe()
    arguments = (theirs, payload, variables, folder, deadline, use_group)
    process = forks.start(_child_main, arguments, name=f"rank-{variables['RANK']}")
    theirs.close()
    return _Child(process, ours)


def _collect(children: list[_Child], folder: Path, deadline: float) -> None:
    """Wait for every result. After a failure its peers get a moment to fail too: the cause is raised."""
    waiting = dict(enumerate(children))
    failures: list[tuple[float, int, BaseException]] = []  # when, rank, what
    while waiting:
        ready = wait([child.pipe for child in waiting.values()], timeout=max(0.0, deadline - time.monotonic()))
        for rank in [rank for rank, child in waiting.items() if child.pipe in ready]:
            child = waiting.pop(rank)
            try:
                moment, trace, content = cloudpickle.loads(child.pipe.recv_bytes())
            except (EOFError, ConnectionError):  # the pipe was closed by the end of the process
                # Peers may report the broken connection sooner than this end is seen, but it is the cause.
                failures.append((0.0, rank, _death(child, rank, folder)))
                continue
            if trace is None:
                child.result = cloudpickle.loads(content)
            else:
                failures.append((moment, rank, _rebuilt(trace, content, rank, _read_log(folder, rank))))
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if not ready:
            break
    if failures:
        raise min(failures, key=lambda failure: failure[:2])[2]
    if waiting:
        raise TimeoutError(f"ranks {list(waiting)} of {len(children)} did not end in time, nor ring their alarm")


def _death(child: _Child, rank: int, folder: Path) -> BaseException:
    child.process.join()
    log = _read_log(folder, rank)[-_LOG_TAIL:]
    if _HUNG in log:
        return TimeoutError(f"rank {rank} did not end in time\n{log}")
    return RuntimeError(f"rank {rank} died with exit code {child.process.exitcode}\n{log}")


def _rebuilt(trace: str, content: bytes | None, rank: int, log: str) -> BaseException:
    error: BaseException
    try:
        error = cloudpickle.loads(content) if content else RuntimeError("an exception that does not pickle")
    except Exception as problem:
        error = RuntimeError(f"an exception that does not unpickle: {problem}")
    error.add_note(f"raised on rank {rank}:\n{trace}")
    if log:
        error.add_note(f"output of rank {rank}:\n{log[-_LOG_TAIL:]}")
    return error


def _read_log(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def _child_main(
    pipe: Connection, payload: bytes, variables: dict[str, str], folder: str, deadline: float, use_group: bool
) -> None:
    os.setsid()  # its own process group, so that processes it starts (loader workers) can be ended with it
    os.environ.clear()
    os.environ.update(variables)
    rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    log = open(f"{folder}/rank-{rank}.log", "w", buffering=1)  # noqa: SIM115  # open until the process ends
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    sys.stdout = sys.stderr = log
    faulthandler.enable(log)
    # At the deadline (the clock is the machine's) an alarm prints the stacks and ends the process, parent or not.
    remaining_seconds = max(0.1, deadline - time.monotonic())
    faulthandler.dump_traceback_later(remaining_seconds, exit=True, file=log)
    try:
        content = _call(payload, rank, world_size, folder, remaining_seconds, use_group)
        message = cloudpickle.dumps((time.monotonic(), None, content))
    except BaseException as error:
        message = cloudpickle.dumps((time.monotonic(), traceback.format_exc(), _pickled_error(error)))
    pipe.send_bytes(message)
    # Stay until the parent has every result and ends this process: leaving early would break connections that slower
    # peers still use. It also spares the destructors of process groups, which may wait for peers that are gone.
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()
    os._exit(1)  # the parent is gone


def _call(payload: bytes, rank: int, world_size: int, folder: str, remaining_seconds: float, use_group: bool) -> bytes:
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    torch.set_num_threads(1)
    if use_group:
        # A file, not a port: nothing else can take it in between.
        store = FileStore(f"{folder}/store", world_size)
        limit = timedelta(seconds=remaining_seconds + _ALARM_SECONDS)  # so that the alarm comes first
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    function, args = cloudpickle.loads(payload)
    return cloudpickle.dumps(function(rank, world_size, *args))


def _pickled_error(error: BaseException) -> bytes | None:
    try:
        return cloudpickle.dumps(error)
    except Exception:
        return None
