"""Owns how a test starts a process: forked from a server that has the package imported, in a tenth of a second.

The imports alone take a process of its own several seconds, and several ranks of one machine longer.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOAD = [
    "pytest", "torch", "torch.distributed", "cloudpickle", "dist_mlpl.cli", "dist_mlpl.local",
    "dist_mlpl.engines.zero", "dist_mlpl.tools.judge", "dist_mlpl.tools.audit", "tests.support.preloaded",
]  # fmt: skip
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_GRACE_SECONDS = 20.0  # for the other ranks to end after one has failed


def start(target: Callable[..., None], arguments: tuple[Any, ...], *, name: str) -> BaseProcess:
    """Start a process that calls a function, which must be importable.

    It has the environment and the folder of the server, which are those of this process when the first one started.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=target, args=arguments, name=name)
    # The server is started with the first process and keeps the environment it finds: libraries that it imports size
    # their thread pools then, and a forked child must not inherit running threads.
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return process


def end(process: BaseProcess) -> None:
    """Kill a process and those that it started, if it lives."""
    if (pid := process.pid) and process.is_alive():
        with suppress(ProcessLookupError):  # killed before it could start its own session
            os.killpg(pid, signal.SIGKILL)
        process.kill()
    process.join()


def one_thread() -> dict[str, str]:
    """Variables under which every process computes on one thread."""
    return dict(_ONE_THREAD)


def rendezvous(world_size: int) -> dict[str, str]:
    """Variables by which the ranks of this machine find one another; each has RANK and LOCAL_RANK besides."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


class Verb:
    """`dist-mlpl ARGUMENTS` under way, as one process or as the ranks that torchrun would start.

    Args:
        arguments: of the command line; nothing of it may start Ray.
        num_ranks: processes.
        variables: the environment, whole.
    """

    def __init__(self, *arguments: str, num_ranks: int, variables: Mapping[str, str]) -> None:
        self._arguments = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="verb-"))
        ranks = rendezvous(num_ranks) if num_ranks > 1 else {}
        self._processes = []
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
            given = (arguments, {**variables, **ranks, **place}, str(self._folder))
            self._processes.append(start(_call_verb, given, name=f"dist-mlpl-{rank}"))

    @property
    def is_running(self) -> bool:
        """Whether any rank lives."""
        return any(process.is_alive() for process in self._processes)

    def signal(self, number: int) -> None:
        """Send a signal to all ranks and what they started."""
        for process in self._processes:
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def finished(self, timeout_seconds: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end; ranks that outlive another's failure are ended, all of them when time is up.

        Raises:
            AssertionError: not ended in time.
        """
        deadline = time.monotonic() + timeout_seconds
        running, is_late = list(self._processes), False
        while running and not is_late:
            ready = wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
            is_late = not ready
            running = [process for process in running if process.sentinel not in ready]
            ended = [process for process in self._processes if process not in running]
            for process in ended:
                process.join()
            if any(process.exitcode for process in ended):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            end(process)  # these processes and what they started, nothing else
        stdout, stderr = (path.read_text() if path.exists() else "" for path in map(self._log, ("stdout", "stderr")))
        shutil.rmtree(self._folder, ignore_errors=True)
        assert any(codes) or None not in codes, f"{self._arguments} did not end in time\n{stdout}\n{stderr}"
        return subprocess.CompletedProcess(self._arguments, next(filter(None, codes), 0), stdout, stderr)

    def _log(self, name: str) -> Path:
        return self._folder / name


def _call_verb(arguments: tuple[str, ...], variables: dict[str, str], folder: str) -> None:
    """What a rank does: the command line, as if it had been started by its name."""
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        log = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, descriptor)
        os.close(log)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # open until the process ends
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["dist-mlpl", *arguments]
    import torch

    from dist_mlpl.cli import main

    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", "1")))  # libraries read it when the server began
    try:
        main()
    finally:
        atexit._run_exitfuncs()
