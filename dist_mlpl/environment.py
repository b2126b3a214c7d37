"""Owns versions of installed packages, and the environment variables needed before torch and Ray load.

Two ranks whose OpenMP threads spin on each other's cores run ten times slower, so waiting threads sleep, and the ranks
of a node share its cores.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from importlib.metadata import PackageNotFoundError, version


def prepare_environment(environment: MutableMapping[str, str], *, num_ranks: int) -> None:
    """Set OpenMP and Ray variables that are not set yet.

    Args:
        environment: variables of this process, or of one about to start; changed in place.
        num_ranks: number of ranks that share this node's cores.
    """
    num_cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // max(1, num_ranks))))
    # Ray prints a paragraph about a lost worker; the run's own line suffices.
    environment.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")


def installed_version(package: str) -> str:
    """Version of a package; `absent` if it is not installed, as DeepSpeed may be with the plain engine."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
