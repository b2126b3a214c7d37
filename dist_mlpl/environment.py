"""Owns what a process finds installed, and what must stand in its environment before torch and Ray load.

Two ranks whose OpenMP threads spin on one another's cores run ten times slower, so waiting threads sleep, and the
ranks of a node share its cores.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from importlib.metadata import PackageNotFoundError, version


def prepare_environment(environment: MutableMapping[str, str], *, num_ranks: int) -> None:
    """Set what nobody has set already.

    Args:
        environment: of this process, or of one about to start.
        num_ranks: ranks that share this node's cores.
    """
    num_cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // max(1, num_ranks))))
    # Ray prints a paragraph for a lost worker; the run's own line says it.
    environment.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")


def installed_version(package: str) -> str:
    """Of an installed package; `absent` where it is not, as DeepSpeed for the plain engine, or this one in a job."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
