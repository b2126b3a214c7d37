"""Owns how many threads a rank's arithmetic uses; must run before torch loads.

Two ranks whose OpenMP threads spin on one another's cores run ten times slower, so waiting threads sleep, and the
ranks of a node share its cores.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping


def set_thread_environment(environment: MutableMapping[str, str], *, num_ranks: int) -> None:
    """Set OMP_WAIT_POLICY and OMP_NUM_THREADS unless somebody already did.

    Args:
        environment: of this process, or of one about to start.
        num_ranks: ranks that share this node's cores.
    """
    num_cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // max(1, num_ranks))))
