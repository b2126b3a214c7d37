"""Owns how much memory a call takes at its highest, as torch's allocator on the CPU counts it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def most_bytes(call: Callable[[], object]) -> int:
    """Of what a call allocates, ahead of what it frees, at the highest point."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
