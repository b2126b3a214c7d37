"""Owns how a test runs functions in forked children and waits for what they return."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_FORK = get_context("fork")


def call_forked(*functions: Callable[[], Any]) -> list[Any]:
    """Call every function in a child of its own, all at once, and return what they returned.

    Raises:
        AssertionError: a child raised, with its traceback, or died.
    """
    children = [_start(function) for function in functions]
    try:
        answers = [_received(pipe) for _, pipe in children]
    finally:
        for process, pipe in children:
            process.join()
            pipe.close()
    for is_good, value in answers:
        assert is_good, value
    return [value for _, value in answers]


@contextlib.contextmanager
def killed_at_the_end(function: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Run a function in a child; yields a call that ends the child by SIGKILL, which leaving the block does too."""
    process, pipe = _start(function)

    def kill() -> None:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()

    try:
        yield kill
    finally:
        kill()
        pipe.close()


def _start(function: Callable[[], Any]) -> tuple[BaseProcess, Connection]:
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_main, args=(theirs, function))
    process.start()
    theirs.close()
    return process, ours


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "the child died without a word"


def _main(pipe: Connection, function: Callable[[], Any]) -> None:
    try:
        answer = (True, function())
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # no exit handlers: they belong to the parent
