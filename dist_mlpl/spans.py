"""Owns the named parts of a step: their names in profiles, and the time each takes while measuring is on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_seconds: defaultdict[str, float] | None = None  # by part; None while measuring is off


@contextmanager
def span(name: str) -> Iterator[None]:
    """Run a part of a step under a name; costs nothing while measuring is off.

    While it is on, the GPU is synchronised at both ends, so that each part is charged for its own work.
    """
    if _seconds is None:
        yield
        return
    with torch.profiler.record_function(name):
        began = _now()
        yield
        _seconds[name] += _now() - began


def measure(is_on: bool) -> dict[str, float]:
    """Start measuring from zero, or stop.

    Returns:
        Seconds by part since the last call; empty if measuring was off.
    """
    global _seconds
    found, _seconds = dict(_seconds or {}), defaultdict(float) if is_on else None
    return found


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
